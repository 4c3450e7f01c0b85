"""Pseudo-marginal chains: exact for a noisy estimate, and refused by kernels that need an exact density."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference, vi
from helpers import two_stage_uniform

KEY = jax.random.key(81)
pytestmark = pytest.mark.usefixtures("x64")


@ex.model
def noisy(theta):
    u = ex.sample("u", dist.Normal(theta, 1.0))
    ex.sample("y", dist.Normal(u, 0.5))


@ex.model
def model():
    theta = ex.sample("theta", dist.Normal(0.0, 1.0))
    ex.sample("data", vi.marginal(noisy(theta), "y", vi.sir(2)))


def test_a_step_leaves_the_posterior_alone():
    """Of theta, data and the data's weight drawn together, theta has its prior, before and after any steps.

    Catches: the estimate made anew at the present point, a draw's weight in the place of a score's, a wrong sign of the
    acceptance; the estimate has a standard deviation of about 1, two particles for a density of width 0.5.
    """
    kernel = inference.pseudo_marginal()
    parameters = {"step_size": jnp.asarray(1.0), "inverse_mass_matrix": jnp.ones(1)}

    def after(key: Any) -> Any:
        key_draw, key_run = jax.random.split(key)
        trace = model().simulate(key_draw)
        posterior = model().given({"data": trace.choices["data"]})

        target = inference.Target(posterior)

        def step(state: Any, key: Any) -> Any:
            return inference.keyed(kernel.step)(key, target, state, parameters)[0], None

        start = inference.State(trace.choices["theta"][None], trace.log_density)
        state, _ = lax.scan(step, start, jax.random.split(key_run, 10))
        return state.position[0], trace.choices["theta"]

    run = jax.jit(jax.vmap(after))

    def uniforms(key: Any, n: int) -> Any:
        position, old = run(jax.random.split(key, n))
        assert np.mean(position != old) > 0.5  # the chain moves
        return stats.norm.cdf(position)

    two_stage_uniform(uniforms, KEY, 20_000)


def test_the_posterior_of_a_hidden_layer():
    """theta | y is normal: variance 1 / (1 + 1/1.25), mean 2 * variance / 1.25."""
    posterior = model().given({"data": {"y": 2.0}})
    chains = inference.mcmc(
        posterior, inference.pseudo_marginal(), key=KEY, num_warmup=1000, num_samples=4000, num_chains=4
    )
    variance = 1.0 / (1.0 + 1.0 / 1.25)
    x = np.asarray(chains.choices["theta"])
    error = float(chains.summary()["theta"].mcse_mean)
    assert abs(x.mean() - 2.0 * variance / 1.25) < 5 * error
    assert abs(x.var() / variance - 1.0) < 0.15
    assert abs(chains.statistics["acceptance_rate"].mean() - 0.2) < 0.1


def test_settings_and_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match="target_acceptance"):
        inference.pseudo_marginal(target_acceptance=1.0)
    with pytest.raises(ex.ppl.DistributionError, match="only estimated"):
        inference.mcmc(model().given({"data": {"y": 2.0}}), inference.nuts(), key=KEY)


@pytest.mark.parametrize("dense", [False, True])
def test_the_scale_is_that_of_the_target(dense):
    @ex.model
    def pair():
        ex.sample("a", dist.Normal(0.0, 10.0))
        ex.sample("b", dist.Normal(0.0, 0.1))

    kernel = inference.pseudo_marginal(dense_mass=dense)
    chains = inference.mcmc(pair().given({}), kernel, key=KEY, num_warmup=3000, num_samples=100, num_chains=2)
    matrix = np.asarray(chains.inverse_mass_matrix)
    ratio = matrix[:, 0] / matrix[:, 1] if not dense else matrix[:, 0, 0] / matrix[:, 1, 1]
    assert np.all(ratio > 1e3) and np.all(ratio < 1e5)


def test_a_chain_that_never_met_a_possible_point_is_no_sample():
    @ex.model
    def needle(theta):
        u = ex.sample("u", dist.Normal(theta, 1.0))
        ex.sample("y", dist.Uniform(u, u + 1e-12))

    @ex.model
    def impossible():
        theta = ex.sample("theta", dist.Normal(0.0, 1.0))
        ex.sample("data", vi.marginal(needle(theta), "y", vi.sir(1)))

    posterior = impossible().given({"data": {"y": 0.3}})
    with pytest.raises(ex.ppl.NonFiniteError, match="more particles"):
        inference.mcmc(posterior, inference.pseudo_marginal(), key=KEY, num_warmup=10, num_samples=10)
