r"""Particle Gibbs: conditional sequential Monte Carlo as a Markov kernel on the latents of a model's scan.

One sweep keeps the present trajectory as a reference among $n$ particles, filters, and chooses a trajectory by its final
weight (Andrieu, Doucet and Holenstein 2010). The reference's ancestors may be drawn anew at each step (ancestor sampling:
Lindsten, Jordan and Schön 2014), or the chosen trajectory be put together backwards (backward sampling: Whiteley 2010), in
proportion to

$$ w_t^i\, p(x'_{t+1:T}, y_{t+1:T} \mid x_{1:t}^i). $$

Where a step's choices determine the scan's carry this is $w_t^i\, p(x'_{t+1}, y_{t+1} \mid x_t^i)$; otherwise the rest of
the reference is run from each particle.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, ShapeError, _jax, sample
from expectax.ppl._evaluate import Unweighed
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._visitors import weighing

from ._ancestors import Method
from ._conditional_ancestors import ConditionalAncestors, check_conditional
from ._filter_steps import FilterSteps, Proposal, as_weight
from ._future import future_density
from ._kernel import Adaptation, Info, State
from ._population import weighed
from ._sequence import Sequence
from ._target import Target

Rule = Literal["genealogy", "ancestor", "backward"]


def particle_gibbs(
    num_particles: int,
    *,
    ancestor_sampling: bool = True,
    backward_sampling: bool = False,
    method: Method = "multinomial",
    proposal: Proposal | None = None,
) -> ParticleGibbs:
    r"""Particle Gibbs: move the latents of a model's scan by conditional sequential Monte Carlo.

    Args:
        num_particles: at least 2, the present trajectory among them.
        ancestor_sampling: draw the reference's ancestor anew at each step, so that few particles mix well.
        backward_sampling: put the new trajectory together backwards; instead of ancestor sampling.
        method: of the conditional resampling: `"multinomial"`, `"systematic"`, `"stratified"`, `"residual"` or
            `"killing"`, each in its conditional form (`ConditionalAncestors`).
        proposal: as in `particle_filter`.

    Returns:
        A `Kernel`. Latents before the scan stay as they are.

    Raises:
        ValueError: a setting is out of range, or the method has no conditional form.
        ControlFlowError: at first use, if the model has no scan with sites or several, or sites after it; or the target
            is not the posterior's own density.
        ShapeError: at first use, if data in the scan are missing in part.

    Sources: Andrieu, Doucet and Holenstein 2010; Whiteley 2010; Lindsten, Jordan and Schön 2014; Chopin and Singh 2015.

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
        >>> chains = inference.mcmc(
        ...     posterior, inference.particle_gibbs(10), key=jax.random.key(0), num_warmup=50, num_samples=500
        ... )
        >>> bool(abs(chains.mean()["x"][0] - 0.346) < 0.1)  # exactly 0.346
        True
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(f"particle_gibbs needs a whole num_particles >= 2, got {num_particles!r}.")
    check_conditional(method)
    rule: Rule = "backward" if backward_sampling else "ancestor" if ancestor_sampling else "genealogy"
    return ParticleGibbs(num_particles, rule, method, proposal)


class ParticleGibbs(eqx.Module):
    """A particle Gibbs kernel. Example: see `particle_gibbs`."""

    num_particles: int = eqx.field(static=True)
    rule: Rule = eqx.field(static=True)
    method: Method = eqx.field(static=True)
    proposal: Proposal | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return "particle_gibbs"

    def init(self, target: Target, latents: Choices) -> State:
        """Return the state at some latents."""
        return State(latents, target.log_density(latents))

    def latents(self, target: Target, position: Choices) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Return that nothing is tuned."""
        del target, state
        return Adaptation.none()

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move the trajectory; the acceptance rate is the share of times at which it changed."""
        del parameters
        sweep = Sweep.of(target, state.position, self)
        moved, changed = sweep.run()
        after = self.init(target, merged(state.position, moved))
        return after, Info(jnp.mean(1.0 * changed), num_steps=self.num_particles)


class Path(NamedTuple):
    """What a sweep leaves behind, in the order of the steps; `places` are the reference's."""

    states: Any
    choices: Any
    log_weights: Any
    ancestors: Any
    places: Any


class Sweep(NamedTuple):
    """One conditional SMC sweep."""

    steps: FilterSteps
    kernel: ParticleGibbs
    reference: Choices
    start: list[Any]

    @classmethod
    def of(cls, target: Target, latents: Choices, kernel: ParticleGibbs) -> Sweep:
        """Cut the target at its scan, given the latents before it; refuse what cannot be swept."""
        if target.correction is not None:
            raise ControlFlowError(
                "particle_gibbs: the target's density is not that of a model (it is tempered, or corrected), so that there "
                "is nothing to filter. Use it on the posterior itself."
            )
        names = Sequence.of(target.posterior.program, "particle_gibbs").addresses
        posterior = target.posterior.given({a: x for a, x in latents.items() if a not in names})
        sequence = Sequence.of(posterior.program, "particle_gibbs")
        if sequence.has_more:
            raise ControlFlowError(
                f"particle_gibbs: the model has choices or data after its scan at {_jax.place(sequence.cut.scan)}, which a "
                "filter cannot see in time. Put them before it or into it."
            )
        for path, y in leaves_of(sequence.observed(posterior.observations)):
            if isinstance(y, Masked):
                raise ShapeError(
                    f"particle_gibbs: the data of {path!r} are given in part. Make the missing ones a site."
                )
        steps = FilterSteps(posterior, sequence, kernel.num_particles, kernel.proposal, method=kernel.method)
        own, _, _ = steps.run_before()
        start = [x[0] for x in steps._replace(num_particles=1).states_of({v: x[None] for v, x in own.items()})]
        return cls(steps, kernel, {a: x for a, x in latents.items() if a in names}, start)

    def at(self, time: Any) -> Choices:
        """Return the reference's choices at a step."""
        return jax.tree.map(lambda x: jnp.asarray(x)[self.steps.sequence.place(time)], self.reference)

    def observed(self, time: Any) -> Choices:
        """Return the observations at a step."""
        return self.steps.sequence.at(self.steps.posterior.observations, time)

    def run(self) -> tuple[Choices, Any]:
        """Filter around the reference, and choose a trajectory; return it, and at which times it changed."""
        length, count = self.steps.sequence.length, self.kernel.num_particles
        first = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), self.start)
        place = jnp.asarray(sample("place", dist.Categorical(probs=jnp.full(count, 1 / count))), jnp.int32)
        everyone = jnp.arange(count, dtype=jnp.int32)
        log_weights = jnp.zeros(count)
        state, one = self._step((first, log_weights, place), jnp.asarray(0), everyone)

        def step(cloud: Any, time: Any) -> Any:
            states, log_weights, place = cloud
            survivor = self._survivor(states, log_weights, place, time)
            drawn = sample("ancestors", ConditionalAncestors(log_weights, survivor, self.kernel.method))
            index, place = drawn[:-1], drawn[-1]
            return self._step((states, log_weights, place), time, index)

        _, rest = lax.scan(step, state, jnp.arange(1, length))
        path = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), one, rest)
        chosen, own = self._chosen(path)
        found = jax.tree.map(lambda v: jax.vmap(lambda x, i: x[i])(v, chosen), path.choices)
        if self.steps.sequence.cut.scan.params["reverse"]:
            found = jax.tree.map(lambda v: jnp.flip(v, 0), found)
        return found, own

    def _survivor(self, states: Any, log_weights: Any, place: Any, time: Any) -> Any:
        """Return the reference's ancestor: its own last place, or another that could have led to it."""
        if self.kernel.rule != "ancestor":
            return place
        return sample("survivor", dist.Categorical(logits=self._backward(states, log_weights, time, self.reference)))

    def _backward(self, states: Any, log_weights: Any, time: Any, reference: Choices) -> Any:
        """Return the log weights of particles as ancestors of what a trajectory does from a time on."""
        future = future_density(self.steps, time, reference)
        total = weighed(log_weights, jax.vmap(future)(states))
        return jnp.where(jnp.all(jnp.isneginf(total)), log_weights, total)

    def _step(self, cloud: Any, time: Any, index: Any) -> Any:
        """Move all particles from their ancestors, the reference along its own choices."""
        states, log_weights, place = cloud
        parents = jax.tree.map(lambda v: v[index], states)
        count = self.kernel.num_particles
        others = jnp.arange(count - 1) + (jnp.arange(count - 1) >= place)
        observed = self.observed(time)
        free = lambda state: self.steps.moved(state, {}, time, observed)  # noqa: E731
        moved, choices, _, change = jax.vmap(free)(jax.tree.map(lambda v: v[others], parents))
        own_state, own_change = self._along(jax.tree.map(lambda v: v[place], parents), time, observed)

        def put(others_: Any, own: Any) -> Any:
            whole = jnp.zeros((count, *jnp.shape(own)), jnp.result_type(others_))
            return whole.at[others].set(others_).at[place].set(jnp.asarray(own, whole.dtype))

        states = jax.tree.map(put, moved, own_state)
        choices = jax.tree.map(put, choices, self.at(time))
        log_weights = put(change, own_change)
        record = Path(states, choices, log_weights, index, place)
        return (states, log_weights, place), record

    def _along(self, state: Any, time: Any, observed: Choices) -> tuple[Any, Any]:
        """Do the reference's step; return its state and its log weight."""
        own = self.at(time)
        if self.kernel.proposal is None:
            marked = nested((path, Unweighed(x)) for path, x in leaves_of(own))
            step = self.steps.sequence.step(state, time, merged(marked, observed), weighing)
            return step.state, as_weight(step.log_weight)
        step = self.steps.sequence.step(state, time, merged(own, observed))
        program = self.kernel.proposal(self.steps.context(state, {}, time, observed))
        return step.state, as_weight(step.log_weight) - program.assess_inside(own)[0]

    def _chosen(self, path: Path) -> tuple[Any, Any]:
        """Choose a trajectory: which particle at each step, and whether it is another than the reference."""
        last = jnp.asarray(sample("last", dist.Categorical(logits=path.log_weights[-1])), jnp.int32)
        if self.kernel.rule != "backward":

            def back(index: Any, now: Any) -> Any:
                ancestors, place = now
                return ancestors[index], (index, index != place)

            _, (chosen, changed) = lax.scan(back, last, (path.ancestors, path.places), reverse=True)
            return chosen, changed
        length = self.steps.sequence.length
        picked = jax.tree.map(lambda v: jax.vmap(lambda x, p: x[p])(v, path.places), path.choices)
        whole = jax.tree.map(lambda v, x: v.at[-1].set(x[-1][last]), picked, path.choices)

        def backward(carry: Any, now: Any) -> Any:
            whole = carry
            time, states, log_weights, choices, place = now
            given = self._in_order(whole)
            logits = self._backward(states, log_weights, time + 1, given)
            index = jnp.asarray(sample("back", dist.Categorical(logits=logits)), jnp.int32)
            whole = jax.tree.map(lambda v, x: v.at[time].set(x[index]), whole, choices)
            return whole, (index, index != place)

        part = jax.tree.map(lambda v: v[:-1], (path.states, path.log_weights, path.choices, path.places))
        _, (chosen, changed) = lax.scan(backward, whole, (jnp.arange(length - 1), *part), reverse=True)
        return jnp.append(chosen, last), jnp.append(changed, last != path.places[-1])

    def _in_order(self, choices: Choices) -> Choices:
        """Return choices in the order of steps in that of the model's arrays."""
        if not self.steps.sequence.cut.scan.params["reverse"]:
            return choices
        return jax.tree.map(lambda v: jnp.flip(v, 0), choices)
