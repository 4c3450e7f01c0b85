r"""Pseudo-marginal Metropolis-Hastings: a random walk on a target whose density is only estimated.

The estimate of the present point is kept with it, never made anew: then the chain is a Metropolis-Hastings chain on the
pair of point and estimate, whose marginal is exactly the target (Andrieu and Roberts 2009). With a particle filter's
estimate it is particle marginal Metropolis-Hastings (Andrieu, Doucet and Holenstein 2010).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._kernels import LogDensity

_DECAY = 0.6
"""Power of the Robbins-Monro step: $n^{-0.6}$."""


class State(NamedTuple):
    """A point and the estimate of its log density that it was accepted with."""

    position: Any
    logdensity: Any


class Info(NamedTuple):
    """What a transition tells."""

    acceptance_rate: Any
    energy: Any
    is_divergent: Any = False
    num_integration_steps: Any = 1


@dataclasses.dataclass(frozen=True)
class PseudoMarginal:
    """A random-walk kernel for estimated densities. Example: see `pseudo_marginal`.

    Its log density takes a key: `log_density(position, key)`.
    """

    target_acceptance: float
    dense_mass: bool
    name: str = "pseudo_marginal"
    takes_key: bool = True

    def init(self, key: Any, position: Any, log_density: LogDensity) -> State:
        """Return the state at a position, with a first estimate."""
        return State(position, log_density(position, key))

    def step(self, key: Any, state: State, log_density: LogDensity, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Propose, estimate, accept or stay."""
        key_move, key_density, key_accept = jax.random.split(key, 3)
        noise = jax.random.normal(key_move, state.position.shape, state.position.dtype)
        root = _root(parameters["inverse_mass_matrix"])
        move = root @ noise if self.dense_mass else root * noise
        proposed = state.position + parameters["step_size"] * move
        log_density_there = log_density(proposed, key_density)
        # from an estimate of 0 anything possible is accepted, and nothing impossible or nan ever
        log_ratio = jnp.where(log_density_there > -jnp.inf, log_density_there - state.logdensity, -jnp.inf)
        rate = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(state.logdensity), jnp.inf, log_ratio), 0.0))
        rate = jnp.where(log_density_there > -jnp.inf, rate, 0.0)
        accept = jax.random.uniform(key_accept) < rate
        following = jax.tree.map(lambda a, b: jnp.where(accept, a, b), State(proposed, log_density_there), state)
        return following, Info(rate, -following.logdensity)

    def warm_up(self, key: Any, position: Any, log_density: LogDensity, num_steps: int) -> tuple[State, dict[str, Any]]:
        """Adapt the scale to the target acceptance and the shape to the covariance of the second half."""
        size = position.shape[0]
        state = self.init(key, position, log_density)
        shape = jnp.eye(size) if self.dense_mass else jnp.ones(size)
        log_scale = jnp.log(2.38 / size**0.5) + jnp.zeros((), position.dtype)

        def phase(carry: Any, key: Any, shape: Any, length: int) -> Any:
            def step(carry: Any, inputs: Any) -> Any:
                (state, log_scale, mean, second), (n, key) = carry, inputs
                parameters = {"step_size": jnp.exp(log_scale), "inverse_mass_matrix": shape}
                state, info = self.step(key, state, log_density, parameters)
                log_scale = log_scale + (n + 1.0) ** -_DECAY * (info.acceptance_rate - self.target_acceptance)
                change = state.position - mean
                mean = mean + change / (n + 1.0)
                rest = state.position - mean
                second = second + (jnp.outer(change, rest) if self.dense_mass else change * rest)
                return (state, log_scale, mean, second), None

            zeros = jnp.zeros_like(position)
            start = (*carry, zeros, jnp.zeros_like(shape))
            inputs = (jnp.arange(length, dtype=position.dtype), jax.random.split(key, length))
            return lax.scan(step, start, inputs)[0]

        keys, part = jax.random.split(jax.random.fold_in(key, 1), 3), max(num_steps // 3, 1)
        *carry, _, second = phase((state, log_scale), keys[0], shape, part)
        shape = self._regularised(second, part, size)
        *carry, _, second = phase((carry[0], log_scale), keys[1], shape, part)
        shape = self._regularised(second, part, size)
        state, log_scale, _, _ = phase((carry[0], log_scale), keys[2], shape, max(num_steps - 2 * part, 1))
        return state, {"step_size": jnp.exp(log_scale), "inverse_mass_matrix": shape}

    def _regularised(self, second: Any, n: int, size: int) -> Any:
        """Shrink a sample covariance towards a small multiple of the identity, as Stan does."""
        identity = jnp.eye(size) if self.dense_mass else jnp.ones(size)
        return n / (n + 5.0) * second / max(n - 1, 1) + 1e-3 * 5.0 / (n + 5.0) * identity


def _root(matrix: Any) -> Any:
    return jnp.linalg.cholesky(matrix) if matrix.ndim == 2 else jnp.sqrt(matrix)


def pseudo_marginal(*, target_acceptance: float = 0.2, dense_mass: bool = False) -> PseudoMarginal:
    r"""Random-walk Metropolis-Hastings on a density that is only estimated: exact for any number of particles.

    The posterior's program has sites with an estimated density (`expectax.sample("y", vi.marginal(...))`). The chain's
    stationary law is the exact posterior; a noisy estimate makes the chain slower, not wrong. A log estimate with a
    standard deviation of about 1.2 to 1.8 at the mode is the best use of the work.

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).
        dense_mass: adapt a full covariance of the proposals instead of a diagonal one.

    Returns:
        A kernel for `mcmc`.

    Raises:
        ValueError: `target_acceptance` is out of range.

    Sources: Beaumont 2003; Andrieu and Roberts 2009; Andrieu, Doucet and Holenstein 2010; the standard deviations:
    Doucet et al. 2015; Sherlock et al. 2015.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference, vi
        >>> @ex.model
        ... def walk(scale):
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, scale))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=3)
        >>> @ex.model
        ... def model():
        ...     scale = ex.sample("scale", dist.HalfNormal(1.0))
        ...     ex.sample("data", vi.marginal(walk(scale), "y", vi.bootstrap_filter(50)))
        >>> posterior = model().given({"data": {"y": jnp.array([0.5, 1.0, 0.0])}})
        >>> chains = inference.mcmc(
        ...     posterior, inference.pseudo_marginal(), key=jax.random.key(0), num_warmup=300, num_samples=500
        ... )
        >>> chains.choices["scale"].shape
        (4, 500)
    """
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must be in (0, 1), got {target_acceptance}.")
    return PseudoMarginal(target_acceptance, dense_mass)
