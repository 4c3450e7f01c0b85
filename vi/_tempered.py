"""The thermodynamic variational objective: the log evidence as an integral over temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._objective import Objective
from ._shared import Guide, Target, check_particles, check_target, matched, still_particles, weighted_sum


def thermodynamic(posterior: Target, guide: Guide, num_particles: int, betas: Sequence[float]) -> Objective:
    r"""The thermodynamic variational objective $\sum_k (\beta_{k+1} - \beta_k)\, E_{\pi_{\beta_k}}[\log p(z, y) / q_\phi(z)]$.

    On the path $\pi_\beta(z) \propto q_\phi(z)^{1-\beta}\, p(z, y)^\beta$ the mean of $\log w = \log p - \log q$ grows
    from the ELBO at $\beta = 0$, and its integral from 0 to 1 is $\log p(y)$; this is the left Riemann sum, a lower
    bound that rises as the steps get finer. All means are over the same particles of the guide, weighted by
    $\bar w_i \propto w_i^\beta$.

    *Value:* self-normalised, so biased for $n < \infty$ and consistent; for any $n$ it is at most the IWELBO of the same
    particles, so that its expectation stays a lower bound. With `betas=(0, 1)` it is the ELBO, unbiased.

    *Gradient:* $E_\pi[\nabla \log w] + Cov_\pi(\nabla \log \pi_\beta, \log w)$, with the covariance estimated from the
    same weighted particles, times $n / (n - 1)$. It needs no derivative through a choice and no strategy of the guide's
    sites. The term of $\beta = 0$ is unbiased; the others are consistent for the gradient of the objective above, and
    are not the gradient of the value's expectation at finite $n$. Higher derivatives mean nothing.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$, at least 2.
        betas: the ends of the steps, increasing from 0 to 1, such as `(0.0, 0.01, 0.1, 1.0)`; fixed.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 2, or `betas` do not increase from 0 to 1.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Masrani, Le and Wood 2019, The thermodynamic variational objective.

    Example: see `vi.elbo`, with `vi.thermodynamic(posterior, guide, 64, (0.0, 0.1, 1.0))` in its place.
    """
    check_target(posterior)
    check_particles("thermodynamic", num_particles, 2)
    betas = tuple(float(beta) for beta in betas)
    steps = zip(betas, betas[1:], strict=False)
    if len(betas) < 2 or (betas[0], betas[-1]) != (0.0, 1.0) or any(low >= high for low, high in steps):
        raise ValueError(f"thermodynamic needs betas that increase from 0 to 1, got {betas}.")
    return Objective(_thermodynamic, (posterior, guide, num_particles, betas))


def _thermodynamic(posterior: Target, guide: Guide, num_particles: int, betas: tuple[float, ...], params: Any) -> Any:
    log_p, log_q = still_particles(matched(posterior, guide, params), guide, params, num_particles)
    means = jax.vmap(_mean_at, (0, None, None))(jnp.array(betas[:-1]), log_p, log_q)
    return jnp.sum(jnp.diff(jnp.array(betas)) * means)


def _mean_at(beta: Any, log_p: Any, log_q: Any) -> Any:
    """Return the mean of log w at one temperature, with the covariance gradient."""
    log_w = log_p - log_q
    # at temperature 0 an impossible particle is like any other: its log density does not enter
    weights = lax.stop_gradient(jax.nn.softmax(jnp.where(beta == 0.0, 0.0, beta * log_w)))
    log_pi = log_q + jnp.where(beta == 0.0, 0.0, beta * log_w)
    mean = weighted_sum(weights, log_w)
    signal = lax.stop_gradient(weights * (log_w - mean)) * log_w.size / (log_w.size - 1)
    counts = (weights > 0) & jnp.isfinite(signal)
    moved = jnp.where(counts, log_pi, 0.0)
    return mean + jnp.sum(jnp.where(counts, signal, 0.0) * (moved - lax.stop_gradient(moved)))
