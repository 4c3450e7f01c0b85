"""Wells in Bangladesh: does a household whose well holds arsenic switch to a safe one, given how far that is?

Source: posteriordb `wells_data-wells_dist` (BSD-3-Clause). Data: A. Gelman and J. Hill, Data
Analysis Using Regression and Multilevel/Hierarchical Models (2006), chapter 5.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, real


@model
def wells_dist(distance: Float[Array, " n"]) -> None:
    r"""Logistic regression $\text{logit}\,P(\text{switched}_i) = \beta_1 + \beta_2\,\text{distance}_i$, flat priors.

    Args:
        distance: metres to the nearest safe well.

    Sites: `beta` and `switched`. The prior is improper, so the model has no draws.

    Example: see `load`.
    """
    beta = sample("beta", dist.ImproperUniform(constraints.real, (), (2,)))
    sample("switched", dist.BernoulliLogits(beta[0] + beta[1] * distance))


def _condition(data: dict[str, Any]) -> Posterior:
    return wells_dist(jnp.array(data["dist"], float)).given({"switched": jnp.array(data["switched"], int)})


ENTRY = Entry(_condition, (Parameter("beta", real, (2,)),))
