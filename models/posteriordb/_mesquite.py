"""Mesquite bushes: the weight of a bush's leaves from the bush's dimensions, all on log scales.

Source: posteriordb `mesquite-logmesquite_logvash` (BSD-3-Clause). Data: A. Gelman and J. Hill, Data Analysis Using
Regression and Multilevel/Hierarchical Models (2006), chapter 4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive, real

_COVARIATES = ("diam1", "diam2", "canopy_height", "total_height", "group")


@model
def logmesquite_logvash(
    diam1: Float[Array, " n"],
    diam2: Float[Array, " n"],
    canopy_height: Float[Array, " n"],
    total_height: Float[Array, " n"],
    group: Float[Array, " n"],
) -> None:
    r"""Regression of log weight on log volume, area and shape of the canopy, log height, and group; flat priors.

    Args:
        diam1: diameter of the canopy along its longer axis, in metres.
        diam2: diameter along the shorter axis.
        canopy_height: height of the canopy.
        total_height: height of the bush.
        group: 0 for the first group of measurements, 1 for the second.

    Sites: `beta` (intercept first), `sigma` and `log_weight`. The priors are improper, so the model has no draws.

    Example: see `load`.
    """
    beta = sample("beta", dist.ImproperUniform(constraints.real, (), (6,)))
    sigma = sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    volume, area, shape = diam1 * diam2 * canopy_height, diam1 * diam2, diam1 / diam2
    sizes = jnp.log(jnp.stack([volume, area, shape, total_height]))
    sample("log_weight", dist.Normal(beta[0] + beta[1:5] @ sizes + beta[5] * group, sigma))


def _condition(data: dict[str, Any]) -> Posterior:
    program = logmesquite_logvash(*(jnp.array(data[column], float) for column in _COVARIATES))
    return program.given({"log_weight": jnp.log(jnp.array(data["weight"], float))})


ENTRY = Entry(_condition, (Parameter("beta", real, (6,)), Parameter("sigma", positive)))
