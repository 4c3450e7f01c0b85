r"""Resampling: ancestors of $n$ new particles with $E[\#\{j : a_j = i\}] = n W_i$ (Douc, Cappé and Moulines 2005)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from expectax.ppl._staging import check_key

from ._weights import normalized_weights

Method = Literal["systematic", "stratified", "multinomial"]


def _levels(key: PRNGKeyArray, num: int, method: str, dtype: Any) -> Float[Array, " num"]:
    """Return increasing levels in [0, 1) at which the weights' distribution function is inverted."""
    if method == "multinomial":
        # the order statistics of uniforms, as partial sums of exponentials
        spacings = jax.random.exponential(key, (num + 1,), dtype)
        return lax.cummax(jnp.cumsum(spacings))[:-1] / jnp.sum(spacings)
    shape = () if method == "systematic" else (num,)
    return (jnp.arange(num, dtype=dtype) + jax.random.uniform(key, shape, dtype)) / num


def resample(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num: int | None = None, method: Method = "systematic"
) -> Int[Array, " num"]:
    r"""Draw ancestor indices in proportion to the weights.

    Args:
        key: a typed key.
        log_weights: unnormalised log weights; a weight of minus infinity is never chosen.
        num: how many indices; by default as many as there are weights.
        method: `"systematic"` (one uniform; counts within one of $n W_i$, up to the
            rounding of the cumulated weights), `"stratified"` or `"multinomial"`.

    Returns:
        Increasing indices.

    Raises:
        ValueError: the method is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax import inference
        >>> inference.resample(jax.random.key(0), jnp.log(jnp.array([0.0, 0.5, 0.5])), 4).tolist()
        [1, 1, 2, 2]
    """
    check_key(key)
    if method not in ("systematic", "stratified", "multinomial"):
        raise ValueError(f"method must be 'systematic', 'stratified' or 'multinomial', got {method!r}.")
    num = log_weights.shape[0] if num is None else num
    weights = normalized_weights(log_weights)
    cumulated = lax.cummax(jnp.cumsum(weights))  # a parallel sum of floats need not be monotone
    levels = _levels(key, num, method, weights.dtype) * cumulated[-1]
    chosen = jnp.minimum(jnp.searchsorted(cumulated, levels, side="right"), weights.shape[0] - 1)
    # rounding may choose a particle without weight: take the nearest one before it that has some
    positive = weights > 0
    usable = lax.cummax(jnp.where(positive, jnp.arange(weights.shape[0]), jnp.argmax(positive)))
    return usable[chosen]
