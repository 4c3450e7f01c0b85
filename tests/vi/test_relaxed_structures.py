"""Rebar in every structure that it may stand in, and the biased strategies by permission: values, and what gradients they have.

Rebar needs that no other choice depends on its own, and refuses loops; the truth is a sum over two outcomes.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl import StrategyError
from helpers import two_stage_z

KEY = jax.random.key(20261129)
P = 0.3
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def cost(b: Any) -> Any:
    return (b - 0.45) ** 2 + 0.3 * b


def flip(p: Any, strategy: Any, address: str = "b") -> Any:
    return ex.sample(address, dist.Bernoulli(p), gradient=strategy) * 1.0


def top_level(p: Any, how: Any) -> Any:
    return cost(flip(p, how))


def in_vmap(p: Any, how: Any) -> Any:
    return jnp.sum(jax.vmap(lambda s: cost(flip(p * s, how)))(jnp.array([1.0, 0.5])))


def lanes_together(p: Any, how: Any) -> Any:
    return jnp.sum(jax.vmap(lambda s: flip(p * s, how))(jnp.array([1.0, 0.5]))) ** 2


def in_cond(p: Any, how: Any) -> Any:
    coin = ex.sample("coin", dist.Bernoulli(0.5))
    return lax.cond(coin == 1, lambda: cost(flip(p, how)), lambda: cost(flip(p / 2.0, how, "c")))


def in_switch(p: Any, how: Any) -> Any:
    coin = ex.sample("coin", dist.Categorical(jnp.array([0.5, 0.5])))
    return lax.switch(coin, [lambda: cost(flip(p, how)), lambda: cost(flip(p / 2.0, how, "c")), lambda: 7.0])


def in_jit(p: Any, how: Any) -> Any:
    return jax.jit(lambda p: cost(flip(p, how)))(p)


def in_nested_model(p: Any, how: Any) -> Any:
    @ex.model
    def inner(p: Any) -> Any:
        return flip(p, how)

    @ex.model
    def outer(p: Any) -> Any:
        ex.sample("inner", inner(p))

    return cost(1.0 * vi.simulate(outer(p))[0]["inner"]["b"])


def in_expectation(p: Any, how: Any) -> Any:
    return 2.0 * vi.expectation(lambda p: cost(flip(p, how)))(p) + p


def one(p: Any) -> Any:
    return p * cost(1.0) + (1.0 - p) * cost(0.0)


def together(p: Any) -> Any:
    total = 0.0
    for a, b in itertools.product((0.0, 1.0), repeat=2):
        total += (p if a else 1.0 - p) * (p / 2.0 if b else 1.0 - p / 2.0) * (a + b) ** 2
    return total


TRUTHS = {
    top_level: one,
    in_vmap: lambda p: one(p) + one(p / 2.0),
    lanes_together: together,
    in_cond: lambda p: 0.5 * one(p) + 0.5 * one(p / 2.0),
    in_switch: lambda p: 0.5 * one(p) + 0.5 * one(p / 2.0),
    in_jit: one,
    in_nested_model: one,
    in_expectation: lambda p: 2.0 * one(p) + p,
}


@pytest.mark.parametrize("structure", TRUTHS, ids=lambda f: f.__name__)
def test_rebar_is_unbiased(structure):
    objective = vi.objective(lambda p: structure(p, vi.Rebar()))

    @jax.jit
    def sampler(keys: Any) -> Any:
        run = jax.value_and_grad(objective.surrogate)
        return jax.vmap(lambda key: jnp.stack(run(P, key, num_samples=2)))(keys)

    truth = TRUTHS[structure]
    exact = np.array([truth(P), jax.grad(truth)(P)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), exact, KEY, 4000)


@pytest.mark.parametrize("structure", TRUTHS, ids=lambda f: f.__name__)
def test_straight_through_keeps_the_value(structure):
    """Its gradient is biased, and has to be allowed; the value is not, and the gradient is the cost's own slope."""
    objective = vi.objective(lambda p: structure(p, vi.StraightThrough()))
    addresses = {c.site.address for c in vi.objective(lambda p: structure(p, vi.Reinforce())).staged(P).layout.choices}
    allowed = objective.allowing(*(a for a in addresses if not a.endswith("coin")))
    with pytest.raises(StrategyError, match="biased"):
        objective.surrogate(P, KEY)
    run = jax.jit(jax.vmap(lambda key: jnp.stack(jax.value_and_grad(allowed.surrogate)(P, key))[0:1]))
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array([TRUTHS[structure](P)]), KEY, 4000)


def test_rebar_refuses_loops():
    def loop(p: Any) -> Any:
        return lax.scan(lambda c, _: (c + cost(flip(p, vi.Rebar())), None), 0.0, length=2)[0]

    with pytest.raises(StrategyError, match="loop"):
        vi.objective(loop).surrogate(P, KEY)


@pytest.mark.parametrize(
    "other", [vi.Rebar(), vi.Reinforce(baseline=None), vi.Reinforce(), vi.MVD(), vi.Enum()], ids=str
)
def test_a_control_is_the_baseline_of_its_own_choice_alone(other):
    """Two choices in one cost: the control of one depends on the other, and as its baseline too it biased the gradient."""
    objective = vi.objective(lambda p: (flip(p, vi.Rebar()) + flip(p / 2.0, other, "c")) ** 2)

    @jax.jit
    def sampler(keys: Any) -> Any:
        run = jax.value_and_grad(objective.surrogate)
        return jax.vmap(lambda key: jnp.stack(run(P, key, num_samples=2)))(keys)

    exact = np.array([together(P), jax.grad(together)(P)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), exact, KEY, 4000)


def test_the_score_of_a_logit_of_zero():
    """Catches: numpyro's derivative at 0, which is 1 for heads and 0 for tails."""
    for value, expected in ((0, -0.5), (1, 0.5)):
        score = lambda x, value=value: vi.Rebar().couple(dist.Bernoulli(logits=x), jnp.asarray(value), KEY).score
        np.testing.assert_allclose(jax.grad(score)(0.0), expected, rtol=1e-6)
