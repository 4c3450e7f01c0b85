r"""DisARM: an antithetic pair of flips, without variance from the coin's own side."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from ._measure_valued import innermost
from ._strategy import Draw

sg = lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class DisARM:
    r"""Antithetic score-function estimator for `Bernoulli` sites: one more run for all flips of the site together.

    With $b = 1[u < \sigma(\phi)]$ and $\tilde b = 1[1 - u < \sigma(\phi)]$ for the same uniform $u$,

    $$\hat g_\phi = \tfrac12 (f(b) - f(\tilde b))\,(-1)^{\tilde b}\,1[b \neq \tilde b]\,\sigma(|\phi|).$$

    Unbiased; all lanes and batch elements share the pair of runs, steps of a loop are replaced one at a time. First
    derivatives only.

    Source: Dong, Mnih and Tucker 2020 (DisARM); Yin et al. 2020 (U2G).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def square(logit):
        ...     return (ex.sample("b", dist.Bernoulli(logits=logit), gradient=vi.DisARM()) - 0.4) ** 2
        >>> slope = jax.grad(square.surrogate)(0.0, jax.random.key(0), num_samples=1000)
        >>> round(float(slope), 3)  # (0.6^2 - 0.4^2) / 4, without any noise at this logit
        0.05
    """

    joint = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the flip with its antithetic partner."""
        d = innermost(distribution)
        probs, logits = d.probs, d.logits
        uniform = jax.random.uniform(key, jnp.shape(value), jnp.result_type(float))
        u = jnp.where(value == 1, probs * uniform, probs + (1.0 - probs) * uniform)
        other = (1.0 - u < probs).astype(value.dtype)
        differs = jnp.where(value != other, jnp.where(other == 1, -0.5, 0.5), 0.0)
        coefficient = logits * sg(differs * jax.nn.sigmoid(jnp.abs(logits)))
        return Draw(value, alternatives=[(value, coefficient), (other, -coefficient)])

    def fits(self, distribution: Any) -> str | None:
        """Say why the strategy does not fit a distribution, or None."""
        fits = isinstance(innermost(distribution), (dist.BernoulliProbs, dist.BernoulliLogits))
        return None if fits else "DisARM is for Bernoulli sites (a batch of them, without to_event)."
