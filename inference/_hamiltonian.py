"""Hamiltonian Monte Carlo and the no-U-turn sampler: BlackJAX's steps on the unconstrained latents."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from expectax.ppl import _jax
from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._kernel import Adaptation, Info, State
from ._target import Target
from ._windows import Windows

_UNADAPTED_STEP = 0.1


class Hamiltonian(eqx.Module):
    """A Hamiltonian kernel; made by `nuts` or `hmc`. Example: see `nuts`."""

    name: Literal["nuts", "hmc"] = eqx.field(static=True)
    target_acceptance: float = eqx.field(static=True)
    dense_mass: bool = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    low_rank: int = eqx.field(static=True, default=0)
    step_size: Any = None
    inverse_mass_matrix: Any = None

    @property
    def _algorithm(self) -> Any:
        import blackjax  # here, because importing it starts JAX's backend

        return getattr(blackjax, self.name)

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position, its density and gradient."""
        flat = target.flat()
        position = flat.unconstrain(latents)
        log_density, gradient = jax.value_and_grad(flat.log_density)(position)
        return State(position, log_density, gradient)

    def step(self, target: Target, state: State, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Do one transition of BlackJAX's."""
        kernel = self._algorithm.build_kernel()
        here = self._algorithm.init(state.position, lambda _: state.log_density)._replace(logdensity_grad=state.cache)
        moved, info = kernel(random_key(), here, target.flat().log_density, **parameters, **dict(self.settings))
        after = State(moved.position, moved.logdensity, moved.logdensity_grad)
        steps = jnp.asarray(info.num_integration_steps)
        return after, Info(info.acceptance_rate, info.is_divergent, steps, info.energy)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune step size and mass matrix in windows, as Stan does."""
        del target
        windows = Windows(
            self.dense_mass, self.target_acceptance, self.low_rank, self.step_size, self.inverse_mass_matrix
        )
        return windows.adaptation(state.position, _UNADAPTED_STEP)


def nuts(
    *,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 10,
    dense_mass: bool = False,
    low_rank: int = 0,
    step_size: Any = None,
    inverse_mass_matrix: Any = None,
) -> Hamiltonian:
    """The no-U-turn sampler (Hoffman and Gelman 2014; multinomial form of Betancourt 2017), by BlackJAX.

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1); nearer to 1 for hard geometries.
        max_tree_depth: at most `2**max_tree_depth` leapfrog steps a transition.
        dense_mass: adapt a full mass matrix instead of a diagonal one.
        low_rank: if positive, adapt a diagonal with this many directions of their own scale (10, say), from draws and
            gradients: for many latents of which some are correlated.
        step_size: where the adaptation starts, and what a run without warm-up uses; by default 1.0 and 0.1.
        inverse_mass_matrix: likewise, a covariance of the unconstrained latents in order of their addresses, or its
            diagonal; by default the identity.

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> from expectax import inference
        >>> inference.nuts(target_acceptance=0.95).name
        'nuts'
    """
    _check(target_acceptance, max_tree_depth, "max_tree_depth")
    settings = (("max_num_doublings", max_tree_depth),)
    start = _start(dense_mass, low_rank, step_size, inverse_mass_matrix)
    return Hamiltonian("nuts", target_acceptance, dense_mass, settings, low_rank, *start)


def hmc(
    *,
    num_integration_steps: int = 10,
    target_acceptance: float = 0.8,
    dense_mass: bool = False,
    low_rank: int = 0,
    step_size: Any = None,
    inverse_mass_matrix: Any = None,
) -> Hamiltonian:
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps (Duane et al. 1987; Neal 2011), by BlackJAX.

    Args:
        num_integration_steps: leapfrog steps a transition.
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).
        dense_mass: adapt a full mass matrix instead of a diagonal one.
        low_rank: if positive, adapt a diagonal with this many directions of their own scale (10, say), from draws and
            gradients: for many latents of which some are correlated.
        step_size: where the adaptation starts, and what a run without warm-up uses; by default 1.0 and 0.1.
        inverse_mass_matrix: likewise, a covariance of the unconstrained latents in order of their addresses, or its
            diagonal; by default the identity.

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> from expectax import inference
        >>> inference.hmc(num_integration_steps=20).name
        'hmc'
    """
    _check(target_acceptance, num_integration_steps, "num_integration_steps")
    settings = (("num_integration_steps", num_integration_steps),)
    start = _start(dense_mass, low_rank, step_size, inverse_mass_matrix)
    return Hamiltonian("hmc", target_acceptance, dense_mass, settings, low_rank, *start)


def _check(target_acceptance: float, count: int, name: str) -> None:
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must be in (0, 1), got {target_acceptance}.")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")


def _start(dense_mass: bool, low_rank: int, step_size: Any, inverse_mass_matrix: Any) -> tuple[Any, Any]:
    """Check where the adaptation starts, and return it as arrays, which are data and no part of the program."""
    if low_rank < 0 or (low_rank and dense_mass):
        raise ValueError(
            f"low_rank is a number of directions, without dense_mass, got {low_rank}, dense_mass={dense_mass}."
        )
    if step_size is not None and not _jax.is_traced(step_size) and not float(step_size) > 0:
        raise ValueError(f"step_size must be positive, got {step_size}.")
    return tuple(None if x is None else jnp.asarray(x, float) for x in (step_size, inverse_mass_matrix))  # pyright: ignore[reportReturnType]
