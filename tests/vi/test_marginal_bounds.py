"""Bounds with estimated densities: values and gradients against sums over all runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import all_runs
from marginal_cases import chain

import expectax as ex
from expectax import dist, vi
from helpers import two_stage_z

KEY = jax.random.key(51)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@ex.model
def target():
    x = ex.sample("x", dist.Bernoulli(0.4))
    ex.sample("data", dist.Bernoulli(0.3 + 0.5 * x))


@ex.model
def hierarchical(p):
    u = ex.sample("u", dist.Bernoulli(p))
    ex.sample("x", dist.Bernoulli(0.8 * p + 0.1 - 0.3 * u * p))


def back(p, latents):
    @ex.model
    def reverse():
        ex.sample("u", dist.Bernoulli(0.3 + 0.4 * p * latents["x"]))

    return reverse()


POSTERIOR = target().given({"data": 1})
BOUNDS = {
    "hvi": vi.hvi(POSTERIOR, hierarchical, back),
    "iwhvi": vi.iwhvi(POSTERIOR, hierarchical, 2, back),
    "iwhvi, prior": vi.iwhvi(POSTERIOR, hierarchical, 2),
    "diwhvi": vi.diwhvi(POSTERIOR, hierarchical, 2, 1, back),
    "normalized": vi.elbo(POSTERIOR, lambda p: vi.normalize(POSTERIOR, vi.sir(2, one_bit(p)))),
    "estimated model": vi.elbo(
        lambda p: vi.marginal(chain(p), "x", vi.sir(2, by_half())).given({}), lambda p: one_x(p)
    ),
}


@ex.model
def one_bit(p):
    ex.sample("x", dist.Bernoulli(p))


@ex.model
def one_x(p):
    ex.sample("x", dist.Bernoulli(0.9 * p))


@ex.model
def by_half():
    ex.sample("u", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(n, s, id=f"{n}-{how}", marks=() if s and n == "normalized" else pytest.mark.slow)
        for n in BOUNDS
        for how, s in (("default", None), ("reinforce", vi.Reinforce(baseline=None)))
    ],
)
def test_bounds_with_estimates_have_exact_gradients(name, strategy):
    """A hidden choice whose score is lost, or a retained particle without derivative, biases these."""
    bound = BOUNDS[name]
    strategies = {c.site.address: strategy for c in bound.staged(0.6).layout.choices} if strategy else None

    def expected(p: float) -> float:
        probabilities, values = all_runs(lambda: bound.function(*bound.captured, jnp.asarray(p)))
        return float(np.sum(np.where(probabilities > 0, probabilities * values, 0.0)))

    exact = (expected(0.6 + 1e-5) - expected(0.6 - 1e-5)) / 2e-5
    run = jax.jit(
        jax.vmap(lambda key: jnp.stack(jax.value_and_grad(lambda p: bound.staged(p, strategies).surrogate(key))(0.6)))
    )
    few = run(jax.random.split(KEY, 20))
    if np.all(np.std(few, axis=0) < 1e-9):  # all choices are enumerated
        np.testing.assert_allclose(few[0], [expected(0.6), exact], rtol=1e-7)
    else:
        two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array([expected(0.6), exact]), KEY, 4000)
