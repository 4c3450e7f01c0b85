r"""How distributions consume base noise: $x = g(\epsilon, \theta)$ for standard normal or uniform $\epsilon$.

A registry over `numpyro`'s classes. A class that is not listed draws by itself, with a key of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist


class Rule(NamedTuple):
    """`transform(distribution, noise)`, the noise having the shape of the draw."""

    kind: str
    transform: Callable[[Any, Any], Any]


_MANY_CATEGORIES = 64


def _categorical(weights: Any, u: Any) -> Any:
    """Invert the distribution function: category i has the interval between its cumulated weights."""
    cumulated = jnp.cumsum(weights, axis=-1)
    level = u * cumulated[..., -1]
    if weights.ndim > 1 or weights.size < _MANY_CATEGORIES:
        index = jnp.sum(cumulated <= level[..., None], axis=-1)
    else:  # counting takes as many steps as there are categories, for each of perhaps as many lanes
        index = jnp.searchsorted(cumulated, level, side="right", method="scan_unrolled")
    return jnp.clip(index, 0, weights.shape[-1] - 1)


_RULES: dict[type, Rule] = {
    dist.Normal: Rule("normal", lambda d, e: d.loc + d.scale * e),
    dist.LogNormal: Rule("normal", lambda d, e: jnp.exp(d.loc + d.scale * e)),
    dist.HalfNormal: Rule("normal", lambda d, e: d.scale * jnp.abs(e)),
    dist.Uniform: Rule("uniform", lambda d, u: d.low + (d.high - d.low) * u),
    dist.Exponential: Rule("uniform", lambda d, u: -jnp.log(u) / d.rate),
    dist.Laplace: Rule("uniform", lambda d, u: d.loc - d.scale * jnp.sign(u - 0.5) * jnp.log1p(-2 * jnp.abs(u - 0.5))),
    dist.Logistic: Rule("uniform", lambda d, u: d.loc + d.scale * (jnp.log(u) - jnp.log1p(-u))),
    dist.Gumbel: Rule("uniform", lambda d, u: d.loc - d.scale * jnp.log(-jnp.log(u))),
    dist.Cauchy: Rule("uniform", lambda d, u: d.loc + d.scale * jnp.tan(math.pi * (u - 0.5))),
    dist.HalfCauchy: Rule("uniform", lambda d, u: d.scale * jnp.tan(0.5 * math.pi * u)),
    dist.BernoulliProbs: Rule("uniform", lambda d, u: u < d.probs),
    dist.BernoulliLogits: Rule("uniform", lambda d, u: u < jax.nn.sigmoid(d.logits)),
    dist.CategoricalProbs: Rule("uniform", lambda d, u: _categorical(d.probs, u)),
    dist.CategoricalLogits: Rule("uniform", lambda d, u: _categorical(jax.nn.softmax(d.logits), u)),
    dist.MultivariateNormal: Rule("normal", lambda d, e: d.loc + jnp.einsum("...ij,...j->...i", d.scale_tril, e)),
}


def rule_of(d: dist.Distribution) -> Rule | None:
    """Return how a distribution consumes noise, or None."""
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return _RULES.get(type(d))


def transform(d: dist.Distribution, noise: Any, dtype: Any) -> Any:
    """Return the draw of `d` that the noise makes; parameters broadcast against the noise."""
    rule = rule_of(d)
    assert rule is not None
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return jnp.asarray(rule.transform(d, noise)).astype(dtype)
