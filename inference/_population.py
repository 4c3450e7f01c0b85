r"""Particle algorithms, verb by verb: each takes a population and returns one, and leaves what it stands for alone.

A population stands for an unnormalised density $\gamma$: $\hat Z\, \frac1n \sum_i w_i f(z_i)$ has the mean
$\int \gamma f$ (it is *properly weighted*). Every verb keeps that law, for a new $\gamma$ where it says so; then so does every
program that is made of them. All are keyless programs, so that `inference.exact` can check the whole.

Sources: Scibior et al. 2018, "Denotational validation of higher-order Bayesian inference" (the decomposition); Del Moral,
Doucet and Jasra 2006; Naesseth, Lindsten and Schön 2015 (proper weighting).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from expectax.ppl import AddressError, Posterior, Program, ShapeError, _jax, sample
from expectax.ppl._masked import Masked
from expectax.ppl._match import check_drawn, check_guide
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._posterior import check_posterior
from expectax.ppl._program import bound_program

from ._ancestors import Ancestors, Method
from ._filter_steps import FilterSteps
from ._kernel import Kernel
from ._moves import moved, unadapted
from ._on import check_memoryless
from ._particles import Particles
from ._sequence import Sequence, prefix
from ._target import Target
from ._weights import effective_sample_size, log_mean_exp, log_ratio, weighed


class Population(eqx.Module):
    r"""Weighted particles on their way through the steps of a model, or from one posterior to another.

    Example: see `spawn`.

    Attributes:
        posterior: the whole posterior.
        latents: nested dict of values, particles first; of a scan's choices then `time` steps.
        log_weights: shape `(num_particles,)`.
        log_offset: a number to add to every log weight.
        state: where each particle stands in the scan.
        time: how many steps have been done; None where the population stands for the whole posterior.
    """

    posterior: Posterior
    latents: Choices
    log_weights: Float[Array, " n"]
    log_offset: Float[Array, ""]
    state: Any = ()
    time: int | None = eqx.field(static=True, default=None)

    @property
    def target(self) -> Posterior:
        r"""The posterior that the particles stand for now: $\gamma_t$."""
        return self.posterior if self.time is None else prefix(self.posterior, self.time, "a population")

    @property
    def particles(self) -> Particles:
        """The particles as a result."""
        return Particles(self.latents, self.log_weights, self.log_offset)

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$ of the present target."""
        return log_mean_exp(self.log_weights) + self.log_offset


def spawn(
    posterior: Posterior, num_particles: int, *, proposal: Program | None = None, time: int | None = None
) -> Population:
    r"""Draw and weigh a population: $w = \gamma(z) / q(z)$.

    Args:
        posterior: the target.
        num_particles: at least 1.
        proposal: a bound program whose sites are the latents; None for the prior along the run.
        time: 0 to stop before the model's scan, whose steps then are done by `advance`; None for the whole posterior.

    Returns:
        A `Population`, from a keyless program.

    Raises:
        ValueError: `num_particles` is less than 1, `time` is not 0, or a proposal is given for a run in time.
        ControlFlowError: `time=0`, and the model has not exactly one scan with sites.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def walk():
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, 1.0))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=3)
        >>> posterior = walk().given({"y": jnp.array([0.5, 1.0, 0.0])})
        >>> def filtered():
        ...     cloud = inference.spawn(posterior, 1000, time=0)
        ...     for _ in range(3):
        ...         cloud = inference.advance(inference.resample(cloud))
        ...     return cloud.log_evidence
        >>> bool(abs(inference.keyed(filtered)(jax.random.key(0)) + 4.076) < 0.3)  # exactly -4.076
        True
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"spawn needs a whole num_particles >= 1, got {num_particles!r}.")
    if time not in (None, 0) or (time == 0 and proposal is not None):
        raise ValueError("spawn takes time=0 or None, and a proposal only for the whole posterior: give it to advance.")
    check_posterior(posterior, "spawn")
    refuse_missing(posterior, "spawn")
    target = posterior if time is None else prefix(posterior, 0, "spawn")
    if proposal is not None:
        check_guide(proposal, target, _jax.caller(), covering=True)

    def particle(_: Any) -> Any:
        if proposal is None:
            outcome = target.program.rebind(target.observations)
            return target.latents(outcome.choices), outcome.log_weight, outcome.outputs
        outcome = proposal.rebind()
        return outcome.choices, target.log_density_inside(outcome.choices) - outcome.log_density, []

    latents, log_weights, outputs = jax.vmap(particle)(jnp.arange(num_particles))
    state = outputs if time == 0 else ()
    return Population(posterior, latents, log_weights, jnp.zeros((), log_weights.dtype), state, time)


def advance(population: Population, *, proposal: Any = None) -> Population:
    r"""Do the next step of the model's scan: $w' = w\, \frac{\gamma_{t+1}(z_{1:t+1})}{\gamma_t(z_{1:t})\, q(z_{t+1})}$.

    Args:
        population: of a run in time (`spawn(..., time=0)`).
        proposal: as in `particle_filter`: `proposal(context)`, a bound program whose sites are the step's latents; None
            for the model's own step (a bootstrap filter).

    Returns:
        The population one step on, from a keyless program.

    Raises:
        ValueError: the population is not in time, or all steps are done.
        AddressError, ShapeError: the proposal's sites are not the step's latents.

    Source: Gordon, Salmond and Smith 1993; Doucet, Godsill and Andrieu 2000 (guided).

    Example: see `spawn`.
    """
    if population.time is None:
        raise ValueError("advance needs a population in time: spawn(posterior, n, time=0).")
    posterior, time = population.posterior, population.time
    sequence = Sequence.of(posterior.program, "advance")
    if time >= sequence.length:
        raise ValueError(f"advance: all {sequence.length} steps of the scan have been done.")
    steps = FilterSteps(posterior, sequence, population.log_weights.shape[0], proposal)
    observed, reverse = sequence.at(posterior.observations, time), sequence.cut.scan.params["reverse"]
    names = sequence.addresses

    def particle(state: Any, latents: Choices) -> Any:
        before = {a: x for a, x in latents.items() if a not in names}
        state, new, _, change = steps.moved(state, before, time, observed)
        return state, _appended(latents, new, reverse), change

    state, latents, change = jax.vmap(particle)(population.state, population.latents)
    log_weights = weighed(population.log_weights, change)
    return Population(posterior, latents, log_weights, population.log_offset, state, time + 1)


def _proposed(proposal: Any, *args: Any) -> tuple[Choices, Any]:
    """Draw from a proposal, if there is one; return its choices and their log density."""
    if proposal is None:
        return {}, 0.0
    program = bound_program(proposal(*args), "the proposal")
    check_drawn(program.table(), "the proposal")
    outcome = program.rebind()
    return outcome.choices, outcome.log_density


def _appended(latents: Choices, new: Choices, reverse: bool) -> Choices:
    """Return latents with one more step; time goes backwards where the scan does."""
    known = dict(leaves_of(latents))

    def row(path: str, x: Any) -> Any:
        now = jnp.asarray(x)[None]
        if path not in known:
            return now
        return jnp.concatenate([now, known[path]] if reverse else [known[path], now])

    return merged(latents, nested((path, row(path, x)) for path, x in leaves_of(new)))


def resample(population: Population, method: Method = "systematic", threshold: float = 1.0) -> Population:
    r"""Choose the particles that go on, in proportion to their weights; the others' mean weight stays as a factor.

    Args:
        population: any.
        method: as in `ancestors`.
        threshold: resample only where the effective sample size is below this fraction of the particles; 1 always does.

    Returns:
        A population for the same target, from a keyless program; equally weighted where it was resampled.

    Raises:
        ValueError: the method is unknown, or the threshold outside [0, 1].

    Source: Gordon, Salmond and Smith 1993; Liu and Chen 1995 (threshold).

    Example: see `spawn`.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"resample needs a threshold in [0, 1], got {threshold}.")
    count = population.log_weights.shape[0]

    def chosen(population: Population) -> Population:
        index = sample("ancestors", Ancestors(population.log_weights, method=method))
        latents, state = jax.tree.map(lambda x: x[index], (population.latents, population.state))
        zeros = jnp.zeros_like(population.log_weights)
        return _replaced(population, latents, zeros, population.log_evidence, state)

    if threshold == 1.0:
        return chosen(population)
    arrays, rest = eqx.partition(population, eqx.is_array)
    needed = effective_sample_size(population.log_weights) < threshold * count
    moved = lambda a: eqx.filter(chosen(eqx.combine(a, rest)), eqx.is_array)  # noqa: E731
    return eqx.combine(lax.cond(needed, moved, lambda a: a, arrays), rest)


def reweight(population: Population, posterior: Posterior) -> Population:
    r"""Let the particles stand for another density of the same latents: $w' = w\, \gamma'(z) / \gamma(z)$.

    Args:
        population: of a whole posterior.
        posterior: the new target, with the same latents.

    Returns:
        A population for the new target.

    Raises:
        ValueError: the population is in time.
        AddressError, ShapeError: the latents differ.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model(scale):
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, scale))
        >>> wide, narrow = model(3.0).given({"y": 1.0}), model(1.0).given({"y": 1.0})
        >>> def run():
        ...     return inference.reweight(inference.spawn(wide, 10_000), narrow).log_evidence
        >>> bool(abs(inference.keyed(run)(jax.random.key(0)) + 1.5155) < 0.05)  # exactly -1.5155
        True
    """
    whole(population, "reweight")
    refuse_missing(posterior, "reweight")
    before = population.posterior
    ratio = lambda z: log_ratio(posterior.log_density_inside(z), before.log_density_inside(z))  # noqa: E731
    weights = weighed(population.log_weights, jax.vmap(ratio)(population.latents))
    return Population(posterior, population.latents, weights, population.log_offset)


def extend(population: Population, posterior: Posterior, *, proposal: Any = None) -> Population:
    r"""Go on to a posterior with more latents: $w' = w\, \frac{\gamma'(z, u)}{\gamma(z)\, q(u \mid z)}$.

    Args:
        population: of a whole posterior.
        posterior: a target with the population's latents and others, such as a model with more data.
        proposal: `proposal(latents)`, a bound program whose sites are the new latents; None for the prior along the run.

    Returns:
        A population for the new target, from a keyless program.

    Raises:
        ValueError: the population is in time.
        AddressError, ShapeError: the new target lacks a latent of the old one, or has it in another shape.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def chain(length):
        ...     z = 0.0
        ...     for t in range(length):
        ...         z = ex.sample(f"z{t}", dist.Normal(z, 1.0))
        ...         ex.sample(f"y{t}", dist.Normal(z, 1.0))
        >>> def run():
        ...     cloud = inference.spawn(chain(1).given({"y0": 0.5}), 5000)
        ...     cloud = inference.extend(inference.resample(cloud), chain(2).given({"y0": 0.5, "y1": 1.0}))
        ...     return cloud.log_evidence
        >>> bool(abs(inference.keyed(run)(jax.random.key(0)) + 2.716) < 0.1)  # exactly -2.716
        True
    """
    whole(population, "extend")
    refuse_missing(posterior, "extend")
    before = population.posterior

    def particle(z: Choices) -> Any:
        drawn, log_q = _proposed(proposal, z)
        _check_new(z, posterior, drawn)
        given = merged(z, posterior.observations, drawn)
        posterior.program.given(given)  # names and shapes
        outcome = posterior.program.rebind(given)
        latents = posterior.latents(outcome.choices)
        return latents, log_ratio(outcome.log_weight - log_q, before.log_density_inside(z))

    latents, ratio = jax.vmap(particle)(population.latents)
    return Population(posterior, latents, weighed(population.log_weights, ratio), population.log_offset)


def _check_new(old: Choices, posterior: Posterior, drawn: Choices) -> None:
    """Refuse to observe what the particles have chosen, and to draw what is no new latent."""
    before, after = {path for path, _ in leaves_of(old)}, {path for path, _ in leaves_of(posterior.latent_sites())}
    if lost := sorted(before - after):
        raise AddressError(
            f"extend: {lost[0]!r} is a latent of the population, but none of the new posterior. Use change to leave it behind."
        )
    for path, _ in leaves_of(drawn):
        if path in before or path not in after:
            raise AddressError(
                f"extend: the proposal draws {path!r}, which is "
                + (
                    "an old latent; use rejuvenate or change to move it."
                    if path in before
                    else "no latent of the new posterior."
                )
            )


def rejuvenate(population: Population, kernel: Kernel, parameters: Any = None, *, num_steps: int = 1) -> Population:
    r"""Move every particle by a kernel that leaves the present target invariant; no weight changes.

    Args:
        population: any; in time, whole trajectories so far are moved.
        kernel: for instance `mh(...)`, `gibbs(...)`, `nuts()`.
        parameters: the kernel's, as its adaptation returns them; None for those of a chain without warm-up.
        num_steps: how often it is applied.

    Returns:
        A population for the same target, from a keyless program.

    Source: Gilks and Berzuini 2001 (resample-move); Chopin 2002.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> def run():
        ...     cloud = inference.resample(inference.spawn(posterior, 2000))
        ...     step = {"step_size": jnp.asarray(0.5), "inverse_mass_matrix": jnp.ones(1)}
        ...     return inference.rejuvenate(cloud, inference.hmc(), step).particles.mean()["z"]
        >>> bool(abs(inference.keyed(run)(jax.random.key(0)) - 0.5) < 0.1)
        True
    """
    check_memoryless(kernel, "rejuvenate")
    target = Target(population.target)
    refuse_missing(population.posterior, "rejuvenate")

    own = unadapted(kernel, target, population.latents) if parameters is None else parameters
    latents = moved(kernel, target, population.latents, own, num_steps).latents
    state = population.state
    if population.time is not None:
        program, observations = target.posterior.program, target.posterior.observations
        state = jax.vmap(lambda z: program.rebind(merged(z, observations)).outputs)(latents)
    return _replaced(population, latents, population.log_weights, population.log_offset, state)


def _replaced(population: Population, latents: Any, log_weights: Any, log_offset: Any, state: Any) -> Population:
    return Population(population.posterior, latents, log_weights, log_offset, state, population.time)


def whole(population: Population, what: str) -> None:
    if population.time is not None:
        raise ValueError(f"{what} needs a population of a whole posterior, not one in time: spawn(posterior, n).")


def refuse_missing(posterior: Posterior, what: str) -> None:
    for path, y in leaves_of(posterior.observations):
        if isinstance(y, Masked):
            raise ShapeError(
                f"{what}: the data of {path!r} are given in part. Give them whole, or use particle_filter."
            )
