"""Marginals and normalised targets: the joint identity, exactly, for every algorithm; nested; in lanes, loops, branches.

The identity is checked by enumerating all random choices of an algorithm: for every value $x$ and every weight $w$,
the mass that drawing gives to $(x, w)$ must be $e^w$ times the mass that scoring $x$ gives to $w$.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import all_runs
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference, vi
from expectax.ppl import AddressError, ControlFlowError, DistributionError
from helpers import two_stage_z

KEY = jax.random.key(51)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@ex.model
def chain(p):
    u = ex.sample("u", dist.Bernoulli(p))
    ex.sample("x", dist.Bernoulli(0.2 + 0.5 * u))


@ex.model
def skewed():
    ex.sample("u", dist.Bernoulli(0.8))


@ex.model
def by_x(x):
    ex.sample("u", dist.Bernoulli(0.3 + 0.4 * x))


@ex.model
def two_layers(p):
    inner = ex.sample("sub", vi.marginal(chain(p), "x", vi.sir(1)))
    v = ex.sample("v", dist.Bernoulli(0.4))
    ex.sample("y", dist.Bernoulli(0.1 + 0.3 * inner["x"] + 0.5 * v))


def flip(log_density: Any, z: Any) -> Any:
    """A kernel on bits: flip one of them, accept by Metropolis."""
    (name,) = z
    which = {name: 1 - z[name]}
    accept = ex.sample("accept", dist.Bernoulli(jnp.exp(jnp.minimum(0.0, log_density(which) - log_density(z)))))
    return {name: jnp.where(accept == 1, which[name], z[name])}


class OneDraw:
    """An algorithm of a user's own: one particle of a fixed proposal."""

    def run(self, target):
        z, log_r = vi.simulate(skewed())
        log_p = vi.log_density(target, z)
        return vi.Run(z, log_p, log_p - log_r)

    def conditional(self, target, latents, log_density):
        return log_density - vi.log_density(skewed(), latents)


ALGORITHMS = {
    "exact": vi.exact(),
    "sir1": vi.sir(1),
    "sir2": vi.sir(2),
    "sir3": vi.sir(3),
    "sir2_proposal": vi.sir(2, skewed()),
    "sir2_informed": vi.sir(2, lambda kept: by_x(kept["x"])),
    "own": OneDraw(),
    "ais": vi.smc(1, flip, temperatures=[0.3, 1.0]),
    "ais3": vi.smc(1, flip, temperatures=[0.2, 0.7, 1.0]),
    "smc": vi.smc(2, flip, temperatures=[0.4, 1.0]),
    "smc_proposal": vi.smc(2, flip, temperatures=[0.4, 1.0], proposal=skewed()),
    "mcmc": vi.mcmc(flip, 2),
    "sir_of_normalized": vi.sir(2, lambda kept: vi.normalize(chain(0.3).given({"x": kept["x"]}), vi.sir(2, skewed()))),
}


def masses(function: Any) -> dict[tuple, float]:
    """Return the probability of each outcome of a keyless program, outcomes rounded."""
    probabilities, outputs = all_runs(function)
    total: dict[tuple, float] = {}
    rows = np.stack([np.ravel(x) for x in jax.tree.leaves(outputs)], axis=1)
    for p, row in zip(probabilities, rows, strict=True):
        if p > 0:
            label = tuple(np.round(row, 9))
            total[label] = total.get(label, 0.0) + p
    return total


def check_identity(program: Any, values: list[Any]) -> None:
    """Check the joint identity of a program with an estimated density, over all values of its choices."""
    drawn = masses(lambda: vi.simulate(program))
    scored: dict[tuple, float] = {}
    for value in values:
        for (log_w,), p in masses(lambda value=value: [vi.log_density(program, value)]).items():
            label = (*np.round(np.ravel([np.ravel(v) for v in jax.tree.leaves(value)]), 9), log_w)
            scored[label] = np.exp(log_w) * p
    assert abs(sum(drawn.values()) - 1.0) < 1e-10
    assert set(drawn) == set(scored)
    for label, mass in drawn.items():
        assert abs(mass - scored[label]) < 1e-9, label  # the labels' log weights are rounded to 1e-9


QUICK = {"exact", "sir2", "sir2_informed", "own", "ais"}


def some_slow(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(ALGORITHMS))
def test_the_joint_identity_of_marginals(name):
    """F6, F7, F8: a wrong weight of a draw, of a score, or a relation between them that is not that of the contract."""
    if name in ("exact", "sir_of_normalized"):
        check_identity_by_sums(vi.marginal(chain(0.3), "x", ALGORITHMS[name]), [{"x": 0}, {"x": 1}])
    else:
        check_identity(vi.marginal(chain(0.3), "x", ALGORITHMS[name]), [{"x": 0}, {"x": 1}])


@pytest.mark.parametrize(
    "name", some_slow(["exact", "sir1", "sir2", "sir3", "sir2_proposal", "own", "ais", "ais3", "smc", "mcmc"])
)
def test_the_joint_identity_of_normalised_targets(name):
    """F9, with the same bugs in mind."""
    program = vi.normalize(chain(0.3).given({"x": 1}), ALGORITHMS[name])
    check_identity_by_sums(program, [{"u": 0}, {"u": 1}])


def check_identity_by_sums(program: Any, values: list[Any]) -> None:
    """As `check_identity`, with sums of test functions in place of rounded weights."""
    p, (choices, log_w) = all_runs(lambda: vi.simulate(program))
    assert abs(p.sum() - 1.0) < 1e-10
    for value in values:
        q, estimates = all_runs(lambda value=value: vi.log_density(program, value))
        here = np.ones(len(p), bool)
        for a, b in zip(*map(jax.tree.leaves, (choices, value)), strict=True):
            here &= np.all(np.reshape(np.asarray(a) == np.asarray(b), (len(p), -1)), axis=1)
        for g in (np.ones_like, np.exp, lambda w: np.exp(-w), np.cos, lambda w: w**2):
            left = np.sum(np.where(here, p * g(log_w), 0.0))
            right = np.sum(q * np.exp(estimates) * g(estimates))
            assert abs(left - right) < 1e-10


@pytest.mark.parametrize(
    "algorithm", [pytest.param(vi.sir(1), marks=pytest.mark.slow), vi.sir(2)], ids=["sir1", "sir2"]
)
def test_the_joint_identity_two_deep(algorithm):
    """F10: a marginal inside a marginal, whose inner estimate enters the outer weights; hidden, and kept."""
    check_identity_by_sums(vi.marginal(two_layers(0.3), "y", algorithm), [{"y": 0}, {"y": 1}])
    kept = [{"sub": {"x": x}, "y": y} for x in (0, 1) for y in (0, 1)]
    check_identity_by_sums(vi.marginal(two_layers(0.3), ["sub", "y"], algorithm), kept)


def test_a_normalised_target_with_an_estimated_density():
    """The estimate that weighs a particle is the one in the density of what is returned."""
    target = two_layers(0.3).given({"y": 1, "v": 0})
    check_identity_by_sums(vi.normalize(target, vi.sir(2, inner_guess())), [{"sub": {"x": 0}}, {"sub": {"x": 1}}])


@ex.model
def inner_guess():
    ex.sample("sub", bit())


@ex.model
def bit():
    ex.sample("x", dist.Bernoulli(0.6))


# --- the densities themselves -----------------------------------------------------------------------------------


@ex.model
def normals(scale):
    u = ex.sample("u", dist.Normal(0.0, scale))
    ex.sample("x", dist.Normal(u, 1.0))


@ex.model
def guess(x):
    ex.sample("u", dist.Normal(0.5 * x, 0.8))


def log_mean_exp(w: Any) -> tuple[float, float]:
    """Return the log of the mean of `exp(w)` and its standard error relative to the mean."""
    values = np.exp(np.asarray(w))
    return np.log(values.mean()), values.std() / values.mean() / len(values) ** 0.5


@pytest.mark.parametrize("proposal", [None, lambda kept: guess(kept["x"])], ids=["prior", "custom"])
@pytest.mark.parametrize("n", [1, 5])
def test_the_marginal_of_normals(n, proposal):
    """F6 and F7: the peer's -2.545 comes of a weight that forgets the proposal."""
    program = vi.marginal(normals(1.0), "x", vi.sir(n, proposal))
    keys = jax.random.split(KEY, 40_000)
    score = jax.jit(jax.vmap(lambda k: program.assess({"x": 0.7}, key=k)[0]))
    estimate, error = log_mean_exp(score(keys))
    assert abs(estimate + 1.388) < 5 * error + 5e-4
    if n == 1 and proposal is not None:
        return  # 1/w has infinite variance
    drawn = jax.jit(jax.vmap(vi.marginal(normals(0.5), "x", vi.sir(n, proposal)).simulate))(keys)
    ratio = np.exp(stats.norm.logpdf(drawn["x"]) - drawn.log_density)
    assert abs(ratio.mean() - 1.0) < 3.0 * ratio.std() / len(ratio) ** 0.5


def test_the_posterior_of_a_normalised_target():
    """F9: self-normalised importance sampling of N(.5, .5) with ten draws of N(0, 1) has the mean .475."""

    @ex.model
    def model():
        z = ex.sample("z", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.Normal(z, 1.0))

    program = vi.normalize(model().given({"y": 1.0}), vi.sir(10))
    z = jax.jit(jax.vmap(program.simulate))(jax.random.split(KEY, 100_000))["z"]
    assert abs(z.mean() - 0.475) < 5 * z.std() / len(z) ** 0.5 + 5e-4


def test_an_exact_marginal_is_the_sum():
    program = vi.marginal(chain(0.3), "x")
    for x in (0, 1):
        exact = 0.7 * stats.bernoulli.pmf(x, 0.2) + 0.3 * stats.bernoulli.pmf(x, 0.7)
        assert abs(program.assess({"x": x})[0] - np.log(exact)) < 1e-12
    assert abs(program.simulate(KEY).log_density - program.assess(program.simulate(KEY).choices)[0]) < 1e-12


def test_a_chain_is_summed_by_the_forward_recursion():
    """Without it, 3^60 terms."""
    steps, states = 60, 3
    transition = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    means = jnp.array([-1.0, 0.0, 2.0])

    @ex.model
    def hmm():
        def step(k, _):
            k = ex.sample("k", dist.Categorical(transition[k]))
            ex.sample("y", dist.Normal(means[k], 1.0))
            return k, None

        lax.scan(step, 0, length=steps)

    y = jnp.linspace(-2.0, 3.0, steps)
    log_p, _ = vi.marginal(hmm(), "y", vi.exact()).assess({"y": y})
    alpha = np.eye(states)[0]
    total = 0.0
    for value in np.asarray(y):
        alpha = (alpha @ np.asarray(transition)) * stats.norm.pdf(value, np.asarray(means))
        total += np.log(alpha.sum())
        alpha /= alpha.sum()
    assert abs(log_p - total) < 1e-9


# --- as sites ---------------------------------------------------------------------------------------------------


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


# --- refusals ---------------------------------------------------------------------------------------------------


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


# --- state-space models -----------------------------------------------------------------------------------------


@ex.model
def hidden_walk(steps, reverse=False):
    start = ex.sample("start", dist.Bernoulli(0.4))

    def step(x, _):
        x = ex.sample("x", dist.Bernoulli(0.2 + 0.5 * x + 0.1 * start))
        ex.sample("y", dist.Bernoulli(0.1 + 0.7 * x))
        return x, None

    lax.scan(step, start, length=steps, reverse=reverse)


@pytest.mark.parametrize(("n", "steps"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_joint_identity_of_filters(n, steps, reverse):
    """A conditional filter that forgets its path's place, or resamples it away, fails here."""
    program = vi.marginal(hidden_walk(steps, reverse), "y", vi.bootstrap_filter(n))
    ys = [{"y": jnp.array([(i >> t) & 1 for t in range(steps)])} for i in range(2**steps)]
    check_identity_by_sums(program, ys)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_the_joint_identity_of_normalised_trajectories(reverse):
    target = hidden_walk(2, reverse).given({"y": jnp.array([1, 0])})
    values = [{"start": s, "x": jnp.array([a, b])} for s in (0, 1) for a in (0, 1) for b in (0, 1)]
    check_identity_by_sums(vi.normalize(target, vi.bootstrap_filter(2)), values)


# --- gradients --------------------------------------------------------------------------------------------------


@ex.model
def target():
    x = ex.sample("x", dist.Bernoulli(0.4))
    ex.sample("data", dist.Bernoulli(0.3 + 0.5 * x))


@ex.model
def hierarchical(p):
    u = ex.sample("u", dist.Bernoulli(p))
    ex.sample("x", dist.Bernoulli(0.8 * p + 0.1 - 0.3 * u * p))


def back(p, latents):
    @ex.model
    def reverse():
        ex.sample("u", dist.Bernoulli(0.3 + 0.4 * p * latents["x"]))

    return reverse()


POSTERIOR = target().given({"data": 1})
BOUNDS = {
    "hvi": vi.hvi(POSTERIOR, hierarchical, back),
    "iwhvi": vi.iwhvi(POSTERIOR, hierarchical, 2, back),
    "iwhvi, prior": vi.iwhvi(POSTERIOR, hierarchical, 2),
    "diwhvi": vi.diwhvi(POSTERIOR, hierarchical, 2, 1, back),
    "normalized": vi.elbo(POSTERIOR, lambda p: vi.normalize(POSTERIOR, vi.sir(2, one_bit(p)))),
    "estimated model": vi.elbo(
        lambda p: vi.marginal(chain(p), "x", vi.sir(2, by_half())).given({}), lambda p: one_x(p)
    ),
}


@ex.model
def one_bit(p):
    ex.sample("x", dist.Bernoulli(p))


@ex.model
def one_x(p):
    ex.sample("x", dist.Bernoulli(0.9 * p))


@ex.model
def by_half():
    ex.sample("u", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(n, s, id=f"{n}-{how}", marks=() if s and n == "normalized" else pytest.mark.slow)
        for n in BOUNDS
        for how, s in (("default", None), ("reinforce", vi.Reinforce(baseline=None)))
    ],
)
def test_bounds_with_estimates_have_exact_gradients(name, strategy):
    """A hidden choice whose score is lost, or a retained particle without derivative, biases these."""
    bound = BOUNDS[name]
    strategies = {c.site.address: strategy for c in bound.staged(0.6).layout.choices} if strategy else None

    def expected(p: float) -> float:
        probabilities, values = all_runs(lambda: bound.function(*bound.captured, jnp.asarray(p)))
        return float(np.sum(np.where(probabilities > 0, probabilities * values, 0.0)))

    exact = (expected(0.6 + 1e-5) - expected(0.6 - 1e-5)) / 2e-5
    run = jax.jit(
        jax.vmap(lambda key: jnp.stack(jax.value_and_grad(lambda p: bound.staged(p, strategies).surrogate(key))(0.6)))
    )
    few = run(jax.random.split(KEY, 20))
    if np.all(np.std(few, axis=0) < 1e-9):  # all choices are enumerated
        np.testing.assert_allclose(few[0], [expected(0.6), exact], rtol=1e-7)
    else:
        two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array([expected(0.6), exact]), KEY, 4000)


# --- with the rest of the toolkit -------------------------------------------------------------------------------


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
