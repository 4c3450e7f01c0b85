r"""Log weights: effective sample size, normalisation, and the log of a mean, all with a shift by the maximum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_mean_exp(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    r"""Return $\log \frac1n \sum_i e^{w_i}$; minus infinity if all weights are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> float(inference.log_mean_exp(jnp.zeros(4)))
        0.0
    """
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])


def normalized_weights(log_weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return weights that sum to one; equal ones if all are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> inference.normalized_weights(jnp.array([-7.0, -7.0])).tolist()
        [0.5, 0.5]
    """
    top = jnp.max(log_weights)
    shifted = jnp.where(jnp.isneginf(top), 0.0, log_weights - jnp.where(jnp.isneginf(top), 0.0, top))
    weights = jnp.exp(shifted)
    return weights / jnp.sum(weights)


def log_mean_and_size(log_weights: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return `log_mean_exp` and `effective_sample_size` of the weights, from one exponential of each."""
    top = jnp.max(log_weights)
    dead = jnp.isneginf(top)
    weights = jnp.exp(log_weights - jnp.where(dead, 0.0, top))
    count, total = log_weights.shape[0], jnp.sum(weights)
    size = jnp.where(dead, 1.0 * count, total**2 / jnp.sum(weights**2))
    return top + jnp.log(total / count), size


def effective_sample_size(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    r"""Return $(\sum_i w_i)^2 / \sum_i w_i^2$ (Kong, Liu and Wong 1994).

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> float(inference.effective_sample_size(jnp.zeros(8)))
        8.0
    """
    return 1.0 / jnp.sum(normalized_weights(log_weights) ** 2)


def weighed(log_weights: Any, change: Any) -> Any:
    """Return changed log weights; a particle without weight stays so, whatever its change."""
    gone = jnp.isneginf(log_weights)
    return jnp.where(gone, -jnp.inf, jnp.where(gone, 0.0, log_weights) + change)


def log_ratio(after: Any, before: Any) -> Any:
    """Return `after - before` of log densities; what was impossible before stays without weight."""
    gone = jnp.isneginf(before)
    return jnp.where(gone, -jnp.inf, after - jnp.where(gone, 0.0, before))
