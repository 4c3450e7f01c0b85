r"""Warm-up in windows: a step size by dual averaging, a mass matrix by Welford's moments, as in Stan.

A kernel with a `step_size` and an `inverse_mass_matrix` gets its adaptation here; the pieces are BlackJAX's.

Source: Stan Reference Manual, "HMC algorithm parameters"; Nesterov 2009; Hoffman and Gelman 2014.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._kernel import Adaptation, Info, Stage, State


class _Tuning(NamedTuple):
    """The two adaptations, and the mass matrix that is in use."""

    step: Any
    mass: Any
    inverse_mass_matrix: Any


class Windows(NamedTuple):
    """How wide a mass matrix, and which acceptance to aim at."""

    dense_mass: bool
    target_acceptance: float

    def adaptation(self, position: Any, unadapted_step: float) -> Adaptation:
        """Return the adaptation of a kernel that moves a vector; only the vector's shape counts."""
        from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
        from blackjax.adaptation.step_size import dual_averaging_adaptation

        mass_init, mass_update, mass_final = mass_matrix_adaptation(not self.dense_mass)
        step_init, step_update, step_final = dual_averaging_adaptation(self.target_acceptance)

        def update(own: _Tuning, stage: Stage, state: State, info: Info) -> _Tuning:
            step = step_update(own.step, info.acceptance_rate)
            mass = lax.cond(stage.slow, lambda: mass_update(own.mass, state.position), lambda: own.mass)
            own = _Tuning(step, mass, own.inverse_mass_matrix)
            return lax.cond(stage.window_end, renewed, lambda own: own, own)

        def renewed(own: _Tuning) -> _Tuning:
            mass = mass_final(own.mass)
            return _Tuning(step_init(step_final(own.step)), mass, mass.inverse_mass_matrix)

        def parameters(own: _Tuning) -> dict[str, Any]:
            return {"step_size": jnp.exp(own.step.log_step_size), "inverse_mass_matrix": own.inverse_mass_matrix}

        def final(own: _Tuning) -> dict[str, Any]:
            return {"step_size": jnp.exp(own.step.log_step_size_avg), "inverse_mass_matrix": own.inverse_mass_matrix}

        size, dtype = position.shape[0], position.dtype
        mass = mass_init(size)
        start = _Tuning(step_init(jnp.ones((), dtype)), mass, mass.inverse_mass_matrix)
        start = floats(start, dtype)
        unit = jnp.eye(size, dtype=dtype) if self.dense_mass else jnp.ones(size, dtype)
        unadapted = {"step_size": jnp.asarray(unadapted_step, dtype), "inverse_mass_matrix": unit}
        return Adaptation(start, update, parameters, final, unadapted)


def floats(tree: Any, dtype: Any) -> Any:
    """Return a pytree whose numbers with a fraction have a given dtype."""

    def one(x: Any) -> Any:
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(one, tree)


def schedule(num_steps: int) -> Stage:
    """Return Stan's warm-up schedule: short fast windows around slow ones that double."""
    from blackjax.adaptation.window_adaptation import build_schedule

    rows = build_schedule(num_steps)
    slow, ends = (jnp.asarray([row[i] for row in rows], bool) for i in range(2))
    return Stage(slow, ends)
