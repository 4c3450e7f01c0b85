r"""Implicit reparametrisation by the distribution function: $\partial_\theta x = -\partial_\theta F(x;\theta) / p(x;\theta)$."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from ._strategy import Draw


@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""What `Reparam` is where a sampler is not differentiable but the distribution function is known.

    A draw $x$ keeps its level $F(x;\theta)$ as the parameters move (Figurnov et al. 2018, section 3).
    """

    pathwise = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the draw with its implicit derivative, right to every order."""
        del key
        leaves, structure = jax.tree.flatten(distribution)
        moving = [j for j, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

        @jax.custom_jvp
        def draw(value: Any, leaves: Any) -> Any:
            del leaves
            return value

        @draw.defjvp
        def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
            x, leaves = draw(*primals), list(primals[1])

            def level(theta: Any) -> Any:
                filled = dict(enumerate(leaves)) | dict(zip(moving, theta, strict=True))
                return distribution_function(jax.tree.unflatten(structure, list(filled.values())), x)

            theta, change = ([xs[j] for j in moving] for xs in (leaves, tangents[1]))
            shift = jax.jvp(level, (theta,), (change,))[1]
            return x, -shift / jnp.exp(jax.tree.unflatten(structure, leaves).log_prob(x))

        return Draw(draw(value, [jnp.asarray(leaf) for leaf in leaves]))


def distribution_function(d: Any, x: Any) -> Any:
    """Return the distribution function, up to a constant."""
    if not isinstance(d, dist.VonMises):
        return d.cdf(x)
    # Gauss-Legendre quadrature of the density from the point opposite to the mode
    nodes, weights = np.polynomial.legendre.leggauss(96)
    half = 0.5 * (jnp.mod(x - d.loc + math.pi, 2.0 * math.pi))
    points = half[..., None] * (nodes + 1.0) - math.pi
    log_density = dist.VonMises(0.0, jnp.asarray(d.concentration)[..., None]).log_prob(points)
    return half * jnp.sum(weights * jnp.exp(log_density), axis=-1)


def has_distribution_function(d: Any) -> bool:
    """Tell whether a distribution of continuous numbers has a distribution function."""
    if d.event_shape or d.is_discrete:
        return False
    if isinstance(d, dist.MixtureSameFamily):
        return has_distribution_function(d.component_distribution)
    if isinstance(d, dist.MixtureGeneral):
        return all(has_distribution_function(c) for c in d.component_distributions)
    return isinstance(d, dist.VonMises) or type(d).cdf is not dist.Distribution.cdf
