r"""SMC over a sequence of posteriors of the same latents: with growing data (IBIS), or with other parameters.

$w_t = w_{t-1}\, \gamma_t(z) / \gamma_{t-1}(z)$; where the weights have become too uneven, particles are resampled and moved
by a kernel that leaves $\gamma_t$ invariant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import AddressError, Posterior, Program, ShapeError, sample
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._staging import check_key
from expectax.ppl._transforms import _mask

from ._ancestors import Ancestors, Method, check_method
from ._kernel import Kernel, check_kernel_value
from ._lineage import Lineage
from ._moves import moved, start_parameters, tunable, unadapted, with_shape_of
from ._particles import Particles
from ._path import Path
from ._population import weighed
from ._sampled import Sampled, Schedule, check_sampled
from ._target import Target
from ._tempered import check_settings, size_of
from ._weights import effective_sample_size, log_mean_exp, log_ratio, normalized_weights

Family = Callable[[Any], Posterior]


def smc_over(
    posteriors: Sequence[Posterior] | Family,
    kernel: Kernel,
    *,
    key: PRNGKeyArray | None = None,
    num_particles: int,
    num_steps: int | None = None,
    threshold: float = 0.5,
    schedule: Schedule | None = None,
    num_moves: int = 5,
    proposal: Program | None = None,
    parameters: Any = None,
    method: Method = "systematic",
) -> Sampled:
    r"""Sample one posterior after the other, each from the particles of the one before; with the evidence of each.

    Args:
        posteriors: targets with the same latents, nearest ones side by side: a list, or a function of a whole number (it
            may be traced) that returns one. A list of one model with numbers of the same shapes compiles as one step.
        kernel: a `Kernel`, such as `hmc()`.
        key: a typed key; without one the run is a keyless program.
        num_particles: how many.
        num_steps: how many posteriors, of a function.
        threshold: resample and move where the effective sample size falls below this fraction of the particles, in
            [0, 1]; 1 always does. Between 0 and 1 it is the particles that decide whether they are moved, and those of
            which they decide so are not distributed as the target: consistent, but not exactly unbiased (resampling alone
            would be).
        schedule: of an earlier run (`freeze_schedule`), which then says when to resample and move and with which
            parameters, in place of `threshold`.
        num_moves: kernel steps of each particle at such a posterior.
        proposal: of the first posterior, a bound program; None for its prior along the run.
        parameters: of the kernel; by default tuned from the particles, as in `tempered`.
        method: of resampling, as in `ancestors`.

    Returns:
        `Sampled`: weighted particles of the last posterior; `log_evidences` has the evidence of each one. Unbiased with a
        `schedule`, or with fixed parameters and a threshold of 1.

    Raises:
        ValueError: a setting is out of range.
        AddressError, ShapeError: two posteriors differ in their latents.
        NonFiniteError: all weights of a step are zero, or one is nan.

    Sources: Chopin 2002; Del Moral, Doucet and Jasra 2006.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model(scale):
        ...     z = ex.sample("z", dist.Normal(0.0, scale))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> family = [model(scale).given({"y": 2.0}) for scale in (1.0, 1.5, 2.0)]
        >>> kernel = inference.hmc(num_integration_steps=3)
        >>> found = inference.smc_over(family, kernel, key=jax.random.key(0), num_particles=2000)
        >>> bool(abs(found.log_evidences[1] + 2.124) < 0.1)  # exactly -2.124
        True
    """
    family, steps = _family(posteriors, num_steps)
    settings = _Settings(
        num_particles, threshold, num_moves, check_method(method, num_particles, num_particles), schedule
    )
    return _run(family, steps, kernel, key, settings, proposal, parameters, "smc_over")


def data_tempered(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray | None = None,
    num_particles: int,
    num_batches: int | None = None,
    threshold: float = 0.5,
    schedule: Schedule | None = None,
    num_moves: int = 5,
    proposal: Program | None = None,
    parameters: Any = None,
    method: Method = "systematic",
) -> Sampled:
    r"""Sample a posterior by letting its data in bit by bit (IBIS), with the evidence of the data so far.

    Step $t$ has the first $n_t$ of $n$ data, $n_t = \lceil t n / T \rceil$: the first axis of every observed site, the others
    being masked. For targets that grow in another way see `smc_over`.

    Args:
        posterior: the target; the first axes of its observations, of lanes or time steps, have one length $n$.
        kernel: a `Kernel`, such as `hmc()`.
        key: a typed key; without one the run is a keyless program.
        num_particles: how many.
        num_batches: $T$, at most $n$; None for one datum at a time.
        threshold: as in `smc_over`.
        schedule: as in `smc_over`.
        num_moves: as in `smc_over`.
        proposal: for the posterior of the first batch; None for the prior along the run.
        parameters: as in `smc_over`.
        method: as in `smc_over`.

    Returns:
        `Sampled`; `log_evidences` are $\log p(y_{1:n_t})$.

    Raises:
        ShapeError: the observed sites have no common first axis.
        ValueError, NonFiniteError: as in `smc_over`.

    Source: Chopin 2002, "A sequential particle filter method for static models".

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     jax.vmap(lambda _: ex.sample("y", dist.Normal(z, 1.0)))(jnp.arange(4))
        >>> posterior = model().given({"y": jnp.array([0.5, 1.0, 0.0, 2.0])})
        >>> kernel = inference.hmc(num_integration_steps=3)
        >>> found = inference.data_tempered(posterior, kernel, key=jax.random.key(0), num_particles=2000)
        >>> bool(abs(found.log_evidences[0] + 1.328) < 0.1), found.log_evidences.shape  # exactly -1.328
        (True, (4,))
    """
    length = _data_length(posterior)
    steps = length if num_batches is None else num_batches
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= length:
        raise ValueError(
            f"data_tempered needs num_batches from 1 to the number of data, {length}, got {num_batches!r}."
        )
    family = _Growing(posterior, length, steps)
    settings = _Settings(
        num_particles, threshold, num_moves, check_method(method, num_particles, num_particles), schedule
    )
    return _run(family, steps, kernel, key, settings, proposal, parameters, "data_tempered")


# --- families -------------------------------------------------------------------------------------------------------


class _Growing(eqx.Module):
    """The posteriors of the first data."""

    posterior: Posterior
    length: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __call__(self, step: Any) -> Posterior:
        count = ((step + 1) * self.length + self.steps - 1) // self.steps
        program, observations = self.posterior.program, self.posterior.observations
        sites = dict(leaves_of(program.table()))

        def shown(path: str) -> Any:
            elements = sites[path].elements
            first = jnp.arange(self.length) < count
            return jnp.broadcast_to(jnp.reshape(first, (-1,) + (1,) * (len(elements) - 1)), elements)

        flags = nested((path, shown(path)) for path, _ in leaves_of(observations))
        return Posterior(_mask(program, flags), observations)


def _data_length(posterior: Posterior) -> int:
    sites = dict(leaves_of(posterior.program.table()))
    found = {path: sites[path].elements[:1] for path, _ in leaves_of(posterior.observations)}
    if len(set(found.values())) != 1 or () in found.values():
        shown = ", ".join(f"{path!r} {sites[path].elements}" for path in found)
        raise ShapeError(
            f"data_tempered: the observed sites must have lanes or time steps of one number in front, got {shown or 'none'}. "
            "Use smc_over with posteriors of your own."
        )
    return next(iter(found.values()))[0]


class _Stacked(eqx.Module):
    """Posteriors that differ in their numbers alone: one, with a first axis."""

    arrays: Any
    rest: Any

    def __call__(self, step: Any) -> Posterior:
        return eqx.combine(jax.tree.map(lambda x: x[step], self.arrays), self.rest)


def _family(posteriors: Any, num_steps: int | None) -> tuple[Any, int]:
    """Return a function of the step (or a list, to be written out), and the number of steps."""
    if callable(posteriors):
        if num_steps is None or num_steps < 1:
            raise ValueError(f"smc_over needs num_steps >= 1 for a function of the step, got {num_steps!r}.")
        return posteriors, num_steps
    listed = list(posteriors)
    if not listed or not all(isinstance(p, Posterior) for p in listed):
        raise TypeError(
            f"smc_over needs a list of posteriors, model(...).given(...), or a function, got {posteriors!r}."
        )
    first = listed[0].latent_shapes
    for number, other in enumerate(listed[1:], 1):
        shapes = other.latent_shapes
        if jax.tree.structure(shapes) != jax.tree.structure(first):
            names = [", ".join(path for path, _ in leaves_of(s)) for s in (first, shapes)]
            raise AddressError(
                f"smc_over: the latents of posterior {number}, {names[1]}, are not those of the first, {names[0]}."
            )
        for (path, a), (_, b) in zip(leaves_of(first), leaves_of(shapes), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ShapeError(
                    f"smc_over: {path!r} has shape {b.shape} in posterior {number}, but {a.shape} in the first."
                )
    parts = [eqx.partition(posterior, eqx.is_array) for posterior in listed]
    alike = lambda a, b: jax.tree.structure(a) == jax.tree.structure(b)  # noqa: E731
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(arrays)] for arrays, _ in parts]
    if all(alike(p[0], parts[0][0]) and eqx.tree_equal(p[1], parts[0][1]) is True for p in parts) and all(
        s == shapes[0] for s in shapes
    ):
        return _Stacked(jax.tree.map(lambda *xs: jnp.stack(xs), *(arrays for arrays, _ in parts)), parts[0][1]), len(
            parts
        )
    return listed, len(listed)


# --- the run ----------------------------------------------------------------------------------------------------------


class _Cloud(NamedTuple):
    latents: Choices
    log_density: Float[Array, " n"]
    log_weights: Float[Array, " n"]
    log_offset: Float[Array, ""]
    lineage: Lineage
    parameters: Any


class _Settings(eqx.Module):
    num_particles: int
    threshold: float = eqx.field(static=True)
    num_moves: int
    method: Method
    schedule: Schedule | None


def _run(
    family: Any, steps: int, kernel: Any, key: Any, settings: _Settings, proposal: Any, parameters: Any, what: str
) -> Sampled:
    check_kernel_value(kernel, what)
    check_settings(settings.num_particles, settings.num_moves, 0.5, 1, False)
    if not 0.0 <= settings.threshold <= 1.0:
        raise ValueError(f"{what} needs a threshold in [0, 1], got {settings.threshold}.")
    if settings.schedule is not None:
        if parameters is not None or settings.schedule.resampled is None:
            raise ValueError(f"{what}: a schedule is that of an earlier run, and has the kernel's parameters.")
        if settings.schedule.resampled.shape != (steps,):
            raise ShapeError(f"{what}: the schedule has {settings.schedule.resampled.shape[0]} steps, not {steps}.")
    at = cast(Family, family if callable(family) else family.__getitem__)
    arguments = (family, steps, kernel, parameters, settings, proposal, what)
    if key is None:
        return _keyless(*arguments)
    check_key(key)
    return check_sampled(_with_key(key, *arguments), at(steps - 1), what)


@compiled
def _with_key(key: Any, *arguments: Any) -> Sampled:
    return keyed(lambda: _keyless(*arguments))(key)


def _keyless(
    family: Any, steps: int, kernel: Kernel, parameters: Any, settings: _Settings, proposal: Any, what: str
) -> Sampled:
    at = cast(Family, family if callable(family) else family.__getitem__)
    path = Path(at(0), proposal).checked(what)
    latents, log_weights = jax.vmap(lambda _: path.draw())(jnp.arange(settings.num_particles))
    start = unadapted(kernel, Target(path.posterior), latents)
    tuned = parameters is None and settings.schedule is None and tunable(start)
    if parameters is None:
        parameters = start_parameters(start, size_of(path.posterior)) if tuned else start
    density = jax.vmap(path.posterior.log_density_inside)(latents)
    zero, lineage = jnp.zeros((), log_weights.dtype), Lineage.of(settings.num_particles, log_weights.dtype)
    cloud = _Cloud(latents, density, log_weights, zero, lineage, parameters)
    frozen = settings.schedule
    own = (None, None) if frozen is None else (frozen.parameters, frozen.resampled)
    cloud, first = _after_weighing(path.posterior, kernel, settings, tuned, cloud, jax.tree.map(lambda x: x[0], own))

    def step(cloud: _Cloud, inputs: Any) -> Any:
        number, own = inputs
        posterior = at(number)
        density = jax.vmap(posterior.log_density_inside)(cloud.latents)
        change = log_ratio(density, cloud.log_density)
        cloud = cloud._replace(log_density=density, log_weights=weighed(cloud.log_weights, change))
        return _after_weighing(posterior, kernel, settings, tuned, cloud, own)

    if callable(family):
        cloud, later = lax.scan(step, cloud, (jnp.arange(1, steps), jax.tree.map(lambda x: x[1:], own)))
        records = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
    else:
        found = [first]
        for number in range(1, steps):
            cloud, record = step(cloud, (number, jax.tree.map(lambda x, n=number: x[n], own)))
            found.append(record)
        records = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
    particles = Particles(cloud.latents, cloud.log_weights, cloud.log_offset)
    decided = frozen is not None or settings.threshold in (0.0, 1.0)
    ess, log_evidences, rates, resampled, used, variances = records
    return Sampled(
        particles,
        jnp.ones(steps, zero.dtype),
        ess,
        log_evidences,
        rates,
        resampled,
        used,
        variances[-1],
        unbiased=decided and not tuned,
    )


def _after_weighing(
    posterior: Posterior, kernel: Kernel, settings: _Settings, tuned: bool, cloud: _Cloud, frozen: tuple[Any, Any]
) -> tuple[_Cloud, Any]:
    """Resample and move, where the weights are too uneven or the schedule says so; a keyless program."""
    weights = normalized_weights(cloud.log_weights)
    log_evidence = log_mean_exp(cloud.log_weights) + cloud.log_offset
    ess, variance = effective_sample_size(cloud.log_weights), cloud.lineage.variance(weights)

    def renewed(cloud: _Cloud) -> tuple[_Cloud, Any]:
        target, parameters = Target(posterior), cloud.parameters if frozen[1] is None else frozen[0]
        if tuned:
            parameters = with_shape_of(parameters, target, cloud.latents, cloud.log_weights)
        index = sample("ancestors", Ancestors(cloud.log_weights, method=settings.method))
        chosen = jax.tree.map(lambda x: x[index], cloud.latents)
        after = moved(kernel, target, chosen, parameters, settings.num_moves, tuned=tuned)
        density = jax.vmap(posterior.log_density_inside)(after.latents)
        lineage = cloud.lineage.resampled(weights, index, settings.method)
        zeros = jnp.zeros_like(cloud.log_weights)
        rate = after.acceptance_rate.astype(zeros.dtype)
        return _Cloud(after.latents, density, zeros, log_evidence, lineage, after.parameters), rate

    needed = ess < settings.threshold * weights.shape[0] if frozen[1] is None else frozen[1]
    if settings.threshold == 1.0 and frozen[1] is None:
        needed, (after, rate) = jnp.ones((), bool), renewed(cloud)
    else:
        nothing = jnp.full((), jnp.nan, cloud.log_weights.dtype)
        after, rate = lax.cond(needed, renewed, lambda cloud: (cloud, nothing), cloud)
    return after, (ess, log_evidence, rate, needed, after.parameters, variance)
