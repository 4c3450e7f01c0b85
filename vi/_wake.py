r"""Reweighted wake-sleep: a model and a guide that are each trained on weighted particles of the guide.

The particles $z_i \sim q_\phi$ and their normalised weights $\bar w_i \propto p_\theta(z_i, y) / q_\phi(z_i)$ stand
for the posterior and have no derivative, so that discrete choices cost no score-function estimator. The expectations
are self-normalised: biased by $O(1/n)$ as estimates under the posterior, and consistent.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from ._objective import Objective
from ._shared import (
    Guide,
    Target,
    check_particles,
    check_target,
    log_mean_exp,
    matched,
    replaced,
    still_particles,
    weighted_sum,
)


def wake_model(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""The wake phase of the model: $\sum_i \bar w_i \log p_\theta(z_i, y)$, an estimate of $E_{p(z \mid y)}[\log p_\theta]$.

    Its gradient by $\theta$ is that of the IWELBO; its gradient by the guide's parameters is zero.

    Args:
        posterior: a function of the parameters that returns the target: `lambda params: model(params).given(data)`.
        guide: a model of the parameters, with exactly the posterior's latents as sites. Only sampled from.
        num_particles: $n$, at least 1.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 1.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Bornschein and Bengio 2015, Reweighted wake-sleep.

    Example: see `vi.wake_sleep`, with `vi.wake_model` in its place.
    """
    check_target(posterior)
    check_particles("wake_model", num_particles)
    return Objective(_wake_model, (posterior, guide, num_particles))


def _wake_model(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    log_p, log_q = still_particles(matched(posterior, guide, params), guide, params, num_particles)
    return weighted_sum(_normalized(log_p - log_q), log_p)


def wake_guide(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""The wake phase of the guide: $\sum_i \bar w_i \log q_\phi(z_i)$, an estimate of $E_{p(z \mid y)}[\log q_\phi]$.

    Up to a constant that is $-KL(p(z \mid y) \,\|\, q_\phi)$: the guide covers the posterior. Its gradient by the
    model's parameters is zero. With one particle the gradient would be pure noise, so that at least 2 are needed.

    Args:
        posterior: the target, or a function of the parameters that returns it. Only used for the weights.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$, at least 2.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 2.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Bornschein and Bengio 2015, Reweighted wake-sleep.

    Example: see `vi.wake_sleep`, with `vi.wake_guide` in its place.
    """
    check_target(posterior)
    check_particles("wake_guide", num_particles, 2)
    return Objective(_wake_guide, (posterior, guide, num_particles))


def _wake_guide(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    log_p, log_q = still_particles(matched(posterior, guide, params), guide, params, num_particles)
    return weighted_sum(_normalized(log_p - log_q), log_q)


def wake_sleep(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""Reweighted wake-sleep in one objective: both wake phases, on the same particles.

    Its value is the IWELBO, $\log \frac1n \sum_i w_i$. Its gradient is *not* the IWELBO's, but
    $\sum_i \bar w_i (\nabla \log p_\theta(z_i, y) + \nabla \log q_\phi(z_i))$: for the model's parameters that of
    `wake_model`, for the guide's that of `wake_guide`. A parameter that both use gets the sum of the two. Derivatives
    of higher order mean nothing.

    The classic algorithm trains the guide in its sleep instead: add two objectives,
    `vi.objective(lambda params: wake_phase(params) + sleep_phase(params))`, with `wake_phase = vi.wake_model(...)` and
    `sleep_phase = vi.forward_kl(...)`.

    Args:
        posterior: a function of the parameters that returns the target; or a posterior, if the model is not learned.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$, at least 2.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 2.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Bornschein and Bengio 2015, Reweighted wake-sleep; Le et al. 2019, Revisiting reweighted wake-sleep.

    Example:
        >>> import jax, jax.numpy as jnp, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model(params):
        ...     z = ex.sample("z", dist.Bernoulli(0.5))
        ...     ex.sample("y", dist.Normal(params["step"] * z, 1.0))
        >>> @ex.model
        ... def guide(params):
        ...     ex.sample("z", dist.Bernoulli(logits=params["logit"]))
        >>> both = vi.wake_sleep(lambda params: model(params).given({"y": 3.0}), guide, num_particles=5)
        >>> start = {"step": 1.0, "logit": 0.0}
        >>> fit = vi.fit(both, start, optax.adam(0.05), key=jax.random.key(0), num_steps=500, num_samples=4)
        >>> bool(abs(fit.params["step"] - 3.0) < 0.1)
        True
    """
    check_target(posterior)
    check_particles("wake_sleep", num_particles, 2)
    return Objective(_wake_sleep, (posterior, guide, num_particles))


def _wake_sleep(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    log_p, log_q = still_particles(matched(posterior, guide, params), guide, params, num_particles)
    log_w = log_p - log_q
    return replaced(log_mean_exp(log_w), weighted_sum(_normalized(log_w), log_p + log_q))


def _normalized(log_w: Any) -> Any:
    return lax.stop_gradient(jax.nn.softmax(log_w))
