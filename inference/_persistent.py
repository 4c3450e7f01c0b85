r"""Persistent sampling: SMC over temperatures that weighs the particles of all temperatures so far.

Source: Karamanis and Seljak 2025, "Persistent sampling: enhancing the efficiency of sequential Monte Carlo"; the weights
are those of multiple importance sampling (Veach and Guibas 1995, the balance heuristic).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, Program
from expectax.ppl import sample as draw
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._staging import check_key

from ._ancestors import Ancestors, Method, check_method
from ._kernel import Kernel, check_kernel_value
from ._moves import moved, start_parameters, tunable, unadapted, with_shape_of
from ._particles import Particles
from ._path import Path, powered
from ._sampled import Sampled, Schedule, check_sampled
from ._temperatures import schedule_of
from ._tempered import Settings, check_settings, size_of
from ._weights import effective_sample_size

_ITERATIONS = 10
"""How often the evidences are estimated again from all particles; they start near to where they end."""


def persistent(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray | None = None,
    num_particles: int,
    temperatures: Any = 10,
    num_moves: int = 5,
    proposal: Program | None = None,
    parameters: Any = None,
    method: Method = "systematic",
) -> Sampled:
    r"""Sample a posterior by SMC over temperatures, keeping every particle of every temperature.

    At step $t$ the $t n$ particles so far, $n$ of each $\beta_s$ with $s < t$, are draws from the mixture of those targets:
    $w_t(z) = \gamma_{\beta_t}(z) / \frac1t \sum_{s < t} \gamma_{\beta_s}(z) / \hat Z_s$, whose mean is $\hat Z_t$. From them $n$
    are resampled and moved. No likelihood is evaluated twice. In the end all evidences are estimated again from all
    particles, those of the last temperature too, by iterating the same equation for all $t$ at once (Shirts and Chodera
    2008). The $\hat Z_s$ in the weights are estimates, so that $\hat Z$ is consistent but not unbiased, with fixed
    temperatures too.

    Args:
        posterior: the target $\gamma$.
        kernel: a `Kernel`, such as `hmc()`.
        key: a typed key; without one the run is a keyless program.
        num_particles: $n$, new ones at each temperature.
        temperatures: as in `tempered`, but fixed; `tempered(...).freeze_schedule()` finds them.
        num_moves: kernel steps of each resampled particle.
        proposal: $r$; None for the prior along the run.
        parameters: as in `tempered`.
        method: of resampling, as in `ancestors`.

    Returns:
        `Sampled`, with $(K + 1) n$ weighted particles, those of the last temperature among them. Its `ess` may be above $n$;
        `unbiased` is False, and there is no standard error.

    Raises:
        ValueError, DistributionError, NonFiniteError: as in `tempered`.

    Sources: Karamanis and Seljak 2025; Shirts and Chodera 2008 (the final evidences).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 0.5))
        >>> found = inference.persistent(
        ...     model().given({"y": 1.0}), inference.hmc(num_integration_steps=3), key=jax.random.key(0),
        ...     num_particles=500, temperatures=4,
        ... )
        >>> found.choices["z"].shape, bool(abs(found.log_evidence + 1.4305) < 0.1)  # exactly -1.4305
        ((2500,), True)
    """
    check_kernel_value(kernel, "persistent")
    check_settings(num_particles, num_moves, 0.5, 1, False)
    schedule = schedule_of(temperatures, parameters, "persistent")
    if schedule is None:
        raise ValueError("persistent needs temperatures: tempered(...).freeze_schedule() finds them.")
    path = Path(posterior, proposal)
    settings = Settings(num_particles, num_moves, check_method(method, num_particles, num_particles), False)
    if key is None:
        return _persistent(path, kernel, settings, schedule)
    check_key(key)
    return check_sampled(_persistent_keyed(path, kernel, settings, schedule, key), posterior, "persistent")


@compiled
def _persistent_keyed(path: Path, kernel: Kernel, settings: Settings, schedule: Schedule, key: Any) -> Sampled:
    return keyed(lambda: _persistent(path, kernel, settings, schedule))(key)


def _persistent(path: Path, kernel: Kernel, settings: Settings, schedule: Schedule) -> Sampled:
    """Run through all temperatures; a keyless program. The pool has a row of particles for each temperature, 0 too."""
    path = path.checked("persistent")
    latents, log_ratio = jax.vmap(lambda _: path.draw())(jnp.arange(settings.num_particles))
    betas = jnp.concatenate([jnp.zeros(1), schedule.temperatures]).astype(log_ratio.dtype)
    rows = betas.shape[0]
    given, start = schedule.parameters, unadapted(kernel, path.at(betas[1]), latents)
    tuned = given is None and tunable(start)
    filled = lambda x: jnp.broadcast_to(x, (rows, *x.shape))  # noqa: E731

    def step(carry: Any, inputs: Any) -> Any:
        pool, ratios, log_zs, parameters = carry
        row, own = inputs
        parameters = parameters if given is None else own
        target = path.at(betas[row])
        log_weights = _mixture_weights(betas, ratios, log_zs, betas[row], row)
        log_z = jax.nn.logsumexp(log_weights) - jnp.log(settings.num_particles * row).astype(ratios.dtype)
        flat = jax.tree.map(_flat, pool)
        if tuned:
            parameters = with_shape_of(parameters, target, flat, log_weights)
        index = draw("ancestors", Ancestors(log_weights, settings.num_particles, settings.method))
        chosen = jax.tree.map(lambda x: x[index], flat)
        after = moved(kernel, target, chosen, parameters, settings.num_moves, tuned=tuned)
        pool = jax.tree.map(lambda all, new: all.at[row].set(new), pool, after.latents)
        ratios = ratios.at[row].set(jax.vmap(path.log_ratio)(after.latents))
        told = (effective_sample_size(log_weights), after.acceptance_rate, after.parameters)
        return (pool, ratios, log_zs.at[row].set(log_z), after.parameters), told

    first = start_parameters(start, size_of(path.posterior)) if tuned else start
    carry = (jax.tree.map(filled, latents), filled(log_ratio), jnp.zeros_like(betas), first)
    (pool, ratios, log_zs, _), told = lax.scan(step, carry, (jnp.arange(1, rows), given))
    again = lambda _, log_zs: _consistent(betas, ratios, log_zs)  # noqa: E731
    log_zs = lax.fori_loop(0, _ITERATIONS, again, log_zs)
    log_weights = _mixture_weights(betas, ratios, log_zs, betas[-1], rows)
    log_offset = log_zs[-1] - jax.nn.logsumexp(log_weights) + jnp.log(log_weights.shape[0])
    ess, rates, parameters = told
    return Sampled(
        Particles(jax.tree.map(_flat, pool), log_weights, log_offset),
        betas[1:],
        ess,
        log_zs[1:],
        rates,
        jnp.ones(rows - 1, bool),
        parameters,
        jnp.full((), jnp.nan, betas.dtype),
        unbiased=False,
    )


def _consistent(betas: Any, ratios: Any, log_zs: Any) -> Any:
    """Return the evidences that the whole pool gives, weighed with the ones so far; that of temperature 0 is known."""
    rows = betas.shape[0]
    one = lambda beta: jax.nn.logsumexp(_mixture_weights(betas, ratios, log_zs, beta, rows))  # noqa: E731
    found = jax.vmap(one)(betas)
    return found - found[0]


def _mixture_weights(betas: Any, ratios: Any, log_zs: Any, beta: Any, used: Any) -> Any:
    """Return the log weights of a whole pool for a temperature, of which the first rows are used; minus infinity after."""
    rows = jnp.arange(betas.shape[0])
    each = powered(betas[:, None, None], ratios[None]) - log_zs[:, None, None]
    each = jnp.where((rows < used)[:, None, None], each, -jnp.inf)
    mixture = jax.nn.logsumexp(each, axis=0) - jnp.log(used).astype(ratios.dtype)
    log_weights = jnp.where(jnp.isneginf(ratios), -jnp.inf, powered(beta, ratios) - mixture)
    return _flat(jnp.where((rows < used)[:, None], log_weights, -jnp.inf))


def _flat(x: Any) -> Any:
    return jnp.reshape(x, (-1, *x.shape[2:]))
