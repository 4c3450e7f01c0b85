r"""The estimators are unbiased where choices cannot be enumerated: z-tests of value, gradient and Hessian.

Keys are pinned. Each z-test is in two stages and has a false-alarm rate of 1e-6 over keys (see `helpers.two_stage`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from helpers import two_stage_z

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(20260801)
REPARAM, REINFORCE = vi.Reparam(), vi.Reinforce(baseline=None)


@dataclasses.dataclass(frozen=True)
class Case:
    """`cost(theta, gradient)` has the expectation `exact(theta)`."""

    cost: Callable[..., Any]
    exact: Callable[..., Any]
    theta: Any
    strategies: tuple[Any, ...] = (REPARAM, REINFORCE)


def derivatives(f: Callable[..., Any], theta: Any) -> Any:
    """Return value, gradient and the upper triangle of the Hessian in one vector."""

    def gradient(x: Any) -> Any:
        value, slope = jax.value_and_grad(f)(x)
        return slope, (value, slope)

    theta = jnp.asarray(theta)
    hessian, (value, slope) = jax.jacfwd(gradient, has_aux=True)(theta)
    return jnp.concatenate([value[None], slope, hessian[np.triu_indices(theta.size)]])


def sampler(estimate: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Return `(key, n) -> n independent estimates`; compiling costs more than running here."""
    run = jax.jit(jax.vmap(estimate), compiler_options={"xla_backend_optimization_level": 0})
    return lambda key, n: np.asarray(run(jax.random.split(key, n)))


def square(t, gradient):
    return ex.sample("x", dist.Normal(t[0], t[1]), gradient=gradient) ** 2


def indicator(t, gradient):
    return jnp.where(ex.sample("x", dist.Normal(t[0], 1.0), gradient=gradient) > 0.0, 1.0, 0.0)


def beta(t, gradient):
    return ex.sample("x", dist.Beta(t[0], 2.0), gradient=gradient)


def gamma(t, gradient):
    return ex.sample("x", dist.Gamma(t[0], t[1]), gradient=gradient) ** 2


def dirichlet(t, gradient):
    return jnp.prod(ex.sample("x", dist.Dirichlet(t), gradient=gradient))


def cholesky(t):
    return jnp.zeros((2, 2)).at[np.tril_indices(2)].set(t)


def multivariate(t, gradient):
    x = ex.sample("x", dist.MultivariateNormal(jnp.ones(2), scale_tril=cholesky(t)), gradient=gradient)
    return x[0] * x[1] + x[1] ** 2


def poisson(t, gradient):
    return ex.sample("k", dist.Poisson(t[0]), gradient=gradient) ** 2.0


def geometric(t, gradient):
    return ex.sample("k", dist.Geometric(t[0]), gradient=gradient) * 1.0


def chain(t, gradient):
    """x ~ N(a, s), k ~ Pois(x^2 + 1): E k = a^2 + s^2 + 1."""
    x = ex.sample("x", dist.Normal(t[0], t[1]), gradient=gradient)
    return 1.0 * ex.sample("k", dist.Poisson(x**2 + 1.0), gradient=REINFORCE)


def pool(t, gradient):
    """Six independent choices with mean a and variance b^2, drawn at once: E S^2 = 36 a^2 + 6 b^2."""
    x, y = (ex.sample(name, dist.Normal(t[0], t[1]), gradient=gradient) for name in "xy")
    lanes = jax.vmap(lambda _: ex.sample("lane", dist.Normal(t[0], t[1]), gradient=gradient))(jnp.arange(2))
    batch = ex.sample("batch", dist.Normal(t[0], t[1]).expand([2]), gradient=gradient)
    return (x + y + jnp.sum(lanes) + jnp.sum(batch)) ** 2


STEPS = 3


def walk(t, gradient):
    r"""s_t = a s_{t-1} + N(0, b), s_0 = 1; the cost is $\sum_t s_t^2$."""

    def step(s, _):
        s = ex.sample("s", dist.Normal(t[0] * s, t[1]), gradient=gradient)
        return s, s**2

    return jnp.sum(lax.scan(step, 1.0, None, length=STEPS)[1])


def walk_exact(t):
    second, total = 1.0, 0.0
    for _ in range(STEPS):
        second = t[0] ** 2 * second + t[1] ** 2  # E s_t^2
        total += second
    return total


def walks_in_lanes(t, gradient):
    return jnp.mean(jax.vmap(lambda _: walk(t, gradient))(jnp.arange(2)))


def lanes_in_walk(t, gradient):
    def step(s, _):
        s = jax.vmap(lambda s: ex.sample("s", dist.Normal(t[0] * s, t[1]), gradient=gradient))(s)
        return s, jnp.mean(s**2)

    return jnp.sum(lax.scan(step, jnp.ones(2), None, length=STEPS)[1])


CASES = {
    "square": Case(square, lambda t: t[0] ** 2 + t[1] ** 2, [0.5, 1.3]),
    "indicator": Case(indicator, lambda t: jax.scipy.stats.norm.cdf(t[0]), [0.3], (REINFORCE,)),
    "beta": Case(beta, lambda t: t[0] / (t[0] + 2.0), [3.0]),
    "gamma": Case(gamma, lambda t: t[0] * (t[0] + 1.0) / t[1] ** 2, [2.5, 1.5]),
    "dirichlet": Case(dirichlet, lambda t: jnp.prod(t) / (jnp.sum(t) * (jnp.sum(t) + 1.0)), [2.0, 3.0]),
    "multivariate": Case(multivariate, lambda t: t[0] * t[1] + t[1] ** 2 + t[2] ** 2 + 2.0, [0.8, -0.5, 1.2]),
    "poisson": Case(poisson, lambda t: t[0] ** 2 + t[0], [2.0], (REINFORCE,)),  # gradient 2 lambda + 1
    "geometric": Case(geometric, lambda t: (1.0 - t[0]) / t[0], [0.3], (REINFORCE,)),  # 2.333, -11.11
    "chain": Case(chain, lambda t: t[0] ** 2 + t[1] ** 2 + 1.0, [0.5, 0.7]),
    "pool": Case(pool, lambda t: 36.0 * t[0] ** 2 + 6.0 * t[1] ** 2, [0.2, 0.7]),
    "walk": Case(walk, walk_exact, [0.6, 0.9]),
    "walks in lanes": Case(walks_in_lanes, walk_exact, [0.6, 0.9]),
    "lanes in walk": Case(lanes_in_walk, walk_exact, [0.6, 0.9]),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [pytest.param(name, s, id=f"{name}-{type(s).__name__}") for name, case in CASES.items() for s in case.strategies],
)
def test_estimates_are_unbiased(name, strategy):
    """Catches a sampler whose derivative is not the implicit one, noise shared where it should not be, a lost score."""
    case = CASES[name]
    objective = vi.objective(lambda t: case.cost(t, strategy))

    def estimate(key: Any) -> Any:
        return derivatives(lambda t: objective.surrogate(t, key), case.theta)

    two_stage_z(sampler(estimate), np.asarray(derivatives(case.exact, case.theta)), KEY, 10_000)


def test_beta_gradient_of_the_paper():
    """E x = a / (a + 2): 0.08 at a = 3."""
    case = CASES["beta"]
    np.testing.assert_allclose(derivatives(case.exact, case.theta)[:2], [0.6, 0.08], rtol=1e-6)


# --- several samples ------------------------------------------------------------------------------------------------


def means(cost: Callable[..., Any], theta: float, samples: int) -> Callable[..., np.ndarray]:
    """Return a sampler of (value, gradient), each the mean over some samples."""
    estimator = vi.value_and_grad(vi.objective(cost))
    return sampler(lambda key: jnp.stack(estimator(theta, key, samples)))


SPREAD = {
    "top level": lambda m: ex.sample("x", dist.Normal(m, 1.0)) ** 2,
    "lanes": lambda m: jnp.sum(jax.vmap(lambda _: ex.sample("x", dist.Normal(m, 1.0)))(jnp.arange(2)) ** 2),
    "scan": lambda m: jnp.sum(lax.scan(lambda c, _: (c, ex.sample("x", dist.Normal(m, 1.0)) ** 2), 0, None, 2)[1]),
    "reinforce in scan": lambda m: lax.scan(
        lambda s, _: (ex.sample("x", dist.Normal(s, 1.0), gradient=REINFORCE), None), m, None, 2
    )[0],
}


@pytest.mark.parametrize("name", SPREAD)
def test_samples_are_independent(name):
    """16 samples have 1/16 of the variance, of value and gradient; shared noise would leave all of it.

    The bounds are wide: with 2000 draws the relative error of a variance is below 10 % (1 sd).
    """
    one, many = (means(SPREAD[name], 0.7, samples)(KEY, 2000).var(0) for samples in (1, 16))
    assert np.all(many < one / 16 * 1.6)
    assert np.all(many > one / 16 * 0.6)


def far(gradient: Any) -> Callable[..., Any]:
    return lambda m: (ex.sample("z", dist.Normal(m, 1.0), gradient=gradient) - 6.0) ** 2


def test_leave_one_out_reduces_variance():
    """For E (z - 6)^2, z ~ N(0.5, 1), and 10 samples: right on average, with a fifth of the variance (here < 1/4).

    One sample's estimate is e (e - c)^2, c = 5.5, of mean -2c and variance 15 + 18 c^2 + c^4 - 4 c^2 = 1353.6; with the
    mean cost 1 + c^2 as baseline 10 + 12 c^2 - 4 c^2 = 252; that the baseline is estimated adds (2 + 4 c^2) / 9 = 14.
    """
    plain, loo = (means(far(g), 0.5, 10) for g in (REINFORCE, vi.Reinforce()))
    without = plain(KEY, 4000)[:, 1].var()
    np.testing.assert_allclose(without, 135.36, rtol=0.15)
    assert loo(KEY, 4000)[:, 1].var() < 0.25 * without
    two_stage_z(loo, np.array([31.25, -11.0]), KEY, 4000)


def test_default_strategies_are_unbiased():
    """k ~ Pois(r) is a score-function site with leave-one-out by default: E k^2 = r^2 + r."""
    cost = means(lambda r: ex.sample("k", dist.Poisson(r)) ** 2.0, 2.0, 4)
    two_stage_z(cost, np.array([6.0, 5.0]), KEY, 4000)


def test_default_strategies_are_unbiased_in_a_chain():
    """k ~ Pois(r), b ~ Bern(exp(-k)): E b = exp(r (1/e - 1)). Catches baselines that differ between Enum's branches."""

    def cost(r: Any) -> Any:
        k = ex.sample("k", dist.Poisson(r))
        return 10.0 * ex.sample("b", dist.Bernoulli(jnp.exp(-k)))

    slope = np.exp(-1.0) - 1.0
    exact = 10.0 * np.exp(slope) * np.array([1.0, slope])
    two_stage_z(means(cost, 1.0, 4), exact, KEY, 4000)


def test_estimate_states_its_error():
    """E x^2 = 1 + m^2 with sd sqrt(2 + 4 m^2) per sample."""
    found = vi.estimate(vi.objective(SPREAD["top level"]), 0.7, KEY, 10_000)
    np.testing.assert_allclose(found.standard_error, np.sqrt(2.0 + 4.0 * 0.49) / 100.0, rtol=0.1)
    assert abs(found.mean - 1.49) < 5.0 * found.standard_error  # false-alarm rate 6e-7
