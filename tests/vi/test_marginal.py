"""Marginals and normalised targets: the joint identity, exactly, for every algorithm; nested; and the densities themselves.

The identity is checked by enumerating all random choices of an algorithm, for every value and several test functions:
the sum over draws of the value must be the sum over its scores, weighed by their density.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from marginal_cases import by_x, chain, check_identity, flip, guess, log_mean_exp, normals, skewed, two_layers
from scipy import stats

import expectax as ex
from expectax import dist, vi

KEY = jax.random.key(51)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


class OneDraw:
    """An algorithm of a user's own: one particle of a fixed proposal."""

    def run(self, target):
        z, log_r = vi.simulate(skewed())
        log_p = vi.log_density(target, z)
        return vi.Run(z, log_p, log_p - log_r)

    def conditional(self, target, latents, log_density):
        return log_density - vi.log_density(skewed(), latents)


ALGORITHMS = {
    "exact": vi.exact(),
    "sir1": vi.sir(1),
    "sir2": vi.sir(2),
    "sir3": vi.sir(3),
    "sir2_proposal": vi.sir(2, skewed()),
    "sir2_informed": vi.sir(2, lambda kept: by_x(kept["x"])),
    "own": OneDraw(),
    "ais": vi.smc(1, flip, temperatures=[0.3, 1.0]),
    "ais3": vi.smc(1, flip, temperatures=[0.2, 0.7, 1.0]),
    "smc": vi.smc(2, flip, temperatures=[0.4, 1.0]),
    "smc_proposal": vi.smc(2, flip, temperatures=[0.4, 1.0], proposal=skewed()),
    "mcmc": vi.mcmc(flip, 2),
    "sir_of_normalized": vi.sir(2, lambda kept: vi.normalize(chain(0.3).given({"x": kept["x"]}), vi.sir(2, skewed()))),
}


QUICK = {"exact", "sir2", "sir2_informed", "own", "ais"}


def some_slow(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(ALGORITHMS))
def test_the_joint_identity_of_marginals(name):
    """F6, F7, F8: a wrong weight of a draw, of a score, or a relation between them that is not that of the contract."""
    check_identity(vi.marginal(chain(0.3), "x", ALGORITHMS[name]), [{"x": 0}, {"x": 1}])


@pytest.mark.parametrize(
    "name", some_slow(["exact", "sir1", "sir2", "sir3", "sir2_proposal", "own", "ais", "ais3", "smc", "mcmc"])
)
def test_the_joint_identity_of_normalised_targets(name):
    """F9, with the same bugs in mind."""
    program = vi.normalize(chain(0.3).given({"x": 1}), ALGORITHMS[name])
    check_identity(program, [{"u": 0}, {"u": 1}])


@pytest.mark.parametrize(
    "algorithm", [pytest.param(vi.sir(1), marks=pytest.mark.slow), vi.sir(2)], ids=["sir1", "sir2"]
)
def test_the_joint_identity_two_deep(algorithm):
    """F10: a marginal inside a marginal, whose inner estimate enters the outer weights; hidden, and kept."""
    check_identity(vi.marginal(two_layers(0.3), "y", algorithm), [{"y": 0}, {"y": 1}])
    kept = [{"sub": {"x": x}, "y": y} for x in (0, 1) for y in (0, 1)]
    check_identity(vi.marginal(two_layers(0.3), ["sub", "y"], algorithm), kept)


def test_a_normalised_target_with_an_estimated_density():
    """The estimate that weighs a particle is the one in the density of what is returned."""
    target = two_layers(0.3).given({"y": 1, "v": 0})
    check_identity(vi.normalize(target, vi.sir(2, inner_guess())), [{"sub": {"x": 0}}, {"sub": {"x": 1}}])


@ex.model
def inner_guess():
    ex.sample("sub", bit())


@ex.model
def bit():
    ex.sample("x", dist.Bernoulli(0.6))


# --- the densities themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [None, lambda kept: guess(kept["x"])], ids=["prior", "custom"])
@pytest.mark.parametrize("n", [1, 5])
def test_the_marginal_of_normals(n, proposal):
    """F6 and F7: the peer's -2.545 comes of a weight that forgets the proposal."""
    program = vi.marginal(normals(1.0), "x", vi.sir(n, proposal))
    keys = jax.random.split(KEY, 40_000)
    score = jax.jit(jax.vmap(lambda k: program.assess({"x": 0.7}, key=k)[0]))
    estimate, error = log_mean_exp(score(keys))
    assert abs(estimate + 1.388) < 5 * error + 5e-4
    if n == 1 and proposal is not None:
        return  # 1/w has infinite variance
    drawn = jax.jit(jax.vmap(vi.marginal(normals(0.5), "x", vi.sir(n, proposal)).simulate))(keys)
    ratio = np.exp(stats.norm.logpdf(drawn["x"]) - drawn.log_density)
    assert abs(ratio.mean() - 1.0) < 3.0 * ratio.std() / len(ratio) ** 0.5


def test_the_posterior_of_a_normalised_target():
    """F9: self-normalised importance sampling of N(.5, .5) with ten draws of N(0, 1) has the mean .475."""

    @ex.model
    def model():
        z = ex.sample("z", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.Normal(z, 1.0))

    program = vi.normalize(model().given({"y": 1.0}), vi.sir(10))
    z = jax.jit(jax.vmap(program.simulate))(jax.random.split(KEY, 100_000))["z"]
    assert abs(z.mean() - 0.475) < 5 * z.std() / len(z) ** 0.5 + 5e-4


def test_an_exact_marginal_is_the_sum():
    program = vi.marginal(chain(0.3), "x")
    for x in (0, 1):
        exact = 0.7 * stats.bernoulli.pmf(x, 0.2) + 0.3 * stats.bernoulli.pmf(x, 0.7)
        assert abs(program.assess({"x": x})[0] - np.log(exact)) < 1e-12
    assert abs(program.simulate(KEY).log_density - program.assess(program.simulate(KEY).choices)[0]) < 1e-12


def test_a_chain_is_summed_by_the_forward_recursion():
    """Without it, 3^60 terms."""
    steps, states = 60, 3
    transition = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    means = jnp.array([-1.0, 0.0, 2.0])

    @ex.model
    def hmm():
        def step(k, _):
            k = ex.sample("k", dist.Categorical(transition[k]))
            ex.sample("y", dist.Normal(means[k], 1.0))
            return k, None

        lax.scan(step, 0, length=steps)

    y = jnp.linspace(-2.0, 3.0, steps)
    log_p, _ = vi.marginal(hmm(), "y", vi.exact()).assess({"y": y})
    alpha = np.eye(states)[0]
    total = 0.0
    for value in np.asarray(y):
        alpha = (alpha @ np.asarray(transition)) * stats.norm.pdf(value, np.asarray(means))
        total += np.log(alpha.sum())
        alpha /= alpha.sum()
    assert abs(log_p - total) < 1e-9


# --- state-space models -----------------------------------------------------------------------------------------------


@ex.model
def hidden_walk(steps, reverse=False):
    start = ex.sample("start", dist.Bernoulli(0.4))

    def step(x, _):
        x = ex.sample("x", dist.Bernoulli(0.2 + 0.5 * x + 0.1 * start))
        ex.sample("y", dist.Bernoulli(0.1 + 0.7 * x))
        return x, None

    lax.scan(step, start, length=steps, reverse=reverse)


@pytest.mark.parametrize(("n", "steps"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_joint_identity_of_filters(n, steps, reverse):
    """A conditional filter that forgets its path's place, or resamples it away, fails here."""
    program = vi.marginal(hidden_walk(steps, reverse), "y", vi.bootstrap_filter(n))
    ys = [{"y": jnp.array([(i >> t) & 1 for t in range(steps)])} for i in range(2**steps)]
    check_identity(program, ys)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_the_joint_identity_of_normalised_trajectories(reverse):
    target = hidden_walk(2, reverse).given({"y": jnp.array([1, 0])})
    values = [{"start": s, "x": jnp.array([a, b])} for s in (0, 1) for a in (0, 1) for b in (0, 1)]
    check_identity(vi.normalize(target, vi.bootstrap_filter(2)), values)
