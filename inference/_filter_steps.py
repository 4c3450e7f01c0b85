r"""The particle filter's steps, as a keyless program: resample, propose, weigh.

With look-ahead weights $\eta$ and proposals $q$ (both optional), the step from $x_{t-1}$ to $x_t$ is: where the effective
sample size of $w \eta$ is low, draw ancestors in proportion to $w \eta$, and let

$$ w \leftarrow \frac{\overline{w \eta}}{\eta(x_{t-1}^a)}; \qquad
   w \leftarrow w\, \frac{p(x_t, y_t \mid x_{t-1})}{q(x_t \mid x_{t-1}, y_t)}. $$

Whatever positive $\eta$ and $q$ are, and whatever decides to resample as long as it looks at the past only,
$\frac1n \sum_i w_i f(x^i_{1:t})$ has the mean $\int \gamma_t f$: given the past both assignments keep it. Sources: Gordon,
Salmond and Smith 1993 (bootstrap); Doucet, Godsill and Andrieu 2000 (guided); Pitt and Shephard 1999, in the form of
Johansen and Doucet 2008 (auxiliary); Whiteley, Lee and Heine 2016 (resampling by need keeps the evidence unbiased).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import AddressError, Posterior, ShapeError, _jax, sample
from expectax.ppl._evaluate import walk
from expectax.ppl._masked import Masked
from expectax.ppl._match import check_drawn
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._program import bound_program
from expectax.ppl._staging import scalar
from expectax.ppl._visitors import rebinding

from ._ancestors import Ancestors, Method
from ._sequence import Sequence
from ._weights import log_mean_and_size, weighed

_DEEPEST = 10.0
"""How far below the largest look-ahead weight another one may lie: a particle with weight must stay possible, also in
float32."""


class StepContext(NamedTuple):
    """What a proposal or a look-ahead weight may see before one step of one particle.

    Example: see `particle_filter`.

    Attributes:
        carry: the scan's carry; where it is several arrays, the list of them in JAX's order (`jax.tree.leaves`).
        before: nested dict of the particle's latents before the scan.
        observed: nested dict of the step's observations.
        time: how many steps have been done.
    """

    carry: Any
    before: Choices
    observed: Choices
    time: Any


Proposal = Callable[[StepContext], Any]


class Cloud(NamedTuple):
    """The particles on their way: where each stands in the scan, its latents before it, the weights, the Eve indices.

    `log_mean` and `ess` are those of the weights.
    """

    state: list[Any]
    before: Choices
    log_weights: Any
    log_offset: Any
    eves: Any
    log_mean: Any
    ess: Any


class Record(NamedTuple):
    """What a step leaves behind; None for what is not to be kept."""

    ess: Any
    resampled: Any
    ancestors: Any = None
    choices: Any = None
    log_weights: Any = None
    outputs: Any = None


class FilterSteps(NamedTuple):
    """A posterior cut at its scan, and how it is filtered."""

    posterior: Posterior
    sequence: Sequence
    num_particles: int
    proposal: Proposal | None = None
    auxiliary: Proposal | None = None
    threshold: float = 0.5
    method: Method = "systematic"
    store: str = "trajectories"

    def run_before(self, given: Choices | None = None) -> tuple[dict[Any, Any], Choices, Any]:
        """Run one particle up to the scan: its values, its choices, its log weight."""
        env = _jax.Environment(self.sequence.shared)
        given = self.posterior.observations if given is None else given
        outcome = walk(self.sequence.cut.before, env, rebinding, iter(()), given)
        names = [v for eqn in self.sequence.cut.before for v in eqn.outvars]
        return {v: env[v] for v in names}, outcome.choices, as_weight(outcome.log_weight)

    def states_of(self, values: dict[Any, Any]) -> list[Any]:
        """Return the scan's own inputs of every particle, of the values before it."""
        return [
            values[v]
            if not isinstance(v, _jax.Literal) and v in values
            else self._repeated(self.sequence.shared.read(v))
            for v, own in zip(self.sequence.cut.scan.invars, self.sequence.owned(), strict=True)
            if own
        ]

    def _repeated(self, value: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(value), (self.num_particles, *jnp.shape(value)))

    def start(self) -> tuple[Cloud, dict[Any, Any], Choices]:
        """Draw what stands before the scan, once for each particle; return also its values and choices."""
        ordered = [v for eqn in self.sequence.cut.before for v in eqn.outvars]

        def particle(_: Any) -> Any:
            values, choices, log_weight = self.run_before()
            return [values[v] for v in ordered], choices, log_weight

        values, choices, log_weights = jax.vmap(particle)(jnp.arange(self.num_particles))
        values = dict(zip(ordered, values, strict=True))
        carried = self.store != "trajectories" or self.proposal is not None or self.auxiliary is not None
        before = self.posterior.latents(choices) if carried else {}
        eves = jnp.arange(self.num_particles)
        cloud = Cloud(self.states_of(values), before, log_weights, jnp.zeros(()), eves, *log_mean_and_size(log_weights))
        return cloud, values, choices

    def step(self, cloud: Cloud, time: Any, observed: Choices) -> tuple[Cloud, Record]:
        """Resample if needed, propagate, weigh."""
        cloud, needed, index = self._resampled(cloud, time, observed)

        def particle(state: Any, before: Any) -> Any:
            return self.moved(state, before, time, observed)

        state, choices, outputs, change = jax.vmap(particle)(cloud.state, cloud.before)
        log_weights = weighed(cloud.log_weights, change)
        log_mean, ess = log_mean_and_size(log_weights)
        record = Record(ess, needed)
        if self.store != "evidence":
            record = record._replace(ancestors=index, choices=choices, log_weights=log_weights)
        if self.store == "trajectories" and self.sequence.has_more:
            record = record._replace(outputs=outputs)
        return cloud._replace(state=state, log_weights=log_weights, log_mean=log_mean, ess=ess), record

    def context(self, state: Any, before: Any, time: Any, observed: Choices) -> StepContext:
        """Return what a proposal sees."""
        first, num_carry = self.sequence.carry_place()
        carry = state[first : first + num_carry]
        return StepContext(carry[0] if num_carry == 1 else carry, before, observed, time)

    def moved(self, state: Any, before: Any, time: Any, observed: Choices) -> tuple[Any, Choices, Any, Any]:
        """Move one particle: its new state, its latents, its outputs, and the change of its log weight."""
        drawn, log_q = {}, 0.0
        if self.proposal is not None:
            program = bound_program(self.proposal(self.context(state, before, time, observed)), "the proposal")
            check_drawn(program.table(), "the proposal")
            outcome = program.rebind()
            drawn, log_q = outcome.choices, outcome.log_density
        step = self.sequence.step(state, time, merged(drawn, observed))
        latents = self.latents(step.choices, observed)
        if self.proposal is not None:
            _check_proposed(drawn, latents, observed)
        return step.state, latents, step.outputs, as_weight(step.log_weight) - log_q

    def latents(self, choices: Choices, observed: Choices) -> Choices:
        """Return a step's choices that are not observed whole."""
        whole = {path for path, y in leaves_of(observed) if not isinstance(y, Masked)}
        return nested((path, x) for path, x in leaves_of(choices) if path not in whole)

    def _resampled(self, cloud: Cloud, time: Any, observed: Choices) -> tuple[Cloud, Any, Any]:
        """Resample if needed; the weights' mean goes into the offset, so that the evidence stays unbiased."""
        ahead = self._ahead(cloud, time, observed)
        log_weights, log_mean, ess = cloud.log_weights, cloud.log_mean, cloud.ess
        if ahead is not None:
            log_weights = weighed(log_weights, ahead)
            log_mean, ess = log_mean_and_size(log_weights)
        everyone = jnp.arange(self.num_particles, dtype=jnp.int32)

        def chosen(cloud: Cloud) -> tuple[Cloud, Any]:
            index = sample("ancestors", Ancestors(log_weights, method=self.method))
            state, before, eves = jax.tree.map(lambda v: v[index], (cloud.state, cloud.before, cloud.eves))
            after = jnp.zeros_like(log_weights) if ahead is None else -ahead[index]
            return Cloud(state, before, after, cloud.log_offset + log_mean, eves, jnp.zeros_like(log_mean), ess), index

        if self.threshold == 0.0:
            return cloud, jnp.asarray(False), everyone
        if self.threshold == 1.0:
            cloud, index = chosen(cloud)
            return cloud, jnp.asarray(True), index
        needed = ess < self.threshold * self.num_particles
        cloud, index = lax.cond(needed, chosen, lambda cloud: (cloud, everyone), cloud)
        return cloud, needed, index

    def _ahead(self, cloud: Cloud, time: Any, observed: Choices) -> Any:
        """Return the look-ahead log weights; any positive weights are right, so that none is left at zero."""
        auxiliary = self.auxiliary
        if auxiliary is None:
            return None

        def particle(state: Any, before: Any) -> Any:
            found = as_weight(auxiliary(self.context(state, before, time, observed)))
            if jnp.shape(found) != ():
                raise ShapeError(
                    f"auxiliary must return one log weight, a scalar, got shape {jnp.shape(found)}: sum over it."
                )
            return found

        ahead = jax.vmap(particle)(cloud.state, cloud.before)
        top = jnp.max(ahead)
        return jnp.where(jnp.isneginf(top), 0.0, jnp.maximum(ahead, top - _DEEPEST))


def as_weight(value: Any) -> Any:
    """Return a log weight as a scalar array."""
    return jnp.asarray(scalar(value), jnp.result_type(float))


def _check_proposed(drawn: Choices, latents: Choices, observed: Choices) -> None:
    """Refuse a proposal whose sites are not the step's latents."""
    open_ones = {path for path, _ in leaves_of(latents)} - {path for path, _ in leaves_of(observed)}
    made = {path for path, _ in leaves_of(drawn)}
    if made != open_ones:
        raise AddressError(
            f"the proposal has the sites {', '.join(sorted(made)) or '(none)'}, but the latents of a step are "
            f"{', '.join(sorted(open_ones)) or '(none)'}. Give it one site for each, with the same address."
        )
