r"""Alternatives: the rest of the program run again with one choice replaced, all else drawn with the same numbers.

For a choice with alternatives $x_j$ and coefficients $c_j$ each term $t$ that depends on it gains
$\sum_j (c_j - \text{sg}\,c_j)\, \text{sg}\,t(x_j)$: nothing in value, $\sum_j t(x_j) \nabla c_j$ in its gradient. Elements
(steps, lanes, batch) that a term mixes are replaced one at a time, the others all at once, every run under one vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from expectax.ppl import StrategyError, _jax
from expectax.ppl._flow import of

from ._axes import along
from ._layout import MAX_ENUMERATED, Choice, Layout
from ._run import Given, Record, Runner

sg = lax.stop_gradient


def alternative_terms(
    runner: Runner,
    choice: Choice,
    base: _jax.Environment,
    sources: dict[int, Any],
    records: dict[int, Record],
    weight: Callable[[Any, dict[int, Record]], Any],
) -> dict[Any, Any]:
    """Return what each dependent term gains from the alternatives of a choice.

    `weight(term, records)` is the weight of a term in the open branches of enumerations.
    """
    record, terms = records[choice.number], dependent(runner.layout, choice)
    mixed = replaced_singly(runner.layout, choice)
    flags = _one_at_a_time(choice, mixed)
    if len(flags) * len(record.values) > MAX_ENUMERATED:
        raise StrategyError(
            f"{choice.place}: {choice.strategy!r} would run the rest of the objective {len(flags) * len(record.values)} "
            f"times, more than {MAX_ENUMERATED}: a cost depends on many elements at once. Use vi.Reinforce()."
        )

    def run(values: Any, where: Any) -> list[Any]:
        found, again = rerun(runner, choice, Given(values, where), base, sources, records)
        return [sg(term * weight(v, again)) for v, term in zip(terms, found, strict=True)]

    found = jax.vmap(lambda x: jax.vmap(lambda where: run(x, where))(flags))(record.values)
    coefficients = record.coefficients
    singly = jnp.moveaxis(coefficients, [1 + n for n in mixed], range(1, 1 + len(mixed)))
    singly = singly.reshape(len(coefficients), len(flags), *singly.shape[1 + len(mixed) :])
    gains = {}
    for v, term in zip(terms, found, strict=True):
        own = runner.layout.depends[v][choice.number]
        axes = tuple(axis for n, axis in enumerate(own) if n not in mixed)
        placed = jax.vmap(jax.vmap(lambda c, axes=axes, ndim=term.ndim - 2: along(c, axes, ndim)))(singly)
        gains[v] = jnp.sum(charged(choice)(placed, term), axis=(0, 1))
    return gains


def charged(choice: Choice) -> Callable[[Any, Any], Any]:
    """Return the function $(c - sg(c)) t$: zero in value, even where $t$ is infinite."""
    zero = once(choice)

    @jax.custom_jvp
    def product(c: Any, term: Any) -> Any:
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(c), jnp.shape(term)), jnp.result_type(c, term))

    @product.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (c, term), (moved, _) = primals, tangents
        _, change = jax.jvp(zero, (c,), (moved,))
        return product(c, term), jnp.broadcast_to(change * term, jnp.broadcast_shapes(jnp.shape(c), jnp.shape(term)))

    return product


def rerun(
    runner: Runner,
    choice: Choice,
    given: Given,
    base: _jax.Environment,
    sources: dict[int, Any],
    records: dict[int, Record],
) -> tuple[list[Any], dict[int, Record]]:
    """Return the terms that depend on a choice, for other values of it, and the records along the way."""
    env, records = _jax.Environment(), dict(records)

    def read(atom: Any) -> Any:
        return env[atom] if not isinstance(atom, _jax.Literal) and atom in env else base.read(atom)

    for i, eqn in enumerate(runner.layout.jaxpr.eqns):
        if not any(choice.number in of(runner.layout.depends, v) for v in eqn.outvars):
            continue
        outputs, new = runner.equation(eqn, [read(v) for v in eqn.invars], sources.get(i), {choice.number: given})
        env.update(zip(eqn.outvars, outputs, strict=True))
        records |= new
    return [read(v) for v in dependent(runner.layout, choice)], records


def dependent(layout: Layout, choice: Choice) -> list[Any]:
    """Return the terms that depend on a choice."""
    return [v for v in layout.terms.variables if choice.number in layout.depends[v]]


def replaced_singly(layout: Layout, choice: Choice) -> list[int]:
    """Return the axes of a choice's elements along which one is replaced at a time."""
    joint = getattr(choice.strategy, "joint", False)
    return [n for n in layout.mixed(choice) if n < len(choice.loops) or not joint]


def _one_at_a_time(choice: Choice, axes: list[int]) -> np.ndarray:
    """Return flags, shape `(runs, *elements)`: each run replaces one index along `axes`, and all along the others."""
    shape = choice.element_shape
    sizes = tuple(shape[n] for n in axes)
    flags = np.zeros((math.prod(sizes), *shape), bool)
    for run, index in enumerate(np.ndindex(*sizes)):
        place: list[Any] = [slice(None)] * len(shape)
        for n, position in zip(axes, index, strict=True):
            place[n] = position
        flags[(run, *place)] = True
    return flags


def once(choice: Choice) -> Callable[[Any], Any]:
    """Return the function $c - sg(c)$, which may be differentiated once: its second derivative would be wrong."""

    @jax.custom_jvp
    def unit(x: Any) -> Any:
        return jnp.ones_like(x)

    @unit.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise StrategyError(
            f"{choice.place}: {choice.strategy!r} gives first derivatives only. For a Hessian use vi.Reinforce(), or "
            "vi.Enum() where the values are few."
        )

    @jax.custom_jvp
    def zero(x: Any) -> Any:
        return jnp.zeros_like(x)

    @zero.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
        return zero(*primals), unit(*primals) * tangents[0]

    return zero
