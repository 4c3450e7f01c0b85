r"""The probability of a vector of ancestors under each resampling scheme, in closed form."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Int

from ._resampling_schemes import coins, whole_and_rest

Weights = Float[Array, " n"]
Vector = Int[Array, " num"]


def systematic(weights: Weights, index: Vector) -> Any:
    """Return how much of [0, 1] the one uniform has for all levels to fall where they did."""
    first, last = _within(weights, index)
    return jnp.maximum(jnp.min(last) - jnp.max(first), 0.0)


def stratified(weights: Weights, index: Vector) -> Any:
    """Return the product over the strata."""
    first, last = _within(weights, index)
    return jnp.prod(jnp.maximum(last - first, 0.0))


def _within(weights: Any, index: Any) -> tuple[Any, Any]:
    """Return between which uniforms each level falls on its ancestor."""
    num = index.shape[0]
    above = jnp.cumsum(weights)
    below = jnp.concatenate([jnp.zeros(1, weights.dtype), above[:-1]])
    first, last = (jnp.clip(num * edge[index] - jnp.arange(num), 0.0, 1.0) for edge in (below, above))
    return first, last


def multinomial(weights: Weights, index: Vector) -> Any:
    """Return the multinomial probability of the counts."""
    counts = jnp.bincount(index, length=weights.shape[0])
    return jnp.where(_sorted(index), _counted(counts, weights, index.shape[0]), 0.0)


def residual(weights: Weights, index: Vector) -> Any:
    """Return the multinomial probability of what the counts have beyond the whole parts."""
    whole, rest = whole_and_rest(weights, index.shape[0])
    more = jnp.bincount(index, length=weights.shape[0]) - whole
    missing = jnp.sum(more)
    probabilities = rest / jnp.where(missing > 0, jnp.sum(rest), 1.0)
    possible = _sorted(index) & jnp.all(more >= 0)
    return jnp.where(possible, _counted(jnp.maximum(more, 0), probabilities, missing), 0.0)


def _counted(counts: Any, probabilities: Any, num: Any) -> Any:
    ways = jnp.exp(gammaln(num + 1.0) - jnp.sum(gammaln(counts + 1.0)))
    return ways * jnp.prod(jnp.where(counts > 0, probabilities, 1.0) ** counts)


def _sorted(index: Any) -> Any:
    return jnp.all(index[1:] >= index[:-1])


def ssp(weights: Weights, index: Vector) -> Any:
    r"""Sum over the coins that settle every particle at its count.

    $\alpha_k(p)$ is the probability that those settled by particle $k$ are so at their counts, and $p$ is pending.
    """
    whole, rest = whole_and_rest(weights, index.shape[0])
    rounded = jnp.bincount(index, length=weights.shape[0]) - whole
    stay, up, last = coins(rest)

    def pass_by(alpha: Any, now: Any) -> Any:
        k, stays, settled = now
        other = jnp.sum(alpha * (1 - stays) * (rounded == settled))
        alpha = alpha * stays * (rounded[k] == settled)
        return alpha.at[k].set(other), None

    start = jnp.zeros_like(weights).at[0].set(1.0)
    numbers = jnp.arange(1, weights.shape[0])
    alpha, _ = lax.scan(pass_by, start, (numbers, stay[1:], up[1:]))
    return jnp.where(_sorted(index), jnp.sum(alpha * (rounded == last)), 0.0)


def killing(weights: Weights, index: Vector) -> Any:
    """Return the product over the places."""
    kept = weights / jnp.max(weights)
    stays = index == jnp.arange(weights.shape[0])
    return jnp.prod(kept * stays + (1 - kept) * weights[index])


PROBABILITIES = {f.__name__: f for f in (systematic, stratified, multinomial, residual, ssp, killing)}
