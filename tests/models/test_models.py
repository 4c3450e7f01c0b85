"""Models against Stan's densities, dense Gaussian formulas and published facts about their data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

from expectax import models
from helpers import gaussian_log_integral

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(20260808)

# --- eight schools ----------------------------------------------------------------------------------------------------

# Stan 2.35 (by PyStan 3.10) at four points of stan-dev/posteriordb's eight_schools-eight_schools_noncentered (commit
# 28f8d3d; BSD-3-Clause). Rows: z_1 .. z_8, mu, log tau; log density with the Jacobian, up to a constant; gradient.
# fmt: off
STAN_POINTS = np.array([
    [-0.14228022122080022, -1.974517802357992, 0.040365316630957604, 0.33201086191509244, 0.7930777958562407,
     -0.6402918593707316, 0.12354259130911904, 1.8696240258787113, 1.8949738291732146, 0.8541202160461127],
    [1.2197064450846207, 1.191154821777269, 0.478486751226146, -0.1359225947237302, -0.29055536681807426,
     -0.8923669627079505, 1.9101837165705378, -2.4080824597903447, 2.5383536998416902, 1.3264727152325193],
    [-0.13733981194655287, 0.6334226288828997, -0.09605939591012153, -0.060079079607977814, -0.1391053882145668,
     0.20801777601310933, -0.15824547791057275, 0.034179104391442075, 4.743186623965457, -1.5619458316561272],
    [0.6038880525168048, 0.9161437369870526, 0.12200764975501599, 1.8193436179023532, -0.9824460313788543,
     -0.33475745720699795, 1.2292292777395744, -0.8634444583036194, 4.881345888812516, 1.2118633526259959],
])
STAN_LOG_DENSITIES = np.array([-7.406113689180206, -8.09530177943653, -4.8910701011085855, -5.388652948461379])
STAN_WITHOUT_JACOBIAN = np.array([-8.260233905226318, -9.42177449466905, -3.329124269452458, -6.600516301087375])
STAN_GRADIENTS = np.array([
    [0.41834239402009743, 2.226921989396398, -0.08615664552870092, -0.2480371139066792, -0.9310823505997213,
     0.6521212598304418, 0.247995235754273, -1.8282015007334564, 0.2874716309785202, 0.1330104503578312],
    [-0.8702934944257799, -1.1544685672677657, -0.5865317477279461, 0.29079703680388647, 0.17688995089346077,
     0.9491583046701864, -1.5987962863940615, 2.6236181441750017, 0.13812678202821027, 0.7309052896197581],
    [0.15904486152173158, -0.6268708081340634, 0.0897323078190343, 0.06401262195669635, 0.12431049949400215,
     -0.2145814063297469, 0.18611827701551978, -0.029486355895498455, -0.012972680193194457, 0.9944702309206727],
    [-0.2889722646276039, -0.9147780002123929, -0.23082198762799205, -1.9302390563321072, 0.8754079158437882,
     0.25821515297945397, -0.9272302391359875, 0.9673433801018321, -0.10033894192814292, 0.7665611454453364],
])
# fmt: on


def schools():
    """Return the posterior, the effects and the standard errors."""
    y, sigma = jnp.array(models.EFFECT), jnp.array(models.STANDARD_ERROR)
    return models.eight_schools(sigma).given({"y": y}), y, sigma


def from_stan(point):
    return {"z": point[:8], "mu": point[8], "tau": point[9]}


def test_eight_schools_is_stans():
    """Log densities differ between points as Stan's do, on both scales, and gradients agree."""
    posterior, *_ = schools()

    def unconstrained(point):
        return posterior.unconstrained_log_density(from_stan(point))

    def constrained(point):
        return posterior.log_density(posterior.constrain(from_stan(point)))

    points = jnp.asarray(STAN_POINTS)
    for density, stan in ((unconstrained, STAN_LOG_DENSITIES), (constrained, STAN_WITHOUT_JACOBIAN)):
        ours = np.asarray(jax.jit(jax.vmap(density))(points))
        np.testing.assert_allclose(ours - ours[0], stan - stan[0], atol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(unconstrained)))(points), STAN_GRADIENTS, atol=1e-8)
    np.testing.assert_allclose(posterior.constrain(from_stan(points[0]))["tau"], np.exp(STAN_POINTS[0, 9]), rtol=1e-12)


def test_eight_schools_returns_the_effects():
    posterior, _, sigma = schools()
    trace, _ = posterior.generate(KEY)
    z = trace.choices
    np.testing.assert_allclose(trace.retval, z["mu"] + z["tau"] * z["z"], rtol=1e-12)
    assert models.EFFECT == (28, 8, -3, 7, -1, 1, 18, 12) and models.STANDARD_ERROR == (15, 10, 16, 11, 9, 11, 10, 18)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_guide_knows_z_exactly_given_mu_and_tau(slope):
    """Model and guide differ, as functions of z, by a constant; the rest of the guide is normal and log-normal."""
    posterior, y, sigma = schools()
    params = models.eight_schools_start() | {"slope": slope, "mu": 4.0, "tau_log_scale": -0.5}
    guide = models.eight_schools_guide(params, y, sigma)
    assert jax.tree.structure(guide.sites()) == jax.tree.structure(posterior.latent_sites())
    z = jax.random.normal(KEY, (6, 8)) * 2

    @jax.jit
    @jax.vmap
    def difference(z):
        latents = {"mu": jnp.asarray(2.5), "tau": jnp.asarray(3.1), "z": z}
        return posterior.log_density(latents) - guide.given({}).site_log_densities(latents)["z"].sum()

    np.testing.assert_allclose(difference(z), np.full(6, difference(z)[0]), atol=1e-9)
    densities = guide.given({}).site_log_densities({"mu": 2.5, "tau": 3.1, "z": np.zeros(8)})
    np.testing.assert_allclose(densities["mu"], stats.norm.logpdf(2.5, 4.0, np.e), rtol=1e-12)
    tau = stats.lognorm(np.exp(-0.5), scale=np.exp(1.0 + slope * (2.5 - 4.0)))
    np.testing.assert_allclose(densities["tau"], tau.logpdf(3.1), rtol=1e-12)


# --- the Nile ---------------------------------------------------------------------------------------------------------


def covariance(num_years, level_sd):
    """Covariance of the levels x_t = x_0 + sum of t steps."""
    t = np.arange(1, num_years + 1)
    return 300.0**2 + level_sd**2 * np.minimum.outer(t, t)


def test_the_flows_are_cobbs():
    flows = np.array(models.NILE)
    assert flows.shape == (100,) and flows.sum() == 91935 and flows.min() == 456 and flows.max() == 1370
    assert (flows[42], flows[8], flows[-1]) == (456, 1370, 740)  # 1913, 1879, 1970
    np.testing.assert_allclose(models.OBSERVATION_SD**2, 15099.0, rtol=1e-12)
    np.testing.assert_allclose(models.LEVEL_SD**2, 1469.1, rtol=1e-12)


def test_the_variances_maximise_the_likelihood():
    """The diffuse likelihood (of y_2 .. y_n given y_1) is at its maximum, -632.5456."""
    flows = np.array(models.NILE, float)
    t = np.arange(1, 100)

    def log_likelihood(observation_variance, level_variance):
        cov = level_variance * np.minimum.outer(t, t) + observation_variance * (np.eye(99) + 1.0)
        return stats.multivariate_normal(np.full(99, flows[0]), cov).logpdf(flows[1:])

    best = log_likelihood(models.OBSERVATION_SD**2, models.LEVEL_SD**2)
    np.testing.assert_allclose(best, -632.5456, atol=1e-3)
    for factors in ((1.05, 1.0), (0.95, 1.0), (1.0, 1.05), (1.0, 0.95)):
        assert log_likelihood(models.OBSERVATION_SD**2 * factors[0], models.LEVEL_SD**2 * factors[1]) < best


def test_the_kalman_filter_conditions_a_normal_vector():
    flows = np.array(models.NILE, float)
    exact = models.kalman(flows)
    cov, noise = covariance(100, models.LEVEL_SD), models.OBSERVATION_SD**2
    evidence = stats.multivariate_normal(np.full(100, 1000.0), cov + noise * np.eye(100)).logpdf(flows)
    np.testing.assert_allclose(exact.log_evidence, evidence, rtol=1e-10)
    assert exact.mean.shape == exact.sd.shape == (100,)
    for t in (1, 2, 50, 100):
        gain = cov[t - 1, :t] @ np.linalg.inv(cov[:t, :t] + noise * np.eye(t))
        np.testing.assert_allclose(exact.mean[t - 1], 1000.0 + gain @ (flows[:t] - 1000.0), rtol=1e-10)
        np.testing.assert_allclose(exact.sd[t - 1], np.sqrt(cov[t - 1, t - 1] - gain @ cov[:t, t - 1]), rtol=1e-8)


def test_the_local_level_model_is_what_the_kalman_filter_filters():
    flows = np.array(models.NILE[:4], float)
    posterior = models.local_level(4, 80.0, 30.0).given({"flow": flows})
    flat, unravel = ravel_pytree({"level": jnp.zeros(4), "start": jnp.zeros(())})
    evidence = gaussian_log_integral(lambda v: posterior.log_density(unravel(v)), flat.size)
    np.testing.assert_allclose(evidence, models.kalman(flows, 80.0, 30.0).log_evidence, rtol=1e-9)
    trace = models.local_level(4, 80.0, 30.0).simulate(KEY)
    np.testing.assert_array_equal(trace.retval, trace.choices["level"])
