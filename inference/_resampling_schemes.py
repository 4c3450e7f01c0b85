r"""The resampling schemes, one function each: ancestors of new particles in proportion to normalised weights $W$.

Most of them draw how many offspring the first $i$ particles have together, `ends[i]`, and then write the ancestors down
in order (`in_order`). Each has $E[\#\{j : a_j = i\}] = m W_i$. Comparisons: Douc, Cappé and Moulines 2005; Gerber, Chopin
and Whiteley 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

_FEW = 4096
"""Up to this length JAX's own running sums are as fast, and quicker to compile."""


def running_sum(x: Array) -> Array:
    """Return the partial sums; for long vectors two to three times as fast as `jnp.cumsum` on XLA's CPU backend."""
    return jnp.cumsum(x) if x.shape[0] <= _FEW else _long_sum(x)


def running_max(x: Array) -> Array:
    """Return the largest value so far."""
    return lax.cummax(x) if x.shape[0] <= _FEW else _long_max(x)


@jax.jit
def _long_sum(x: Array) -> Array:
    return lax.associative_scan(jnp.add, x)


@jax.jit
def _long_max(x: Array) -> Array:
    return lax.associative_scan(jnp.maximum, x)


def cumulated(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the weights' distribution function: increasing where there is weight, and only there; 1 at the end.

    A parallel sum of floats need not be monotone, and may move where zero is added.
    """
    total = running_max(jnp.where(weights > 0, running_sum(weights), 0.0))
    return total / total[-1]


def in_order(ends: Int[Array, " n"], num: int) -> Int[Array, " num"]:
    """Return each particle as often as it has offspring, in order: $a_j$ is the number of `ends` up to $j$."""
    return running_sum(jnp.zeros(num, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True))


def _closed(ends: Any, above: Any, num: int) -> Any:
    """Let the last particle that has weight have the last offspring, whatever rounding says."""
    return jnp.where(above >= above[-1], num, jnp.clip(ends, 0, num)).astype(jnp.int32)


def systematic(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    r"""Invert the distribution function at $(j + u) / m$, with one uniform $u$ (Kitagawa 1996; Carpenter et al. 1999)."""
    return inverted(weights, jax.random.uniform(key, (), weights.dtype), num)


def stratified(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    r"""Invert the distribution function at $(j + u_j) / m$ (Kitagawa 1996)."""
    return inverted(weights, jax.random.uniform(key, (num,), weights.dtype), num)


def inverted(weights: Any, uniform: Any, num: int) -> Any:
    """Invert the distribution function at `(j + u) / num`, with one uniform or one for each stratum."""
    above = cumulated(weights)
    place = num * above
    if jnp.ndim(uniform) == 0:
        ends = jnp.ceil(place - uniform)
    else:
        stratum = jnp.clip(jnp.floor(place), 0, num - 1).astype(jnp.int32)
        ends = stratum + (uniform[stratum] < place - stratum)
    return in_order(_closed(ends, above, num), num)


def multinomial(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    """Draw independently; sorted, by the order statistics of uniforms, which are partial sums of exponentials."""
    partial = running_max(running_sum(jax.random.exponential(key, (num + 1,), weights.dtype)))
    return _found(weights, partial[:-1] / partial[-1])


def categorical(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    """Draw independently, in the order of the draws."""
    return _found(weights, jax.random.uniform(key, (num,), weights.dtype))


def _found(weights: Any, levels: Any) -> Any:
    """Invert the distribution function at levels in [0, 1), which rounding may have made 1."""
    below_one = 1 - jnp.finfo(weights.dtype).epsneg
    return jnp.searchsorted(cumulated(weights), jnp.minimum(levels, below_one), side="right").astype(jnp.int32)


def whole_and_rest(weights: Float[Array, " n"], num: int) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    r"""Return $\lfloor m W_i \rfloor$ and $m W_i - \lfloor m W_i \rfloor$."""
    whole = jnp.floor(num * weights)
    return whole.astype(jnp.int32), num * weights - whole


def residual(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    r"""Copy each particle $\lfloor m W_i \rfloor$ times, and draw the others independently from what is left.

    Source: Liu and Chen 1998.
    """
    whole, rest = whole_and_rest(weights, num)
    return filled_up(key, weights, whole, rest, num)


def filled_up(key: PRNGKeyArray, weights: Any, whole: Any, rest: Any, num: int) -> Any:
    """Copy each particle `whole` times, and draw as many as are missing in proportion to `rest`."""
    missing = jnp.maximum(num - jnp.sum(whole), 0)
    above = cumulated(jnp.where(missing > 0, rest, 1.0))
    partial = running_max(running_sum(jax.random.exponential(key, (num + 1,), weights.dtype)))
    levels = jnp.where(jnp.arange(num + 1) < missing, partial / partial[missing], jnp.inf)
    drawn = jnp.where(above >= above[-1], missing, jnp.minimum(jnp.searchsorted(levels, above), missing))
    return in_order(_closed(running_sum(whole) + drawn, cumulated(weights), num), num)


def ssp(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    r"""Round each $m W_i$ up or down so that the sum stays $m$ (Srinivasan sampling process, the pivotal method).

    The particles come by in order. One is pending, with the fraction $f$ of an offspring; the next one has the
    fraction $g$. One of the two is settled at $\lfloor f + g \rfloor$, the other keeps the rest of $f + g$; so that
    neither mean changes. Which one it is has a probability that does not depend on earlier coins, since $f$ does not:
    all coins are tossed at once, and the pending particle is a running maximum.

    Sources: Gerber, Chopin and Whiteley 2019, algorithm 2; Deville and Tillé 1998 (the same in survey sampling).
    """
    count = weights.shape[0]
    whole, rest = whole_and_rest(weights, num)
    stay, up, last = coins(rest)
    stays = jax.random.uniform(key, (count,), weights.dtype) < stay
    numbers = jnp.arange(count, dtype=jnp.int32)
    pending = running_max(jnp.where(stays, 0, numbers))
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), pending[:-1]])
    settled = jnp.where(stays, numbers, before)
    offspring = whole.at[settled].add(jnp.where(numbers > 0, up, 0)).at[pending[-1]].add(last)
    return in_order(_closed(running_sum(offspring), cumulated(weights), num), num)


def coins(rest: Float[Array, " n"]) -> tuple[Any, Any, Any]:
    r"""Return, for each particle that comes by in `ssp`, what its coin needs.

    Returns:
        The probability that the pending particle stays so; at what the other is settled, 0 or 1; and at what the
        last pending particle is settled.
    """
    total = running_max(jnp.where(rest > 0, running_sum(rest), 0.0))
    before = jnp.concatenate([jnp.zeros(1, rest.dtype), total[:-1]])
    f, g = before - jnp.floor(before), total - before
    up = (jnp.floor(total) > jnp.floor(before)).astype(jnp.int32)
    down_stay = jnp.where(f + g > 0, f / jnp.where(f + g > 0, f + g, 1.0), 1.0)
    up_stay = jnp.where(g > 0, (1 - f) / (2 - f - g), 0.0)
    stay = jnp.where(up == 1, up_stay, down_stay).at[0].set(1.0)
    return jnp.clip(stay, 0.0, 1.0), up, jnp.round(total[-1] - jnp.floor(total[-1])).astype(jnp.int32)


def killing(key: PRNGKeyArray, weights: Float[Array, " n"], num: int) -> Int[Array, " n"]:
    r"""Keep particle $j$ in its place with probability $W_j / \max W$; else draw from all of them.

    Sources: Del Moral 2004, section 2.5.2; Karppinen, Singh and Vihola 2023.
    """
    del num
    key_keep, key_draw = jax.random.split(key)
    count = weights.shape[0]
    kept = jax.random.uniform(key_keep, (count,), weights.dtype) < weights / jnp.max(weights)
    return jnp.where(kept, jnp.arange(count, dtype=jnp.int32), categorical(key_draw, weights, count))


SCHEMES = {f.__name__: f for f in (systematic, stratified, multinomial, residual, ssp, killing)}
