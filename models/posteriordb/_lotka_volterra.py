"""Lynx and hare: the pelts that the Hudson's Bay Company bought in 1900 to 1920, and the Lotka-Volterra equations.

Source: posteriordb `hudson_lynx_hare-lotka_volterra` (BSD-3-Clause). Data: C. G. Hewitt, The Conservation of the Wild
Life of Canada (1921), by way of P. Howard (2009). Model: A. J. Lotka (1925), V. Volterra (1926); B. Carpenter,
"Predator-Prey Population Dynamics", Stan case study (2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import Posterior, model, sample

from ._stan import Entry, Parameter, positive

Solver = Callable[[Array, Array, Array], Array]
"""From theta, log populations at time 0 and later times to the log populations at those."""

STEPS = 50
"""Steps of the solver between two observations: errors of 2e-10 in log densities and 2e-9 in their gradients here."""

# Dormand and Prince's method of order five: stages as sums of earlier slopes, and the step as a sum of all of them.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_WEIGHTS = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


def log_populations(
    theta: Float[Array, " 4"], start: Float[Array, " 2"], times: Float[Array, " n"]
) -> Float[Array, "n 2"]:
    """Solve the Lotka-Volterra equations for the logarithms of the two populations.

    Method: J. R. Dormand and P. J. Prince, Journal of Computational and Applied Mathematics 6 (1980), `STEPS` fixed
    steps from one time to the next, which is ample for times a year or less apart.

    Args:
        theta: alpha, beta, gamma and delta.
        start: log populations at time 0.
        times: increasing positive times.

    Returns:
        Log populations at `times`.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax.models.posteriordb._lotka_volterra import log_populations
        >>> still = jnp.log(jnp.array([0.8 / 0.02, 0.5 / 0.025]))  # the equilibrium
        >>> bool(jnp.allclose(log_populations(jnp.array([0.5, 0.025, 0.8, 0.02]), still, jnp.arange(1.0, 4.0)), still))
        True
    """
    alpha, beta, gamma, delta = theta

    def slope(x: Array) -> Array:
        return jnp.stack([alpha - beta * jnp.exp(x[1]), delta * jnp.exp(x[0]) - gamma])

    def advance(x: Array, interval: Array) -> tuple[Array, Array]:
        h = interval / STEPS

        def step(x: Array, _: None) -> tuple[Array, None]:
            slopes = [slope(x)]
            for weights in _STAGES:
                slopes.append(slope(x + h * sum(w * k for w, k in zip(weights, slopes, strict=True))))
            return x + h * sum(w * k for w, k in zip(_WEIGHTS, slopes, strict=True)), None

        x, _ = jax.lax.scan(step, x, length=STEPS)
        return x, x

    return jax.lax.scan(advance, start, jnp.diff(times, prepend=0.0))[1]


@model
def lotka_volterra(times: Float[Array, " n"], solve: Solver = log_populations) -> Float[Array, "n 2"]:
    r"""Prey and predators with $u' = (\alpha - \beta v) u$ and $v' = (-\gamma + \delta u) v$, log-normal errors.

    Priors: $\alpha, \gamma \sim N^+(1, 0.5)$, $\beta, \delta \sim N^+(0.05, 0.05)$, initial populations
    $\text{LogNormal}(\log 10, 1)$, and sd of the log observations $\text{LogNormal}(-1, 1)$.

    The equations are solved for the logarithms of the populations by a Runge-Kutta method with fixed steps, which JAX
    differentiates in every mode. (Stan's program solves them to relative and absolute tolerances of 1e-5 and 1e-3.)

    Args:
        times: times of the observations after the first one, at time 0.
        solve: a solver of the equations, with the arguments and the result of `log_populations`, which is the default.

    Returns:
        The populations at `times`. Sites: `theta` (alpha, beta, gamma, delta), `z_init`, `sigma`, `y_init` and `y`.

    Example: see `load`.
    """
    theta = sample(
        "theta", dist.TruncatedNormal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]), low=0.0)
    )
    z_init = sample("z_init", dist.LogNormal(jnp.full(2, math.log(10.0)), 1.0))
    sigma = sample("sigma", dist.LogNormal(jnp.full(2, -1.0), 1.0))
    sample("y_init", dist.LogNormal(jnp.log(z_init), sigma))
    log_z = solve(theta, jnp.log(z_init), times)
    sample("y", dist.LogNormal(log_z, sigma))
    return jnp.exp(log_z)


def _condition(data: dict[str, Any], solve: Solver = log_populations) -> Posterior:
    observed = {"y_init": jnp.array(data["y_init"], float), "y": jnp.array(data["y"], float)}
    return lotka_volterra(jnp.array(data["ts"], float), solve).given(observed)


ENTRY = Entry(
    _condition,
    (Parameter("theta", positive, (4,)), Parameter("z_init", positive, (2,)), Parameter("sigma", positive, (2,))),
)
