"""What a reviewer found in programs with estimated densities: edges, refusals, and the tools around them."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import all_runs
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference, vi
from expectax.ppl import AddressError, ControlFlowError, DistributionError, StrategyError, SupportError

KEY = jax.random.key(71)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@ex.model
def narrow(a):
    u = ex.sample("u", dist.Normal(a, 1.0))
    ex.sample("x", dist.Uniform(u - 0.5, u + 0.5))


@ex.model
def factored():
    u = ex.sample("u", dist.Normal(0.0, 1.0))
    ex.factor("f", -(u**2))
    ex.sample("x", dist.Normal(u, 1.0))


@ex.model
def with_narrow():
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    ex.sample("m", vi.marginal(narrow(a), "x", vi.sir(2)))


@ex.model
def component(mean):
    k = ex.sample("k", dist.Bernoulli(0.3))
    ex.sample("y", dist.Normal(mean + 3.0 * k, 1.0))


@ex.model
def mixture():
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    ex.sample("p", vi.marginal(component(a), "y"))
    ex.observe("o", dist.Normal(a, 1.0), 0.3)


def test_programs_that_observe_are_no_distributions():
    """Their draws came from the prior, but their density held the factor: evidences were wrong without a word."""
    with pytest.raises(ControlFlowError, match="'f'.*factor"):
        vi.marginal(factored(), "x", vi.sir(2))

    @ex.model
    def guide(p):
        ex.factor("f", jnp.asarray(0.7))
        ex.sample("a", dist.Normal(p, 1.0))

    @ex.model
    def plain():
        ex.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ControlFlowError, match="guide.*'f'"):
        vi.value_and_grad(vi.elbo(plain().given({}), guide))(0.0, KEY)
    with pytest.raises(ControlFlowError, match="'f'"):
        inference.importance(plain().given({}), guide(0.0), key=KEY, num_particles=10)


@pytest.mark.parametrize(
    "algorithm",
    [
        vi.mcmc(vi.random_walk(0.1), 3),
        vi.smc(4, vi.random_walk(0.1), temperatures=[0.5, 0.5, 1.0]),
        vi.smc(2, vi.random_walk(0.1), temperatures=[0.5, 1.0, 1.0]),
        vi.smc(4, vi.random_walk(0.1), temperatures=[0.0, 0.5, 1.0]),
    ],
)
def test_impossible_particles_at_temperatures_that_stay(algorithm):
    """0 times minus infinity was nan; the mean of the rest was up to 2.7 times too large."""
    program = vi.marginal(narrow(0.0), "x", algorithm)
    w = jax.jit(jax.vmap(lambda k: program.assess({"x": 0.3}, key=k)[0]))(jax.random.split(KEY, 20_000))
    assert not np.isnan(w).any()
    exact = stats.norm.cdf(0.8) - stats.norm.cdf(-0.2)
    estimate = np.exp(np.asarray(w))
    assert abs(estimate.mean() - exact) < 5 * estimate.std() / len(w) ** 0.5


def test_normalised_targets_of_impossible_particles():
    @ex.model
    def needle():
        z = ex.sample("z", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.Uniform(z, z + 0.01))

    posterior = needle().given({"y": 0.3})
    program = vi.normalize(posterior, vi.sir(2))
    assert program.assess({"z": 2.0}, key=KEY)[0] == -np.inf
    assert program.simulate(KEY).log_density == np.inf
    logs = [
        inference.importance(posterior, program, key=key, num_particles=20_000).log_evidence
        for key in jax.random.split(KEY, 30)
    ]
    estimate = np.exp(np.array(logs))
    exact = 100.0 * (stats.norm.cdf(0.3) - stats.norm.cdf(0.29))
    assert abs(estimate.mean() - exact) < 5 * estimate.std() / len(logs) ** 0.5 + 1e-3


def test_a_chain_that_starts_at_an_estimate_of_zero_moves_on():
    posterior = with_narrow().given({"m": {"x": 0.3}})
    run = lambda key: inference.mcmc(  # noqa: E731
        posterior, inference.pseudo_marginal(), key=key, num_warmup=500, num_samples=1000
    )
    for key in jax.random.split(KEY, 2):
        draws = np.asarray(run(key).choices["a"])
        assert np.isfinite(draws).all()
        assert min(len(np.unique(row)) for row in draws) > 50


@pytest.mark.parametrize("inside", [vi.sir(2), vi.exact()], ids=["sir", "exact"])
def test_the_prior_proposes_where_marginals_stand_in_loops(inside):
    """A mask that became a tracer in the loop once said that a choice was given in part."""

    @ex.model
    def flip(a):
        u = ex.sample("u", dist.Bernoulli(0.2 + 0.5 * a))
        ex.sample("x", dist.Bernoulli(0.3 + 0.4 * u))

    @ex.model
    def loop():
        a = ex.sample("a", dist.Bernoulli(0.4))
        lax.scan(lambda c, _: (c, ex.sample("m", vi.marginal(flip(a), "x", inside))["x"]), 0, length=2)

    program = vi.marginal(loop(), "m/x", vi.sir(2))
    value = {"m": {"x": jnp.array([1, 0])}}
    q, estimates = all_runs(lambda: vi.log_density(program, value))
    exact = sum(
        pa * np.prod([np.where(x, p, 1 - p) for x in (1, 0)])
        for pa, p in ((0.6, 0.3 + 0.4 * 0.2), (0.4, 0.3 + 0.4 * 0.7))
    )
    assert abs(np.sum(q * np.exp(estimates)) - exact) < 1e-10
    p, (_, log_w) = all_runs(lambda: vi.simulate(program))
    assert abs(np.sum(p * np.exp(-log_w)) - 4.0) < 1e-10  # the number of values of x: each has E[1/w] = 1/p


def test_traces_are_saved_with_their_estimate(tmp_path):
    trace = with_narrow().simulate(KEY)
    trace.save(tmp_path / "trace.npz")
    loaded = ex.load_trace(tmp_path / "trace.npz", with_narrow())
    assert loaded.log_density == trace.log_density and loaded["m/x"] == trace["m/x"]
    assert pickle.loads(pickle.dumps(trace)).log_density == trace.log_density


def test_tools_around_marginals():
    draws = {"a": jnp.array([-5.0, 5.0])}
    predicted = ex.predictive(mixture(), draws, key=KEY)
    assert predicted["p"]["y"].shape == (2,) and predicted["o"].shape == (2,)
    assert abs(ex.condition(mixture(), {"a": 0.0}).assess({"p": {"y": 0.0}})[0] - _mixture_at_zero()) < 1e-12
    with pytest.raises(ControlFlowError, match="stochastic"):
        ex.condition(mixture(), {"p": {"y": 0.0}}).simulate(KEY)
    with pytest.raises(ControlFlowError, match="'y'.*one density together"):
        ex.debug(mixture(), {"a": 0.0, "p": {"y": 1.0}})
    with pytest.raises(StrategyError, match="vi.marginal"):
        vi.with_gradients(mixture(), {"p/y": vi.Reinforce()})


def _mixture_at_zero() -> Any:
    normal = stats.norm.logpdf
    return normal(0.0) + np.log(0.7 * np.exp(normal(0.0)) + 0.3 * np.exp(normal(3.0))) + normal(0.3)


def test_small_targets_that_elimination_refuses_are_enumerated():
    @ex.model
    def sums():
        k = ex.sample("k", dist.Categorical(jnp.ones(3) / 3).expand([2]))
        ex.sample("y", dist.Normal(jnp.sum(k) * 1.0, 1.0))

    program = vi.normalize(sums().given({"y": 2.0}), vi.exact())
    total = sum(np.exp(program.assess({"k": jnp.array([a, b])})[0]) for a in range(3) for b in range(3))
    assert abs(total - 1.0) < 1e-12


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vi.sir(2.5), ValueError, "whole number"),
        (lambda: vi.sir(True), ValueError, "whole number"),
        (lambda: vi.random_walk(-1.0), ValueError, "positive"),
        (lambda: vi.mcmc(vi.random_walk(0.1), 2.5), ValueError, "whole num_steps"),
        (lambda: vi.smc(2, None), TypeError, "kernel"),
        (
            lambda: vi.marginal(narrow(0.0), "x", vi.mcmc(vi.random_walk({"v": 0.1}), 2)).simulate(KEY),
            AddressError,
            "'v'.*'u'",
        ),
        (
            lambda: vi.normalize(simplex().given({"y": 0}), vi.mcmc(vi.random_walk(0.1), 2)).simulate(KEY),
            SupportError,
            "'w'",
        ),
        (
            lambda: vi.wake_sleep(
                simplex().given({"y": 0}), lambda p: vi.normalize(simplex().given({"y": 0}), vi.sir(2)), 2
            ).surrogate(0.1, KEY),
            DistributionError,
            "'w'",
        ),
    ],
)
def test_arguments_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


@ex.model
def simplex():
    w = ex.sample("w", dist.Dirichlet(2.0 * jnp.ones(3)))
    ex.sample("y", dist.Categorical(w))
