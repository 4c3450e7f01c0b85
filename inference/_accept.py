r"""Metropolis' acceptance: go with probability $\min(1, r)$, else stay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import DistributionError, sample

from ._target import Target


def accepted(log_ratio: Any) -> tuple[Any, Any]:
    """Return whether to go, a choice of the enclosing keyless program, and its probability; at nan, stay."""
    usable = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    probability = jnp.exp(jnp.minimum(usable, 0.0))
    return sample("accept", dist.Bernoulli(probability)) == 1, probability


def chosen(go: Any, there: Any, here: Any) -> Any:
    """Return one of two pytrees."""
    return jax.tree.map(lambda a, b: jnp.where(go, a, b), there, here)


def check_exact_density(target: Target, what: str) -> None:
    """Refuse a density that is only estimated: the ratio of two fresh estimates is no ratio of densities."""
    if target.estimated:
        raise DistributionError(
            f"{what}: the posterior's density is only estimated (a site with vi.marginal or vi.normalize), which this kernel "
            "would take for exact. Use inference.pseudo_marginal(), alone."
        )
