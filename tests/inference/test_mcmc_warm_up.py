"""Where warm-ups start and what mass matrix they learn: given ones, a guide's, pathfinder's, low-rank ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, inference, ppl
from helpers import count_compiles

KEY = jax.random.key(20261129)
pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("ignore:mcmc.*diverged"),
    pytest.mark.slow,
]
MEAN, SCALES = np.array([3.0, -1.0, 0.5]), np.array([10.0, 0.1, 1.0])
FACTOR = np.diag(SCALES) @ np.array([[1.0, 0, 0], [0.8, 0.6, 0], [0.0, 0.0, 1.0]])
COVARIANCE = FACTOR @ FACTOR.T


@ppl.model
def normal(mean, factor):
    """Latents of very unlike scales, two of them correlated, and a positive one that is log-normal."""
    ppl.sample("x", dist.MultivariateNormal(mean, scale_tril=factor))
    ppl.sample("z", dist.LogNormal(1.0, 0.2))


BOUND = normal(jnp.asarray(MEAN, jnp.float32), jnp.asarray(FACTOR, jnp.float32))
POSTERIOR = BOUND.given({})
WHOLE = np.block([[COVARIANCE, np.zeros((3, 1))], [np.zeros((1, 3)), np.array([[0.04]])]])


def run(kernel=None, **options):
    settings = {"num_warmup": 0, "num_samples": 1, "num_chains": 4} | options
    return inference.mcmc(POSTERIOR, kernel or inference.hmc(dense_mass=True), key=KEY, **settings)


# --- given starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "used"),
    [
        ({}, np.arange(1.0, 5), np.arange(1.0, 5)),
        ({}, WHOLE, np.diag(WHOLE)),
        ({"dense_mass": True}, np.arange(1.0, 5), np.diag(np.arange(1.0, 5))),
        ({"dense_mass": True}, WHOLE, WHOLE),
    ],
)
def test_a_given_start_is_used_without_warm_up_and_at_its_start(options, given, used):
    kernel = inference.hmc(step_size=0.03, inverse_mass_matrix=given, **options)
    chains = run(kernel)
    np.testing.assert_array_equal(chains.step_size, np.full(4, 0.03, np.float32))
    np.testing.assert_allclose(chains.inverse_mass_matrix, np.broadcast_to(used, (4, *used.shape)), rtol=1e-6)
    adaptation = kernel.adaptation(inference.Target(POSTERIOR), inference.State(jnp.zeros(4), 0.0))
    first = adaptation.parameters(adaptation.start)
    np.testing.assert_allclose(first["inverse_mass_matrix"], used, rtol=1e-6)
    np.testing.assert_allclose(first["step_size"], 0.03, rtol=1e-5)


def test_a_given_start_is_data():
    run(inference.hmc(step_size=0.03, inverse_mass_matrix=np.ones(4)))
    with count_compiles() as compiles:
        run(inference.hmc(step_size=0.05, inverse_mass_matrix=2 * np.ones(4)))
    assert len(compiles) <= 2  # of making the arrays, none of the run


def test_starts_that_do_not_fit_are_refused():
    with pytest.raises(ppl.ShapeError, match=r"a vector of 4.*\(4,\) or\s+\(4, 4\), got \(3,\)"):
        run(inference.nuts(inverse_mass_matrix=np.ones(3)))
    with pytest.raises(ValueError, match="step_size must be positive, got -1"):
        inference.hmc(step_size=-1.0)
    with pytest.raises(ValueError, match="low_rank is a number of directions, without dense_mass, got 3"):
        inference.nuts(low_rank=3, dense_mass=True)


# --- guides and pathfinder --------------------------------------------------------------------------------------------


@ppl.model
def lacking(params):
    ppl.sample("x", dist.Normal(jnp.zeros(3), params))


@ppl.model
def outside():
    ppl.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    ppl.sample("z", dist.Normal(0.0, 1.0))


def test_a_guide_is_the_start_and_the_mass_matrix():
    """A guide that is the posterior: starts are its draws, the covariance has the error of 1,000 draws."""
    chains = run(inference.hmc(num_integration_steps=1, step_size=1e-6, dense_mass=True), initial=BOUND, num_chains=400)
    x = np.asarray(chains.choices["x"])[:, 0]
    z = (x - MEAN) @ np.linalg.inv(FACTOR).T  # standard normal: chi-square tests of mean and second moment
    assert (np.abs(z.mean(0)) < 5 / 20).all() and (np.abs((z**2).mean(0) - 1) < 5 * 2**0.5 / 20).all()
    root = np.linalg.inv(np.linalg.cholesky(WHOLE))
    whitened = root @ np.asarray(chains.inverse_mass_matrix[0], np.float64) @ root.T
    assert np.abs(whitened - np.eye(4)).max() < 5 * (2 / 1000) ** 0.5 + 0.01


def test_a_guide_that_does_not_fit_is_refused():
    with pytest.raises(ppl.AddressError, match="guide has no site 'z'"):
        run(initial=lacking(1.0))
    with pytest.raises(ppl.SupportError, match="outside the posterior's support"):
        run(initial=outside())
    with pytest.raises(ValueError, match="'pathfinder'.*got 'prior'"):
        run(initial="prior")


def test_pathfinder_finds_a_normal_posterior():
    """Of a normal target the path ends at its mean, with nearly its covariance."""
    chains = run(inference.hmc(num_integration_steps=1, step_size=1e-6, dense_mass=True), initial="pathfinder")
    x = np.asarray(chains.choices["x"])[:, 0]
    z = (x - MEAN) @ np.linalg.inv(FACTOR).T
    assert np.abs(z).max() < 6
    variances = np.diagonal(chains.inverse_mass_matrix[0])
    assert (variances / np.diag(WHOLE) > 0.2).all() and (variances / np.diag(WHOLE) < 5).all()


# --- low rank ---------------------------------------------------------------------------------------------------------


@ppl.model
def ridge(size):
    """Latents with one common direction: covariance I + 100 a a^T."""
    root = jnp.eye(size) + (101.0**0.5 - 1) * jnp.ones((size, size)) / size
    ppl.sample("x", dist.MultivariateNormal(jnp.zeros(size), scale_tril=jnp.linalg.cholesky(root @ root.T)))


def test_a_low_rank_mass_matrix_is_learned():
    """What is left to the kernel, the target's covariance in the metric, has a condition number of 101 with a diagonal."""
    size, target = 20, np.eye(20) + 5 * np.ones((20, 20))
    kernel = inference.hmc(low_rank=2)
    chains = inference.mcmc(ridge(size).given({}), kernel, key=KEY, num_warmup=500, num_samples=100, num_chains=2)
    for chain in range(2):
        sigma, u, scales = (np.asarray(part[chain], np.float64) for part in chains.inverse_mass_matrix)
        matrix = sigma[:, None] * (np.eye(size) + u @ np.diag(scales - 1) @ u.T) * sigma
        left = np.abs(np.linalg.eigvals(np.linalg.solve(matrix, target)))
        assert left.max() / left.min() < 8
        diagonal = np.abs(np.linalg.eigvals(target / sigma[:, None] ** 2))
        assert diagonal.max() / diagonal.min() > 80
    assert not chains.statistics["divergent"].any() and 0.6 < float(chains.statistics["acceptance_rate"].mean()) < 0.97
