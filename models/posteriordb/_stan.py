r"""Stan's `parameters` block: the maps from its unconstrained vector to constrained values, and their log Jacobians.

Each transform takes the unconstrained numbers of one parameter and the parameters before it, and returns the
constrained value and $\log|\det J|$. Source: Stan Reference Manual 2.35, chapter "Constraint Transforms".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from expectax.ppl import Posterior

Values = dict[str, Any]
Transform = Callable[[Array, Values], tuple[Array, Array]]


class Parameter(NamedTuple):
    """One declaration of a `parameters` block.

    Attributes:
        name: its name in Stan.
        transform: from unconstrained numbers to the value, one of this module's.
        shape: shape of its unconstrained numbers.
    """

    name: str
    transform: Transform
    shape: tuple[int, ...] = ()


def real(u: Array, earlier: Values) -> tuple[Array, Array]:
    """`real x;` is itself."""
    return u, jnp.zeros((), u.dtype)


def positive(u: Array, earlier: Values) -> tuple[Array, Array]:
    r"""`real<lower=0> x;` is $e^u$."""
    return jnp.exp(u), jnp.sum(u)


def interval(lower: float, upper: Callable[[Values], Any]) -> Transform:
    r"""`real<lower=a, upper=b> x;` is $a + (b - a)\,\mathrm{logit}^{-1}(u)$; `b` may depend on earlier parameters."""

    def transform(u: Array, earlier: Values) -> tuple[Array, Array]:
        width = upper(earlier) - lower
        return lower + width * jax.nn.sigmoid(u), jnp.sum(
            jnp.log(width) + jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u)
        )

    return transform


def ordered(u: Array, earlier: Values) -> tuple[Array, Array]:
    r"""`ordered[K] x;` has $x_1 = u_1$ and $x_k = x_{k-1} + e^{u_k}$."""
    return jnp.cumsum(jnp.concatenate([u[:1], jnp.exp(u[1:])])), jnp.sum(u[1:])


def positive_ordered(u: Array, earlier: Values) -> tuple[Array, Array]:
    r"""`positive_ordered[K] x;` has $x_1 = e^{u_1}$ and $x_k = x_{k-1} + e^{u_k}$."""
    return jnp.cumsum(jnp.exp(u)), jnp.sum(u)


def simplex(u: Array, earlier: Values) -> tuple[Array, Array]:
    r"""`simplex[K] x;` breaks a stick: piece $k$ is the share $\mathrm{logit}^{-1}(u_k - \log(K - k))$ of what is left.

    (As in Stan 2.35; later versions may break the stick otherwise.)
    """
    logits = u - jnp.log(jnp.arange(u.size, 0, -1))
    log_share, log_rest = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    log_left = jnp.concatenate([jnp.zeros(1, u.dtype), jnp.cumsum(log_rest)])
    value = jnp.exp(log_left + jnp.append(log_share, 0.0))
    return value, jnp.sum(log_left[:-1] + log_share + log_rest)


def size(parameters: tuple[Parameter, ...]) -> int:
    """Return the length of the unconstrained vector."""
    return sum(math.prod(p.shape) for p in parameters)


def constrain(parameters: tuple[Parameter, ...], vector: Float[Array, " d"]) -> tuple[Values, Float[Array, ""]]:
    """Return the constrained parameters by name, and the log Jacobian of all."""
    values: Values = {}
    log_jacobian = jnp.zeros((), vector.dtype)
    start = 0
    for parameter in parameters:
        stop = start + math.prod(parameter.shape)
        value, term = parameter.transform(vector[start:stop].reshape(parameter.shape), values)
        values[parameter.name] = value
        log_jacobian += term
        start = stop
    return values, log_jacobian


class Entry(NamedTuple):
    """How one of Stan's programs stands in expectax.

    Attributes:
        condition: from the record's data to the posterior.
        parameters: Stan's `parameters` block, in its order.
        latents: from Stan's parameters by name to expectax's latents.
        quantities: from latents, with any leading axes of draws, to what the reference statistics are about.
    """

    condition: Callable[[dict[str, Any]], Posterior]
    parameters: tuple[Parameter, ...]
    latents: Callable[[Values], Values] = dict
    quantities: Callable[[Values], Values] = dict
