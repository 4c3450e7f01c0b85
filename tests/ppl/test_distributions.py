"""Every distribution of numpyro as a site, and distributions of users' own and of other libraries.

A case is a function of one parameter in (0, 1); the site must agree with numpyro's own object in shape, dtype and
density, alone, in lanes and in time steps.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpyro.distributions import constraints
from scipy import stats

import expectax as ex
from expectax import dist, vi

KEY = jax.random.key(20260811)
PARAMETERS = np.array([0.3, 0.55, 0.8])
pytestmark = pytest.mark.usefixtures("quick_compiles")


def tril() -> Any:
    return jnp.array([[1.0, 0.0], [0.5, 0.8]])


def matrix() -> Any:
    return jnp.array([[1.0, 0.4], [0.4, 1.0]])


def two(a: Any) -> Any:
    """Two probabilities that sum to one."""
    return jnp.stack([a, 1.0 - a])


CASES: dict[str, Callable[[Any], dist.Distribution]] = {
    "AsymmetricLaplace": lambda a: dist.AsymmetricLaplace(a, 1.0, 0.7),
    "AsymmetricLaplaceQuantile": lambda a: dist.AsymmetricLaplaceQuantile(0.0, 1.0, a),
    "BernoulliLogits": lambda a: dist.Bernoulli(logits=a),
    "BernoulliProbs": lambda a: dist.Bernoulli(a),
    "Beta": lambda a: dist.Beta(a, jnp.array([1.0, 2.0])),
    "BetaBinomial": lambda a: dist.BetaBinomial(a, 2.0, 5),
    "BetaNegativeBinomial": lambda a: dist.BetaNegativeBinomial(2.0, a, 3.0),
    "BetaProportion": lambda a: dist.BetaProportion(a, 3.0),
    "BinomialLogits": lambda a: dist.Binomial(5, logits=a),
    "BinomialProbs": lambda a: dist.Binomial(5, a),
    "CAR": lambda a: dist.CAR(0.0, a, 1.2, jnp.ones((3, 3)) - jnp.eye(3)),
    "CategoricalLogits": lambda a: dist.Categorical(logits=two(a)),
    "CategoricalProbs": lambda a: dist.Categorical(two(a)),
    "Cauchy": lambda a: dist.Cauchy(a, 1.0),
    "Chi2": lambda a: dist.Chi2(a),
    "CirculantNormal": lambda a: dist.CirculantNormal(jnp.zeros(4), jnp.array([1.0, 0.3, 0.1, 0.3]) * a),
    "Dagum": lambda a: dist.Dagum(a, 1.0, 2.0),
    "Delta": lambda a: dist.Delta(a, 0.25),
    "Dirichlet": lambda a: dist.Dirichlet(jnp.stack([a, a + 1.0, a])),
    "DirichletMultinomial": lambda a: dist.DirichletMultinomial(jnp.stack([a, a + 1.0]), 5),
    "DiscreteUniform": lambda a: dist.DiscreteUniform(jnp.int32(jnp.round(a)), 4),
    "DoublyTruncatedPowerLaw": lambda a: dist.DoublyTruncatedPowerLaw(a, 1.0, 3.0),
    "EulerMaruyama": lambda a: dist.EulerMaruyama(
        jnp.linspace(0.0, 1.0, 4), lambda x, t: (-0.5 * x, 0.3 + 0.0 * x), dist.Normal(a, 1.0)
    ),
    "ExpandedDistribution": lambda a: dist.Gamma(a, 2.0).expand([2, 3]),
    "Exponential": lambda a: dist.Exponential(a),
    "FoldedDistribution": lambda a: dist.FoldedDistribution(dist.Normal(a, 1.0)),
    "Gamma": lambda a: dist.Gamma(a, 2.0),
    "GammaPoisson": lambda a: dist.GammaPoisson(a, 1.0),
    "GaussianCopula": lambda a: dist.GaussianCopula(dist.Normal(a * jnp.ones(2), 2.0), matrix()),
    "GaussianRandomWalk": lambda a: dist.GaussianRandomWalk(a, 4),
    "GaussianStateSpace": lambda a: dist.GaussianStateSpace(3, 0.5 * jnp.eye(2), scale_tril=a * tril()),
    "GeometricLogits": lambda a: dist.Geometric(logits=a),
    "GeometricProbs": lambda a: dist.Geometric(a),
    "Gompertz": lambda a: dist.Gompertz(a, 1.0),
    "Gumbel": lambda a: dist.Gumbel(a, 1.0),
    "HalfCauchy": lambda a: dist.HalfCauchy(a),
    "HalfNormal": lambda a: dist.HalfNormal(a),
    "HurdleGamma": lambda a: dist.HurdleGamma(a, 2.0, 1.0),
    "HurdleLogNormal": lambda a: dist.HurdleLogNormal(a, 0.0, 1.0),
    "HurdleLogits": lambda a: dist.HurdleDistribution(dist.Poisson(2.0), gate_logits=a),
    "HurdlePoisson": lambda a: dist.HurdlePoisson(a, 2.0),
    "HurdleProbs": lambda a: dist.HurdleDistribution(dist.Poisson(2.0), gate=a),
    "Independent": lambda a: dist.Normal(a, jnp.array([1.0, 2.0])).to_event(1),
    "InverseGamma": lambda a: dist.InverseGamma(a, 2.0),
    "InverseWishart": lambda a: dist.InverseWishart(a + 2.0, scale_matrix=matrix()),
    "InverseWishartCholesky": lambda a: dist.InverseWishartCholesky(a + 2.0, scale_tril=tril()),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(a, 2.0),
    "LKJ": lambda a: dist.LKJ(3, a),
    "LKJCholesky": lambda a: dist.LKJCholesky(3, a),
    "Laplace": lambda a: dist.Laplace(a, 1.0),
    "LeftCensoredDistribution": lambda a: dist.LeftCensoredDistribution(dist.Normal(a, 1.0), jnp.array(True)),
    "LeftTruncatedDistribution": lambda a: dist.TruncatedNormal(a, 1.0, low=0.5),
    "LeftTruncatedGamma": lambda a: dist.TruncatedGamma(a, 1.0, low=0.5),
    "Levy": lambda a: dist.Levy(a, 1.0),
    "LogNormal": lambda a: dist.LogNormal(a, 1.0),
    "LogUniform": lambda a: dist.LogUniform(a, 2.0),
    "Logistic": lambda a: dist.Logistic(a, 1.0),
    "LowRankMultivariateNormal": lambda a: dist.LowRankMultivariateNormal(
        jnp.zeros(3), a * jnp.ones((3, 1)), jnp.ones(3)
    ),
    "LowerTruncatedPowerLaw": lambda a: dist.LowerTruncatedPowerLaw(-a - 1.0, 1.0),
    "MaskedDistribution": lambda a: dist.Normal(a, 1.0).expand([2]).mask(np.array([True, False])),
    "MatrixNormal": lambda a: dist.MatrixNormal(a * jnp.ones((2, 2)), tril(), tril()),
    "MixtureGeneral": lambda a: dist.MixtureGeneral(
        dist.Categorical(two(a)), [dist.Normal(0.0, 1.0), dist.StudentT(3.0, a, 1.0)]
    ),
    "MixtureSameFamily": lambda a: dist.MixtureSameFamily(
        dist.Categorical(two(a)), dist.Normal(jnp.array([-1.0, 2.0]), 1.0)
    ),
    "MultinomialLogits": lambda a: dist.Multinomial(5, logits=two(a)),
    "MultinomialProbs": lambda a: dist.Multinomial(5, two(a)),
    "MultivariateNormal": lambda a: dist.MultivariateNormal(a * jnp.ones((3, 2)), scale_tril=tril()),
    "MultivariateNormal covariance": lambda a: dist.MultivariateNormal(jnp.zeros(2), a * matrix()),
    "MultivariateNormal precision": lambda a: dist.MultivariateNormal(jnp.zeros(2), precision_matrix=a * matrix()),
    "MultivariateNormal kernel": lambda a: dist.MultivariateNormal(
        jnp.zeros(4), jnp.exp(-(jnp.subtract.outer(jnp.arange(4.0), jnp.arange(4.0)) ** 2) / a) + 0.1 * jnp.eye(4)
    ),
    "MultivariateStudentT": lambda a: dist.MultivariateStudentT(a + 3.0, jnp.zeros(2), tril()),
    "NegativeBinomial2": lambda a: dist.NegativeBinomial2(a, 2.0),
    "NegativeBinomialLogits": lambda a: dist.NegativeBinomialLogits(3.0, a),
    "NegativeBinomialProbs": lambda a: dist.NegativeBinomialProbs(3.0, a),
    "Normal": lambda a: dist.Normal(a, jnp.array([[1.0], [2.0]])),
    "OrderedLogistic": lambda a: dist.OrderedLogistic(a, jnp.array([-1.0, 1.0])),
    "Pareto": lambda a: dist.Pareto(a, 2.0),
    "Poisson": lambda a: dist.Poisson(a),
    "ProjectedNormal": lambda a: dist.ProjectedNormal(jnp.stack([a, 1.0 + a, 0.0 * a])),
    "RelaxedBernoulliLogits": lambda a: dist.RelaxedBernoulli(0.5, logits=a),
    "RightCensoredDistribution": lambda a: dist.RightCensoredDistribution(dist.Weibull(a, 1.0), jnp.array(True)),
    "RightTruncatedDistribution": lambda a: dist.TruncatedCauchy(a, 1.0, high=0.5),
    "RightTruncatedGamma": lambda a: dist.TruncatedGamma(a, 1.0, high=0.5),
    "SineBivariateVonMises": lambda a: dist.SineBivariateVonMises(0.0, 1.0, 2.0, 2.0, correlation=a),
    "SineSkewed": lambda a: dist.SineSkewed(
        dist.VonMises(jnp.zeros(2), 1.0).to_event(1), jnp.stack([0.5 * a, -0.5 * a])
    ),
    "SoftLaplace": lambda a: dist.SoftLaplace(a, 1.0),
    "StudentT": lambda a: dist.StudentT(a + 2.0, 0.0, 1.0),
    "TransformedDistribution": lambda a: dist.TransformedDistribution(
        dist.Normal(a, 1.0), [dist.transforms.SigmoidTransform(), dist.transforms.AffineTransform(1.0, 2.0)]
    ),
    "TruncatedPolyaGamma": lambda a: dist.TruncatedPolyaGamma(),
    "TwoSidedTruncatedDistribution": lambda a: dist.TruncatedNormal(a, 1.0, low=-0.5, high=0.5),
    "TwoSidedTruncatedGamma": lambda a: dist.TruncatedGamma(a, 1.0, low=0.5, high=1.5),
    "Uniform": lambda a: dist.Uniform(a, 2.0),
    "VonMises": lambda a: dist.VonMises(a, 1.0),
    "Weibull": lambda a: dist.Weibull(a, 1.5),
    "Wishart": lambda a: dist.Wishart(a + 2.0, scale_matrix=matrix()),
    "WishartCholesky": lambda a: dist.WishartCholesky(a + 2.0, scale_tril=tril()),
    "ZeroInflatedLogits": lambda a: dist.ZeroInflatedDistribution(dist.Poisson(2.0), gate_logits=a),
    "ZeroInflatedPoisson": lambda a: dist.ZeroInflatedPoisson(a, 2.0),
    "ZeroInflatedProbs": lambda a: dist.ZeroInflatedDistribution(dist.Geometric(a), gate=0.3),
    "ZeroSumNormal": lambda a: dist.ZeroSumNormal(a, (3,)),
}
LEFT_OUT = {
    "Distribution": "the abstract base",
    "GaussianCopulaBeta": "its draws need tensorflow_probability",
    "ImproperUniform": "has no draws; see below",
    "IntervalCensoredDistribution": "numpyro scores pairs (left, right), but its shape and draws are of one number",
    "Unit": "a factor, not a choice: its event is empty; see ex.factor",
}


def test_no_distribution_is_forgotten():
    classes = {n for n, thing in vars(dist).items() if inspect.isclass(thing) and issubclass(thing, dist.Distribution)}
    assert classes == {name.split()[0] for name in CASES} | set(LEFT_OUT)
    for name, make in CASES.items():
        assert type(jax.eval_shape(make, jnp.float32(0.5))).__name__ == name.split()[0]


# --- alone, in lanes, in time ------------------------------------------------------------------------------------------


@ex.model
def one(make, a):
    return ex.sample("x", make(a))


@ex.model
def lanes(make, a):
    return jax.vmap(lambda a: ex.sample("x", make(a)))(a)


@ex.model
def steps(make, a):
    return lax.scan(lambda c, a: (c, ex.sample("x", make(a))), None, a)[1]


THIN = "Dirichlet InverseWishart LKJ LKJCholesky ProjectedNormal Wishart ZeroSumNormal".split()  # float32 is too wide


@functools.cache
def drawn(name: str) -> Any:
    """Return a draw at the largest parameter, where supports are smallest, its density, and that by numpyro."""
    make = CASES[name]

    @jax.jit
    def run(key: Any, a: Any) -> Any:
        trace = one(make, a).simulate(key)
        return trace["x"], trace.log_density, jnp.sum(make(a).log_prob(trace["x"]))

    with jax.enable_x64(name in THIN):
        return jax.tree.map(np.asarray, run(KEY, PARAMETERS[-1]))


@pytest.mark.parametrize("name", CASES)
def test_one_site(name):
    make, a, (x, density, expected) = CASES[name], PARAMETERS[-1], drawn(name)
    with jax.enable_x64(name in THIN):
        d, own = jax.eval_shape(lambda a, key: (make(a), make(a).sample(key)), a, KEY)
        assert x.shape == own.shape == d.shape() == d.batch_shape + d.event_shape
        assert x.dtype == own.dtype == one(make, a).sites()["x"].dtype
    assert np.isfinite(expected)
    np.testing.assert_allclose(density, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_lanes_and_steps_are_a_loop(name, x64):
    """The parameter differs between lanes, and so between time steps; the value is one draw."""
    make, a = CASES[name], jnp.asarray(PARAMETERS)
    x = jnp.stack([drawn(name)[0]] * 3)
    x = x.astype(float if jnp.issubdtype(x.dtype, jnp.floating) else int)

    @jax.jit
    def run(x: Any) -> Any:
        found = [model(make, a).assess({"x": x})[0] for model in (lanes, steps)]
        return found, jnp.sum(lax.map(lambda row: jnp.sum(make(row[0]).log_prob(row[1])), (a, x)))

    found, expected = run(x)
    assert lanes(make, a).sites()["x"].shape == steps(make, a).sites()["x"].shape == x.shape
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MixtureSameFamily", "LKJCholesky", "LeftTruncatedDistribution"])
@pytest.mark.parametrize("model", [lanes, steps])
def test_draws_in_lanes_and_steps(name, model, x64):
    """Their density is a loop's, and no two share noise."""
    trace = jax.jit(lambda key: model(CASES[name], jnp.full(3, 0.5)).simulate(key))(KEY)
    density = jax.jit(lambda x: jnp.sum(CASES[name](0.5).log_prob(x)))
    np.testing.assert_allclose(trace.log_density, sum(density(x) for x in trace["x"]), rtol=1e-10)
    assert len(np.unique(trace["x"].reshape(3, -1), axis=0)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["expand", "expand to_event", "expand mask", "expand mask to_event"])
@pytest.mark.parametrize("name", ["Normal", "MultivariateNormal covariance"])
def test_wrappers_in_lanes(name, wrap, x64):
    mask = np.array([True, False])

    def make(a: Any) -> Any:
        d = CASES[name](a)
        d = d.expand([2, *d.batch_shape])
        d = d.mask(jnp.reshape(mask, (2,) + (1,) * (len(d.batch_shape) - 1))) if "mask" in wrap else d
        return d.to_event(1) if "to_event" in wrap else d

    a = jnp.asarray(PARAMETERS)
    trace = jax.jit(lambda key: lanes(make, a).simulate(key))(KEY)
    assert trace["x"].shape == (3, *make(a[0]).shape())
    per_row = jax.jit(lambda x: lax.map(lambda row: CASES[name](row[0]).log_prob(row[1]), (a, x)))(trace["x"])
    kept = [np.sum(np.asarray(rows)[mask] if "mask" in wrap else rows) for rows in per_row]
    np.testing.assert_allclose(trace.log_density, sum(kept), rtol=1e-10)
    np.testing.assert_allclose(jax.jit(lambda c: lanes(make, a).assess(c)[0])(trace.choices), sum(kept), rtol=1e-10)


def test_improper_uniform_has_a_density_but_no_draws(x64):
    @ex.model
    def flat():
        x = ex.sample("x", dist.ImproperUniform(constraints.positive, (2,), ()))
        ex.sample("y", dist.Normal(x, 1.0))

    y = jnp.array([0.5, 1.0])
    posterior = flat().given({"y": y})
    np.testing.assert_allclose(posterior.log_density({"x": y}), 2 * stats.norm.logpdf(0.0), rtol=1e-12)
    assert jax.jit(posterior.log_density)({"x": -y}) == -np.inf
    with pytest.raises(ex.ppl.DistributionError, match="'x'.*cannot be drawn"):
        flat().simulate(KEY)


# --- a user's own ---------------------------------------------------------------------------------------------------------

Exponentials = ex.distribution(  # a vector event, positive
    lambda key, rate: jax.random.exponential(key, (2,)) / rate,
    lambda x, rate: 2 * jnp.log(rate) - rate * x.sum(),
    support=constraints.positive,
)
Shifted = ex.distribution(  # a scalar event; its parameters are a dict and a number
    lambda key, p, shift: shift + p["scale"] * jax.random.normal(key),
    lambda x, p, shift: jax.scipy.stats.norm.logpdf(x, shift, p["scale"]),
)
OWN = {
    "vector": (lambda a: Exponentials(a), lambda x, a: stats.expon.logpdf(x, scale=1 / a).sum(), (2,)),
    "scalar": (lambda a: Shifted({"scale": a}, 1.5), lambda x, a: stats.norm.logpdf(x, 1.5, a), ()),
    "fixed": (lambda a: Shifted({"scale": 0.5}, a), lambda x, a: stats.norm.logpdf(x, a, 0.5), ()),
}


@pytest.mark.parametrize("name", OWN)
def test_own_distributions(name, x64):
    make, density, event = OWN[name]
    a, trace = jnp.asarray(PARAMETERS), one(make, PARAMETERS[0]).simulate(KEY)
    assert trace["x"].shape == event
    np.testing.assert_allclose(trace.log_density, density(trace["x"], a[0]), rtol=1e-10)
    for model in (lanes, steps):
        trace = model(make, a).simulate(KEY)
        assert trace["x"].shape == (3, *event) and len(np.unique(trace["x"])) == trace["x"].size
        expected = sum(density(np.asarray(trace["x"][i]), PARAMETERS[i]) for i in range(3))
        np.testing.assert_allclose([trace.log_density, model(make, a).assess(trace.choices)[0]], expected, rtol=1e-10)
        gradient = jax.grad(lambda a, t=trace, m=model: m(make, a).assess(t.choices)[0])(a)
        total = lambda b, t=trace: sum(density(np.asarray(t["x"][i]), b[i]) for i in range(3))  # noqa: E731
        numeric = [(total(PARAMETERS + s) - total(PARAMETERS - s)) / 2e-6 for s in 1e-6 * np.eye(3)]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


def test_own_support_is_checked_and_left(x64):
    program = one(OWN["vector"][0], jnp.float64(0.7))
    with pytest.raises(ex.ppl.SupportError, match="'x'.*index.*1"):
        program.assess({"x": jnp.array([1.0, -1.0])})
    assert jax.jit(lambda x: program.assess({"x": x})[0])(jnp.array([1.0, -1.0])) == -np.inf
    posterior, x = program.given({}), jnp.array([0.5, 2.0])
    u = posterior.unconstrain({"x": x})
    np.testing.assert_allclose(u["x"], np.log(x), atol=1e-12)
    expected = stats.expon.logpdf(x, scale=1 / 0.7).sum() + np.log(x).sum()
    np.testing.assert_allclose(posterior.unconstrained_log_density(u), expected, rtol=1e-10)


def test_own_log_density_must_be_a_scalar():
    wrong = ex.distribution(lambda key: jnp.zeros(2), lambda x: x)
    with pytest.raises(ex.ppl.DistributionError, match=r"\(2,\).*must return a scalar"):
        ex.model(lambda: ex.sample("x", wrong()))().simulate(KEY)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loc"], meta_fields=[])
@dataclasses.dataclass
class Plain:
    """A class with `sample` and `log_prob`, and nothing of numpyro."""

    loc: Any

    def sample(self, key: Any) -> Any:
        return self.loc + jax.random.normal(key, (2,))

    def log_prob(self, value: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(value, self.loc).sum()


class Module(eqx.Module):
    """The same as an equinox Module, with a Python number, a function and a flag among its fields."""

    loc: Any
    squash: Callable[[Any], Any]
    width: int
    flag: bool = eqx.field(static=True, default=True)

    def sample(self, key: Any) -> Any:
        return self.squash(self.loc) + jax.random.normal(key, (self.width,))

    def log_prob(self, value: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(value, self.squash(self.loc)).sum()


@pytest.mark.parametrize("make, centre", [(Plain, lambda a: a), (lambda a: Module(a, jnp.tanh, 2), np.tanh)])
@pytest.mark.parametrize("model", [lanes, steps])
def test_objects_with_sample_and_log_prob(make, centre, model, x64):
    a = jnp.asarray(PARAMETERS)
    trace = model(make, a).simulate(KEY)
    assert trace["x"].shape == (3, 2) and len(np.unique(trace["x"])) == 6
    expected = stats.norm.logpdf(trace["x"], centre(PARAMETERS)[:, None]).sum()
    np.testing.assert_allclose([trace.log_density, model(make, a).assess(trace.choices)[0]], expected, rtol=1e-10)


def test_a_flow_is_a_site_and_a_guide(x64):
    flows = pytest.importorskip("flowjax.flows")
    base = pytest.importorskip("flowjax.distributions").Normal(jnp.zeros(2))
    flow = flows.masked_autoregressive_flow(KEY, base_dist=base, flow_layers=2, nn_width=4, nn_depth=1)
    arrays, rest = eqx.partition(flow, eqx.is_inexact_array)
    site = ex.model(lambda arrays: ex.sample("x", eqx.combine(arrays, rest)))
    in_steps = ex.model(lambda: lax.scan(lambda c, _: (c, ex.sample("x", flow)), None, None, length=3)[1])
    in_lanes = ex.model(lambda: jax.vmap(lambda _: ex.sample("x", flow))(jnp.arange(3)))
    for program in (site(arrays), ex.model(lambda flow: ex.sample("x", flow))(flow), in_steps(), in_lanes()):
        trace = program.simulate(KEY)
        density = jnp.sum(flow.log_prob(trace["x"]))
        np.testing.assert_allclose([trace.log_density, program.assess(trace.choices)[0]], density, rtol=1e-10)

    @vi.objective
    def bound(arrays):
        z, log_q = vi.simulate(site(arrays))
        return log_q - jnp.sum(eqx.combine(arrays, rest).log_prob(z["x"]))

    value, gradient = vi.value_and_grad(bound)(arrays, KEY)
    np.testing.assert_allclose(value, 0.0, atol=1e-10)  # log q is flowjax's own
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# --- distributions by logits ------------------------------------------------------------------------------------------

BY_LOGITS = {
    "bernoulli": lambda x: dist.Bernoulli(logits=x),
    "to_event": lambda x: dist.Bernoulli(logits=x * jnp.ones(2)).to_event(1),
    "expanded": lambda x: dist.Bernoulli(logits=x).expand([2]),
    "masked": lambda x: dist.Bernoulli(logits=x * jnp.ones(2)).mask(jnp.array([True, False])),
    "binomial": lambda x: dist.Binomial(5, logits=x),
    "mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Bernoulli(logits=jnp.stack([x, 2.0 * x]))
    ),
    "zero-inflated": lambda x: dist.ZeroInflatedDistribution(dist.Binomial(5, logits=x), gate=0.2),
}


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("logit", [0.0, 0.7, -30.0])
def test_densities_by_logits_and_their_derivatives(x64, name, value, logit):
    """Values are numpyro's; the derivative at 0, where numpyro's is wrong, is that of the finite difference.

    Catches: a derivative of 0 or 1 in the place of a half.
    """
    program = ex.model(lambda x: ex.sample("y", BY_LOGITS[name](x)))
    y = jnp.full(jnp.shape(jax.eval_shape(lambda: BY_LOGITS[name](logit).sample(jax.random.key(0)))), value)

    def density(x):
        return program(x).assess({"y": y})[0]

    np.testing.assert_allclose(
        density(jnp.asarray(logit)), BY_LOGITS[name](logit).log_prob(y).sum(), rtol=1e-12, atol=1e-14
    )
    step = 1e-5
    difference = (density(jnp.asarray(logit + step)) - density(jnp.asarray(logit - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(density)(jnp.asarray(logit)), difference, rtol=1e-7, atol=1e-8)


def test_infinite_logits_are_certain(x64):
    from expectax.ppl._log_prob import log_prob

    for logit, value in ((np.inf, 1), (-np.inf, 0)):
        coin = dist.Bernoulli(logits=logit, validate_args=False)
        several = dist.Binomial(5, logits=logit, validate_args=False)
        for y in (value, float(value)):
            assert log_prob(coin, jnp.asarray(y)) == 0.0 and log_prob(coin, jnp.asarray(1 - y)) == -np.inf
        assert log_prob(several, 5 * value) == 0.0 and log_prob(several, 3) == -np.inf


def test_a_relaxed_coin_is_linear_in_its_value(x64):
    """What a relaxation differentiates: y l - log(1 + e^l), in y and in l, at both ends too."""
    from expectax.ppl._log_prob import log_prob

    for y, logit in ((0.0, 0.0), (1.0, 0.3), (0.4, 0.0)):
        by_y, by_logit = jax.grad(lambda y, x: log_prob(dist.Bernoulli(logits=x), y), (0, 1))(y, logit)
        np.testing.assert_allclose((by_y, by_logit), (logit, y - 1 / (1 + np.exp(-logit))), rtol=1e-12, atol=1e-15)
