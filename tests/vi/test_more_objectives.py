r"""Shipped objectives on a finite model, exact: expectations over all particles, at 1e-10 in float64.

z ~ Cat(prior), y ~ N(theta * level[z], 1); the guide is Cat(logits phi). The guide's site is enumerated, so that the
surrogate is the expectation over all $3^n$ draws of n particles; the truth is that sum, written out in plain numbers.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

import expectax as ex
from expectax import dist, vi
from expectax.vi._particle_gradients import _without_each
from expectax.vi._shared import log_mean_exp

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
KEY = jax.random.key(20260802)
PRIOR, LEVELS, Y = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.5, 2.0]), 1.1


@ex.model
def mixture(theta):
    z = ex.sample("z", dist.Categorical(PRIOR))
    ex.sample("y", dist.Normal(theta * jnp.take(LEVELS, z), 1.0))


@ex.model
def guide(params):
    ex.sample("z", dist.Categorical(logits=params["phi"]), gradient=vi.Enum())


@ex.model
def drawn_guide(params):
    ex.sample("z", dist.Categorical(logits=params["phi"]), gradient=vi.Reinforce(baseline=None))


def learned(params):
    return mixture(params["theta"]).given({"y": Y})


def fixed(theta):
    return mixture(theta).given({"y": Y})


def start():
    return {"phi": jnp.array([0.2, -0.4, 0.1]), "theta": jnp.asarray(1.3)}


def log_p(params):
    """Return log p(z, y) of the three values of z."""
    return jnp.log(PRIOR) - 0.5 * (Y - params["theta"] * LEVELS) ** 2 - 0.5 * math.log(2.0 * math.pi)


def log_q(params):
    return jax.nn.log_softmax(params["phi"])


def log_evidence(params):
    return float(special.logsumexp(np.asarray(log_p(params))))


def expectation(cost: Any, params: Any, n: int, drawn_from: Any = None) -> Any:
    """Return the expectation of `cost(params, particles)` over all draws of n particles."""
    tuples = jnp.array(list(itertools.product(range(3), repeat=n)))
    logits = log_q(params if drawn_from is None else drawn_from)
    return jnp.sum(jnp.exp(jnp.sum(logits[tuples], axis=1)) * jax.vmap(lambda z: cost(params, z))(tuples))


def weights(params, z):
    return log_p(params)[z] - log_q(params)[z]


def both(f: Any, params: Any) -> list[np.ndarray]:
    value, gradient = jax.jit(jax.value_and_grad(f))(params)
    return [np.asarray(x) for x in (value, gradient["phi"], gradient["theta"])]


def found(objective: Any, params: Any) -> list[np.ndarray]:
    return both(lambda p: objective.surrogate(p, KEY), params)


def close(mine: Any, truth: Any, tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("value", "guide's gradient", "model's gradient"), mine, truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


# --- Rényi and chi-square ---------------------------------------------------------------------------------------------


def renyi_cost(alpha):
    def cost(params, z):
        w = jnp.exp(weights(params, z))
        return jnp.mean(jnp.log(w)) if alpha == 1 else jnp.log(jnp.mean(w ** (1.0 - alpha))) / (1.0 - alpha)

    return cost


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_renyi_is_its_definition(alpha):
    """Value and both gradients: catches a sign of alpha, a mean outside the logarithm, a power of q instead of w."""
    truth = both(lambda p: expectation(renyi_cost(alpha), p, 3), start())
    close(found(vi.renyi(learned, guide, 3, alpha), start()), truth)


def test_renyi_has_second_derivatives():
    def hessian(f: Any) -> np.ndarray:
        return np.asarray(jax.jit(jax.hessian(lambda phi: f({**start(), "phi": phi})))(start()["phi"]))

    objective = vi.renyi(learned, guide, 2, 0.5)
    truth = hessian(lambda p: expectation(renyi_cost(0.5), p, 2))
    np.testing.assert_allclose(hessian(lambda p: objective.surrogate(p, KEY)), truth, rtol=1e-10, atol=1e-10)


def test_renyi_of_alpha_0_is_the_iwelbo_and_of_alpha_1_the_elbo():
    """F41; near 1 the two logarithms must not cancel: at 1 - 1e-9 the error of a plain logsumexp would be 1e-7."""
    close(found(vi.renyi(learned, guide, 3, 0.0), start()), found(vi.iwelbo(learned, guide, 3), start()), 1e-12)
    elbo = found(vi.elbo(learned, guide), start())
    close(found(vi.renyi(learned, guide, 3, 1.0), start()), elbo, 1e-12)
    close(found(vi.renyi(learned, guide, 3, 1.0 - 1e-9), start()), elbo, 1e-8)
    close(found(vi.renyi(learned, guide, 3, 1.0 + 1e-9), start()), elbo, 1e-8)
    assert abs(found(vi.renyi(learned, guide, 3, 0.99), start())[0] - elbo[0]) > 1e-5


@pytest.mark.slow
def test_renyi_falls_with_alpha():
    values = [found(vi.renyi(learned, guide, 3, alpha), start())[0] for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert all(low < high for high, low in itertools.pairwise(values))
    assert values[1] < log_evidence(start())


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
def test_chi_square_is_its_definition(order):
    def cost(params, z):
        return -jnp.log(jnp.mean(jnp.exp(weights(params, z)) ** order)) / order

    truth = both(lambda p: expectation(cost, p, 3), start())
    close(found(vi.chi_square(learned, guide, 3, order), start()), truth)


def test_chi_square_is_minus_an_upper_bound():
    """With many particles `-estimate` goes to log E[w^2] / 2, above the evidence, and maximising lowers it."""
    params = start()
    exact = 0.5 * special.logsumexp(2.0 * weights(params, np.arange(3)) + log_q(params))
    estimate = vi.estimate(vi.chi_square(fixed(1.3), drawn_guide, 2000), params, KEY, 400)
    assert exact > log_evidence(params) + 0.01
    assert abs(-estimate.mean - exact) < 5.0 * estimate.standard_error + 1e-3
    close([-found(vi.chi_square(fixed(1.3), guide, 2), posterior_guide())[0]] * 3, [log_evidence(start())] * 3)


def posterior_guide():
    """Return parameters at which the guide is the posterior: every bound is tight there."""
    return {"phi": log_p(start()), "theta": jnp.asarray(1.3)}


def test_iwelbo_grows_with_the_particles():
    values = [found(vi.iwelbo(learned, guide, n), start())[0] for n in (1, 2, 3, 4)]
    assert all(low < high for low, high in itertools.pairwise([*values, log_evidence(start())]))


# --- VIMCO ------------------------------------------------------------------------------------------------------------


def iwelbo_cost(params, z):
    return jax.nn.logsumexp(weights(params, z)) - math.log(len(z))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_vimco_is_unbiased_for_the_gradient_of_the_iwelbo(n):
    """F42; catches a baseline that holds the particle itself, a score at the wrong parameters, a missing dL."""
    truth = both(lambda p: expectation(iwelbo_cost, p, n), start())
    close(found(vi.vimco(learned, guide, n), start()), truth)
    close(found(vi.iwelbo(learned, guide, n), start()), truth)


def test_the_baseline_of_a_particle_is_made_of_the_others():
    """In numpy's loops; unbiasedness alone would hold with no baseline at all."""
    log_w = np.array([0.3, -1.2, 2.5, 0.9])
    expected = []
    for i in range(4):
        replaced = log_w.copy()
        replaced[i] = np.mean(np.delete(log_w, i))
        expected.append(special.logsumexp(replaced) - math.log(4))
    np.testing.assert_allclose(_without_each(jnp.asarray(log_w)), expected, rtol=1e-12)


def test_vimco_is_blind_to_a_constant_in_the_density():
    """Draw by draw: log p + 40 moves no gradient. Without the baseline each would move by 40 times a score."""

    @ex.model
    def raised(theta):
        z = ex.sample("z", dist.Categorical(PRIOR))
        ex.sample("y", dist.Normal(theta * jnp.take(LEVELS, z), 1.0))
        ex.factor("constant", 40.0)

    plain = found(vi.vimco(learned, drawn_guide, 3), start())
    high = found(vi.vimco(lambda p: raised(p["theta"]).given({"y": Y}), drawn_guide, 3), start())
    close(high, [plain[0] + 40.0, *plain[1:]], 1e-9)
    moved = found(vi.iwelbo(lambda p: raised(p["theta"]).given({"y": Y}), drawn_guide, 3), start())
    assert np.max(np.abs(moved[1] - found(vi.iwelbo(learned, drawn_guide, 3), start())[1])) > 1.0


# --- wake-sleep -------------------------------------------------------------------------------------------------------


def snis(term: Any) -> Any:
    """Return the cost sum_i wbar_i term(params)[z_i], with weights and particles of fixed parameters."""

    def cost(params, z):
        return jnp.sum(jax.nn.softmax(weights(start(), z)) * term(params)[z])

    return cost


@pytest.mark.parametrize(
    ("objective", "term"), [(vi.wake_model, log_p), (vi.wake_guide, log_q)], ids=["wake_model", "wake_guide"]
)
def test_wake_phases_are_self_normalised_importance_sampling(objective, term):
    """Catches weights or particles with a derivative, and either phase that moves the other's parameters."""
    truth = both(lambda p: expectation(snis(term), p, 3, drawn_from=start()), start())
    mine = found(objective(learned, guide, 3), start())
    close(mine, truth)
    assert np.all(mine[1 if objective is vi.wake_model else 2] == 0.0)


@pytest.mark.slow
def test_wake_sleep_is_both_phases_with_the_value_of_the_iwelbo():
    value = found(vi.iwelbo(learned, guide, 3), start())[0]
    phases = [found(vi.wake_guide(learned, guide, 3), start())[1], found(vi.wake_model(learned, guide, 3), start())[2]]
    close(found(vi.wake_sleep(learned, guide, 3), start()), [value, *phases])
    bound = found(vi.iwelbo(learned, guide, 3), start())
    np.testing.assert_allclose(phases[1], bound[2], rtol=1e-10)  # the model learns by the IWELBO


def test_classic_wake_sleep_is_a_sum_of_two_objectives():
    """The sleep phase draws from the model at stopped parameters: it moves the guide alone, in every draw."""

    @ex.model
    def amortised(params, observations):
        ex.sample("z", dist.Categorical(logits=params["phi"] * observations["y"]))

    sleep, wake = vi.forward_kl(lambda p: mixture(p["theta"]), amortised, "y"), vi.wake_model(learned, guide, 3)
    asleep = found(sleep, start())
    assert np.all(asleep[2] == 0.0) and np.any(asleep[1] != 0.0)
    together = found(vi.objective(lambda p: wake(p) + sleep(p)), start())
    np.testing.assert_allclose(together[2], found(wake, start())[2], rtol=1e-10)


# --- particles that are impossible under the model ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [vi.iwelbo, vi.vimco, vi.wake_model, vi.wake_guide, vi.wake_sleep])
def test_impossible_particles_have_no_weight(make):
    """z = 0 has density 0 given y: in all draws but those of z = 0 alone, value and gradient are finite."""

    @ex.model
    def narrow(theta):
        z = ex.sample("z", dist.Categorical(PRIOR))
        ex.factor("possible", jnp.where(z == 0, -jnp.inf, theta * z))

    @ex.model
    def rarely_impossible(params):
        ex.sample("z", dist.Categorical(logits=params["phi"]), gradient=vi.Reinforce(None))

    objective = make(lambda p: narrow(p["theta"]).given({}), rarely_impossible, 3)
    run = jax.jit(jax.vmap(lambda k: jax.value_and_grad(lambda p: objective.surrogate(p, k))(start())))
    value, gradient = run(jax.random.split(KEY, 200))
    numbers = np.column_stack([value, gradient["phi"], gradient["theta"]])
    alone = np.isneginf(iwelbo_values(narrow, rarely_impossible))
    assert 0 < alone.sum() < 40
    assert np.isfinite(numbers[~alone]).all()


@pytest.mark.parametrize("x", [[-np.inf, -np.inf], [-np.inf, 0.3], [1000.0, 999.0], [-1000.0, -1001.0]])
def test_log_mean_exp_at_the_ends(x):
    np.testing.assert_allclose(log_mean_exp(jnp.array(x)), special.logsumexp(x) - math.log(2), rtol=1e-14)


def iwelbo_values(narrow: Any, guide: Any) -> np.ndarray:
    objective = vi.iwelbo(lambda p: narrow(p["theta"]).given({}), guide, 3)
    return np.asarray(jax.jit(jax.vmap(lambda k: objective.surrogate(start(), k)))(jax.random.split(KEY, 200)))


# --- the thermodynamic objective --------------------------------------------------------------------------------------

BETAS = (0.0, 0.3, 0.7, 1.0)


def tempered_cost(betas: Any) -> Any:
    """The estimator, written out: the mean at each temperature, with the covariance as its derivative."""

    def cost(params, z):
        total = 0.0
        for low, high in itertools.pairwise(betas):
            log_w, log_pi = weights(params, z), low * log_p(params)[z] + (1.0 - low) * log_q(params)[z]
            probs = jax.nn.softmax(low * weights(start(), z))
            centred = log_pi - jnp.sum(probs * log_pi)
            covariance = jnp.sum(probs * centred * (weights(start(), z) - jnp.sum(probs * weights(start(), z))))
            total += (high - low) * (jnp.sum(probs * log_w) + replace(covariance * len(z) / (len(z) - 1)))
        return total

    return cost


def replace(derivative: Any) -> Any:
    return derivative - lax.stop_gradient(derivative)


def exact_thermodynamic(params):
    total = 0.0
    for low, high in itertools.pairwise(BETAS):
        log_w = log_p(params) - log_q(params)
        total += (high - low) * jnp.sum(jax.nn.softmax(log_q(params) + low * log_w) * log_w)
    return total


def test_thermodynamic_is_its_estimator():
    truth = both(lambda p: expectation(tempered_cost(BETAS), p, 3, drawn_from=start()), start())
    close(found(vi.thermodynamic(learned, guide, 3, BETAS), start()), truth)


def test_thermodynamic_of_one_step_is_the_elbo_unbiased():
    close(found(vi.thermodynamic(learned, guide, 3, (0, 1)), start()), found(vi.elbo(learned, guide), start()))


def test_thermodynamic_is_consistent():
    """Value and gradient with 4000 particles against the sum over z: 5 standard errors and 3e-4 for the O(1/n) bias."""
    objective = vi.thermodynamic(learned, drawn_guide, 4000, BETAS)
    run = jax.jit(jax.vmap(lambda k: jax.value_and_grad(lambda p: objective.surrogate(p, k))(start())))
    value, gradient = run(jax.random.split(KEY, 100))
    draws = np.column_stack([value, gradient["phi"], gradient["theta"]])
    truth = np.hstack(both(exact_thermodynamic, start()))
    assert np.all(np.abs(draws.mean(0) - truth) < 5.0 * draws.std(0) / 10.0 + 3e-4)


@pytest.mark.slow
def test_thermodynamic_stays_below_the_iwelbo_and_rises_to_it():
    """For each draw, at any number of particles: the left sum of a rising derivative."""
    iwelbo = found(vi.iwelbo(learned, guide, 2), start())[0]
    grids = [np.linspace(0.0, 1.0, steps + 1) for steps in (1, 2, 8, 400)]
    values = [found(vi.thermodynamic(learned, guide, 2, grid), start())[0] for grid in grids]
    assert all(low < high for low, high in itertools.pairwise([*values, iwelbo]))
    assert iwelbo - values[-1] < 1e-2 < iwelbo - values[1]


# --- amortised guides on a finite model -------------------------------------------------------------------------------


def test_forward_kl_is_the_joint_expectation_of_log_q():
    """z ~ Cat(prior), y ~ Bern(rate[z]); q(z | y) = Cat(table[y]): value and gradient are sums over (z, y)."""
    rates = np.array([0.2, 0.6, 0.9])

    @ex.model
    def program():
        z = ex.sample("z", dist.Categorical(PRIOR))
        ex.sample("y", dist.Bernoulli(jnp.take(rates, z)))

    @ex.model
    def amortised(table, observations):
        ex.sample("z", dist.Categorical(logits=table[observations["y"]]))

    joint = np.stack([PRIOR * (1.0 - rates), PRIOR * rates])
    table = jnp.array([[0.3, -0.2, 0.0], [0.1, 0.5, -0.7]])
    objective = vi.forward_kl(program(), amortised, "y")
    run = jax.jit(jax.value_and_grad(lambda t: objective.surrogate(t, KEY)))
    mine = run(table)
    truth = jax.value_and_grad(lambda t: jnp.sum(joint * jax.nn.log_softmax(t, axis=1)))(table)
    np.testing.assert_allclose(mine[0], truth[0], rtol=1e-10)
    np.testing.assert_allclose(mine[1], truth[1], rtol=1e-10)
    np.testing.assert_allclose(run(jnp.log(joint))[1], 0.0, atol=1e-12)
