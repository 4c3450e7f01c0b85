"""Earnings and height: the logarithm of a person's earnings, regressed on height.

Source: posteriordb `earnings-logearn_height` (BSD-3-Clause). Data: A. Gelman and J. Hill, Data
Analysis Using Regression and Multilevel/Hierarchical Models (2006), chapter 4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive, real


@model
def logearn_height(height: Float[Array, " n"]) -> None:
    r"""Regression $\log \text{earn}_i \sim N(\beta_1 + \beta_2\,\text{height}_i, \sigma)$ with flat priors.

    Args:
        height: in inches.

    Sites: `beta`, `sigma` and `log_earn`. The priors are improper, so the model has no draws.

    Example: see `load`.
    """
    beta = sample("beta", dist.ImproperUniform(constraints.real, (), (2,)))
    sigma = sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    sample("log_earn", dist.Normal(beta[0] + beta[1] * height, sigma))


def _condition(data: dict[str, Any]) -> Posterior:
    log_earn = jnp.log(jnp.array(data["earn"], float))
    return logearn_height(jnp.array(data["height"], float)).given({"log_earn": log_earn})


ENTRY = Entry(_condition, (Parameter("beta", real, (2,)), Parameter("sigma", positive)))
