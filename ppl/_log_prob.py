r"""The log densities of numpyro's distributions; of those by logits with formulas that have a derivative everywhere.

With $s(l) = \log(1 + e^l)$ a coin has the log probability $y l - s(l)$, whose derivative at $l = 0$ is $y - 1/2$. numpyro
(0.22) writes $s$ by $|l|$ and $\max(l, 0)$, of which JAX's derivatives at 0 do not add up to it: where a network starts with
zeros, its first gradient would be wrong. The two distributions are put in the places of numpyro's wherever they stand, in a
mixture too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import softplus
from jax.scipy.special import gammaln
from numpyro import distributions as dist


def log_prob(d: dist.Distribution, value: Any) -> Any:
    """Return the log density of a value, of the batch shape of the distribution."""
    mended = jax.tree.map(_mended, d, is_leaf=lambda x: type(x) in _MENDED)
    return mended.log_prob(value)


def _mended(part: Any) -> Any:
    own = _MENDED.get(type(part))
    if own is None:
        return part
    leaves, structure = part.tree_flatten()
    return own.tree_unflatten(structure, leaves)


def _known(logits: Any) -> tuple[Any, Any]:
    """Return whether logits are finite, and finite ones in the place of those that are not."""
    finite = jnp.isfinite(logits)
    return finite, jnp.where(finite, logits, 0.0)


class _Bernoulli(dist.BernoulliLogits):
    def log_prob(self, value: Any) -> Any:
        logits = jnp.asarray(self.logits)
        if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
            return -softplus(jnp.where(value == 1, -logits, logits))
        finite, safe = _known(logits)  # a relaxed choice is differentiated too, so that its product stays
        certain = jnp.where((value > 0.5) == (logits > 0), 0.0, -jnp.inf)
        return jnp.where(finite, value * safe - softplus(safe), certain)


class _Binomial(dist.BinomialLogits):
    def log_prob(self, value: Any) -> Any:
        count, logits = jnp.asarray(self.total_count), jnp.asarray(self.logits)
        ways = gammaln(count + 1.0) - gammaln(value + 1.0) - gammaln(count - value + 1.0)
        finite, safe = _known(logits)
        certain = jnp.where(value == jnp.where(logits > 0, count, 0), 0.0, -jnp.inf)
        return ways + jnp.where(finite, value * safe - count * softplus(safe), certain)


_MENDED = {dist.BernoulliLogits: _Bernoulli, dist.BinomialLogits: _Binomial}
