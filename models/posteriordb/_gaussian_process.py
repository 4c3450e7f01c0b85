"""Gaussian process regression in one dimension with a squared exponential covariance.

Source: posteriordb `gp_pois_regr-gp_regr` (BSD-3-Clause), simulated data from Stan's stat_comp_benchmarks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive


@model
def gp_regr(x: Float[Array, " n"]) -> None:
    r"""$y \sim N(0, K + \sigma I)$ with $K_{ij} = \alpha^2 \exp(-(x_i - x_j)^2 / 2\rho^2)$.

    Priors: $\rho \sim \text{Gamma}(25, 4)$, $\alpha \sim N^+(0, 2)$, $\sigma \sim N^+(0, 1)$. As in Stan's program,
    $\sigma$ is the *variance* of the noise.

    Args:
        x: inputs.

    Sites: `rho`, `alpha`, `sigma` and `y`.

    Example: see `load`.
    """
    rho = sample("rho", dist.Gamma(25.0, 4.0))
    alpha = sample("alpha", dist.HalfNormal(2.0))
    sigma = sample("sigma", dist.HalfNormal(1.0))
    covariance = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + sigma * jnp.eye(x.size)
    sample("y", dist.MultivariateNormal(jnp.zeros(x.size), covariance))


def _condition(data: dict[str, Any]) -> Posterior:
    return gp_regr(jnp.array(data["x"], float)).given({"y": jnp.array(data["y"], float)})


ENTRY = Entry(_condition, (Parameter("rho", positive), Parameter("alpha", positive), Parameter("sigma", positive)))
