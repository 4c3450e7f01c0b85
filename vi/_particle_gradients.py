r"""Better gradients of the ELBO and the IWELBO: the same values, with less noise.

Each is its bound's value plus terms that are zero in value and whose derivative is the estimator. Derivatives are of
first order: a second one means nothing, except for `vi.elbo` and `vi.iwelbo` themselves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import Posterior, Program, StrategyError
from expectax.ppl._nested import leaves_of

from ._objective import Objective, log_density, simulate
from ._shared import (
    Guide,
    Target,
    check_particles,
    check_target,
    log_mean_exp,
    matched,
    refuse_estimate,
    replaced,
    still,
    still_particles,
    target_at,
    weighted_sum,
)
from ._strategy import Reparam


def vimco(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""The IWELBO with a baseline for each particle, made of the other particles.

    With $L = \log \frac1n \sum_j w_j$, and $L_{-i}$ the same with $\log w_i$ replaced by the mean of the other
    $\log w_j$, the gradient is $\sum_i (L - L_{-i}) \nabla \log q_\phi(z_i) + \nabla L$, the particles held still:
    unbiased for that of `vi.iwelbo`. It needs no strategy of the guide's sites and one sample only. Meant for discrete
    choices; for continuous ones see `vi.dreg`. A model's own parameters get the IWELBO's gradient.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$, at least 2.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 2.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Mnih and Rezende 2016, Variational inference for Monte Carlo objectives.

    Example:
        >>> import jax, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Poisson(3.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(rate):
        ...     ex.sample("z", dist.Poisson(rate))
        >>> bound = vi.vimco(model().given({"y": 6.0}), guide, num_particles=8)
        >>> fit = vi.fit(bound, 2.0, optax.adam(0.05), key=jax.random.key(0), num_steps=500, num_samples=4)
        >>> bool(4.0 < fit.params < 7.0)
        True
    """
    check_target(posterior)
    check_particles("vimco", num_particles, 2)
    return Objective(_vimco, (posterior, guide, num_particles))


def _vimco(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    log_p, log_q = still_particles(matched(posterior, guide, params), guide, params, num_particles)
    log_w = log_p - log_q
    bound = log_mean_exp(log_w)
    signal = lax.stop_gradient(bound - _without_each(log_w))
    signal = jnp.where(jnp.isfinite(signal), signal, 0.0)  # nothing to learn from where all particles are impossible
    return bound + jnp.sum(signal * (log_q - lax.stop_gradient(log_q)))


def _without_each(log_w: Any) -> Any:
    """Return, for each particle, the bound with that particle's log weight replaced by the mean of the others'.

    Where all others have weight 0 it is 0, a baseline like any other that does not see the particle itself.
    """
    others = ~jnp.eye(log_w.size, dtype=bool)
    mean = jnp.sum(jnp.where(others, log_w, 0.0), axis=1) / (log_w.size - 1)
    without = log_mean_exp(jnp.where(others, log_w, mean[:, None]), axis=1)
    return jnp.where(jnp.isfinite(without), without, 0.0)


def stl(posterior: Target, guide: Guide) -> Objective:
    r"""The ELBO with the gradient that sticks the landing: it has no noise where the guide is the posterior.

    The ELBO's path derivative is $\nabla_\phi \log p(z, y) - \nabla_\phi \log q_\phi(z)$ at $z = g(\epsilon, \phi)$. The
    part of $\log q_\phi$ that is not through $z$ has mean zero and is left out. Unbiased for the gradient of `vi.elbo`.
    There is no form with several particles: the same step would bias the IWELBO's gradient. Use `vi.dreg`.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites, all of them reparametrised.

    Returns:
        An objective to maximise over `params`.

    Raises:
        StrategyError: at first use, if a site of the guide is not reparametrised.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Roeder, Wu and Duvenaud 2017, Sticking the landing.

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
        >>> bound = vi.stl(model().given({"y": 1.0}), guide)
        >>> value, gradient = vi.value_and_grad(bound)(0.5, jax.random.key(0))
        >>> bool(abs(gradient) < 1e-6)  # of every sample: the guide is the posterior
        True
    """
    check_target(posterior)
    return Objective(_stl, (posterior, guide))


def _stl(posterior: Target, guide: Guide, params: Any) -> Any:
    target = matched(posterior, guide, params)
    check_reparametrized("stl", guide(params))
    refuse_estimate(guide(params), "stl")
    z, _ = simulate(guide(params))
    return log_density(target, z) - log_density(guide(still(params)), z)


def dreg(posterior: Target, guide: Guide, num_particles: int) -> Objective:
    r"""The IWELBO with a doubly reparametrised gradient.

    The guide's parameters get $\sum_i \bar w_i^2\, \nabla_z (\log p(z_i, y) - \log q_\phi(z_i))\, \nabla_\phi z_i$ and
    the model's $\sum_i \bar w_i \nabla_\theta \log p_\theta(z_i, y)$, with $\bar w$ the normalised weights: unbiased
    for the gradient of `vi.iwelbo`. Its signal does not drown in noise as $n$ grows, and it has no noise where the
    guide is the posterior. With one particle it is `vi.stl`.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites, all of them reparametrised.
        num_particles: $n$, at least 1.

    Returns:
        An objective to maximise over `params`.

    Raises:
        StrategyError: at first use, if a site of the guide is not reparametrised.
        ValueError: `num_particles` is less than 1.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Tucker et al. 2019, Doubly reparameterized gradient estimators for Monte Carlo objectives.

    Example: see `vi.stl`, with `vi.dreg(posterior, guide, 8)` in its place.
    """
    check_target(posterior)
    check_particles("dreg", num_particles)
    return Objective(_dreg, (posterior, guide, num_particles))


def _dreg(posterior: Target, guide: Guide, num_particles: int, params: Any) -> Any:
    target, resting = matched(posterior, guide, params), target_at(posterior, still(params))
    check_reparametrized("dreg", guide(params))
    refuse_estimate(guide(params), "dreg")
    refuse_estimate(target.program, "dreg")

    def particle(_: Any) -> Any:
        z, _ = simulate(guide(params))
        through_z = log_density(resting, z) - log_density(guide(still(params)), z)
        return through_z, log_density(target, still(z)) if _learned(posterior) else 0.0

    through_z, log_p = jax.vmap(particle)(jnp.arange(num_particles))
    weights = lax.stop_gradient(jax.nn.softmax(through_z))
    gradient = weighted_sum(weights**2, through_z) + weighted_sum(weights, log_p)
    return replaced(log_mean_exp(through_z), gradient)


def _learned(posterior: Target) -> bool:
    return not isinstance(posterior, Posterior)


def check_reparametrized(name: str, guide: Program) -> None:
    """Refuse a guide with a site whose draws have no derivative; `vi.Reparam()` is checked where it is used."""
    for path, entry in leaves_of(guide.sites()):
        site = entry.site
        d = site.distribution([None] * site.structure.num_leaves)
        if isinstance(site.gradient, Reparam) or (site.gradient is None and d.has_rsample):
            continue
        why = "has no differentiable sampler" if site.gradient is None else f"has the strategy {site.gradient!r}"
        raise StrategyError(
            f"vi.{name} differentiates through every choice of the guide, but site {path!r} at {site.where} "
            f"({type(d).__name__}) {why}. Use vi.elbo, vi.iwelbo or vi.vimco, or a reparametrised site."
        )
