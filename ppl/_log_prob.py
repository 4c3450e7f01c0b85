r"""The log densities of numpyro's distributions; of those by logits with formulas that have a derivative everywhere.

With $s(l) = \log(1 + e^l)$ a coin has the log probability $y l - s(l)$, whose derivative at $l = 0$ is $y - 1/2$. numpyro
(0.22) writes $s$ by $|l|$ and $\max(l, 0)$, of which JAX's derivatives at 0 do not add up to it: where a network starts with
zeros, its first gradient would be wrong.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.nn import softplus
from jax.scipy.special import gammaln
from numpyro import distributions as dist


def log_prob(d: dist.Distribution, value: Any) -> Any:
    """Return the log density of a value, of the batch shape of the distribution."""
    if not _by_logits(d):
        return d.log_prob(value)
    if isinstance(d, dist.Independent):
        terms = log_prob(d.base_dist, value)
        return jnp.sum(terms, axis=tuple(range(terms.ndim - d.reinterpreted_batch_ndims, terms.ndim)))
    if isinstance(d, dist.ExpandedDistribution):
        terms = log_prob(d.base_dist, value)
        return jnp.broadcast_to(terms, jnp.broadcast_shapes(terms.shape, d.batch_shape))
    if isinstance(d, dist.MaskedDistribution):
        return jnp.where(d._mask, log_prob(d.base_dist, value), 0.0)
    return _binomial(d, value) if isinstance(d, dist.BinomialLogits) else _bernoulli(d, value)


def _by_logits(d: Any) -> bool:
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        d = d.base_dist
    return type(d) in (dist.BernoulliLogits, dist.BinomialLogits)


def _bernoulli(d: Any, value: Any) -> Any:
    logits = d.logits
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return -softplus(jnp.where(value == 1, -logits, logits))
    finite = jnp.isfinite(logits)  # a relaxed choice is differentiated too, so that its product stays
    safe = jnp.where(finite, logits, 0.0)
    certain = jnp.where((value > 0.5) == (logits > 0), 0.0, -jnp.inf)
    return jnp.where(finite, value * safe - softplus(safe), certain)


def _binomial(d: Any, value: Any) -> Any:
    count, logits = d.total_count, jnp.asarray(d.logits)
    ways = gammaln(count + 1.0) - gammaln(value + 1.0) - gammaln(count - value + 1.0)
    finite = jnp.isfinite(logits)
    safe = jnp.where(finite, logits, 0.0)
    certain = jnp.where(value == jnp.where(logits > 0, count, 0), 0.0, -jnp.inf)
    return ways + jnp.where(finite, value * safe - count * softplus(safe), certain)
