"""A table of a program's sites, for a person to read."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

from . import _jax
from ._distribution import lane_shape
from ._errors import AddressError, nearest
from ._nested import leaves_of
from ._observe import Recorded
from ._posterior import Posterior
from ._program import Program, program_of
from ._staging import stage
from ._table import Entry

_COLUMNS = (
    "address",
    "kind",
    "distribution",
    "time",
    "lanes",
    "batch",
    "event",
    "dtype",
    "support",
    "gradient",
    "place",
)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The result of `shapes`. Example: see `shapes`.

    Attributes:
        rows: one dict per site, with the columns' names as keys.
    """

    rows: tuple[dict[str, Any], ...]

    def __getitem__(self, address: str) -> dict[str, Any]:
        """Return the row of an address."""
        known = {row["address"]: row for row in self.rows}
        if address not in known:
            raise AddressError(f"shapes at {_jax.caller()}: there is no address {address!r}.{nearest(address, known)}")
        return known[address]

    def __repr__(self) -> str:
        """Show the table as text."""
        lines = [[str(row[c]) for c in _COLUMNS] for row in self.rows]
        widths = [max(len(c), *(len(line[n]) for line in lines), 0) for n, c in enumerate(_COLUMNS)] if lines else []
        rows = [_COLUMNS, *lines] if lines else [("no sites",)]
        widths = widths or [8]
        return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(row[c]))}</td>" for c in _COLUMNS) + "</tr>" for row in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


def shapes(target: Program | Posterior) -> Shapes:
    """Tabulate the sites of a program: address, kind, time, lanes, batch and event shapes, support, gradient strategy.

    Args:
        target: a bound program or a posterior (whose observed sites are marked).

    Returns:
        A table that prints as text and shows as HTML in notebooks; `table["mu"]["event"]` reads it.

    The choice of a site has shape `time + lanes + batch + event`. The gradient is the strategy that the site asks for,
    else whether its draws can be differentiated (`pathwise`) or how many values one element has.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def walk():
        ...     step = lambda x, _: (ex.sample("x", dist.Normal(x, 1.0)), None)
        ...     jax.lax.scan(step, 0.0, length=5)
        >>> ex.shapes(walk())["x"]["time"]
        (5,)
    """
    program = program_of(target, "shapes")
    observed = {path for path, _ in leaves_of(target.observations)} if isinstance(target, Posterior) else set()
    rows = [_row(path, entry, path in observed) for path, entry in leaves_of(stage(program).table)]
    return Shapes(tuple(rows))


def _row(path: str, entry: Entry, observed: bool) -> dict[str, Any]:
    site = entry.site
    kind = "observed" if observed else entry.kind
    common = {"address": path, "kind": kind + (", in a branch" if entry.conditional else ""), "time": entry.times}
    common |= {"dtype": str(entry.dtype), "place": ":".join(site.where.rsplit("/", 1)[-1].split(":"))}
    if isinstance(site, Recorded):
        empty = {"distribution": "", "batch": (), "support": "", "gradient": ""}
        return common | empty | {"lanes": site.sizes, "event": site.shape}
    lanes, event = lane_shape(site.lanes), site.event_ndim
    own = site.shape
    d = site.distribution([None] * site.structure.num_leaves)
    return common | {
        "distribution": _name(d),
        "lanes": lanes,
        "batch": own[: len(own) - event],
        "event": own[len(own) - event :],
        "support": "?" if site.support is None else str(site.support),
        "gradient": repr(site.gradient) if site.gradient is not None else _default(d),
    }


def _name(d: Any) -> str:
    while hasattr(d, "base_dist") and type(d).__name__ in ("Independent", "ExpandedDistribution"):
        d = d.base_dist
    return type(d).__name__


def _default(d: Any) -> str:
    return "pathwise" if d.has_rsample else "finite" if d.has_enumerate_support else "score"
