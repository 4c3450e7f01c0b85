"""Moves of a whole population by a Markov kernel, and how the kernel's parameters are tuned from the population."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from expectax.ppl._nested import Choices

from ._absent import refreshed
from ._kernel import Kernel
from ._on import check_memoryless
from ._target import Target
from ._weights import normalized_weights

_GAIN = 1.0
"""How far an acceptance rate that is off by 1 moves the log step size."""


class Moved(NamedTuple):
    """Particles after the last move or (moves first) after each, the mean acceptance rate, and the last parameters."""

    latents: Choices
    acceptance_rate: Float[Array, ""]
    parameters: Any


def moved(
    kernel: Kernel,
    target: Target,
    latents: Choices,
    parameters: Any,
    num_moves: int,
    *,
    every: bool = False,
    tuned: bool = False,
) -> Moved:
    """Move every particle `num_moves` times, tuning the step size after each move if asked; a keyless program."""

    def latents_of(states: Any) -> Choices:
        found = jax.vmap(lambda x: kernel.latents(target, x))(states.position)
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), found, latents)

    def move(carry: Any, _: Any) -> tuple[Any, Any]:
        states, parameters = carry
        after, info = jax.vmap(lambda state: kernel.step(target, state, parameters))(states)
        states = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, states)
        rate = jnp.mean(jnp.asarray(info.acceptance_rate, jnp.result_type(float)))
        parameters = with_step_towards(parameters, kernel, rate) if tuned else parameters
        return (states, parameters), (latents_of(states) if every else None, rate)

    check_memoryless(kernel, "an SMC sampler")
    start = (jax.vmap(lambda z: kernel.init(target, refreshed(target.posterior, z)))(latents), parameters)
    (states, parameters), (path, rates) = lax.scan(move, start, None, length=num_moves)
    return Moved(path if every else latents_of(states), jnp.mean(rates), parameters)


def unadapted(kernel: Kernel, target: Target, latents: Choices) -> Any:
    """Return the parameters of a chain without warm-up."""
    first = jax.tree.map(lambda x: x[0], latents)
    return kernel.adaptation(target, kernel.init(target, first)).unadapted


def tunable(parameters: Any) -> bool:
    """Tell whether there is something that a population can tune."""
    return isinstance(parameters, dict) and not {"step_size", "inverse_mass_matrix"}.isdisjoint(parameters)


def with_shape_of(parameters: Any, target: Target, latents: Choices, log_weights: Float[Array, " n"]) -> Any:
    r"""Return parameters whose inverse mass matrix is the weighted covariance of the unconstrained particles.

    It is shrunk towards a small multiple of the identity as Stan's is, $\frac{n}{n + 5} \hat\Sigma + \frac{5}{n + 5}
    10^{-3} I$, with the effective sample size in the place of $n$.
    """
    if not (isinstance(parameters, dict) and "inverse_mass_matrix" in parameters):
        return parameters
    old, weights = parameters["inverse_mass_matrix"], normalized_weights(log_weights)
    x = jax.vmap(target.flat().unconstrain)(latents)
    centred = x - weights @ x
    shrink, dense = 1.0 / (1.0 + 5.0 * jnp.sum(weights**2)), jnp.ndim(old) == 2
    covariance = (weights[:, None] * centred).T @ centred if dense else weights @ centred**2
    unit = jnp.eye(x.shape[1], dtype=x.dtype) if dense else jnp.ones(x.shape[1], x.dtype)
    found = shrink * covariance + (1.0 - shrink) * 1e-3 * unit
    return parameters | {"inverse_mass_matrix": found.astype(jnp.result_type(old))}


def with_step_towards(parameters: Any, kernel: Kernel, acceptance_rate: Float[Array, ""]) -> Any:
    r"""Return parameters for the next move: $\log \epsilon' = \log \epsilon + a - a^*$ (Robbins and Monro 1951)."""
    aim = getattr(kernel, "target_acceptance", None)
    if aim is None or not (isinstance(parameters, dict) and "step_size" in parameters):
        return parameters
    error = jnp.where(jnp.isfinite(acceptance_rate), acceptance_rate - aim, -aim)
    return parameters | {"step_size": parameters["step_size"] * jnp.exp(_GAIN * error)}


def start_parameters(parameters: Any, size: int) -> Any:
    """Return parameters for the first temperature: in units of the particles' own spread a step is about $d^{-1/4}$."""
    if not (isinstance(parameters, dict) and {"step_size", "inverse_mass_matrix"} <= set(parameters)):
        return parameters
    step = jnp.asarray(float(size) ** -0.25, jnp.result_type(parameters["step_size"]))
    return parameters | {"step_size": step}
