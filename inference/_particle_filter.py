r"""Particle filters for models written as a plain `lax.scan`: bootstrap, guided and auxiliary.

The staged model is cut at its scan: what stands before it is drawn once per particle, each step of the scan is drawn,
weighed and, when the effective sample size is low, preceded by resampling (Gordon, Salmond and Smith 1993; Chopin and
Papaspiliopoulos 2020, algorithm 10.3). What stands after the scan is run on the surviving trajectories. The loop is a
keyless program, `filtering`, of which `particle_filter` is the compiled form with a key.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray

from expectax.ppl import ControlFlowError, NonFiniteError, Posterior, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._evaluate import walk
from expectax.ppl._keyless import keyed
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._posterior import check_posterior
from expectax.ppl._staging import check_key
from expectax.ppl._visitors import rebinding

from ._ancestors import Method, check_method
from ._filter_steps import Cloud, FilterSteps, Proposal, Record, as_weight
from ._filtered import Filtered, History, follow, lineage
from ._particles import Particles
from ._sequence import Sequence

Store = Literal["trajectories", "filtering", "evidence"]


def particle_filter(
    posterior: Posterior,
    *,
    key: PRNGKeyArray,
    num_particles: int,
    proposal: Proposal | None = None,
    auxiliary: Proposal | None = None,
    ess_threshold: float = 0.5,
    method: Method = "systematic",
    store: Store = "trajectories",
) -> Filtered:
    r"""Filter a model whose time axis is a plain `lax.scan`.

    Args:
        posterior: a model with exactly one scan that holds sites, and observations given for all its steps.
        key: a typed key.
        num_particles: how many particles.
        proposal: `proposal(context)` returns a bound program whose sites are the step's latents; `context` is a
            `StepContext` with the particle's carry and the step's observations. It may be a fitted guide; its parameters are
            data, so that a new fit compiles nothing, where they are arguments: `jax.tree_util.Partial(guide, params)`.
            None for the model's own step (a bootstrap filter).
        auxiliary: `auxiliary(context)` returns the log of a look-ahead weight $\eta$, such as an approximation of
            $\log p(y_t \mid x_{t-1})$. With the exact one, and the exact $p(x_t \mid x_{t-1}, y_t)$ as proposal, the filter
            is fully adapted: all weights stay equal.
        ess_threshold: resample before a step when the effective sample size is below this fraction of the particles;
            1 resamples always, 0 never.
        method: the resampling method; see `ancestors`.
        store: `"trajectories"` keeps all; `"filtering"` the particles of each step, but not the survivors' paths;
            `"evidence"` only the evidence, the last weights, and the latents before the scan.

    Returns:
        A `Filtered`; `filtered.log_evidence` estimates $\log p(y_{1:T})$.

    Raises:
        ControlFlowError: the model has no scan with sites, or several; or it has sites after the scan, and trajectories
            are not stored.
        AddressError: the proposal's sites are not the step's latents.
        ValueError: a setting is out of range.

    Sources: Gordon, Salmond and Smith 1993; Doucet, Godsill and Andrieu 2000 (guided); Pitt and Shephard 1999 (auxiliary).

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
        >>> @ex.model
        ... def conditional(x, y):
        ...     ex.sample("x", dist.Normal((x + y) / 2, jnp.sqrt(0.5)))
        >>> adapted = inference.particle_filter(
        ...     posterior, key=jax.random.key(0), num_particles=100,
        ...     proposal=lambda now: conditional(now.carry, now.observed["y"]),
        ...     auxiliary=lambda now: dist.Normal(now.carry, jnp.sqrt(2.0)).log_prob(now.observed["y"]),
        ...     ess_threshold=1.0,
        ... )
        >>> bool(jnp.ptp(adapted.log_weights[-1]) < 1e-5)
        True
    """
    check_posterior(posterior, "particle_filter")
    check_key(key)
    check_settings(num_particles, ess_threshold, method, store)
    settings = (num_particles, proposal, auxiliary, float(ess_threshold), method, store)
    filtered = _filter(posterior, key, *settings)
    if not _jax.is_traced(filtered.ess):
        _check_alive(filtered)
    return filtered


def _check_alive(filtered: Filtered) -> None:
    """Refuse a run whose particles have all died, or whose weights are nan, naming the step."""
    evidence = float(filtered.log_evidence)
    if np.isfinite(evidence):
        return
    what, step = ("a weight is nan" if np.isnan(evidence) else "all particles have weight 0"), ""
    if filtered.history is not None:
        weights = np.asarray(filtered.history.log_weights)
        bad = np.isnan(weights).any(1) | np.isneginf(weights).all(1)
        order = np.flatnonzero(bad)[:: -1 if filtered.reverse else 1]
        step = f" at step {order[0]} of the scan's arrays" if len(order) else ""
    raise NonFiniteError(
        f"particle_filter: {what}{step}, so that the evidence is {np.exp(evidence)}. Look at the observation there, or use more "
        "particles, or a proposal that sees it. The error's `result` holds the run.",
        filtered,
    )


@compiled
def _filter(posterior: Posterior, key: Any, *settings: Any) -> Filtered:
    return keyed(_filtering)(key, posterior, *settings)


def filtering(
    posterior: Posterior,
    num_particles: int,
    *,
    proposal: Proposal | None = None,
    auxiliary: Proposal | None = None,
    ess_threshold: float = 0.5,
    method: Method = "systematic",
    store: Store = "trajectories",
) -> Filtered:
    r"""Filter, as a keyless program: `particle_filter` without its key.

    Args:
        posterior: as in `particle_filter`.
        num_particles: as in `particle_filter`.
        proposal: as in `particle_filter`.
        auxiliary: as in `particle_filter`.
        ess_threshold: as in `particle_filter`.
        method: as in `particle_filter`.
        store: as in `particle_filter`.

    Returns:
        A `Filtered`.

    Raises:
        As `particle_filter`.

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
        >>> inference.assert_valid(lambda target: inference.filtering(target, 2).particles, posterior)
    """
    check_settings(num_particles, ess_threshold, method, store)
    return _filtering(posterior, num_particles, proposal, auxiliary, float(ess_threshold), method, store)


def check_settings(num_particles: Any, ess_threshold: Any, method: Any, store: Any = "evidence") -> None:
    """Refuse settings out of range."""
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"need a whole num_particles >= 1, got {num_particles!r}.")
    if not 0.0 <= ess_threshold <= 1.0:
        raise ValueError(f"need an ess_threshold in [0, 1], got {ess_threshold}.")
    check_method(method, num_particles, num_particles)
    if store not in get_args(Store):
        raise ValueError(f"store must be one of {', '.join(map(repr, get_args(Store)))}, got {store!r}.")


def _filtering(
    posterior: Posterior, num_particles: int, proposal: Any, auxiliary: Any, threshold: float, method: Any, store: Any
) -> Filtered:
    sequence = Sequence.of(posterior.program, "particle_filter")
    if sequence.has_more and store != "trajectories":
        raise ControlFlowError(
            f"particle_filter: the model has choices or data after its scan at {_jax.place(sequence.cut.scan)}, which are "
            f'run on whole trajectories. Use store="trajectories", not {store!r}.'
        )
    steps = FilterSteps(posterior, sequence, num_particles, proposal, auxiliary, threshold, method, store)
    start, values, choices = steps.start()

    def step(cloud: Cloud, time: Any) -> tuple[Cloud, Record]:
        return steps.step(cloud, time, sequence.at(posterior.observations, time))

    final, record = lax.scan(step, start, jnp.arange(sequence.length))
    return _result(steps, start, values, choices, final, record)


def _result(steps: FilterSteps, start: Cloud, values: Any, before: Any, final: Cloud, record: Record) -> Filtered:
    """Put together what the steps left behind."""
    posterior, sequence = steps.posterior, steps.sequence
    if steps.store == "trajectories":
        found, first = lineage(record.ancestors)
        paths = jax.tree.map(lambda v: follow(v, found), record.choices)
        outputs = [follow(v, found) for v in record.outputs or ()]
        if sequence.cut.scan.params["reverse"]:  # the filter went through time backwards
            outputs, paths = jax.tree.map(lambda v: jnp.flip(v, 1), (outputs, paths))
        values = {v: value[first] for v, value in values.items()}
        after, extra = _after(steps, values, final, outputs) if sequence.has_more else ({}, 0.0)
        own = jax.tree.map(lambda v: v[first], before)
        latents = posterior.latents(merged(own, paths, after))
        final = final._replace(log_weights=final.log_weights + extra, eves=first)
    else:
        latents = final.before
    scanned = None if record.choices is None else _unobserved(record.choices, posterior)
    if steps.store == "filtering":
        latents = merged(latents, jax.tree.map(lambda v: v[-1], scanned))
    particles = Particles(latents, final.log_weights, final.log_offset)
    if sequence.cut.scan.params["reverse"]:
        record, scanned = jax.tree.map(lambda v: jnp.flip(v, 0), (record, scanned))
    history = None
    if scanned is not None:
        history = History(posterior.latents(before), start.log_weights, scanned, record.log_weights, record.ancestors)
    reverse = bool(sequence.cut.scan.params["reverse"])
    return Filtered(particles, record.ess, record.resampled, final.eves, history, reverse=reverse)


def _unobserved(choices: Choices, posterior: Posterior) -> Choices:
    """Return the choices of which no part is observed."""
    observed = {path for path, _ in leaves_of(posterior.observations)}
    return nested((path, x) for path, x in leaves_of(choices) if path not in observed)


def _after(steps: FilterSteps, values: Any, final: Cloud, outputs: list[Any]) -> tuple[Any, Any]:
    """Run what stands after the scan on the surviving trajectories; return its choices and log weights."""
    cut = steps.sequence.cut
    first, num_carry = steps.sequence.carry_place()
    env = values | dict(zip(cut.scan.outvars, [*final.state[first : first + num_carry], *outputs], strict=True))

    def particle(own: list[Any]) -> Any:
        local = _jax.Environment(steps.sequence.shared)
        local.update(zip(env, own, strict=True))
        outcome = walk(cut.after, local, rebinding, iter(()), steps.posterior.observations)
        return outcome.choices, as_weight(outcome.log_weight)

    return jax.vmap(particle)(list(env.values()))
