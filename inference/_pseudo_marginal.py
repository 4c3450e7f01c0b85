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


class Info(NamedTuple):
    """What a transition tells."""

    acceptance_rate: Any
    energy: Any
    is_divergent: Any = False
    num_integration_steps: Any = 1


@dataclasses.dataclass(frozen=True)
class PseudoMarginal:
    """A random-walk kernel (BlackJAX's) for estimated densities. Example: see `pseudo_marginal`.

    Its log density takes a key: `log_density(position, key)`.
    """

    target_acceptance: float
    dense_mass: bool
    name: str = "pseudo_marginal"
    takes_key: bool = True

    def init(self, position: Any, log_density: LogDensity) -> Any:
        """Return the state at a position, with a first estimate."""
        import blackjax  # here, because importing it starts JAX's backend

        return blackjax.additive_step_random_walk.init(position, _numbers(log_density))

    def step(self, key: Any, state: Any, log_density: LogDensity, parameters: dict[str, Any]) -> tuple[Any, Info]:
        """Propose, estimate, accept or stay: the state keeps the estimate that it was accepted with."""
        import blackjax

        key_move, key_density = jax.random.split(key)
        root, size = _root(parameters["inverse_mass_matrix"]), parameters["step_size"]

        def move(key: Any, position: Any) -> Any:
            noise = jax.random.normal(key, position.shape, position.dtype)
            return size * (root @ noise if root.ndim == 2 else root * noise)

        estimate = _numbers(lambda position: log_density(position, key_density))
        state, info = blackjax.additive_step_random_walk.build_kernel()(key_move, state, estimate, move)
        return state, Info(info.acceptance_rate, -state.logdensity)

    def warm_up(self, key: Any, position: Any, log_density: LogDensity, num_steps: int) -> tuple[Any, dict[str, Any]]:
        """Adapt the scale in three phases, the later two with the covariance that the one before has seen.

        The scale goes by Robbins-Monro steps: a chain that is stuck at a lucky estimate accepts nothing for a while,
        which dual averaging takes for a reason to stop moving.
        """
        from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

        shape_init, shape_update, shape_final = mass_matrix_adaptation(not self.dense_mass)
        size, key_start = position.shape[0], jax.random.fold_in(key, 1)
        # the best scale for a normal target whose covariance is known (Roberts and Rosenthal 2001)
        start = jnp.asarray(jnp.log(2.38 / size**0.5), position.dtype)

        def phase(state: Any, key: Any, matrix: Any, length: int) -> Any:
            def step(carry: Any, inputs: Any) -> tuple[Any, None]:
                (state, shape, log_scale), (n, key) = carry, inputs
                parameters = {"step_size": jnp.exp(log_scale), "inverse_mass_matrix": matrix}
                state, info = self.step(key, state, log_density, parameters)
                log_scale = log_scale + (n + 1.0) ** -_DECAY * (info.acceptance_rate - self.target_acceptance)
                return (state, shape_update(shape, state.position), log_scale), None

            inputs = (jnp.arange(length, dtype=position.dtype), jax.random.split(key, length))
            state, shape, log_scale = lax.scan(step, (state, shape_init(size), start), inputs)[0]
            return state, shape_final(shape).inverse_mass_matrix, log_scale

        part = max(num_steps // 3, 1)
        keys = [jax.random.fold_in(key, n) for n in (2, 3, 4)]
        state = self.init(position, lambda position: log_density(position, key_start))
        state, matrix, _ = phase(state, keys[0], jnp.eye(size) if self.dense_mass else jnp.ones(size), part)
        state, matrix, _ = phase(state, keys[1], matrix, part)
        state, _, log_scale = phase(state, keys[2], matrix, max(num_steps - 2 * part, 1))
        return state, {"step_size": jnp.exp(log_scale), "inverse_mass_matrix": matrix}


def _numbers(log_density: LogDensity) -> LogDensity:
    """Return a log density whose nan is minus infinity: a point that is never accepted, and always left."""

    def safe(position: Any) -> Any:
        value = log_density(position)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    return safe


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
