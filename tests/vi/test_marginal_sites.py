"""Marginals as sites: in lanes, loops and branches, under NUTS, importance sampling and objectives; and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import all_runs
from jax import lax
from marginal_cases import chain, flip, log_mean_exp, normals, skewed, two_layers
from scipy import stats

import expectax as ex
from expectax import dist, inference, vi
from expectax.ppl import AddressError, ControlFlowError, DistributionError

KEY = jax.random.key(51)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def test_lanes_have_auxiliary_draws_of_their_own():
    """Lanes that shared one auxiliary draw would make the estimate of a product biased."""

    @ex.model
    def lanes(ps):
        jax.vmap(lambda p: ex.sample("m", vi.marginal(chain(p), "x", vi.sir(1))))(ps)

    ps = jnp.array([0.3, 0.6])
    values = [{"m": {"x": jnp.array([a, b])}} for a in (0, 1) for b in (0, 1)]
    check_identity_by_lanes(lanes(ps), values, ps)


def check_identity_by_lanes(program: Any, values: Any, ps: Any) -> None:
    for value in values:
        q, estimates = all_runs(lambda value=value: vi.log_density(program, value))
        x = np.ravel(jax.tree.leaves(value)[0])
        p = 0.2 + 0.5 * np.asarray(ps)
        exact = np.prod(np.where(x == 1, p, 1 - p))
        assert abs(np.sum(q * np.exp(estimates)) - exact) < 1e-10
        assert abs(q.sum() - 1.0) < 1e-10


def test_steps_of_a_scan_have_auxiliary_draws_of_their_own():
    @ex.model
    def steps(ps):
        lax.scan(lambda c, p: (c, ex.sample("m", vi.marginal(chain(p), "x", vi.sir(1)))["x"]), 0.0, ps)

    ps = jnp.array([0.3, 0.6])
    check_identity_by_lanes(steps(ps), [{"m": {"x": jnp.array([a, b])}} for a in (0, 1) for b in (0, 1)], ps)
    trace = steps(ps).simulate(KEY)
    assert trace["m/x"].shape == (2,)


@pytest.mark.parametrize("how", ["vmap_of_scan", "scan_of_vmap"])
def test_axes_of_lanes_and_time(how):
    """Time first, then lanes: the axes of the choices and of the observations must be the same ones."""
    scales = jnp.arange(1.0, 7.0).reshape(2, 3)

    @ex.model
    def wide(s):
        u = ex.sample("u", dist.Bernoulli(0.5))
        ex.sample("x", dist.Normal(1000.0 * s + u, 1e-3))

    def site(s):
        return ex.sample("m", vi.marginal(wide(s), "x", vi.exact()))["x"]

    @ex.model
    def grid(scales):
        if how == "vmap_of_scan":  # lanes of the first axis, time along the second
            return jax.vmap(lambda row: lax.scan(lambda c, s: (c, site(s)), 0.0, row)[1])(scales)
        return lax.scan(lambda c, row: (c, jax.vmap(site)(row)), 0.0, scales)[1]

    trace = grid(scales).simulate(KEY)
    expected = scales.T if how == "vmap_of_scan" else scales
    assert np.array_equal(np.round(trace["m/x"] / 1000.0), expected)
    assert np.array_equal(np.round(trace.retval / 1000.0), scales)
    assert abs(grid(scales).assess(trace.choices)[0] - trace.log_density) < 1e-9


def test_branches_count_only_where_they_are_taken():
    @ex.model
    def branch():
        b = ex.sample("b", dist.Bernoulli(0.25))
        ex.cond(
            b == 1,
            lambda: ex.sample("m", vi.marginal(chain(0.3), "x", vi.exact()))["x"],
            lambda: jnp.zeros((), jnp.result_type(int)),
        )

    exact = np.log(0.25) + np.log(0.35)
    assert abs(branch().assess({"b": 1, "m": {"x": 1}})[0] - exact) < 1e-12
    assert abs(branch().assess({"b": 0, "m": {"x": 1}})[0] - np.log(0.75)) < 1e-12


def test_lanes_of_marginals_with_time_inside():
    """A kept choice of a scan inside the marginal: its time axis stays in front of the lanes around the marginal."""

    @ex.model
    def series(s):
        k = ex.sample("k", dist.Bernoulli(0.5))
        lax.scan(lambda c, t: (c, ex.sample("y", dist.Normal(1000.0 * s + 10.0 * t + k, 1e-3))), 0.0, jnp.arange(3.0))

    @ex.model
    def lanes(scales):
        return jax.vmap(lambda s: ex.sample("m", vi.marginal(series(s), "y", vi.exact()))["y"])(scales)

    scales = jnp.array([1.0, 2.0])
    trace = lanes(scales).simulate(KEY)
    assert trace["m/y"].shape == lanes(scales).sites()["m"]["y"].shape == (3, 2)
    assert np.array_equal(np.round(trace["m/y"], -1), 10.0 * np.arange(3)[:, None] + 1000.0 * np.asarray(scales))
    assert trace.retval.shape == (2, 3)
    assert abs(lanes(scales).assess(trace.choices)[0] - trace.log_density) < 1e-6


@pytest.mark.parametrize("algorithm", [vi.exact(), vi.sir(2)], ids=["exact", "sir"])
def test_branches_over_lanes_count_only_where_they_are_taken(algorithm):
    flags = jnp.array([True, False, True])

    @ex.model
    def branches():
        def one(flag):
            site = lambda: ex.sample("m", vi.marginal(chain(0.3), "x", algorithm))["x"]  # noqa: E731
            return ex.cond(flag, site, lambda: jnp.zeros((), jnp.result_type(int)))

        return jax.vmap(one)(flags)

    value = {"m": {"x": jnp.array([1, 1, 0])}}
    q, estimates = all_runs(lambda: vi.log_density(branches(), value))
    assert abs(np.sum(q * np.exp(estimates)) - 0.35 * 0.65) < 1e-12
    trace = branches().simulate(KEY)
    assert np.array_equal(trace.present["m"]["x"], flags)
    assert trace.retval[1] == 0


def test_an_exact_marginal_is_a_likelihood_for_nuts():
    """A mixture in a model: the gradient is that of the sum; a latent with its support fixed can be sampled too."""
    data = jnp.array([-1.2, 0.8, 1.1, 5.0])

    @ex.model
    def component(mean):
        k = ex.sample("k", dist.Bernoulli(0.3))
        ex.sample("y", dist.Normal(mean + 3.0 * k, 1.0))

    @ex.model
    def mixture():
        mean = ex.sample("mean", dist.Normal(0.0, 2.0))
        jax.vmap(lambda _: ex.sample("obs", vi.marginal(component(mean), "y", vi.exact())))(data)

    posterior = mixture().given({"obs": {"y": data}})

    def exact(mean):
        terms = jnp.stack([jnp.log(w) - 0.5 * (data - mean - s) ** 2 for w, s in ((0.7, 0.0), (0.3, 3.0))])
        constant = -0.5 * jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(terms + constant, axis=0).sum() - 0.5 * (mean / 2) ** 2 - jnp.log(2.0) + constant

    for mean in (-0.5, 1.3):
        value, slope = jax.value_and_grad(lambda m: posterior.unconstrained_log_density({"mean": m}))(mean)
        assert abs(value - exact(mean)) < 1e-12
        assert abs(slope - jax.grad(exact)(mean)) < 1e-12
    latent = vi.marginal(mixture_of_scales(), "s", vi.exact())
    u = 0.4
    total = latent.given({}).unconstrained_log_density({"s": u})
    assert abs(total - (latent.assess({"s": jnp.exp(u)})[0] + u)) < 1e-12


@ex.model
def mixture_of_scales():
    k = ex.sample("k", dist.Bernoulli(0.3))
    ex.sample("s", dist.LogNormal(1.0 * k, 1.0))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_needs_randomness_says_so():
    program = vi.marginal(normals(1.0), "x", vi.sir(3))
    with pytest.raises(DistributionError, match="key=key"):
        program.assess({"x": 0.0})
    with pytest.raises(DistributionError, match="'x'.*key=key"):
        program.given({}).log_density({"x": 0.0})
    assert np.isfinite(program.given({}).log_density({"x": 0.0}, key=KEY))
    trace = program.simulate(KEY)
    with pytest.raises(DistributionError, match="regenerate and project"):
        trace.project("x")
    new, weight, _ = trace.update(KEY, {"x": 0.3})
    assert abs(new.log_density - trace.log_density - weight) < 1e-12


def test_parts_of_a_joint_density_are_refused():
    program = vi.marginal(two_layers(0.3), ["sub", "y"], vi.sir(2))
    with pytest.raises(DistributionError, match="'sub/x'"):
        program.generate(KEY, {"y": 1})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vi.marginal(chain(0.3), "z", vi.sir(1)), AddressError, "'z'"),
        (lambda: vi.marginal(chain(0.3), ["x", "u"], vi.sir(1)), AddressError, "every choice"),
        (lambda: vi.marginal(chain(0.3), [], vi.sir(1)), AddressError, "no choice"),
        (lambda: vi.marginal(chain(0.3), "x", vi.sir), TypeError, "run"),
        (lambda: vi.marginal(chain(0.3), "x", vi.SIR if hasattr(vi, "SIR") else int), TypeError, "run"),
        (lambda: vi.marginal(chain, "x", vi.sir(1)), TypeError, "bound program"),
        (lambda: vi.normalize(chain(0.3), vi.sir(1)), TypeError, "posterior"),
        (lambda: vi.sir(0), ValueError, "num_particles"),
        (lambda: vi.smc(2, flip, temperatures=[0.5, 0.2, 1.0]), ValueError, "rise to 1"),
        (lambda: vi.smc(2, flip, temperatures=[0.5]), ValueError, "rise to 1"),
        (lambda: vi.marginal(normals(1.0), "x", vi.exact()).assess({"x": 0.0}), ControlFlowError, "'u'"),
        (
            lambda: vi.marginal(normals(1.0), "x", vi.sir(2, skewed())).assess({"x": 0.0}, key=KEY),
            ex.ppl.SupportError,
            "'u'",
        ),
        (
            lambda: vi.marginal(two_layers(0.3), "y", vi.smc(2, flip)).simulate(KEY),
            DistributionError,
            "'sub/x'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- with the rest of the toolkit -------------------------------------------------------------------------------------


@ex.model
def standard():
    ex.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("side", ["proposal", "model", "both"])
def test_importance_weights_with_estimates_are_unbiased(side):
    """Draws of the proposal bring their own weight; the model's estimate is unbiased: so is the evidence."""
    estimated = vi.marginal(normals(0.5), "x", vi.sir(3))
    proposal = estimated if side != "model" else wide_x()
    posterior = (observed_twice() if side != "proposal" else standard()).given(
        {} if side == "proposal" else {"y": {"x": 0.7}}
    )
    if side == "proposal":
        exact = 0.0
    else:  # y ~ N(x, 1 + 0.25), x ~ N(0, 1)
        exact = stats.norm.logpdf(0.7, 0.0, 2.25**0.5)
    logs = [
        inference.importance(posterior, proposal, key=key, num_particles=4000).log_evidence
        for key in jax.random.split(KEY, 10)
    ]
    estimate, error = log_mean_exp(np.array(logs))
    assert abs(estimate - exact) < 5 * error + 1e-3


@ex.model
def wide_x():
    ex.sample("x", dist.Normal(0.0, 1.5))


@ex.model
def shifted(x):
    u = ex.sample("u", dist.Normal(x, 0.5))
    ex.sample("x", dist.Normal(u, 1.0))


@ex.model
def observed_twice():
    x = ex.sample("x", dist.Normal(0.0, 1.0))
    ex.sample("y", vi.marginal(shifted(x), "x", vi.sir(2)))


@pytest.mark.parametrize(
    "objective",
    [
        lambda g: vi.wake_sleep(standard().given({}), g, 3),
        lambda g: vi.wake_guide(standard().given({}), g, 3),
        lambda g: vi.vimco(standard().given({}), g, 3),
        lambda g: vi.thermodynamic(standard().given({}), g, 3, (0.0, 1.0)),
    ],
)
def test_objectives_that_score_their_own_draws_refuse_estimates(objective):
    """A score of a value that was drawn before is no reciprocal: its bound would lie above the evidence."""
    guide = lambda p: vi.marginal(normals(p), "x", vi.sir(2))  # noqa: E731
    with pytest.raises(DistributionError, match="'x'.*only estimated"):
        vi.value_and_grad(objective(guide))(0.5, KEY)


def test_unconstrained_kept_choices_with_time_in_a_branch_over_lanes():
    """The Jacobian counts in the lanes whose branch is taken; its lanes stand behind the time axis, three by three here."""

    @ex.model
    def series():
        k = ex.sample("k", dist.Bernoulli(0.3))
        lax.scan(lambda c, _: (c, ex.sample("s", dist.LogNormal(1.0 * k, 1.0))), 0.0, length=3)

    flags = jnp.array([True, False, True])

    @ex.model
    def branches():
        def one(flag):
            site = lambda: ex.sample("m", vi.marginal(series(), "s", vi.exact()))["s"]  # noqa: E731
            return ex.cond(flag, site, lambda: jnp.zeros(3))

        return jax.vmap(one)(flags)

    u = jnp.array([[0.3, -1.0, 0.7], [1.1, 0.2, -0.4], [-0.6, 0.9, 2.0]])  # time, lanes
    exact = 0.0
    for lane in range(3):
        own = np.asarray(u[:, lane])
        if flags[lane]:  # the densities of u = log s, of the two components
            parts = [stats.norm.logpdf(own, mean).sum() + np.log(w) for mean, w in ((0.0, 0.7), (1.0, 0.3))]
            exact += np.logaddexp(*parts)
        else:
            exact += stats.norm.logpdf(own).sum()  # the pseudo-prior of what is absent
    assert abs(branches().given({}).unconstrained_log_density({"m": {"s": u}}) - exact) < 1e-10


def test_depth_costs_no_power_of_stagings():
    """Every level once asked its program for its equations seven times, so that three levels took 742 runs of the model."""
    runs = [0]

    def level(depth, mean):
        @ex.model
        def model():
            runs[0] += 1
            centre = mean if depth == 0 else ex.sample("sub", level(depth - 1, mean))["x"]
            u = ex.sample("u", dist.Normal(centre, 1.0))
            ex.sample("x", dist.Normal(u, 1.0))

        return vi.marginal(model(), "x", vi.sir(2))

    level(2, 0.3).assess({"x": 0.1}, key=KEY)
    assert runs[0] <= 30
