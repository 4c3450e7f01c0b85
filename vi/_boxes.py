r"""The boxes: the result's additive terms, each multiplied by the scores it depends on.

The scalar result is split along the equations that are linear in what depends on a score; each leaf $v$ of that tree
becomes $v\,\square + b\,(1 - \square)$ with $\square = \exp(\tau - \text{sg}\,\tau)$ over the scores that $v$ depends on,
axis by axis, and $b$ a baseline. In value the box is 1; its gradient is the score.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from expectax.ppl import _jax
from expectax.ppl._flow import Axes, Dependence, of

from ._strategy import Reinforce

sg = lax.stop_gradient
_LINEAR = {"neg", "reduce_sum", "squeeze", "broadcast_in_dim", "reshape", "transpose", "copy", "copy_p", "name"}


class Score(NamedTuple):
    """The log density of a score-function site per element; in a scan axis 0 is time."""

    log_density: Any
    time: Any
    strategy: Reinforce


class Samples(NamedTuple):
    """The vmap axis of independent samples, and the enclosing branches of `Enum`: `(vmap axis, probability)`."""

    axis: Any
    size: int
    branches: tuple[tuple[Any, Any], ...] = ()


def boxed_sum(
    jaxpr: Any, env: _jax.Environment, depends: dict[Any, Dependence], scores: dict[int, Score], samples: Samples | None
) -> Any:
    """Return the jaxpr's scalar result with every additive term boxed."""
    (result,) = jaxpr.outvars
    if not of(depends, result):
        return env.read(result)
    producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    done: dict[Any, Any] = {}

    def term(atom: Any) -> Any:
        dependence = of(depends, atom)
        if not dependence:
            return env.read(atom)
        if atom not in done:
            parts = _linear_parts(producers.get(atom), depends)
            if parts is None:
                done[atom] = _boxed(env.read(atom), dependence, scores, samples)
            else:
                eqn = producers[atom]
                inputs = [term(v) if n in parts else env.read(v) for n, v in enumerate(eqn.invars)]
                (done[atom],) = _jax.bind(eqn, inputs)
        return done[atom]

    return term(result)


def _linear_parts(eqn: Any, depends: dict[Any, Dependence]) -> set[int] | None:
    """Return the inputs in which an equation is linear, if every input that depends on a score is among them."""
    if eqn is None or len(eqn.outvars) != 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return None
    name = eqn.primitive.name
    dependent = {n for n, v in enumerate(eqn.invars) if of(depends, v)}
    if name in ("add", "sub", "add_any"):
        return {0, 1}
    if name in _LINEAR or (name == "div" and dependent == {0}):
        return {0}
    if name == "convert_element_type" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
        return {0}
    if name == "mul" and len(dependent) == 1:
        return dependent
    return None


def _boxed(value: Any, dependence: Dependence, scores: dict[int, Score], samples: Samples | None) -> Any:
    total = sum((_along(scores[number], axes, jnp.ndim(value)) for number, axes in dependence.items()), 0.0)
    box = jnp.exp(total - sg(total))
    baseline = _baseline(value, [scores[number].strategy for number in dependence], samples)
    return value * box if baseline is None else value * box + sg(baseline) * (1.0 - box)


def _along(score: Score, axes: Axes, ndim: int) -> Any:
    """Bring a score to the axes of a value: sum the mixed axes, accumulate time, put the rest in place."""
    tau = score.log_density
    if score.time and axes[0] is not None:
        tau = lax.cumsum(tau, 0, reverse=score.time == "reverse")
    # two score axes on one axis of the value (of size 1, joined by a reshape): the second is mixed
    axes = tuple(None if axis in axes[:n] else axis for n, axis in enumerate(axes))
    tau = jnp.sum(tau, axis=tuple(n for n, axis in enumerate(axes) if axis is None))
    kept = [axis for axis in axes if axis is not None]
    order = sorted(range(len(kept)), key=lambda n: kept[n])
    tau = jnp.transpose(tau, order)
    return jnp.expand_dims(tau, tuple(a for a in range(ndim) if a not in kept))


def _baseline(value: Any, strategies: list[Reinforce], samples: Samples | None) -> Any:
    """Return what to subtract from the cost: the mean over the other samples, a number, or nothing.

    Under `Enum` the cost differs between branches whose probabilities depend on earlier choices; the baseline must
    not, so the cost is first averaged over the branches.
    """
    numbers = [s.baseline for s in strategies if isinstance(s.baseline, (int, float))]
    if numbers:
        return jnp.full_like(value, math.fsum(numbers) / len(numbers))
    if samples is None or not any(s.baseline == "leave-one-out" for s in strategies):
        return None
    mean = value
    for name, probability in reversed(samples.branches):
        mean = lax.psum(jnp.where(probability > 0, probability * mean, 0.0), name)
    return (lax.psum(mean, samples.axis) - mean) / (samples.size - 1)
