"""The filter on linear-Gaussian models of every form: scans in all places, latents before, in and after them.

For each, Z-hat / Z and its product with the trajectories' mean are unbiased (Del Moral 2004, theorem 7.4.2); the exact
evidence and posterior means are those of the quadratic log density.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from expectax import dist, inference, ppl
from helpers import gaussian_log_integral, two_stage_z

KEY = jax.random.key(20260804)
TIMES = 4
Y = np.array([0.4, 1.3, -0.6, 0.9])
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def normal(address: str, mean: Any, sd: float) -> Any:
    return ppl.sample(address, dist.Normal(mean, sd))


def level(s: Any, _: Any) -> Any:
    """One step of a first-order autoregression, observed."""
    s = normal("s", 0.8 * s, 0.6)
    normal("y", s, 0.9)
    return s, s


MODELS: dict[str, tuple[ppl.Model, dict[str, Any]]] = {}


def case(**observations: Any) -> Any:
    """Register a model with its observations."""

    def register(function: Any) -> Any:
        MODELS[function.__name__] = ppl.model(function), observations
        return function

    return register


@case(first=0.7, y=Y)
def latents_before():
    """A start, an observation of it, and a parameter that every step uses."""
    start = normal("start", 0.5, 0.7)
    normal("first", start, 0.8)
    drift = normal("drift", 0.0, 0.5)

    def step(s, _):
        s = normal("s", 0.8 * s + drift, 0.6)
        normal("y", s - 0.2 * drift, 0.9)
        return s, None

    lax.scan(step, start, None, length=TIMES)


@case(y=Y, last=0.3)
def latents_after():
    """A latent and an observation of the end, the start and all outputs, which a plain scan adds up."""
    start = normal("start", 0.5, 0.7)
    final, levels = lax.scan(level, start, None, length=TIMES)
    weights = lax.scan(lambda c, _: (0.5 * c, c), 1.0, None, length=TIMES)[1]
    total, _ = lax.scan(lambda c, v: (c + v, None), 0.0, weights * levels)
    end = normal("end", final + 0.5 * start, 0.6)
    normal("last", end - 0.3 * total, 0.7)
    return end


@case(y=Y)
def noise_before():
    """Noise drawn before the scan and fed to it, one input per particle, beside inputs that all share."""
    noise = jax.vmap(lambda m: normal("noise", m, 1.0))(jnp.array([0.0, 0.3, -0.3, 0.6]))

    def step(s, x):
        e, gain = x
        s = 0.8 * s + gain * e
        normal("y", s, 0.9)
        return s, s

    lax.scan(step, 0.2, (noise, jnp.array([0.5, 0.6, 0.7, 0.8])))


@case(y=Y)
def backwards():
    """A reverse scan with inputs: time T comes first; its outputs keep their places."""

    def step(s, x):
        s = normal("s", 0.8 * s + x, 0.6)
        normal("y", s + x, 0.9)
        return s, 2.0 * s

    first, doubled = lax.scan(step, 0.5, jnp.array([0.0, 0.1, 0.3, 0.6]), reverse=True)
    normal("after", first - 0.2 * doubled[0] + 0.3 * doubled[3], 0.8)


@case(y=Y)
def compiled():
    """A scan inside jax.jit inside jax.checkpoint, with sites beside it."""

    @jax.checkpoint
    @jax.jit
    def series(start):
        drift = normal("drift", 0.0, 0.4)
        return lax.scan(lambda s, _: level(s + drift, _), start, None, length=TIMES, unroll=2)[0]

    normal("after", series(normal("start", 0.5, 0.7)), 0.5)


@ppl.model
def move(s):
    return normal("to", 0.8 * s, 0.4) + normal("jump", 0.1, 0.3)


@case(y=Y, seen={"at": Y[::-1].copy()})
def nested():
    """Nested models in the body, one with latents, one with an observation."""

    @ppl.model
    def look(s):
        normal("at", s, 1.2)

    def step(s, _):
        s = ppl.sample("move", move(s))
        normal("y", s, 0.9)
        ppl.sample("seen", look(s))
        return s, s

    lax.scan(step, 0.5, None, length=TIMES)


@case(y=np.stack([Y, -Y[::-1], 0.5 * Y], 1))
def lanes():
    """Lanes in the body, coupled from step to step."""
    sds = jnp.array([0.5, 0.6, 0.7])

    def lane(s, sd):
        s = ppl.sample("s", dist.Normal(s, sd))
        normal("y", s, 1.2)
        return s

    lax.scan(
        lambda s, _: (jax.vmap(lane)(0.6 * s + 0.2 * s.mean(), sds), None), jnp.array([0.5, 0.0, -0.5]), None, TIMES
    )


@case(y=np.stack([Y, 0.5 * Y], 1))
def inner_scan():
    """A scan in the body: two steps between the times."""
    lax.scan(lambda s, _: (lax.scan(level, s, None, length=2)[0], None), 0.5, None, length=TIMES)


@case(y=Y)
def observe_then_move():
    """The observation comes before the move, which the last step makes unweighed; the carry has several parts."""

    def step(state, _):
        s, mean = state["s"], state["mean"]
        normal("y", s, 0.9)
        s = normal("s", 0.8 * s + 0.2 * mean, 0.6)
        return {"s": s, "mean": 0.5 * (mean + s)}, None

    start = normal("start", 0.5, 0.7)
    lax.scan(step, {"s": start, "mean": jnp.zeros(())}, None, length=TIMES)


# --- tests ------------------------------------------------------------------------------------------------------------


def exact(posterior: ppl.Posterior) -> tuple[float, np.ndarray]:
    """Return the log evidence and the posterior mean of the flattened latents."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), posterior.latent_shapes)
    flat, unravel = ravel_pytree(zeros)

    def log_density(v):
        return posterior.log_density(unravel(v))

    gradient, hessian = jax.jit(lambda v: (jax.grad(log_density)(v), jax.hessian(log_density)(v)))(flat)
    return gaussian_log_integral(log_density, flat.size), np.linalg.solve(-np.asarray(hessian), np.asarray(gradient))


@pytest.mark.parametrize("name", MODELS)
def test_evidence_and_trajectories_are_unbiased(name):
    model, observations = MODELS[name]
    posterior = model().given(observations)
    log_evidence, mean = exact(posterior)

    @jax.jit
    @jax.vmap
    def run(key):
        filtered = inference.particle_filter(posterior, key=key, num_particles=64, ess_threshold=0.9)
        ratio = jnp.exp(filtered.log_evidence - log_evidence)
        return ratio * jnp.append(ravel_pytree(filtered.particles.mean())[0], 1.0), filtered.resampled.sum()

    assert np.asarray(run(jax.random.split(KEY, 500))[1]).mean() > 0.5  # the filter does resample
    two_stage_z(lambda key, n: run(jax.random.split(key, n))[0], np.append(mean, 1.0), KEY, 500)


@pytest.mark.parametrize("name", MODELS)
def test_without_resampling_it_is_importance_sampling(name):
    """With ess_threshold=0 a particle's log weight is the log density of the observations at its choices."""
    model, observations = MODELS[name]
    posterior = model().given(observations)
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=5, ess_threshold=0.0)
    assert not filtered.resampled.any()
    choices = filtered.particles.choices
    assert jax.tree.map(lambda v: v.shape[1:], choices) == jax.tree.map(lambda s: s.shape, posterior.latent_shapes)

    @jax.jit
    @jax.vmap
    def weight(latents):
        densities = posterior.site_log_densities(latents)
        prior = ravel_pytree(posterior.latents(densities))[0].sum()
        return posterior.log_density(latents) - prior

    np.testing.assert_allclose(filtered.particles.log_weights, weight(choices), rtol=1e-11)
    assert float(filtered.particles.log_offset) == 0.0
