r"""A bootstrap particle filter for models written as a plain `lax.scan`.

The staged model is cut at its scan: what stands before it is drawn once per particle, each step of the scan is drawn,
weighed and, when the effective sample size is low, preceded by resampling (Gordon, Salmond and Smith 1993; Chopin and
Papaspiliopoulos 2020, algorithm 10.3). What stands after the scan is run on the surviving trajectories.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from expectax.ppl import Posterior, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._cut import cut_at_scan
from expectax.ppl._evaluate import draws, evaluate, walk
from expectax.ppl._inline import inline_calls
from expectax.ppl._sources import sources
from expectax.ppl._staging import check_key, stage
from expectax.ppl._table import site_table
from expectax.ppl._visitors import generating

from ._ancestors import Method, ancestors
from ._particles import Particles
from ._weights import effective_sample_size, log_mean_exp, normalized_weights


class Filtered(eqx.Module):
    r"""The result of a particle filter.

    Example: see `particle_filter`.

    Attributes:
        particles: whole trajectories with their final weights: $p(x_{1:T} \mid y_{1:T})$. Scanned choices have shape
            `(num_particles, T, ...)`. Early times have few distinct ancestors.
        choices: the scan's latents at each time before later resampling, shape `(T, num_particles, ...)`.
        log_weights: their log weights, shape `(T, num_particles)`: $p(x_t \mid y_{1:t})$.
        ess: effective sample size at each time.
        resampled: whether the particles were resampled before each time.
    """

    particles: Particles
    choices: dict[str, Any]
    log_weights: Float[Array, "T n"]
    ess: Float[Array, " T"]
    resampled: Bool[Array, " T"]

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$, with $\hat Z$ an unbiased estimate of $p(y_{1:T})$."""
        return self.particles.log_evidence

    def mean(self) -> Any:
        """Return the filtering mean $E[x_t | y_{1:t}]$ of every scanned latent, time first."""
        weights = jax.vmap(normalized_weights)(self.log_weights)
        return jax.tree.map(lambda v: jnp.einsum("tn,tn...->t...", weights, v), self.choices)

    def sd(self) -> Any:
        """Return the filtering standard deviation of every scanned latent, time first."""
        weights = jax.vmap(normalized_weights)(self.log_weights)
        return jax.tree.map(
            lambda v, m: jnp.sqrt(jnp.einsum("tn,tn...->t...", weights, (v - m[:, None]) ** 2)),
            self.choices,
            self.mean(),
        )


def particle_filter(
    posterior: Posterior,
    *,
    key: PRNGKeyArray,
    num_particles: int,
    ess_threshold: float = 0.5,
    method: Method = "systematic",
) -> Filtered:
    r"""Filter a model whose time axis is a plain `lax.scan`.

    Args:
        posterior: a model with exactly one scan that holds sites, and observations given for all its steps.
        key: a typed key.
        num_particles: how many particles.
        ess_threshold: resample before a step when the effective sample size is below this fraction of the particles;
            1 resamples always, 0 never.
        method: the resampling method; see `ancestors`.

    Returns:
        A `Filtered`; `filtered.log_evidence` estimates $\log p(y_{1:T})$.

    Raises:
        ControlFlowError: the model has no scan with sites, or several.

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
        >>> inference.particle_filter(posterior, key=jax.random.key(0), num_particles=100).choices["x"].shape
        (3, 100)
    """
    check_key(key)
    if not isinstance(num_particles, int) or num_particles < 1 or not 0.0 <= ess_threshold <= 1.0:
        raise ValueError(
            f"need num_particles >= 1 and 0 <= ess_threshold <= 1, got {num_particles} and {ess_threshold}."
        )
    return _filter(posterior, key, num_particles, ess_threshold, method)


@compiled
def _filter(posterior: Posterior, key: Any, num_particles: int, ess_threshold: float, method: Method) -> Filtered:
    staged = stage(posterior.program)
    jaxpr = inline_calls(staged.jaxpr, staged.arguments)
    cut = cut_at_scan(jaxpr.jaxpr, "particle_filter")
    shared = _jax.Environment.of(jaxpr, staged.arguments)
    walk(cut.shared, shared, generating, iter(()), {})
    key_before, key_scan, key_after = jax.random.split(key, 3)

    env, prefix, log_weights = _run(cut.before, shared, {}, posterior, key_before, num_particles)
    state = _start(cut.scan, shared, env, log_weights, num_particles)
    final, steps = _steps(cut.scan, shared, posterior, state, key_scan, num_particles, ess_threshold, method)

    lineage, first = _lineage(steps.ancestors)
    outputs, scanned = jax.tree.map(lambda v: _follow(v, lineage), (steps.outputs, steps.choices))
    if cut.scan.params["reverse"]:  # the filter went through time backwards
        outputs, scanned = jax.tree.map(lambda v: jnp.flip(v, 1), (outputs, scanned))
        steps = jax.tree.map(lambda v: jnp.flip(v, 0), steps)
    prefix = jax.tree.map(lambda v: v[first], prefix)
    env = {v: value[first] for v, value in env.items()}
    env |= dict(zip(cut.scan.outvars, [*final.carry, *outputs], strict=True))
    _, suffix, extra = _run(cut.after, shared, env, posterior, key_after, num_particles)

    choices = posterior.latents(prefix | scanned | suffix)
    particles = Particles(choices, final.log_weights + extra, final.log_offset)
    latents = {a: v for a, v in steps.choices.items() if a not in posterior.observations}
    return Filtered(particles, latents, steps.log_weights, steps.ess, steps.resampled)


def _run(
    equations: Any, shared: _jax.Environment, env: dict[Any, Any], posterior: Posterior, key: Any, num_particles: int
) -> tuple[dict[Any, Any], Any, Any]:
    """Run equations once per particle; return all their results, choices and log weights, particles first."""
    given, names = posterior.observations, [v for eqn in equations for v in eqn.outvars]

    def particle(own: list[Any], key: Any) -> Any:
        local = _jax.Environment(shared)
        local.update(zip(env, own, strict=True))
        found = sources(equations, key, lambda site: draws(given.get(site.address)))
        outcome = walk(equations, local, generating, found, given)
        log_weight = jnp.asarray(outcome.log_weight, jnp.result_type(float))
        return [local[v] for v in names], outcome.choices, log_weight

    over = _jax.over_lanes(particle, num_particles, (0, None))
    values, choices, log_weight = over(list(env.values()), key)
    return dict(zip(names, values, strict=True)), choices, log_weight


class _State(NamedTuple):
    """What a step starts from, all particles first: carries, other inputs of the scan, weights."""

    carry: list[Any]
    own: dict[int, Any]
    log_weights: Any
    log_offset: Any


class _Steps(NamedTuple):
    """What the steps leave behind, time first."""

    outputs: list[Any]
    choices: Any
    ancestors: Any
    log_weights: Any
    ess: Any
    resampled: Any


def _start(scan: Any, shared: Any, env: dict[Any, Any], log_weights: Any, num_particles: int) -> _State:
    """Give every particle its carry, and its copy of those inputs that differ between particles."""
    num_consts, num_carry = _jax.scan_sizes(scan)
    carry = []
    for v in scan.invars[num_consts : num_consts + num_carry]:
        alone = not isinstance(v, _jax.Literal) and v in env
        value = env[v] if alone else jnp.asarray(shared.read(v))
        carry.append(value if alone else jnp.broadcast_to(value, (num_particles, *value.shape)))
    rest = [n for n in range(len(scan.invars)) if not num_consts <= n < num_consts + num_carry]
    own = {n: env[v] for n in rest if not isinstance(v := scan.invars[n], _jax.Literal) and v in env}
    return _State(carry, own, log_weights, jnp.zeros((), log_weights.dtype))


def _steps(
    scan: Any, shared: Any, posterior: Posterior, state: _State, key: Any, n: int, threshold: float, method: Method
) -> tuple[_State, _Steps]:
    """Resample if needed, propagate, weigh: the filter's loop."""
    num_consts, num_carry = _jax.scan_sizes(scan)
    body, length = scan.params["jaxpr"], scan.params["length"]
    first_x = num_consts + num_carry
    inputs_of = [m for m in range(len(scan.invars)) if not num_consts <= m < first_x]
    common = {m: shared.read(scan.invars[m]) for m in inputs_of if m not in state.own}
    given = {a: posterior.observations[a] for a in site_table(body) if a in posterior.observations}
    times = jnp.arange(length)[:: -1 if scan.params["reverse"] else 1]
    ordered = jax.tree.map(lambda v: jnp.asarray(v)[times], ({m: v for m, v in common.items() if m >= first_x}, given))

    def step(state: _State, inputs: Any) -> tuple[_State, _Steps]:
        key, time, (xs, step_given) = inputs
        key_resample, key_move = jax.random.split(key)
        needed = effective_sample_size(state.log_weights) < threshold * n if threshold < 1.0 else jnp.asarray(True)
        state, ancestors = _maybe_resample(key_resample, state, needed, method)

        def particle(carry: Any, own: Any, key: Any) -> Any:
            later = {m: v[time] for m, v in own.items() if m >= first_x}
            inputs = common | xs | own | later
            args = [inputs[m] for m in inputs_of]
            args[num_consts:num_consts] = carry
            outcome = evaluate(body, args, generating, key, step_given)
            out, log_weight = outcome.outputs, jnp.asarray(outcome.log_weight, jnp.result_type(float))
            return out[:num_carry], out[num_carry:], outcome.choices, log_weight

        over = _jax.over_lanes(particle, n, (0, 0, None))
        carry, outputs, choices, log_weight = over(state.carry, state.own, key_move)
        log_weights = state.log_weights + log_weight
        ess = effective_sample_size(log_weights)
        done = _Steps(outputs, choices, ancestors, log_weights, ess, needed)
        return _State(carry, state.own, log_weights, state.log_offset), done

    return lax.scan(step, state, (jax.random.split(key, length), times, ordered))


def _maybe_resample(key: Any, state: _State, needed: Any, method: Method) -> tuple[_State, Any]:
    """Resample if needed; the weights' mean goes into the offset, so that the evidence stays unbiased."""
    n = state.log_weights.shape[0]

    def chosen(state: _State) -> tuple[_State, Any]:
        index = ancestors(key, state.log_weights, method=method)
        carry, own = jax.tree.map(lambda v: v[index], (state.carry, state.own))
        offset = state.log_offset + log_mean_exp(state.log_weights)
        return _State(carry, own, jnp.zeros_like(state.log_weights), offset), index

    def kept(state: _State) -> tuple[_State, Any]:
        return state, jnp.arange(n)

    return lax.cond(needed, chosen, kept, state)


def _lineage(ancestors: Any) -> tuple[Any, Any]:
    """Return which particle of each time the final ones descend from, shape `(T, n)`, and from which at the start."""

    def back(index: Any, parents: Any) -> tuple[Any, Any]:
        return parents[index], index

    first, lineage = lax.scan(back, jnp.arange(ancestors.shape[1]), ancestors, reverse=True)
    return lineage, first


def _follow(values: Any, lineage: Any) -> Any:
    """Pick each trajectory's values, particles first."""
    return jnp.moveaxis(jax.vmap(lambda v, i: v[i])(values, lineage), 1, 0)
