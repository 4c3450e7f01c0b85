"""Test scores of children of three and four years, regressed on their mothers' IQ.

Source: posteriordb `kidiq-kidscore_momiq` (BSD-3-Clause). Data: A. Gelman and J. Hill, Data
Analysis Using Regression and Multilevel/Hierarchical Models (2006), chapter 3.
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
def kidscore_momiq(mom_iq: Float[Array, " n"]) -> None:
    r"""Regression $\text{score}_i \sim N(\beta_1 + \beta_2\,\text{iq}_i, \sigma)$, $\beta$ flat, $\sigma$ half-Cauchy.

    Args:
        mom_iq: the mothers' IQ.

    Sites: `beta`, `sigma` and `kid_score`. The prior of `beta` is improper, so the model has no draws.

    Example: see `load`.
    """
    beta = sample("beta", dist.ImproperUniform(constraints.real, (), (2,)))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma))


def _condition(data: dict[str, Any]) -> Posterior:
    observed = {"kid_score": jnp.array(data["kid_score"], float)}
    return kidscore_momiq(jnp.array(data["mom_iq"], float)).given(observed)


ENTRY = Entry(_condition, (Parameter("beta", real, (2,)), Parameter("sigma", positive)))
