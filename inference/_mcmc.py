"""Markov chains on the unconstrained latents of a posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import NonFiniteError, Posterior, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._progress import progress_bar
from expectax.ppl._staging import check_key

from ._importance import blamed_site
from ._kernels import Kernel
from ._pseudo_marginal import PseudoMarginal
from ._summary import Summary, summarize

_TRIES = 100
"""How many random starts a chain may try before it gives up, as in Stan."""


class Chains(eqx.Module):
    """Draws of several chains.

    Example: see `mcmc`.

    Attributes:
        choices: nested dict of latents, shape `(num_chains, num_samples, ...)`.
        statistics: `divergent` (bool), `acceptance_rate`, `num_integration_steps`, `energy`, `log_density` of the
            unconstrained target; each `(num_chains, num_samples)`.
        step_size: the adapted step size of each chain.
        inverse_mass_matrix: the adapted inverse mass matrix of each chain.
    """

    choices: dict[str, Any]
    statistics: dict[str, Array]
    step_size: Float[Array, " chains"]
    inverse_mass_matrix: Array

    def summary(self) -> Summary:
        """Return mean, sd, Monte Carlo error, split rank R-hat, bulk and tail ESS of every number."""
        return summarize(self.choices)

    def mean(self) -> Any:
        """Return the posterior mean of every latent."""
        return jax.tree.map(lambda v: jnp.mean(v, axis=(0, 1)), self.choices)

    def sd(self) -> Any:
        """Return the posterior standard deviation of every latent."""
        return jax.tree.map(lambda v: jnp.std(v, axis=(0, 1)), self.choices)

    def to_arviz(self, posterior: Posterior | None = None) -> Any:
        """Return the draws for ArviZ: an `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x).

        Args:
            posterior: if given, its observations are stored as `observed_data`.
        """
        from ._arviz import to_arviz

        return to_arviz(self, posterior)


def mcmc(
    posterior: Posterior,
    kernel: Kernel | PseudoMarginal,
    *,
    key: PRNGKeyArray,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 1,
    initial: dict[str, Any] | None = None,
    progress: bool = False,
) -> Chains:
    r"""Sample a posterior by Markov chains, all chains vectorised in one program.

    Args:
        posterior: the target; every latent must be continuous.
        kernel: `nuts(...)` or `hmc(...)`; `pseudo_marginal(...)` for a density that is only estimated.
        key: a typed key.
        num_warmup: adaptation steps, whose draws are dropped.
        num_samples: draws kept of each chain.
        num_chains: number of chains.
        thinning: kernel steps per kept draw. The steps between are never stored; their divergences and integration
            steps are counted, their acceptance rates averaged.
        initial: nested dict of latents to start every chain at; by default uniform in (-2, 2) on the unconstrained
            scale, tried again where the density is not finite.
        progress: show a progress bar; it does not change the draws.

    Returns:
        `Chains`.

    Raises:
        SupportError: a latent is discrete.
        NonFiniteError: no chain start has a finite density; the first site to blame is named.

    A second call with a new key or new data of the same shapes compiles nothing. Divergent transitions warn.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> chains = inference.mcmc(posterior, inference.nuts(), key=jax.random.key(0), num_warmup=300, num_samples=300)
        >>> bool(abs(chains.mean()["z"] - 0.5) < 0.15)
        True
    """
    check_key(key)
    if min(num_samples, num_chains, thinning) < 1 or num_warmup < 0:
        raise ValueError(
            f"need num_samples, num_chains and thinning >= 1 and num_warmup >= 0, got {num_samples}, {num_chains}, "
            f"{thinning}, {num_warmup}."
        )
    key_start, key_warm, key_run = jax.random.split(key, 3)
    length, count = _even_chunks(num_samples)
    with progress_bar(num_warmup + num_samples, kernel.name, progress) as advance:
        start = _starts(posterior, kernel, key_start, num_chains, initial)
        if not _jax.is_traced(start):
            _check_starts(posterior, kernel, start)
        state, parameters = _warm_up(posterior, kernel, key_warm, start, num_warmup)
        if takes_key(kernel) and not _jax.is_traced(start):
            _check_estimates(state.logdensity, num_warmup)
        if progress:
            jax.block_until_ready(state)
            advance(num_warmup)
        keys = jax.vmap(lambda k: jax.random.split(k, num_samples))(jax.random.split(key_run, num_chains))
        pieces = []
        for chunk in range(count):
            part = keys[:, chunk * length : (chunk + 1) * length]
            state, piece = _sample(posterior, kernel, part, state, parameters, thinning)
            pieces.append(piece)
            if progress:
                jax.block_until_ready(state)
                advance(length, f"divergences {sum(int(p[1]['divergent'].sum()) for p in pieces)}")
    choices, statistics = jax.tree.map(lambda *vs: jnp.concatenate(vs, axis=1), *pieces)
    chains = Chains(choices, statistics, **parameters)
    _warn_divergent(chains)
    return chains


def takes_key(kernel: Any) -> bool:
    """Tell whether a kernel asks for estimates of the density, by keys."""
    return getattr(kernel, "takes_key", False)


def _even_chunks(total: int, most: int = 20) -> tuple[int, int]:
    """Return `(length, number)` of at most `most` chunks that divide `total` evenly, so that one program serves all."""
    number = next(n for n in range(min(most, total), 0, -1) if total % n == 0)
    return total // number, number


def _target(posterior: Posterior) -> tuple[Callable[..., Any], Callable[[Any], Any], int]:
    """Return the log density of a flat unconstrained vector (and a key), the map to latents, and the dimension."""
    shapes = posterior.unconstrained_shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    flat, unravel = ravel_pytree(zeros)
    return (
        lambda position, key=None: posterior.unconstrained_log_density(unravel(position), key),
        lambda position: posterior.constrain(unravel(position)),
        flat.size,
    )


@compiled
def _starts(posterior: Posterior, kernel: Any, key: Any, num_chains: int, initial: Any) -> Any:
    log_density, _, size = _target(posterior)
    if initial is not None:
        position = ravel_pytree(posterior.unconstrain(initial))[0]
        return jnp.broadcast_to(position, (num_chains, size))

    def draw(key: Any) -> Any:
        return jax.random.uniform(key, (size,), minval=-2.0, maxval=2.0)

    def usable(position: Any, key: Any) -> Any:
        if takes_key(kernel):
            return jnp.isfinite(log_density(position, key))
        value, gradient = jax.value_and_grad(log_density)(position)
        return jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))

    def one(key: Any) -> Any:
        def again(carry: Any) -> Any:
            key, _, tries = carry
            key, now = jax.random.split(key)
            return key, draw(now), tries + 1

        def bad(carry: Any) -> Any:
            key, position, tries = carry
            return (tries < _TRIES) & ((tries == 0) | ~usable(position, jax.random.fold_in(key, 1)))

        return lax.while_loop(bad, again, (key, jnp.zeros(size), 0))[1]

    return jax.vmap(one)(jax.random.split(key, num_chains))


def _check_starts(posterior: Posterior, kernel: Any, start: Any) -> None:
    """Refuse to go on from a start whose density is not finite; of an estimate see `_check_estimates`."""
    if takes_key(kernel):
        return
    values = np.asarray(_densities(posterior, start))
    if np.isfinite(values).all():
        return
    chain = int(np.argmin(np.isfinite(values)))
    _, constrain, _ = _target(posterior)
    site = blamed_site(posterior, constrain(start[chain]))
    raise NonFiniteError(
        f"mcmc: chain {chain} found no start with a finite log density (got {values[chain]})"
        f"{f'; the first site to blame is {site!r}' if site else ''}. Check that site's parameters and observations, or "
        "give initial={...} near the posterior."
    )


def _check_estimates(log_densities: Any, num_warmup: int) -> None:
    """Refuse to draw from a chain that never met an estimate above 0: where it stands is no draw of the posterior."""
    values = np.asarray(log_densities)
    if not np.isfinite(values).all():
        chain = int(np.argmin(np.isfinite(values)))
        raise NonFiniteError(
            f"mcmc: after {num_warmup} steps of warm-up chain {chain} has an estimated log density of {values[chain]}. Use "
            "more particles in the estimate, a longer warm-up, or give initial={...} near the posterior."
        )


@compiled
def _densities(posterior: Posterior, positions: Any) -> Any:
    return jax.vmap(_target(posterior)[0])(positions)


@compiled
def _warm_up(posterior: Posterior, kernel: Any, key: Any, start: Any, num_warmup: int) -> tuple[Any, dict[str, Any]]:
    log_density, _, size = _target(posterior)

    def one(key: Any, position: Any) -> Any:
        if num_warmup == 0:
            mass = jnp.eye(size) if kernel.dense_mass else jnp.ones(size)
            here = (lambda position: log_density(position, key)) if takes_key(kernel) else log_density
            return kernel.init(position, here), {"step_size": jnp.asarray(0.1), "inverse_mass_matrix": mass}
        return kernel.warm_up(key, position, log_density, num_warmup)

    return jax.vmap(one)(jax.random.split(key, start.shape[0]), start)


@compiled
def _sample(posterior: Posterior, kernel: Any, keys: Any, state: Any, parameters: Any, thinning: int) -> Any:
    log_density, constrain, _ = _target(posterior)

    def chain(keys: Any, state: Any, parameters: Any) -> Any:
        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state, log_density, parameters)
            statistics = {
                "divergent": info.is_divergent,
                "acceptance_rate": info.acceptance_rate,
                "num_integration_steps": jnp.asarray(info.num_integration_steps),
                "energy": info.energy,
                "log_density": state.logdensity,
            }
            return state, statistics

        def kept(state: Any, key: Any) -> Any:
            state, statistics = step(state, key) if thinning == 1 else thinned(state, key)
            return state, (state.position, statistics)

        def thinned(state: Any, key: Any) -> Any:
            state, statistics = lax.scan(step, state, jax.random.split(key, thinning))
            return state, {name: _over_steps(name, x) for name, x in statistics.items()}

        state, (positions, statistics) = lax.scan(kept, state, keys)
        return state, (jax.vmap(constrain)(positions), statistics)

    return jax.vmap(chain)(keys, state, parameters)


def _over_steps(name: str, values: Any) -> Any:
    """Return one statistic of a kept draw from those of its steps."""
    over = {"divergent": jnp.any, "acceptance_rate": jnp.mean, "num_integration_steps": jnp.sum}
    return over[name](values) if name in over else values[-1]


def _warn_divergent(chains: Chains) -> None:
    divergent = chains.statistics["divergent"]
    if _jax.is_traced(divergent) or not int(divergent.sum()):
        return
    warnings.warn(
        f"mcmc: {int(divergent.sum())} of {divergent.size} transitions diverged, so parts of the posterior may be "
        "missed. Raise target_acceptance (0.95), or write the model non-centred.",
        RuntimeWarning,
        stacklevel=3,
    )
