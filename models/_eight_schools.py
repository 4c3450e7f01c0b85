"""Eight schools: the effects of coaching on test scores, a hierarchical normal model.

Data: D. B. Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6 (1981), table 1.
Prior and model: A. Gelman et al., Bayesian Data Analysis (3rd edition), section 5.5, with the priors of the
posteriordb posterior `eight_schools-eight_schools_noncentered`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import model, sample

EFFECT = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
"""Estimated effect in each school, points of the test."""

STANDARD_ERROR = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
"""Standard error of each estimate."""

REFERENCE = {
    "mu": (4.411, 3.309),
    "tau": (3.602, 3.198),
    "theta[0]": (6.151, 5.616),
    "theta[1]": (4.940, 4.646),
    "theta[2]": (3.906, 5.281),
    "theta[3]": (4.796, 4.771),
    "theta[4]": (3.614, 4.615),
    "theta[5]": (4.051, 4.796),
    "theta[6]": (6.317, 5.003),
    "theta[7]": (4.884, 5.318),
}
"""Posterior mean and sd from posteriordb's 10,000 reference draws (their own standard errors: 0.03 to 0.06)."""


@model
def eight_schools(sigma: Float[Array, " schools"]) -> Float[Array, " schools"]:
    r"""Effects $\theta_j = \mu + \tau z_j$ of schools, observed with known errors: $y_j \sim N(\theta_j, \sigma_j)$.

    Args:
        sigma: standard errors.

    Returns:
        The effects `theta`. Sites: `mu`, `tau`, `z` (the standardised effects) and `y`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import STANDARD_ERROR, eight_schools
        >>> eight_schools(jnp.array(STANDARD_ERROR)).simulate(jax.random.key(0)).retval.shape
        (8,)
    """
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))
    z = jax.vmap(lambda _: sample("z", dist.Normal(0.0, 1.0)))(sigma)
    theta = mu + tau * z
    sample("y", dist.Normal(theta, sigma))
    return theta


@model
def eight_schools_guide(params: dict[str, Any], y: Float[Array, " schools"], sigma: Float[Array, " schools"]) -> None:
    r"""A guide with the model's structure: normal $\mu$, log-normal $\tau$ given $\mu$, exact $z$ given both.

    Given $\mu$ and $\tau$ the effects are independent and normal, with a known mean and variance; the guide uses that
    and learns the rest.

    Args:
        params: made by `eight_schools_start`.
        y: estimated effects.
        sigma: standard errors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import EFFECT, STANDARD_ERROR, eight_schools_guide, eight_schools_start
        >>> guide = eight_schools_guide(eight_schools_start(), jnp.array(EFFECT), jnp.array(STANDARD_ERROR))
        >>> sorted(guide.simulate(jax.random.key(0)).choices)
        ['mu', 'tau', 'z']
    """
    mu = sample("mu", dist.Normal(params["mu"], jnp.exp(params["mu_log_scale"])))
    log_tau = params["log_tau"] + params["slope"] * (mu - params["mu"])
    tau = sample("tau", dist.LogNormal(log_tau, jnp.exp(params["tau_log_scale"])))
    total = sigma**2 + tau**2
    sample("z", dist.Normal(tau * (y - mu) / total, jnp.sqrt(sigma**2 / total)))


def eight_schools_start() -> dict[str, float]:
    """Return initial parameters of `eight_schools_guide`.

    Example:
        >>> from expectax.models import eight_schools_start
        >>> sorted(eight_schools_start())
        ['log_tau', 'mu', 'mu_log_scale', 'slope', 'tau_log_scale']
    """
    return {"mu": 0.0, "mu_log_scale": 1.0, "log_tau": 1.0, "tau_log_scale": 0.0, "slope": 0.0}
