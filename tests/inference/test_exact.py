"""The enumeration of keyless programs: laws worked out by hand, every kind of control flow, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, inference

KEY = jax.random.key(11)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def coin(p):
    return ex.sample("coin", dist.Bernoulli(p))


def law_of(measure):
    """Return {value: probability} of a measure over numbers; numpyro's flips of probability 1 leave 1e-16 to the other side."""
    values, probabilities = np.asarray(measure.values), np.asarray(measure.probabilities)
    return {v: probabilities[values == v].sum() for v in np.unique(values[probabilities > 1e-12])}


def in_lanes():
    return jnp.sum(jax.vmap(coin)(jnp.array([0.2, 0.5])))


def in_a_loop():
    """0.5, then 0.25 + 0.5 x: the sum of two."""

    def step(x, _):
        x = coin(0.25 + 0.5 * x)
        return x, x

    return jnp.sum(lax.scan(step, coin(0.5), None, length=1)[1])


def backwards():
    """The last element is drawn first."""

    def step(x, p):
        x = coin(p + 0.5 * x)
        return x, x

    return lax.scan(step, jnp.asarray(0), jnp.array([0.1, 0.4]), reverse=True)[1] @ jnp.array([1, 10])


def in_a_branch():
    return lax.cond(coin(0.3) == 1, lambda: 1 + coin(0.9), lambda: jnp.asarray(0))


def in_branches_over_lanes():
    def one(p):
        return lax.cond(coin(0.5) == 1, lambda: coin(p), lambda: jnp.asarray(5))

    return jax.vmap(one)(jnp.array([0.2, 1.0])) @ jnp.array([1, 10])


def in_a_loop_in_a_branch():
    def loop():
        return lax.scan(lambda x, _: (x + coin(0.5), None), jnp.asarray(0), None, length=2)[0]

    return lax.cond(coin(0.4) == 1, loop, lambda: jnp.asarray(9))


def in_calls():
    return jax.jit(coin)(0.5) + 2 * jax.checkpoint(coin)(0.25)


@ex.model
def three_sided(weights):
    return ex.sample("side", dist.Categorical(weights))


def in_a_model():
    return ex.sample("one", three_sided(jnp.array([0.2, 0.3, 0.5]))) * 10 + coin(1.0)


def with_ancestors():
    return ex.sample("a", inference.Ancestors(jnp.log(jnp.array([0.25, 0.75])))) @ jnp.array([1, 10])


LAWS = {
    in_lanes: {0: 0.4, 1: 0.5, 2: 0.1},
    in_a_loop: {0: 0.5 * 0.75 + 0.5 * 0.25, 1: 0.5 * 0.25 + 0.5 * 0.75},
    backwards: {0: 0.6 * 0.9, 1: 0.6 * 0.1, 10: 0.4 * 0.4, 11: 0.4 * 0.6},
    in_a_branch: {0: 0.7, 1: 0.03, 2: 0.27},
    in_branches_over_lanes: {10: 0.2, 11: 0.05, 15: 0.25, 50: 0.2, 51: 0.05, 55: 0.25},
    in_a_loop_in_a_branch: {9: 0.6, 0: 0.1, 1: 0.2, 2: 0.1},
    in_calls: {0: 0.375, 1: 0.375, 2: 0.125, 3: 0.125},
    in_a_model: {1: 0.2, 11: 0.3, 21: 0.5},
    with_ancestors: {10: 0.5, 11: 0.5},
}


@pytest.mark.parametrize("program", LAWS, ids=lambda f: f.__name__)
def test_laws_by_hand(program):
    """Catches: a branch that is not taken with weight, lanes or steps that share a draw, a reversed order."""
    measure = inference.exact(program)
    np.testing.assert_allclose(measure.probabilities.sum(), 1.0, atol=1e-14)
    found, expected = law_of(measure), LAWS[program]
    assert set(found) == set(expected)
    for value, probability in expected.items():
        np.testing.assert_allclose(found[value], probability, atol=1e-14)


@pytest.mark.parametrize("program", LAWS, ids=lambda f: f.__name__)
def test_with_a_key_the_same_law_is_drawn_from(program):
    """Chi-square of 20,000 keyed runs: an error of 2 percent in a probability is seen almost surely."""
    from scipy import stats

    drawn = np.asarray(jax.jit(jax.vmap(inference.keyed(program)))(jax.random.split(KEY, 20_000)))
    expected = LAWS[program]
    assert set(np.unique(drawn)) <= set(expected)
    counts = np.array([(drawn == value).sum() for value in expected])
    assert stats.chisquare(counts, 20_000 * np.array(list(expected.values()))).pvalue > 1e-6


def test_pytrees_arguments_and_expectations():
    law = inference.exact(lambda p, name: {"x": coin(p), "name": name}, jnp.asarray(0.25), "text")
    assert law.values["name"] == "text"
    np.testing.assert_allclose(law.expectation(lambda v: v["x"] * 8.0), 2.0, atol=1e-14)


def test_a_run_that_cannot_happen_counts_nothing():
    def program():
        side = ex.sample("side", dist.Categorical(logits=jnp.array([0.0, -jnp.inf])))
        return jnp.where(side == 1, jnp.nan, 2.0)

    assert float(inference.exact(program).expectation()) == 2.0


def test_the_size_of_a_float32_and_of_no_choice():
    assert float(inference.exact(lambda: jnp.asarray(3.0)).expectation()) == 3.0
    with jax.enable_x64(False):
        assert inference.exact(in_lanes).probabilities.dtype == jnp.float32


def test_what_cannot_be_enumerated_is_refused():
    with pytest.raises(ex.ppl.ControlFlowError, match=r"'x' at .*test_exact\.py:\d+ has no finite, known support"):
        inference.exact(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(ex.ppl.ControlFlowError, match="'key' .*has no finite"):
        inference.exact(lambda: jax.random.normal(inference.random_key()))
    with pytest.raises(ex.ppl.ControlFlowError, match=r"has 33554432 runs, more than 16777216"):
        inference.exact(lambda: jax.vmap(lambda _: coin(0.5))(jnp.arange(25)))
    with pytest.raises(ex.ppl.ControlFlowError, match=r"'y' at .* is observed in a keyless program"):
        inference.exact(lambda: ex.observe("y", dist.Bernoulli(0.5), 1))
