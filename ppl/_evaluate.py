"""The interpreter: one walk over a staged model, with a visitor that says what happens at each site.

`simulate`, `assess`, `generate`, re-binding inside an objective, and the change to unconstrained space differ only in
the visitor. Control flow is a rule per kind of equation; branches have theirs in `_evaluate_branch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax
from ._branch import branches_of
from ._errors import ControlFlowError
from ._masked import Masked, expand
from ._nested import leaves_of
from ._nesting import nest, scope_address
from ._observe import deterministic_p
from ._sample import Site, lanes_of, sample_p
from ._sources import Drawn, Plan, drawn, drawn_for_steps, handed_out, planned
from ._support import feasible
from ._table import has_sites, site_table, unfollowable


class Observed(NamedTuple):
    """A value that is kept as it is while others change space."""

    value: Any


class Unweighed(NamedTuple):
    """A value that is given, and scored, but has no part in the weight of a `weigh` or `project`."""

    value: Any


def plain(given: Any) -> Any:
    """Return a given value without what is said about it."""
    return given.value if isinstance(given, (Observed, Unweighed)) else given


class Visit(NamedTuple):
    """What a visitor did at a site: `record` enters the choices, the densities have one number per element or are 0."""

    value: Any
    record: Any
    log_density: Any
    log_weight: Any


class Visitor(NamedTuple):
    """`visit(site, leaves, source, given, mask)`: the source of randomness, the given value and the mask may be None.

    `everywhere`: run all branches of a `cond`, with masks, instead of the one that is taken. `fixed`: what the program
    observes enters the choices too. `kind` names the visitor, for programs whose sites cannot be visited one by one;
    one of kind `generate` draws by `draw(site, leaves, source)`, or `draw_alike` for several sites at once. One that
    `binds` leaves the randomness of an estimated density to the enclosing program; one that is `weightless` only wants
    the values.
    """

    visit: Callable[[Site, list[Any], Any, Any, Any], Visit]
    everywhere: bool = False
    fixed: bool = False
    kind: str = ""
    draw: Callable[..., Any] | None = None
    draw_alike: Callable[..., Any] | None = None
    binds: bool = False
    weightless: bool = False


class Outcome(NamedTuple):
    """The result of a walk: outputs, nested dicts by address, and the two sums over all sites.

    `present` tells of what stands in branches, or has a mask, which elements count.
    """

    outputs: list[Any]
    choices: dict[str, Any]
    log_density: Any
    log_weight: Any
    present: dict[str, Any]
    deterministic: dict[str, Any]


_SCORING = ("assess", "generate", "weigh", "project")

NOTHING = Outcome([], {}, 0.0, 0.0, {}, {})


def evaluate(jaxpr: Any, args: Any, visitor: Visitor, key: Any = None, given: Any = None, mask: Any = None) -> Outcome:
    """Walk a jaxpr.

    `given` is a nested dict shaped like the choices; scanned entries carry a leading time axis. `mask` tells in which
    of the outermost lanes the walk counts.
    """
    given = given or {}
    plan = None if key is None else plan_of(jaxpr, given)
    return evaluate_with(jaxpr, args, visitor, plan, None if plan is None else drawn(plan, key), given, mask)


def plan_of(jaxpr: Any, given: dict[str, Any]) -> Plan:
    """Plan the randomness of a walk."""
    return planned(_jax.close(jaxpr)[0].eqns, lambda site: draws(given.get(site.address)))


def evaluate_with(
    jaxpr: Any, args: Any, visitor: Visitor, plan: Plan | None, noise: Drawn | None, given: dict[str, Any], mask: Any
) -> Outcome:
    """Walk a jaxpr with randomness that is drawn already; see `evaluate`."""
    env, opened = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
    found = [] if plan is None or noise is None else handed_out(plan, noise)
    if plan is None or visitor.draw is None or mask is not None:
        outcome = walk(opened.eqns, env, visitor, itertools.chain(*found), given, mask)
    else:
        from ._together import walk_together

        outcome = walk_together(opened.eqns, env, visitor, found, given)
    return outcome._replace(outputs=[env.read(v) for v in opened.outvars])


def draws(given: Any) -> bool:
    """Tell whether a site needs a draw beside what is given."""
    return given is None or isinstance(given, Masked)


def _call(jaxpr: Any, args: Any, visitor: Visitor, found: Iterator[Any], given: dict[str, Any], mask: Any) -> Outcome:
    env, opened = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
    outcome = walk(opened.eqns, env, visitor, found, given, mask)
    return outcome._replace(outputs=[env.read(v) for v in opened.outvars])


def walk(
    equations: Any,
    env: _jax.Environment,
    visitor: Visitor,
    found: Iterator[Any],
    given: dict[str, Any],
    mask: Any = None,
) -> Outcome:
    """Walk some equations, adding their results to `env`; `found` yields the sources of randomness in order."""
    total = NOTHING
    for eqn in equations:
        values = [env.read(v) for v in eqn.invars]
        if eqn.primitive is sample_p:
            outcome = _at_site(eqn, values, visitor, next(found, None), given, mask)
        elif eqn.primitive is deterministic_p:
            outcome = _record(eqn, values, mask)
        elif not has_sites(eqn):
            env.update(zip(eqn.outvars, _jax.bind(eqn, values), strict=True))
            continue
        else:
            outcome = _inside(eqn, values, visitor, found, given, mask)
        env.update(zip(eqn.outvars, outcome.outputs, strict=True))
        total = joined(total, outcome)
    return total


def joined(a: Outcome, b: Outcome) -> Outcome:
    """Add two parts of a walk; `site_table` has seen that their addresses differ."""
    return Outcome(
        [],
        a.choices | b.choices,
        plus(a.log_density, b.log_density),
        plus(a.log_weight, b.log_weight),
        a.present | b.present,
        a.deterministic | b.deterministic,
    )


def plus(a: Any, b: Any) -> Any:
    """Add, leaving out exact zeros: they would only lengthen the program."""
    if isinstance(b, float) and b == 0.0:
        return a
    return b if isinstance(a, float) and a == 0.0 else a + b


def _at_site(eqn: Any, operands: Any, visitor: Visitor, source: Any, given: dict[str, Any], mask: Any) -> Outcome:
    site, leaves, extras = eqn.params["site"].split(operands)
    shape = site.element_shape
    counted = extras.get("mask")
    if mask is not None:
        here = jnp.reshape(mask, jnp.shape(mask) + (1,) * (len(shape) - jnp.ndim(mask)))
        counted = here if counted is None else here & counted
    own = Observed(extras["value"]) if "value" in extras else given.get(site.address)
    asked = own if counted is None else safe(site, leaves, own, counted, visitor)
    visit = visitor.visit(site, leaves, source, asked, counted)
    if asked is not own:  # what does not count goes on as it was given
        given_value: Any = plain(own)
        visit = visit._replace(value=jnp.where(expand(counted, visit.value), visit.value, given_value))
        visit = visit._replace(record=own) if visitor.kind in _SCORING else visit
    log_density, log_weight = _counted(visit, extras.get("scale"), counted)
    if not isinstance(log_density, float):
        log_density = jnp.sum(_jax.tag(log_density, site.address, site.where))
    log_weight = log_weight if isinstance(log_weight, float) else jnp.sum(log_weight)
    choices = {} if "value" in extras and not visitor.fixed else {site.address: visit.record}
    present = {} if counted is None or not choices else {site.address: jnp.broadcast_to(counted, shape)}
    value = jnp.asarray(extras["value"], site.dtype) if "value" in extras else visit.value
    return Outcome([value], choices, log_density, log_weight, present, {})


def safe(site: Site, leaves: Any, given: Any, mask: Any, visitor: Visitor) -> Any:
    """Return a given value with something possible where it does not count: nan there would spoil derivatives."""
    value = plain(given)
    scores = value is not given or visitor.kind in _SCORING or visitor.kind == "record"
    if not scores or value is None or isinstance(value, Masked) or not isinstance(value, (jax.Array, np.ndarray)):
        return given
    possible = lanes_of(site, lambda v, xs: feasible(site.distribution(xs), v), value, leaves=leaves)
    value = jnp.where(expand(mask, value), value, possible.astype(jnp.result_type(value)))
    return type(given)(value) if isinstance(given, (Observed, Unweighed)) else value


def _counted(visit: Visit, scale: Any, mask: Any) -> tuple[Any, Any]:
    """Scale and mask a site's densities; the weight is the density less that of the proposal, which is not scaled."""
    log_density, log_weight = visit.log_density, visit.log_weight
    if scale is not None and not isinstance(log_density, float):
        more = jnp.where(jnp.isneginf(log_density), 0.0, (scale - 1.0) * log_density)  # what is impossible stays so
        log_density, log_weight = log_density + more, log_weight + more
    if mask is not None:
        log_density, log_weight = (
            x if isinstance(x, float) else jnp.where(mask, x, 0.0) for x in (log_density, log_weight)
        )
    return log_density, log_weight


def _record(eqn: Any, values: Any, mask: Any) -> Outcome:
    """Keep a deterministic value."""
    (value,), address = values, eqn.params["site"].address
    present = {} if mask is None else {address: jnp.broadcast_to(expand(mask, value), jnp.shape(value))}
    return NOTHING._replace(outputs=[value], present=present, deterministic={address: value})


def _inside(eqn: Any, values: Any, visitor: Visitor, found: Iterator[Any], given: dict[str, Any], mask: Any) -> Outcome:
    inner = _jax.called_jaxpr(eqn)
    address = scope_address(eqn)
    if inner is not None and address is None:  # jit and checkpoint only wrap: their sites belong to this scope
        return _call(inner, values, visitor, found, given, mask)
    key = next(found, None) if _jax.holds(eqn, sample_p) else None
    if address is not None:
        run = lambda: evaluate(inner, values, visitor, key, given.get(address), mask)  # noqa: E731
        # choices that are left to the enclosing program stay under their address there
        outcome = nest(address, run) if visitor.kind == "rebind" else run()
        return outcome._replace(
            choices={address: outcome.choices} if outcome.choices else {},
            present={address: outcome.present} if outcome.present else {},
            deterministic={address: outcome.deterministic} if outcome.deterministic else {},
        )
    if (custom := _jax.custom_jaxpr(eqn)) is not None:
        run = underived(eqn, lambda *inputs: as_arrays(evaluate(custom, inputs[0], visitor, *inputs[1:])))
        return run(values, key, given, mask)
    if eqn.primitive in _jax.SCAN:
        return _scan(eqn, values, visitor, key, given, mask)
    if branches_of(eqn) is not None:
        from ._evaluate_branch import evaluate_branches

        return evaluate_branches(eqn, values, visitor, key, given, mask)
    if eqn.primitive.name == "marginal":
        from ._marginalize import evaluate_marginal

        return evaluate_marginal(eqn, values, visitor, key, given, mask)
    if eqn.primitive.name == "stochastic":
        from ._stochastic import evaluate_stochastic

        return evaluate_stochastic(eqn, values, visitor, key, given, mask)
    raise unfollowable(eqn)


def _scan(eqn: Any, values: Any, visitor: Visitor, key: Any, given: dict[str, Any], mask: Any) -> Outcome:
    """Run a scan whose body has sites: noise and given values become inputs of each step, choices outputs."""
    num_consts, num_carry = _jax.scan_sizes(eqn)
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    cut = num_consts + num_carry
    consts, carry, xs = values[:num_consts], values[num_consts:cut], values[cut:]
    # where nothing is given an address may occur twice: in the draws of an estimated density
    here = {address: given[address] for address in site_table(body) if address in given} if given else {}
    here = jax.tree.map(without_positions, here, is_leaf=lambda g: isinstance(g, Masked))
    plan = None if key is None else plan_of(body, here)
    step_noise, of_step = (None, lambda _: None) if plan is None else drawn_for_steps(plan, key, length)

    def step(carry: Any, inputs: Any) -> Any:
        noise, step_given, x = inputs
        outcome = evaluate_with(body, [*consts, *carry, *x], visitor, plan, of_step(noise), step_given, mask)
        return outcome.outputs[:num_carry], outcome._replace(outputs=outcome.outputs[num_carry:])

    carry, stacked = lax.scan(
        step, carry, (step_noise, here, xs), length=length, reverse=eqn.params["reverse"], unroll=eqn.params["unroll"]
    )
    return stacked._replace(
        outputs=[*carry, *stacked.outputs],
        log_density=jnp.sum(stacked.log_density),
        log_weight=jnp.sum(stacked.log_weight),
    )


def without_positions(given: Any) -> Any:
    """Return what is given without the flat positions of missing elements, which are those of all steps."""
    return Masked(given.value, given.mask) if isinstance(given, Masked) else given


def underived(eqn: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with sites that stood in a derivative rule of the user's: its values are right, its rule is lost."""
    function = jax.custom_jvp(run)
    entries = [entry for j in _jax.sub_jaxprs(eqn) for _, entry in leaves_of(site_table(j))]
    names = ", ".join(sorted(repr(entry.site.address) for entry in entries))

    @function.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise ControlFlowError(
            f"the function with the sites {names} (at {entries[0].site.where}), called at {_jax.place(eqn)}, has a derivative rule of its own (custom_jvp or custom_vjp), "
            "which does not speak of its choices; its derivative would be a guess. Take the sites out of it."
        )

    return function


def as_arrays(outcome: Outcome) -> Outcome:
    """Return an outcome whose sums are arrays, so that JAX may carry it."""
    dtype = jnp.result_type(float)
    return outcome._replace(
        log_density=jnp.asarray(outcome.log_density, dtype), log_weight=jnp.asarray(outcome.log_weight, dtype)
    )
