"""NUTS and HMC against exact posteriors of every support, exact draws, and the refusals of `mcmc`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from expectax import dist, inference, ppl
from helpers import count_compiles, two_stage_uniform

KEY = jax.random.key(20260806)
pytestmark = pytest.mark.usefixtures("quick_compiles")


# --- exact moments ----------------------------------------------------------------------------------------------------

Y, COUNTS, LABELS = np.array([0.5, 1.0, -0.3]), np.array([3, 1, 0, 2]), np.array([0, 2, 2, 1, 2])
COVARIANCE = np.array([[1.0, 0.9], [0.9, 1.0]])


@ppl.model
def conjugate(every_support: bool):
    """Independent parts with known posteriors, two of them correlated, one for each other kind of support."""
    mu = ppl.sample("mu", dist.MultivariateNormal(jnp.zeros(2), jnp.asarray(COVARIANCE, float)))
    ppl.sample("y", dist.Normal(mu.sum(), 1.0).expand([3]))
    bound = ppl.sample("bound", dist.Gamma(3.0, 1.0))
    ppl.sample("below", dist.Uniform(0.0 * bound, bound))
    if every_support:
        rate = ppl.sample("rate", dist.Gamma(2.0, 0.5))
        ppl.sample("counts", dist.Poisson(rate).expand([4]))
        p = ppl.sample("p", dist.Beta(2.0, 3.0))
        ppl.sample("heads", dist.Binomial(10, p))
        probs = ppl.sample("probs", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        ppl.sample("labels", dist.Categorical(probs=probs).expand([5]))


CORRELATED = conjugate(False).given({"y": Y.astype(np.float32)})
POSTERIOR = conjugate(True).given({"y": Y.astype(np.float32), "counts": COUNTS, "heads": 7, "labels": LABELS})


def exact_moments() -> dict[str, Any]:
    """Return (mean, mean square) of each number."""
    precision = np.linalg.inv(COVARIANCE) + len(Y)
    mu, cov = np.linalg.solve(precision, np.full(2, Y.sum())), np.linalg.inv(precision)
    rate, p = stats.gamma(2 + COUNTS.sum(), scale=1 / (0.5 + len(COUNTS))), stats.beta(2 + 7, 3 + 3)
    dirichlet = stats.dirichlet(np.array([1.0, 2.0, 3.0]) + np.bincount(LABELS))
    probs = dirichlet.mean(), dirichlet.mean() ** 2 + dirichlet.var()
    moments: dict[str, Any] = {f"mu[{i}]": (mu[i], cov[i, i] + mu[i] ** 2) for i in range(2)}
    moments |= {"rate": (rate.mean(), rate.moment(2)), "p": (p.mean(), p.moment(2))}
    moments |= {f"probs[{i}]": (probs[0][i], probs[1][i]) for i in range(3)}
    return moments | {"bound": (3.0, 12.0), "below": (1.5, 4.0)}  # E[u b] = E[b] / 2, E[(u b)^2] = E[b^2] / 3


def wrong_by_more_than_five(chains: inference.Chains) -> list[str]:
    """Return the numbers whose mean or mean square is over 5 Monte Carlo standard errors off."""
    both = jax.tree.map(np.asarray, [chains.choices, jax.tree.map(jnp.square, chains.choices)])
    means, squares = map(inference.summarize, both)
    exact, wrong = exact_moments(), []
    assert set(means) == set(exact) or set(means) == {"mu[0]", "mu[1]", "bound", "below"}
    for name, rows in {name: (means[name], squares[name]) for name in means}.items():
        for row, value in zip(rows, exact[name], strict=True):
            assert row.r_hat < 1.05 and row.ess_bulk > 200, (name, row)
            if abs(row.mean - value) > 5 * row.mcse_mean:
                wrong.append(f"{name}: {row.mean:.4f} +- {row.mcse_mean:.4f}, exact {value:.4f}")
    return wrong


KERNELS = {
    "nuts": inference.nuts(),
    "nuts, dense": inference.nuts(dense_mass=True),
    "hmc": inference.hmc(num_integration_steps=6),  # 15 steps are near to a whole period of some latents
    "hmc, dense": inference.hmc(num_integration_steps=6, dense_mass=True),
}


@pytest.mark.parametrize("name", ["nuts", *(pytest.param(n, marks=pytest.mark.slow) for n in KERNELS if n != "nuts")])
def test_moments_of_conjugate_posteriors(name):
    """|z| > 5 twice, the second time with a fresh key and four times the draws: false alarm below 1e-6."""
    posterior, size, shape = (CORRELATED, 4, (4, 4, 4)) if "dense" in name else (POSTERIOR, 8, (4, 8))
    assert sum(v.size for v in jax.tree.leaves(posterior.unconstrained_shapes)) == size
    for key, num_samples in zip(jax.random.split(KEY), (2000, 8000), strict=True):
        chains = inference.mcmc(posterior, KERNELS[name], key=key, num_warmup=600, num_samples=num_samples)
        assert chains.inverse_mass_matrix.shape == shape and chains.step_size.shape == (4,)
        assert 0.6 < float(chains.statistics["acceptance_rate"].mean()) < 0.97
        assert (np.asarray(chains.choices["below"]) <= np.asarray(chains.choices["bound"])).all()
        if not (wrong := wrong_by_more_than_five(chains)):
            return
    pytest.fail("; ".join(wrong))


# --- invariance -------------------------------------------------------------------------------------------------------


@ppl.model
def narrow():
    """A posterior so narrow that the unadapted step of 0.1 is often rejected."""
    rate = ppl.sample("rate", dist.Gamma(2.0, 0.5))
    ppl.sample("count", dist.Poisson(100.0 * rate))


NARROW_POSTERIOR, NARROW = narrow().given({"count": 300}), stats.gamma(302.0, scale=1 / 100.5)


@pytest.mark.parametrize("kernel", [inference.nuts(), inference.hmc(num_integration_steps=5)], ids=["nuts", "hmc"])
def test_exact_draws_stay_exact(x64, kernel):
    """Started from exact draws, the ranks of later states (their exact distribution function) are uniform."""

    @jax.jit
    @jax.vmap
    def moved(key, initial):
        chain = inference.mcmc(
            NARROW_POSTERIOR, kernel, key=key, num_warmup=0, num_samples=4, num_chains=1, initial=initial
        )
        return chain.choices["rate"][0, -1], chain.statistics["acceptance_rate"].mean()

    def ranks(key, n):
        exact = jnp.asarray(NARROW.rvs(n, random_state=np.random.default_rng(int(jax.random.bits(key)))))
        last, acceptance = moved(jax.random.split(key, n), {"rate": exact})
        assert 0.3 < acceptance.mean() < 0.95 and (last != exact).mean() > 0.5
        return NARROW.cdf(np.asarray(last))

    two_stage_uniform(ranks, KEY, 4000)


# --- how it runs ------------------------------------------------------------------------------------------------------


@ppl.model
def line(x):
    slope = ppl.sample("slope", dist.Normal(0.0, 1.0))
    theta = ppl.sample("theta", dist.Normal(jnp.zeros(3), 1.0))
    ppl.sample("y", dist.Normal(slope * x + theta, 0.5))


def line_posterior(shift: float = 0.0) -> ppl.Posterior:
    return line(np.arange(3.0, dtype=np.float32)).given({"y": np.arange(3.0, dtype=np.float32) + shift})


def short(key: Any = KEY, shift: float = 0.0, kernel: Any = None, **options: Any) -> inference.Chains:
    settings: dict[str, Any] = {"num_warmup": 100, "num_samples": 60, "num_chains": 2} | options
    return inference.mcmc(line_posterior(shift), kernel or inference.hmc(), key=key, **settings)


def test_progress_changes_no_draw_and_nothing_compiles_twice(capsys):
    chains, shown = short(), short(progress=True)
    assert "hmc:" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, chains, shown)
    first, second = jax.random.split(KEY)
    with count_compiles() as compiles:
        others = short(first, shift=1.0), short(second, shift=2.0, progress=True)
    assert compiles == []
    slopes = np.concatenate([np.asarray(c.choices["slope"]) for c in (chains, *others)])
    assert len(np.unique(slopes[:, -1])) == 6  # chains and keys draw apart
    assert len(np.unique(slopes[0])) > 30  # and steps


def test_vmap_over_keys_is_a_loop(x64):
    keys = jax.random.split(KEY, 2)
    together = jax.vmap(lambda key: short(key, num_warmup=0, num_samples=5))(keys)
    for i, key in enumerate(keys):
        alone = short(key, num_warmup=0, num_samples=5)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9), together, alone)


def test_statistics(x64):
    chains = short()
    statistics = chains.statistics
    assert set(statistics) == {"divergent", "acceptance_rate", "num_integration_steps", "energy", "log_density"}
    assert all(v.shape == (2, 60) for v in statistics.values())
    assert (np.asarray(statistics["num_integration_steps"]) == 10).all()
    density = jax.vmap(jax.vmap(line_posterior().log_density))(chains.choices)  # no support is bounded here
    np.testing.assert_allclose(statistics["log_density"], density, rtol=1e-10)
    np.testing.assert_allclose(chains.mean()["slope"], np.asarray(chains.choices["slope"]).mean(), rtol=1e-12)
    np.testing.assert_allclose(chains.sd()["theta"], np.asarray(chains.choices["theta"]).std((0, 1)), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:mcmc.*diverged")
def test_no_warmup_starts_at_initial():
    still = inference.hmc(num_integration_steps=1)
    chains = inference.mcmc(
        NARROW_POSTERIOR, still, key=KEY, num_warmup=0, num_samples=1, num_chains=3, initial={"rate": 20.0}
    )
    np.testing.assert_array_equal(chains.step_size, np.full(3, 0.1, np.float32))
    np.testing.assert_array_equal(chains.inverse_mass_matrix, np.ones((3, 1)))
    assert (np.asarray(chains.statistics["acceptance_rate"]) < 1e-6).all()  # so far out a step of 0.1 overshoots
    np.testing.assert_allclose(chains.choices["rate"], np.full((3, 1), 20.0), rtol=1e-4)


@pytest.mark.parametrize("kernel", [inference.nuts(), inference.hmc()], ids=["nuts", "hmc"])
def test_a_kernel_uses_each_key_once(kernel):
    """JAX's checker refuses any scan over keys under vmap, so it sees the kernels and not `mcmc` itself."""
    target = inference.Target(CORRELATED)
    with jax.debug_key_reuse(True):
        latents = {"mu": jnp.zeros(2), "bound": jnp.ones(()), "below": jnp.asarray(0.5)}
        state = inference.keyed(kernel.init)(jax.random.key(1), target, latents)
        parameters = kernel.adaptation(target, state).unadapted
        inference.keyed(kernel.step)(jax.random.key(2), target, state, parameters)


# --- warnings and refusals --------------------------------------------------------------------------------------------


@ppl.model
def funnel():
    v = ppl.sample("v", dist.Normal(0.0, 3.0))
    ppl.sample("x", dist.Normal(0.0, jnp.exp(v / 2)).expand([9]))


def test_divergences_warn():
    with pytest.warns(RuntimeWarning, match=r"mcmc: \d+ of 400 transitions diverged") as caught:
        chains = inference.mcmc(funnel().given({}), inference.hmc(), key=KEY, num_warmup=20, num_samples=100)
    assert f"mcmc: {int(chains.statistics['divergent'].sum())} of" in str(caught[0].message)
    assert caught[0].filename == __file__


@ppl.model
def hopeless(kind):
    x = ppl.sample("x", dist.Normal(0.0, 1.0))
    ppl.sample("fine", dist.Normal(x, 1.0))
    scale = {"nan": jnp.sqrt(-jnp.exp(x)), "overflow": jnp.exp(800.0 * (3 + x)), "support": jnp.exp(x)}[kind]
    ppl.sample("culprit", dist.Uniform(0.0 * x, scale) if kind == "support" else dist.Normal(0.0, scale))


@pytest.mark.parametrize("kind", ["nan", "overflow", "support"])
def test_no_possible_start_names_the_site(kind):
    with pytest.raises(ppl.NonFiniteError, match="chain 0 found no start.*'culprit'"):
        inference.mcmc(hopeless(kind).given({"fine": 0.0, "culprit": 100.0}), inference.nuts(), key=KEY)


@pytest.mark.filterwarnings("ignore:mcmc.*diverged")
def test_a_hard_start_is_found_by_trying_again():
    """Only a twentieth of the starting region has a finite density."""

    @ppl.model
    def model():
        x = ppl.sample("x", dist.Normal(0.0, 1.0))
        ppl.sample("y", dist.Uniform(jnp.where(jnp.abs(x - 1.0) < 0.1, 0.0, 2.0), 3.0 + 0.0 * x))

    chains = inference.mcmc(
        model().given({"y": 1.0}), inference.hmc(num_integration_steps=1), key=KEY, num_warmup=0, num_samples=1
    )
    assert (np.abs(np.asarray(chains.choices["x"]) - 1.0) < 0.1).all()


def test_a_discrete_latent_is_refused():
    @ppl.model
    def mixture():
        z = ppl.sample("label", dist.Bernoulli(0.3))
        ppl.sample("y", dist.Normal(1.0 * z, 1.0))

    with pytest.raises(ppl.SupportError, match="'label'.*discrete") as caught:
        inference.mcmc(mixture().given({"y": 0.0}), inference.nuts(), key=KEY)
    assert __file__ in str(caught.value)


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        ({"slope": 0.0}, ppl.AddressError, "'theta'"),
        ({"slope": 0.0, "theta": np.zeros(2)}, ppl.ShapeError, "'theta'"),
        ({"slope": np.nan, "theta": np.zeros(3)}, ppl.ExpectaxError, "'slope'"),
    ],
)
def test_an_initial_value_that_does_not_fit_is_refused(initial, error, message):
    with pytest.raises(error, match=message):
        short(initial=initial)


def test_impossible_settings_are_refused():
    for name, value in {"num_samples": 0, "num_chains": 0, "num_warmup": -1}.items():
        with pytest.raises(ValueError, match=f"{name}.*got .*{value}"):
            short(**{name: value})
    with pytest.raises(TypeError, match="typed key"):
        short(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="target_acceptance.*1.0"):
        inference.nuts(target_acceptance=1.0)
    with pytest.raises(ValueError, match="max_tree_depth.*0"):
        inference.nuts(max_tree_depth=0)
    with pytest.raises(ValueError, match="num_integration_steps.*0"):
        inference.hmc(num_integration_steps=0)
