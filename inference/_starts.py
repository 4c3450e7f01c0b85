"""Where chains start: a point of finite density, found by trying."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from expectax.ppl import NonFiniteError, Posterior
from expectax.ppl._compile import compiled
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._posterior import is_discrete

from ._importance import blamed_site
from ._target import Flat, Target

_TRIES = 100
"""How many random starts a chain may try before it gives up, as in Stan."""


@compiled
def starts(posterior: Posterior, key: Any, num_chains: int, initial: Choices | None) -> Choices:
    """Return latents for each chain, chains first.

    By default they are uniform in (-2, 2) on the unconstrained scale, as in Stan; where a latent is discrete, all come
    from the prior along the run.
    """
    target = Target(posterior)
    if initial is not None:
        whole = posterior.constrain(posterior.unconstrain(initial)) if continuous(posterior) else initial
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_chains, *jnp.shape(x))), whole)
    search = _uniform(target.flat(), target.estimated) if continuous(posterior) else _prior(target)
    return jax.vmap(search)(jax.random.split(key, num_chains))


def continuous(posterior: Posterior) -> bool:
    """Tell whether every latent has an unconstrained scale."""
    return not any(is_discrete(entry) for _, entry in leaves_of(posterior.latent_sites()))


def _uniform(flat: Flat, estimated: bool) -> Any:
    def draw(key: Any) -> Any:
        return jax.random.uniform(key, (flat.size,), minval=-2.0, maxval=2.0)

    def usable(position: Any, key: Any) -> Any:
        if estimated:
            return jnp.isfinite(flat.log_density(position, key))
        value, gradient = jax.value_and_grad(flat.log_density)(position)
        return jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))

    return lambda key: flat.constrain(_tried(draw, usable, key))


def _prior(target: Target) -> Any:
    posterior = target.posterior
    draw = lambda key: posterior.latents(posterior.generate(key)[0].choices)  # noqa: E731
    return lambda key: _tried(draw, lambda z, _: jnp.isfinite(posterior.log_density(z)), key)


def _tried(draw: Any, usable: Any, key: Any) -> Any:
    """Draw until something is usable, or the tries are up."""

    def again(carry: Any) -> Any:
        key, _, tries = carry
        key, now = jax.random.split(key)
        return key, draw(now), tries + 1

    def bad(carry: Any) -> Any:
        key, found, tries = carry
        return (tries < _TRIES) & ~usable(found, jax.random.fold_in(key, 1))

    key, first = jax.random.split(key)
    return lax.while_loop(bad, again, (key, draw(first), 1))[1]


def check_starts(posterior: Posterior, latents: Choices) -> None:
    """Refuse to go on from a start whose density is not finite; of an estimate see `check_estimates`."""
    if Target(posterior).estimated:
        return
    values = np.asarray(_densities(posterior, latents))
    if np.isfinite(values).all():
        return
    chain = int(np.argmin(np.isfinite(values)))
    site = blamed_site(posterior, jax.tree.map(lambda x: x[chain], latents))
    raise NonFiniteError(
        f"mcmc: chain {chain} found no start with a finite log density (got {values[chain]})"
        f"{f'; the first site to blame is {site!r}' if site else ''}. Check that site's parameters and observations, or "
        "give initial={...} near the posterior."
    )


@compiled
def _densities(posterior: Posterior, latents: Choices) -> Any:
    return jax.vmap(posterior.log_density)(latents)


def check_estimates(log_densities: Any, num_warmup: int) -> None:
    """Refuse to draw from a chain that never met an estimate above 0: where it stands is no draw of the posterior."""
    values = np.asarray(log_densities)
    if not np.isfinite(values).all():
        chain = int(np.argmin(np.isfinite(values)))
        raise NonFiniteError(
            f"mcmc: after {num_warmup} steps of warm-up chain {chain} has an estimated log density of {values[chain]}. Use "
            "more particles in the estimate, a longer warm-up, or give initial={...} near the posterior."
        )
