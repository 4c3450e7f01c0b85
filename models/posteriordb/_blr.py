"""Bayesian linear regression with weak priors on simulated data whose coefficients correlate in the posterior.

Source: posteriordb `sblrc-blr` (BSD-3-Clause); the data were simulated for posteriordb by M. Magnusson (2019).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive, real


@model
def blr(x: Float[Array, "n d"]) -> None:
    r"""Linear regression $y_i \sim N(x_i^\top \beta, \sigma)$ with $\beta_j \sim N(0, 10)$, $\sigma \sim N^+(0, 10)$.

    Args:
        x: design matrix, one row an observation.

    Sites: `beta`, `sigma` and `y`.

    Example: see `load`.
    """
    beta = sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 10.0))
    sigma = sample("sigma", dist.HalfNormal(10.0))
    sample("y", dist.Normal(x @ beta, sigma))


def _condition(data: dict[str, Any]) -> Posterior:
    return blr(jnp.array(data["X"], float)).given({"y": jnp.array(data["y"], float)})


ENTRY = Entry(_condition, (Parameter("beta", real, (5,)), Parameter("sigma", positive)))
