r"""The bound of a particle filter, semi-amortised guides, Laplace's approximation and Stein's particles.

Against enumeration, the Kalman filter and closed forms. Each z-test is in two stages, keys are pinned.
"""

import itertools
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
from expectax.ppl import AddressError, NonFiniteError, ShapeError, SupportError
from expectax.vi._stein import stein_direction
from helpers import count_compiles, hmm_log_evidence, kalman_log_evidence, two_stage_z

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


# --- the filtering bound: a hidden Markov model of two states ---------------------------------------------------------

FIRST, MOVES, RATES = np.array([0.3, 0.7]), np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([0.25, 0.9])
SEEN = np.array([1, 0, 1, 1])
TABLE = np.concatenate([MOVES, FIRST[None]])  # row 2 is the start


@ex.model
def hidden(params, state):
    x = ex.sample("x", dist.Categorical(jnp.take(TABLE, state, axis=0)))
    ex.sample("y", dist.Bernoulli(jnp.take(RATES, x)))
    return x


@ex.model
def proposal(params, state, observation):
    logits = jnp.log(jnp.take(TABLE, state, axis=0)) + params["tilt"] * (2.0 * observation["y"] - 1.0) * jnp.arange(2)
    ex.sample("x", dist.Categorical(logits=logits), gradient=vi.Reinforce(baseline=None))


def hidden_bound(steps: int, particles: int, **options: Any) -> Any:
    return vi.fivo(hidden, proposal, {"y": jnp.asarray(SEEN[:steps])}, 2, particles, **options)


TILT = {"tilt": 0.6}


@pytest.mark.parametrize("particles", [1, 3])
def test_the_evidence_of_a_hidden_markov_model_is_unbiased(particles):
    """Catches a first step that is left out, weights carried over a resampling, resampling after the last step."""
    exact = math.exp(hmm_log_evidence(FIRST, MOVES, stats.bernoulli.logpmf(SEEN[:, None], RATES)))
    found = samples(hidden_bound(4, particles), TILT)
    two_stage_z(lambda key, n: np.exp(found(key, n)[:, 0]), np.array(exact), KEY, 40_000)
    assert found(KEY, 40_000)[:, 0].mean() < math.log(exact) - 0.01


def two_steps(tilt: Any, gradients: bool) -> Any:
    """Return the bound of two particles and two steps, summed over all choices of particles and ancestors."""

    def law(states, y):
        return jax.nn.log_softmax(jnp.log(TABLE)[states] + tilt * (2.0 * y - 1.0) * jnp.arange(2))

    def weight(states, x, y):
        log_likelihood = jnp.log(jnp.where(y, RATES, 1.0 - RATES))[x]
        return jnp.log(TABLE)[states, x] + log_likelihood - law(states, y)[jnp.arange(2), x]

    def term(choice):
        first, ancestors, second = choice
        log_w = weight(jnp.full(2, 2), first, SEEN[0])
        chosen = jax.nn.log_softmax(log_w if gradients else jax.lax.stop_gradient(log_w))
        states = first[ancestors]
        log_w2 = weight(states, second, SEEN[1])
        log_prob = jnp.sum(law(jnp.full(2, 2), SEEN[0])[jnp.arange(2), first]) + jnp.sum(chosen[ancestors])
        log_prob += jnp.sum(law(states, SEEN[1])[jnp.arange(2), second])
        return jnp.exp(log_prob) * (jax.nn.logsumexp(log_w) + jax.nn.logsumexp(log_w2) - 2.0 * math.log(2.0))

    choices = np.array(list(itertools.product(range(2), repeat=6))).reshape(64, 3, 2)
    return jnp.sum(jax.vmap(term)(choices))


def test_resampling_gradients_are_the_difference_between_unbiased_and_biased():
    """Value and gradient by enumeration of both forms, which differ: catches ancestors without, or with, a score."""
    truths = []
    for gradients in (True, False):
        truths.append(np.array(jax.jit(jax.value_and_grad(lambda t, g=gradients: two_steps(t, g)))(0.6)))
        found = samples(hidden_bound(2, 2, resampling_gradients=gradients), TILT)
        two_stage_z(found, truths[-1], KEY, 100_000)
    assert abs(truths[0][0] - truths[1][0]) < 1e-6 and abs(truths[0][1] - truths[1][1]) > 1e-3


# --- the filtering bound: a linear normal model -----------------------------------------------------------------------

SERIES = np.array([0.4, 1.1, -0.2, 0.8, 1.9, 0.3])
DECAY = 0.9


@ex.model
def drift(params, state):
    x = ex.sample("x", dist.Normal(params["decay"] * state["x"], 1.0))
    ex.sample("y", dist.Normal(x, 0.5))
    return {"x": x, "time": state["time"] + 1}


@ex.model
def follow(params, state, observation):
    mean = params["decay"] * state["x"]
    ex.sample("x", dist.Normal(mean + params["gain"] * (observation["y"] - mean), jnp.exp(params["log_sd"])))


START = {"x": 0.0, "time": 0}
PARAMS = {"decay": DECAY, "gain": 0.8, "log_sd": 0.5 * math.log(0.2)}  # the law of x_t given x_{t-1} and y_t


def series_bound(particles: int, **options: Any) -> Any:
    return vi.fivo(drift, follow, {"y": jnp.asarray(SERIES)}, START, particles, **options)


def series_log_evidence(decay: float) -> float:
    one = np.eye(1)
    return kalman_log_evidence(decay * one, one, one, 0.25 * one, np.zeros(1), 0.0 * one, SERIES[:, None])


def test_the_evidence_of_a_linear_normal_model_is_unbiased_and_the_bound_tightens():
    exact = series_log_evidence(DECAY)
    found = samples(series_bound(4), PARAMS)
    two_stage_z(lambda key, n: np.exp(found(key, n)[:, 0] - exact), np.array(1.0), KEY, 40_000)
    bounds = [vi.estimate(series_bound(n), PARAMS, KEY, 20_000) for n in (1, 4, 16)]
    assert all(low.mean + 5.0 * low.standard_error < high.mean for low, high in itertools.pairwise(bounds))
    assert bounds[-1].mean + 5.0 * bounds[-1].standard_error < exact


def test_one_particle_is_the_elbo():
    """The same value and gradient as `vi.elbo` of the whole series written as a scan, draw by draw in law."""

    @ex.model
    def chain(params):
        def step(state, _):
            state = drift.function(params, state)
            return state, None

        jax.lax.scan(step, arrays(START), None, length=len(SERIES))

    @ex.model
    def chain_guide(params):
        def step(x, y):
            mean = params["decay"] * x
            law = dist.Normal(mean + params["gain"] * (y - mean), jnp.exp(params["log_sd"]))
            return ex.sample("x", law), None

        jax.lax.scan(step, 0.0, jnp.asarray(SERIES))

    elbo = samples(vi.elbo(lambda p: chain(p).given({"y": jnp.asarray(SERIES)}), chain_guide), PARAMS)
    filtered = samples(series_bound(1), PARAMS)
    two_stage_z(lambda k, n: filtered(k, n) - elbo(jax.random.fold_in(k, 1), n), np.zeros(4), KEY, 20_000)


def test_model_and_guide_are_learned_by_the_filtering_bound():
    """The fitted decay is near the maximum of the Kalman filter's evidence."""
    grid = np.linspace(0.0, 1.5, 301)
    best = grid[np.argmax([series_log_evidence(decay) for decay in grid])]
    start = {"decay": 0.2, "gain": 0.3, "log_sd": 0.0}
    rate = optax.linear_schedule(0.03, 0.0, 1200)
    fit = vi.fit(series_bound(32), start, optax.adam(rate), key=KEY, num_steps=1200, num_samples=4)
    assert abs(fit.params["decay"] - best) < 0.05 and abs(fit.params["gain"] - 0.8) < 0.1


def test_what_does_not_fit_a_filter_is_refused():
    ys = {"y": jnp.asarray(SERIES)}
    with pytest.raises(ValueError, match="num_particles"):
        vi.fivo(drift, follow, ys, START, 0)
    for bad in ({}, {"y": jnp.zeros(0)}, {"y": jnp.zeros(3), "u": jnp.zeros(2)}, {"y": 1.0}):
        with pytest.raises(ShapeError, match="time axis"):
            vi.fivo(drift, follow, bad, START, 2)
    with pytest.raises(ShapeError, match=r"'float32'.*'int32'"):
        vi.value_and_grad(vi.fivo(drift, follow, ys, {"x": 0, "time": 0}, 2))(PARAMS, KEY)
    with pytest.raises(ShapeError, match="state"):
        vi.value_and_grad(vi.fivo(ex.model(lambda p, s: (drift.function(p, s), None)[1]), follow, ys, START, 2))(
            PARAMS, KEY
        )
    with pytest.raises(AddressError, match="'x'"):
        other = ex.model(lambda p, s, y: ex.sample("z", dist.Normal(0.0, 1.0)))
        vi.value_and_grad(vi.fivo(drift, other, ys, START, 2))(PARAMS, KEY)
    with pytest.raises(AddressError, match="'u'"):
        vi.value_and_grad(vi.fivo(drift, follow, {"u": ys["y"]}, START, 2))(PARAMS, KEY)


def test_another_series_compiles_nothing():
    vi.value_and_grad(series_bound(3))(PARAMS, KEY)
    with count_compiles() as compiles:
        vi.value_and_grad(vi.fivo(drift, follow, {"y": jnp.asarray(SERIES[::-1].copy())}, START, 3))(PARAMS, KEY)
    assert compiles == []


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
