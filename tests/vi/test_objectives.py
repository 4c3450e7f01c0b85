"""The shipped objectives, objectives written by users, what they refuse, and two fits from end to end."""

import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

import expectax as ex
from expectax import dist, vi
from expectax.ppl import AddressError, ControlFlowError, ExpectaxError, ShapeError, StrategyError, SupportError
from helpers import two_stage_z

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(20260801)

# --- a conjugate normal: z ~ N(0, 1), y ~ N(z, 1), y = 1.2; the posterior is N(0.6, 1/2) ------------------------------

Y = 1.2
LOG_EVIDENCE = float(stats.norm.logpdf(Y, 0.0, math.sqrt(2.0)))


@ex.model
def normal():
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Normal(z, 1.0))


@ex.model
def guide(params):
    ex.sample("z", dist.Normal(params["mean"], jnp.exp(params["log_sd"])))


posterior = normal().given({"y": Y})
OFF = {"mean": 0.1, "log_sd": 0.2}


def kl(mean: float, sd: float, mean0: float, sd0: float) -> float:
    return math.log(sd0 / sd) + (sd**2 + (mean - mean0) ** 2) / (2.0 * sd0**2) - 0.5


def samples(objective: Any, params: Any, derivative: bool = False) -> Any:
    """Return a sampler of the objective's estimates for `two_stage_z`, with their gradients if asked."""
    estimate = jax.value_and_grad(objective.surrogate) if derivative else objective.surrogate
    params = jax.tree.map(jnp.asarray, params)
    run = jax.jit(jax.vmap(lambda k: jnp.stack(jax.tree.leaves(estimate(params, k)))))
    return lambda key, n: run(jax.random.split(key, n))


def test_elbo_is_tight_at_the_posterior():
    """Every single sample of the ELBO is then the log evidence: catches a density scored twice or not at all."""
    exact = {"mean": Y / 2.0, "log_sd": -0.5 * math.log(2.0)}
    found = np.asarray(samples(vi.elbo(posterior, guide), exact)(KEY, 100))
    np.testing.assert_allclose(found, LOG_EVIDENCE, rtol=1e-5)


def test_elbo_is_log_evidence_minus_divergence():
    r"""$\log Z - KL$, and its gradient $-((m - 0.6) / 0.5, s^2 / 0.5 - 1)$ by (mean, log sd)."""
    mean, sd = OFF["mean"], math.exp(OFF["log_sd"])
    value = LOG_EVIDENCE - kl(mean, sd, Y / 2.0, math.sqrt(0.5))
    gradient = {"log_sd": 1.0 - 2.0 * sd**2, "mean": -2.0 * (mean - Y / 2.0)}  # leaves are in order of their names
    two_stage_z(samples(vi.elbo(posterior, guide), OFF, True), np.array([value, *gradient.values()]), KEY, 20_000)


def test_iwelbo_grows_to_the_log_evidence():
    """With one particle it is the ELBO; each step up is tested at 5 sd (false-alarm rate 3e-7 each)."""
    found = [vi.estimate(vi.iwelbo(posterior, guide, n), OFF, KEY, 20_000) for n in (1, 2, 8, 64)]
    mean, sd = OFF["mean"], math.exp(OFF["log_sd"])
    assert abs(found[0].mean - LOG_EVIDENCE + kl(mean, sd, Y / 2.0, math.sqrt(0.5))) < 5.0 * found[0].standard_error
    for low, high in zip(found, found[1:], strict=False):
        assert high.mean > low.mean - 5.0 * math.hypot(low.standard_error, high.standard_error)
    assert found[1].mean > found[0].mean + 5.0 * math.hypot(found[0].standard_error, found[1].standard_error)
    assert all(bound.mean < LOG_EVIDENCE + 5.0 * bound.standard_error for bound in found)
    assert found[-1].mean > LOG_EVIDENCE - 0.02


@vi.objective
def my_iwelbo(params):
    def particle(_):
        z, log_q = vi.simulate(guide(params))
        return vi.log_density(posterior, z) - log_q

    return jax.nn.logsumexp(jax.vmap(particle)(jnp.arange(5))) - jnp.log(5)


def test_user_written_objective_equals_the_shipped_one():
    """Value and gradient agree in law: the mean difference of independent runs is 0."""
    mine, shipped = samples(my_iwelbo, OFF, True), samples(vi.iwelbo(posterior, guide, 5), OFF, True)

    def difference(key: Any, n: int) -> Any:
        return mine(key, n) - shipped(jax.random.fold_in(key, 1), n)

    two_stage_z(difference, np.zeros(3), KEY, 20_000)


def test_several_samples_are_averaged_inside_the_derivative():
    """vi.value_and_grad is the derivative of the mean surrogate; parameters that are not floats get no gradient."""
    params = {"mean": jnp.asarray(0.1), "log_sd": jnp.asarray(0.2), "count": 3, "label": "a", "index": jnp.arange(2)}
    value, gradient = vi.value_and_grad(vi.elbo(posterior, guide))(params, KEY, 4)
    assert gradient["count"] is gradient["label"] is gradient["index"] is None
    floats = {k: params[k] for k in ("mean", "log_sd")}
    expected = jax.jit(jax.value_and_grad(lambda p: vi.elbo(posterior, guide).surrogate(p, KEY, 4)))(floats)
    np.testing.assert_allclose([value, gradient["mean"]], [expected[0], expected[1]["mean"]], rtol=1e-5)


# --- refusals: a typed error with the address and this file's line ----------------------------------------------------

LINES = pathlib.Path(__file__).read_text().splitlines()


def line(mark: str) -> str:
    """Return `test_objectives.py:n` for the line that ends in the comment `# <mark>`."""
    (number,) = [n for n, text in enumerate(LINES, 1) if text.endswith(f"# {mark}")]
    return f"test_objectives.py:{number}"


@ex.model
def two():
    a = ex.sample("a", dist.HalfCauchy(1.0))
    b = ex.sample("b", dist.Normal(jnp.zeros(3), a))  # the model's b
    ex.sample("y", dist.Normal(b, 1.0))


TWO = two().given({"y": jnp.zeros(3)})


@ex.model
def missing(_):
    ex.sample("a", dist.LogNormal(0.0, 1.0))


@ex.model
def extra(_):
    ex.sample("a", dist.LogNormal(0.0, 1.0))
    ex.sample("b", dist.Normal(jnp.zeros(3), 1.0))
    ex.sample("c", dist.Normal(0.0, 1.0))  # extra


@ex.model
def misspelt(_):
    ex.sample("a", dist.LogNormal(0.0, 1.0))
    ex.sample("bb", dist.Normal(jnp.zeros(3), 1.0))  # misspelt


@ex.model
def misshapen(_):
    ex.sample("a", dist.LogNormal(0.0, 1.0))
    ex.sample("b", dist.Normal(0.0, 1.0))  # misshapen


@ex.model
def too_wide(_):
    ex.sample("a", dist.Normal(0.0, 1.0))  # too wide
    ex.sample("b", dist.Normal(jnp.zeros(3), 1.0))


@ex.model
def observing(_):
    ex.sample("a", dist.LogNormal(0.0, 1.0))
    ex.sample("b", dist.Normal(jnp.zeros(3), 1.0))
    ex.sample("y", dist.Normal(jnp.zeros(3), 1.0))  # observing


GUIDES = [
    (missing, AddressError, "'b'", "the model's b"),
    (extra, AddressError, "'c'", "extra"),
    (misspelt, AddressError, "'bb'.*Did you mean 'b'", "misspelt"),
    (misshapen, ShapeError, r"'b'.*\(\).*\(3,\)", "misshapen"),
    (too_wide, SupportError, "'a'.*LogNormal", "too wide"),
    (observing, AddressError, "'y'.*observes", "observing"),
]


@pytest.mark.parametrize("bound", [vi.elbo, lambda p, g: vi.iwelbo(p, g, 2)], ids=["elbo", "iwelbo"])
@pytest.mark.parametrize(("bad", "error", "says", "mark"), GUIDES, ids=[g[0].__name__ for g in GUIDES])
def test_guides_that_do_not_fit_are_refused(bound, bad, error, says, mark):
    """Each of these gave another system a silently different objective."""
    with pytest.raises(error, match=re.compile(says, re.DOTALL)) as caught:
        vi.value_and_grad(bound(TWO, bad))(0.0, KEY)
    assert line(mark) in str(caught.value)


def bernoulli(p, gradient):
    return 1.0 * ex.sample("b", dist.Bernoulli(p), gradient=gradient)  # strategy


def poisson(p, gradient):
    return 1.0 * ex.sample("b", dist.Poisson(p), gradient=gradient)  # unbounded


def many_lanes(p, gradient):
    b = jax.vmap(lambda _: ex.sample("b", dist.Bernoulli(p), gradient=gradient))(jnp.arange(13))  # lanes
    return jnp.sum(b, dtype=float)


def many_steps(p, gradient):
    def step(c, _):
        return c + ex.sample("b", dist.Bernoulli(p), gradient=gradient), None  # steps

    return 1.0 * lax.scan(step, 0, None, length=13)[0]


STRATEGIES = [
    (bernoulli, vi.Reparam(), "no differentiable sampler", "strategy"),
    (poisson, vi.Enum(), "no finite support", "unbounded"),
    (bernoulli, "reinforce", "'reinforce'", "strategy"),
]


@pytest.mark.parametrize(("cost", "gradient", "says", "mark"), STRATEGIES)
def test_strategies_that_do_not_fit_are_refused(cost, gradient, says, mark):
    with pytest.raises(StrategyError, match=says) as caught:
        vi.value_and_grad(vi.objective(lambda p: cost(p, gradient)))(0.3, KEY)
    assert "'b'" in str(caught.value)
    assert line(mark) in str(caught.value)


@pytest.mark.parametrize("cost", [many_lanes, many_steps])
def test_more_elements_than_can_be_enumerated_jointly(cost):
    """13 flips: by lanes, or one at a time; the sum's gradient is 13 without variance either way."""
    gradient = vi.value_and_grad(vi.objective(lambda p: cost(p, vi.Enum())))(0.3, KEY)[1]
    np.testing.assert_allclose(gradient, 13.0, rtol=1e-5)


def endless(p):
    def again(k):
        return k + ex.sample("b", dist.Bernoulli(p))

    return 1.0 * lax.while_loop(lambda k: k < 2, again, 0)  # endless


def inside_a_derivative(p):
    return jax.grad(lambda m: ex.sample("b", dist.Normal(m, 1.0)) ** 2)(p)  # derivative


PLACES = [
    (endless, "endless"),
    (inside_a_derivative, "derivative"),
]


@pytest.mark.parametrize(("cost", "mark"), PLACES)
def test_places_that_cannot_be_followed_are_refused(cost, mark):
    with pytest.raises(ControlFlowError) as caught:
        vi.value_and_grad(vi.objective(cost))(0.3, KEY)
    assert line(mark) in str(caught.value)


def test_other_refusals():
    def vector(p):
        return ex.sample("b", dist.Normal(p, 1.0)) * jnp.ones(2)

    with pytest.raises(ShapeError, match=r"vector.*scalar.*\(2,\)"):
        vi.value_and_grad(vi.objective(vector))(0.3, KEY)
    with pytest.raises(TypeError, match="posterior"):
        vi.elbo(normal(), guide)
    with pytest.raises(ValueError, match="num_particles"):
        vi.iwelbo(posterior, guide, 0)
    with pytest.raises(TypeError, match="bound model"):
        vi.simulate(guide)
    with pytest.raises(TypeError, match="typed key"):
        vi.value_and_grad(vi.elbo(posterior, guide))(OFF, 0)
    with pytest.raises(ExpectaxError, match="outside a model"):
        ex.sample("b", dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="num_samples"):
        vi.estimate(vi.elbo(posterior, guide), OFF, KEY, 1)


# --- fits -------------------------------------------------------------------------------------------------------------


def ascend(objective: Any, params: Any, rate: float, steps: int, num_samples: int = 1) -> Any:
    """Plain gradient ascent, compiled as one scan."""
    estimator = vi.value_and_grad(objective)

    def step(params: Any, key: Any) -> Any:
        value, gradient = estimator(params, key, num_samples)
        return jax.tree.map(lambda p, g: p + rate * g, params, gradient), value

    return jax.jit(lambda params, keys: lax.scan(step, params, keys)[0])(params, jax.random.split(KEY, steps))


def test_bernoulli_latent_is_fitted():
    """z ~ Bern(1/2), y ~ N(3 z, 1), y = 4.2: P(z = 1 | y) = sigmoid(3 y - 4.5) = 0.9997. No noise: z is enumerated."""

    @ex.model
    def switch():
        z = ex.sample("z", dist.Bernoulli(0.5))
        ex.sample("y", dist.Normal(3.0 * z, 1.0))

    @ex.model
    def q(logit):
        ex.sample("z", dist.Bernoulli(logits=logit))

    objective = vi.elbo(switch().given({"y": 4.2}), q)
    logit = ascend(objective, jnp.asarray(0.0), rate=5.0, steps=1000)
    assert abs(special.expit(logit) - special.expit(3.0 * 4.2 - 4.5)) < 1e-3
    evidence = np.log(0.5 * stats.norm.pdf(4.2) + 0.5 * stats.norm.pdf(4.2, 3.0))
    found = vi.estimate(objective, jnp.asarray(3.0 * 4.2 - 4.5), KEY, 10)
    np.testing.assert_allclose([found.mean, found.standard_error], [evidence, 0.0], rtol=1e-4, atol=1e-5)


def test_noisy_cone_of_the_paper():
    """x, y ~ N(0, 10), r = x^2 + y^2, z ~ N(r, 0.1 + r / 100), z = 5: the ELBO ends at -8.08; log p(z) = -5.3232."""

    @ex.model
    def cone():
        x = ex.sample("x", dist.Normal(0.0, 10.0))
        y = ex.sample("y", dist.Normal(0.0, 10.0))
        r = x**2 + y**2
        ex.sample("z", dist.Normal(r, 0.1 + r / 100.0))

    @ex.model
    def q(phi):
        ex.sample("x", dist.Normal(phi[0], jnp.exp(phi[2])))
        ex.sample("y", dist.Normal(phi[1], jnp.exp(phi[3])))

    objective = vi.elbo(cone().given({"z": 5.0}), q)
    phi = ascend(objective, jnp.array([3.0, 0.0, 1.0, 1.0]), rate=1e-3, steps=5000, num_samples=64)
    found = vi.estimate(objective, phi, KEY, 50_000)
    assert abs(found.mean + 8.08) < 0.1
    assert found.mean + 5.0 * found.standard_error < -5.3232
