"""GARCH(1, 1): a time series whose variance follows its own last value and the last shock.

Source: posteriordb `garch-garch11` (BSD-3-Clause), simulated data of Stan's stat_comp_benchmarks. Model: T. Bollerslev,
"Generalized autoregressive conditional heteroskedasticity", Journal of Econometrics 31 (1986).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, interval, positive, real


@model
def garch11(num_steps: int, first_sd: float) -> None:
    r"""$y_t \sim N(\mu, \sigma_t)$ with $\sigma_{t+1}^2 = \alpha_0 + \alpha_1 (y_t - \mu)^2 + \beta_1 \sigma_t^2$.

    The priors of $\mu$ and $\alpha_0 > 0$ are flat; $(\alpha_1, \beta_1)$ is uniform on the triangle
    $\alpha_1, \beta_1 > 0$, $\alpha_1 + \beta_1 < 1$: marginally $\alpha_1 \sim \text{Beta}(1, 2)$, then $\beta_1$ is
    uniform on $(0, 1 - \alpha_1)$.

    Args:
        num_steps: length of the series.
        first_sd: $\sigma_1$.

    Sites: `mu`, `alpha0`, `alpha1`, `beta1` and `y`. Two priors are improper, so the model has no draws.

    Example: see `load`.
    """
    mu = sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    alpha1 = sample("alpha1", dist.Beta(1.0, 2.0))
    beta1 = sample("beta1", dist.Uniform(0.0, 1.0 - alpha1))

    def step(variance: Any, _: Any) -> Any:
        y = sample("y", dist.Normal(mu, jnp.sqrt(variance)))
        return alpha0 + alpha1 * (y - mu) ** 2 + beta1 * variance, None

    jax.lax.scan(step, jnp.square(jnp.asarray(first_sd, float)), length=num_steps)


def _condition(data: dict[str, Any]) -> Posterior:
    return garch11(data["T"], data["sigma1"]).given({"y": jnp.array(data["y"], float)})


ENTRY = Entry(
    _condition,
    (
        Parameter("mu", real),
        Parameter("alpha0", positive),
        Parameter("alpha1", interval(0.0, lambda earlier: 1.0)),
        Parameter("beta1", interval(0.0, lambda earlier: 1.0 - earlier["alpha1"])),
    ),
)
