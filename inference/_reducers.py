r"""Reducers: what a run makes of its draws as they come, so that none needs to be stored.

Sources: Welford 1962; Chan, Golub and LeVeque 1983 for the pooled moments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from expectax.ppl._nested import Choices


class Reducer(NamedTuple):
    """A fold over the draws of a chain: `carry = init(latents)`, then `carry = update(carry, latents)` for each draw.

    Attributes:
        init: from the latents that the chain starts at (no draw: only their shapes should count) to the first carry, a
            pytree of arrays.
        update: from a carry and the latents of a draw to the next carry, of the same shapes.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> largest = inference.Reducer(lambda z: -jnp.inf, lambda most, z: jnp.maximum(most, z["z"]))
        >>> chains = inference.mcmc(
        ...     model().given({"y": 1.0}), inference.hmc(), key=jax.random.key(0), num_warmup=100, num_samples=100,
        ...     reducers={"largest": largest, "mean": inference.running_mean()},
        ... )
        >>> bool((chains.reduced["largest"] == chains.choices["z"].max(1)).all())
        True
        >>> chains.reduced["mean"].mean["z"].shape  # of each chain
        (4,)
    """

    init: Callable[[Choices], Any]
    update: Callable[[Any, Choices], Any]


class Mean(NamedTuple):
    """A running mean. Example: see `running_mean`.

    Attributes:
        count: how many draws.
        mean: their mean, of the shapes of what is averaged.
    """

    count: Any
    mean: Any

    def pooled(self) -> Any:
        """Return the mean over all draws of all chains, whose number is the same."""
        return jax.tree.map(lambda x: jnp.mean(x, 0), self.mean)


class Covariance(NamedTuple):
    r"""A running covariance of all numbers in one vector. Example: see `running_covariance`.

    Attributes:
        count: how many draws.
        mean: their mean, a vector.
        scatter: $\sum_n (x_n - \bar x)(x_n - \bar x)^\top$.
    """

    count: Any
    mean: Any
    scatter: Any

    @property
    def covariance(self) -> Array:
        """The sample covariance of each chain."""
        return self.scatter / jnp.maximum(self.count - 1, 1)[..., None, None]

    def pooled(self) -> Covariance:
        """Return the moments of all draws of all chains together."""
        mean = jnp.mean(self.mean, 0)
        away = self.mean - mean
        between = jnp.einsum("c,ci,cj->ij", self.count, away, away)
        return Covariance(jnp.sum(self.count), mean, jnp.sum(self.scatter, 0) + between)


@functools.lru_cache(maxsize=64)  # the same reducer again, so that a second run compiles nothing
def running_mean(of: Callable[[Choices], Any] = lambda latents: latents) -> Reducer:
    r"""Average a function of the draws as they come: $\bar f_n = \bar f_{n-1} + (f(z_n) - \bar f_{n-1}) / n$.

    Args:
        of: from the nested dict of latents to a pytree of arrays; by default the latents themselves.

    Returns:
        A `Reducer` whose carry is a `Mean`.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> squares = inference.running_mean(lambda z: z["x"] ** 2)
        >>> carry = squares.init({"x": jnp.zeros(())})
        >>> for x in (1.0, 3.0):
        ...     carry = squares.update(carry, {"x": jnp.asarray(x)})
        >>> float(carry.mean)
        5.0
    """

    def init(latents: Choices) -> Mean:
        return Mean(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), float), of(latents)))

    def update(carry: Mean, latents: Choices) -> Mean:
        count = carry.count + 1
        return Mean(count, jax.tree.map(lambda m, x: m + (x - m) / count, carry.mean, of(latents)))

    return Reducer(init, update)


@functools.lru_cache(maxsize=64)
def running_covariance(of: Callable[[Choices], Any] = lambda latents: latents) -> Reducer:
    r"""Gather mean and covariance of the draws as they come, by Welford's recursion.

    With $d = x_n - \bar x_{n-1}$: $\bar x_n = \bar x_{n-1} + d / n$ and $S_n = S_{n-1} + (1 - 1/n)\, d d^\top$.

    Args:
        of: from the nested dict of latents to a pytree of arrays, raveled to one vector (the leaves in order of their
            addresses); by default the latents themselves.

    Returns:
        A `Reducer` whose carry is a `Covariance`.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax import inference
        >>> both = inference.running_covariance()
        >>> carry = both.init({"a": jnp.zeros(()), "b": jnp.zeros(())})
        >>> for a, b in ((0.0, 1.0), (2.0, 5.0)):
        ...     carry = both.update(carry, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
        >>> carry.covariance
        Array([[2., 4.],
               [4., 8.]], dtype=float32)
    """

    def vector(latents: Choices) -> Float[Array, " d"]:
        return ravel_pytree(of(latents))[0].astype(float)

    def init(latents: Choices) -> Covariance:
        zero = jnp.zeros_like(vector(latents))
        return Covariance(jnp.zeros((), jnp.int32), zero, jnp.outer(zero, zero))

    def update(carry: Covariance, latents: Choices) -> Covariance:
        x, count = vector(latents), carry.count + 1
        away, part = x - carry.mean, 1 / count.astype(x.dtype)
        return Covariance(count, carry.mean + part * away, carry.scatter + (1 - part) * jnp.outer(away, away))

    return Reducer(init, update)
