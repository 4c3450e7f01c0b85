"""Strategies at sites that are no flips, in every kind of structure: closed forms, by two-stage z-tests.

A family is a distribution with mean $m$ and variance $v_0 + v_1 m + v_2 m^2$, so that every expectation here is a
polynomial. The false-alarm rate of a test is 1e-6; several samples are lanes around the program.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_every_strategy import STRUCTURES, chain_of_three, second

import expectax as ex
from expectax import dist, vi
from helpers import two_stage_z

KEY = jax.random.key(20261127)
P = 0.4
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


class Family(NamedTuple):
    of: Callable[[Any], Any]
    variance: tuple[float, float, float]
    pathwise: bool = False


FAMILIES = {
    "normal": Family(lambda m: dist.Normal(m, 1.0), (1.0, 0.0, 0.0), True),
    "normal of growing scale": Family(lambda m: dist.Normal(m, 0.7 * m), (0.0, 0.0, 0.49), True),
    "exponential": Family(lambda m: dist.Exponential(1.0 / m), (0.0, 0.0, 1.0), True),
    "gamma": Family(lambda m: dist.Gamma(2.0, 2.0 / m), (0.0, 0.0, 0.5), True),
    "gamma of growing shape": Family(lambda m: dist.Gamma(2.0 * m, 2.0), (0.0, 0.5, 0.0), True),
    "poisson": Family(dist.Poisson, (0.0, 1.0, 0.0)),
    "geometric": Family(lambda m: dist.Geometric(probs=1.0 / (1.0 + m)), (0.0, 1.0, 1.0)),
    "binomial": Family(lambda m: dist.Binomial(4, probs=m / 4.0), (0.0, 1.0, -0.25)),
}
STRATEGIES = {"default": None, "reinforce": vi.Reinforce(baseline=None), "mvd": vi.MVD(), "enum": vi.Enum()}


# --- structures, with draws of mean p, and of mean p (1 + b) / 2 given the first --------------------------------------


def cost(b: Any, c: Any) -> Any:
    return (2.0 * b + c) ** 2 + c


def in_cond(draw: Any, p: Any) -> Any:
    coin = ex.sample("coin", dist.Bernoulli(0.25))
    return lax.cond(coin == 1, lambda: cost(1.0, draw("c", p)), lambda: cost(0.0, draw("b", p / 2.0)))


def in_switch(draw: Any, p: Any) -> Any:
    coin = ex.sample("coin", dist.Categorical(jnp.array([0.25, 0.75])))
    return lax.switch(coin, [lambda: cost(1.0, draw("c", p)), lambda: cost(0.0, draw("b", p / 2.0)), lambda: 7.0])


def in_expectation(draw: Any, p: Any) -> Any:
    b = draw("b", p)
    return cost(b, 0.0) + (4.0 * b + 2.0) * vi.expectation(lambda q: draw("c", q))(second(p, b))


def added_costs(draw: Any, p: Any) -> Any:
    b = draw("b", p)
    vi.add_cost(4.0 * b**2)
    c = draw("c", second(p, b))
    vi.add_cost(jnp.stack([4.0 * b * c, c**2 + c]))
    return 0.0


OWN = {f.__name__: f for f in (in_cond, in_switch, in_expectation, added_costs)}
SHARED = ("top_level", "in_scan", "in_vmap", "lane_by_lane", "in_jit", "in_nested_model", "chain_of_three")
ALL = {name: STRUCTURES[name] for name in SHARED} | OWN


# --- truths -----------------------------------------------------------------------------------------------------


def second_moment(family: Family, first: Any, square: Any) -> Any:
    """Return E[x^2], of a draw whose mean has these first two moments."""
    v0, v1, v2 = family.variance
    return v0 + v1 * first + (1.0 + v2) * square


def pair(family: Family, p: Any, scale: float = 1.0) -> Any:
    b, bb = p * scale, second_moment(family, p * scale, (p * scale) ** 2)
    c, square = p * (1.0 + b) / 2.0, p**2 / 4.0 * (1.0 + 2.0 * b + bb)
    bc = p / 2.0 * (b + bb)
    return 4.0 * bb + 4.0 * bc + second_moment(family, c, square) + c


def lanes(family: Family, p: Any) -> Any:
    b, c = p, p / 2.0
    return 4.0 * second_moment(family, b, b**2) + 4.0 * b * c + second_moment(family, c, c**2) + c


def branches(family: Family, p: Any) -> Any:
    low = second_moment(family, p / 2.0, p**2 / 4.0) + p / 2.0
    return 0.25 * (4.0 + 4.0 * p + second_moment(family, p, p**2) + p) + 0.75 * low


def nested_expectation(family: Family, p: Any) -> Any:
    bb = second_moment(family, p, p**2)
    return 4.0 * bb + p / 2.0 * (4.0 * bb + 6.0 * p + 2.0)


def chain(family: Family, p: Any) -> Any:
    """E[(b1 + b2 + b3)^2], b1 of mean p, each next of mean p (1 + b) / 2."""
    means, squares, crossed = [p], [second_moment(family, p, p**2)], 0.0
    with_sum = []  # E[b_t (b_1 + ... + b_t)]
    with_sum.append(squares[0])
    for _ in range(2):
        b, bb, s = means[-1], squares[-1], with_sum[-1]
        mean, square = p * (1.0 + b) / 2.0, p**2 / 4.0 * (1.0 + 2.0 * b + bb)
        past = p / 2.0 * (sum(means) + s)  # E[b_{t+1} (b_1 + ... + b_t)]
        means.append(mean)
        squares.append(second_moment(family, mean, square))
        crossed += past
        with_sum.append(past + squares[-1])
    return sum(squares) + 2.0 * crossed


TRUTHS = {
    "in_vmap": lanes,
    "lane_by_lane": lambda family, p: pair(family, p) + pair(family, p, 0.5),
    "in_cond": branches,
    "in_switch": branches,
    "in_expectation": nested_expectation,
    "chain_of_three": chain,
}


def fits(family: str, strategy: str) -> bool:
    return strategy != "enum" or family == "binomial"


def quick(structure: str, strategy: str, family: str) -> bool:
    return structure == "chain_of_three" and strategy == "mvd" and family in ("normal", "gamma", "geometric")


TABLE = [
    pytest.param(s, f, n, id=f"{s}-{f}-{n}", marks=() if quick(s, n, f) else pytest.mark.slow)
    for s, f, n in itertools.product(ALL, FAMILIES, STRATEGIES)
    if fits(f, n) and (n in ("mvd", "default") or s in ("in_scan", "in_cond", "lane_by_lane"))
]


@pytest.mark.parametrize(("structure", "family", "strategy"), TABLE)
def test_value_and_gradient(structure, family, strategy):
    """Catches coefficients of a weak derivative that are wrong, and reruns that draw other numbers than the first run."""
    own = FAMILIES[family]

    def draw(address: str, mean: Any) -> Any:
        return 1.0 * ex.sample(address, own.of(mean), gradient=STRATEGIES[strategy])

    objective = vi.objective(lambda p: ALL[structure](draw, p))

    @jax.jit
    def sampler(keys: Any) -> Any:
        run = jax.value_and_grad(objective.surrogate)
        return jax.vmap(lambda key: jnp.stack(run(P, key, num_samples=4)))(keys)

    truth = lambda p: TRUTHS.get(structure, pair)(own, p)  # noqa: E731
    exact = np.array([truth(P), jax.grad(truth)(P)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), exact, KEY, 2000)


def test_the_chain_has_the_structure_of_the_other_table():
    assert ALL["chain_of_three"] is chain_of_three
