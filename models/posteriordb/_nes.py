"""Party identification in the American National Election Study of 1980, regressed on ideology and demography.

Source: posteriordb `nes1980-nes` (BSD-3-Clause). Data: American National Election Studies, as in A. Gelman and J. Hill,
Data Analysis Using Regression and Multilevel/Hierarchical Models (2006), chapter 4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive, real

_COVARIATES = ("real_ideo", "race_adj", "age_discrete", "educ1", "gender", "income")


@model
def nes(
    real_ideo: Float[Array, " n"],
    race_adj: Float[Array, " n"],
    age_discrete: Float[Array, " n"],
    educ1: Float[Array, " n"],
    gender: Float[Array, " n"],
    income: Float[Array, " n"],
) -> None:
    r"""Regression of party identification (1 strong Democrat to 7 strong Republican); flat priors.

    Args:
        real_ideo: ideology, 1 (strong liberal) to 7 (strong conservative).
        race_adj: ethnicity code.
        age_discrete: age category, 1 (18 to 29, the baseline), 2 (30 to 44), 3 (45 to 64) or 4 (65 and more).
        educ1: education, 1 to 4.
        gender: gender code.
        income: income category, 1 to 5.

    Sites: `beta` (intercept first), `sigma` and `partyid7`. The priors are improper, so the model has no draws.

    Example: see `load`.
    """
    beta = sample("beta", dist.ImproperUniform(constraints.real, (), (9,)))
    sigma = sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    age = [jnp.where(age_discrete == category, 1.0, 0.0) for category in (2, 3, 4)]
    design = jnp.stack([jnp.ones_like(income), real_ideo, race_adj, *age, educ1, gender, income], axis=1)
    sample("partyid7", dist.Normal(design @ beta, sigma))


def _condition(data: dict[str, Any]) -> Posterior:
    program = nes(*(jnp.array(data[column], float) for column in _COVARIATES))
    return program.given({"partyid7": jnp.array(data["partyid7"], float)})


ENTRY = Entry(_condition, (Parameter("beta", real, (9,)), Parameter("sigma", positive)))
