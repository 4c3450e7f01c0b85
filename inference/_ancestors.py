r"""Resampling: ancestors of $n$ new particles with $E[\#\{j : a_j = i\}] = n W_i$ (Douc, Cappé and Moulines 2005)."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl._staging import check_key

from ._resampling_laws import PROBABILITIES
from ._resampling_schemes import SCHEMES
from ._weights import normalized_weights

Method = Literal["systematic", "stratified", "multinomial", "residual", "ssp", "killing"]


def ancestors(
    key: PRNGKeyArray, log_weights: Float[Array, " n"], num: int | None = None, method: Method = "systematic"
) -> Int[Array, " num"]:
    r"""Draw ancestor indices in proportion to the weights: $E[\#\{j : a_j = i\}] = m W_i$.

    Args:
        key: a typed key.
        log_weights: unnormalised log weights; a weight of minus infinity is never chosen.
        num: how many indices, $m$; by default as many as there are weights.
        method: `"systematic"` (one uniform; counts within one of $m W_i$, up to the rounding of the cumulated weights),
            `"stratified"`, `"multinomial"`, `"residual"` (whole parts of $m W_i$ are certain), `"ssp"` (counts within
            one of $m W_i$, negatively associated, so that the variance goes to zero faster than $1/m$ whatever the
            order of the particles), or `"killing"` (particle $j$ keeps its place with probability $W_j / \max W$, so
            that equal weights change nothing).

    Returns:
        Increasing indices; for `"killing"` in the particles' places.

    Raises:
        ValueError: the method is unknown, or `num` is not the number of weights for `"killing"`.

    Sources: see `Ancestors`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax import inference
        >>> inference.ancestors(jax.random.key(0), jnp.log(jnp.array([0.0, 0.5, 0.5])), 4).tolist()
        [1, 1, 2, 2]
    """
    check_key(key)
    num = log_weights.shape[0] if num is None else num
    scheme = SCHEMES[check_method(method, num, log_weights.shape[0])]
    return scheme(key, normalized_weights(log_weights), num)


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
    multinomial resampling the sorted draws are returned. Residual resampling (Liu and Chen 1998) adds to
    $\lfloor m W_i \rfloor$ copies of each particle multinomial draws from the rest. The Srinivasan sampling process
    (Gerber, Chopin and Whiteley 2019) rounds each $m W_i$ by a coin for each particle; its probability is a sum over which
    particle is pending. Killing (Del Moral 2004; Karppinen, Singh and Vihola 2023) has independent
    $P(a_j = i) = \frac{W_j}{\max W} [i = j] + (1 - \frac{W_j}{\max W}) W_i$.

    Sources: Kitagawa 1996 (stratified, systematic); Gordon, Salmond and Smith 1993 (multinomial).

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
        self.method: Method = check_method(method, self.num, self.log_weights.shape[-1])
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
        one = lambda a: jnp.log(PROBABILITIES[self.method](weights, a))  # noqa: E731
        for _ in range(jnp.ndim(value) - 1):
            one = jax.vmap(one)
        return one(jnp.asarray(value))

    def enumerate_support(self, expand: bool = True) -> Any:
        """Return all vectors that can be drawn; none decreases, but for killing."""
        del expand
        return vectors(self.log_weights.shape[-1], self.num, self.method)


def vectors(count: int, num: int, method: Method) -> Int[Array, "vectors num"]:
    """Return all vectors of ancestors that a method can draw."""
    if method == "killing":
        rows = list(itertools.product(range(count), repeat=num))
    else:
        rows = list(itertools.combinations_with_replacement(range(count), num))
    return jnp.asarray(np.reshape(rows, (len(rows), num)), jnp.int32)


def check_method(method: Any, num: int, count: int) -> Method:
    """Refuse an unknown method, and a number of ancestors that it cannot draw."""
    if method not in SCHEMES:
        names = list(map(repr, SCHEMES))
        raise ValueError(f"method must be one of {', '.join(names[:-1])} or {names[-1]}, got {method!r}.")
    if method == "killing" and num != count:
        raise ValueError(f"killing draws as many ancestors as there are particles, {count}, not {num}.")
    return method
