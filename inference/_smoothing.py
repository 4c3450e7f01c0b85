r"""Smoothing from a filter's particles: backward simulation, exact or by MCMC moves, and fixed lag.

A trajectory is drawn backwards: the last particle by its weight, then at each time a particle $i$ with probability

$$ B_t(i) \propto w_t^i\, p(x_{t+1}, y_{t+1} \mid x_t^i). $$

With $\hat Z$ as its weight such a trajectory is properly weighted for the posterior, whatever the resampling scheme, since
$\sum_i W_i f(x \mid x_i) B(k \mid x) = W_k f(x \mid x_k)$.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Posterior, ShapeError, _jax, sample
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices, leaves_of, merged
from expectax.ppl._staging import check_key

from ._filter_steps import FilterSteps
from ._filtered import Filtered
from ._future import carry_is_chosen, future_density
from ._particles import Particles
from ._population import weighed
from ._sequence import Sequence
from ._weights import normalized_weights

Backward = Literal["ffbs", "mcmc"]


def smooth(
    posterior: Posterior,
    filtered: Filtered,
    *,
    key: PRNGKeyArray,
    num_trajectories: int,
    method: Backward = "ffbs",
    num_moves: int = 1,
) -> Particles:
    r"""Draw trajectories from $p(x_{1:T} \mid y_{1:T})$ by backward simulation through a filter's particles.

    Args:
        posterior: the one that was filtered.
        filtered: its result, with its history (`store="filtering"` is enough).
        key: a typed key.
        num_trajectories: $m$, how many, independent given the particles.
        method: `"ffbs"` weighs all $n$ particles at each time, in $O(m n)$; `"mcmc"` starts at the genealogical ancestor and
            makes Metropolis moves to particles drawn by their filtering weights, in $O(m)$ density evaluations.
        num_moves: how many moves at each time.

    Returns:
        `Particles`, equally weighted, with the filter's evidence. (The trajectories that descend by the filter's own
        genealogy are `filtered.particles`.)

    Raises:
        ControlFlowError: a step's choices do not determine the scan's carry, so that the density of the next step given a
            particle's state is not that of a trajectory through it; latents before the scan enter its steps beyond the first
            carry; or the model has sites after the scan.
        ShapeError: data in the scan are missing in part.
        ValueError: a setting is out of range, or nothing was stored.

    Sources: Godsill, Doucet and West 2004; Bunch and Godsill 2013; Dau and Chopin 2023.

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
        >>> filtered = inference.particle_filter(posterior, key=jax.random.key(0), num_particles=500)
        >>> paths = inference.smooth(posterior, filtered, key=jax.random.key(1), num_trajectories=1000)
        >>> bool(abs(paths.mean()["x"][0] - 0.346) < 0.1)  # exactly 0.346
        True
    """
    check_key(key)
    return _smooth(posterior, filtered, key, num_trajectories, method, num_moves)


@compiled
def _smooth(posterior: Posterior, filtered: Filtered, key: Any, *settings: Any) -> Particles:
    return keyed(smoothing)(key, posterior, filtered, *settings)


def smoothing(
    posterior: Posterior, filtered: Filtered, num_trajectories: int, method: Backward = "ffbs", num_moves: int = 1
) -> Particles:
    """Draw trajectories backwards, as a keyless program: `smooth` without its key.

    Args:
        posterior: as in `smooth`.
        filtered: as in `smooth`.
        num_trajectories: as in `smooth`.
        method: as in `smooth`.
        num_moves: as in `smooth`.

    Returns:
        `Particles`.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def switches():
        ...     def step(z, _):
        ...         z = ex.sample("z", dist.Bernoulli(0.2 + 0.6 * z))
        ...         return 1.0 * z, ex.sample("y", dist.Normal(1.0 * z, 1.0))
        ...     jax.lax.scan(step, 0.0, length=2)
        >>> posterior = switches().given({"y": jnp.array([0.5, 1.0])})
        >>> inference.assert_valid(lambda p: inference.smoothing(p, inference.filtering(p, 2), 1), posterior)
    """
    if method not in get_args(Backward) or num_trajectories < 1 or num_moves < 0:
        raise ValueError(
            f'smooth needs num_trajectories >= 1, num_moves >= 0 and method "ffbs" or "mcmc", got {num_trajectories}, '
            f"{num_moves} and {method!r}."
        )
    steps = _cut(posterior, filtered)
    sequence = steps.sequence
    history = _in_order(filtered.history, sequence)
    states, first_states = _states(steps, history)
    last = jnp.broadcast_to(filtered.particles.log_weights, (num_trajectories, filtered.eves.shape[0]))
    index = _drawn("last", last)
    chosen = jax.tree.map(lambda v: v[-1][index], history.choices)

    def back(later: Any, now: Any) -> Any:
        index, chosen = later
        time, states, log_weights, choices, ancestors = now
        parents = ancestors[index]

        def density(choices: Choices, state: Any) -> Any:
            whole = jax.tree.map(lambda x: jnp.broadcast_to(x, (sequence.length, *x.shape)), choices)
            return future_density(steps, time, whole)(state)

        index = _parents(density, states, log_weights, parents, chosen, method, num_moves)
        chosen = jax.tree.map(lambda v: v[index], choices)
        return (index, chosen), chosen

    columns = (states, history.log_weights, history.choices)
    part = jax.tree.map(lambda v: v[:-1], columns)
    times = jnp.arange(1, sequence.length)
    (index, first), earlier = lax.scan(back, (index, chosen), (times, *part, history.ancestors[1:]), reverse=True)
    choices = jax.tree.map(lambda v, x: jnp.moveaxis(jnp.concatenate([v, x[None]]), 1, 0), earlier, chosen)
    if sequence.cut.scan.params["reverse"]:
        choices = jax.tree.map(lambda v: jnp.flip(v, 1), choices)
    if jax.tree.leaves(history.before):
        start = (jnp.asarray(0), first_states, history.log_weights_before, history.before, history.ancestors[0])
        _, before = back((index, first), start)
        choices = merged(before, choices)
    return Particles(choices, jnp.zeros(num_trajectories), filtered.log_evidence)


def _parents(
    density: Any, states: Any, log_weights: Any, parents: Any, chosen: Choices, method: str, num_moves: int
) -> Any:
    """Draw, for each trajectory, the particle that it comes from; `parents` are those by genealogy."""
    over_trajectories = jax.vmap(density)
    if method == "ffbs":
        ahead = jax.vmap(lambda z: jax.vmap(lambda s: density(z, s))(states))(chosen)
        return _drawn("back", weighed(jnp.broadcast_to(log_weights, ahead.shape), ahead))
    here = over_trajectories(chosen, jax.tree.map(lambda v: v[parents], states))

    def move(now: Any, _: Any) -> Any:
        index, here = now
        proposed = _drawn("proposed", jnp.broadcast_to(log_weights, (index.shape[0], log_weights.shape[0])))
        there = over_trajectories(chosen, jax.tree.map(lambda v: v[proposed], states))
        accept = jnp.exp(jnp.minimum(jnp.where(jnp.isneginf(there), -jnp.inf, there - here), 0.0))
        yes = jax.vmap(lambda p: sample("accept", dist.Bernoulli(p)))(accept) == 1
        return (jnp.where(yes, proposed, index), jnp.where(yes, there, here)), None

    (index, _), _ = lax.scan(move, (parents, here), None, length=num_moves)
    return index


def _drawn(address: str, logits: Any) -> Any:
    """Draw an index in each row; any, where all are impossible: the evidence then is 0."""
    logits = jnp.where(jnp.all(jnp.isneginf(logits), axis=-1, keepdims=True), 0.0, logits)
    index = jax.vmap(lambda row: sample(address, dist.Categorical(logits=row)))(logits)
    return jnp.asarray(index, jnp.int32)


def _cut(posterior: Posterior, filtered: Filtered) -> FilterSteps:
    """Cut the posterior at its scan; refuse what has no backward density."""
    sequence = Sequence.of(posterior.program, "smooth")
    place = _jax.place(sequence.cut.scan)
    num_consts, num_carry = _jax.scan_sizes(sequence.cut.scan)
    owned = sequence.owned()
    if sequence.has_more:
        raise ControlFlowError(
            f"smooth: the model has choices or data after its scan at {place}, seen by no step of it."
        )
    if any(owned[:num_consts]) or any(owned[num_consts + num_carry :]):
        raise ControlFlowError(
            f"smooth: latents before the scan at {place} enter its steps, so that a trajectory through two particles would "
            "have two values of them. Use filtered.particles, or particle_gibbs."
        )
    if not carry_is_chosen(sequence):
        raise ControlFlowError(
            f"smooth: the carry of the scan at {place} is not determined by the choices of the last step, so that a particle "
            "has no backward density. Carry choices only (write x ~ Normal(f(x), s), not x = f(x) + noise), or use "
            "filtered.particles or particle_gibbs."
        )
    for path, y in leaves_of(sequence.observed(posterior.observations)):
        if isinstance(y, Masked):
            raise ShapeError(f"smooth: the data of {path!r} are given in part. Make the missing ones a site.")
    return FilterSteps(posterior, sequence, filtered.log_weights.shape[1])


def _in_order(history: Any, sequence: Sequence) -> Any:
    """Return a history in the order of the steps."""
    if not sequence.cut.scan.params["reverse"]:
        return history
    timed = (history.choices, history.log_weights, history.ancestors)
    choices, log_weights, ancestors = jax.tree.map(lambda v: jnp.flip(v, 0), timed)
    return type(history)(history.before, history.log_weights_before, choices, log_weights, ancestors)


def _states(steps: FilterSteps, history: Any) -> tuple[Any, Any]:
    """Return where the particles stood after each step, which their choices tell, and before the first one."""
    observations, sequence = steps.posterior.observations, steps.sequence
    count, leaves = steps.num_particles, jax.tree.leaves(history.before)

    def before(latents: Choices, _: Any) -> Any:
        values = steps.run_before(merged(latents, observations))[0]
        return [values[v] for v in ordered]

    ordered = [v for eqn in sequence.cut.before for v in eqn.outvars]
    values = jax.vmap(before)(history.before if leaves else {}, jnp.arange(count))
    first = steps.states_of(dict(zip(ordered, values, strict=True)))

    def after(time: Any, choices: Choices) -> Any:
        given = sequence.at(observations, time)
        return jax.vmap(lambda z, state: sequence.step(state, time, merged(z, given)).state)(choices, first)

    return jax.vmap(after)(jnp.arange(sequence.length), history.choices), first


def fixed_lag_mean(filtered: Filtered, lag: int) -> Any:
    r"""Return the means $E[x_t \mid y_{1:t+L}]$ of every scanned latent, for a lag $L$: time first.

    The particles of time $t + L$ are followed back to time $t$: little genealogy is lost, and what the data after $t + L$
    tell is left out, a bias that falls geometrically with $L$ in models that forget.

    Args:
        filtered: a filter's result, of a scan that goes forward in time, with its history.
        lag: $L$, at least 0; with 0 they are the filtering means.

    Returns:
        Nested dict of means, shape `(T, ...)`.

    Raises:
        ValueError: the lag is negative, or nothing was stored.
        ControlFlowError: the scan goes backwards.

    Sources: Kitagawa and Sato 2001; Olsson, Cappé, Douc and Moulines 2008.

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
        >>> filtered = inference.particle_filter(posterior, key=jax.random.key(0), num_particles=5000)
        >>> bool(abs(inference.fixed_lag_mean(filtered, 2)["x"][0] - 0.346) < 0.1)  # exactly 0.346
        True
    """
    if lag < 0:
        raise ValueError(f"fixed_lag_mean needs a lag >= 0, got {lag}.")
    if filtered.reverse:
        raise ControlFlowError("fixed_lag_mean: the scan goes backwards through its arrays. Use smooth.")
    length, count = filtered.log_weights.shape
    times = jnp.arange(length)
    seen = jnp.minimum(times + lag, length - 1)
    everyone = jnp.broadcast_to(jnp.arange(count, dtype=filtered.ancestors.dtype), (length, count))

    def back(step: Any, index: Any) -> Any:
        at = seen - step
        earlier = jax.vmap(lambda parents, i: parents[i])(filtered.ancestors[jnp.maximum(at, 0)], index)
        return jnp.where((at > times)[:, None], earlier, index)

    index = lax.fori_loop(0, min(lag, length), back, everyone)
    weights = jax.vmap(normalized_weights)(filtered.log_weights)[seen]
    picked = jax.tree.map(lambda v: jax.vmap(lambda x, i: x[i])(v, index), filtered.choices)
    return jax.tree.map(lambda v: jnp.einsum("tn,tn...->t...", weights, v), picked)
