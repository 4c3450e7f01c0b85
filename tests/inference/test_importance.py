"""Importance sampling: exact by enumeration, unbiased on conjugate models, honest about its error, and its refusals."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from exact_models import BIAS, CONJUGATE, THREE_STATES
from expectax import dist, inference, ppl
from expectax.inference import _importance
from expectax.ppl import _jax, _visitors
from helpers import count_compiles, enumerate_choices, two_stage_z

KEY = jax.random.key(20260803)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@ppl.model
def normal_guide(mean, sd):
    ppl.sample("mu", dist.Normal(mean, sd))


@ppl.model
def two_state_guide(probs, heads):
    z = ppl.sample("z", dist.Categorical(probs=probs))
    ppl.sample("b", dist.Bernoulli(jnp.asarray(heads)[z]))


# --- exact: every outcome of two particles ----------------------------------------------------------------------------


def every_cloud(monkeypatch, posterior, proposal, tables):
    """Run the sampler with its particles' draws taken from tables, shape (outcomes, particles); return also Z-hat."""
    forced = []

    def draw_site(site, leaves, source):
        (lane,) = _jax.lane_axes()
        return jnp.asarray(forced[-1][site.address], site.dtype)[_jax.axis_index(lane)]

    monkeypatch.setattr(_visitors, "draw_site", draw_site)

    def cloud(table):
        forced.append(table)
        result = _importance._importance.__wrapped__(posterior, proposal, KEY, 2)
        return result, jnp.exp(result.log_evidence)

    return jax.jit(jax.vmap(cloud))(tables)


@pytest.mark.parametrize("guided", [False, True])
def test_every_outcome_of_two_particles(x64, monkeypatch, guided):
    x, y = THREE_STATES.one(1)
    posterior = THREE_STATES.posterior(x, y)
    probs, heads = (np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.4, 0.1])) if guided else (x, BIAS)
    proposal = two_state_guide(probs, heads) if guided else None
    one = enumerate_choices(posterior.latent_shapes, THREE_STATES.states)
    pairs = enumerate_choices({a: np.zeros(2) for a in one}, THREE_STATES.states)

    joint = THREE_STATES.log_prior(one, x) + THREE_STATES.log_likelihood(one, x, y)
    evidence = np.exp(joint).sum()
    np.testing.assert_allclose(np.log(evidence), THREE_STATES.log_evidence(x, y), rtol=1e-12)
    drawn = np.log(probs[pairs["z"]]) + stats.bernoulli.logpmf(pairs["b"], heads[pairs["z"]])
    chance = np.exp(drawn.sum(1))
    np.testing.assert_allclose(chance.sum(), 1.0, rtol=1e-12)

    clouds, estimate = every_cloud(monkeypatch, posterior, proposal, pairs)
    assert abs(chance @ estimate - evidence) < 1e-10

    def f(z):
        return jnp.stack([z["z"] ** 2 + 3.0 * z["b"], z["z"] == 0, z["z"] * z["b"]])

    exact = np.exp(joint) @ np.asarray(jax.vmap(f)(one))
    weighted = jax.vmap(lambda cloud: cloud.expectation(f))(clouds)
    np.testing.assert_allclose((chance * estimate) @ np.asarray(weighted), exact, atol=1e-10)


def test_moments_of_given_weights(x64):
    """Mean, sd and standard errors of a small cloud, against numpy."""
    w, z = np.array([0.5, -1.0, 2.0, -np.inf]), np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [9.0, 9.0]])
    cloud = inference.Particles({"z": jnp.asarray(z)}, jnp.asarray(w), jnp.asarray(7.0))
    weights = np.exp(w) / np.exp(w).sum()
    mean = weights @ z
    np.testing.assert_allclose(cloud.log_evidence, 7.0 + np.log(np.exp(w).mean()), rtol=1e-12)
    np.testing.assert_allclose(cloud.weights, weights, rtol=1e-12)
    np.testing.assert_allclose(cloud.ess, 1 / (weights**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(cloud.mean()["z"], mean, rtol=1e-12)
    np.testing.assert_allclose(cloud.sd()["z"], np.sqrt(weights @ (z - mean) ** 2), rtol=1e-12)
    np.testing.assert_allclose(
        cloud.mean_standard_error()["z"], np.sqrt(weights**2 @ (z - mean) ** 2), rtol=1e-12, atol=1e-12
    )
    relative = np.std(np.exp(w), ddof=1) / np.exp(w).mean() / 2
    np.testing.assert_allclose(cloud.log_evidence_standard_error, relative, rtol=1e-12)


# --- a conjugate model ------------------------------------------------------------------------------------------------


def conjugate(i=0):
    """Return the posterior of data set i, its log evidence, and the mean and sd of mu."""
    x, y = CONJUGATE.one(i)
    precision = 1 / x[1] ** 2 + 3 / 0.49
    mean = (x[0] / x[1] ** 2 + y.sum() / 0.49) / precision
    return CONJUGATE.posterior(x, y), CONJUGATE.log_evidence(x, y), mean, precision**-0.5


def proposals(name, mean, sd):
    return {"prior": None, "guide": normal_guide(mean + 0.3, 1.3 * sd), "exact": normal_guide(mean, sd)}[name]


@pytest.mark.parametrize("name", ["prior", "guide", "exact"])
def test_evidence_and_weighted_moments_are_unbiased(x64, name):
    posterior, log_evidence, mean, sd = conjugate()

    @jax.jit
    @jax.vmap
    def run(key):
        cloud = inference.importance(posterior, proposals(name, mean, sd), key=key, num_particles=8)
        ratio = jnp.exp(cloud.log_evidence - log_evidence)
        moments = cloud.expectation(lambda z: jnp.stack([z["mu"], z["mu"] ** 2]))
        return jnp.concatenate([ratio[None], ratio * moments])

    exact = np.array([1.0, mean, mean**2 + sd**2])
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), exact, KEY, 10_000)


def test_the_exact_proposal_has_no_error(x64):
    posterior, log_evidence, mean, sd = conjugate(1)
    cloud = inference.importance(posterior, normal_guide(mean, sd), key=KEY, num_particles=10)
    np.testing.assert_allclose(cloud.log_weights, log_evidence, rtol=1e-12)
    assert float(cloud.log_evidence_standard_error) < 1e-12
    np.testing.assert_allclose(cloud.ess, 10.0, rtol=1e-12)


@pytest.mark.parametrize("name", ["prior", "guide"])
def test_standard_errors_are_honest(x64, name):
    posterior, _, mean, sd = conjugate()

    @jax.jit
    @jax.vmap
    def run(key):
        cloud = inference.importance(posterior, proposals(name, mean, sd), key=key, num_particles=400)
        stated = cloud.log_evidence_standard_error, cloud.mean_standard_error()["mu"]
        return (cloud.log_evidence, cloud.mean()["mu"]), stated

    values, stated = run(jax.random.split(KEY, 200))
    for value, error in zip(values, stated, strict=True):
        assert 0.7 < np.mean(error) / np.std(value, ddof=1) < 1.4


@pytest.mark.parametrize("method", ["systematic", "stratified", "multinomial"])
def test_resampling_keeps_the_evidence_and_the_mean(x64, method):
    posterior, *_ = conjugate()
    cloud = inference.importance(posterior, key=KEY, num_particles=500)
    again = cloud.resample(jax.random.fold_in(KEY, 1), 2000, method)
    assert again.log_weights.shape == (2000,) and again.choices["mu"].shape == (2000,)
    np.testing.assert_allclose(again.log_evidence, cloud.log_evidence, rtol=1e-12)
    assert set(np.asarray(again.choices["mu"])) <= set(np.asarray(cloud.choices["mu"]))

    def resampled(key, n):
        return jax.vmap(lambda k: cloud.resample(k, 50, method).mean()["mu"])(jax.random.split(key, n))

    two_stage_z(resampled, np.asarray(cloud.mean()["mu"]), KEY, 2000)


def test_a_million_float32_particles():
    """The evidence is summed without loss, and is right within its own error."""
    posterior, log_evidence, *_ = conjugate()
    assert not jax.config.jax_enable_x64
    cloud = inference.importance(posterior, key=KEY, num_particles=1_000_000)
    assert cloud.log_weights.dtype == jnp.float32
    in_double = np.logaddexp.reduce(np.asarray(cloud.log_weights, np.float64)) - np.log(1e6)
    error = float(cloud.log_evidence_standard_error)
    assert abs(float(cloud.log_evidence) - in_double) < 0.02 * error
    assert abs(float(cloud.log_evidence) - log_evidence) < 3 * error < 0.01


# --- under JAX's transformations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prior", "guide"])
def test_vmap_over_keys_is_a_loop(x64, name):
    posterior, _, mean, sd = conjugate()

    def run(key):
        return inference.importance(posterior, proposals(name, mean, sd), key=key, num_particles=5)

    keys = jax.random.split(KEY, 3)
    together = jax.vmap(run)(keys)
    assert len(np.unique(together.choices["mu"])) == 15
    for i, key in enumerate(keys):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-12), together, run(key))


def test_nothing_compiles_twice():
    def run(key, i, mean):
        x, y = (part.astype(np.float32) for part in CONJUGATE.one(i))
        guide = normal_guide(mean, mean + 1.0)
        clouds = [
            inference.importance(CONJUGATE.posterior(x, y), proposal, key=key, num_particles=32)
            for proposal in (None, guide)
        ]
        return [float(cloud.log_evidence) for cloud in clouds]

    keys = jax.random.split(KEY)
    first = run(keys[0], 0, 0.5)
    with count_compiles() as compiles:
        second = run(keys[1], 1, 0.7)
    assert compiles == [] and set(first).isdisjoint(second)


def test_no_key_is_used_twice():
    posterior, _, mean, sd = conjugate()
    with jax.debug_key_reuse(True):
        inference.importance(posterior, normal_guide(mean, sd), key=jax.random.key(1), num_particles=7)
        inference.importance(posterior, key=jax.random.key(1), num_particles=7).resample(jax.random.key(2))


# --- refusals ---------------------------------------------------------------------------------------------------------


@ppl.model
def scale_model():
    location = ppl.sample("location", dist.Normal(0.0, 1.0))
    scale = ppl.sample("scale", dist.HalfNormal(1.0))
    ppl.sample("y", dist.Normal(location, scale))


def guide_of(**sites: Any) -> Any:
    return ppl.model(lambda: [ppl.sample(a, d) for a, d in sites.items()] and None)()


N, HN = dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)
MISFITS = {
    "missing site": ({"location": N}, ppl.AddressError, "no site 'scale'"),
    "extra site": ({"location": N, "scale": HN, "more": N}, ppl.AddressError, "'more'"),
    "misspelt site": ({"location": N, "scales": HN}, ppl.AddressError, "Did you mean 'scale'"),
    "observed site": ({"location": N, "scale": HN, "y": N}, ppl.AddressError, "'y'.*observes"),
    "narrower": ({"location": HN, "scale": HN}, ppl.SupportError, "'location'.*does not cover"),
    "narrower, bounded": ({"location": N, "scale": dist.Beta(1.0, 1.0)}, ppl.SupportError, "'scale'.*does not cover"),
    "wider": ({"location": N, "scale": N}, ppl.SupportError, "'scale'.*not inside"),
    "discrete": ({"location": N, "scale": dist.Poisson(1.0)}, ppl.SupportError, "'scale'.*not inside"),
    "shape": ({"location": N, "scale": HN.expand([2])}, ppl.ShapeError, r"'scale'.*\(2,\).*\(\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_proposal_that_does_not_fit_is_refused(case):
    sites, error, message = MISFITS[case]
    with pytest.raises(error, match=message) as caught:
        inference.importance(scale_model().given({"y": 0.3}), guide_of(**sites), key=KEY, num_particles=4)
    assert __file__ in str(caught.value)


def test_old_keys_and_counts_are_refused():
    posterior, *_ = conjugate()
    with pytest.raises(TypeError, match="typed key"):
        inference.importance(posterior, key=jax.random.PRNGKey(0), num_particles=4)
    with pytest.raises(TypeError, match="array of keys"):
        inference.importance(posterior, key=jax.random.split(KEY, 3), num_particles=4)
    with pytest.raises(ValueError, match="num_particles >= 1, got 0"):
        inference.importance(posterior, key=KEY, num_particles=0)


@ppl.model
def nan_where_negative():
    z = ppl.sample("z", dist.Normal(0.0, 1.0))
    ppl.sample("fine", dist.Normal(z, 1.0))
    ppl.sample("root", dist.Normal(0.0, jnp.sqrt(z)))


def test_a_weight_that_is_not_a_number_names_its_site():
    posterior = nan_where_negative().given({"fine": 0.0, "root": 1.0})
    with pytest.raises(ppl.NonFiniteError, match="'root'") as caught:
        inference.importance(posterior, key=KEY, num_particles=64)
    cloud: Any = caught.value.result
    assert isinstance(cloud, inference.Particles)
    bad = np.isnan(np.asarray(cloud.log_weights))
    np.testing.assert_array_equal(bad, np.asarray(cloud.choices["z"]) < 0)
    assert f"{bad.sum()} of 64" in str(caught.value) and f"particle {bad.argmax()} " in str(caught.value)


@ppl.model
def bounded():
    z = ppl.sample("z", dist.Beta(1.0, 1.0))
    ppl.sample("y", dist.Uniform(0.0 * z, z))


def test_weights_that_are_all_zero_name_their_site():
    with pytest.raises(ppl.NonFiniteError, match="all weights are zero.*'y'"):
        inference.importance(bounded().given({"y": 10.0}), key=KEY, num_particles=64)


def test_some_weights_of_zero_are_no_error(x64):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cloud = inference.importance(bounded().given({"y": 0.5}), key=KEY, num_particles=4000)
    lower = np.asarray(cloud.choices["z"]) < 0.5
    np.testing.assert_array_equal(np.isneginf(cloud.log_weights), lower)
    error = float(cloud.log_evidence_standard_error)
    assert abs(float(cloud.log_evidence) - np.log(np.log(2))) < 4 * error < 0.2
