r"""Resampling: ancestors of $n$ new particles with $E[\#\{j : a_j = i\}] = n W_i$ (Douc, Cappé and Moulines 2005)."""

from __future__ import annotations

import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import distributions as dist
from numpyro.distributions import constraints

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


def ancestors(
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
        >>> inference.ancestors(jax.random.key(0), jnp.log(jnp.array([0.0, 0.5, 0.5])), 4).tolist()
        [1, 1, 2, 2]
    """
    check_key(key)
    check_method(method)
    num = log_weights.shape[0] if num is None else num
    weights = normalized_weights(log_weights)
    cumulated = lax.cummax(jnp.cumsum(weights))  # a parallel sum of floats need not be monotone
    levels = _levels(key, num, method, weights.dtype) * cumulated[-1]
    chosen = jnp.minimum(jnp.searchsorted(cumulated, levels, side="right"), weights.shape[0] - 1)
    # rounding may choose a particle without weight: take the nearest one before it that has some
    positive = weights > 0
    usable = lax.cummax(jnp.where(positive, jnp.arange(weights.shape[0]), jnp.argmax(positive)))
    return usable[chosen]


class Ancestors(dist.Distribution):
    r"""The law of a resampling step: a vector of indices, with its exact probability.

    A keyless program draws it as any choice, `expectax.sample("ancestors", Ancestors(log_weights))`; its support is
    finite, so that `exact` enumerates it.

    Args:
        log_weights: unnormalised log weights, shape `(n,)`.
        num: how many ancestors; by default as many as there are weights.
        method: as in `ancestors`.

    With $C$ the weights' distribution function and $u$ uniform in $(0, 1)$, systematic resampling takes
    $a_j = i$ where $C_{i-1} \le (j + u) / m < C_i$; stratified resampling has a $u_j$ of its own for each $j$; of
    multinomial resampling the sorted draws are returned.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> law = inference.Ancestors(jnp.log(jnp.array([0.25, 0.75])))
        >>> law.enumerate_support().tolist(), [round(float(p), 3) for p in jnp.exp(law.log_prob(law.enumerate_support()))]
        ([[0, 0], [0, 1], [1, 1]], [0.0, 0.5, 0.5])
    """

    pytree_data_fields = ("log_weights",)
    pytree_aux_fields = ("num", "method")
    has_enumerate_support = True

    def __init__(self, log_weights: Any, num: int | None = None, method: Method = "systematic"):
        """Keep the weights."""
        self.log_weights = jnp.asarray(log_weights)
        self.num = self.log_weights.shape[-1] if num is None else num
        self.method: Method = check_method(method)
        super().__init__(batch_shape=(), event_shape=(self.num,), validate_args=False)

    @property
    def support(self) -> Any:
        """Vectors of indices."""
        return constraints.independent(constraints.integer_interval(0, self.log_weights.shape[-1] - 1), 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw ancestors, of shape `sample_shape + (num,)`."""
        if not sample_shape:
            return ancestors(key, self.log_weights, self.num, self.method)
        keys = jax.random.split(key, sample_shape).reshape(-1)
        drawn = jax.vmap(lambda key: ancestors(key, self.log_weights, self.num, self.method))(keys)
        return jnp.reshape(drawn, (*sample_shape, self.num))

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Return the exact log probability of vectors of ancestors."""
        del intermediates
        weights = normalized_weights(self.log_weights)
        one = lambda a: jnp.log(_probability(self.method, weights, a))  # noqa: E731
        for _ in range(jnp.ndim(value) - 1):
            one = jax.vmap(one)
        return one(jnp.asarray(value))

    def enumerate_support(self, expand: bool = True) -> Any:
        """Return all vectors that can be drawn, none decreasing."""
        del expand
        count = self.log_weights.shape[-1]
        rows = list(itertools.combinations_with_replacement(range(count), self.num))
        return jnp.asarray(np.reshape(rows, (len(rows), self.num)), jnp.int32)


def _probability(method: str, weights: Any, index: Any) -> Any:
    """Return the probability of a vector of ancestors that does not decrease."""
    num = index.shape[0]
    if method == "multinomial":
        counts = jnp.bincount(index, length=weights.shape[0])
        log_ways = gammaln(num + 1.0) - jnp.sum(gammaln(counts + 1.0))
        drawn = jnp.prod(jnp.where(counts > 0, weights, 1.0) ** counts)
        return jnp.exp(log_ways) * drawn
    above = jnp.cumsum(weights)
    below = jnp.concatenate([jnp.zeros(1, weights.dtype), above[:-1]])
    first = jnp.clip(num * below[index] - jnp.arange(num), 0.0, 1.0)
    last = jnp.clip(num * above[index] - jnp.arange(num), 0.0, 1.0)
    if method == "systematic":
        return jnp.maximum(jnp.min(last) - jnp.max(first), 0.0)
    return jnp.prod(jnp.maximum(last - first, 0.0))


def check_method(method: Any) -> Method:
    """Refuse an unknown method."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}.")
    return method
