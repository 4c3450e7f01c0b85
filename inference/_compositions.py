r"""Whole algorithms as a few lines of verbs.

They are written to be read, and to be checked by `exact`; a loop over time is written out. `particle_filter` is the same
algorithm as `smc`, with its loop in a `lax.scan`.

Source: Scibior et al. 2018, "Denotational validation of higher-order Bayesian inference", section 6; Scibior, Kammar and
Ghahramani 2018, "Functional programming for modular Bayesian inference" (PMMH, SMC^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import Posterior, Program
from expectax.ppl._nested import Choices

from ._accept import accepted, chosen
from ._ancestors import Method
from ._kernel import Kernel
from ._population import Population, advance, rejuvenate, resample, spawn, weighed
from ._sequence import check_in_time


def smc(
    posterior: Posterior,
    num_particles: int,
    *,
    proposal: Any = None,
    method: Method = "systematic",
    threshold: float = 1.0,
    num_steps: int | None = None,
) -> Population:
    r"""Sequential Monte Carlo over the steps of a model's scan, as a keyless program.

    Args:
        posterior: a model with one `lax.scan`, and nothing to choose or observe after it.
        num_particles: at least 1.
        proposal: as in `particle_filter`.
        method: as in `ancestors`.
        threshold: as in `resample`.
        num_steps: how many steps; all by default.

    Returns:
        The last `Population`: whole trajectories, and the evidence.

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
        >>> cloud = inference.keyed(lambda: inference.smc(posterior, 1000))(jax.random.key(0))
        >>> bool(abs(cloud.log_evidence + 4.076) < 0.3)  # exactly -4.076
        True
    """
    length = check_in_time(posterior, "smc") if num_steps is None else num_steps
    cloud = spawn(posterior, num_particles, time=0)
    for _ in range(length):
        cloud = advance(resample(cloud, method, threshold), proposal=proposal)
    return cloud


def rmsmc(
    posterior: Posterior,
    num_particles: int,
    kernel: Kernel,
    parameters: Any = None,
    *,
    num_moves: int = 1,
    method: Method = "systematic",
) -> Population:
    r"""Resample-move SMC: after each resampling whole trajectories are moved by a kernel; a keyless program.

    Args:
        posterior: as in `smc`.
        num_particles: at least 1.
        kernel: leaves each $\gamma_t$ invariant, whatever its number of steps.
        parameters: the kernel's; None for those of a chain without warm-up.
        num_moves: how often the kernel is applied at each step.
        method: as in `ancestors`.

    Returns:
        The last `Population`.

    Source: Gilks and Berzuini 2001.

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
        >>> run = inference.keyed(lambda: inference.rmsmc(posterior, 200, inference.hmc(num_integration_steps=3)))
        >>> bool(abs(jax.jit(run)(jax.random.key(0)).log_evidence + 4.076) < 0.5)
        True
    """
    cloud = advance(spawn(posterior, num_particles, time=0))
    for _ in range(1, check_in_time(posterior, "rmsmc")):
        cloud = advance(rejuvenate(resample(cloud, method), kernel, parameters, num_steps=num_moves))
    return cloud


def pmmh(
    prior: Program,
    model: Callable[[Choices], Posterior],
    num_particles: int,
    proposal: Callable[[Choices], Program],
    *,
    num_steps: int,
) -> Choices:
    r"""Particle marginal Metropolis-Hastings from the prior, as a keyless program.

    Args:
        prior: of the parameters $\theta$.
        model: `model(theta)`, a posterior as in `smc`.
        num_particles: of the filter that estimates $p(y \mid \theta)$.
        proposal: `proposal(theta)`, a bound program with the prior's sites.
        num_steps: of the chain.

    Returns:
        Nested dict of the parameters after each step, steps first.

    Source: Andrieu, Doucet and Holenstein 2010. With a posterior's warm-up, chains and diagnostics:
    `mcmc(posterior, pseudo_marginal())`.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def parameters(centre, width):
        ...     ex.sample("scale", dist.LogNormal(centre, width))
        >>> @ex.model
        ... def walk(scale):
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, scale))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=3)
        >>> run = lambda: inference.pmmh(
        ...     parameters(0.0, 1.0),
        ...     lambda theta: walk(theta["scale"]).given({"y": jnp.array([0.5, 1.0, 0.0])}),
        ...     50,
        ...     lambda theta: parameters(jnp.log(theta["scale"]), 0.5),
        ...     num_steps=100,
        ... )
        >>> jax.jit(inference.keyed(run))(jax.random.key(0))["scale"].shape
        (100,)
    """
    run = lambda theta: smc(model(theta), num_particles)  # noqa: E731
    theta = prior.rebind().choices

    def step(state: Any, _: Any) -> Any:
        state = marginal_move(prior, proposal, run, state)
        return state, state[0]

    return lax.scan(step, (theta, run(theta)), None, length=num_steps)[1]


def marginal_move(prior: Program, proposal: Any, run: Callable[[Choices], Any], state: tuple[Choices, Any]) -> Any:
    """Do one Metropolis-Hastings step on parameters with a run that has a `log_evidence`, which is kept with them."""
    theta, own = state
    moved = proposal(theta).rebind()
    new, other = moved.choices, run(moved.choices)
    there = prior.assess_inside(new)[0] + other.log_evidence - moved.log_density
    here = prior.assess_inside(theta)[0] + own.log_evidence - proposal(new).assess_inside(theta)[0]
    impossible = jnp.isneginf(here)  # such a point is always left
    go, _ = accepted(jnp.where(impossible, 0.0, there - jnp.where(impossible, 0.0, here)))
    return chosen(go, (new, other), (theta, own))


def smc2(
    prior: Program,
    model: Callable[[Choices], Posterior],
    num_outer: int,
    num_particles: int,
    proposal: Callable[[Choices], Program],
    *,
    num_moves: int = 1,
) -> Population:
    r"""SMC²: particles of parameters, each with a filter of its own; moved by PMMH after resampling. A keyless program.

    Args:
        prior: of the parameters $\theta$.
        model: `model(theta)`, a posterior as in `smc`.
        num_outer: how many parameters.
        num_particles: of each filter.
        proposal: as in `pmmh`.
        num_moves: how often each parameter is moved after a resampling step.

    Returns:
        A `Population` of parameters for $p(\theta, y_{1:T})$, each filter in its `state`.

    Source: Chopin, Jacob and Papaspiliopoulos 2013.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def parameters(centre, width):
        ...     ex.sample("scale", dist.LogNormal(centre, width))
        >>> @ex.model
        ... def walk(scale):
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, scale))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=2)
        >>> run = lambda: inference.smc2(
        ...     parameters(0.0, 1.0),
        ...     lambda theta: walk(theta["scale"]).given({"y": jnp.array([0.5, 1.0])}),
        ...     20,
        ...     30,
        ...     lambda theta: parameters(jnp.log(theta["scale"]), 0.5),
        ... ).log_weights
        >>> jax.jit(inference.keyed(run))(jax.random.key(0)).shape
        (20,)
    """
    cloud = spawn(prior.given({}), num_outer)
    filters = jax.vmap(lambda theta: spawn(model(theta), num_particles, time=0))(cloud.latents)
    cloud = _weighed_by(cloud, jax.vmap(advance)(filters), jnp.zeros(num_outer))
    for time in range(1, check_in_time(model(jax.tree.map(lambda x: x[0], cloud.latents)), "smc2")):
        cloud = resample(cloud)
        theta, filters = jax.vmap(lambda x, f, time=time: _moved(prior, model, proposal, x, f, time, num_moves))(
            cloud.latents, cloud.state
        )
        cloud = Population(cloud.posterior, theta, cloud.log_weights, cloud.log_offset, filters)
        before = jax.vmap(lambda f: f.log_evidence)(filters)
        cloud = _weighed_by(cloud, jax.vmap(lambda f: advance(resample(f)))(filters), before)
    return cloud


def _weighed_by(cloud: Population, filters: Any, before: Any) -> Population:
    """Weigh parameters by what their filters' evidence has changed."""
    change = jax.vmap(lambda f: f.log_evidence)(filters) - before
    return Population(cloud.posterior, cloud.latents, weighed(cloud.log_weights, change), cloud.log_offset, filters)


def _moved(prior: Program, model: Any, proposal: Any, theta: Any, own: Population, time: int, num_moves: int) -> Any:
    """Move parameters with their filter by PMMH on the first steps."""
    run = lambda theta: smc(model(theta), own.log_weights.shape[0], num_steps=time)  # noqa: E731
    step = lambda state, _: (marginal_move(prior, proposal, run, state), None)  # noqa: E731
    return lax.scan(step, (theta, own), None, length=num_moves)[0]
