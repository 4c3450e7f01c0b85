"""Importance sampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from expectax.ppl import ControlFlowError, DistributionError, NonFiniteError, Posterior, Program, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._match import check_guide
from expectax.ppl._nested import leaves_of
from expectax.ppl._posterior import check_posterior
from expectax.ppl._staging import check_key

from ._particles import Particles


def importance(
    posterior: Posterior, proposal: Program | None = None, *, key: PRNGKeyArray, num_particles: int
) -> Particles:
    r"""Draw particles from a proposal and weigh them by $\gamma(z) / q(z)$.

    Args:
        posterior: the target.
        proposal: a bound model whose sites are the latents, such as a fitted guide; None for the prior.
        key: a typed key.
        num_particles: how many particles.

    Returns:
        Weighted `Particles`; `particles.log_evidence` estimates $\log p(y)$.

    Raises:
        AddressError, ShapeError: the proposal's sites are not the latents.
        SupportError: the proposal does not cover the latents' support, or leaves it.
        NonFiniteError: a weight is nan, or all weights are zero; `result` holds the particles.

    Source: Kloek and van Dijk 1978; Robert and Casella 2004, chapter 3.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> cloud = inference.importance(model().given({"y": 1.0}), key=jax.random.key(0), num_particles=10_000)
        >>> bool(abs(cloud.log_evidence - -1.5155) < 0.05)
        True
    """
    check_posterior(posterior, "importance")
    check_key(key)
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"importance needs a whole num_particles >= 1, got {num_particles!r}.")
    if proposal is not None and not isinstance(proposal, Program):
        raise TypeError(f"the proposal must be a bound model such as guide(params), got {proposal!r}.")
    if proposal is not None:
        check_guide(proposal, posterior, _jax.caller(), covering=True)
    particles = _importance(posterior, proposal, key, num_particles)
    if not _jax.is_traced(particles.log_weights):
        check_weights(posterior, particles)
    return particles


@compiled
def _importance(posterior: Posterior, proposal: Program | None, key: Any, num_particles: int) -> Particles:
    estimated = any(entry.estimated for _, entry in leaves_of(posterior.program.sites()))

    def particle(key: Any) -> Any:
        if proposal is None:
            trace, log_weight = posterior.generate(key)
            return posterior.latents(trace.choices), log_weight
        key_draw, key_score = jax.random.split(key) if estimated else (key, None)
        trace = proposal.simulate(key_draw)
        return trace.choices, posterior.log_density(trace.choices, key=key_score) - trace.log_density

    choices, log_weights = _jax.over_lanes(particle, num_particles)(key)
    return Particles(choices, log_weights, jnp.zeros((), log_weights.dtype))


def check_weights(posterior: Posterior, particles: Particles) -> None:
    """Refuse weights that are nan or all zero, naming the first site to blame."""
    weights = np.asarray(particles.log_weights)
    bad = np.isnan(weights) | (weights == np.inf)
    if not bad.any() and not np.isneginf(weights).all():
        return
    index = int(np.argmax(bad)) if bad.any() else 0
    site = blamed_site(posterior, jax.tree.map(lambda v: v[index], particles.choices))
    what = f"{int(bad.sum())} of {len(weights)} weights are not finite" if bad.any() else "all weights are zero"
    raise NonFiniteError(
        f"importance: {what}; particle {index} is the first{f', at site {site!r}' if site else ''}. Check the "
        "parameters of that site's distribution there, or use a proposal nearer to the posterior.",
        particles,
    )


def blamed_site(posterior: Posterior, latents: Any) -> str | None:
    """Return the path of the first site whose log density is not finite at the latents."""
    try:
        scores = posterior.site_log_densities(latents)
    except (ControlFlowError, DistributionError):  # what is summed out, or estimated, has no densities site by site
        return None
    for path, value in leaves_of(scores):
        if not np.isfinite(np.asarray(value)).all():
            return path
    return None
