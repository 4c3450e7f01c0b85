"""Choosing strategies: the table of estimators, other strategies from outside, what is biased, and the diagnosis."""

import itertools
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl import AddressError, ControlFlowError, OutsideModelError, StrategyError, SupportError
from helpers import two_stage_z

KEY = jax.random.key(20261128)
P = 0.3
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def flips(n: int, strategy: Any = None) -> Any:
    return lambda p: jax.vmap(lambda _: ex.sample("b", dist.Bernoulli(p), gradient=strategy))(jnp.arange(n))


# --- the table --------------------------------------------------------------------------------------------------------


def row_of(cost: Any, address: str = "b") -> tuple[str, int, str]:
    row = vi.estimators(vi.objective(cost), P)[address]
    return row["strategy"], row["runs"], row["orders"]


ROWS = {
    "a normal": (lambda p: ex.sample("b", dist.Normal(p, 1.0)), ("Reparam()", 1, "all")),
    "a flip": (lambda p: 1.0 * ex.sample("b", dist.Bernoulli(p)), ("Enum() jointly", 2, "all")),
    "lanes apart": (lambda p: jnp.sum(flips(100)(p) * 2.0), ("Enum() by lanes", 2, "all")),
    "few lanes together": (lambda p: jnp.sum(flips(3)(p) * 2.0) ** 2, ("Enum() jointly", 8, "all")),
    "many lanes together": (
        lambda p: jnp.sum(flips(100)(p) * 2.0) ** 2,
        ("Reinforce(baseline='leave-one-out')", 1, "all"),
    ),
    "many lanes, asked": (lambda p: jnp.sum(flips(100, vi.Enum())(p)) ** 2.0, ("Enum() locally", 201, "first")),
    "weak": (lambda p: jnp.sum(flips(5, vi.MVD())(p)) ** 2.0, ("MVD()", 11, "first")),
    "weak, lanes apart": (lambda p: jnp.sum(flips(5, vi.MVD())(p) * 2.0), ("MVD()", 3, "first")),
    "antithetic": (lambda p: jnp.sum(flips(5, vi.DisARM())(p)) ** 2.0, ("DisARM()", 3, "first")),
    "counts": (lambda p: 1.0 * ex.sample("b", dist.Poisson(p)), ("Reinforce(baseline='leave-one-out')", 1, "all")),
    "steps apart": (
        lambda p: lax.scan(lambda c, _: (c, 1.0 * ex.sample("b", dist.Bernoulli(p))), 0.0, length=100)[1].sum(),
        ("Enum() by lanes", 2, "all"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_of_estimators(name):
    cost, expected = ROWS[name]
    assert row_of(cost) == expected


def test_the_table_prints_itself_and_knows_its_addresses():
    table = vi.estimators(vi.objective(lambda p: 1.0 * ex.sample("b", dist.Bernoulli(p))), P)
    assert "Enum() jointly" in repr(table) and "<table>" in table._repr_html_()
    with pytest.raises(AddressError, match="'b'"):
        table["bb"]


@pytest.mark.parametrize(
    ("k", "n"), [(2, 1), *(pytest.param(k, n, marks=pytest.mark.slow) for k, n in ((3, 2), (2, 5), (3, 1), (3, 5)))]
)
def test_enumeration_by_lanes_is_exact(k, n):
    """Each lane has its own probabilities, and its own choice after it; catches weights that leave their lane."""
    logits = jax.random.normal(KEY, (n, k))

    def cost(t: Any) -> Any:
        def lane(row: Any, shift: Any) -> Any:
            z = ex.sample("z", dist.Categorical(logits=t * row), gradient=vi.Enum())
            b = ex.sample("b", dist.Bernoulli(jax.nn.sigmoid(z - shift * t)), gradient=vi.Enum())
            return jnp.exp(0.3 * z * b) + t * b

        return jnp.sum(jax.vmap(lane)(logits, jnp.arange(n)))

    def truth(t: Any) -> Any:
        total = 0.0
        for i, z, b in itertools.product(range(n), range(k), (0, 1)):
            q = jax.nn.sigmoid(z - i * t)
            p = jax.nn.softmax(t * logits[i])[z] * (q if b else 1.0 - q)
            total += p * (jnp.exp(0.3 * z * b) + t * b)
        return total

    objective = vi.objective(cost)
    assert {row["strategy"] for row in vi.estimators(objective, 0.7).rows} <= {"Enum() by lanes", "Enum() jointly"}
    for derive in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
        np.testing.assert_allclose(derive(lambda t: objective.surrogate(t, KEY))(0.7), derive(truth)(0.7), rtol=1e-10)


# --- strategies from outside ------------------------------------------------------------------------------------------


@ex.model
def inner(p: Any) -> None:
    ex.sample("c", dist.Bernoulli(p))


@ex.model
def guide(p: Any) -> None:
    ex.sample("b", dist.Bernoulli(p))
    ex.sample("sub", inner(p))


def squared(program: Any) -> Any:
    choices, _ = vi.simulate(program)
    return (choices["b"] + 2.0 * choices["sub"]["c"]) ** 2


def test_strategies_given_to_a_guide_from_outside():
    changed = vi.with_gradients(guide, {"b": vi.MVD(), "sub/c": vi.Reinforce(baseline=jnp.asarray(0.5))})
    objective = vi.objective(lambda p: squared(changed(p)))
    table = vi.estimators(objective, P)
    assert table["b"]["strategy"] == "MVD()" and table["sub/c"]["strategy"].startswith("Reinforce")
    assert vi.estimators(vi.objective(lambda p: squared(guide(p))), P)["b"]["strategy"] == "Enum() jointly"
    run = jax.jit(jax.vmap(lambda key: jnp.stack(jax.value_and_grad(objective.surrogate)(P, key))))
    exact = [5 * P + 4 * P**2, 5 + 8 * P]
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.array(exact), KEY, 10_000)


def test_a_program_keeps_its_density_under_other_strategies():
    program = vi.with_gradients(guide(P), {"b": vi.DisARM()})
    choices = {"b": 1, "sub": {"c": 0}}
    assert program.assess(choices)[0] == guide(P).assess(choices)[0]
    np.testing.assert_array_equal(program.simulate(KEY).choices["b"], guide(P).simulate(KEY).choices["b"])


@pytest.mark.parametrize(
    ("strategies", "error", "says"),
    [
        ({"bb": vi.MVD()}, AddressError, "'b'"),
        ({"b": "mvd"}, StrategyError, "no gradient strategy"),
        ({"b": vi.StraightThrough()}, StrategyError, "at the site"),
    ],
)
def test_wrong_strategies_from_outside(strategies, error, says):
    with pytest.raises(error, match=says):
        vi.with_gradients(guide, strategies)(P)


@pytest.mark.parametrize(
    ("d", "strategy", "says"),
    [
        (dist.Normal(0.0, 1.0), vi.DisARM(), "Bernoulli"),
        (dist.Weibull(1.0, 2.0), vi.MVD(), "known for"),
        (dist.Bernoulli(0.5 * jnp.ones(2)).to_event(1), vi.MVD(), "to_event"),
        (dist.Categorical(jnp.ones(3) / 3), vi.Rebar(), "one-hot"),
        (dist.Multinomial(2, jnp.ones(3) / 3), vi.StraightThrough(), "one-hot"),
        (dist.Poisson(1.0), vi.Reparam(), "no differentiable sampler"),
    ],
)
def test_strategies_that_do_not_fit_a_distribution(d, strategy, says):
    with pytest.raises(StrategyError, match=says):
        vi.objective(lambda p: p * jnp.sum(ex.sample("b", d, gradient=strategy))).surrogate(P, KEY)


# --- relaxations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [vi.StraightThrough(), vi.GumbelSoftmax(), vi.NoGradient()])
def test_biased_strategies_have_to_be_allowed(strategy):
    objective = vi.objective(lambda p: 2.0 * ex.sample("b", dist.Bernoulli(p), gradient=strategy))
    with pytest.raises(StrategyError, match=r"'b'.*biased.*allowing\('b'\)"):
        objective.surrogate(P, KEY)
    objective.allowing("b").surrogate(P, KEY)
    with pytest.raises(AddressError, match="'b'"):
        objective.allowing("c").surrogate(P, KEY)
    with pytest.raises(TypeError, match="set of addresses"):
        vi.objective(lambda p: p, allow="b")


def test_straight_through_has_the_right_values_and_the_slope_of_the_relaxation():
    cost = lambda p: 3.0 * ex.sample("b", dist.Bernoulli(p), gradient=vi.StraightThrough(0.7))  # noqa: E731
    objective = vi.objective(cost, allow={"b"})
    value, gradient = jax.jit(jax.vmap(lambda k: jax.value_and_grad(objective.surrogate)(P, k)))(
        jax.random.split(KEY, 4000)
    )
    assert set(np.round(np.unique(value), 9)) == {0.0, 3.0} and np.all(gradient > 0)


def one_hot(t: Any) -> Any:
    weights = jnp.array([1.0, -2.0, 4.0])
    return jnp.sum(ex.sample("z", dist.Multinomial(1, logits=t), gradient=vi.Rebar()) * weights) ** 2


def test_rebar_is_unbiased_and_better_than_the_plain_score():
    logits = jnp.array([0.3, -0.2, 0.5])
    exact = jax.grad(lambda t: jax.nn.softmax(t) @ jnp.array([1.0, 4.0, 16.0]))(logits)
    run = jax.jit(jax.vmap(lambda key: jax.grad(vi.objective(one_hot).surrogate)(logits, key)))
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.asarray(exact), KEY, 20_000)

    def spread(strategy: Any) -> float:
        cost = vi.objective(lambda p: jnp.sum(flips(6, strategy)(p) - 0.45) ** 2.0)
        return float(np.std(jax.jit(jax.vmap(lambda k: jax.grad(cost.surrogate)(P, k)))(jax.random.split(KEY, 4000))))

    assert spread(vi.Rebar()) < 0.7 * spread(vi.Reinforce(baseline=None))


def test_rebar_refuses_what_would_bias_it():
    def chain(p: Any) -> Any:
        b = ex.sample("b", dist.Bernoulli(p), gradient=vi.Rebar())
        return 1.0 * ex.sample("c", dist.Bernoulli(0.2 + 0.5 * b), gradient=vi.Reinforce())

    with pytest.raises(StrategyError, match="'c'.*depends on it"):
        vi.objective(chain).surrogate(P, KEY)

    def loop(p: Any) -> Any:
        step = lambda c, _: (c + ex.sample("b", dist.Bernoulli(p), gradient=vi.Rebar()), None)  # noqa: E731
        return lax.scan(step, 0.0, length=2)[0]

    with pytest.raises(StrategyError, match="loop"):
        vi.objective(loop).surrogate(P, KEY)


@pytest.mark.parametrize("strategy", [vi.StraightThrough(), vi.Rebar(), vi.GumbelSoftmax()])
def test_relaxed_guides_of_models_with_discrete_latents(strategy):
    """A model's flip may be scored at a value between, with the same formula; Rebar stays unbiased."""

    @ex.model
    def model() -> None:
        ex.sample("y", dist.Normal(2.0 * ex.sample("b", dist.Bernoulli(0.3)), 1.0))

    relaxed = ex.model(lambda p: ex.sample("b", dist.Bernoulli(p), gradient=strategy))
    objective = vi.elbo(model().given({"y": 1.5}), relaxed).allowing("b")
    run = jax.jit(jax.vmap(lambda key: jnp.stack(jax.value_and_grad(objective.surrogate)(0.4, key))))
    assert np.isfinite(run(jax.random.split(KEY, 100))).all()
    if isinstance(strategy, vi.Rebar):
        exact = jax.value_and_grad(vi.elbo(model().given({"y": 1.5}), guide_of_one).surrogate)(0.4, KEY)
        two_stage_z(lambda key, n: run(jax.random.split(key, n)), np.asarray(exact), KEY, 20_000)


def test_a_float_for_a_discrete_site_is_refused_where_nothing_is_relaxed():
    """Else a normal draw would be scored as a flip, and the number be meaningless."""
    flip = ex.model(lambda: ex.sample("b", dist.Bernoulli(0.3)))
    cost = lambda m: vi.log_density(flip(), {"b": ex.sample("x", dist.Normal(m, 1.0))})  # noqa: E731
    with pytest.raises(SupportError, match="'b'.*discrete"):
        vi.objective(cost).surrogate(0.0, KEY)


def test_rebar_gives_first_derivatives_only():
    with pytest.raises(StrategyError, match="'z'.*first derivatives only"):
        jax.hessian(vi.objective(one_hot).surrogate)(jnp.array([0.3, -0.2, 0.5]), KEY)


guide_of_one = ex.model(lambda p: ex.sample("b", dist.Bernoulli(p)))


def test_costs_outside_an_objective_are_refused():
    with pytest.raises(OutsideModelError, match="add_cost"):
        vi.add_cost(1.0)
    with pytest.raises(OutsideModelError, match="add_cost"):
        jax.jit(vi.add_cost)(1.0)


def test_costs_in_a_loop_of_unknown_length_are_refused():
    def cost(p: Any) -> Any:
        def body(i: Any) -> Any:
            vi.add_cost(p)
            return i + 1

        return 1.0 * lax.while_loop(lambda i: i < 3, body, 0)

    with pytest.raises(ControlFlowError, match="while"):
        vi.objective(cost).surrogate(P, KEY)


# --- the diagnosis ----------------------------------------------------------------------------------------------------


def test_the_diagnosis_measures_noise_and_finds_better_strategies():
    """A flip by its score costs 9 b + 1: the gradient's variance is exact, and enumeration takes it all away."""

    def cost(t: Any) -> Any:
        b = ex.sample("b", dist.Bernoulli(t["p"]), gradient=vi.Reinforce(baseline=None))
        x = ex.sample("x", dist.Normal(t["m"], 1.0))
        return 9.0 * b + 0.1 * x**2

    params = {"m": jnp.asarray(1.0), "p": jnp.asarray(P)}
    found = vi.diagnose(vi.objective(cost), params, KEY, num_estimates=4000)
    np.testing.assert_allclose(found.sites["b"].noise, 9.0 / P * np.sqrt(P * (1.0 - P)), rtol=0.05)
    np.testing.assert_allclose(found.sites["b"].signal, 9.0, rtol=0.1)
    np.testing.assert_allclose(found.sites["x"].noise, 0.2, rtol=0.05)
    np.testing.assert_allclose(found.total.noise**2, sum(s.noise**2 for s in found.sites.values()), rtol=1e-6)
    assert found.better["b"][0] in (vi.Enum(), vi.MVD()) and "x" not in found.better
    assert found.bias_p_value > 1e-6 and np.isnan(found.k_hat)
    assert "'b'" in repr(found) and "At 'b' use vi." in repr(found)


def test_the_diagnosis_sees_a_bias():
    cost = lambda p: (ex.sample("b", dist.Bernoulli(p), gradient=vi.StraightThrough()) - 0.45) ** 4  # noqa: E731
    found = vi.diagnose(vi.objective(cost, allow={"b"}), P, KEY, num_estimates=2000, try_others=False)
    assert found.bias_p_value < 1e-6 and any("biased" in line for line in found.advice)


@pytest.mark.slow
def test_the_diagnosis_of_a_guide():
    """z ~ N(0, 1), y ~ N(z, 1) at y = 1: the guide N(1/2, 1/2) is exact, one that is too narrow has heavy weights."""

    @ex.model
    def model() -> None:
        ex.sample("y", dist.Normal(ex.sample("z", dist.Normal(0.0, 1.0)), 1.0))

    normal = ex.model(lambda t: ex.sample("z", dist.Normal(t["m"], t["s"])))
    bound = vi.elbo(model().given({"y": 1.0}), normal)
    good = vi.diagnose(bound, {"m": 0.5, "s": 0.8}, KEY, num_estimates=50, try_others=False)
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(1.0))
    assert good.k_hat < 0.5 and abs(good.bounds[100] - evidence) < 0.01
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(good.bounds.values()))
    bad = vi.diagnose(bound, {"m": 0.5, "s": 0.2}, KEY, num_estimates=50, try_others=False)
    assert bad.k_hat > 0.7 and any("k-hat" in line for line in bad.advice)
    amortised = vi.semi_amortised(
        model().given({"y": 1.0}), normal, lambda t: {"m": t, "s": 0.5 + 0.0 * t}, optax.sgd(0.1), 1
    )
    found = vi.diagnose(amortised, 0.3, KEY, num_estimates=20, try_others=False)
    assert np.isnan(found.k_hat) and not found.bounds  # its guide takes other parameters
    with pytest.raises(ValueError, match="20"):
        vi.diagnose(bound, {"m": 0.5, "s": 0.2}, KEY, num_estimates=5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_pareto_shapes(scale):
    """Against the exact shape of Pareto tails, and ArviZ where it has the function."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000) * scale
    if hasattr(arviz, "psislw"):
        np.testing.assert_allclose(vi.pareto_shape(x), float(arviz.psislw(x)[1]), rtol=1e-6)
    np.testing.assert_allclose(vi.pareto_shape(scale * rng.exponential(size=200_000)), scale, atol=0.15)
    assert np.isnan(vi.pareto_shape([np.nan] * 30)) and vi.pareto_shape([np.inf, *[0.0] * 30]) == np.inf
    with pytest.raises(ValueError, match="25"):
        vi.pareto_shape(np.zeros(3))
