"""The filters' law by enumeration: every resampler, threshold, proposal and look-ahead weight, on models of every form.

All choices are finite, so that an error of 1e-10 is a proof for the model at hand. Weights that are not reset or not
carried, an evidence that forgets a factor, a proposal without its density, or a wrong ancestor fail here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from expectax import dist, inference, ppl
from filter_models import MODELS, Y, coin, guide, guided, switch
from helpers import two_stage_z

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
METHODS = ("systematic", "stratified", "multinomial", "residual", "ssp", "killing")


def prove(posterior: Any, **settings: Any) -> None:
    inference.assert_valid(lambda target: inference.filtering(target, 2, **settings).particles, posterior)


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_every_resampler_and_threshold(method, threshold):
    """At 0.9 some runs resample and others do not: the decision leaves the evidence unbiased."""
    prove(MODELS["chain"](), method=method, ess_threshold=threshold)


def test_the_threshold_decides_by_the_particles():
    run = inference.exact(lambda: inference.filtering(MODELS["chain"](), 2, ess_threshold=0.9).resampled)
    share = run.expectation(lambda x: 1.0 * x)
    assert ((share > 0.01) & (share < 0.99)).any()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "chain"])
def test_models_of_every_form(name):
    prove(MODELS[name](), method="stratified", ess_threshold=0.95)


@pytest.mark.by_hand
@pytest.mark.parametrize("method", METHODS)
def test_three_particles(method):
    short = ppl.model(lambda: lax.scan(switch, 0.0, None, length=2)[1])().given({"y": Y[:2]})
    inference.assert_valid(
        lambda target: inference.filtering(target, 3, method=method, ess_threshold=0.8).particles, short
    )


def ahead(now):
    return -0.3 * (now.observed["y"] - now.carry) ** 2 + 0.1 * now.time


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "settings", [{"proposal": guided}, {"auxiliary": ahead}, {"proposal": guided, "auxiliary": ahead}]
)
def test_guided_and_auxiliary(settings, threshold):
    prove(MODELS["chain"](), ess_threshold=threshold, **settings)


def test_a_proposal_sees_latents_before_the_scan_and_nests():
    before = lambda now: guide(0.3 + 0.4 * now.before["start"] * now.carry)  # noqa: E731
    prove(
        MODELS["latents_before"](), proposal=before, auxiliary=lambda now: 0.8 * now.before["start"], ess_threshold=1.0
    )
    within = ppl.model(lambda z: ppl.sample("inside", ppl.model(lambda: coin("to", 0.4 + 0.2 * z))()))
    prove(MODELS["nested"](), proposal=lambda now: within(now.carry), ess_threshold=1.0)
    several = lambda now: guide(0.3 + 0.2 * now.carry[0] + 0.2 * now.carry[1])  # noqa: E731
    prove(MODELS["several"](), proposal=several, ess_threshold=1.0)


def test_a_look_ahead_weight_of_zero_loses_nothing():
    """A look-ahead weight that calls possible particles impossible would bias the filter; it is raised."""
    prove(MODELS["chain"](), auxiliary=lambda now: jnp.where(now.carry == 1, -jnp.inf, 0.0), ess_threshold=1.0)


def test_a_fully_adapted_filter_has_equal_weights():
    """With p(y | x) ahead and p(x' | x, y) as proposal the evidence has only the look-ahead's own variance."""

    def joint(now):
        prior = jnp.stack([0.75 - 0.5 * now.carry, 0.25 + 0.5 * now.carry])
        return jnp.log(prior) + dist.Normal(jnp.arange(2.0), 0.7).log_prob(now.observed["y"])

    settings: dict[str, Any] = {
        "proposal": lambda now: guide(jax.nn.softmax(joint(now))[1]),
        "auxiliary": lambda now: jax.nn.logsumexp(joint(now)),
        "ess_threshold": 1.0,
    }
    prove(MODELS["chain"](), **settings)
    law = inference.exact(lambda: inference.filtering(MODELS["chain"](), 2, **settings).log_weights)
    np.testing.assert_allclose(law.values, 0.0, atol=1e-12)


def test_missing_data():
    """An observation that is missing at one time is drawn and not weighed."""
    y = np.array([0.3, np.nan, -0.2])
    posterior = MODELS["chain"]().program.given({"y": ppl.masked(y)})
    exact = 0.0
    for path in np.ndindex(2, 2, 2):
        z = np.array(path, float)
        before = np.append(0.0, z[:-1])
        up = 0.25 + 0.5 * before
        prior = np.where(z == 1, up, 1 - up).prod()
        exact += prior * stats.norm.pdf(y[[0, 2]], z[[0, 2]], 0.7).prod()

    run = lambda key: inference.particle_filter(posterior, key=key, num_particles=4, ess_threshold=0.9).log_evidence  # noqa: E731
    sampler = jax.jit(jax.vmap(lambda key: jnp.exp(run(key)) / exact))
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), 1.0, jax.random.key(7), 4000)


def test_the_variance_of_one_run_has_the_right_mean():
    """E[V Z-hat^2] = var(Z-hat) exactly, for multinomial resampling at every step (Lee and Whiteley 2018, theorem 1)."""
    for count in (2, 3):
        posterior = MODELS["chain"]() if count == 2 else MODELS["backwards"]()

        def run(posterior=posterior, count=count):
            filtered = inference.filtering(posterior, count, method="multinomial", ess_threshold=1.0)
            evidence = jnp.exp(filtered.log_evidence)
            return evidence, evidence**2, evidence**2 * filtered.relative_variance

        mean, square, estimate = inference.exact(run).expectation()
        np.testing.assert_allclose(estimate, square - mean**2, rtol=1e-9)


@pytest.mark.parametrize("store", ["filtering", "evidence"])
def test_what_is_not_stored_changes_nothing(store):
    """The same draws with everything stored and with less."""
    key = jax.random.key(3)
    for name in ("chain", "backwards", "latents_before"):
        settings: dict[str, Any] = {"key": key, "num_particles": 20, "ess_threshold": 0.99}
        whole = inference.particle_filter(MODELS[name](), **settings)
        part = inference.particle_filter(MODELS[name](), store=store, **settings)
        assert np.asarray(whole.resampled).any()
        np.testing.assert_allclose(part.log_evidence, whole.log_evidence, rtol=1e-12)
        np.testing.assert_array_equal(part.eves, whole.eves)
        np.testing.assert_allclose(part.relative_variance, whole.relative_variance, rtol=1e-9)
        if name == "latents_before":
            np.testing.assert_array_equal(part.particles.choices["start"], whole.particles.choices["start"])
        if store == "filtering":
            last = 0 if name == "backwards" else -1
            np.testing.assert_array_equal(part.particles.choices["z"], whole.particles.choices["z"][:, last])
            jax.tree.map(np.testing.assert_array_equal, part.history, whole.history)


def test_refusals():
    with pytest.raises(ppl.ControlFlowError, match="after its scan.*trajectories"):
        inference.filtering(MODELS["sites_after"](), 2, store="evidence")
    with pytest.raises(ValueError, match="store must be one of.*got 'all'"):
        inference.filtering(MODELS["chain"](), 2, store="all")  # pyright: ignore[reportArgumentType]
    filtered = inference.particle_filter(MODELS["chain"](), key=jax.random.key(0), num_particles=3, store="evidence")
    with pytest.raises(ValueError, match='store="evidence"'):
        filtered.mean()
    wrong = ppl.model(lambda: coin("zz", 0.5))
    with pytest.raises(ppl.AddressError, match="sites zz, but the latents of a step are z"):
        inference.particle_filter(
            MODELS["chain"](), key=jax.random.key(0), num_particles=3, proposal=lambda now: wrong()
        )
    observing = ppl.model(lambda: (coin("z", 0.5), ppl.observe("e", dist.Normal(0.0, 1.0), 0.3)))
    with pytest.raises(ppl.ControlFlowError, match="'e'.*observed"):
        inference.particle_filter(
            MODELS["chain"](), key=jax.random.key(0), num_particles=3, proposal=lambda now: observing()
        )


@pytest.mark.by_hand
@pytest.mark.filterwarnings("ignore")
def test_float32_evidence_of_a_million_particles():
    """Sums of a million float32 weights do not move the evidence: against the exact one, in the runs' own spread."""
    times, count = 100, 1_000_000
    ys = np.random.default_rng(0).normal(size=times)

    @ppl.model
    def walk():
        def step(x, _):
            x = ppl.sample("x", dist.Normal(0.9 * x, 0.5))
            ppl.sample("y", dist.Normal(x, 0.7))
            return x, None

        lax.scan(step, 0.0, None, length=times)

    mean, variance, exact = 0.0, 0.0, 0.0
    for y in ys:
        mean, variance = 0.9 * mean, 0.81 * variance + 0.25
        spread = variance + 0.49
        exact += stats.norm.logpdf(y, mean, np.sqrt(spread))
        mean, variance = mean + variance / spread * (y - mean), variance * 0.49 / spread
    with jax.enable_x64(False):
        posterior = walk().given({"y": jnp.asarray(ys, jnp.float32)})
        settings: dict[str, Any] = {"num_particles": count, "store": "evidence"}
        found = [
            float(inference.particle_filter(posterior, key=jax.random.key(i), **settings).log_evidence)
            for i in range(8)
        ]
    spread = np.std(found, ddof=1)
    assert spread < 0.05
    assert abs(np.mean(found) + spread**2 / 2 - exact) < 5 * spread / np.sqrt(8)
