"""SMC over sequences of posteriors: growing data and families, exact by enumeration and against conjugate evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import expectax as ex
from expectax import dist, inference
from finite_kernels import Flip, Metropolis
from helpers import count_compiles, two_stage_z

KEY = jax.random.key(3)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


@ex.model
def coin(p):
    z = ex.sample("z", dist.Bernoulli(p))
    jax.vmap(lambda s: ex.sample("y", dist.Normal(z * s, 1.0)))(jnp.array([1.0, 0.5, 2.0]))


@ex.model
def other(y):
    z = ex.sample("z", dist.Bernoulli(0.7))
    ex.factor("more", -0.3 * z * y)


COIN = lambda p=0.4: coin(p).given({"y": jnp.array([1.4, -0.3, 0.8])})  # noqa: E731


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
def test_every_run_with_growing_data(x64, threshold):
    """Catches: a datum weighed twice or not at all, weights kept after resampling or lost without it.

    Between 0 and 1 the particles decide whether they are moved, which biases: enumeration sees that too.
    """

    def run(posterior):
        found = inference.data_tempered(
            posterior, Flip("z"), num_particles=2, num_batches=3, threshold=threshold, num_moves=1
        )
        assert found.unbiased == (threshold != 0.9)
        return found.particles

    if threshold == 0.9:
        with pytest.raises(AssertionError, match="not properly weighted"):
            inference.assert_valid(run, COIN())
    else:
        inference.assert_valid(run, COIN())


def test_every_run_with_a_frozen_schedule(x64):
    """Moves at the steps that another run has decided on are unbiased."""
    schedule = inference.Schedule(jnp.ones(3), (), jnp.array([True, False, True]))
    run = lambda posterior: inference.data_tempered(  # noqa: E731
        posterior, Flip("z"), num_particles=2, schedule=schedule, num_moves=1
    )
    inference.assert_valid(lambda posterior: run(posterior).particles, COIN())
    pilot = inference.data_tempered(COIN(), Flip("z"), key=KEY, num_particles=200, num_moves=1, threshold=0.95)
    assert pilot.resampled.any() and not pilot.resampled.all() and not pilot.unbiased
    again = inference.data_tempered(
        COIN(), Flip("z"), key=KEY, num_particles=200, num_moves=1, schedule=pilot.freeze_schedule()
    )
    assert again.unbiased and again.log_evidence == pilot.log_evidence


@pytest.mark.parametrize("alike", [False, True])
def test_every_run_over_a_family(x64, alike):
    """A list of one model's posteriors (one scan), and of two models' (written out)."""
    between = coin(0.9).given({"y": jnp.array([0.1, 1.3, -0.8])}) if alike else other(2.0).given({})
    run = lambda posterior: (  # noqa: E731
        inference.smc_over(
            [COIN(0.2), between, posterior], Flip("z"), num_particles=2, threshold=1.0, num_moves=1
        ).particles
    )
    inference.assert_valid(run, COIN())


def test_a_proposal_for_the_first_posterior(x64):
    guide = ex.model(lambda: ex.sample("z", dist.Bernoulli(0.8)))
    run = lambda posterior: (  # noqa: E731
        inference.smc_over(
            [COIN(0.2), posterior],
            Metropolis("z", [0.3, 0.7]),
            num_particles=2,
            num_moves=1,
            proposal=guide(),
            threshold=1.0,
        ).particles
    )
    inference.assert_valid(run, COIN())


# --- conjugate evidence ---------------------------------------------------------------------------------------------------

Y = np.array([0.3, 1.8, -0.4, 2.2, 0.9])


@ex.model
def normal(scale):
    z = ex.sample("z", dist.Normal(0.0, scale))
    jax.vmap(lambda _: ex.sample("y", dist.Normal(z, 1.0)))(jnp.arange(5))


def evidence(count, scale=1.5):
    """Return log p of the first data."""
    spread = np.eye(count) + scale**2
    return stats.multivariate_normal(np.zeros(count), spread).logpdf(Y[:count])


KERNEL = inference.hmc(num_integration_steps=2)
STEP = {"step_size": jnp.asarray(0.4), "inverse_mass_matrix": jnp.ones(1)}


@pytest.mark.parametrize("batches", [5, 2])
def test_the_evidence_of_the_data_so_far(batches):
    counts = [int(np.ceil((t + 1) * 5 / batches)) for t in range(batches)]
    exact = np.array([evidence(n) for n in counts])
    posterior = normal(1.5).given({"y": Y})
    pilot = inference.data_tempered(posterior, KERNEL, key=KEY, num_particles=50, num_batches=batches, threshold=0.7)
    schedule = pilot.freeze_schedule()

    @jax.jit
    @jax.vmap
    def run(key):
        found = inference.data_tempered(
            posterior, KERNEL, key=key, num_particles=20, num_batches=batches, num_moves=1, schedule=schedule
        )
        assert found.unbiased
        return jnp.append(
            jnp.exp(found.log_evidences - exact), jnp.exp(found.log_evidence - exact[-1]) * found.mean()["z"]
        )

    mean = Y.sum() / (5 + 1 / 1.5**2)
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.append(np.ones(batches), mean), KEY, 3000)


def test_the_evidence_of_each_of_a_family():
    """As a list and as a function of the step, which give the same numbers."""
    scales = np.array([0.5, 1.0, 1.5], np.float32)
    exact = np.array([evidence(5, s) for s in scales])
    data = {"y": Y.astype(np.float32)}
    family = [normal(s).given(data) for s in scales]

    def run(key, posteriors, **settings):
        return inference.smc_over(
            posteriors, KERNEL, key=key, num_particles=20, num_moves=1, parameters=STEP, threshold=1.0, **settings
        ).log_evidences

    by_number = lambda t: normal(jnp.asarray(scales)[t]).given(data)  # noqa: E731
    np.testing.assert_allclose(run(KEY, family), run(KEY, by_number, num_steps=3), rtol=1e-5)
    ratios = jax.jit(jax.vmap(lambda key: jnp.exp(run(key, family) - exact)))
    two_stage_z(lambda key, n: ratios(jax.random.split(key, n)), np.ones(3), KEY, 3000)


def test_the_error_of_one_run_is_honest():
    posterior = normal(1.5).given({"y": Y})

    @jax.jit
    @jax.vmap
    def run(key):
        found = inference.data_tempered(
            posterior, KERNEL, key=key, num_particles=100, num_moves=1, parameters=STEP, threshold=0.7
        )
        return jnp.exp(found.log_evidence - evidence(5)), found.log_evidence_variance

    ratio, stated = run(jax.random.split(KEY, 1500))
    assert 0.8 < np.mean(stated * ratio**2) / np.var(ratio, ddof=1) < 1.25


def test_tuned_kernels_say_so_and_nothing_compiles_twice():
    def run(i):
        posterior = normal(1.0 + i).given({"y": Y + i})
        found = inference.data_tempered(posterior, KERNEL, key=jax.random.key(i), num_particles=50, num_moves=1)
        family = [normal(s + i).given({"y": Y}) for s in (0.5, 1.0)]
        other = inference.smc_over(family, KERNEL, key=jax.random.key(i), num_particles=50, num_moves=1)
        assert not found.unbiased and not other.unbiased
        return float(found.log_evidence), float(other.log_evidence)

    first = run(0)
    with count_compiles() as compiles:
        second = run(1)
    assert compiles == [] and set(first).isdisjoint(second)


def test_settings_and_families_that_do_not_fit():
    run = lambda posteriors, **kw: inference.smc_over(posteriors, KERNEL, key=KEY, num_particles=4, **kw)  # noqa: E731
    posterior = normal(1.5).given({"y": Y})
    with pytest.raises(ex.ppl.AddressError, match="latents of posterior 1"):
        run([posterior, ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))().given({})])
    with pytest.raises(ex.ppl.ShapeError, match="'z'"):
        run([posterior, ex.model(lambda: ex.sample("z", dist.Normal(jnp.zeros(2), 1.0)))().given({})])
    with pytest.raises(TypeError, match="list of posteriors"):
        run([])
    with pytest.raises(ValueError, match="num_steps"):
        run(lambda t: posterior)
    with pytest.raises(ValueError, match="threshold"):
        run([posterior], threshold=1.5)
    with pytest.raises(ValueError, match="num_batches"):
        inference.data_tempered(posterior, KERNEL, key=KEY, num_particles=4, num_batches=6)
    with pytest.raises(ex.ppl.ShapeError, match="'y'"):
        inference.data_tempered(
            ex.model(lambda: ex.sample("y", dist.Normal(ex.sample("z", dist.Normal(0.0, 1.0)), 1.0)))().given({"y": 0.0}),
            KERNEL, key=KEY, num_particles=4,
        )  # fmt: skip
