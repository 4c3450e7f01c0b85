r"""The bound of a differentiated particle filter, against enumeration and the Kalman filter.

Each z-test is in two stages, keys are pinned.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import expectax as ex
from expectax import dist, vi
from expectax.ppl import AddressError, ShapeError
from helpers import count_compiles, hmm_log_evidence, kalman_log_evidence, two_stage_z

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


def hidden_bound(steps: int, particles: int, gradients: bool = False) -> Any:
    data = {"y": jnp.asarray(SEEN[:steps])}
    return vi.fivo(hidden, proposal, data, 2, particles, resampling_gradients=gradients)


TILT = {"tilt": 0.6}


@pytest.mark.slow
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


@pytest.mark.slow
def test_resampling_gradients_are_the_difference_between_unbiased_and_biased():
    """Value and gradient by enumeration of both forms, which differ: catches ancestors without, or with, a score."""
    truths = []
    for gradients in (True, False):
        truths.append(np.array(jax.jit(jax.value_and_grad(lambda t, g=gradients: two_steps(t, g)))(0.6)))
        found = samples(hidden_bound(2, 2, gradients), TILT)
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


def series_bound(particles: int, ys: Any = SERIES) -> Any:
    return vi.fivo(drift, follow, {"y": jnp.asarray(ys)}, START, particles, resampling_gradients=False)


def series_log_evidence(decay: float) -> float:
    one = np.eye(1)
    return kalman_log_evidence(decay * one, one, one, 0.25 * one, np.zeros(1), 0.0 * one, SERIES[:, None])


@pytest.mark.slow
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


@pytest.mark.slow
def test_model_and_guide_are_learned_by_the_filtering_bound():
    """The fitted decay is near the maximum of the Kalman filter's evidence."""
    grid = np.linspace(0.0, 1.5, 301)
    best = grid[np.argmax([series_log_evidence(decay) for decay in grid])]
    start = {"decay": 0.2, "gain": 0.3, "log_sd": 0.0}
    rate = optax.linear_schedule(0.03, 0.0, 1200)
    fit = vi.fit(series_bound(32), start, optax.adam(rate), key=KEY, num_steps=1200, num_samples=4)
    assert abs(fit.params["decay"] - best) < 0.05 and abs(fit.params["gain"] - 0.8) < 0.1


def refused(
    model_step: Any = drift, guide_step: Any = follow, ys: Any = None, initial: Any = START, n: int = 2
) -> None:
    ys = {"y": jnp.asarray(SERIES)} if ys is None else ys
    vi.value_and_grad(vi.fivo(model_step, guide_step, ys, initial, n, resampling_gradients=False))(PARAMS, KEY)


def test_what_does_not_fit_a_filter_is_refused():
    with pytest.raises(ValueError, match="num_particles"):
        refused(n=0)
    for bad in ({}, {"y": jnp.zeros(0)}, {"y": jnp.zeros(3), "u": jnp.zeros(2)}, {"y": 1.0}):
        with pytest.raises(ShapeError, match="time axis"):
            refused(ys=bad)
    with pytest.raises(ShapeError, match=r"'float32'.*'int32'"):
        refused(initial={"x": 0, "time": 0})
    with pytest.raises(ShapeError, match="state"):
        refused(ex.model(lambda p, s: (drift.function(p, s), None)[1]))
    with pytest.raises(AddressError, match="'x'"):
        refused(guide_step=ex.model(lambda p, s, y: ex.sample("z", dist.Normal(0.0, 1.0))))
    with pytest.raises(AddressError, match="'u'"):
        refused(ys={"u": jnp.asarray(SERIES)})


def test_another_series_compiles_nothing():
    vi.value_and_grad(series_bound(3))(PARAMS, KEY)
    with count_compiles() as compiles:
        vi.value_and_grad(series_bound(3, SERIES[::-1].copy()))(PARAMS, KEY)
    assert compiles == []
