r"""Summing out the sites of a scan: the forward recursion, $T K^2$ instead of $K^T$.

$\alpha_t(s_t) = \sum_{s_{t-1}} \alpha_{t-1}(s_{t-1})\, p(s_t \mid s_{t-1})\, p(\text{rest of step } t \mid s_t, s_{t-1})$ (Rabiner
1989), with $s_t$ those summed sites of a step that enter the carry. The carry must depend on them alone: the chain is
then of first order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax
from ._enumerate import Lifted, Lost, Walk
from ._errors import ControlFlowError
from ._factor import Factor, eliminate, product, reduced
from ._flow import Dependence, merge
from ._nested import Choices, leaves_of, merged, nested
from ._table import site_table


class _Loop(NamedTuple):
    """A scan to be summed: its equation, lifted inputs, and what stands beside the carry."""

    walk: Walk
    eqn: Any
    consts: list[Lifted]
    given: Choices
    flags: Choices  # which elements count, where that is an array
    whole: Choices  # the same, where it is one truth for all
    path: str
    mask: Any


class _Form(NamedTuple):
    """The static form of the carry: what each part depends on; the states' previous selves; what alpha depends on."""

    carry: list[Dependence]
    before: list[int]
    alpha: Dependence


class _Step(NamedTuple):
    """What one traced step has found out."""

    outputs: list[Any]
    states: list[int]
    alpha: Factor | None
    rest: list[Factor]
    inner: Walk
    own: frozenset[int]  # the variables of the step itself and of the step before


def enumerate_scan(
    walk: Walk, eqn: Any, values: list[Lifted], given: Choices, counted: Choices, path: str, mask: Any
) -> list[Any]:
    """Sum out a scan; its steps' factors and the final states join those of the enclosing walk."""
    num_consts, num_carry = _jax.scan_sizes(eqn)
    cut, body = num_consts + num_carry, eqn.params["jaxpr"]
    addresses = set(site_table(body))
    here = {a: v for a, v in given.items() if a in addresses}
    counts = dict(leaves_of({a: v for a, v in counted.items() if a in addresses}))
    flags = nested((p, v) for p, v in counts.items() if not isinstance(v, bool))
    whole = nested((p, v) for p, v in counts.items() if isinstance(v, bool))
    loop = _Loop(walk, eqn, values[:num_consts], here, flags, whole, path, mask)
    carry, (xs, xs_depends) = values[num_consts:cut], _time_first(values[cut:], eqn)
    form = _form(loop, carry, xs, xs_depends)

    types = [aval.dtype for aval in body.in_avals[num_consts:cut]]
    start = [_widened(c, d, walk).astype(t) for c, d, t in zip(carry, form.carry, types, strict=True)]
    found: list[_Step] = []

    def step(state: Any, inputs: Any) -> Any:
        carry, alpha = state
        done = _step(loop, form, carry, alpha, inputs, xs_depends)
        found[:] = [done]
        names = dict(zip(done.states, form.before, strict=True))
        outputs = [
            _widened(Lifted(o.array, _renamed(o.depends, names)), d, walk).astype(t)
            for o, d, t in zip(done.outputs[:num_carry], form.carry, types, strict=True)
        ]
        new = None if done.alpha is None else _spread(done.alpha, form, done.states, walk)
        ys = [None if isinstance(y, Lost) else y.array for y in done.outputs[num_carry:]]
        inner = done.inner
        kept = (inner.records, inner.deterministic, {p: f for p, f in inner.present.items() if not isinstance(f, Lost)})
        return (outputs, new), (ys, [f.array for f in done.rest], kept)

    (last, alpha), (ys, rest, kept) = lax.scan(
        step,
        (start, _first_alpha(form, walk)),
        (xs, here, flags),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    done = found[0]
    walk.records.update(kept[0])
    walk.deterministic.update(kept[1])
    walk.present.update(kept[2] | {p: f for p, f in done.inner.present.items() if isinstance(f, Lost)})
    for array, factor in zip(rest, done.rest, strict=True):
        walk.factors.append(Factor(jnp.sum(array, axis=0), factor.depends))
    after = {p: walk.variable(*walk.variables[p]) for p in form.before}
    if alpha is not None:
        walk.factors.append(Factor(alpha, _renamed(form.alpha, after)))
    names = dict(zip(done.states, form.before, strict=True))
    outputs = done.outputs[:num_carry]
    ends = [
        _end(c, d, set(_renamed(o.depends, names)), loop) for c, d, o in zip(last, form.carry, outputs, strict=True)
    ]
    finals = [Lifted(end.array, _renamed(end.depends, after)) for end in ends]
    return [*finals, *(_stacked(y, o, done) for y, o in zip(ys, done.outputs[num_carry:], strict=True))]


def _time_first(xs: list[Lifted], eqn: Any) -> tuple[list[Any], list[Dependence]]:
    """Bring the time axis of scanned inputs before the axes of the variables."""
    arrays, depends = [], []
    for x in xs:
        if any(axis == 0 for axes in x.depends.values() for axis in axes):
            raise ControlFlowError(
                f"marginalize_discrete: the scan at {_jax.place(eqn)} runs over a choice that is summed out; sample it "
                "inside the scan."
            )
        arrays.append(jnp.moveaxis(x.array, len(x.depends), 0))
        depends.append({n: tuple(None if a is None else a - 1 for a in axes) for n, axes in x.depends.items()})
    return arrays, depends


def _step(loop: _Loop, form: _Form, carry: list[Any], alpha: Any, inputs: Any, xs_depends: list[Dependence]) -> _Step:
    """Walk the body once, and sum out all but the states that go on."""
    xs, given, flags = inputs
    walk, num_carry = loop.walk, len(form.carry)
    inner, first = walk.inner(), walk.numbers[0]
    lifted = [*loop.consts, *map(Lifted, carry, form.carry), *map(Lifted, xs, xs_depends)]
    if alpha is not None:
        inner.factors.append(Factor(alpha, form.alpha))
    outputs = inner.run(loop.eqn.params["jaxpr"], lifted, given, merged(flags, loop.whole), loop.path, loop.mask)
    for output in outputs[:num_carry]:
        if isinstance(output, Lost):
            raise ControlFlowError(
                f"marginalize_discrete: the carry of the scan at {_jax.place(loop.eqn)}: {output.reason}."
            )
    depends: set[int] = set().union(*(o.depends for o in outputs[:num_carry]))
    if set(form.before) & depends:
        path = walk.variables[next(iter(set(form.before) & depends))].path
        raise ControlFlowError(
            f"marginalize_discrete: the carry of the scan at {_jax.place(loop.eqn)} depends on earlier values of {path!r} "
            "than the last one, so its steps are no chain of first order. Carry the last value alone, or sum out a "
            "joint state."
        )
    states = sorted(n for n in depends if n > first)
    fresh = [n for n in range(first + 1, walk.numbers[0] + 1) if n not in states]
    met = {n for factor in inner.factors for n in factor.depends}  # a scan inside has summed out its own
    factors = eliminate(inner.factors, [n for n in (*fresh, *form.before) if n in met], walk.variables)
    joint = [f for f in factors if set(f.depends) & set(states)]
    rest = [f for f in factors if not set(f.depends) & set(states)]
    own = frozenset(range(first + 1, walk.numbers[0] + 1)) | set(form.before)
    return _Step(outputs, states, _joined(joint, states, walk, loop.eqn), rest, inner, own)


def _joined(factors: list[Factor], states: list[int], walk: Walk, eqn: Any) -> Factor | None:
    """Return one factor over all states of a step, its element axes theirs."""
    if not states:
        return None
    elements = walk.variables[states[0]].elements
    if any(walk.variables[n].elements != elements for n in states):
        raise ControlFlowError(
            f"marginalize_discrete: the states {[walk.variables[n].path for n in states]} of the scan at "
            f"{_jax.place(eqn)} have different lanes; their joint state cannot be summed lane by lane."
        )
    whole = []
    for factor in factors:
        state = next(n for n in states if n in factor.depends)
        own = {a for a in factor.depends[state] if a is not None}
        if any(a is not None and a not in own for axes in factor.depends.values() for a in axes):
            raise ControlFlowError(
                f"marginalize_discrete: choices of the scan at {_jax.place(eqn)} meet along different lanes."
            )
        whole.append(reduced(factor, state, walk.variables))
    return product(whole, walk.variables, elements)


def _form(loop: _Loop, carry: list[Lifted], xs: list[Any], xs_depends: list[Dependence]) -> _Form:
    """Find the form of the carry that a step reproduces."""
    form = _Form([c.depends for c in carry], [], {})
    for _ in range(8):
        seen: list[_Step] = []

        def probe(carry: Any, alpha: Any, inputs: Any, form: _Form = form, seen: list[_Step] = seen) -> Any:
            done = _step(loop, form, carry, alpha, inputs, xs_depends)
            seen.append(done)
            return None

        start = [_widened(c, d, loop.walk) for c, d in zip(carry, form.carry, strict=True)]
        number = loop.walk.numbers[0]
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (xs, loop.given, loop.flags))
        jax.eval_shape(probe, start, _first_alpha(form, loop.walk), inputs)
        new = _next_form(loop, form, seen[-1], number)
        if new == form:
            return form
        form = new
    raise ControlFlowError(f"marginalize_discrete: the scan at {_jax.place(loop.eqn)} has no carry of a fixed form.")


def _next_form(loop: _Loop, form: _Form, done: _Step, number: int) -> _Form:
    walk = loop.walk
    before = form.before
    if len(before) < len(done.states):
        walk.numbers[0] = number  # forget the probe's variables
        described = [walk.variables[n] for n in done.states]
        before = [walk.variable(*d) for d in described]
    elif done.states:
        walk.numbers[0] = number
    back = dict(zip(done.states, before, strict=True))
    outputs = done.outputs[: len(form.carry)]
    carry = [merge(d, _renamed(o.depends, back)) for d, o in zip(form.carry, outputs, strict=True)]
    alpha = form.alpha if done.alpha is None else merge(form.alpha, _renamed(done.alpha.depends, back))
    return _Form(carry, before, alpha)


def _renamed(depends: Dependence, names: dict[int, int]) -> Dependence:
    return {names.get(n, n): axes for n, axes in depends.items()}


def _widened(value: Any, depends: Dependence, walk: Walk) -> Any:
    """Return a lifted value's array with an axis for every variable of `depends`."""
    return _broadcast(value.array, sorted(value.depends), sorted(depends), walk)


def _broadcast(array: Any, own: list[int], wanted: list[int], walk: Walk) -> Any:
    array = jnp.asarray(array)
    index = tuple(slice(None) if n in own else None for n in wanted)
    lead = tuple(walk.variables[n].num_values for n in wanted)
    return jnp.broadcast_to(array[index], (*lead, *array.shape[len(own) :]))


def _spread(alpha: Factor, form: _Form, states: list[int], walk: Walk) -> Any:
    renamed = _renamed(alpha.depends, dict(zip(states, form.before, strict=True)))
    return _broadcast(alpha.array, sorted(renamed), sorted(form.alpha), walk)


def _first_alpha(form: _Form, walk: Walk) -> Any:
    """Before the first step the previous states are all in their first value, so that nothing is counted twice."""
    if not form.before:
        return None
    elements = walk.variables[form.before[0]].elements
    total = jnp.zeros((*(walk.variables[n].num_values for n in sorted(form.alpha)), *elements))
    for position, n in enumerate(sorted(form.alpha)):
        if n in form.before:
            only = jnp.where(jnp.arange(walk.variables[n].num_values) == 0, 0.0, -jnp.inf)
            total = total + jnp.reshape(only, (-1, *(1,) * (total.ndim - position - 1)))
    return total


def _end(array: Any, depends: Dependence, own: set[int], loop: _Loop) -> Lifted:
    """Return the last carry without what only the first one depended on."""
    if loop.eqn.params["length"] == 0:
        return Lifted(array, depends)
    index = tuple(slice(None) if n in own else 0 for n in sorted(depends))
    return Lifted(array[index], {n: axes for n, axes in depends.items() if n in own})


def _stacked(array: Any, output: Any, done: _Step) -> Any:
    """Return a scan's stacked output: its time axis behind the variables' axes; lost where a step's choices enter."""
    if isinstance(output, Lost):
        return output
    inside = [n for n in output.depends if n in done.own]
    if inside:
        path = done.inner.variables[inside[0]].path
        return Lost(f"the outputs of a scan that hold {path!r}, which is summed out; use it inside the scan")
    depends = {n: tuple(None if a is None else a + 1 for a in axes) for n, axes in output.depends.items()}
    return Lifted(jnp.moveaxis(array, 0, len(depends)), depends)
