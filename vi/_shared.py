"""What the shipped objectives share: a target that may be learned, weighted particles, and what is held still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from expectax.ppl import DistributionError, Model, Posterior, Program, _jax
from expectax.ppl._match import check_guide
from expectax.ppl._nested import leaves_of

from ._objective import log_density, simulate

Guide = Callable[[Any], Program]
Target = Posterior | Callable[[Any], Posterior]
"""A posterior, or, where the model is learned too, a function of the parameters that returns one."""


def check_target(posterior: Any) -> None:
    """Refuse what is neither a posterior nor a function that may return one."""
    if not isinstance(posterior, Posterior) and (isinstance(posterior, Model) or not callable(posterior)):
        raise TypeError(
            "expected a posterior, model(args).given(observations), or a function of the parameters that returns one, "
            f"got {posterior!r}."
        )


def check_particles(name: str, num_particles: int, least: int = 1) -> None:
    """Refuse a number of particles that is too small for an objective, or no whole number."""
    if isinstance(num_particles, bool) or not isinstance(num_particles, (int, np.integer)) or num_particles < least:
        raise ValueError(f"{name} needs num_particles >= {least}, a whole number, got {num_particles!r}.")


def target_at(posterior: Target, params: Any) -> Posterior:
    """Return the posterior at some parameters."""
    target = posterior if isinstance(posterior, Posterior) else posterior(params)
    if not isinstance(target, Posterior):
        raise TypeError(f"{posterior!r} must return a posterior, model(args).given(observations), got {target!r}.")
    return target


def matched(posterior: Target, guide: Guide, params: Any) -> Posterior:
    """Return the posterior at some parameters, after a check that the guide fits it."""
    target = target_at(posterior, params)
    check_guide(guide(params), target, _jax.caller())
    return target


def still(tree: Any) -> Any:
    """Return parameters or choices with no derivative through them."""
    return jax.tree.map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


def log_weights(target: Posterior, guide: Program, num_particles: int) -> Any:
    r"""Return $\log w_i = \log p(z_i, y) - \log q(z_i)$ of particles drawn from a guide, shape `(num_particles,)`."""

    def particle(_: Any) -> Any:
        z, log_q = simulate(guide)
        return log_density(target, z) - log_q

    return jax.vmap(particle)(jnp.arange(num_particles))


def refuse_estimate(program: Program, what: str) -> None:
    """Refuse a program whose density is only estimated where that density is scored beside a draw."""
    for path, entry in leaves_of(program.sites()):
        if entry.estimated:
            raise DistributionError(
                f"{what}: the density of {path!r} (at {entry.site.where}) is only estimated, and an estimate made for a "
                "value that was drawn before would bias the bound. Use vi.elbo or vi.iwelbo, or vi.exact() in the marginal."
            )


def still_particles(target: Posterior, guide: Guide, params: Any, num_particles: int) -> tuple[Any, Any]:
    r"""Return $\log p(z_i, y)$ and $\log q(z_i)$ of particles drawn from the guide *at stopped parameters*.

    The two densities have derivatives, the particles have none: an objective that is written with them says itself
    what its gradient is, and no strategy of a site of the guide matters.
    """
    refuse_estimate(guide(params), "this objective's guide")

    def particle(_: Any) -> Any:
        z, _ = simulate(guide(still(params)))
        return log_density(target, z), log_density(guide(params), z)

    return jax.vmap(particle)(jnp.arange(num_particles))


def log_mean_exp(x: Any, axis: int = 0) -> Any:
    r"""Return $\log \frac1n \sum_i e^{x_i}$, with no loss of digits where all $x_i$ are near each other."""
    top = lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.squeeze(top, axis) + jnp.log1p(jnp.mean(jnp.expm1(x - top), axis=axis))


def weighted_sum(weights: Any, terms: Any) -> Any:
    """Return the sum of weighted terms; a term of weight 0 counts nothing, even if it is infinite."""
    counts = weights > 0
    return jnp.sum(jnp.where(counts, weights * jnp.where(counts, terms, 0.0), 0.0))


def replaced(value: Any, gradient_of: Any) -> Any:
    """Return a number with the value of one expression and the derivative of another."""
    return lax.stop_gradient(value) + gradient_of - lax.stop_gradient(gradient_of)
