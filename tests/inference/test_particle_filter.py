"""The bootstrap filter against forward recursion and Gaussian conditioning, and its genealogy, laws and refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.special import logsumexp
from scipy import stats

from exact_models import HMM, LINEAR_GAUSSIAN, START, TIMES
from expectax import dist, inference, ppl
from helpers import count_compiles, enumerate_choices, hmm_log_evidence, two_stage_z

KEY = jax.random.key(20260805)
METHODS = ("systematic", "stratified", "multinomial")
WAYS = [
    ("hmm", 0.0, "systematic"),
    *(("hmm", 0.8, method) for method in METHODS),
    ("hmm", 1.0, "systematic"),
    ("linear_gaussian", 0.0, "systematic"),
    ("linear_gaussian", 0.8, "stratified"),
    ("linear_gaussian", 1.0, "multinomial"),
]
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


# --- exact means given the first t observations -----------------------------------------------------------------------


def hmm_mean(x: np.ndarray, y: np.ndarray, t: int) -> np.ndarray:
    """Return P(z_u = k | y_1 .. y_t), shape (3, 3): by enumeration."""
    table = enumerate_choices({"z": np.zeros(3)}, {"z": 3})["z"]
    prior = np.array([HMM.log_prior({"z": z}, x) for z in table])
    likelihood = stats.norm.pdf(y[:t], np.array([-1.0, 0.5, 2.0])[table[:, :t]], 0.8).prod(1)
    weights = np.exp(prior) * likelihood
    return np.einsum("i,iuk->uk", weights / weights.sum(), np.eye(3)[table])


def gaussian_mean(x: np.ndarray, y: np.ndarray, t: int) -> np.ndarray:
    """Return E[s_u | y_1 .. y_t], shape (4, 2): conditioning of a normal vector (what the RTS smoother computes)."""
    mean, cov = LINEAR_GAUSSIAN.moments(x)
    seen = np.eye(2 * TIMES)[: 2 * t : 2]
    gain = cov @ seen.T @ np.linalg.inv(seen @ cov @ seen.T + 0.81 * np.eye(t))
    return (mean + gain @ (y[:t] - seen @ mean)).reshape(TIMES, 2)


CASES: dict[str, tuple[Any, Any, Any]] = {  # exact model, exact means, what to average
    "hmm": (HMM, hmm_mean, lambda z: jax.nn.one_hot(z["z"], 3, dtype=float)),
    "linear_gaussian": (LINEAR_GAUSSIAN, gaussian_mean, lambda z: z["s"]),
}


@pytest.mark.parametrize(("name", "threshold", "method"), WAYS)
def test_evidence_and_smoothing_means_are_unbiased(name, threshold, method):
    """Z-hat / Z, and times the trajectories' mean, in all of time: the first time shows the genealogy."""
    case, means, f = CASES[name]
    x, y = case.one(0)
    posterior, log_evidence = case.posterior(x, y), case.log_evidence(x, y)

    @jax.jit
    @jax.vmap
    def run(key):
        filtered = inference.particle_filter(
            posterior, key=key, num_particles=32, ess_threshold=threshold, method=method
        )
        ratio = jnp.exp(filtered.log_evidence - log_evidence)
        return ratio * jnp.append(filtered.particles.expectation(f).ravel(), 1.0)

    exact = np.append(means(x, y, len(y)).ravel(), 1.0)
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), exact, KEY, 1000)


@pytest.mark.parametrize("name", CASES)
def test_filtering_means(name):
    """At each time the weighted particles give the mean given the observations so far (bias of order 1/N)."""
    case, means, f = CASES[name]
    x, y = case.one(1)
    exact = np.stack([means(x, y, t + 1)[t] for t in range(len(y))])

    @jax.jit
    @jax.vmap
    def run(key):
        filtered = inference.particle_filter(case.posterior(x, y), key=key, num_particles=4000)
        weights = jax.nn.softmax(filtered.log_weights, axis=1)
        values = jax.vmap(jax.vmap(f))(filtered.choices)
        return jnp.einsum("tn,tn...->t...", weights, values), filtered.mean(), filtered.sd()

    two_stage_z(lambda key, n: run(jax.random.split(key, n))[0], exact, KEY, 50)
    _, mean, sd = run(jax.random.split(KEY, 3))
    address = next(iter(mean))
    if name == "linear_gaussian":
        np.testing.assert_allclose(mean[address].mean(0), exact, atol=0.1)
        _, cov = case.moments(x)
        seen = np.eye(2 * TIMES)[::2]
        last = cov - cov @ seen.T @ np.linalg.inv(seen @ cov @ seen.T + 0.81 * np.eye(TIMES)) @ seen @ cov
        np.testing.assert_allclose(sd[address].mean(0)[-1], np.sqrt(np.diag(last)[-2:]), rtol=0.05)
    else:
        np.testing.assert_allclose(mean[address].mean(0), exact @ np.arange(3), atol=0.05)


# --- exact relations inside one run -----------------------------------------------------------------------------------


def run_hmm(threshold, num_particles=40, key=KEY, method="systematic"):
    x, y = HMM.one(0)
    return inference.particle_filter(
        HMM.posterior(x, y), key=key, num_particles=num_particles, ess_threshold=threshold, method=method
    )


def test_without_resampling_weights_are_likelihoods():
    """log_weights[t] is the log likelihood of y_1 .. y_t; the last are those of `generate`."""
    x, y = HMM.one(0)
    filtered = run_hmm(0.0)
    z = np.asarray(filtered.particles.choices["z"])
    np.testing.assert_array_equal(z, np.asarray(filtered.choices["z"]).T)
    terms = stats.norm.logpdf(y, np.array([-1.0, 0.5, 2.0])[z], 0.8)
    np.testing.assert_allclose(np.asarray(filtered.log_weights).T, np.cumsum(terms, 1), rtol=1e-12)
    np.testing.assert_allclose(filtered.particles.log_weights, terms.sum(1), rtol=1e-12)
    densities = [float(HMM.posterior(x, y).log_density({"z": v})) - HMM.log_prior({"z": v}, x) for v in z[:4]]
    np.testing.assert_allclose(filtered.particles.log_weights[:4], densities, rtol=1e-12)


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_evidence_ess_and_resampling_agree(threshold):
    """The evidence is a product over the stretches between resampling steps; these happen at low ESS."""
    x, _ = LINEAR_GAUSSIAN.one(0)
    y = np.array([0.5, 3.0, -0.3, 2.2])
    filtered = inference.particle_filter(
        LINEAR_GAUSSIAN.posterior(x, y), key=KEY, num_particles=50, ess_threshold=threshold
    )
    w = np.asarray(filtered.log_weights)
    ess = np.exp(2 * logsumexp(w, axis=1) - logsumexp(2 * w, axis=1))
    np.testing.assert_allclose(filtered.ess, ess, rtol=1e-10)
    before = np.append(50.0, ess[:-1])
    needed = np.full(4, True) if threshold == 1.0 else before < threshold * 50
    np.testing.assert_array_equal(filtered.resampled, needed)
    ends = [t for t in range(3) if needed[t + 1]] + [3]
    evidence = sum(float(logsumexp(w[t])) - np.log(50) for t in ends)
    np.testing.assert_allclose(filtered.log_evidence, evidence, rtol=1e-10)
    np.testing.assert_allclose(filtered.particles.log_weights, w[-1], rtol=1e-12)


@ppl.model
def climb(length):
    """Only steps of 0 or 1 are possible, so that a trajectory put together wrongly has density zero."""

    def step(state, y):
        last, shift = state
        up = ppl.sample("up", dist.Bernoulli(0.5))
        here = ppl.sample("here", dist.DiscreteUniform(last + up, last + up))
        ppl.sample("y", dist.Normal(here + shift, 1.5))
        return (here, shift), (here, up)

    start = ppl.sample("start", dist.Binomial(5, 0.5))
    shift = ppl.sample("shift", dist.Normal(0.0, 1.0))
    (last, _), (path, ups) = lax.scan(step, (start, shift), None, length=length)
    ppl.sample("last", dist.DiscreteUniform(last, last))
    ppl.sample("sum", dist.DiscreteUniform(path.sum(), path.sum()))
    ppl.sample("total", dist.Normal(start + ups.sum() + 10 * shift, 0.1))


def test_trajectories_are_whole():
    y = np.array([2.0, 3.0, 3.5, 2.0, 4.0, 6.0, 5.0, 7.0])
    posterior = climb(8).given({"y": y, "total": 7.0})
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=60, ess_threshold=1.0)
    z = jax.tree.map(np.asarray, filtered.particles.choices)
    assert len(np.unique(z["start"])) > 1 and np.asarray(filtered.resampled).all()
    np.testing.assert_array_equal(z["here"], z["start"][:, None] + np.cumsum(z["up"], 1))
    np.testing.assert_array_equal(z["last"], z["here"][:, -1])
    np.testing.assert_array_equal(z["sum"], z["here"].sum(1))
    density = jax.jit(jax.vmap(posterior.log_density))(filtered.particles.choices)
    assert np.isfinite(density).all()

    before_resampling = {a: np.asarray(v) for a, v in filtered.choices.items()}
    np.testing.assert_array_equal(z["here"][:, -1], before_resampling["here"][-1])
    for t in range(8):
        assert set(zip(z["here"][:, t], z["up"][:, t], strict=True)) <= set(
            zip(before_resampling["here"][t], before_resampling["up"][t], strict=True)
        )
    last = stats.norm.logpdf(y[-1], z["here"][:, -1] + z["shift"], 1.5)
    after = stats.norm.logpdf(7.0, z["start"] + z["up"].sum(1) + 10 * z["shift"], 0.1)
    np.testing.assert_allclose(filtered.log_weights[-1], last, rtol=1e-10)
    np.testing.assert_allclose(filtered.particles.log_weights, last + after, rtol=1e-10)


def test_extinction_counts_as_zero():
    """Where no particle can explain an observation, Z-hat is 0, not nan, and its mean is still Z."""

    @ppl.model
    def interval(x):
        def step(probs, _):
            z = ppl.sample("z", dist.Categorical(probs=probs))
            ppl.sample("y", dist.Uniform(z - 0.6, z + 0.6))
            return x[z], None

        lax.scan(step, jnp.asarray(START), None, length=4)

    x, y = HMM.data[0][0], np.array([0.5, 1.0, 1.5, 2.1])
    emission = np.log(np.where(np.abs(y[:, None] - np.arange(3)) <= 0.6, 1 / 1.2, 1e-300))
    posterior, log_evidence = interval(x).given({"y": y}), hmm_log_evidence(START, x, emission)

    @jax.jit
    @jax.vmap
    def run(key):
        filtered = inference.particle_filter(posterior, key=key, num_particles=4, method="multinomial")
        return jnp.exp(filtered.log_evidence - log_evidence)

    assert 0.05 < np.mean(np.asarray(run(jax.random.split(KEY, 4000))) == 0.0) < 0.95
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), 1.0, KEY, 4000)


# --- under JAX's transformations --------------------------------------------------------------------------------------


def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(lambda key: run_hmm(0.5, 20, key))(keys)
    assert len(set(np.asarray(together.log_weights).sum((1, 2)))) == 3
    for i, key in enumerate(keys):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12),
            together,
            run_hmm(0.5, 20, key),
        )


def test_nothing_compiles_twice():
    def run(key, i):
        x, y = LINEAR_GAUSSIAN.one(i)
        return float(inference.particle_filter(LINEAR_GAUSSIAN.posterior(x, y), key=key, num_particles=33).log_evidence)

    keys = jax.random.split(KEY)
    first = run(keys[0], 0)
    with count_compiles() as compiles:
        second = run(keys[1], 2)
    assert compiles == [] and first != second


def test_particles_and_steps_draw_apart():
    """All draws of a run differ: no key serves two steps, particles or parts of the model."""
    x, y = LINEAR_GAUSSIAN.one(0)
    filtered = inference.particle_filter(LINEAR_GAUSSIAN.posterior(x, y), key=KEY, num_particles=50, ess_threshold=0.0)
    s = np.asarray(filtered.particles.choices["s"])
    before = np.concatenate([np.broadcast_to([1.0, -0.5], (50, 1, 2)), s[:, :-1]], 1)
    noise = (s - before @ x.T) @ np.linalg.inv(np.array([[0.8, 0.0], [0.3, 0.5]])).T
    assert len(np.unique(noise.round(9))) == noise.size
    with jax.debug_key_reuse(True):
        inference.particle_filter(LINEAR_GAUSSIAN.posterior(x, y), key=jax.random.key(1), num_particles=9)


# --- refusals ---------------------------------------------------------------------------------------------------------


def walk_of(length: int, address: str = "x") -> Any:
    def step(s, _):
        return ppl.sample(address, dist.Normal(s, 1.0)), None

    return lax.scan(step, 0.0, None, length=length)[0]


def no_scan():
    ppl.sample("x", dist.Normal(0.0, 1.0))
    lax.scan(lambda c, _: (c + 1.0, None), 0.0, None, length=3)


def two_scans():
    walk_of(3)
    walk_of(3, "z")


def scan_in_nested_model():
    ppl.sample("inner", ppl.model(lambda: walk_of(3))())


@pytest.mark.parametrize(("model", "found"), [(no_scan, 0), (two_scans, 2), (scan_in_nested_model, 0)])
def test_a_model_without_one_scan_is_refused(model, found):
    with pytest.raises(ppl.ControlFlowError, match=f"exactly one lax.scan.*found {found}") as caught:
        inference.particle_filter(ppl.model(model)().given({}), key=KEY, num_particles=4)
    assert str(caught.value).count(__file__) == found


def test_impossible_arguments_are_refused():
    for name, value in {"num_particles": 0, "ess_threshold": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name}.*got .*{value}"):
            inference.particle_filter(HMM.posterior(*HMM.one(0)), key=KEY, **{"num_particles": 4, name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got 'best'"):
        run_hmm(0.5, method="best")
    with pytest.raises(TypeError, match="typed key"):
        run_hmm(0.5, key=jax.random.PRNGKey(0))
