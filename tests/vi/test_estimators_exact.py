r"""The estimators are exact in expectation: value, gradient and Hessian, with no Monte Carlo error, at 1e-10.

`Enum` must return $\sum_o p_\theta(o)\, f_\theta(o)$ outright. For a site that draws, the draw is replaced by each
outcome in turn, and $\sum_o p_{\theta_0}(o)\, D^k \hat f(\theta_0; o)$, the probabilities held fixed, must be $D^k$ of
the truth for k = 0, 1, 2. With a leave-one-out baseline o runs over the pairs of outcomes of two samples.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forced import Forced, by_sample, choose
from vi_cases import CASES, THETA, Case

import expectax as ex
from expectax import dist, vi
from expectax.vi import _run

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
KEY = jax.random.key(20260801)

STRATEGIES = {
    "enum": vi.Enum(),
    "reinforce": vi.Reinforce(baseline=None),
    "constant baseline": vi.Reinforce(baseline=0.7),
    "leave-one-out": vi.Reinforce(),
}
WITH_BASELINES = set(
    "flip additive_terms chain nested_guide lanes lanes_feed_lanes scan lanes_in_scan then_enum enum_then normal_lanes "
    "normal_scan then_reparam".split()
)


def applies(case: Case, strategy: str) -> bool:
    return {"enum": case.enum, "reinforce": True}.get(strategy, case.name in WITH_BASELINES)


PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in STRATEGIES if applies(case, name)
]


def taylor(f: Any, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return `(f, gradient, Hessian)` at theta."""

    def gradient(x: Any) -> Any:
        value, slope = jax.value_and_grad(f)(x)
        return slope, (value, slope)

    fast_to_compile = {"xla_backend_optimization_level": 0}
    hessian, (value, slope) = jax.jit(jax.jacfwd(gradient, has_aux=True), compiler_options=fast_to_compile)(theta)
    return np.asarray(value), np.asarray(slope), np.asarray(hessian)


def outcomes(case: Case) -> np.ndarray:
    values = np.broadcast_to(case.values, case.shape)
    return np.array(list(itertools.product(*map(range, values.ravel())))).reshape(-1, *case.shape)


@functools.cache
def truth(case: Case) -> tuple[np.ndarray, ...]:
    def expectation(theta: Any) -> Any:
        density, cost = jax.vmap(lambda o: case.reference(theta, o))(outcomes(case))
        return jnp.sum(density * cost)

    return taylor(expectation, THETA)


@functools.cache
def probabilities(case: Case) -> np.ndarray:
    p = np.asarray(jax.jit(jax.vmap(lambda o: case.reference(jnp.asarray(THETA), o)[0]))(outcomes(case)))
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-12)
    return p


def enumerated(case: Case, strategy: Any, samples: int) -> tuple[np.ndarray, ...]:
    """Average the surrogate and its derivatives over all joint outcomes of `samples` independent samples."""
    table, site = outcomes(case), choose(strategy)
    chosen = np.array(list(itertools.product(range(len(table)), repeat=samples)))
    weights = probabilities(case)[chosen].prod(1)

    def average(theta: Any) -> Any:
        def one(o: Any) -> Any:
            return vi.objective(lambda t: case.program(t, site, o)).surrogate(theta, KEY, samples)

        return jnp.sum(weights * jax.vmap(one)(jnp.moveaxis(table[chosen], 1, -1)))

    return taylor(average, THETA)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_value_gradient_and_hessian_are_exact(case, name, monkeypatch):
    """Catches a missing box or dependence, a wrong axis or time order, a draw that is not stopped, a bad baseline."""
    strategy = STRATEGIES[name]
    if name == "enum":
        site = choose(strategy)
        objective = vi.objective(lambda t: case.program(t, site, outcomes(case)[0]))
        found = taylor(lambda theta: objective.surrogate(theta, KEY), THETA)
    else:
        monkeypatch.setattr(_run, "draw_site", by_sample(_run.draw_site))
        found = enumerated(case, strategy, samples=2 if name == "leave-one-out" else 1)
    for order, (mine, exact) in enumerate(zip(found, truth(case), strict=True)):
        np.testing.assert_allclose(mine, exact, rtol=1e-10, atol=1e-10, err_msg=f"derivative of order {order}")


# --- known numbers: programmable VI's own examples ------------------------------------------------------------------


def flips(n, how):
    """Return the sum of n flips: in lanes, a batch, steps of a scan, or written out."""

    def sum_of(p):
        match how:
            case "lanes":
                z = jax.vmap(lambda _: ex.sample("b", dist.Bernoulli(p)))(jnp.arange(n))
            case "batch":
                z = ex.sample("b", dist.Bernoulli(p).expand([n]))
            case "scan":
                z = jax.lax.scan(lambda c, _: (c, ex.sample("b", dist.Bernoulli(p))), None, None, length=n)[1]
            case _:
                z = jnp.stack([ex.sample(f"b{i}", dist.Bernoulli(p)) for i in range(n)])
        return jnp.sum(z, dtype=float)

    return sum_of


@pytest.mark.parametrize("how", ["lanes", "batch", "scan", "written out"])
def test_default_enumerates_few_flips(how):
    """E S = np: 1.2, slope 4; E S^2 for n = 3: 1.44, slope 6.6, curvature 12. The default strategy has no variance."""
    four, three = flips(4, how), flips(3, how)
    np.testing.assert_allclose(taylor(lambda p: vi.objective(four).surrogate(p, KEY), 0.3)[:2], [1.2, 4.0], rtol=1e-12)
    square = vi.objective(lambda p: three(p) ** 2)
    np.testing.assert_allclose(taylor(lambda p: square.surrogate(p, KEY), 0.3), [1.44, 6.6, 12.0], rtol=1e-12)


def test_flip_of_the_paper():
    """f(b) = 2 if b else -p at p = 0.3: value 0.39, gradient 1.6."""
    paper = vi.objective(lambda p: jnp.where(ex.sample("b", dist.Bernoulli(p)) == 1, 2.0, -p))
    np.testing.assert_allclose(taylor(lambda p: paper.surrogate(p, KEY), 0.3), [0.39, 1.6, 2.0], rtol=1e-12)


def test_objective_in_objective():
    """An objective called inside another one leaves its choices to the outer one: E[b] E[2b' + 1] at p = 0.3."""
    one = vi.objective(lambda p: 2.0 * ex.sample("b", dist.Bernoulli(p)) + 1.0)
    outer = vi.objective(lambda p: one(p) * ex.sample("c", dist.Bernoulli(p)))
    np.testing.assert_allclose(taylor(lambda p: outer.surrogate(p, KEY), 0.3), [0.48, 2.2, 4.0], rtol=1e-12)


# --- impossible values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "p", "value"),
    [
        pytest.param(lambda p: dist.Bernoulli(p), 0.0, 1.0, id="flip never"),
        pytest.param(lambda p: dist.Bernoulli(p), 1.0, 4.0, id="flip always"),
        pytest.param(lambda p: dist.Bernoulli(logits=p), -np.inf, 1.0, id="logit never"),
        pytest.param(lambda p: dist.Categorical(jnp.stack([1.0 - p, 0.0 * p, p])), 0.0, 1.0, id="categorical"),
    ],
)
def test_impossible_values_leave_value_and_gradient_finite(make, p, value):
    """E[3z + 1 + log q(z)]: catches 0 * inf, the nan of other implementations at p = 0."""

    def cost(p):
        d = make(p)
        z = ex.sample("z", d, gradient=vi.Enum())
        return 3.0 * z + 1.0 + d.log_prob(z)

    got, gradient, _ = taylor(lambda p: vi.objective(cost).surrogate(p, KEY), p)
    np.testing.assert_allclose(got, value, atol=1e-10)
    assert np.isfinite(gradient)


def test_impossible_value_among_possible_ones():
    """z ~ Cat(0, p, 1 - p): E[z^2 + log q(z)] = p + 4 (1 - p) - H(p), though log q(0) is minus infinity."""

    def cost(p):
        d = dist.Categorical(logits=jnp.stack([jnp.full_like(p, -jnp.inf), jnp.log(p), jnp.log1p(-p)]))
        z = ex.sample("z", d, gradient=vi.Enum())
        return 1.0 * z**2 + d.log_prob(z)

    exact = taylor(lambda p: p + 4.0 * (1.0 - p) + p * jnp.log(p) + (1.0 - p) * jnp.log1p(-p), 0.3)
    np.testing.assert_allclose(taylor(lambda p: vi.objective(cost).surrogate(p, KEY), 0.3), exact, rtol=1e-10)


def test_infinite_cost_of_an_impossible_value():
    """z ~ Cat(0, p, 1 - p): E log(a z) has slope 1/a in a. Catches where(), which drops infinities, not their nan."""

    def cost(a):
        return jnp.log(a * ex.sample("z", dist.Categorical(jnp.array([0.0, 0.3, 0.7])), gradient=vi.Enum()))

    slope = taylor(lambda a: vi.objective(cost).surrogate(a, KEY), 2.0)[1]
    np.testing.assert_allclose(slope, 0.5, rtol=1e-12)


# --- lanes of one element ---------------------------------------------------------------------------------------------


def test_reshape_that_joins_lanes_of_size_one():
    """Catches a score whose two axes go to the same axis of the value."""

    def cost(p):
        one = jax.vmap(lambda _: ex.sample("z", Forced(dist.Bernoulli(p), jnp.ones(1)), gradient=vi.Reinforce(None)))
        return jnp.sum(jnp.exp(jnp.reshape(jax.vmap(one)(jnp.zeros((1, 1))), (1,))))

    slope = taylor(lambda p: vi.objective(cost).surrogate(p, KEY), 0.3)[1]
    np.testing.assert_allclose(slope, np.exp(1.0) / 0.3, rtol=1e-10)
