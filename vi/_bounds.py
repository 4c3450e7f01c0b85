"""The two lower bounds that most users want, each written in the objective language."""

from __future__ import annotations

from typing import Any

from ._objective import Objective, log_density, simulate
from ._shared import Guide, Target, check_particles, check_target, log_mean_exp, log_weights, matched


def elbo(posterior: Target, guide: Guide) -> Objective:
    r"""The evidence lower bound $E_{q_\phi}[\log p(z, y) - \log q_\phi(z)] \le \log p(y)$.

    Args:
        posterior: the target, `program.given(observations)`; or, to learn the model too, a function of the parameters
            that returns it: `lambda params: model(params).given(observations)`.
        guide: a model of the parameters, with exactly the posterior's latents as sites.

    Returns:
        An objective to maximise over `params`.

    Raises:
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Jordan et al. 1999; as a program: Becker et al., PLDI 2024.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(mean):
        ...     ex.sample("z", dist.Normal(mean, 0.5**0.5))
        >>> bound = vi.elbo(model().given({"y": 1.0}), guide)
        >>> round(float(vi.estimate(bound, 0.5, jax.random.key(0)).mean), 3)  # tight: the guide is the posterior
        -1.516
    """
    check_target(posterior)
    return Objective(_elbo, (posterior, guide))


def _elbo(posterior: Target, guide: Guide, params: Any) -> Any:
    target = matched(posterior, guide, params)
    z, log_q = simulate(guide(params))
    return log_density(target, z) - log_q


def iwelbo(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""The importance-weighted bound $E\left[\log \frac1n \sum_{i=1}^n p(z_i, y) / q_\phi(z_i)\right] \le \log p(y)$.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$; with 1 it is the ELBO, and it grows towards the log evidence with $n$.

    Returns:
        An objective to maximise over `params`.

    Raises:
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.
        ValueError: `num_particles` is less than 1.

    Source: Burda, Grosse and Salakhutdinov 2016.

    Example: see `vi.elbo`, with `vi.iwelbo(posterior, guide, 5)` in its place.
    """
    check_target(posterior)
    check_particles("iwelbo", num_particles)
    return Objective(_iwelbo, (posterior, guide, num_particles))


def _iwelbo(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    target = matched(posterior, guide, params)
    return log_mean_exp(log_weights(target, guide(params), num_particles))
