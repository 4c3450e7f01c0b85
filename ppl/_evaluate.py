"""The interpreter: one walk over a staged model, with a visitor that says what happens at each site.

`simulate`, `assess`, `generate`, re-binding inside an objective, and the change to unconstrained space differ only in
the visitor. Control flow is a rule per kind of equation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax
from ._errors import AddressError, ControlFlowError
from ._nesting import scope_address
from ._sample import Site, sample_p
from ._sources import addresses, sources


class Visit(NamedTuple):
    """What a visitor did at a site: `record` enters the choices, the densities have one number per lane."""

    value: Any
    record: Any
    log_density: Any
    log_weight: Any


class Outcome(NamedTuple):
    """The result of a walk: outputs, choices (nested dict), and the two sums over all sites."""

    outputs: list[Any]
    choices: dict[str, Any]
    log_density: Any
    log_weight: Any


Visitor = Callable[[Site, list[Any], Any, Any], Visit]
"""`visitor(site, leaves, source, given)`: the source of randomness, the given value; either may be None."""


def evaluate(jaxpr: Any, args: Any, visitor: Visitor, key: Any = None, given: Any = None) -> Outcome:
    """Walk a jaxpr. `given` is a nested dict shaped like the choices; scanned entries carry a leading time axis."""
    given = given or {}
    equations = _jax.close(jaxpr)[0].eqns
    found = iter(()) if key is None else sources(equations, key, lambda site: site.address not in given)
    return _call(jaxpr, args, visitor, found, given)


def _call(jaxpr: Any, args: Any, visitor: Visitor, found: Iterator[Any], given: dict[str, Any]) -> Outcome:
    env, opened = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
    outcome = walk(opened.eqns, env, visitor, found, given)
    return outcome._replace(outputs=[env.read(v) for v in opened.outvars])


def walk(
    equations: Any, env: _jax.Environment, visitor: Visitor, found: Iterator[Any], given: dict[str, Any]
) -> Outcome:
    """Walk some equations, adding their results to `env`; `found` yields the sources of randomness in order."""
    total = Outcome([], {}, 0.0, 0.0)
    for eqn in equations:
        values = [env.read(v) for v in eqn.invars]
        if eqn.primitive is sample_p:
            outcome = _at_site(eqn, values, visitor, found, given)
        elif not _jax.holds(eqn, sample_p):
            outcome = Outcome(_jax.bind(eqn, values), {}, 0.0, 0.0)
        else:
            outcome = _inside(eqn, values, visitor, found, given)
        env.update(zip(eqn.outvars, outcome.outputs, strict=True))
        total = Outcome(
            [],
            total.choices | outcome.choices,  # `site_table` has seen that the addresses differ
            plus(total.log_density, outcome.log_density),
            plus(total.log_weight, outcome.log_weight),
        )
    return total


def plus(a: Any, b: Any) -> Any:
    """Add, leaving out exact zeros: they would only lengthen the program."""
    if isinstance(b, float) and b == 0.0:
        return a
    return b if isinstance(a, float) and a == 0.0 else a + b


def _total(density: Any) -> Any:
    return density if isinstance(density, float) else jnp.sum(density)


def _at_site(eqn: Any, leaves: Any, visitor: Visitor, found: Iterator[Any], given: dict[str, Any]) -> Outcome:
    site = eqn.params["site"]
    visit = visitor(site, leaves, next(found, None), given.get(site.address))
    log_density = visit.log_density
    if not isinstance(log_density, float):
        log_density = _jax.tag(log_density, site.address)
    return Outcome([visit.value], {site.address: visit.record}, _total(log_density), _total(visit.log_weight))


def _inside(eqn: Any, values: Any, visitor: Visitor, found: Iterator[Any], given: dict[str, Any]) -> Outcome:
    address = scope_address(eqn)
    inner = _jax.called_jaxpr(eqn)
    if address is not None:
        key = next(found, None)
        outcome = evaluate(inner, values, visitor, key, given.get(address))
        return outcome._replace(choices={address: outcome.choices})
    if inner is not None:  # jit and checkpoint only wrap: their sites belong to this scope
        return _call(inner, values, visitor, found, given)
    if eqn.primitive in _jax.SCAN:
        return _scan(eqn, values, visitor, next(found, None), given)
    raise unfollowable(eqn)


def _scan(eqn: Any, values: Any, visitor: Visitor, key: Any, given: dict[str, Any]) -> Outcome:
    """Run a scan whose body has sites: keys and given values become inputs of each step, choices outputs."""
    num_consts, num_carry = _jax.scan_sizes(eqn)
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    consts, carry, xs = (
        values[:num_consts],
        values[num_consts : num_consts + num_carry],
        values[num_consts + num_carry :],
    )
    here = {address: given[address] for address in site_table(body) if address in given}
    step_keys = None if key is None else jax.random.split(key, length)

    def step(carry: Any, inputs: Any) -> Any:
        step_key, step_given, x = inputs
        outcome = evaluate(body, [*consts, *carry, *x], visitor, step_key, step_given)
        out = outcome.outputs
        return out[:num_carry], (out[num_carry:], outcome.choices, outcome.log_density, outcome.log_weight)

    carry, (ys, choices, log_density, log_weight) = lax.scan(
        step, carry, (step_keys, here, xs), length=length, reverse=eqn.params["reverse"], unroll=eqn.params["unroll"]
    )
    return Outcome([*carry, *ys], choices, jnp.sum(log_density), jnp.sum(log_weight))


def unfollowable(eqn: Any) -> ControlFlowError:
    """Return the error for sites inside an equation that no rule covers."""
    names = ", ".join(repr(a) for j in _jax.sub_jaxprs(eqn) for a in addresses(j))
    remedy = {
        "while": "Use lax.scan with a fixed number of steps.",
        "cond": "Use jnp.where on the distribution's parameters, or dist.Mixture.",
    }.get(eqn.primitive.name, "Move the site out of it, or use vmap, scan or jit.")
    return ControlFlowError(
        f"site {names} at {_jax.place(eqn)} stands inside {eqn.primitive.name!r}, where sites cannot be followed "
        f"soundly. {remedy}"
    )


# --- the table of sites -----------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A site and the sizes of the scans around it, outermost first."""

    site: Site
    times: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the site's choice: time axes, lanes, batch, event."""
        return self.times + self.site.value_shape

    @property
    def dtype(self) -> Any:
        """The dtype of the site's choice."""
        return self.site.dtype


def site_table(jaxpr: Any, times: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the nested dict of sites of a scope; refuse a duplicate address and an unfollowable place."""
    table: dict[str, Any] = {}
    for eqn in _jax.close(jaxpr)[0].eqns:
        for address, entry in _entries(eqn, times).items():
            if address in table:
                first, second = _where(table[address]), _where(entry)
                again = " (a loop? use jax.vmap or lax.scan, or an f-string address)" if first == second else ""
                raise AddressError(
                    f"address {address!r} is used twice in one model: at {first} and at {second}{again}. Give each site of a "
                    "model its own address, or call a nested model at an address of its own."
                )
            table[address] = entry
    return table


def _entries(eqn: Any, times: tuple[int, ...]) -> dict[str, Any]:
    if eqn.primitive is sample_p:
        return {eqn.params["site"].address: Entry(eqn.params["site"], times)}
    if not _jax.holds(eqn, sample_p):
        return {}
    inner = _jax.called_jaxpr(eqn)
    if (address := scope_address(eqn)) is not None:
        return {address: site_table(inner, times)}
    if inner is not None:
        return site_table(inner, times)
    if eqn.primitive in _jax.SCAN:
        return site_table(eqn.params["jaxpr"], (*times, eqn.params["length"]))
    raise unfollowable(eqn)


def _where(entry: Any) -> str:
    return entry.site.where if isinstance(entry, Entry) else next(_where(e) for e in entry.values())
