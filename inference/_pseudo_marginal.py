r"""Pseudo-marginal Metropolis-Hastings: a random walk on a target whose density is only estimated.

The estimate of the present point is kept with it, never made anew: then the chain is a Metropolis-Hastings chain on the
pair of point and estimate, whose marginal is exactly the target (Andrieu and Roberts 2009). With a particle filter's
estimate it is particle marginal Metropolis-Hastings (Andrieu, Doucet and Holenstein 2010).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._kernel import Adaptation, Info, Stage, State
from ._target import Target
from ._windows import floats

_DECAY = 0.6
"""Power of the Robbins-Monro step: $n^{-0.6}$."""


class PseudoMarginal(eqx.Module):
    """A random-walk kernel (BlackJAX's) for estimated densities. Example: see `pseudo_marginal`."""

    target_acceptance: float = eqx.field(static=True)
    dense_mass: bool = eqx.field(static=True)
    name: str = eqx.field(static=True, default="pseudo_marginal")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position with a first estimate."""
        flat = target.flat()
        position = flat.unconstrain(latents)
        return State(position, number(flat.log_density(position, random_key("density"))))

    def step(self, target: Target, state: State, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Propose, estimate, accept or stay: the state keeps the estimate that it was accepted with."""
        import blackjax  # here, because importing it starts JAX's backend

        key_density = random_key("density")
        spread, size = root(parameters["inverse_mass_matrix"]), parameters["step_size"]

        def move(key: Any, position: Any) -> Any:
            noise = jax.random.normal(key, position.shape, position.dtype)
            return size * (spread @ noise if spread.ndim == 2 else spread * noise)

        def estimate(position: Any) -> Any:
            return number(target.flat().log_density(position, key_density))

        walk = blackjax.additive_step_random_walk
        here = walk.init(state.position, lambda _: state.log_density)
        moved, info = walk.build_kernel()(random_key("move"), here, estimate, move)
        return State(moved.position, moved.logdensity), Info(info.acceptance_rate, energy=-moved.logdensity)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Adapt the scale by Robbins-Monro steps, and at the end of each window the shape of the proposals."""
        del target
        return scale_adaptation(state.position, self.target_acceptance, self.dense_mass)


class _Tuning(NamedTuple):
    """The proposals' log scale, its step number, the covariance that is being learned, and the one in use."""

    log_scale: Any
    number: Any
    shape: Any
    inverse_mass_matrix: Any


def scale_adaptation(position: Any, target_acceptance: float, dense_mass: bool) -> Adaptation:
    """Return the adaptation of a random walk on a vector.

    The scale goes by Robbins-Monro steps: a chain that is stuck at a lucky estimate accepts nothing for a while, which
    dual averaging takes for a reason to stop moving.
    """
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    shape_init, shape_update, shape_final = mass_matrix_adaptation(not dense_mass)
    size, dtype = position.shape[0], position.dtype
    unit = jnp.eye(size, dtype=dtype) if dense_mass else jnp.ones(size, dtype)

    def update(own: _Tuning, stage: Stage, state: State, info: Info) -> _Tuning:
        step = own.number**-_DECAY * (info.acceptance_rate - target_acceptance)
        shape = lax.cond(stage.slow, lambda: shape_update(own.shape, state.position), lambda: own.shape)
        own = _Tuning(own.log_scale + step.astype(dtype), own.number + 1.0, shape, own.inverse_mass_matrix)
        return lax.cond(stage.window_end, renewed, lambda own: own, own)

    def renewed(own: _Tuning) -> _Tuning:
        shape = shape_final(own.shape)
        return _Tuning(own.log_scale, jnp.ones_like(own.number), shape, shape.inverse_mass_matrix)

    def parameters(own: _Tuning) -> dict[str, Any]:
        return {"step_size": jnp.exp(own.log_scale), "inverse_mass_matrix": own.inverse_mass_matrix}

    # the best scale for a normal target whose covariance is known (Roberts and Rosenthal 2001)
    best = jnp.asarray(2.38 / size**0.5, dtype)
    start = _Tuning(jnp.log(best), jnp.ones((), dtype), floats(shape_init(size), dtype), unit)
    return Adaptation(start, update, parameters, parameters, {"step_size": best, "inverse_mass_matrix": unit})


def number(value: Any) -> Any:
    """Return a log density whose nan is minus infinity: a point that is never accepted, and always left."""
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


def root(matrix: Any) -> Any:
    """Return the square root of a covariance, full or diagonal."""
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
