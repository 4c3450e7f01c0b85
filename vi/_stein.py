"""Stein variational gradient descent: particles that move together towards the posterior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from expectax.ppl import NonFiniteError, Posterior, SupportError, _jax
from expectax.ppl._compile import Static, compiled
from expectax.ppl._staging import check_key


def svgd(
    posterior: Posterior,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    num_particles: int,
    num_steps: int,
    initial: Any = None,
    bandwidth: float | None = None,
) -> Any:
    r"""Move particles along the direction that most quickly lowers their divergence from the posterior.

    In unconstrained space each particle moves by
    $\frac1n \sum_j [k(u_j, u_i) \nabla \log p(u_j) + \nabla_{u_j} k(u_j, u_i)]$, with
    $k(u, v) = \exp(-\|u - v\|^2 / h)$: towards high density, and away from each other. Deterministic after the start. A
    single particle finds the mode; with few particles in many dimensions the spread is too small.

    Args:
        posterior: the target; all its latents are continuous.
        optimizer: an `optax` optimiser, given minus the direction above, such as `optax.adam(0.05)`.
        key: a typed key, for the start.
        num_particles: $n$, at least 1.
        num_steps: how many moves.
        initial: latents to start from, with a leading axis of `num_particles`; by default draws from the prior.
        bandwidth: $h$; by default, at each step, the median of the squared distances over $\log (n + 1)$.

    Returns:
        Nested dict of latents with a leading axis of `num_particles`, all of equal weight.

    Raises:
        SupportError: a latent is discrete, or an initial one is outside its support.
        NonFiniteError: a particle ends at nan or infinity; `result` holds the particles.

    Source: Liu and Wang 2016, Stein variational gradient descent.

    Example:
        >>> import jax, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> target, key = model().given({"y": 1.0}), jax.random.key(0)
        >>> found = vi.svgd(target, optax.adam(0.05), key=key, num_particles=50, num_steps=500)
        >>> bool(abs(found["z"].mean() - 0.5) < 0.02), bool(abs(found["z"].std() - 0.5**0.5) < 0.05)
        (True, True)
    """
    check_key(key)
    if not isinstance(posterior, Posterior):
        raise TypeError(f"svgd takes a posterior, model(args).given(observations), got {posterior!r}.")
    if num_particles < 1 or num_steps < 1:
        raise ValueError(f"svgd needs num_particles and num_steps >= 1, got {num_particles} and {num_steps}.")
    if initial is None:
        start = _prior(posterior, key, num_particles)
    else:
        start = jax.vmap(posterior.unconstrain, axis_size=num_particles)(initial)
    if _broken(start):
        raise SupportError(f"svgd at {_jax.caller()}: a particle of `initial` is not inside the latents' support.")
    particles = _move(posterior, start, Static(optimizer), num_steps, bandwidth)
    if _broken(particles):
        raise NonFiniteError(
            f"svgd: a particle is not finite after {num_steps} steps. Try a smaller learning rate, or another initial.",
            particles,
        )
    return particles


@compiled
def _prior(posterior: Posterior, key: Any, num_particles: int) -> Any:
    def one(key: Any) -> Any:
        trace, _ = posterior.generate(key)
        return posterior.unconstrain(posterior.latents(trace.choices))

    return _jax.over_lanes(one, num_particles)(key)


@compiled
def _move(posterior: Posterior, start: Any, rule: Static, num_steps: int, bandwidth: float | None) -> Any:
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], start))
    slopes = jax.vmap(jax.grad(lambda u: posterior.unconstrained_log_density(unravel(u))))
    u = jax.vmap(lambda x: ravel_pytree(x)[0])(start)

    def step(carry: Any, _: Any) -> Any:
        u, state = carry
        updates, state = rule.value.update(-stein_direction(u, slopes(u), bandwidth), state, u)
        return (optax.apply_updates(u, updates), state), None

    (u, _), _ = lax.scan(step, (u, rule.value.init(u)), length=num_steps)
    return jax.vmap(lambda x: posterior.constrain(unravel(x)))(u)


def stein_direction(u: Any, slopes: Any, bandwidth: float | None) -> Any:
    """Return where each of n particles moves, shape `(n, d)`, given the slopes of the log density at them."""
    apart = u[:, None] - u[None]
    squared = jnp.sum(apart**2, axis=-1)
    if bandwidth is None:
        median = jnp.median(squared) / jnp.log(len(u) + 1.0)
        h = jnp.where(median > 0, median, 1.0)
    else:
        h = bandwidth
    kernel = jnp.exp(-squared / h)
    apart_by_kernel = jnp.einsum("ij,ijd->id", kernel, apart)  # the kernel's slope, without 2 / h
    return (kernel @ slopes + 2.0 / h * apart_by_kernel) / len(u)


def _broken(particles: Any) -> bool:
    """Tell whether some numbers are known not to be finite."""
    leaves = jax.tree.leaves(particles)
    return not any(map(_jax.is_traced, leaves)) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
