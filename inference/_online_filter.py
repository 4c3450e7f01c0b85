r"""A particle filter for a stream of observations, of a length that nobody knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import AddressError, ControlFlowError, Posterior, ShapeError, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._staging import check_key

from ._ancestors import Method
from ._filter_steps import Cloud, FilterSteps, Proposal
from ._particle_filter import check_settings
from ._particles import Particles
from ._sequence import Sequence


class OnlineState(NamedTuple):
    r"""Where an online filter stands.

    Example: see `online_filter`.

    Attributes:
        cloud: the particles on their way.
        time: how many observations it has seen.
        particles: the last step's latents with their weights: $p(x_t \mid y_{1:t})$, and the evidence so far.
        ess: their effective sample size.
    """

    cloud: Cloud
    time: Any
    particles: Particles
    ess: Any

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$ of all that has been observed; $\hat Z$ is unbiased."""
        return self.particles.log_evidence


class OnlineFilter(eqx.Module):
    """A filter that takes one observation at a time. Example: see `online_filter`."""

    posterior: Posterior
    num_particles: int = eqx.field(static=True)
    proposal: Proposal | None
    auxiliary: Proposal | None
    ess_threshold: float = eqx.field(static=True)
    method: Method = eqx.field(static=True)
    observed: tuple[tuple[str, tuple[int, ...], Any], ...] = eqx.field(static=True)

    def start(self, key: PRNGKeyArray) -> OnlineState:
        """Draw the particles before the first step.

        Args:
            key: a typed key.
        """
        check_key(key)
        return _start(self, key)

    def step(self, key: PRNGKeyArray, state: OnlineState, observation: Choices) -> OnlineState:
        """Filter one more observation.

        Args:
            key: a typed key, a new one for each step.
            state: where the filter stands.
            observation: nested dict of one step's observations, without a time axis.

        Raises:
            AddressError, ShapeError: the observation is not like the example's.
        """
        check_key(key)
        return _step(self, key, state.cloud, state.time, self._checked(observation))

    def steps(self) -> FilterSteps:
        """Return the model cut at its scan."""
        sequence = Sequence.of(self.posterior.program, "online_filter")
        num_consts, num_carry = _jax.scan_sizes(sequence.cut.scan)
        if len(sequence.cut.scan.invars) > num_consts + num_carry or sequence.has_more:
            raise ControlFlowError(
                f"online_filter: the scan at {_jax.place(sequence.cut.scan)} runs over inputs of its length, or has choices or "
                "data after it, which a stream without end has not. Count the time in the carry."
            )
        rest = (self.proposal, self.auxiliary, self.ess_threshold, self.method, "evidence")
        return FilterSteps(self.posterior, sequence, self.num_particles, *rest)

    def _checked(self, observation: Choices) -> Choices:
        """Return an observation in the types of the example's; refuse one that is not like it."""
        known = {path: (shape, dtype) for path, shape, dtype in self.observed}
        given = dict(leaves_of(observation))
        if set(given) != set(known):
            raise AddressError(f"online_filter: an observation has {sorted(known)}, got {sorted(given)}.")
        for path, (shape, _) in known.items():
            if jnp.shape(given[path]) != shape:
                raise ShapeError(
                    f"online_filter: {path!r} has the shape {shape} at each step, got {jnp.shape(given[path])}."
                )
        return nested((path, jnp.asarray(given[path], dtype)) for path, (_, dtype) in known.items())


def online_filter(
    posterior: Posterior,
    *,
    num_particles: int,
    proposal: Proposal | None = None,
    auxiliary: Proposal | None = None,
    ess_threshold: float = 0.5,
    method: Method = "systematic",
) -> OnlineFilter:
    r"""Filter a stream of unknown length, one observation at a time; the same steps as `particle_filter`.

    Args:
        posterior: the model with a scan of any length, given observations of the right shapes, whose values do not matter;
            observations before the scan count.
        num_particles: how many particles.
        proposal: as in `particle_filter`.
        auxiliary: as in `particle_filter`.
        ess_threshold: as in `particle_filter`.
        method: as in `particle_filter`.

    Returns:
        An `OnlineFilter` with `start(key)` and `step(key, state, observation)`; after its first call a step compiles
        nothing, and it takes the same memory for ever.

    Raises:
        ValueError: a setting is out of range.
        ControlFlowError: at `start`, if the scan runs over inputs, or sites stand after it.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def walk():
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, 1.0))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=1)
        >>> online = inference.online_filter(walk().given({"y": jnp.zeros(1)}), num_particles=2000)
        >>> state = online.start(jax.random.key(0))
        >>> for time, y in enumerate([0.5, 1.0, 0.0]):
        ...     state = online.step(jax.random.key(time + 1), state, {"y": y})
        >>> bool(abs(state.log_evidence + 4.076) < 0.3)  # exactly -4.076
        True
    """
    check_settings(num_particles, ess_threshold, method)
    observations = Sequence.of(posterior.program, "online_filter").observed(posterior.observations)
    for path, y in leaves_of(observations):
        if isinstance(y, Masked):
            raise ShapeError(f"online_filter: give an example of {path!r} that is whole.")
    observed = tuple((path, jnp.shape(y)[1:], jnp.result_type(y)) for path, y in leaves_of(observations))
    return OnlineFilter(posterior, num_particles, proposal, auxiliary, float(ess_threshold), method, observed)


@compiled
def _start(online: OnlineFilter, key: Any) -> OnlineState:
    def run(online: OnlineFilter) -> OnlineState:
        cloud, _, _ = online.steps().start()
        particles = Particles(cloud.before, cloud.log_weights, cloud.log_offset)
        return OnlineState(cloud, jnp.asarray(0), particles, jnp.asarray(1.0 * online.num_particles))

    return _typed(keyed(run)(key, online))


def _typed(state: OnlineState) -> OnlineState:
    """Return a state without weak types, so that all steps are one program."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), state)


@compiled
def _step(online: OnlineFilter, key: Any, cloud: Cloud, time: Any, observation: Choices) -> OnlineState:
    return _typed(keyed(stepped)(key, online, cloud, time, observation))


def stepped(online: OnlineFilter, cloud: Cloud, time: Any, observation: Choices) -> OnlineState:
    """Do one step, as a keyless program."""
    steps = online.steps()._replace(store="filtering")
    cloud, record = steps.step(cloud, time, observation)
    particles = Particles(merged(cloud.before, record.choices), cloud.log_weights, cloud.log_offset)
    return OnlineState(cloud, time + 1, particles, record.ess)
