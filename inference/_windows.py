r"""Warm-up in windows: a step size by dual averaging, a mass matrix by Welford's moments, as in Stan.

A kernel with a `step_size` and an `inverse_mass_matrix` gets its adaptation here; the pieces are BlackJAX's.

A low-rank one is learned from draws and gradients.

Sources: Stan Reference Manual, "HMC algorithm parameters"; Nesterov 2009; Hoffman and Gelman 2014; Seyboldt et al. 2026
for low-rank mass matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import ShapeError

from ._kernel import Adaptation, Info, Stage, State

_BUFFER = 256
"""Draws and gradients of a window, the last ones, that a low-rank mass matrix is learned from."""


class _Tuning(NamedTuple):
    """The two adaptations, and the mass matrix that is in use."""

    step: Any
    mass: Any
    inverse_mass_matrix: Any


class Mass(NamedTuple):
    """How a mass matrix is learned: `init(size)`, `update(state, position, gradient)` and `final(state)`."""

    init: Callable[[int], Any]
    update: Callable[[Any, Any, Any], Any]
    final: Callable[[Any], Any]


class Windows(NamedTuple):
    """How wide a mass matrix, which acceptance to aim at, and where to start."""

    dense_mass: bool
    target_acceptance: float
    low_rank: int = 0
    step_size: Any = None
    inverse_mass_matrix: Any = None

    def adaptation(self, position: Any, unadapted_step: float) -> Adaptation:
        """Return the adaptation of a kernel that moves a vector; only the vector's shape counts."""
        from blackjax.adaptation.step_size import dual_averaging_adaptation

        size, dtype = position.shape[0], position.dtype
        mass_init, mass_update, mass_final = self._mass(size)
        step_init, step_update, step_final = dual_averaging_adaptation(self.target_acceptance)

        def update(own: _Tuning, stage: Stage, state: State, info: Info) -> _Tuning:
            step = step_update(own.step, info.acceptance_rate)
            learned = lambda: floats(mass_update(own.mass, state.position, state.cache), dtype)  # noqa: E731
            mass = lax.cond(stage.slow, learned, lambda: own.mass)
            own = _Tuning(step, mass, own.inverse_mass_matrix)
            return lax.cond(stage.window_end, renewed, lambda own: own, own)

        def renewed(own: _Tuning) -> _Tuning:
            mass = floats(mass_final(own.mass), dtype)
            return _Tuning(step_init(step_final(own.step)), mass, mass.inverse_mass_matrix)

        def parameters(own: _Tuning) -> dict[str, Any]:
            return {"step_size": jnp.exp(own.step.log_step_size), "inverse_mass_matrix": own.inverse_mass_matrix}

        def final(own: _Tuning) -> dict[str, Any]:
            return {"step_size": jnp.exp(own.step.log_step_size_avg), "inverse_mass_matrix": own.inverse_mass_matrix}

        mass = floats(mass_init(size), dtype)
        first = floats(self._first(mass.inverse_mass_matrix), dtype)
        given = self.step_size is not None
        start = _Tuning(step_init(jnp.asarray(self.step_size if given else 1.0, dtype)), mass, first)
        step = jnp.asarray(self.step_size if given else unadapted_step, dtype)
        return Adaptation(
            floats(start, dtype), update, parameters, final, {"step_size": step, "inverse_mass_matrix": first}
        )

    def _mass(self, size: int) -> Mass:
        if self.low_rank:
            from blackjax.adaptation.metric_recipes import lookup_recipe

            recipe = dataclasses.replace(lookup_recipe("fisher_low_rank"), max_rank=min(self.low_rank, size))
            core = recipe.build_core(buffer_size=_BUFFER)
            return Mass(core.init, core.update, core.final)
        from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

        init, update, final = mass_matrix_adaptation(not self.dense_mass)
        return Mass(init, lambda state, position, _: update(state, position), final)

    def _first(self, unit: Any) -> Any:
        """Return the inverse mass matrix to start with, in the form that is learned."""
        given = self.inverse_mass_matrix
        if given is None:
            return unit
        given = jnp.asarray(given)
        size = jax.tree.leaves(unit)[0].shape[0]
        if given.shape not in ((size,), (size, size)):
            raise ShapeError(
                f"inverse_mass_matrix: the unconstrained latents are a vector of {size}, so it has the shape ({size},) or "
                f"({size}, {size}), got {given.shape}."
            )
        if self.dense_mass:
            return given if given.ndim == 2 else jnp.diag(given)
        variances = given if given.ndim == 1 else jnp.diagonal(given)
        return unit._replace(sigma=jnp.sqrt(variances)) if self.low_rank else variances


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
