"""The table of sites: what stands at which address of a staged model, and where in the user's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import _jax
from ._branch import branch_p, branches_of
from ._errors import AddressError, ControlFlowError, ShapeError
from ._nested import leaves_of, nested
from ._nesting import scope_address
from ._observe import Recorded, deterministic_p
from ._sample import sample_p
from ._sources import addresses


class Entry(NamedTuple):
    """A site (or a deterministic value) and the sizes of the scans around it, outermost first."""

    site: Any  # a `Site` or a `Recorded`
    times: tuple[int, ...]
    conditional: bool = False  # stands in a branch that may not be taken, or has a mask
    missing: int | None = None  # of a partly observed site: this entry stands for so many missing elements
    joint: bool = False  # of `vi.marginal` or `vi.normalize`: one density for several choices
    estimated: bool = False  # that density is only estimated

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the site's choice: time axes, lanes, batch, event."""
        if self.missing is not None:
            return (self.missing, *self.shape_of_all[len(self.elements) :])
        return self.shape_of_all

    @property
    def shape_of_all(self) -> tuple[int, ...]:
        """The shape without regard to what is observed."""
        return self.times + self.site.value_shape

    @property
    def elements(self) -> tuple[int, ...]:
        """The shape of the independent elements: time axes, lanes, batch."""
        return self.times + self.site.element_shape

    @property
    def dtype(self) -> Any:
        """The dtype of the site's choice."""
        return self.site.dtype

    @property
    def kind(self) -> str:
        """`choice`, `observed` (fixed by the program) or `deterministic`."""
        if isinstance(self.site, Recorded):
            return "deterministic"
        return "observed" if self.site.fixed else "choice"


Table = dict[str, Any]


def site_table(jaxpr: Any, times: tuple[int, ...] = ()) -> Table:
    """Return the nested dict of entries of a scope; refuse a duplicate address and an unfollowable place."""
    table: Table = {}
    places: dict[str, str] = {}
    for eqn in _jax.close(jaxpr)[0].eqns:
        for address, entry in _entries(eqn, times).items():
            if address in table:
                first, second = places[address], _place(eqn, entry)
                again = _again(table[address], entry) if first == second else ""
                raise AddressError(
                    f"address {address!r} is used twice in one model: at {first} and at {second}{again}. Give each site of a "
                    "model its own address, or call a nested model at an address of its own."
                )
            table[address] = entry
            places[address] = _place(eqn, entry)
    return table


def _again(first: Any, second: Any) -> str:
    """Say how one line of a model can come to be there twice."""
    depths = [len(e.times) if isinstance(e, Entry) else None for e in (first, second)]
    if depths[0] != depths[1]:
        return (
            " (lax.map with a batch_size that leaves a remainder writes its body twice: use a divisor of the length, "
            "jax.vmap or lax.scan)"
        )
    return " (a loop? use jax.vmap or lax.scan, or an f-string address)"


def _place(eqn: Any, entry: Any) -> str:
    return _where(entry) if isinstance(entry, Entry) else _jax.place(eqn)


def _entries(eqn: Any, times: tuple[int, ...]) -> Table:
    if eqn.primitive is sample_p:
        site = eqn.params["site"]
        return {site.address: Entry(site, times, conditional="mask" in site.extras)}
    if eqn.primitive is deterministic_p:
        return {eqn.params["site"].address: Entry(eqn.params["site"], times)}
    if not has_sites(eqn):
        return {}
    inner = _jax.called_jaxpr(eqn)
    if (address := scope_address(eqn)) is not None:
        return {address: site_table(inner, times)}
    inner = _jax.custom_jaxpr(eqn) if inner is None else inner
    if inner is not None:
        return site_table(inner, times)
    if eqn.primitive in _jax.SCAN:
        return site_table(eqn.params["jaxpr"], (*times, eqn.params["length"]))
    if (branches := branches_of(eqn)) is not None:
        return _union([site_table(branch, times) for branch in branches])
    if eqn.primitive.name == "marginal":
        return _without(site_table(eqn.params["jaxpr"], times), frozenset(eqn.params["hidden"]))
    if eqn.primitive.name == "stochastic":
        entries = eqn.params["density"].entries
        return nested((path, entry._replace(times=times + entry.times)) for path, entry in entries)
    raise unfollowable(eqn)


def _without(table: Table, hidden: frozenset[str]) -> Table:
    return nested((path, entry) for path, entry in leaves_of(table) if path not in hidden)


def has_sites(eqn: Any) -> bool:
    """Tell whether an equation is a site, a recorded value, or holds some."""
    return eqn.primitive in (sample_p, branch_p, deterministic_p) or _jax.holds(eqn, sample_p, deterministic_p)


def _union(tables: list[Table]) -> Table:
    """Join the tables of branches: an address of several branches is one choice, if its types agree."""
    joined: Table = {}
    for address in dict.fromkeys(a for table in tables for a in table):
        found = [table[address] for table in tables if address in table]
        if all(isinstance(entry, dict) for entry in found):
            joined[address] = _union([table.get(address, {}) for table in tables])
            continue
        _check_alike(address, found)
        absent = len(found) < len(tables) or any(entry.conditional for entry in found)
        joined[address] = found[0]._replace(conditional=absent)
    return joined


def _check_alike(address: str, found: list[Any]) -> None:
    first = found[0]
    for other in found[1:]:
        same = isinstance(first, Entry) and isinstance(other, Entry) and first.kind == other.kind
        if not same or (first.shape, first.dtype, first.elements) != (other.shape, other.dtype, other.elements):
            raise ShapeError(
                f"address {address!r} stands in two branches with different meanings: {_described(first)} at "
                f"{_where(first)} and {_described(other)} at {_where(other)}. Give them one shape, event shape "
                "and dtype (to_event makes batch axes an event), or two addresses."
            )


def _described(entry: Any) -> str:
    if isinstance(entry, dict):
        return "a nested model"
    event = entry.shape[len(entry.elements) :]
    return f"a {entry.kind} of shape {entry.shape} ({entry.dtype}), event shape {event},"


def _where(entry: Any) -> str:
    return entry.site.where if isinstance(entry, Entry) else next(_where(e) for e in entry.values())


def part(table: Table, wanted: Callable[[Entry], bool]) -> Table:
    """Return the nested dict of those entries that are wanted."""
    found: Table = {}
    for address, entry in table.items():
        if isinstance(entry, dict):
            if inner := part(entry, wanted):
                found[address] = inner
        elif wanted(entry):
            found[address] = entry
    return found


def choices_of(table: Table) -> Table:
    """Return the entries of the choices."""
    return part(table, lambda entry: entry.kind == "choice")


def place_of(eqn: Any) -> str:
    """Return `file:line` of an equation with sites: that of the site, of the equation, or of the first site in it."""
    if eqn.primitive in (sample_p, deterministic_p):
        return eqn.params["site"].where
    return _jax.place(eqn) or next((place_of(e) for e in _inside(eqn) if has_sites(e)), "unknown")


def _inside(eqn: Any) -> Iterator[Any]:
    for jaxpr in _jax.sub_jaxprs(eqn):
        yield from _jax.close(jaxpr)[0].eqns


def unfollowable(eqn: Any) -> ControlFlowError:
    """Return the error for sites inside an equation that no rule covers."""
    names = ", ".join(sorted({repr(a) for j in _jax.sub_jaxprs(eqn) for a in addresses(j, deterministic_p)}))
    remedy = {
        "while": (
            "How many steps it takes is not known, so its choices have no shape: use ex.bounded_while(..., max_steps=), "
            "or lax.scan or lax.fori_loop with a fixed number of steps."
        ),
        "stochastic": (
            "These choices have one density together, estimated or summed, which this transformation would have to "
            "change: apply it to the program that vi.marginal or vi.normalize is made of."
        ),
    }.get(eqn.primitive.name, "Move the site out of it, or use vmap, scan, cond or jit.")
    return ControlFlowError(
        f"site {names} at {place_of(eqn)} stands inside {eqn.primitive.name!r}, where sites cannot be followed "
        f"soundly. {remedy}"
    )
