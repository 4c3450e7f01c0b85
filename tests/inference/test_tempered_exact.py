"""SMC over temperatures and annealed importance sampling: every run of them, and the densities on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference
from expectax.inference._path import Path
from finite_kernels import Flip, Metropolis

KEY = jax.random.key(20261125)
pytestmark = pytest.mark.usefixtures("quick_compiles")


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


def test_a_model_that_sums_needs_a_proposal():
    with pytest.raises(ex.ppl.ControlFlowError, match="Give a proposal"):
        inference.tempered(SUMMED(), METROPOLIS, key=jax.random.key(0), num_particles=8)


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
