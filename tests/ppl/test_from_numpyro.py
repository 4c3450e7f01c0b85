"""`from_numpyro`: on NumPyro's own draws, the density is NumPyro's; so are names, shapes and derivatives.

The oracle is `numpyro.infer.util.log_density` (and `potential_energy` in unconstrained space). The models are of the
kinds in NumPyro's gallery, and a few that hold every statement in odd places.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import log_density, potential_energy

from expectax import dist, inference
from expectax.ppl import AddressError, ControlFlowError, DistributionError, ShapeError
from expectax.ppl._numpyro import from_numpyro

pytestmark = pytest.mark.usefixtures("quick_compiles")
RANDOM = np.random.default_rng(20240601)
normal, counts = lambda *shape: RANDOM.normal(size=shape), lambda *shape: RANDOM.poisson(2.0, size=shape)  # noqa: E731


def eight_schools(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(sigma)):
        raw = numpyro.sample("raw", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * raw)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)
    return theta


def batting(at_bats, y=None):
    mean = numpyro.sample("mean", dist.Uniform(0, 1))
    strength = numpyro.sample("strength", dist.Pareto(1, 1.5))
    with numpyro.plate("players", len(at_bats)):
        chance = numpyro.sample("chance", dist.Beta(mean * strength, (1 - mean) * strength))
        numpyro.sample("y", dist.Binomial(at_bats, probs=chance), obs=y)


def robust_line(x, y=None):
    slope, offset = numpyro.sample("line", dist.Normal(0, 2), sample_shape=(2,))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    freedom = numpyro.sample("freedom", dist.Gamma(2, 0.1))
    numpyro.sample("y", dist.StudentT(freedom, offset + slope * x, scale), obs=y)


def logistic(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    offset = numpyro.sample("offset", dist.Cauchy(0, 1))
    with numpyro.plate("rows", len(x), subsample_size=len(x)) as rows:
        numpyro.sample("y", dist.Bernoulli(logits=(x @ weights + offset)[rows]), obs=y)


def mixture(n, y=None):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    centres = dist.Normal(jnp.zeros(3), 3).to_event(1)
    means = numpyro.sample("means", dist.TransformedDistribution(centres, dist.transforms.OrderedTransform()))
    with numpyro.plate("parts", 3):
        scales = numpyro.sample("scales", dist.LogNormal(0, 0.5))
    with numpyro.plate("rows", n):
        numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales)), obs=y)


def local_level(steps, y=None):
    drift = numpyro.sample("drift", dist.HalfNormal(1))

    def step(level, flow):
        level = numpyro.sample("level", dist.Normal(level, drift))
        numpyro.deterministic("twice", 2 * level)
        return level, numpyro.sample("y", dist.Normal(level, 0.5), obs=flow)

    return scan(step, jnp.zeros(()), y, length=steps)


def volatility(steps, y=None):
    scale = numpyro.sample("scale", dist.Exponential(10.0))
    freedom = numpyro.sample("freedom", dist.Exponential(0.1))
    path = numpyro.sample("path", dist.GaussianRandomWalk(scale, num_steps=steps))
    numpyro.sample("y", dist.StudentT(freedom, 0.0, jnp.exp(path)), obs=y)


def varying_intercepts(x, y=None):
    years, counties = x.shape
    centre = numpyro.sample("centre", dist.Normal(0, 1))
    rows, columns = numpyro.plate("years", years, dim=-2), numpyro.plate("counties", counties, dim=-1)
    with rows:
        trend = numpyro.sample("trend", dist.Normal(centre, 1))
    with columns:
        intercept = numpyro.sample("intercept", dist.Normal(centre, 0.3))
    with columns, rows:
        scale = numpyro.sample("scale", dist.Gamma(3, 3))
        numpyro.sample("y", dist.Normal(intercept + trend * x, scale), obs=y)


def censored(x, limit, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    lines, seen = dist.Normal(slope * x, scale), x < limit
    with numpyro.plate("rows", len(x)):
        with handlers.mask(mask=seen):
            numpyro.sample("y", lines, obs=y)
        numpyro.factor("beyond", jnp.where(seen, 0.0, jnp.log1p(-lines.cdf(limit))))


def neural_net(x, y=None):
    inner = numpyro.sample("inner", dist.Normal(jnp.zeros((x.shape[1], 4)), 1).to_event(2))
    outer = numpyro.sample("outer", dist.Normal(jnp.zeros((4, 1)), 1).to_event(2))
    precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
    hidden = numpyro.deterministic("hidden", jnp.tanh(x @ inner))
    with numpyro.plate("batch", len(x)), handlers.scale(scale=100 / len(x)):
        numpyro.sample("y", dist.Normal(hidden @ outer, precision**-0.5).to_event(1), obs=y)


def zero_inflated(x, y=None):
    gate = numpyro.sample("gate", dist.Beta(2, 2))
    weight = numpyro.sample("weight", dist.Normal(0, 0.5))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.ZeroInflatedPoisson(gate, jnp.exp(weight * x)), obs=y)


def covariance(n, y=None):
    with numpyro.plate("axes", 3):
        scales = numpyro.sample("scales", dist.HalfCauchy(1))
    factor = numpyro.sample("factor", dist.LKJCholesky(3, 2.0))
    mean = numpyro.sample("mean", dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)))
    with numpyro.plate("rows", n):
        numpyro.sample("y", dist.MultivariateNormal(mean, scale_tril=scales[:, None] * factor), obs=y)


def autoregression(steps, y=None):
    """Data through a handler around the scan; a plate, a mask and a scale within and around the steps."""
    weight = numpyro.sample("weight", dist.Uniform(-1, 1))

    def step(before, _):
        with numpyro.plate("series", 2), handlers.scale(scale=np.array([1.0, 2.5])):
            after = numpyro.sample("y", dist.Normal(weight * before, 1))
            numpyro.sample("noise", dist.Laplace(after, 2))
        return after, None

    given = handlers.condition(data={} if y is None else {"y": jnp.asarray(y)})
    with given, handlers.scale(scale=0.5), handlers.mask(mask=weight > -2):
        return scan(step, jnp.zeros(2), None, length=steps)[0]


Case = collections.namedtuple("Case", ["model", "args", "y"])  # a model, its arguments but the data, and its data
CASES = {
    "eight schools": Case(eight_schools, (np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),), 10 * normal(8)),
    "batting": Case(batting, (np.array([45, 45, 40, 38, 20]),), np.array([18, 17, 9, 12, 5])),
    "robust line": Case(robust_line, (normal(7),), normal(7)),
    "logistic": Case(logistic, (normal(9, 3),), counts(9) % 2),
    "mixture": Case(mixture, (6,), 3 * normal(6)),
    "local level": Case(local_level, (5,), normal(5)),
    "volatility": Case(volatility, (6,), normal(6)),
    "varying intercepts": Case(varying_intercepts, (normal(3, 4),), normal(3, 4)),
    "censored": Case(censored, (normal(6), 0.3), normal(6)),
    "neural net": Case(neural_net, (normal(5, 3),), normal(5, 1)),
    "zero inflated": Case(zero_inflated, (normal(8),), counts(8) * (counts(8) > 1)),
    "covariance": Case(covariance, (5,), normal(5, 3)),
    "autoregression": Case(autoregression, (4,), normal(4, 2)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def their_draws(model, args, kind="sample"):
    """Return a function of a key that draws NumPyro's latents, or what it records."""

    @jax.jit
    def draw(key):
        trace = handlers.trace(handlers.seed(model, key)).get_trace(*args)
        return {k: v["value"] for k, v in trace.items() if v["type"] == kind and not v.get("is_observed")}

    return draw


@each_case
@pytest.mark.parametrize(("bits", "tolerance"), [(64, 1e-10), (32, 1e-6)])
def test_density(case, bits, tolerance):
    """With data as an argument, and with data that are conditioned on."""
    with jax.enable_x64(bits == 64):
        whole = (*case.args, case.y)
        ours = jax.jit(lambda z: from_numpyro(case.model)(*whole).assess(z)[0])
        conditioned = jax.jit(from_numpyro(case.model)(*case.args).given({"y": case.y}).log_density)
        theirs = jax.jit(lambda z: log_density(case.model, whole, {}, z)[0])
        for latents in map(their_draws(case.model, whole), jax.random.split(jax.random.key(0), 3)):
            expected = theirs(latents)
            assert jnp.isfinite(expected)
            np.testing.assert_allclose(ours(latents), expected, rtol=tolerance, err_msg="obs=")
            np.testing.assert_allclose(conditioned(latents), expected, rtol=tolerance, err_msg="given")


@each_case
def test_names_and_shapes(case):
    key, types = jax.random.key(1), lambda values: {k: (v.shape, v.dtype) for k, v in values.items()}
    trace = jax.eval_shape(from_numpyro(case.model)(*case.args).simulate, key)
    assert types(trace.choices) == types(jax.eval_shape(their_draws(case.model, case.args), key))
    recorded = jax.eval_shape(their_draws(case.model, case.args, "deterministic"), key)
    assert types(trace.deterministic) == types(recorded)
    table = from_numpyro(case.model)(*case.args, case.y).table()
    assert [k for k, entry in table.items() if entry.kind == "observed" and entry.site.observed] == ["y"]
    assert table["y"].shape == case.y.shape


@pytest.mark.parametrize("name", ["eight schools", "autoregression"])
def test_draws_have_their_density(name):
    model, args, _ = CASES[name]
    trace = from_numpyro(model)(*args).simulate(jax.random.key(1))
    expected = log_density(model, args, {}, trace.choices)[0]
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-5)


@pytest.mark.slow
@each_case
def test_derivatives_in_unconstrained_space(case, x64):
    whole = (*case.args, jnp.asarray(case.y))
    posterior = from_numpyro(case.model)(*whole).given({})
    unconstrained = posterior.unconstrain(their_draws(case.model, whole)(jax.random.key(0)))
    ours = jax.jit(jax.value_and_grad(posterior.unconstrained_log_density))(unconstrained)
    theirs = jax.jit(jax.value_and_grad(lambda u: potential_energy(case.model, whole, {}, u)))(unconstrained)
    np.testing.assert_allclose(ravel_pytree(ours)[0], -ravel_pytree(theirs)[0], rtol=1e-9, atol=1e-9)


# --- every statement in odd places ------------------------------------------------------------------------------


def missing(y):
    mean, seen = numpyro.sample("mean", dist.Normal(0, 1)), ~jnp.isnan(y)
    with numpyro.plate("rows", 3):
        imputed = numpyro.sample("imputed", dist.Normal(mean, 1), obs=y, obs_mask=seen)
        with handlers.mask(mask=seen):
            y = numpyro.sample("y", dist.LogNormal(mean, 1), obs=y)
    numpyro.sample("z", dist.Normal(jnp.nan_to_num(y).sum() + imputed.sum(), 1), obs=0.5)


def factors():
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    numpyro.factor("whole", 2)
    with numpyro.plate("rows", 3), handlers.scale(scale=2.0):
        numpyro.factor("thrice", mean)
        with handlers.mask(mask=np.array([True, False, True])):
            numpyro.factor("partly", mean * jnp.arange(1.0, 4.0))


def observations():
    """Larger than the site's batch, and of another dtype."""
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    y = numpyro.sample("y", dist.Normal(mean, 1), obs=jnp.arange(3.0))
    numpyro.sample("z", dist.Normal(y * mean, 1).to_event(1), obs=jnp.ones((2, 3)))
    flag = numpyro.sample("flag", dist.Bernoulli(logits=mean), obs=jnp.array([1.0, 0.0, 1.0]))
    number = numpyro.sample("number", dist.Normal(0.25 * flag, 1), obs=jnp.arange(3))
    numpyro.sample("w", dist.Normal(number @ jnp.arange(3), 1), obs=0.5)


def masks():
    with handlers.mask(mask=False):
        numpyro.sample("none", dist.Normal(0, 1))
    with handlers.mask(mask=jnp.array([[True, False, True]])), handlers.mask(mask=np.array([[True], [False]])):
        with numpyro.plate("columns", 3):
            numpyro.sample("outside", dist.HalfNormal(1))
    with numpyro.plate("columns", 3), handlers.mask(mask=jnp.array([[True], [False]])):
        numpyro.sample("inside", dist.Normal(0, 1))
    with numpyro.plate("columns", 3):
        numpyro.sample("own", dist.Normal(jnp.zeros((3, 2)), 1).mask(jnp.array([True, False])).to_event(1))
        numpyro.sample("widened", dist.Normal(0, 1).mask(jnp.array([False])))


def branches(limit):
    mean = numpyro.sample("mean", dist.Normal(0, 1))

    def branch(scale):
        x = numpyro.sample("x", dist.Normal(numpyro.deterministic("twice", 2 * mean), scale))
        numpyro.sample("y", dist.Normal(x, scale), obs=scale / 3)

    with handlers.scale(scale=2.0):
        cond(mean > limit, branch, lambda scale: branch(2 * scale), 1.5)


def pair(weight=None):
    x = numpyro.sample("x", dist.Normal(numpyro.param("weight", weight), 2.0))
    numpyro.sample("y", dist.Normal(x, 1))
    with handlers.block(), handlers.seed(rng_seed=1):
        numpyro.sample("hidden", dist.Normal())


def backwards(y=None):
    def step(carry, x):
        return numpyro.sample("y", dist.Normal(carry / 2 + x, 1)), None

    with handlers.substitute(data={} if y is None else {"y": y}):
        scan(step, 0.0, jnp.arange(3.0), reverse=True)


def minibatch():
    with numpyro.plate("rows", 6, subsample_size=2) as rows:
        numpyro.sample("x", dist.Normal(numpyro.subsample(jnp.arange(6.0), event_dim=0) + rows, 1))


NAN = jnp.array([1.0, jnp.nan, 2.0])
known = handlers.substitute(pair, {"weight": 2.0})
ODD = {
    "missing": (missing, NAN),
    "factors": (factors,),
    "observations": (observations,),
    "masks": (masks,),
    "branches": (branches, -9.0),
    "branches, other": (handlers.condition(branches, {"x": np.array(0.7)}), 9.0),
    "substitute": (known,),
    "lift": (handlers.lift(pair, {"weight": dist.Normal(0, 3)}),),
    "condition": (handlers.condition(known, {"x": jnp.array(0.5)}),),
    "do": (handlers.do(known, {"x": 0.5}),),
    "scope": (handlers.scope(known, "inner", "."),),
    "seed": (handlers.seed(CASES["autoregression"].model, 0), 3),
    "reparam": (handlers.reparam(known, {"x": LocScaleReparam(0.5)}),),
    "backwards, given": (backwards, jnp.array([1.0, 2.0, 5.0])),
    "minibatch": (handlers.substitute(minibatch, {"rows": jnp.array([1, 4])}),),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_places(name, x64):
    model, *args = ODD[name]
    latents = {} if name.startswith("backwards") else their_draws(model, args)(jax.random.key(3))
    ours = jax.value_and_grad(lambda z: from_numpyro(model)(*args).assess(z)[0])(latents)
    theirs = jax.value_and_grad(lambda z: log_density(model, tuple(args), {}, z)[0])(latents)
    assert np.isfinite(theirs[0]) and list(ours[1]) == list(theirs[1])
    np.testing.assert_allclose(ravel_pytree(ours)[0], ravel_pytree(theirs)[0], rtol=1e-10, atol=1e-12)


def test_a_reversed_scan_is_in_the_order_of_time(x64):
    y = jnp.array([1.0, 2.0, 5.0])
    expected = dist.Normal(jnp.array([y[1] / 2, y[2] / 2 + 1, 2.0]), 1).log_prob(y).sum()
    np.testing.assert_allclose(from_numpyro(backwards)().assess({"y": y})[0], expected, rtol=1e-12)


def test_the_enclosing_handlers_see_nothing():
    with handlers.trace() as seen, handlers.seed(rng_seed=0), handlers.scale(scale=3.0):
        trace = from_numpyro(masks)().simulate(jax.random.key(0))
    assert not seen and trace.log_density == from_numpyro(masks)().assess(trace.choices)[0]
    assert trace.present["outside"].tolist() == [[True, False, True], [False] * 3] and not trace.present["none"]


def test_inference_runs_on_it():
    posterior = from_numpyro(local_level)(4, jnp.arange(4.0)).given({})
    assert jnp.isfinite(inference.particle_filter(posterior, key=jax.random.key(0), num_particles=100).log_evidence)


# --- refusals ---------------------------------------------------------------------------------------------------


def steps():
    scan(lambda carry, _: (carry, numpyro.sample("x", dist.Normal())), 0.0, jnp.arange(3.0))


def plain():
    numpyro.sample("x", dist.Normal())


THREE = dist.Normal(jnp.zeros(3), 1)
REFUSED = {
    "subsample": (lambda: numpyro.plate("rows", 9, subsample_size=3), ControlFlowError, "'rows'.*Pass the batch"),
    "param": (lambda: numpyro.param("w", 1.0), DistributionError, "'w'.*argument.*lift"),
    "module": (lambda: numpyro.module("net", (None, None), (3,)), DistributionError, "net.*module.*argument"),
    "key": (lambda: numpyro.prng_key(), ControlFlowError, "prng_key.*numpyro.sample"),
    "mutable": (lambda: numpyro.primitives.mutable("m", 1.0), ControlFlowError, "mutable 'm'.*Remove it"),
    "blocked": (handlers.block(plain), ControlFlowError, "block.*Make it a numpyro.sample"),
    "slash": (handlers.scope(plain, "a"), AddressError, "'a/x'.*Rename"),
    "empty": (lambda: numpyro.sample("", dist.Normal()), AddressError, "''.*non-empty"),
    "twice": (lambda: plain() or plain(), AddressError, "'x' is used twice"),
    "plate": (numpyro.plate("rows", 3)(steps), ControlFlowError, "under a numpyro.plate. Put the plate into"),
    "array mask": (handlers.mask(steps, np.ones(3, bool)), ControlFlowError, "scan .*mask with an array.*Put"),
    "array scale": (handlers.scale(steps, np.ones(3)), ControlFlowError, "scan .*scale with an array.*Put"),
    "trace": (handlers.trace(steps), ControlFlowError, "scan .*handlers.trace,.*into the body"),
    "reparam": (handlers.reparam(steps, {"x": LocScaleReparam(0)}), ControlFlowError, "handlers.reparam"),
    "replay": (handlers.replay(steps, {}), ControlFlowError, "handlers.replay"),
    "short": (handlers.condition(steps, {"x": jnp.ones(2)}), ShapeError, r"'x'.*gives \(2,\), give \(3,\)"),
    "smaller": (lambda: numpyro.sample("x", THREE, obs=1.0), ShapeError, r"'x'.*\(3,\).*\(\).*Reshape obs"),
    "column": (lambda: numpyro.sample("x", THREE, obs=jnp.ones((3, 1))), ShapeError, r"'x'.*\(3,\).*\(3, 1\)"),
    "event": (lambda: numpyro.sample("x", THREE.to_event(1), obs=jnp.ones(1)), ShapeError, r"\(3,\), obs \(1,\)"),
    "scale": (handlers.scale(plain, np.ones(2)), ShapeError, r"'x'.*scale.*\(2,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    model, error, words = REFUSED[name]
    with pytest.raises(error, match=words) as caught:
        from_numpyro(model)().simulate(jax.random.key(0))
    assert "test_from_numpyro.py:" in str(caught.value)
    assert not numpyro.primitives._PYRO_STACK


def test_only_functions():
    with pytest.raises(TypeError, match="takes a function with numpyro.sample"):
        from_numpyro(from_numpyro(steps))
