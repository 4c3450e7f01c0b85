"""Backward simulation by enumeration, its law given the particles, smoothing against the Gaussian; the online filter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

from expectax import dist, inference, ppl
from expectax.inference._online_filter import stepped
from filter_models import MODELS, Y, coin, guided, look, switch
from helpers import count_compiles, two_stage_z

pytestmark = [pytest.mark.usefixtures("x64", "quick_compiles"), pytest.mark.slow]
KEY = jax.random.key(20260806)


def prove(posterior: Any, method: Any, resampler: Any = "systematic", **settings: Any) -> None:
    """E[Z-hat [the trajectory is z]] is the density at z, for every z."""

    def algorithm(target):
        filtered = inference.filtering(target, 2, method=resampler, **settings)
        return inference.smoothing(target, filtered, 1, method)

    inference.assert_valid(algorithm, posterior)


@pytest.mark.parametrize("resampler", ["systematic", "killing"])
@pytest.mark.parametrize("method", ["ffbs", "mcmc"])
def test_backward_simulation_is_properly_weighted(method, resampler):
    """Filter, resampling by need and backward draws together; without the transition in the backward weights it fails."""
    prove(MODELS["chain"](), method, resampler, ess_threshold=0.9)


@ppl.model
def started():
    """A latent before the scan that enters the first carry only, and is observed."""
    start = coin("start", 0.4)
    look("first", start)
    lax.scan(switch, start, None, length=2)


@pytest.mark.parametrize("method", ["ffbs", "mcmc"])
@pytest.mark.parametrize("name", ["backwards", "nested", "started"])
def test_models_of_every_form(name, method):
    posterior = started().given({"first": 0.8, "y": Y[:2]}) if name == "started" else MODELS[name]()
    prove(posterior, method, ess_threshold=1.0)


def test_a_guided_filter_is_smoothed():
    prove(MODELS["chain"](), "ffbs", proposal=guided, ess_threshold=1.0)


def test_the_law_of_the_draws_given_the_particles():
    """Each backward draw has the probability of its formula, computed here by numpy."""
    posterior = MODELS["chain"]()
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=3, ess_threshold=1.0)
    law = inference.exact(lambda: inference.smoothing(posterior, filtered, 1).choices["z"][0])
    z, w = np.asarray(filtered.choices["z"], float), np.asarray(filtered.log_weights)
    expected: dict[tuple[int, ...], float] = {}
    for a in np.ndindex(3, 3, 3):
        total = special.softmax(w[2])[a[2]]
        for t in (1, 0):
            up = 0.25 + 0.5 * z[t]
            transition = np.where(z[t + 1, a[t + 1]] == 1, up, 1 - up)
            total *= special.softmax(w[t] + np.log(transition))[a[t]]
        path = tuple(int(z[t, a[t]]) for t in range(3))
        expected[path] = expected.get(path, 0.0) + total
    for path, probability in expected.items():
        found = law.expectation(lambda value, path=path: jnp.all(value == jnp.array(path)) * 1.0)
        np.testing.assert_allclose(found, probability, atol=1e-12)


# --- a linear Gaussian model ------------------------------------------------------------------------------------------

TIMES = 12
OBSERVED = np.random.default_rng(5).normal(size=TIMES) * 1.2


@ppl.model
def walk():
    def step(x, _):
        x = ppl.sample("x", dist.Normal(0.9 * x, 0.6))
        ppl.sample("y", dist.Normal(x, 0.8))
        return x, None

    lax.scan(step, 0.0, None, length=TIMES)


def smoothed(seen: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return means and variances given the first observations, and their log evidence: what the RTS smoother computes."""
    lower = np.array([[0.9 ** (i - j) * (i >= j) for j in range(TIMES)] for i in range(TIMES)])
    cov = 0.36 * lower @ lower.T
    spread = cov[:seen, :seen] + 0.64 * np.eye(seen)
    gain = cov[:, :seen] @ np.linalg.inv(spread)
    seen_y, (_, log_determinant) = OBSERVED[:seen], np.linalg.slogdet(2 * np.pi * spread)
    evidence = -0.5 * (seen_y @ np.linalg.solve(spread, seen_y) + log_determinant)
    return gain @ OBSERVED[:seen], np.diag(cov - gain @ cov[:seen]), float(evidence)


@pytest.mark.parametrize("method", ["ffbs", "mcmc"])
def test_moments_against_the_exact_smoother(method):
    """Z-hat / Z times the trajectories' first and second moments, at all times, is unbiased."""
    posterior = walk().given({"y": OBSERVED})
    mean, variance, log_evidence = smoothed(TIMES)

    @jax.jit
    @jax.vmap
    def run(key):
        filtered = inference.particle_filter(posterior, key=key, num_particles=100, store="filtering")
        paths = inference.smooth(
            posterior, filtered, key=jax.random.fold_in(key, 1), num_trajectories=20, method=method
        )
        x = paths.choices["x"]
        moments = jnp.concatenate([x.mean(0), (x**2).mean(0), jnp.ones(1)])
        return jnp.exp(paths.log_evidence - log_evidence) * moments

    exact = np.concatenate([mean, variance + mean**2, [1.0]])
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), exact, KEY, 400)


def test_fixed_lag():
    """With lag 0 the filtering means, with a lag of the whole length the trajectories' means; between, E[x_t | y to t + L]."""
    posterior = walk().given({"y": OBSERVED})
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=50)
    np.testing.assert_allclose(inference.fixed_lag_mean(filtered, 0)["x"], filtered.mean()["x"], rtol=1e-12)
    np.testing.assert_allclose(
        inference.fixed_lag_mean(filtered, TIMES)["x"], filtered.particles.mean()["x"], rtol=1e-12
    )
    many = inference.particle_filter(posterior, key=KEY, num_particles=20_000)
    exact = [smoothed(min(t + 4, TIMES))[0][t] for t in range(TIMES)]
    assert np.abs(np.asarray(inference.fixed_lag_mean(many, 3)["x"]) - exact).max() < 0.03  # sd about 0.005


# --- online -----------------------------------------------------------------------------------------------------------


def test_online_evidence_is_unbiased_and_its_steps_are_the_filters():
    """By enumeration: the law of the evidence and the weights online is that of the batch filter."""
    example = MODELS["chain"]()
    online = inference.online_filter(example, num_particles=2, ess_threshold=0.9)

    def run():
        cloud, _, _ = online.steps().start()
        state = stepped(online, cloud, jnp.asarray(0), {"y": jnp.asarray(Y[0])})
        for y in Y[1:]:
            state = stepped(online, state.cloud, state.time, {"y": jnp.asarray(y)})
        return _statistics(state.log_evidence, state.particles.log_weights, state.particles.choices["z"])

    def batch():
        filtered = inference.filtering(example, 2, ess_threshold=0.9, store="filtering")
        return _statistics(filtered.log_evidence, filtered.particles.log_weights, filtered.particles.choices["z"])

    ours, theirs = inference.exact(run).expectation(), inference.exact(batch).expectation()
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def _statistics(log_evidence, log_weights, z):
    evidence = jnp.exp(log_evidence)
    return jnp.stack([evidence, evidence**2, evidence * log_weights[0], evidence * z[1], log_evidence * z[0]])


def test_online_steps_compile_nothing():
    online = inference.online_filter(walk().given({"y": OBSERVED}), num_particles=100)
    state = online.start(KEY)
    keys = list(jax.random.split(KEY, 5))
    state = online.step(keys[0], state, {"y": 0.1})
    with count_compiles() as compiles:
        for key in keys[1:]:
            state = online.step(key, state, {"y": 0.3})
    assert compiles == [] and int(state.time) == 5


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("several", "not determined by the choices"),
        ("latents_before", "latents before the scan"),
        ("sites_after", "after its scan"),
    ],
)
def test_what_has_no_backward_density_is_refused(name, message):
    posterior = MODELS[name]()
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=3)
    with pytest.raises(ppl.ControlFlowError, match=message):
        inference.smooth(posterior, filtered, key=KEY, num_trajectories=2)


def test_other_refusals():
    posterior = MODELS["chain"]()
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=3)
    with pytest.raises(ValueError, match="got 2, 1 and 'best'"):
        inference.smooth(posterior, filtered, key=KEY, num_trajectories=2, method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lag >= 0, got -1"):
        inference.fixed_lag_mean(filtered, -1)
    online = inference.online_filter(posterior, num_particles=3)
    state = online.start(KEY)
    with pytest.raises(ppl.AddressError, match=r"\['y'\], got \['z'\]"):
        online.step(KEY, state, {"z": 0.1})
    with pytest.raises(ppl.ShapeError, match=r"'y' has the shape \(\) at each step, got \(2,\)"):
        online.step(KEY, state, {"y": jnp.zeros(2)})
    with pytest.raises(ppl.ControlFlowError, match="runs over inputs"):
        inference.online_filter(MODELS["backwards"](), num_particles=3).start(KEY)
