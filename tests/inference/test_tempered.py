"""SMC over temperatures and annealed importance sampling: exact by enumeration, unbiased, honest about its error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats
from scipy.special import gammaln

import expectax as ex
from expectax import dist, inference
from expectax.inference._path import Path
from expectax.inference._temperatures import next_temperature
from finite_kernels import Flip, Metropolis
from helpers import count_compiles, two_stage_z

KEY = jax.random.key(20261125)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


# --- exact: every run -------------------------------------------------------------------------------------------------


@ex.model
def three(probs):
    z = ex.sample("z", dist.Categorical(probs=jnp.asarray(probs)))
    ex.sample("y", dist.Normal(jnp.array([-1.0, 0.5, 2.0])[z], 0.7))


@ex.model
def three_guide(probs):
    ex.sample("z", dist.Categorical(probs=jnp.asarray(probs)))


@ex.model
def coin(p):
    z = ex.sample("z", dist.Bernoulli(p))
    ex.sample("y", dist.Normal(1.5 * z, 0.8))


@ex.model
def half_impossible():
    z = ex.sample("z", dist.Bernoulli(0.4))
    ex.sample("y", dist.Uniform(0.6 * z, 1.0))


THREE = lambda: three([0.5, 0.3, 0.2]).given({"y": 1.2})  # noqa: E731
METROPOLIS = Metropolis("z", [0.2, 0.3, 0.5])


@pytest.mark.parametrize("method", ["systematic", "stratified", "multinomial"])
@pytest.mark.parametrize("guided", [False, True])
def test_every_run_of_two_particles_and_two_temperatures(x64, method, guided):
    """Catches: an increment of the temperature that is off, a kernel for another temperature, a resampled weight kept."""
    proposal = three_guide([0.3, 0.3, 0.4]) if guided else None
    run = lambda posterior: (  # noqa: E731
        inference.tempered(
            posterior,
            METROPOLIS,
            num_particles=2,
            temperatures=[0.35, 1.0],
            num_moves=1,
            proposal=proposal,
            method=method,
        ).particles
    )
    inference.assert_valid(run, THREE())


@pytest.mark.parametrize("method", ["systematic", "multinomial"])
@pytest.mark.parametrize(
    "posterior", [lambda: coin(0.4).given({"y": 0.9}), lambda: half_impossible().given({"y": 0.3})]
)
def test_every_run_without_waste(x64, method, posterior):
    run = lambda target: (  # noqa: E731
        inference.tempered(
            target, Flip("z"), num_particles=4, temperatures=[0.4, 1.0], num_moves=1, method=method, waste_free=True
        ).particles
    )
    inference.assert_valid(run, posterior())


@pytest.mark.parametrize("guided", [False, True])
def test_every_run_of_annealed_chains(x64, guided):
    proposal = three_guide([0.3, 0.3, 0.4]) if guided else None
    run = lambda posterior: (  # noqa: E731
        inference.annealed_importance(
            posterior, METROPOLIS, num_particles=2, temperatures=[0.35, 0.6, 1.0], proposal=proposal
        ).particles
    )
    inference.assert_valid(run, THREE())


def test_a_kernel_for_the_wrong_target_is_found(x64):
    """The enumeration sees a kernel that does not leave its temperature alone."""

    class Eager(Flip):
        def step(self, target, state, parameters):
            state, info = super().step(target, state, parameters)
            return state._replace(position={"z": jnp.ones_like(state.position["z"])}), info

    with pytest.raises(AssertionError, match="not properly weighted"):
        inference.assert_valid(
            lambda p: (
                inference.tempered(p, Eager("z"), num_particles=2, temperatures=[0.4, 1.0], num_moves=1).particles
            ),
            coin(0.4).given({"y": 0.9}),
        )


# --- the path ---------------------------------------------------------------------------------------------------------


@ex.model
def rich(scale):
    a = ex.sample("a", dist.Normal(0.3, scale))
    b = ex.sample("b", dist.HalfNormal(2.0))
    jax.vmap(lambda x: ex.sample("y", dist.Normal(a * x, b)))(jnp.array([0.5, 1.0, -2.0]))

    def step(h, _):
        h = ex.sample("h", dist.Normal(h, 1.0))
        return h, ex.sample("w", dist.Normal(h, b))

    last, _ = lax.scan(step, a, None, length=3)
    ex.factor("more", -0.1 * last**2)
    lax.cond(a > 0, lambda: ex.sample("v", dist.Normal(a, 1.0)), lambda: ex.sample("v", dist.StudentT(3.0, a, 1.0)))


@ex.model
def rich_guide():
    ex.sample("a", dist.Normal(0.0, 1.5))
    ex.sample("b", dist.LogNormal(0.0, 0.5))
    ex.sample("h", dist.Normal(jnp.zeros(3), 1.5))


@ex.model
def clusters():
    centre = ex.sample("centre", dist.Normal(0.0, 2.0))
    scale = ex.sample("scale", dist.HalfNormal(1.0))
    jax.vmap(
        lambda _: ex.sample("y", dist.Normal(jnp.where(ex.sample("k", dist.Bernoulli(0.3)), centre, -centre), scale))
    )(jnp.arange(3))


@ex.model
def clusters_guide():
    ex.sample("centre", dist.Normal(1.0, 1.5))
    ex.sample("scale", dist.LogNormal(0.0, 0.5))


RICH = {"y": jnp.array([0.1, 0.9, -1.4]), "w": jnp.array([0.3, -0.2, 1.0]), "v": 0.4}
SUMMED = lambda: ex.marginalize_discrete(clusters()).given({"y": jnp.array([1.0, -0.8, 1.3])})  # noqa: E731
PATHS = {
    "prior": lambda: (rich(1.2).given(RICH), None),
    "guide": lambda: (rich(1.2).given(RICH), rich_guide()),
    "summed out": lambda: (SUMMED(), clusters_guide()),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_densities_between(x64, name):
    """Each is a weighted mean of the two ends, and a draw's weight is the ratio of the ends; also on the real line."""
    path = Path(*PATHS[name]()).checked("test")
    z, weight = inference.keyed(path.draw)(KEY)
    log_gamma, ratio = path.posterior.log_density(z), path.log_ratio(z)
    np.testing.assert_allclose(ratio, weight, rtol=1e-11)
    jacobian = path.posterior.unconstrained_log_density(path.posterior.unconstrain(z)) - log_gamma
    for beta in (0.25, 1.0):
        target = path.at(jnp.asarray(beta))
        between = log_gamma - (1 - beta) * ratio
        np.testing.assert_allclose(target.log_density(z), between, rtol=1e-11)
        flat = target.flat()
        np.testing.assert_allclose(flat.log_density(flat.unconstrain(z)), between + jacobian, rtol=1e-10)


# --- continuous latents, exact evidence ---------------------------------------------------------------------------------


@ex.model
def exponential():
    rate = ex.sample("rate", dist.Gamma(2.0, 1.5))
    jax.vmap(lambda _: ex.sample("y", dist.Exponential(rate)))(jnp.arange(3))


Y = np.array([0.3, 2.5, 4.0])
EXPONENTIAL = lambda: exponential().given({"y": Y})  # noqa: E731
SHAPE, RATE = 2.0 + 3, 1.5 + Y.sum()
LOG_EVIDENCE = 2 * np.log(1.5) - gammaln(2) + gammaln(SHAPE) - SHAPE * np.log(RATE)
HMC = inference.hmc(num_integration_steps=2)
STEP = {"step_size": jnp.asarray(0.4), "inverse_mass_matrix": jnp.ones(1)}


@ex.model
def rate_guide():
    ex.sample("rate", dist.LogNormal(-0.3, 0.6))


RUNS = {
    "tempered": lambda key, n: inference.tempered(
        EXPONENTIAL(), HMC, key=key, num_particles=n, temperatures=[0.2, 0.5, 1.0], num_moves=1, parameters=STEP
    ),
    "guided": lambda key, n: inference.tempered(
        EXPONENTIAL(), HMC, key=key, num_particles=n, temperatures=2, num_moves=1, parameters=STEP,
        proposal=rate_guide(), method="stratified",
    ),
    "waste-free": lambda key, n: inference.tempered(
        EXPONENTIAL(), HMC, key=key, num_particles=n, temperatures=[0.2, 0.5, 1.0], num_moves=1, parameters=STEP,
        waste_free=True,
    ),
    "annealed": lambda key, n: inference.annealed_importance(
        EXPONENTIAL(), HMC, key=key, num_particles=n, temperatures=[0.2, 0.5, 1.0], parameters=STEP
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_evidence_and_moments_are_unbiased(name):
    """Catches a missing Jacobian in a temperature's density, and biased weights; E[Z-hat f] with f of the posterior."""

    @jax.jit
    @jax.vmap
    def run(key):
        found = RUNS[name](key, 16)
        assert found.unbiased
        ratio = jnp.exp(found.log_evidence - LOG_EVIDENCE)
        return jnp.stack([ratio, ratio * found.expectation(lambda z: z["rate"])])

    exact = np.array([1.0, SHAPE / RATE])
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), exact, KEY, 4000)


@pytest.mark.parametrize("method", ["systematic", "stratified", "multinomial", "waste-free"])
def test_the_error_of_one_run_is_honest(method):
    """The variance that a run states is that over runs; a systematic step has less of it than a multinomial one."""
    waste_free = method == "waste-free"

    @jax.jit
    @jax.vmap
    def run(key):
        found = inference.tempered(
            EXPONENTIAL(), HMC, key=key, num_particles=100, temperatures=[0.05, 0.15, 0.4, 1.0], num_moves=1, parameters=STEP,
            method="systematic" if waste_free else method, waste_free=waste_free,
        )  # fmt: skip
        return jnp.exp(found.log_evidence - LOG_EVIDENCE), found.log_evidence_variance

    ratio, stated = run(jax.random.split(KEY, 1500))
    assert 0.8 < np.mean(stated * ratio**2) / np.var(ratio, ddof=1) < 1.25


def test_one_temperature_is_importance_sampling():
    found = inference.tempered(EXPONENTIAL(), HMC, key=KEY, num_particles=300, temperatures=1, parameters=STEP)
    annealed = inference.annealed_importance(EXPONENTIAL(), HMC, key=KEY, num_particles=300, temperatures=1)
    assert float(annealed.log_evidence) == pytest.approx(float(annealed.particles.log_evidence))
    np.testing.assert_allclose(
        annealed.log_evidence_standard_error, annealed.particles.log_evidence_standard_error, rtol=1e-4
    )
    assert 0.5 < float(found.log_evidence_standard_error / annealed.log_evidence_standard_error) < 2.0


# --- adaptive temperatures --------------------------------------------------------------------------------------------


@ex.model
def outliers():
    rate = ex.sample("rate", dist.LogNormal(0.0, 2.0))
    jax.vmap(lambda _: ex.sample("y", dist.Poisson(rate)))(jnp.arange(4))


@ex.model
def narrow_support():
    z = ex.sample("z", dist.Uniform(0.0, 1.0))
    ex.sample("y", dist.Uniform(z, z + 0.1))
    ex.sample("x", dist.Exponential(50 * z))


ASYMMETRIC = {
    "poisson": lambda: outliers().given({"y": jnp.array([0, 1, 0, 90])}),
    "exponential": lambda: exponential().given({"y": jnp.array([0.01, 0.02, 60.0])}),
    "impossible at first": lambda: narrow_support().given({"y": 0.4, "x": 5.0}),
}


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_the_effective_sample_size_is_met(name, target):
    """Within 1 % at every step but the last, also where the log likelihood has a long tail to one side.

    Where a tenth of the first particles are possible, the first step meets the target among those.
    """
    kernel = inference.hmc(num_integration_steps=3)
    found = inference.tempered(ASYMMETRIC[name](), kernel, key=KEY, num_particles=2000, target_ess=target, num_moves=2)
    assert not found.unbiased and found.temperatures[-1] == 1.0 and np.all(np.diff(found.temperatures) > 0)
    share = np.asarray(found.ess) / 2000 / target
    assert len(share) > 1 and share[-1] >= 0.99
    first = 0
    if name == "impossible at first":
        assert 0.08 < share[0] < 0.12
        first = 1
    np.testing.assert_allclose(share[first:-1], 1.0, atol=0.01)


@pytest.mark.parametrize("scale", [1e-3, 10.0, 1e4, 1e6])
def test_the_next_temperature_against_numpy(scale):
    """At all sizes of a skewed log likelihood, in float32."""
    rng = np.random.default_rng(1)
    ratio = (-scale * rng.exponential(size=1000) ** 2).astype(np.float32)
    ratio[:100] = -np.inf
    beta = np.float32(0.2)
    there = np.asarray(next_temperature(jnp.asarray(ratio), jnp.asarray(beta), 0.5), np.float64)
    weights = np.exp((there - np.float64(beta)) * ratio.astype(np.float64))
    if scale == 1e-3:
        assert there == 1.0
    else:
        size = weights.sum() ** 2 / (weights**2).sum()
        assert size == pytest.approx(450, rel=0.01 if scale < 1e6 else 0.05)  # there the next floats lie so far apart


def test_a_frozen_schedule_is_unbiased():
    pilot = inference.tempered(EXPONENTIAL(), HMC, key=KEY, num_particles=64, num_moves=2, target_ess=0.8)
    assert len(pilot.temperatures) > 2 and pilot.parameters["inverse_mass_matrix"].shape == (len(pilot.temperatures), 1)
    schedule = pilot.freeze_schedule()

    @jax.jit
    @jax.vmap
    def run(key):
        found = inference.tempered(EXPONENTIAL(), HMC, key=key, num_particles=16, temperatures=schedule, num_moves=2)
        assert found.unbiased
        return jnp.exp(found.log_evidence - LOG_EVIDENCE)

    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array(1.0), KEY, 4000)
    tuned = inference.tempered(EXPONENTIAL(), HMC, key=KEY, num_particles=64, temperatures=pilot.temperatures)
    assert not tuned.unbiased


@pytest.mark.parametrize("dense", [False, True])
def test_kernels_are_tuned_from_the_particles(dense):
    """The last mass matrix is the posterior's covariance on the unconstrained scale, the acceptance what was aimed at."""

    @ex.model
    def scales():
        ex.sample("x", dist.Normal(jnp.zeros(2), 100.0))
        ex.sample("s", dist.LogNormal(0.0, 1.0))

    @ex.model
    def model():
        x = ex.sample("x", dist.Normal(jnp.zeros(2), 3.0))
        s = ex.sample("s", dist.LogNormal(0.0, 1.0))
        ex.sample("y", dist.Normal(x, jnp.array([0.01, 10.0])))
        ex.sample("w", dist.LogNormal(jnp.log(s), 0.1))

    kernel = inference.hmc(num_integration_steps=4, dense_mass=dense, target_acceptance=0.7)
    posterior = model().given({"y": jnp.array([1.0, 0.0]), "w": 2.0})
    found = inference.tempered(posterior, kernel, key=KEY, num_particles=2000)
    matrix = np.asarray(found.parameters["inverse_mass_matrix"])[-1]
    expected = [1 / (1 + 100), 1 / (1 / 9 + 1e4), 1 / (1 / 9 + 1e-2)]  # latents in alphabetical order
    np.testing.assert_allclose(np.diag(matrix) if dense else matrix, expected, rtol=0.15)
    assert np.all(np.abs(np.asarray(found.acceptance_rate)[2:] - 0.7) < 0.1)
    exact = [stats.norm.cdf(q) for q in (-1.0, 1.0)]
    below = np.asarray(found.choices["x"][:, 0]) < 1e4 / (1 / 9 + 1e4) + 0.01 * np.array([[-1.0], [1.0]])
    np.testing.assert_allclose(below.mean(1), exact, atol=0.05)


def test_a_schedule_that_is_cut_warns():
    with pytest.warns(RuntimeWarning, match="max_temperatures"):
        found = inference.tempered(
            ASYMMETRIC["poisson"](), HMC, key=KEY, num_particles=200, num_moves=1, max_temperatures=2
        )
    assert found.temperatures[-1] == 1.0 and len(found.temperatures) == 2


# --- under JAX's transformations ----------------------------------------------------------------------------------------


def test_nothing_compiles_twice_and_keys_vmap():
    def run(i, y):
        posterior = exponential().given({"y": y})
        adaptive = inference.tempered(posterior, HMC, key=jax.random.key(i), num_particles=32, num_moves=1)
        fixed = inference.tempered(
            posterior,
            HMC,
            key=jax.random.key(i),
            num_particles=32,
            num_moves=1,
            temperatures=np.array([0.1 * i + 0.1, 1.0]),
        )
        annealed = inference.annealed_importance(posterior, HMC, key=jax.random.key(i), num_particles=8, temperatures=5)
        return [float(r.log_evidence) for r in (adaptive, fixed, annealed)]

    first = run(0, Y)
    with count_compiles() as compiles:
        second = run(1, 2 * Y)
    assert compiles == [] and set(first).isdisjoint(second)

    keys = jax.random.split(KEY, 2)

    def one(key):
        found = inference.tempered(EXPONENTIAL(), HMC, key=key, num_particles=32, num_moves=1)
        return found.temperatures, found.log_evidence

    together = jax.vmap(one)(keys)
    for i, key in enumerate(keys):
        temperatures, log_evidence = one(key)
        used = len(temperatures)
        np.testing.assert_allclose(together[0][i, :used], temperatures, rtol=1e-3)
        assert np.all(together[0][i, used:] == 1.0)
        np.testing.assert_allclose(together[1][i], log_evidence, rtol=1e-3)


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit():
    posterior = EXPONENTIAL()
    run = lambda **kw: inference.tempered(posterior, HMC, **({"key": KEY, "num_particles": 8} | kw))  # noqa: E731
    for bad in ([0.5, 0.4, 1.0], [0.0, 1.0], [0.5], 0, []):
        with pytest.raises(ValueError, match="temperature"):
            run(temperatures=bad)
    for name, value in {"num_particles": 0, "num_moves": 0, "target_ess": 1.0, "max_temperatures": 0}.items():
        with pytest.raises(ValueError, match=name):
            run(**{name: value})
    with pytest.raises(ValueError, match="divisible"):
        run(waste_free=True, num_moves=2)
    with pytest.raises(ValueError, match="method"):
        run(method="best")
    with pytest.raises(ValueError, match="keyless"):
        run(key=None)
    with pytest.raises(ValueError, match="parameters"):
        run(temperatures=inference.Schedule(jnp.ones(1), STEP), parameters=STEP)
    with pytest.raises(ValueError, match="freeze_schedule"):
        inference.annealed_importance(posterior, HMC, key=KEY, num_particles=3, temperatures=None)
    with pytest.raises(TypeError, match="kernel"):
        inference.tempered(posterior, inference.hmc, key=KEY, num_particles=8)
    with pytest.raises(ex.ppl.ControlFlowError, match="Give a proposal"):
        inference.tempered(SUMMED(), HMC, key=KEY, num_particles=8)
    with pytest.raises(ex.ppl.AddressError, match="rate"):
        run(proposal=three_guide([0.5, 0.5]))


def test_what_cannot_be_explained_is_no_result():
    posterior = narrow_support().given({"y": 5.0, "x": 1.0})
    with pytest.raises(ex.ppl.NonFiniteError, match="'y'"):
        inference.tempered(posterior, HMC, key=KEY, num_particles=8)


# --- persistent sampling ------------------------------------------------------------------------------------------------


def test_persistent_evidence_is_a_fixed_point(x64):
    """The evidences solve the equations of multiple importance sampling, and there is a bias, which enumeration sees."""
    posterior = coin(0.4).given({"y": 0.9})
    found = inference.persistent(
        posterior, Flip("z"), key=KEY, num_particles=200, temperatures=[0.2, 0.5, 1.0], num_moves=2
    )
    ratio = stats.norm.logpdf(0.9, 1.5 * np.asarray(found.choices["z"]), 0.8)
    betas, log_zs = np.array([0.0, 0.2, 0.5, 1.0]), np.append(0.0, found.log_evidences)
    mixture = np.mean(np.exp(betas[:, None] * ratio - log_zs[:, None]), axis=0)
    solved = [np.mean(np.exp(beta * ratio) / mixture) for beta in betas]
    np.testing.assert_allclose(solved, np.exp(log_zs), rtol=1e-3)
    np.testing.assert_allclose(found.log_evidence, found.log_evidences[-1], rtol=1e-10)

    def run():
        return inference.persistent(posterior, Flip("z"), num_particles=2, temperatures=[0.4, 1.0], num_moves=1)

    assert not found.unbiased
    evidence = sum(np.exp(float(posterior.log_density({"z": z}))) for z in (0, 1))
    assert 1e-6 < abs(inference.exact(lambda: jnp.exp(run().log_evidence)).expectation() / evidence - 1) < 0.02


def test_persistent_sampling_is_consistent():
    """Its bias is of order 1 / n; E[Z-hat f] too. Catches a mixture with the wrong rows, or evidences forgotten in it."""

    @jax.jit
    @jax.vmap
    def run(key):
        found = inference.persistent(
            EXPONENTIAL(), HMC, key=key, num_particles=4000, temperatures=[0.1, 0.3, 1.0], num_moves=1, parameters=STEP
        )
        ratio = jnp.exp(found.log_evidence - LOG_EVIDENCE)
        return jnp.stack([ratio, found.mean()["rate"], found.expectation(lambda z: z["rate"] ** 2)])

    mean = SHAPE / RATE
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array([1.0, mean, mean**2 + mean / RATE]), KEY, 60)
