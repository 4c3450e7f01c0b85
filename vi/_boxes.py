r"""Boxes: what each additive term of an objective is multiplied by, and what is added to it.

A term $v$ becomes $w\,(v\,\square + b\,(1 - \square))$ with $\square = \exp(\tau - \text{sg}\,\tau)$ over the scores that
$v$ depends on, axis by axis, $b$ a baseline, and $w$ the weight of $v$ in the open branches of enumerations. In value the
box is 1; its gradient is the score (DiCE, Foerster et al. 2018).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import _jax

from ._axes import along, back
from ._layout import Layout
from ._run import Branch, Record
from ._strategy import Reinforce

sg = lax.stop_gradient


class Samples(NamedTuple):
    """The vmap axis of independent samples."""

    axis: Any
    size: int


class Boxes(NamedTuple):
    """What is known when all equations have run."""

    layout: Layout
    branches: dict[int, Branch]
    samples: Samples | None

    @property
    def runs(self) -> int:
        """The number of open branches."""
        return math.prod(branch.size for branch in self.branches.values())

    def weight(self, term: Any, records: dict[int, Record]) -> Any:
        """Return the weight of a term in the present branch: its probability, element by element where by lanes."""
        total: Any = 1.0
        for number, branch in self.branches.items():
            axes = self.layout.depends[term].get(number)
            if axes is None:  # the term is the same in all branches
                total = total / branch.size
            elif self.layout.choices[number].mode == "lanes":
                total = total * along(records[number].weight, axes, len(term.aval.shape))
            else:
                total = total * records[number].weight
        return total

    def boxed(self, term: Any, value: Any, records: dict[int, Record], controls: dict[int, Any]) -> Any:
        """Return a weighted term times its box; `controls` are values near it, each the baseline of one choice alone.

        A control depends on all choices but its own, so that it would bias the scores of the others.
        """
        depends = self.layout.depends[term]
        scored = {n: axes for n, axes in depends.items() if records[n].score is not None}
        weight = self.weight(term, records)
        if not scored:
            return value * weight
        scores = {n: along(records[n].score, axes, jnp.ndim(value)) for n, axes in scored.items()}
        total = value * _box(scores.values())
        for n, control in controls.items():
            total = total + sg(control) * (1.0 - _box([scores[n]]))
        rest = {n: axes for n, axes in scored.items() if n not in controls}
        if rest and (baseline := self._leave_one_out(value, weight, rest)) is not None:
            total = total + sg(baseline) * (1.0 - _box(scores[n] for n in rest))
        return weight * total

    def _leave_one_out(self, value: Any, weight: Any, scored: Any) -> Any:
        """Return the mean of a term over the other samples, or None.

        In an enumeration a term differs between branches whose probabilities depend on earlier choices; the baseline
        must not, so the term is first averaged over the branches.
        """
        strategies = [self.layout.choices[n].strategy for n in scored]
        wanted = any(isinstance(s, Reinforce) and s.baseline == "leave-one-out" for s in strategies)
        if self.samples is None or not wanted:
            return None
        mean = value
        if self.branches:
            parts = jnp.where(weight > 0, weight * value, 0.0)
            mean = lax.psum(parts, tuple(branch.axis for branch in self.branches.values()))
        return (lax.psum(mean, self.samples.axis) - mean) / (self.samples.size - 1)

    def baselines(self, env: _jax.Environment, records: dict[int, Record]) -> Any:
        r"""Return $\sum_e b_e (1 - \square_e)$ of the choices that have baselines, and what the learned ones learn by."""
        based = {n: record for n, record in records.items() if record.baseline is not None}
        if not based:
            return 0.0
        costs, total = self._costs(env), jnp.zeros(())
        for number, record in based.items():
            box = jnp.exp(record.score - sg(record.score))
            error = sg(self._cost(number, costs, record.score.shape)) - record.baseline
            loss = 0.5 * jnp.sum(error**2)
            total = total + (jnp.sum(sg(record.baseline) * (1.0 - box)) + sg(loss) - loss) / self.runs
        return total

    def _costs(self, env: _jax.Environment) -> dict[Any, Any]:
        """Return what each term contributes to the result, element by element."""
        terms = self.layout.terms
        values = {n: sg(env.read(v)) for n, v in enumerate(terms.variables)}
        number = {v: n for n, v in enumerate(terms.variables)}

        def result(values: dict[int, Any]) -> Any:
            return terms.combined(env, lambda v: values[number[v]], lambda value: value)

        factors = jax.grad(result)(values)
        return {v: sg(values[n] * factors[n]) for v, n in number.items()}

    def _cost(self, number: int, costs: dict[Any, Any], shape: tuple[int, ...]) -> Any:
        """Return what each element of a choice costs."""
        total: Any = jnp.zeros(shape)
        for term, cost in costs.items():
            axes = self.layout.depends[term].get(number)
            if axes is not None:
                total = total + back(cost, axes, shape)
        return total


def _box(scores: Any) -> Any:
    """Return 1, with the sum of some scores for derivative."""
    total = sum(scores, 0.0)
    return jnp.exp(total - sg(total))
