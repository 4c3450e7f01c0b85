"""Simulation-based calibration: uniform ranks of right samplers, and what wrong ones give themselves away by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from expectax import dist, inference, ppl
from expectax.inference._sbc import uniformity
from helpers import two_stage

KEY = jax.random.key(20261126)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


@ppl.model
def normals(size):
    """Independent latents whose posterior is N(y / 2, 1 / 2)."""
    z = ppl.sample("z", dist.Normal(jnp.zeros(size), 1.0))
    ppl.sample("y", dist.Normal(z, 1.0))


def normal_draws(posterior, key, sd=0.5**0.5, shift=0.0, num_draws=99):
    mean = posterior.observations["y"] / 2
    return {"z": mean + shift + sd * jax.random.normal(key, (num_draws, *mean.shape))}


@ppl.model
def counts():
    """A rate with a nested model of its data: Gamma(2, 1) becomes Gamma(2 + n, 1 + 3)."""
    rate = ppl.sample("rate", dist.Gamma(2.0, 1.0))
    ppl.sample("data", poisson(rate))


@ppl.model
def poisson(rate):
    ppl.sample("n", dist.Poisson(rate).expand([3]))


def rate_draws(posterior, key):
    n = posterior.observations["data"]["n"].sum()
    return {"rate": jax.random.gamma(key, 2.0 + n, (99,)) / 4.0}


@ppl.model
def coin():
    """A discrete latent beside a continuous one, neither seen exactly: ties are the rule."""
    heads = ppl.sample("heads", dist.Bernoulli(0.3))
    shift = ppl.sample("shift", dist.Normal(0.0, 0.5))
    ppl.sample("y", dist.Normal(2.0 * heads + shift, 1.0))


def coin_draws(posterior, key):
    y, variance = posterior.observations["y"], 1.25
    key_heads, key_shift = jax.random.split(key)
    log_odds = jnp.log(0.3 / 0.7) + ((y**2) - (y - 2.0) ** 2) / (2 * variance)
    heads = jax.random.bernoulli(key_heads, jax.nn.sigmoid(log_odds), (99,)).astype(int)
    mean = (y - 2.0 * heads) * 0.25 / variance
    return {"heads": heads, "shift": mean + jnp.sqrt(0.25 / variance) * jax.random.normal(key_shift, (99,))}


RIGHT = {
    "normals": (normals(3), "y", normal_draws, 4),
    "counts": (counts(), "data", rate_draws, 2),
    "coin": (coin(), ["y"], coin_draws, 3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_sampler_has_uniform_ranks(name):
    program, observed, sampler, number = RIGHT[name]

    def p_value(key, n):
        result = inference.sbc(program, observed, sampler, key=key, num_simulations=n)
        assert len(result.ranks) == number and all(len(r) == n for r in result.ranks.values())
        return result.p_value

    two_stage(p_value, KEY, 1000)


@pytest.mark.by_hand
@pytest.mark.filterwarnings("ignore:mcmc.*diverged")
def test_the_whole_of_mcmc_is_calibrated():
    """Warm-up and all: 20 thinned draws of short NUTS runs, from the simulated data of a gamma-Poisson model."""

    def sampler(posterior, key):
        return inference.mcmc(
            posterior,
            inference.nuts(max_tree_depth=5),
            key=key,
            num_warmup=150,
            num_samples=95,
            num_chains=1,
            thinning=2,
        )

    def p_value(key, n):
        return inference.sbc(counts(), "data", sampler, key=key, num_simulations=n, num_draws=19).p_value

    two_stage(p_value, KEY, 1000)


def test_a_variance_that_is_five_percent_off_is_seen():
    """In 50 latents and 2,000 simulations: the log joint moves by a quarter of its sd, 11 standard errors."""
    wrong = functools.partial(normal_draws, sd=(0.5 * 1.05) ** 0.5)
    result = inference.sbc(normals(50), "y", wrong, key=KEY, num_simulations=2000)
    assert result.p_value < 1e-6
    assert min(result.p_values, key=lambda name: result.p_values[name]) == "log_joint"
    small = functools.partial(normal_draws, sd=(0.5 * 0.95) ** 0.5)
    assert inference.sbc(normals(50), "y", small, key=KEY, num_simulations=2000).p_value < 1e-6


def test_other_mistakes_are_seen():
    """A shift of a fifth of an sd, and draws as wide as the prior's."""
    shifted = functools.partial(normal_draws, shift=0.2 * 0.5**0.5)
    prior = functools.partial(normal_draws, sd=1.0)
    for wrong in (shifted, prior):
        result = inference.sbc(normals(1), "y", wrong, key=KEY, num_simulations=2000)
        assert result.p_values["z[0]"] < 1e-6


def test_without_jit_the_ranks_are_the_same():
    """And a sampler that JAX cannot trace may be used."""

    def with_numpy(posterior, key):
        return {"z": np.asarray(normal_draws(posterior, key)["z"])}

    fast = inference.sbc(normals(2), "y", normal_draws, key=KEY, num_simulations=40)
    slow = inference.sbc(normals(2), "y", with_numpy, key=KEY, num_simulations=40, jit=False)
    for name, ranks in fast.ranks.items():
        assert (ranks == slow.ranks[name]).mean() > 0.9  # rounding may turn a comparison
    assert str(fast).splitlines()[-1] == f"all together: p = {fast.p_value:.1e}"


@pytest.mark.parametrize(
    ("number", "num_draws", "bins"), [(1000, 99, 20), (1000, 6, 7), (150, 99, 15), (1000, 100, 20)]
)
def test_the_test_of_uniformity(number, num_draws, bins):
    """Equal to scipy's chi-square on a histogram counted by hand; bins of unequal size have unequal expectations."""
    ranks = np.random.default_rng(3).integers(0, num_draws + 1, number)
    inside = [[r for r in range(num_draws + 1) if r * bins // (num_draws + 1) == b] for b in range(bins)]
    counts = [np.isin(ranks, rs).sum() for rs in inside]
    expected = [number * len(rs) / (num_draws + 1) for rs in inside]
    np.testing.assert_allclose(uniformity(ranks, num_draws), stats.chisquare(counts, expected).pvalue, rtol=1e-9)


def test_what_does_not_fit_is_refused():
    def run(observed="y", sampler=normal_draws, **options):
        return inference.sbc(normals(2), observed, sampler, key=KEY, num_simulations=3, **options)

    with pytest.raises(ppl.AddressError, match="no site 'x'"):
        run(observed="x")
    with pytest.raises(ppl.AddressError, match=r"some sites.*\['y', 'z'\]"):
        run(observed=["y", "z"])
    with pytest.raises(ppl.AddressError, match="some sites"):
        run(observed=[])
    with pytest.raises(ppl.AddressError, match="no draws of 'z'"):
        run(sampler=lambda posterior, key: {"w": jnp.zeros((99, 2))})
    with pytest.raises(ppl.ShapeError, match=r"at least num_draws=100 draws of 'z'.*\(99, 2\)"):
        run(num_draws=100)
    with pytest.raises(ppl.ShapeError, match=r"shape \(2,\) each, got an array of shape \(99, 1\)"):
        run(sampler=lambda posterior, key: {"z": jnp.zeros((99, 1))})
    with pytest.raises(ValueError, match="num_draws >= 1, got 3, 0"):
        run(num_draws=0)
    with pytest.raises(TypeError, match="typed key"):
        inference.sbc(normals(2), "y", normal_draws, key=jax.random.PRNGKey(0))
