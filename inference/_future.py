r"""The density of what a trajectory does from a time on, seen from a particle: for backward and ancestor sampling.

It is $p(x_{t:T}, y_{t:T} \mid x_{1:t-1})$, as a function of where the particle stands. If the carry after a step is
determined by that step's choices, all but the first factor are the same for all particles; whether it is so is read off
the step's equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import _jax
from expectax.ppl._nested import Choices, merged
from expectax.ppl._sample import sample_p
from expectax.ppl._table import has_sites

from ._filter_steps import FilterSteps, as_weight
from ._sequence import Sequence


def carry_is_chosen(sequence: Sequence) -> bool:
    """Tell whether a step's choices determine the carry: no path leads from the old carry to the new one but by a site.

    A path through an equation that holds sites, such as a loop or a nested model, is followed into it where the equation
    only wraps, and else taken for one.
    """
    num_consts, num_carry = _jax.scan_sizes(sequence.cut.scan)
    opened = _jax.close(sequence.body)[0]
    touched = set(opened.invars[num_consts : num_consts + num_carry])
    return not any(_touched(opened, touched)[:num_carry])


def _touched(jaxpr: Any, touched: set[Any]) -> list[bool]:
    """Return which outputs depend on some inputs by other ways than through sites."""
    opened = _jax.close(jaxpr)[0]
    for eqn in opened.eqns:
        hit = [not isinstance(v, _jax.Literal) and v in touched for v in eqn.invars]
        if not any(hit):
            continue
        if eqn.primitive is sample_p and not eqn.params["site"].fixed:
            continue
        inner = _jax.called_jaxpr(eqn) if has_sites(eqn) else None
        if inner is None:
            touched.update(eqn.outvars)
            continue
        entered = {v for v, h in zip(_jax.close(inner)[0].invars, hit, strict=True) if h}
        touched.update(v for v, h in zip(eqn.outvars, _touched(inner, entered), strict=True) if h)
    return [not isinstance(v, _jax.Literal) and v in touched for v in opened.outvars]


def future_density(steps: FilterSteps, time: Any, choices: Choices) -> Callable[[Any], Any]:
    """Return the log density of all or, where that is enough, the first of the steps from a time on, given a state.

    Args:
        steps: the cut posterior.
        time: how many steps have been done.
        choices: a whole trajectory, in the order of the model's arrays.
    """
    sequence, observations = steps.sequence, steps.posterior.observations

    def one(state: Any, now: Any) -> tuple[Any, Any]:
        given = jax.tree.map(lambda x: jnp.asarray(x)[sequence.place(now)], choices)
        step = sequence.step(state, now, merged(given, sequence.at(observations, now)))
        return step.state, as_weight(step.log_weight)

    if carry_is_chosen(sequence):
        return lambda state: one(state, time)[1]

    def rest(state: Any) -> Any:
        def step(state: Any, now: Any) -> tuple[Any, Any]:
            after, log_weight = one(state, now)
            later = now >= time
            return jax.tree.map(lambda a, b: jnp.where(later, a, b), after, state), jnp.where(later, log_weight, 0.0)

        return jnp.sum(lax.scan(step, state, jnp.arange(sequence.length))[1])

    return rest
