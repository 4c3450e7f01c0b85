r"""Semi-amortised guides, Laplace's approximation and Stein's particles.

Against closed forms. Each z-test is in two stages, keys are pinned.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

import expectax as ex
from expectax import dist, vi
from expectax.models import posteriordb
from expectax.ppl import NonFiniteError, SupportError
from expectax.vi._stein import stein_direction
from helpers import two_stage_z

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(20260804)


def arrays(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def samples(objective: Any, params: Any) -> Any:
    """Return a sampler of value and gradient for `two_stage_z`; leaves are flattened in the order of their names."""

    def one(key: Any) -> Any:
        value, gradient = jax.value_and_grad(objective.surrogate)(arrays(params), key)
        return jnp.concatenate([value[None], *(jnp.ravel(g) for g in jax.tree.leaves(gradient))])

    run = jax.jit(jax.vmap(one))
    return lambda key, n: np.asarray(run(jax.random.split(key, n)))


# --- semi-amortised guides --------------------------------------------------------------------------------------------

LOCAL_Y, RATE, SD = np.array([1.0, -2.0, 0.4]), 0.1, math.sqrt(0.5)


@ex.model
def local_model():
    z = ex.sample("z", dist.Normal(jnp.zeros(3), 1.0))
    ex.sample("y", dist.Normal(z, 1.0))


@ex.model
def local_guide(mean):
    ex.sample("z", dist.Normal(mean, SD))


LOCAL = local_model().given({"y": LOCAL_Y})


def refined(steps: int) -> Any:
    return vi.semi_amortised(LOCAL, local_guide, lambda p: p * LOCAL_Y, optax.sgd(RATE), steps)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_semi_amortised_is_its_closed_form(steps):
    r"""The error $d = m - y/2$ shrinks by $1 - 2r$ a step and gains noise of sd $2 r s$; the value is $\log Z - d^2$.

    Catches a derivative that does not go through the steps (its factor is $(1 - 2r)^{2K}$), steps that share their
    noise, and an ascent that descends.
    """
    shrink, slope = (1.0 - 2.0 * RATE) ** 2, 0.1

    def exact(p):
        errors = (p - 0.5) * LOCAL_Y
        noise = (2.0 * RATE * SD) ** 2 * sum(shrink**k for k in range(steps))
        return np.sum(stats.norm.logpdf(LOCAL_Y, 0.0, math.sqrt(2.0))) - np.sum(shrink**steps * errors**2 + noise)

    gradient = -2.0 * shrink**steps * (slope - 0.5) * np.sum(LOCAL_Y**2)
    two_stage_z(samples(refined(steps), slope), np.array([exact(slope), gradient]), KEY, 20_000)


def test_the_encoder_of_a_semi_amortised_guide_is_fitted():
    fit = vi.fit(refined(2), -1.0, optax.adam(0.05), key=KEY, num_steps=400, num_samples=8)
    assert abs(fit.params - 0.5) < 0.1


@pytest.mark.slow
def test_semi_amortised_samples_have_noise_of_their_own():
    """Catches one draw of the steps' noise for all samples, which would leave the mean's error as it is."""
    keys = jax.random.split(KEY, 40)
    means = [jax.jit(jax.vmap(lambda k, n=n: refined(2).surrogate(jnp.asarray(0.1), k, n)))(keys) for n in (1, 64)]
    assert np.std(means[1]) < 0.3 * np.std(means[0])


def test_semi_amortised_refusals():
    with pytest.raises(ValueError, match="num_steps"):
        refined(-1)
    with pytest.raises(TypeError, match="posterior"):
        vi.semi_amortised(local_model(), local_guide, lambda p: p, optax.sgd(0.1), 1)


# --- Laplace ----------------------------------------------------------------------------------------------------------

X = np.array([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0], [1.0, 0.0]])
TARGETS = np.array([0.3, -1.0, 2.2, 0.5])


@ex.model
def regression():
    w = ex.sample("w", dist.Normal(jnp.zeros(2), 2.0))
    ex.sample("t", dist.Normal(X @ w, 0.7))


def line() -> Any:
    return regression().given({"t": TARGETS})


LINE_COVARIANCE = np.linalg.inv(X.T @ X / 0.49 + np.eye(2) / 4.0)
LINE_MEAN = LINE_COVARIANCE @ X.T @ TARGETS / 0.49


@pytest.mark.usefixtures("x64")
def test_laplace_is_exact_for_a_normal_posterior():
    """Mode, covariance, evidence and draws."""
    found = vi.laplace(line())
    evidence = stats.multivariate_normal(np.zeros(4), 4.0 * X @ X.T + 0.49 * np.eye(4)).logpdf(TARGETS)
    np.testing.assert_allclose(found.mode["w"], LINE_MEAN, rtol=1e-10)
    np.testing.assert_allclose(found.covariance, LINE_COVARIANCE, rtol=1e-9)
    np.testing.assert_allclose(found.log_evidence, evidence, rtol=1e-10)
    draws = np.asarray(found.sample(KEY, 20_000)["w"])
    two_stage_z(lambda k, n: np.asarray(found.sample(k, n)["w"]), LINE_MEAN, KEY, 20_000)
    np.testing.assert_allclose(np.cov(draws.T), LINE_COVARIANCE, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("initial", [None, {"p": 0.99}])
@pytest.mark.usefixtures("x64")
def test_laplace_in_unconstrained_space(initial):
    """p ~ Beta(2, 3), 5 heads of 7: in the logit the density is p^7 (1 - p)^5 / B(2, 3), with its mode at 7 / 12."""

    @ex.model
    def coin():
        p = ex.sample("p", dist.Beta(2.0, 3.0))
        ex.sample("heads", dist.Bernoulli(p).expand([7]))

    found = vi.laplace(coin().given({"heads": jnp.array([1, 1, 1, 1, 1, 0, 0])}), initial)
    mode, variance = 7.0 / 12.0, 12.0 / 35.0  # 1 / (12 p (1 - p))
    height = 7.0 * math.log(mode) + 5.0 * math.log(1.0 - mode) - special.betaln(2.0, 3.0)
    np.testing.assert_allclose(found.mode["p"], mode, rtol=1e-7)
    np.testing.assert_allclose(found.unconstrained_mode["p"], special.logit(mode), rtol=1e-6)
    np.testing.assert_allclose(found.covariance, [[variance]], rtol=1e-6)
    np.testing.assert_allclose(found.log_evidence, height + 0.5 * math.log(2.0 * math.pi * variance), rtol=1e-9)
    assert found.distance < 1e-6 and np.all((found.sample(KEY, 100)["p"] > 0) & (found.sample(KEY, 100)["p"] < 1))


def test_laplace_agrees_with_stan_where_the_posterior_is_nearly_normal():
    """A logistic regression on 3020 wells: means within 0.1 and spreads within 5 % of Stan's."""
    wells = posteriordb.load("wells_data-wells_dist")
    found = vi.laplace(wells.posterior)
    references = [wells.reference[f"beta[{i}]"] for i in (1, 2)]
    spreads = np.array([r.sd for r in references])
    assert np.all(np.abs(found.mode["beta"] - np.array([r.mean for r in references])) < 0.1 * spreads)
    np.testing.assert_allclose(np.sqrt(np.diagonal(found.covariance)), spreads, rtol=0.05)


@ex.model
def discrete():
    z = ex.sample("z", dist.Bernoulli(0.5))
    ex.sample("y", dist.Normal(z, 1.0))


@ex.model
def no_maximum():
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    ex.factor("up", z**2)


def test_laplace_refuses_what_has_no_mode():
    with pytest.raises(SupportError, match="'z'.*discrete"):
        vi.laplace(discrete().given({"y": 1.0}))
    with pytest.raises(NonFiniteError, match="not negative definite") as caught:
        vi.laplace(no_maximum().given({}))
    assert isinstance(caught.value.result, vi.Laplace)
    with pytest.raises(TypeError, match="posterior"):
        vi.laplace(regression())
    with pytest.raises(ValueError, match="num_steps"):
        vi.laplace(line(), num_steps=0)
    with pytest.warns(RuntimeWarning, match="standard deviations from the mode"):
        vi.laplace(line(), {"w": jnp.array([30.0, -50.0])}, num_steps=1)


# --- Stein variational gradient descent -------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [None, 0.7])
@pytest.mark.usefixtures("x64")
def test_stein_direction_is_its_formula(bandwidth):
    """In loops, with the kernel differentiated by JAX: catches the sign of the repulsion."""
    rng = np.random.default_rng(3)
    u, slopes = rng.normal(size=(2, 5, 3))
    squares = np.array([[np.sum((a - b) ** 2) for b in u] for a in u])
    h = np.median(squares) / math.log(6.0) if bandwidth is None else bandwidth

    def kernel(a, b):
        return jnp.exp(-jnp.sum((a - b) ** 2) / h)

    expected = [
        sum(kernel(u[j], u[i]) * slopes[j] + jax.grad(kernel)(jnp.asarray(u[j]), u[i]) for j in range(5)) / 5.0
        for i in range(5)
    ]
    np.testing.assert_allclose(stein_direction(jnp.asarray(u), jnp.asarray(slopes), bandwidth), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_one_particle_finds_the_mode():
    found = vi.svgd(line(), optax.adam(0.05), key=KEY, num_particles=1, num_steps=2000)
    np.testing.assert_allclose(found["w"], LINE_MEAN[None], rtol=1e-5)


@pytest.mark.slow
def test_many_particles_find_mean_and_spread():
    found = vi.svgd(line(), optax.adam(0.05), key=KEY, num_particles=100, num_steps=1000)
    np.testing.assert_allclose(found["w"].mean(0), LINE_MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(found["w"].T), LINE_COVARIANCE, atol=0.03)


def test_particles_start_where_they_are_told_and_stay_in_the_support():
    @ex.model
    def positive():
        s = ex.sample("s", dist.Gamma(3.0, 2.0))
        ex.sample("y", dist.Normal(0.0, s))

    target = positive().given({"y": 0.5})
    start = {"s": jnp.array([0.5, 1.0, 4.0])}
    options = {"key": KEY, "num_particles": 3, "initial": start}
    still = vi.svgd(target, optax.sgd(0.0), num_steps=1, **options)
    np.testing.assert_allclose(still["s"], start["s"], rtol=1e-5)
    assert np.all(vi.svgd(target, optax.adam(0.05), num_steps=200, **options)["s"] > 0.0)
    with pytest.raises(SupportError):
        vi.svgd(target, optax.sgd(0.1), num_steps=1, key=KEY, num_particles=2, initial={"s": jnp.array([-1.0, 1.0])})


def test_svgd_refusals():
    few = {"key": KEY, "num_particles": 2, "num_steps": 2}
    with pytest.raises(SupportError, match="'z'.*discrete"):
        vi.svgd(discrete().given({"y": 1.0}), optax.sgd(0.1), **few)
    with pytest.raises(TypeError, match="posterior"):
        vi.svgd(regression(), optax.sgd(0.1), **few)
    with pytest.raises(ValueError, match="num_particles"):
        vi.svgd(line(), optax.sgd(0.1), key=KEY, num_particles=0, num_steps=1)
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        vi.svgd(line(), optax.sgd(1e20), key=KEY, num_particles=2, num_steps=50)
    assert caught.value.result["w"].shape == (2, 2)
