r"""SMC samplers over temperatures: from a proposal to a posterior through $\gamma_\beta = r^{1 - \beta} \gamma^\beta$.

At each temperature particles are weighed by $(\gamma / r)^{\beta_k - \beta_{k-1}}$, resampled, and moved by a kernel that
leaves $\gamma_{\beta_k}$ invariant. With temperatures and parameters that are fixed the evidence is unbiased, whatever the
kernel's quality.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import Posterior, Program, _jax, sample
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._nested import Choices
from expectax.ppl._staging import check_key

from ._ancestors import Ancestors, Method, check_method
from ._kernel import Kernel, check_kernel_value
from ._lineage import Lineage
from ._moves import moved, start_parameters, tunable, unadapted, with_shape_of
from ._particles import Particles
from ._path import Path, powered
from ._sampled import Sampled, Schedule, check_sampled
from ._temperatures import next_temperature, schedule_of, warn_cut
from ._weights import effective_sample_size, log_mean_exp, normalized_weights


def tempered(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray | None = None,
    num_particles: int,
    temperatures: Any = None,
    target_ess: float = 0.5,
    num_moves: int = 5,
    proposal: Program | None = None,
    parameters: Any = None,
    method: Method = "systematic",
    waste_free: bool = False,
    max_temperatures: int = 100,
) -> Sampled:
    r"""Sample a posterior by SMC over temperatures, with its evidence.

    Args:
        posterior: the target $\gamma$.
        kernel: a `Kernel`, such as `hmc()`.
        key: a typed key; without one the run is a keyless program, to be enumerated (`assert_valid`) or to stand in
            another; its temperatures must then be given.
        num_particles: $n$.
        temperatures: $0 < \beta_1 \le \dots \le \beta_K = 1$; a whole number $K$ means $\beta_k = (k / K)^3$; a `Schedule`
            fixes the kernel's parameters too. By default each temperature is found by bisection, so that the conditional
            effective sample size is `target_ess` of the particles, within 1 % (of those with positive weight, if the
            first ones have none).
        target_ess: in (0, 1).
        num_moves: kernel steps of each particle at each temperature.
        proposal: $r$, a bound program whose sites are the latents, such as a fitted guide; None for the prior along the
            run.
        parameters: of the kernel, the same at every temperature. By default they are tuned from the particles: the
            inverse mass matrix is the weighted covariance on the unconstrained scale, the step size follows the last
            temperature's acceptance rate. What is tuned depends on all particles, so that the run is consistent (Beskos
            et al. 2016), but no longer exactly unbiased.
        method: of resampling, as in `ancestors`.
        waste_free: keep the particles before and after each move (Dau and Chopin 2022): $n / (m + 1)$ of them are
            resampled and moved $m$ times, and all $n$ are weighed at the next temperature. Unbiased as before.
        max_temperatures: an adaptive schedule of this length ends with 1, however far that is, and warns.

    Returns:
        `Sampled`; `unbiased` is True where temperatures and parameters were fixed.

    Raises:
        ValueError: a setting is out of range.
        DistributionError: a density is only estimated.
        NonFiniteError: all weights of a step are zero, or one is nan; `result` holds the run.

    A second call with a new key, new data or another schedule of the same length compiles nothing.

    Sources: Neal 2001; Del Moral, Doucet and Jasra 2006; Jasra et al. 2011 (adaptive temperatures); Zhou, Johansen and
    Aston 2016 (conditional effective sample size).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 0.1))
        >>> posterior, kernel = model().given({"y": 2.0}), inference.hmc(num_integration_steps=3)
        >>> pilot = inference.tempered(posterior, kernel, key=jax.random.key(0), num_particles=200)
        >>> again = inference.tempered(
        ...     posterior, kernel, key=jax.random.key(1), num_particles=200, temperatures=pilot.freeze_schedule()
        ... )
        >>> pilot.unbiased, again.unbiased, bool(abs(again.log_evidence + 2.904) < 0.5)  # exactly -2.904
        (False, True, True)
    """
    check_kernel_value(kernel, "tempered")
    check_settings(num_particles, num_moves, target_ess, max_temperatures, waste_free)
    settings = Settings(num_particles, num_moves, check_method(method, num_particles, num_particles), waste_free)
    schedule = schedule_of(temperatures, parameters, "tempered")
    path = Path(posterior, proposal)
    if key is None:
        if schedule is None:
            raise ValueError("tempered without a key is a keyless program, whose temperatures must be given.")
        return _fixed(path, kernel, settings, schedule)
    check_key(key)
    if schedule is not None:
        return check_sampled(_fixed_keyed(path, kernel, settings, schedule, key), posterior, "tempered")
    found, count = _adaptive(path, kernel, settings, parameters, target_ess, max_temperatures, key)
    if _jax.is_traced(count):
        return found
    warn_cut(found, int(count), max_temperatures, target_ess)
    return check_sampled(_first_steps(found, int(count)), posterior, "tempered")


class Settings(NamedTuple):
    """How many particles, and what is done with them at each temperature."""

    num_particles: int
    num_moves: int
    method: Method
    waste_free: bool

    @property
    def num_chains(self) -> int:
        """How many particles are resampled."""
        return self.num_particles // (self.num_moves + 1) if self.waste_free else self.num_particles


def check_settings(
    num_particles: int, num_moves: int, target_ess: float, max_temperatures: int, waste_free: bool
) -> None:
    """Refuse settings out of range."""
    whole = {"num_particles": num_particles, "num_moves": num_moves, "max_temperatures": max_temperatures}
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"an SMC sampler needs a whole {name} >= 1, got {value!r}.")
    if not 0.0 < target_ess < 1.0:
        raise ValueError(f"target_ess must be in (0, 1), got {target_ess}.")
    if waste_free and num_particles % (num_moves + 1):
        raise ValueError(
            f"waste-free SMC needs num_particles divisible by num_moves + 1, got {num_particles} and {num_moves}."
        )


class Cloud(NamedTuple):
    """Equally weighted particles of one temperature."""

    latents: Choices
    log_ratio: Float[Array, " n"]
    lineage: Lineage
    beta: Float[Array, ""]
    log_evidence: Float[Array, ""]


class Record(NamedTuple):
    """What one temperature told."""

    temperature: Any
    ess: Any
    log_evidence: Any
    acceptance_rate: Any
    parameters: Any
    variance: Any


def first_cloud(path: Path, num_particles: int) -> Cloud:
    """Draw the first particles; a keyless program."""
    latents, log_ratio = jax.vmap(lambda _: path.draw())(jnp.arange(num_particles))
    zero = jnp.zeros((), log_ratio.dtype)
    return Cloud(latents, log_ratio, Lineage.of(num_particles, log_ratio.dtype), zero, zero)


def to_temperature(
    path: Path, kernel: Kernel, settings: Settings, cloud: Cloud, beta: Any, parameters: Any, tuned: bool
) -> tuple[Cloud, Record]:
    """Weigh, resample and move: one step of the sampler, a keyless program."""
    log_weights = powered(beta - cloud.beta, cloud.log_ratio)
    log_evidence = cloud.log_evidence + log_mean_exp(log_weights)
    weights = normalized_weights(log_weights)
    target = path.at(beta)
    if tuned:
        parameters = with_shape_of(parameters, target, cloud.latents, log_weights)
    index = sample("ancestors", Ancestors(log_weights, settings.num_chains, settings.method))
    chosen = jax.tree.map(lambda x: x[index], cloud.latents)
    after = moved(kernel, target, chosen, parameters, settings.num_moves, every=settings.waste_free, tuned=tuned)
    latents = jax.tree.map(_joined, chosen, after.latents) if settings.waste_free else after.latents
    lineage = cloud.lineage.resampled(weights, index, settings.method, settings.num_particles // settings.num_chains)
    log_ratio = jax.vmap(path.log_ratio)(latents)
    ess, variance = effective_sample_size(log_weights), cloud.lineage.variance(weights)
    record = Record(beta, ess, log_evidence, after.acceptance_rate, after.parameters, variance)
    return Cloud(latents, log_ratio, lineage, jnp.asarray(beta), log_evidence), record


def _joined(first: Any, path: Any) -> Any:
    """Return the particles before and after each move as one population, chain by chain."""
    chains = jnp.concatenate([first[:, None], jnp.moveaxis(path, 0, 1)], axis=1)
    return jnp.reshape(chains, (-1, *chains.shape[2:]))


def _fixed(path: Path, kernel: Kernel, settings: Settings, schedule: Schedule) -> Sampled:
    """Run through fixed temperatures; a keyless program."""
    path = path.checked("tempered")
    cloud = first_cloud(path, settings.num_particles)
    betas = jnp.asarray(schedule.temperatures, cloud.beta.dtype)
    given = schedule.parameters
    start = unadapted(kernel, path.at(betas[0]), cloud.latents)
    tuned = given is None and tunable(start)

    def step(carry: Any, inputs: Any) -> Any:
        (cloud, parameters), (beta, own) = carry, inputs
        parameters = parameters if given is None else own
        cloud, record = to_temperature(path, kernel, settings, cloud, beta, parameters, tuned)
        return (cloud, record.parameters), record

    first = start_parameters(start, size_of(path.posterior)) if tuned else start
    (cloud, _), records = lax.scan(step, (cloud, first), (betas, given))
    return _result(cloud, records, records.variance[-1], unbiased=not tuned)


def size_of(posterior: Posterior) -> int:
    """Return how many numbers the latents are."""
    return sum(int(np.prod(s.shape)) for s in jax.tree.leaves(posterior.latent_shapes))


@compiled
def _fixed_keyed(path: Path, kernel: Kernel, settings: Settings, schedule: Schedule, key: Any) -> Sampled:
    return keyed(lambda: _fixed(path, kernel, settings, schedule))(key)


def _result(cloud: Cloud, records: Record, variance: Any, unbiased: bool) -> Sampled:
    particles = Particles(cloud.latents, jnp.zeros_like(cloud.log_ratio), cloud.log_evidence)
    return Sampled(
        particles,
        records.temperature,
        records.ess,
        records.log_evidence,
        records.acceptance_rate,
        jnp.ones_like(records.temperature, bool),
        records.parameters,
        variance,
        unbiased,
    )


@compiled
def _adaptive(
    path: Path, kernel: Kernel, settings: Settings, parameters: Any, target_ess: Any, most: int, key: Any
) -> tuple[Sampled, Any]:
    """Find the temperatures on the way; records past the last one repeat it."""
    path = path.checked("tempered")
    key_draw, key_run = jax.random.split(key)
    cloud = keyed(lambda: first_cloud(path, settings.num_particles))(key_draw)
    start = unadapted(kernel, path.at(jnp.ones_like(cloud.beta)), cloud.latents)
    tuned = parameters is None and tunable(start)
    if parameters is None:
        parameters = start_parameters(start, size_of(path.posterior)) if tuned else start

    def one(key: Any, count: Any, cloud: Cloud, parameters: Any) -> tuple[Cloud, Record]:
        beta = next_temperature(cloud.log_ratio, cloud.beta, target_ess)
        beta = jnp.where(count == most - 1, 1.0, beta)
        run = lambda: to_temperature(path, kernel, settings, cloud, beta, parameters, tuned)  # noqa: E731
        return keyed(run)(key)

    shapes = jax.eval_shape(one, key_run, 0, cloud, parameters)[1]
    records = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)

    def step(carry: Any) -> Any:
        key, count, cloud, parameters, records = carry
        key, own = jax.random.split(key)
        cloud, record = one(own, count, cloud, parameters)
        records = jax.tree.map(lambda all, new: all.at[count].set(new), records, record)
        return key, count + 1, cloud, record.parameters, records

    start = (key_run, jnp.zeros((), int), cloud, parameters, records)
    _, count, cloud, _, records = lax.while_loop(lambda carry: carry[2].beta < 1.0, step, start)
    reached = jnp.minimum(jnp.arange(most), count - 1)
    records = jax.tree.map(lambda x: x[reached], records)
    return _result(cloud, records, records.variance[-1], unbiased=False), count


def _first_steps(sampled: Sampled, count: int) -> Sampled:
    """Leave out what the adaptive schedule did not use; by numpy, which compiles nothing."""
    where = lambda s: (s.temperatures, s.ess, s.log_evidences, s.acceptance_rate, s.resampled, s.parameters)  # noqa: E731
    kept = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:count]), where(sampled))
    return eqx.tree_at(where, sampled, kept, is_leaf=lambda x: x is sampled.parameters)
