"""A mixture of two normals on the line, its components told apart by the order of their means.

Source: posteriordb `low_dim_gauss_mix-low_dim_gauss_mix` (BSD-3-Clause), simulated data of Stan's
stat_comp_benchmarks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._restricted import Restricted
from ._stan import Entry, Parameter, interval, ordered, positive


@model
def low_dim_gauss_mix(num_observations: int) -> None:
    r"""$y_i \sim \theta N(\mu_1, \sigma_1) + (1 - \theta) N(\mu_2, \sigma_2)$ with $\mu_1 < \mu_2$.

    Priors: $\mu_k \sim N(0, 2)$ restricted to that order, $\sigma_k \sim N^+(0, 2)$, $\theta \sim \text{Beta}(5, 5)$.

    Args:
        num_observations: how many observations.

    Sites: `mu`, `sigma`, `theta` and `y`; the components of the observations are summed out.

    Example: see `load`.
    """
    mu = sample("mu", Restricted(dist.Normal(jnp.zeros(2), 2.0).to_event(1), constraints.ordered_vector))
    sigma = sample("sigma", dist.HalfNormal(jnp.full(2, 2.0)))
    theta = sample("theta", dist.Beta(5.0, 5.0))
    share = dist.Categorical(logits=jnp.log(jnp.stack([theta, 1.0 - theta])))
    sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)).expand([num_observations]))


def _condition(data: dict[str, Any]) -> Posterior:
    return low_dim_gauss_mix(data["N"]).given({"y": jnp.array(data["y"], float)})


ENTRY = Entry(
    _condition,
    (
        Parameter("mu", ordered, (2,)),
        Parameter("sigma", positive, (2,)),
        Parameter("theta", interval(0.0, lambda earlier: 1.0)),
    ),
)
