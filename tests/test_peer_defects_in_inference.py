"""Defects of inference and diagnostics that were measured in another language, each as a test of this one.

G1 (what is offered) and G2 (bugs) number what was measured on GenJAX 1.0.x, as in `test_peer_defects`, which has the
defects of the language itself. What can only be tested by draws has a pinned key and two stages with a false-alarm rate of 1e-6.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference, ppl
from helpers import two_stage_uniform, two_stage_z
from peer_models import EFFECT, ERROR, outer, schools

KEY = jax.random.key(2026)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
normal = stats.norm.logpdf


# --- particles --------------------------------------------------------------------------------------------------------


def cloud_of(num_particles: int, num_data: int = 3) -> Any:
    @ex.model
    def line():
        ab = ex.sample("ab", dist.Normal(jnp.zeros(2), 1.0))
        ex.sample("y", dist.Normal(ab[0] + ab[1] * jnp.linspace(0.0, 1.0, num_data), 10.0))

    posterior = line().given({"y": jnp.linspace(0.0, 1.0, num_data)})
    return posterior, inference.importance(posterior, key=KEY, num_particles=num_particles)


def test_expectations_of_matrices_and_dicts():
    """G1: `estimate(fn)` of particles failed where `fn` returns a matrix or a dict."""
    _, cloud = cloud_of(50)
    x, w = np.asarray(cloud.choices["ab"]), np.exp(cloud.log_weights)
    w = w / w.sum()
    found = cloud.expectation(lambda z: {"second": jnp.outer(z["ab"], z["ab"]), "first": (z["ab"], z["ab"][0] > 0)})
    close(found["second"], np.einsum("n,ni,nj->ij", w, x, x))
    close(found["first"][0], w @ x)
    close(found["first"][1], w @ (x[:, 0] > 0))


def test_weights_that_are_all_zero_are_no_nan():
    """G1: when all weights were zero the ESS was nan, and the particles were resampled all the same.

    Importance sampling refuses, naming the site. A filter that died says so: evidence 0, no nan, no resampling.
    """
    hard = ex.model(lambda: ex.sample("y", dist.Uniform(ex.sample("x", dist.Normal(0.0, 1.0)) + 1e6, 1e7)))()
    with pytest.raises(ppl.NonFiniteError, match="all weights are zero.*'y'"):
        inference.importance(hard.given({"y": 5.0}), key=KEY, num_particles=8)

    with pytest.raises(ppl.NonFiniteError, match="all particles have weight 0 at step 1") as caught:
        filtered_to_death()
    filtered: Any = caught.value.result
    assert filtered.log_evidence == -np.inf and not filtered.resampled[2]
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves((filtered, filtered.particles.mean())))


def filtered_to_death() -> Any:
    """Filter data of which no particle can explain the second."""

    @ex.model
    def walk():
        def step(x: Any, _: Any) -> Any:
            x = ex.sample("x", dist.Normal(x, 1.0))
            return x, ex.sample("y", dist.Uniform(x - 10.0, x + 10.0))

        lax.scan(step, 0.0, length=3)

    posterior = walk().given({"y": jnp.array([0.0, 1e6, 0.0])})
    return inference.particle_filter(posterior, key=KEY, num_particles=8)


def test_moments_of_a_filter_that_died_are_no_nan():
    """G1, as before. `Particles.mean` weighs all alike where no weight is left (`normalized_weights`); this should too."""
    with pytest.raises(ppl.NonFiniteError, match="all particles have weight 0 at step 1") as caught:
        filtered_to_death()
    filtered: Any = caught.value.result
    weights = np.stack([inference.normalized_weights(w) for w in filtered.log_weights])
    close(filtered.mean()["x"], np.sum(weights * filtered.choices["x"], axis=1))
    assert np.isfinite(filtered.sd()["x"]).all()


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("num_data", [3, 1000])
def test_a_particle_holds_its_latents_and_its_weight(num_data):
    """G2: `inference.init` stored 1472 bytes a particle where 16 were needed: arguments, observations, site scores."""
    _, cloud = cloud_of(100, num_data)
    assert bytes_of(cloud) == 100 * (2 + 1) * 8 + 8  # two latents and a weight each; one offset for all


# --- chains -----------------------------------------------------------------------------------------------------------


@ex.model
def nine():
    """Nine independent standard normals, written in every way."""
    ex.sample("batch", dist.Normal(jnp.zeros(2), 1.0))
    ex.sample("event", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    jax.vmap(lambda m: ex.sample("lanes", dist.Normal(m, 1.0)))(jnp.zeros(2))
    lax.scan(lambda c, _: (c, ex.sample("steps", dist.Normal(c, 1.0))), 0.0, length=2)
    ex.sample("scalar", dist.Normal(0.0, 1.0))


KERNELS = {
    "one leapfrog step": inference.hmc(num_integration_steps=1),  # which is MALA
    "hmc": inference.hmc(),
    "nuts": inference.nuts(),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_number_has_its_own_momentum(name):
    """G2: momentum was one number per address: HMC refused arrays, and MALA moved all elements by the same noise.

    Started at 0, the law of the first draw is unchanged by a change of any element's sign: E x_i x_j = 0 for i != j.
    """
    start, pairs = jax.tree.map(jnp.zeros_like, nine().simulate(KEY).choices), np.triu_indices(9, 1)
    run = functools.partial(inference.mcmc, nine().given({}), KERNELS[name], num_warmup=0, num_samples=1, initial=start)

    def products(key: Any, n: int) -> Any:
        choices = run(key=key, num_chains=n).choices
        x = np.concatenate([np.reshape(v, (n, -1)) for v in choices.values()], axis=1)
        moved = x[(x != 0).any(axis=1)]
        assert len(moved) > 0.9 * n and all(len(np.unique(row)) == 9 for row in moved)
        return x[:, pairs[0]] * x[:, pairs[1]]

    two_stage_z(products, np.zeros(36), KEY, 2000)


def test_one_leapfrog_step_keeps_the_normal_law():
    """G2: MALA on N(0, I_2) had the covariance [[.954, .954], [.954, .954]]; var(x1 - x2) was 0, exactly 2.

    Exact draws stay exact; at step size sqrt 2 an accepted state is sqrt 2 times the momentum, whatever was before.
    """
    kernel, settings = KERNELS["one leapfrog step"], {"step_size": 2**0.5, "inverse_mass_matrix": jnp.ones(2)}
    target = inference.Target(ex.model(lambda: ex.sample("x", dist.Normal(jnp.zeros(2), 1.0)))().given({}))

    @jax.jit
    @jax.vmap
    def move(key: Any) -> Any:
        key_start, key_step = jax.random.split(key)
        state = kernel.init(target, {"x": jax.random.normal(key_start, (2,))})
        return inference.keyed(kernel.step)(key_step, target, state, settings)[0].position

    def moments(key: Any, n: int) -> Any:
        x, y = np.asarray(move(jax.random.split(key, n))).T
        return np.stack([x * x, y * y, x * y, (x - y) ** 2], axis=1)

    two_stage_z(moments, np.array([1.0, 1.0, 0.0, 2.0]), KEY, 20_000)


def test_four_chains_of_eight_schools():
    """G2: `chain(n_chains=4)` on eight schools with repeated effects was a ValueError.

    The density that the sampler kept with each draw is the posterior's there, log tau being the unconstrained scale.
    """
    chains = inference.mcmc(
        schools(jnp.array(ERROR)).given({"y": EFFECT}), inference.hmc(), key=KEY, num_warmup=0, num_samples=5
    )
    mu, tau, theta = (np.asarray(chains.choices[name]) for name in ("mu", "tau", "theta"))
    assert mu.shape == tau.shape == (4, 5) and theta.shape == (4, 5, 8) and np.unique(mu[:, 0]).size == 4
    exact = normal(mu, 0.0, 5.0) + stats.halfcauchy.logpdf(tau, 0.0, 5.0) + np.log(tau)
    exact += normal(theta, mu[..., None], tau[..., None]).sum(-1) + normal(EFFECT, theta, ERROR).sum(-1)
    close(chains.statistics["log_density"], exact)


class _Still:
    """A kernel that stays where it starts."""

    name = "still"

    def init(self, target: Any, latents: Any) -> Any:
        position = target.flat().unconstrain(latents)
        return inference.State(position, target.flat().log_density(position))

    def step(self, target: Any, state: Any, parameters: Any) -> Any:
        return state, inference.Info(jnp.asarray(1.0))

    def latents(self, target: Any, position: Any) -> Any:
        return target.flat().constrain(position)

    def adaptation(self, target: Any, state: Any) -> Any:
        return inference.Adaptation.none()


def test_chains_start_apart():
    """G2: all chains started at one and the same trace. Here each starts by itself, uniform in (-2, 2)."""

    def starts(key: Any, n: int) -> Any:
        chains = inference.mcmc(nine().given({}), _Still(), key=key, num_warmup=0, num_samples=1, num_chains=n)
        x = np.concatenate([np.reshape(v, (n, -1)) for v in chains.choices.values()], axis=1)
        assert np.unique(x).size == x.size
        return (x + 2.0) / 4.0

    two_stage_uniform(starts, KEY, 500)


def test_a_chain_holds_its_latents_and_five_statistics():
    """G2: a chain stacked whole traces: with 1000 data 2.4 MB for 400 B of draws.

    The result holds draws and statistics alone, and the compiled sampler needs no room of draws times data either.
    """
    posterior, _ = cloud_of(1, 1000)
    run = functools.partial(inference.mcmc, posterior, inference.hmc(), num_warmup=0, num_samples=200, num_chains=2)
    chains = run(key=KEY)
    a_draw = 2 * 8 + sum(np.asarray(v).dtype.itemsize for v in chains.statistics.values())
    assert len(chains.statistics) == 5 and bytes_of(chains.choices) + bytes_of(chains.statistics) == 2 * 200 * a_draw
    memory = jax.jit(lambda key: run(key=key).choices).lower(KEY).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 200 * 1000 * 8  # one number for each datum and draw would take twice that


class _Count(_Still):
    """A kernel that goes up by one, diverges at every fifth step and counts its steps."""

    def init(self, target: Any, latents: Any) -> Any:
        position = jnp.zeros_like(target.flat().unconstrain(latents))
        return inference.State(position, target.flat().log_density(position))

    def step(self, target: Any, state: Any, parameters: Any) -> Any:
        position = state.position + 1.0
        info = inference.Info(position[0], position[0] % 5 == 0, 1)
        return inference.State(position, state.log_density), info


def test_thinning_keeps_every_third_draw_and_forgets_no_divergence():
    """G2: thinning was after the fact. Here the steps between are not stored, and what they tell is kept."""

    @ex.model
    def one():
        ex.sample("x", dist.Normal(0.0, 1.0))

    run = functools.partial(
        inference.mcmc, one().given({}), _Count(), key=KEY, num_warmup=0, num_chains=1, num_samples=4
    )
    with pytest.warns(RuntimeWarning, match="2 of 4"):
        chains = run(thinning=3)
    close(chains.choices["x"], [[3.0, 6.0, 9.0, 12.0]])
    statistics = chains.statistics
    assert statistics["divergent"].tolist() == [[False, True, False, True]]
    assert statistics["num_integration_steps"].tolist() == [[3, 3, 3, 3]]
    close(statistics["acceptance_rate"], [[2.0, 5.0, 8.0, 11.0]])
    with pytest.raises(ValueError, match="thinning"):
        run(thinning=0)


# --- diagnostics ------------------------------------------------------------------------------------------------------

RHO, NUM_DRAWS = 0.95, 20_000


def test_effective_sample_sizes_of_an_autoregression():
    r"""G2: `compute_ess` looked at lag 1 and clipped: 27 568 for 2 051 (AR(1), rho = .95, 80 000 draws); tail 20 000.

    Exactly N / (1 + 2 sum_t r_t), with r_t = rho^t in bulk (ranks of normals) and, for the 5 % tails, the correlation of
    the indicators. ArviZ's estimates scatter by 7.5 % and are 4 % too small; 45 % is more than 5.4 sd (p < 1e-6).
    """
    noise = np.random.default_rng(2026).standard_normal((4, NUM_DRAWS))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0]
    for t in range(1, NUM_DRAWS):
        x[:, t] = RHO * x[:, t - 1] + (1 - RHO**2) ** 0.5 * noise[:, t]
    row = inference.summarize({"x": jnp.asarray(x)})["x"]
    np.testing.assert_allclose(row.ess_bulk, x.size * (1 - RHO) / (1 + RHO), rtol=0.45)  # 2051
    low = stats.norm.ppf(0.05)
    joint = [stats.multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([low, low]) for r in RHO ** np.arange(1, 120)]
    correlation = (np.array(joint) - 0.05**2) / (0.05 * 0.95)
    np.testing.assert_allclose(row.ess_tail, x.size / (1 + 2 * correlation.sum()), rtol=0.45)


def test_r_hat_of_chains_that_drift():
    """G2: four chains that all drift from 0 to 10 had an R-hat of 0.9995, chains not being split. Here: by hand, 1.64.

    Split R-hat on normal scores of ranks, the larger of that of x and of |x - median| (Vehtari et al. 2021).
    """
    x = np.linspace(0.0, 10.0, 1000) + np.random.default_rng(1).standard_normal((4, 1000))

    def r_hat(values: Any) -> float:
        halves = values.reshape(8, 500)
        ranks = stats.rankdata(halves).reshape(halves.shape)
        scores = stats.norm.ppf((ranks - 0.375) / (halves.size + 0.25))
        within, between = scores.var(axis=1, ddof=1).mean(), scores.mean(axis=1).var(ddof=1)
        return float(np.sqrt((499 / 500 * within + between) / within))

    found = inference.summarize({"x": jnp.asarray(x)})["x"].r_hat
    close(found, max(r_hat(x), r_hat(np.abs(x - np.median(x)))))
    assert found > 1.5


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_that_is_given_whole_draws_nothing():
    """G1: `trace.verify()` raised even when every address was constrained. Here the weight says it: no choice is left.

    It is then the log density, whatever the key; and `assess` takes the same choices.
    """
    choices = {"a": {"b": 0.5, "c": 1.5}, "d": 2.5}
    exact = normal(0.5, 1.0, 2.0) + normal(1.5, 3.0, 4.0) + normal(2.5)
    for seed in (1, 2):
        trace, weight = outer().generate(jax.random.key(seed), choices)
        assert trace.choices == choices
        close([weight, trace.log_density], [exact, exact])
    close(outer().assess(choices)[0], exact)
    _, weight = outer().generate(KEY, {"a": {"b": 0.5}, "d": 2.5})  # c is drawn, and not weighed
    close(weight, normal(0.5, 1.0, 2.0) + normal(2.5))


@pytest.mark.parametrize("address", [3, ("a", 1)])
def test_addresses_that_are_no_strings_are_refused_with_their_place(address):
    """G1: addresses had to be strings; numbers and tuples raised. So they do here: numbers are lanes, tuples paths."""
    with pytest.raises(ppl.AddressError, match=r"test_peer_defects_in_inference\.py:\d+: .*non-empty string"):
        ex.model(lambda: ex.sample(address, dist.Normal(0.0, 1.0)))().simulate(KEY)
