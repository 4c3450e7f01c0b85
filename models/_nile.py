"""The annual flow of the Nile at Aswan: a local-level model, written as a plain `lax.scan`.

Data: 1871-1970, in 10^8 cubic metres; G. W. Cobb, "The problem of the Nile: conditional solution to a changepoint
problem", Biometrika 65 (1978); public domain. Model and variances: J. Durbin and S. J. Koopman, Time Series Analysis
by State Space Methods (2nd edition), section 2.2.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import model, sample

# fmt: off
NILE = (
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
)
"""Flow in each year from 1871 to 1970, 10^8 cubic metres."""
# fmt: on

OBSERVATION_SD, LEVEL_SD = 15099.0**0.5, 1469.1**0.5
"""Maximum-likelihood standard deviations of the observations and of the level's yearly change."""

START_MEAN, START_SD = 1000.0, 300.0
"""Prior of the level in the year before the first."""


@model
def local_level(num_years: int, observation_sd: float, level_sd: float) -> Any:
    r"""A random walk observed with noise: $x_t \sim N(x_{t-1}, \sigma_\eta)$, $y_t \sim N(x_t, \sigma_\epsilon)$.

    Args:
        num_years: length of the series.
        observation_sd: $\sigma_\epsilon$.
        level_sd: $\sigma_\eta$.

    Returns:
        The levels. Sites: `start`, and in the scan `level` and `flow`, each of shape `(num_years,)`.

    Example:
        >>> import jax
        >>> from expectax.models import local_level
        >>> local_level(5, 10.0, 1.0).simulate(jax.random.key(0)).choices["flow"].shape
        (5,)
    """

    def year(level: Any, _: Any) -> Any:
        level = sample("level", dist.Normal(level, level_sd))
        sample("flow", dist.Normal(level, observation_sd))
        return level, level

    start = sample("start", dist.Normal(START_MEAN, START_SD))
    return jax.lax.scan(year, start, length=num_years)[1]


class Kalman(NamedTuple):
    """Exact filtering means and standard deviations, and the exact log evidence. Example: see `kalman`."""

    mean: Float[Array, " years"]
    sd: Float[Array, " years"]
    log_evidence: float


def kalman(flows: Any, observation_sd: float = OBSERVATION_SD, level_sd: float = LEVEL_SD) -> Kalman:
    """Filter the local-level model exactly (Kalman 1960), in float64.

    Args:
        flows: the observations.
        observation_sd: standard deviation of an observation.
        level_sd: standard deviation of a yearly change.

    Returns:
        A `Kalman`.

    Example:
        >>> from expectax.models import NILE, kalman
        >>> round(kalman(NILE).log_evidence, 3)
        -639.263
    """
    mean, variance, log_evidence = START_MEAN, START_SD**2, 0.0
    means, variances = [], []
    for flow in np.asarray(flows, np.float64):
        variance += level_sd**2
        total = variance + observation_sd**2
        log_evidence -= 0.5 * (np.log(2 * np.pi * total) + (flow - mean) ** 2 / total)
        mean += variance / total * (flow - mean)
        variance *= observation_sd**2 / total
        means.append(mean)
        variances.append(variance)
    return Kalman(jnp.asarray(np.array(means)), jnp.asarray(np.sqrt(variances)), float(log_evidence))
