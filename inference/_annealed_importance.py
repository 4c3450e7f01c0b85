r"""Annealed importance sampling: independent chains through the temperatures, with unbiased weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, Program
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._staging import check_key

from ._kernel import Kernel, check_kernel_value
from ._moves import moved, unadapted
from ._particles import Particles
from ._path import Path, powered
from ._sampled import Sampled, Schedule, check_sampled
from ._temperatures import schedule_of
from ._tempered import check_settings
from ._weights import effective_sample_size, log_mean_exp, normalized_weights


def annealed_importance(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray | None = None,
    num_particles: int,
    temperatures: Any = 50,
    num_moves: int = 1,
    proposal: Program | None = None,
    parameters: Any = None,
) -> Sampled:
    r"""Draw independent weighted particles by annealing: $w = \prod_k (\gamma(z_{k-1}) / r(z_{k-1}))^{\beta_k - \beta_{k-1}}$.

    Chain $z_0 \sim r$, $z_k \sim K_k(z_{k-1}, \cdot)$, where $K_k$ leaves $\gamma_{\beta_k} = r^{1 - \beta_k} \gamma^{\beta_k}$
    invariant. No particle sees another, so that the mean weight is unbiased and its error follows from the weights.

    Args:
        posterior: the target $\gamma$.
        kernel: a `Kernel`, such as `hmc()`.
        key: a typed key; without one the run is a keyless program.
        num_particles: how many chains.
        temperatures: as in `tempered`; `tempered(...).freeze_schedule()` brings tuned parameters too.
        num_moves: kernel steps at each temperature but the last, where a move would change no weight.
        proposal: $r$; None for the prior along the run.
        parameters: of the kernel; None for those of a chain without warm-up.

    Returns:
        `Sampled`, with weights; always unbiased. Its `ess` are those of all the weights so far.

    Raises:
        ValueError, DistributionError, NonFiniteError: as in `tempered`.

    Source: Neal 2001.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 0.5))
        >>> found = inference.annealed_importance(
        ...     model().given({"y": 1.0}), inference.hmc(num_integration_steps=3), key=jax.random.key(0),
        ...     num_particles=500, temperatures=10,
        ...     parameters={"step_size": jnp.asarray(0.5), "inverse_mass_matrix": jnp.ones(1)},
        ... )
        >>> found.unbiased, bool(abs(found.log_evidence + 1.4305) < 0.1)  # exactly -1.4305
        (True, True)
    """
    check_kernel_value(kernel, "annealed_importance")
    check_settings(num_particles, num_moves, 0.5, 1, False)
    schedule = schedule_of(temperatures, parameters, "annealed_importance")
    if schedule is None:
        raise ValueError("annealed_importance needs temperatures: tempered(...).freeze_schedule() finds them.")
    path = Path(posterior, proposal)
    if key is None:
        return _annealed(path, kernel, num_particles, num_moves, schedule)
    check_key(key)
    found = _annealed_keyed(path, kernel, num_particles, num_moves, schedule, key)
    return check_sampled(found, posterior, "annealed_importance")


def _annealed(path: Path, kernel: Kernel, num_particles: int, num_moves: int, schedule: Schedule) -> Sampled:
    """Run all chains; a keyless program."""
    path = path.checked("annealed_importance")
    latents, log_ratio = jax.vmap(lambda _: path.draw())(jnp.arange(num_particles))
    betas = jnp.asarray(schedule.temperatures, log_ratio.dtype)
    changes = jnp.diff(betas, prepend=0.0)
    given = schedule.parameters
    start = unadapted(kernel, path.at(betas[0]), latents)

    def step(carry: Any, inputs: Any) -> Any:
        latents, log_ratio, log_weights = carry
        change, beta, own = inputs
        log_weights = log_weights + powered(change, log_ratio)
        after = moved(kernel, path.at(beta), latents, start if given is None else own, num_moves)
        log_ratio = jax.vmap(path.log_ratio)(after.latents)
        return (after.latents, log_ratio, log_weights), (log_weights, after.acceptance_rate)

    inputs = (changes[:-1], betas[:-1], jax.tree.map(lambda x: x[:-1], given))
    carry = (latents, log_ratio, jnp.zeros_like(log_ratio))
    (latents, log_ratio, log_weights), (earlier, rates) = lax.scan(step, carry, inputs)
    log_weights = log_weights + powered(changes[-1], log_ratio)
    every = jnp.concatenate([earlier, log_weights[None]])
    relative = normalized_weights(log_weights) * num_particles
    return Sampled(
        Particles(latents, log_weights, jnp.zeros((), log_weights.dtype)),
        betas,
        jax.vmap(effective_sample_size)(every),
        jax.vmap(log_mean_exp)(every),
        jnp.append(rates, jnp.nan),
        jnp.zeros(betas.shape, bool),
        given if given is not None else jax.tree.map(lambda x: jnp.broadcast_to(x, (betas.size, *jnp.shape(x))), start),
        jnp.var(relative, ddof=1) / num_particles,
        unbiased=True,
    )


@compiled
def _annealed_keyed(
    path: Path, kernel: Kernel, num_particles: int, num_moves: int, schedule: Schedule, key: Any
) -> Sampled:
    return keyed(lambda: _annealed(path, kernel, num_particles, num_moves, schedule))(key)
