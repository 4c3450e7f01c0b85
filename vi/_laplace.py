"""Laplace's approximation: a normal at the mode of the posterior, in unconstrained space."""

from __future__ import annotations

import math
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import NonFiniteError, Posterior, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._staging import check_key


class Laplace(eqx.Module):
    """The result of `vi.laplace`.

    Example: see `vi.laplace`.

    Attributes:
        posterior: the target.
        mode: the latents at the mode of the unconstrained density, in their own spaces.
        unconstrained_mode: the same mode in unconstrained space.
        covariance: of the unconstrained latents, flattened and joined in the order of `ravel_pytree`: shape `(d, d)`.
        log_evidence: the estimate of the log evidence; exact for a posterior that is normal in unconstrained space.
        distance: how far the search has ended from the mode, in standard deviations (the Newton decrement).
        num_steps: how many steps the search took.
    """

    posterior: Posterior
    mode: Any
    unconstrained_mode: Any
    covariance: Float[Array, "d d"]
    log_evidence: Float[Array, ""]
    distance: Float[Array, ""]
    num_steps: Array

    def sample(self, key: PRNGKeyArray, num_samples: int) -> Any:
        """Draw latents from the approximation.

        Args:
            key: a typed key.
            num_samples: how many draws.

        Returns:
            Nested dict of latents with a leading axis of draws.

        Example: see `vi.laplace`.
        """
        check_key(key)
        centre, unravel = ravel_pytree(self.unconstrained_mode)
        factor = jnp.linalg.cholesky(self.covariance)
        noise = jax.random.normal(key, (num_samples, centre.size), centre.dtype)
        return jax.vmap(lambda e: self.posterior.constrain(unravel(centre + factor @ e)))(noise)


def laplace(posterior: Posterior, initial: Any = None, *, num_steps: int = 500) -> Laplace:
    r"""Approximate a posterior by a normal at its mode, in unconstrained space.

    With $u^*$ the maximum of $\log p(z(u), y) + \log |\det \partial z / \partial u|$ and $H$ its Hessian there: the normal
    $N(u^*, -H^{-1})$, and $\log p(y) \approx \log p(u^*, y) + \frac d2 \log 2\pi - \frac12 \log\det(-H)$. The mode
    depends on the parametrisation: it is not in general the mode of the constrained density. The search is L-BFGS.

    Args:
        posterior: the target; all its latents are continuous.
        initial: latents to start from; by default zero in unconstrained space.
        num_steps: the most steps of the search; it stops earlier where a step moves nothing any more.

    Returns:
        A `Laplace`. It warns if `distance` is above 0.05.

    Raises:
        SupportError: a latent is discrete, or an initial one is outside its support.
        NonFiniteError: the search met nan, or the Hessian at its end is not negative definite; `result` holds it.

    Source: Tierney and Kadane 1986.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> found = vi.laplace(model().given({"y": 1.0}))
        >>> round(float(found.mode["z"]), 3), round(float(found.covariance[0, 0]), 3), round(float(found.log_evidence), 3)
        (0.5, 0.5, -1.516)
        >>> found.sample(jax.random.key(0), 10)["z"].shape
        (10,)
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"laplace takes a posterior, model(args).given(observations), got {posterior!r}.")
    if num_steps < 1:
        raise ValueError(f"laplace needs num_steps >= 1, got {num_steps}.")
    start = start_at(posterior, initial)
    result = _laplace(posterior, start, num_steps)
    if not _jax.is_traced(result.log_evidence):
        _check(result, num_steps)
    return result


def start_at(posterior: Posterior, initial: Any) -> Any:
    """Return unconstrained latents: those of `initial`, else zeros."""
    if initial is not None:
        return posterior.unconstrain(initial)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), posterior.unconstrained_shapes)


@compiled
def _laplace(posterior: Posterior, start: Any, num_steps: int) -> Laplace:
    position, unravel = ravel_pytree(start)

    def energy(u: Any) -> Any:
        return -posterior.unconstrained_log_density(unravel(u))

    mode, steps = _minimum(energy, position, num_steps)
    factor = jnp.linalg.cholesky(jax.hessian(energy)(mode))
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(mode.size, dtype=mode.dtype), lower=True)
    log_volume = 0.5 * mode.size * math.log(2 * math.pi) - jnp.sum(jnp.log(jnp.diagonal(factor)))
    unconstrained = unravel(mode)
    return Laplace(
        posterior=posterior,
        mode=posterior.constrain(unconstrained),
        unconstrained_mode=unconstrained,
        covariance=inverse.T @ inverse,
        log_evidence=log_volume - energy(mode),
        distance=jnp.linalg.norm(inverse @ jax.grad(energy)(mode)),
        num_steps=steps,
    )


def _minimum(energy: Any, position: Any, num_steps: int) -> tuple[Any, Any]:
    """Return where L-BFGS ends, and the number of its steps."""
    search, evaluate = optax.lbfgs(), optax.value_and_grad_from_state(energy)
    smallest = 4 * jnp.finfo(position.dtype).eps

    def going(carry: Any) -> Any:
        u, _, moved, steps = carry
        return (steps < num_steps) & jnp.any(moved > smallest * jnp.maximum(1.0, jnp.abs(u)))

    def step(carry: Any) -> Any:
        u, state, _, steps = carry
        value, slope = evaluate(u, state=state)
        updates, state = search.update(slope, state, u, value=value, grad=slope, value_fn=energy)
        following: Any = optax.apply_updates(u, updates)
        return following, state, jnp.abs(following - u), steps + 1

    start = (position, search.init(position), jnp.full_like(position, jnp.inf), jnp.asarray(0))
    u, _, _, steps = lax.while_loop(going, step, start)
    return u, steps


def _check(result: Laplace, num_steps: int) -> None:
    if not math.isfinite(float(result.log_evidence)):
        raise NonFiniteError(
            f"laplace: after {int(result.num_steps)} steps the log density is not finite or has no strict maximum there "
            "(its Hessian is not negative definite). Give another initial, or another parametrisation.",
            result,
        )
    if result.distance > 0.05:
        warnings.warn(
            f"vi.laplace: the search ended after {int(result.num_steps)} of {num_steps} steps, still "
            f"{float(result.distance):.1e} standard deviations from the mode. Give more num_steps, or another initial.",
            RuntimeWarning,
            stacklevel=3,
        )
