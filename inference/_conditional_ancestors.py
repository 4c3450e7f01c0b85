r"""Resampling with a reference that survives, for conditional sequential Monte Carlo.

Let $r(a)$ be the law of a resampling scheme with $E[\#\{j : a_j = i\}] = m W_i$. Given that the reference is particle $i$,
a vector of ancestors $a$ and the reference's new place $k$ are drawn from

$$ r(a, k \mid i) = \frac{r(a)\, [a_k = i]}{m W_i}, $$

which sums to one since $r$ is unbiased. That is all that conditional SMC needs: in the extended target
$\pi(x) \prod_t r(a_t, k_{t+1} \mid k_t)$ times the other particles' proposals, the factors $W$ and $m$ along the lineage
cancel against the weights of the trajectory, as in the proof of Andrieu, Doucet and Holenstein 2010, theorem 5; a uniform
first place and a last place in proportion to $W_T$ then leave $\pi$ alone. Putting the reference back into a place of plain
systematic resampling does not. Chopin and Singh 2015 derive the systematic form, Karppinen, Singh and Vihola 2023 those of
killing and others, with the places fixed and the vectors rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import distributions as dist
from numpyro.distributions import constraints

from ._ancestors import Method, check_method, vectors
from ._resampling_laws import PROBABILITIES
from ._resampling_schemes import cumulated, filled_up, inverted, killing, multinomial, residual, whole_and_rest
from ._weights import normalized_weights


class ConditionalAncestors(dist.Distribution):
    r"""The law of a resampling step in which a reference particle survives: $r(a)\,[a_k = i] / (m W_i)$.

    A value is a vector of $m + 1$ integers: the $m$ ancestors, of which the one in place $k$ is the reference $i$, and
    then $k$.

    Args:
        log_weights: unnormalised log weights, shape `(n,)`; the number of ancestors $m$ is $n$.
        reference: $i$.
        method: `"multinomial"`, `"residual"`, `"stratified"`, `"systematic"` or `"killing"`.

    Raises:
        ValueError: the method is unknown, or has no conditional form here (`"ssp"`).

    Sources: see the head of this file: Andrieu, Doucet and Holenstein 2010; Chopin and Singh 2015; Karppinen, Singh and
    Vihola 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax import inference
        >>> law = inference.ConditionalAncestors(jnp.log(jnp.array([0.25, 0.75])), 0)
        >>> *ancestors, place = law.sample(jax.random.key(0)).tolist()
        >>> ancestors[place]
        0
    """

    pytree_data_fields = ("log_weights", "reference")
    pytree_aux_fields = ("method",)
    has_enumerate_support = True

    def __init__(self, log_weights: Any, reference: Any, method: Method = "multinomial"):
        """Keep the weights and the reference."""
        self.log_weights, self.reference = jnp.asarray(log_weights), jnp.asarray(reference, jnp.int32)
        self.method: Method = check_conditional(method)
        super().__init__(batch_shape=(), event_shape=(self.log_weights.shape[-1] + 1,), validate_args=False)

    @property
    def support(self) -> Any:
        """Vectors of indices."""
        return constraints.independent(constraints.integer_interval(0, self.log_weights.shape[-1] - 1), 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw ancestors and the place of the reference, of shape `sample_shape + (n + 1,)`."""
        if sample_shape:
            keys = jax.random.split(key, sample_shape).reshape(-1)
            return jnp.reshape(jax.vmap(self.sample)(keys), (*sample_shape, *self.event_shape))
        weights = normalized_weights(self.log_weights)
        index, place = CONDITIONAL[self.method](key, weights, self.reference)
        return jnp.append(index.at[place].set(self.reference), place).astype(jnp.int32)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Return the exact log probability."""
        del intermediates
        weights = normalized_weights(self.log_weights)

        def one(value: Any) -> Any:
            index, place = value[:-1], value[-1]
            probability = PROBABILITIES[self.method](weights, index) * (index[place] == self.reference)
            return jnp.log(probability) - jnp.log(weights.shape[0] * weights[self.reference])

        for _ in range(jnp.ndim(value) - 1):
            one = jax.vmap(one)
        return one(jnp.asarray(value))

    def enumerate_support(self, expand: bool = True) -> Any:
        """Return all vectors of ancestors with all places."""
        del expand
        count = self.log_weights.shape[-1]
        rows = np.asarray(vectors(count, count, self.method))
        places = np.tile(np.arange(count), len(rows))[:, None]
        return jnp.asarray(np.concatenate([np.repeat(rows, count, axis=0), places], axis=1), jnp.int32)


Scheme = Callable[[PRNGKeyArray, Float[Array, " n"], Int[Array, ""]], tuple[Any, Any]]


def _inverted(key: Any, weights: Any, reference: Any, one: bool) -> tuple[Any, Any]:
    r"""Draw the reference's level uniformly where it falls on it: $k + u_k$ in $[m C_{i-1}, m C_i)$."""
    num = weights.shape[0]
    key_level, key_others = jax.random.split(key)
    above = cumulated(weights)
    high = num * above[reference]
    low = jnp.where(reference > 0, num * above[jnp.maximum(reference - 1, 0)], 0.0)
    level = low + jax.random.uniform(key_level, (), weights.dtype) * (high - low)
    place = jnp.clip(jnp.floor(level), 0, num - 1).astype(jnp.int32)
    own = jnp.clip(level - place, 0.0, 1 - jnp.finfo(weights.dtype).epsneg)
    uniform = own if one else jax.random.uniform(key_others, (num,), weights.dtype).at[place].set(own)
    return inverted(weights, uniform, num), place


def _systematic(key: Any, weights: Any, reference: Any) -> tuple[Any, Any]:
    return _inverted(key, weights, reference, one=True)


def _stratified(key: Any, weights: Any, reference: Any) -> tuple[Any, Any]:
    return _inverted(key, weights, reference, one=False)


def _copy_of(key: Any, index: Any, reference: Any) -> Any:
    """Choose one of the reference's places, each with the same probability."""
    noise = jax.random.uniform(key, index.shape)
    return jnp.argmax(jnp.where(index == reference, noise, -1.0))


def _multinomial(key: Any, weights: Any, reference: Any) -> tuple[Any, Any]:
    """Draw all but one independently, and add the reference."""
    key_others, key_place = jax.random.split(key)
    others = multinomial(key_others, weights, weights.shape[0] - 1)
    index = jnp.sort(jnp.append(others, jnp.asarray(reference, others.dtype)))
    return index, _copy_of(key_place, index, reference)


def _residual(key: Any, weights: Any, reference: Any) -> tuple[Any, Any]:
    """Let the reference be one of its own whole copies, or one of the draws, as their numbers are."""
    key_which, key_others, key_place = jax.random.split(key, 3)
    num = weights.shape[0]
    whole, rest = whole_and_rest(weights, num)
    is_whole = jax.random.uniform(key_which, (), weights.dtype) * num * weights[reference] < whole[reference]
    plain = residual(key_others, weights, num)
    drawn = filled_up(key_others, weights, whole.at[reference].add(1), rest, num)
    index = jnp.where(is_whole, plain, drawn)
    return index, _copy_of(key_place, index, reference)


def _killing(key: Any, weights: Any, reference: Any) -> tuple[Any, Any]:
    """Choose the place in proportion to the probability that it holds the reference; the other places are independent."""
    key_others, key_place = jax.random.split(key)
    num = weights.shape[0]
    kept = weights / jnp.max(weights)
    holds = kept * (jnp.arange(num) == reference) + (1 - kept) * weights[reference]
    place = jax.random.categorical(key_place, jnp.log(holds))
    return killing(key_others, weights, num), place


CONDITIONAL: dict[str, Scheme] = {
    "multinomial": _multinomial,
    "residual": _residual,
    "stratified": _stratified,
    "systematic": _systematic,
    "killing": _killing,
}


def check_conditional(method: Any) -> Method:
    """Refuse a method without a conditional form."""
    if method in CONDITIONAL:
        return method
    check_method(method, 1, 1)
    raise ValueError(
        f"method {method!r} has no conditional form here: put back into it, a reference trajectory would bias conditional "
        f"SMC. Use one of {', '.join(map(repr, CONDITIONAL))}."
    )
