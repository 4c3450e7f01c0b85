r"""Shipped objectives on a conjugate normal model, against closed forms and quadrature.

z ~ N(0, 1), y ~ N(theta z, 1); the guide is N(mean, exp(log_sd)). Each z-test is in two stages, keys are pinned.
"""

import inspect
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import expectax as ex
from expectax import dist, vi
from expectax.ppl import AddressError, ControlFlowError, ShapeError, StrategyError
from helpers import count_compiles, two_stage_z

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(20260803)
Y = 1.0


@ex.model
def normal(theta):
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Normal(theta * z, 1.0))


@ex.model
def guide(params):
    ex.sample("z", dist.Normal(params["mean"], jnp.exp(params["log_sd"])))


def learned(params):
    return normal(params["theta"]).given({"y": Y})


POSTERIOR = normal(1.0).given({"y": Y})
EXACT = {"mean": 0.5, "log_sd": -0.5 * math.log(2.0), "theta": 1.0}
OFF = {"mean": 0.1, "log_sd": 0.2, "theta": 0.7}


def arrays(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def samples(objective: Any, params: Any) -> Any:
    """Return a sampler of (value, gradient by log_sd, mean, theta) for `two_stage_z`."""

    def one(key: Any) -> Any:
        return jnp.stack(jax.tree.leaves(jax.value_and_grad(objective.surrogate)(arrays(params), key)))

    run = jax.jit(jax.vmap(one))
    return lambda key, n: np.asarray(run(jax.random.split(key, n)))


def exactly(f: Any, params: Any) -> np.ndarray:
    """Return value and gradient of a closed form, in float64, in the order of `samples`."""
    with jax.enable_x64(True):
        return np.hstack(jax.tree.leaves(jax.value_and_grad(f)(arrays(params))))


def elbo(p):
    mean, variance = p["mean"], jnp.exp(2.0 * p["log_sd"])
    second = mean**2 + variance
    likelihood = Y**2 - 2.0 * Y * p["theta"] * mean + p["theta"] ** 2 * second
    return -jnp.log(2.0 * jnp.pi) - 0.5 * (second + likelihood) + 0.5 * jnp.log(2.0 * jnp.pi * math.e * variance)


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def log_weights(p, z):
    log_p = -0.5 * z**2 - 0.5 * (Y - p["theta"] * z) ** 2 - jnp.log(2.0 * jnp.pi)
    return log_p + 0.5 * ((z - p["mean"]) / jnp.exp(p["log_sd"])) ** 2 + p["log_sd"] + 0.5 * jnp.log(2.0 * jnp.pi)


def iwelbo(p):
    """The bound of two particles by quadrature: its error is below 1e-6."""
    w = log_weights(p, p["mean"] + jnp.exp(p["log_sd"]) * NODES)
    return WEIGHTS @ (jnp.logaddexp(w[:, None], w[None]) - math.log(2.0)) @ WEIGHTS


# --- learned models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [vi.elbo, vi.stl], ids=["elbo", "stl"])
def test_elbo_and_stl_learn_model_and_guide(objective):
    """Value and all gradients are the closed form's: catches a path or a score that is left out wrongly."""
    two_stage_z(samples(objective(learned, guide), OFF), exactly(elbo, OFF), KEY, 20_000)


def test_a_fixed_posterior_is_a_constant_function_of_the_parameters():
    fixed = samples(vi.elbo(normal(0.7).given({"y": Y}), guide), OFF)(KEY, 5)
    np.testing.assert_allclose(fixed[:, :3], samples(vi.elbo(learned, guide), OFF)(KEY, 5)[:, :3], rtol=1e-5)
    assert np.all(fixed[:, 3] == 0.0)


@pytest.mark.parametrize("objective", [vi.iwelbo, vi.dreg, vi.vimco], ids=["iwelbo", "dreg", "vimco"])
def test_iwelbo_dreg_and_vimco_have_one_expectation(objective):
    """Catches a square that is missing from DReG's weights, or the model's gradient weighted with it."""
    two_stage_z(samples(objective(learned, guide, 2), OFF), exactly(iwelbo, OFF), KEY, 20_000)


def test_the_fit_of_a_model_finds_the_maximum_of_the_evidence():
    """y ~ N(0, 1 + theta^2) given y = 2: the evidence is greatest at theta = sqrt(3)."""
    bound = vi.stl(lambda p: normal(p["theta"]).given({"y": 2.0}), guide)
    fit = vi.fit(bound, OFF, optax.adam(0.02), key=KEY, num_steps=1500, num_samples=8)
    assert abs(fit.params["theta"] - math.sqrt(3.0)) < 0.05


# --- less noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [vi.stl, lambda p, g: vi.dreg(p, g, 4)], ids=["stl", "dreg"])
@pytest.mark.usefixtures("x64")
def test_no_noise_at_the_exact_posterior(objective):
    """Every sample of the guide's gradient is zero, though those of the ELBO and the IWELBO are not."""
    assert np.abs(samples(objective(POSTERIOR, guide), EXACT)(KEY, 100)[:, 1:]).max() < 1e-12
    for noisy in (vi.elbo(POSTERIOR, guide), vi.iwelbo(POSTERIOR, guide, 4)):
        assert samples(noisy, EXACT)(KEY, 100)[:, 1].std() > 0.1


def test_dreg_of_one_particle_is_stl():
    np.testing.assert_allclose(
        samples(vi.dreg(learned, guide, 1), OFF)(KEY, 20), samples(vi.stl(learned, guide), OFF)(KEY, 20), rtol=1e-4
    )


def test_dreg_has_less_noise_than_the_iwelbo():
    spreads = [samples(o(POSTERIOR, guide, 32), OFF)(KEY, 2000).std(0)[1:3] for o in (vi.dreg, vi.iwelbo)]
    assert np.all(spreads[0] < 0.5 * spreads[1])


LINES = pathlib.Path(__file__).read_text().splitlines()


@ex.model
def counting():
    n = ex.sample("n", dist.Poisson(3.0))
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Normal(z + n, 1.0))


@ex.model
def count_guide(params):
    ex.sample("z", dist.Normal(params, 1.0))
    ex.sample("n", dist.Poisson(2.0))  # no path


@ex.model
def score_guide(params):
    ex.sample("z", dist.Normal(params, 1.0), gradient=vi.Reinforce())  # a score


@pytest.mark.parametrize("objective", [vi.stl, lambda p, g: vi.dreg(p, g, 2)], ids=["stl", "dreg"])
@pytest.mark.parametrize(
    ("target", "bad", "site", "mark"),
    [(counting().given({"y": Y}), count_guide, "'n'", "no path"), (POSTERIOR, score_guide, "'z'", "a score")],
)
def test_sites_without_a_path_are_refused(objective, target, bad, site, mark):
    with pytest.raises(StrategyError, match=site) as caught:
        vi.value_and_grad(objective(target, bad))(0.0, KEY)
    (number,) = [n for n, text in enumerate(LINES, 1) if text.endswith(f"# {mark}")]
    assert f"test_more_objectives_gaussian.py:{number}" in str(caught.value)


# --- wake phases ------------------------------------------------------------------------------------------------------

WAKE_START = {"mean": 0.0, "log_sd": 0.0, "theta": 1.0}


def test_wake_phases_of_two_particles_by_quadrature():
    """F40: the guide's mean gets 0.307 and the model's theta -0.460: self-normalised, not the exact 0.5 and -0.25."""
    z = np.stack(np.meshgrid(NODES, NODES))
    probs = np.exp(-0.5 * (Y - z) ** 2)
    probs = probs / probs.sum(0)
    expected = [WEIGHTS @ (probs * f).sum(0) @ WEIGHTS for f in (z, (Y - z) * z)]
    np.testing.assert_allclose(expected, [0.3071, -0.4602], atol=1e-4)
    both = samples(vi.wake_sleep(learned, guide, 2), WAKE_START)
    two_stage_z(lambda key, n: both(key, n)[:, 2:], np.array(expected), KEY, 20_000)


@pytest.mark.parametrize(("n", "of_guide", "of_model"), [(10, 0.4751, -0.2712), (50, 0.4956, -0.2537)])
def test_wake_phases_of_more_particles(n, of_guide, of_model):
    """F40: the expectations are self-normalised importance sampling's, of 4e6 draws in numpy (standard error 3e-4)."""
    for objective, column, expected in ((vi.wake_guide, 2, of_guide), (vi.wake_model, 3, of_model)):
        gradients = samples(objective(learned, guide, n), WAKE_START)
        assert np.all(gradients(KEY, 10)[:, 5 - column] == 0.0)
        two_stage_z(lambda key, m, g=gradients, c=column: g(key, m)[:, c], np.array(expected), KEY, 20_000)


# --- amortised guides -------------------------------------------------------------------------------------------------


@ex.model
def amortised(params, observations):
    mean = params["slope"] * observations["y"] + params["shift"]
    ex.sample("z", dist.Normal(mean, jnp.exp(params["log_sd"])))


SLEEP = vi.forward_kl(normal(1.0), amortised, "y")
BEST = {"slope": 0.5, "shift": 0.0, "log_sd": -0.5 * math.log(2.0)}


def forward(p):
    """E[log q(z | y)], with Var z = Cov(z, y) = 1 and Var y = 2."""
    squares = 1.0 - 2.0 * p["slope"] + 2.0 * p["slope"] ** 2 + p["shift"] ** 2
    return -0.5 * jnp.log(2.0 * jnp.pi) - p["log_sd"] - 0.5 * squares * jnp.exp(-2.0 * p["log_sd"])


@pytest.mark.parametrize("params", [BEST, {"slope": -0.2, "shift": 0.4, "log_sd": 0.1}], ids=["best", "off"])
def test_forward_kl_has_its_closed_form(params):
    """F43: the gradient is zero at the exact posterior N(y / 2, 1 / 2), and right elsewhere."""
    truth = exactly(forward, params)
    if params is BEST:
        np.testing.assert_allclose(truth[1:], 0.0, atol=1e-12)
    two_stage_z(samples(SLEEP, params), truth, KEY, 20_000)


def test_forward_kl_recovers_the_amortised_posterior():
    start = {"slope": 0.0, "shift": 1.0, "log_sd": 0.0}
    fit = vi.fit(
        SLEEP, start, optax.adam(optax.linear_schedule(0.05, 0.0, 2000)), key=KEY, num_steps=2000, num_samples=64
    )
    assert all(abs(fit.params[name] - best) < 0.02 for name, best in BEST.items())


def test_forward_kl_refuses_what_does_not_fit():
    with pytest.raises(AddressError, match="'x'.*Did you mean|no site 'x'"):
        vi.value_and_grad(vi.forward_kl(normal(1.0), amortised, "x"))(BEST, KEY)
    with pytest.raises(AddressError, match="'z'"):  # a latent that is forgotten would silently become an observation
        vi.value_and_grad(vi.forward_kl(two(), amortised, "y"))(BEST, KEY)
    with pytest.raises(AddressError, match="as a whole"):
        vi.value_and_grad(vi.forward_kl(batch(), amortised, ex.select(("y", 0))))(BEST, KEY)
    with pytest.raises(ControlFlowError, match="observed"):
        data = ex.model(lambda: (normal_and_data(), None)[1])
        vi.value_and_grad(vi.forward_kl(data(), amortised, "y"))(BEST, KEY)
    with pytest.raises(TypeError, match="bound model"):
        vi.forward_kl(3, amortised, "y")


@ex.model
def two():
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    z = ex.sample("z", dist.Normal(a, 1.0))
    ex.sample("y", dist.Normal(z, 1.0))


def normal_and_data():
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Normal(z, 1.0))
    ex.observe("x", dist.Normal(z, 1.0), 0.3)


# --- minibatches ------------------------------------------------------------------------------------------------------

DATA = np.random.default_rng(1).normal(0.8, 1.0, (3, 4))


@ex.model
def batch():
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    jax.vmap(lambda _: ex.sample("y", dist.Normal(z, 1.0)))(jnp.arange(4))


@ex.model
def whole():
    z = ex.sample("z", dist.Normal(0.0, 1.0))
    jax.vmap(lambda _: ex.sample("y", dist.Normal(z, 1.0)))(jnp.arange(12))


def part(y: Any) -> Any:
    return ex.with_data_subsample(batch(), "y", total=12).given({"y": jnp.asarray(y)})


@pytest.mark.usefixtures("x64")
def test_the_mean_over_minibatches_is_the_elbo_of_all_data():
    """Draw by draw, with value and gradient: the objective takes the model's own scale."""
    all_data = samples(vi.elbo(whole().given({"y": DATA.ravel()}), guide), OFF)(KEY, 10)
    parts = [samples(vi.elbo(part(y), guide), OFF)(KEY, 10) for y in DATA]
    np.testing.assert_allclose(np.mean(parts, 0), all_data, rtol=1e-10)


def test_the_next_minibatch_compiles_nothing():
    """The same for the bounds of several particles, whose mean over batches is not that of all data: log is concave."""
    for bound in (lambda p: vi.vimco(p, guide, 3), lambda p: vi.iwelbo(p, guide, 3)):
        first = vi.value_and_grad(bound(part(DATA[0])))(OFF, KEY)
        with count_compiles() as compiles:
            second = vi.value_and_grad(bound(part(DATA[1])))(OFF, KEY)
        assert compiles == [] and first[0] != second[0]


# --- an objective of one's own ----------------------------------------------------------------------------------------


def my_bound(params):
    z, log_q = vi.simulate(guide(params))
    lower = vi.log_density(POSTERIOR, z) - log_q
    return lower + vi.wake_guide(POSTERIOR, guide, 8)(params)  # both divergences at once


def test_an_objective_of_three_lines_retrains():
    """F44: another objective in the same call of `vi.fit`; nothing else changes."""
    assert len(inspect.getsource(my_bound).splitlines()) <= 10
    start = {"mean": jnp.asarray(-1.0), "log_sd": jnp.asarray(0.5)}
    rate = optax.linear_schedule(0.05, 0.0, 800)
    for bound in (vi.elbo(POSTERIOR, guide), vi.objective(my_bound)):
        fit = vi.fit(bound, start, optax.adam(rate), key=KEY, num_steps=800, num_samples=16)
        assert abs(fit.params["mean"] - 0.5) < 0.05 and abs(fit.params["log_sd"] - EXACT["log_sd"]) < 0.05


# --- what is refused --------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "elbo": vi.elbo,
    "iwelbo": lambda p, g: vi.iwelbo(p, g, 2),
    "renyi": lambda p, g: vi.renyi(p, g, 2, 0.5),
    "chi_square": lambda p, g: vi.chi_square(p, g, 2),
    "vimco": lambda p, g: vi.vimco(p, g, 2),
    "stl": vi.stl,
    "dreg": lambda p, g: vi.dreg(p, g, 2),
    "wake_model": lambda p, g: vi.wake_model(p, g, 2),
    "wake_guide": lambda p, g: vi.wake_guide(p, g, 2),
    "wake_sleep": lambda p, g: vi.wake_sleep(p, g, 2),
    "thermodynamic": lambda p, g: vi.thermodynamic(p, g, 2, (0.0, 1.0)),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_targets_and_guides_that_do_not_fit_are_refused(make):
    for target in (normal(1.0), normal, None):
        with pytest.raises(TypeError, match="posterior"):
            make(target, guide)
    with pytest.raises(TypeError, match="must return a posterior"):
        vi.value_and_grad(make(lambda p: normal(1.0), guide))(OFF, KEY)
    with pytest.raises(AddressError, match="'a'"):
        vi.value_and_grad(make(two().given({"y": 0.0}), guide))(OFF, KEY)
    with pytest.raises(ShapeError, match="'z'"):
        wide = ex.model(lambda p: ex.sample("z", dist.Normal(jnp.zeros(2), 1.0)))
        vi.value_and_grad(make(POSTERIOR, wide))(OFF, KEY)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vi.renyi(POSTERIOR, guide, 0, 0.5), "num_particles >= 1"),
        (lambda: vi.renyi(POSTERIOR, guide, 2, math.inf), "finite alpha"),
        (lambda: vi.chi_square(POSTERIOR, guide, 1), "num_particles >= 2"),
        (lambda: vi.chi_square(POSTERIOR, guide, 4, 0.5), "order >= 1"),
        (lambda: vi.vimco(POSTERIOR, guide, 1), "num_particles >= 2"),
        (lambda: vi.dreg(POSTERIOR, guide, 0), "num_particles >= 1"),
        (lambda: vi.wake_model(POSTERIOR, guide, 0), "num_particles >= 1"),
        (lambda: vi.wake_guide(POSTERIOR, guide, 1), "num_particles >= 2"),
        (lambda: vi.wake_sleep(POSTERIOR, guide, 1), "num_particles >= 2"),
        (lambda: vi.thermodynamic(POSTERIOR, guide, 1, (0.0, 1.0)), "num_particles >= 2"),
        (lambda: vi.thermodynamic(POSTERIOR, guide, 2, (0.1, 1.0)), "increase from 0 to 1"),
        (lambda: vi.thermodynamic(POSTERIOR, guide, 2, (0.0, 0.5, 0.5, 1.0)), "increase from 0 to 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
