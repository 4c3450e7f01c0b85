"""Every strategy in every kind of structure: value and gradient against sums over all outcomes, by two-stage z-tests.

The draws' law is known, so the truth is exact; the tests' false-alarm rate is 1e-6 each. With 4000 draws a gradient that
is off by 12 to 40 per cent (by strategy) is found with probability over 0.99.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl import StrategyError
from expectax.vi import _layout
from helpers import two_stage_z

KEY = jax.random.key(20261126)
P = 0.3
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


# --- strategies -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's score-function estimator."""

    def couple(self, distribution: Any, value: Any, key: Any) -> vi.Draw:
        return vi.Draw(value, score=distribution.log_prob(value))


@dataclasses.dataclass(frozen=True)
class MineWeak:
    """A user's weak derivative."""

    def couple(self, distribution: Any, value: Any, key: Any) -> vi.Draw:
        p = distribution.probs
        return vi.Draw(value, alternatives=[(jnp.ones_like(value), p), (jnp.zeros_like(value), -p)])


STRATEGIES = {
    "default": None,
    "reinforce": vi.Reinforce(baseline=None),
    "constant baseline": vi.Reinforce(baseline=1.3),
    "leave-one-out": vi.Reinforce(),
    "array baseline": vi.Reinforce(baseline=jnp.asarray(1.3)),
    "enum": vi.Enum(),
    "enum, locally": vi.Enum(),
    "mvd": vi.MVD(),
    "disarm": vi.DisARM(),
    "a user's score": Mine(),
    "a user's weak derivative": MineWeak(),
}
Flip = Callable[[str, Any], Any]


# --- structures: a flip b ~ p, a flip c ~ p (1 + b) / 2 given it ------------------------------------------------------


def cost(b: Any, c: Any) -> Any:
    return (2.0 * b + c) ** 2 + c


def second(p: Any, b: Any) -> Any:
    return p * (1.0 + b) / 2.0


def top_level(flip: Flip, p: Any) -> Any:
    b = flip("b", p)
    return cost(b, flip("c", second(p, b)))


def in_scan(flip: Flip, p: Any) -> Any:
    def step(b: Any, first: Any) -> Any:
        c = flip("b", jnp.where(first, p, second(p, b)))
        return c, c

    (b, c) = lax.scan(step, 0.0, jnp.array([True, False]))[1]
    return cost(b, c)


def in_vmap(flip: Flip, p: Any) -> Any:
    b = jax.vmap(lambda scale: flip("b", p * scale))(jnp.array([1.0, 0.5]))
    return cost(b[0], b[1])


def lane_by_lane(flip: Flip, p: Any) -> Any:
    b = jax.vmap(lambda scale: flip("b", p * scale))(jnp.array([1.0, 0.5]))
    c = jax.vmap(lambda b: flip("c", second(p, b)))(b)
    return jnp.sum(jax.vmap(cost)(b, c))


def in_cond(flip: Flip, p: Any) -> Any:
    b = flip("b", p)
    return lax.cond(b == 1.0, lambda: cost(1.0, flip("c", p)), lambda: cost(0.0, flip("c", p / 2.0)))


def in_switch(flip: Flip, p: Any) -> Any:
    b = flip("b", p)
    branches = [lambda: cost(0.0, flip("c", p / 2.0)), lambda: cost(1.0, flip("c", p)), lambda: 7.0]
    return lax.switch(b.astype(int), branches)


def in_jit(flip: Flip, p: Any) -> Any:
    b = jax.jit(lambda p: flip("b", p))(p)
    return jax.jit(lambda b: cost(b, flip("c", second(p, b))))(b)


def in_nested_model(flip: Flip, p: Any) -> Any:
    @ex.model
    def pair(p: Any) -> Any:
        b = flip("b", p)
        return b, flip("c", second(p, b))

    @ex.model
    def outer(p: Any) -> Any:
        ex.sample("pair", pair(p))

    choices, _ = vi.simulate(outer(p))
    return cost(1.0 * choices["pair"]["b"], 1.0 * choices["pair"]["c"])


def in_expectation(flip: Flip, p: Any) -> Any:
    b = flip("b", p)
    return cost(b, 0.0) + (4.0 * b + 2.0) * vi.expectation(lambda q: flip("c", q))(second(p, b))


def added_costs(flip: Flip, p: Any) -> Any:
    b = flip("b", p)
    vi.add_cost(4.0 * b**2)
    c = flip("c", second(p, b))
    vi.add_cost(jnp.stack([4.0 * b * c, 2.0 * c**2]))
    return 0.0


def chain_of_three(flip: Flip, p: Any) -> Any:
    def step(b: Any, _: Any) -> Any:
        b = flip("b", second(p, b))
        return b, b

    return jnp.sum(lax.scan(step, 1.0, length=3)[1]) ** 2


def cond_in_scan(flip: Flip, p: Any) -> Any:
    def step(b: Any, _: Any) -> Any:
        b = lax.cond(b == 1.0, lambda: flip("b", p), lambda: 1.0 - flip("c", p / 2.0))
        return b, b

    return jnp.sum(lax.scan(step, 1.0, length=3)[1]) ** 2


def scan_in_vmap(flip: Flip, p: Any) -> Any:
    def chain(scale: Any) -> Any:
        def step(b: Any, _: Any) -> Any:
            b = flip("b", scale * second(p, b))
            return b, b

        return jnp.sum(lax.scan(step, 1.0, length=2)[1])

    return jnp.sum(jax.vmap(chain)(jnp.array([1.0, 0.5]))) ** 2


STRUCTURES = {
    f.__name__: f
    for f in (
        top_level,
        in_scan,
        in_vmap,
        lane_by_lane,
        in_cond,
        in_switch,
        in_jit,
        in_nested_model,
        in_expectation,
        added_costs,
        chain_of_three,
        cond_in_scan,
        scan_in_vmap,
    )
}


def pair_truth(p: Any) -> Any:
    total = 0.0
    for b, c in itertools.product((0.0, 1.0), repeat=2):
        q = second(p, b)
        total += (p if b else 1.0 - p) * (q if c else 1.0 - q) * cost(b, c)
    return total


def lanes_truth(p: Any) -> Any:
    total = 0.0
    for b, c in itertools.product((0.0, 1.0), repeat=2):
        total += (p if b else 1.0 - p) * (p / 2.0 if c else 1.0 - p / 2.0) * cost(b, c)
    return total


def lane_truth(p: Any) -> Any:
    total = 0.0
    for (b, c), scale in itertools.product(itertools.product((0.0, 1.0), repeat=2), (1.0, 0.5)):
        q = second(p, b)
        total += (p * scale if b else 1.0 - p * scale) * (q if c else 1.0 - q) * cost(b, c)
    return total


def chain_truth(p: Any, probability: Any, scales: Any, steps: int) -> Any:
    """Sum over all outcomes of chains that start at 1; `probability(scale, b)` is that of a next 1."""
    total = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=len(scales) * steps):
        mass = 1.0
        for n, scale in enumerate(scales):
            before = 1.0
            for b in outcome[n * steps : (n + 1) * steps]:
                q = probability(scale, before)
                mass, before = mass * (q if b else 1.0 - q), b
        total += mass * sum(outcome) ** 2
    return total


TRUTHS = {
    "in_vmap": lanes_truth,
    "lane_by_lane": lane_truth,
    "chain_of_three": lambda p: chain_truth(p, lambda _, b: second(p, b), (1.0,), 3),
    "cond_in_scan": lambda p: chain_truth(p, lambda _, b: p if b else 1.0 - p / 2.0, (1.0,), 3),
    "scan_in_vmap": lambda p: chain_truth(p, lambda s, b: s * second(p, b), (1.0, 0.5), 2),
}
# run by default: every strategy in a loop and in lanes; the rest of the table is slow
QUICK = {"in_scan", "lane_by_lane"}
TABLE = [
    pytest.param(s, n, id=f"{s}-{n}", marks=() if s in QUICK else pytest.mark.slow)
    for s, n in itertools.product(STRUCTURES, STRATEGIES)
]


def flips_by(strategy: Any) -> Flip:
    return lambda address, p: 1.0 * ex.sample(address, dist.Bernoulli(p), gradient=strategy)


@pytest.mark.parametrize(("structure", "name"), TABLE)
def test_value_and_gradient(structure, name, monkeypatch):
    """Catches a strategy that loses its gradient in a structure, or gives the cost of one element to another."""
    if name == "enum, locally":
        monkeypatch.setattr(_layout, "enumeration", lambda *_: ("locally", 1))
    flip = flips_by(STRATEGIES[name])
    objective = vi.objective(lambda p: STRUCTURES[structure](flip, p))
    # several samples are lanes around the program; alone it has none, except that leave-one-out needs two
    samples = 1 if structure in ("top_level", "in_vmap") and name != "leave-one-out" else 2

    @jax.jit
    def sampler(keys: Any) -> Any:
        run = jax.value_and_grad(objective.surrogate)
        return jax.vmap(lambda key: jnp.stack(run(P, key, num_samples=samples)))(keys)

    truth = TRUTHS.get(structure, pair_truth)
    exact = np.array([truth(P), jax.grad(truth)(P)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), exact, KEY, 4000)
    if name == "enum":
        value, gradient = jax.value_and_grad(objective.surrogate)(P, KEY)
        np.testing.assert_allclose([value, gradient], exact, rtol=1e-10)


# --- what is first order, and what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["enum, locally", "mvd", "disarm", "a user's weak derivative"])
def test_second_derivatives_of_alternatives_are_refused(name, monkeypatch):
    if name == "enum, locally":
        monkeypatch.setattr(_layout, "enumeration", lambda *_: ("locally", 1))
    objective = vi.objective(lambda p: top_level(flips_by(STRATEGIES[name]), p))
    with pytest.raises(StrategyError, match=r"'[bc]'.*first derivatives only"):
        jax.hessian(objective.surrogate)(P, KEY)


def test_too_many_runs_are_refused():
    def cost(p: Any) -> Any:
        return jnp.sum(jax.vmap(lambda _: flips_by(vi.MVD())("b", p))(jnp.arange(3000))) ** 2

    with pytest.raises(StrategyError, match="6000 times"):
        vi.objective(cost).surrogate(P, KEY)


# --- two strategies in one objective ----------------------------------------------------------------------------------

LATER = {**STRATEGIES, "rebar": vi.Rebar()}


@pytest.mark.slow
@pytest.mark.parametrize("later", [name for name in LATER if name != "enum, locally"])
@pytest.mark.parametrize("first", [name for name in STRATEGIES if name != "enum, locally"])
def test_every_pair_of_strategies(first, later):
    """Catches a baseline or control of one choice that enters the score of another, and weights of branches taken twice."""

    def pair(p: Any) -> Any:
        b = 1.0 * ex.sample("b", dist.Bernoulli(p), gradient=STRATEGIES[first])
        return cost(b, 1.0 * ex.sample("c", dist.Bernoulli(second(p, b)), gradient=LATER[later]))

    objective = vi.objective(pair)

    @jax.jit
    def sampler(keys: Any) -> Any:
        run = jax.value_and_grad(objective.surrogate)
        return jax.vmap(lambda key: jnp.stack(run(P, key, num_samples=2)))(keys)

    exact = np.array([pair_truth(P), jax.grad(pair_truth)(P)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), exact, KEY, 4000)
