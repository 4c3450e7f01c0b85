r"""The estimator as a surrogate: one number whose value estimates $E[f]$ and whose `jax.grad` its gradient.

With $\text{sg}$ for stop-gradient and $k$ for the rest of the program: a reparametrised site goes on with
$x = g(\epsilon, \theta)$; a score-function site draws $x$ and multiplies the costs that depend on it by
$\exp(\tau - \text{sg}\,\tau)$, $\tau = \log p(x;\theta)$ (DiCE, Foerster et al. 2018); an enumerated site returns
$\sum_i p(x_i;\theta)\, k(x_i)$, with $k$ run under one vmap (ADEV, Lew et al. 2023): these are right to every order. A
site with alternatives adds $\sum_j (c_j - \text{sg}\,c_j)\, \text{sg}\,k(x_j)$, right to first order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from expectax.ppl import _jax
from expectax.ppl._sources import drawn, handed_out, planned

from ._alternatives import alternative_terms
from ._boxes import Boxes, Samples
from ._layout import Choice, Layout
from ._relaxation import relaxed_terms
from ._run import Branch, Record, Runner, all_finite, draws, takes_key


class Check(NamedTuple):
    """Whether all that happened at a site is finite; steps of a scan are joined."""

    address: str
    finite: Any


def surrogate(
    layout: Layout,
    consts: Any,
    args: Any,
    key: Any,
    samples: Samples | None = None,
    checks: list[Check] | None = None,
    stopped: frozenset[str] = frozenset(),
) -> Any:
    """Return the surrogate of a flat objective.

    Args:
        layout: of its jaxpr, whose one output is a scalar; see `_flat.planned`.
        consts: the jaxpr's constants.
        args: its arguments.
        key: a typed key.
        samples: the vmap axis of independent samples, for leave-one-out baselines.
        checks: a list to fill with one `Check` per site, for diagnosis.
        stopped: addresses of choices that pass no derivative, for diagnosis.
    """
    equations = layout.jaxpr.eqns
    plan = planned(equations, keyed=takes_key)
    found = handed_out(plan, drawn(plan, key))
    sources = {i: found[i][0] for i, eqn in enumerate(equations) if draws(eqn)}
    env = _jax.Environment(zip(layout.jaxpr.constvars, consts, strict=True))
    env.update(zip(layout.jaxpr.invars, args, strict=True))
    return _Walk(layout, sources, samples, checks, stopped).run(0, env, {}, {})


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The walk over a flat jaxpr; `run(i, ...)` is the rest of the program from equation `i`."""

    layout: Layout
    sources: dict[int, Any]
    samples: Samples | None
    checks: list[Check] | None
    stopped: frozenset[str]

    def run(self, start: int, env: _jax.Environment, records: dict[int, Record], branches: dict[int, Branch]) -> Any:
        runner = Runner(self.layout, self.checks is not None, branches, self.stopped)
        for i in range(start, len(self.layout.jaxpr.eqns)):
            eqn = self.layout.jaxpr.eqns[i]
            choices = [self.layout.choices[n] for n in self.layout.numbers(eqn) if n not in branches]
            closed = [c for c in choices if c.mode in ("lanes", "jointly")]
            values = [env.read(v) for v in eqn.invars]
            if closed:
                return self._enumerate(i, closed[0], eqn, values, env, records, branches)
            outputs, new = runner.equation(eqn, values, self.sources.get(i), {})
            env.update(zip(eqn.outvars, outputs, strict=True))
            records |= new
            self._check(eqn, outputs, new)
        return self._result(runner, env, records)

    def _enumerate(
        self, i: int, choice: Choice, eqn: Any, values: Any, env: Any, records: Any, branches: dict[int, Branch]
    ) -> Any:
        """Sum the rest of the program, from equation `i` on, over the values of a choice."""
        size = choice.strategy.size
        if choice.mode == "jointly":
            size **= math.prod(choice.element_shape)
        axis = _Axis(choice.number)

        def rest(index: Any) -> Any:
            opened = branches | {choice.number: Branch(axis, size, index)}
            return self.run(i, _jax.Environment(env), dict(records), opened)

        return jnp.sum(jax.vmap(rest, axis_name=axis)(jnp.arange(size)))

    def _check(self, eqn: Any, outputs: Any, records: dict[int, Record]) -> None:
        if self.checks is None:
            return
        if (address := _jax.tagged(eqn)) is not None:
            self.checks.append(Check(address, all_finite(*outputs)))
        for number, record in records.items():
            self.checks.append(Check(self.layout.choices[number].site.address, jnp.all(record.finite)))

    def _result(self, runner: Runner, env: _jax.Environment, records: dict[int, Record]) -> Any:
        """Combine the terms, boxed, with what their choices' alternatives and baselines add."""
        layout, boxes = self.layout, Boxes(self.layout, runner.branches, self.samples)
        values = {v: env.read(v) for v in layout.terms.variables}
        gains: dict[Any, Any] = {}
        controls: dict[Any, dict[int, Any]] = {}
        for number, record in list(records.items()):
            choice = layout.choices[number]
            if record.values is not None:
                added = alternative_terms(runner, choice, env, self.sources, records, boxes.weight)
                gains |= {v: gains.get(v, 0.0) + gain for v, gain in added.items()}
            if record.relaxation is not None:
                added, control = relaxed_terms(runner, choice, env, self.sources, records, boxes.weight)
                gains |= {v: gains.get(v, 0.0) + gain for v, gain in added.items()}
                for v, c in control.items():
                    controls.setdefault(v, {})[number] = c

        def term(v: Any) -> Any:
            return boxes.boxed(v, values[v], records, controls.get(v, {})) + gains.get(v, 0.0)

        def constant(value: Any) -> Any:
            return value if boxes.runs == 1 else value / boxes.runs

        return layout.terms.combined(env, term, constant) + boxes.baselines(env, records)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The name of the vmap axis of an enumeration."""

    number: int
