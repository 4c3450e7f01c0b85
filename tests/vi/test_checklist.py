"""The paper's estimators one by one, with their known values: p = 0.3, f(b) = 2 if b else -p (value 0.39, slope 1.6).

Where an estimator has no variance the values are exact, else two-stage z-tests (false-alarm rate 1e-6). The numbers
F11 to F34 are those of a list of what programmable variational inference must do (Becker et al. 2024; Lew et al. 2023).
F41 to F44, on objectives, are in `test_more_objectives`; F30, on jumps, also in `test_soundness`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl import AddressError, ControlFlowError
from helpers import two_stage_z

KEY = jax.random.key(20261127)
P = 0.3
PLAIN = vi.Reinforce(baseline=None)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def gradients(cost: Any, theta: Any, num_samples: int = 1) -> Any:
    """Return a sampler of `[value, gradient...]`, one estimate each."""
    objective = cost if isinstance(cost, vi.Objective) else vi.objective(cost)

    def one(key: Any) -> Any:
        value, gradient = jax.value_and_grad(objective.surrogate)(theta, key, num_samples)
        return jnp.concatenate([jnp.ravel(v) for v in (value, *jax.tree.leaves(gradient))])

    run = jax.jit(jax.vmap(one))
    return lambda key, n: run(jax.random.split(key, n))


def holds(cost: Any, theta: Any, exact: Any, n: int = 20_000, num_samples: int = 1) -> None:
    """Check value and gradient by a z-test."""
    two_stage_z(gradients(cost, theta, num_samples), np.asarray(exact, float), KEY, n)


def is_exact(cost: Any, theta: Any, exact: Any) -> None:
    """Check value and gradient of an estimator without variance."""
    np.testing.assert_allclose(gradients(cost, theta)(KEY, 1)[0], exact, rtol=1e-10, atol=1e-10)


def paper(strategy: Any) -> Any:
    return lambda p: jnp.where(ex.sample("b", dist.Bernoulli(p), gradient=strategy) == 1, 2.0, -p)


def spread(cost: Any, theta: Any, num_samples: int = 1) -> float:
    return float(np.std(np.asarray(gradients(cost, theta, num_samples)(KEY, 4000))[:, 1]))


@ex.model
def model() -> None:
    ex.sample("y", dist.Normal(ex.sample("z", dist.Normal(0.0, 1.0)), 1.0))


@pytest.mark.parametrize("address", ["zz", "Z"])
def test_f11_guide_and_model_must_have_the_same_addresses(address):
    guide = ex.model(lambda m: ex.sample(address, dist.Normal(m, 1.0)))
    with pytest.raises(AddressError, match="z"):
        vi.elbo(model().given({"y": 1.0}), guide).surrogate(0.0, KEY)


def test_f11_a_site_too_many_is_refused():
    @ex.model
    def guide(m: Any) -> None:
        ex.sample("z", dist.Normal(m, 1.0))
        ex.sample("more", dist.Normal(m, 1.0))

    with pytest.raises(AddressError, match="more"):
        vi.elbo(model().given({"y": 1.0}), guide).surrogate(0.0, KEY)


def test_f12_flip_enumerated():
    is_exact(paper(vi.Enum()), P, [0.39, 1.6])


def test_f13_flip_by_its_weak_derivative():
    """The gradient of one flip has no variance but that of the explicit -p: (2 + p) - 1[b = 0]."""
    holds(paper(vi.MVD()), P, [0.39, 1.6])


def test_f14_flip_by_its_score():
    holds(paper(PLAIN), P, [0.39, 1.6])


def test_f15_baselines_are_unbiased_and_help():
    for baseline in (0.39, "leave-one-out", jnp.asarray(0.39)):
        holds(paper(vi.Reinforce(baseline)), P, [0.39, 1.6], num_samples=4)

    def shifted(strategy: Any) -> Any:
        return lambda p: paper(strategy)(p) + 10.0 * ex.sample("b2", dist.Bernoulli(p), gradient=strategy)

    assert spread(shifted(vi.Reinforce()), P, 4) < 0.85 * spread(shifted(PLAIN), P, 4)


def test_f15_a_learned_baseline_goes_to_the_mean_cost():
    """Its own gradient is the mean cost less itself, here 3 p - 0.5; the other gradient stays right."""

    def cost(t: Any) -> Any:
        return 3.0 * ex.sample("b", dist.Bernoulli(t["p"]), gradient=vi.Reinforce(baseline=t["baseline"]))

    holds(cost, {"baseline": jnp.asarray(0.5), "p": jnp.asarray(P)}, [0.9, 0.4, 3.0])


def test_f15_a_network_for_a_baseline():
    """A network of the data, one baseline per lane: gradients of the guide are unbiased, and the network learns."""
    x = jnp.array([-1.0, 0.5, 2.0])

    def cost(t: Any) -> Any:
        def lane(x: Any) -> Any:
            baseline = t["w"] * jnp.tanh(x)
            b = ex.sample("b", dist.Bernoulli(t["p"]), gradient=vi.Reinforce(baseline=baseline))
            return (2.0 + x) * b

        return jnp.sum(jax.vmap(lane)(x))

    slope = np.sum(np.tanh(x) * ((2.0 + x) * P - 0.2 * np.tanh(x)))
    holds(cost, {"p": jnp.asarray(P), "w": jnp.asarray(0.2)}, [7.5 * P, 7.5, slope])


def test_f16_categorical_by_probs_and_by_logits():
    values = jnp.array([1.0, 4.0, -9.0])
    probs = np.array([0.2, 0.5, 0.3])
    is_exact(lambda q: values[ex.sample("z", dist.Categorical(probs=q), gradient=vi.Enum())], probs, [-0.5, 1, 4, -9])
    logits = np.log(probs)
    slope = jax.grad(lambda t: jax.nn.softmax(t) @ values)(logits)
    is_exact(lambda t: values[ex.sample("z", dist.Categorical(logits=t), gradient=vi.Enum())], logits, [-0.5, *slope])


@pytest.mark.parametrize("strategy", [vi.Reparam(), PLAIN, vi.MVD()], ids=["pathwise", "score", "weak"])
def test_f17_normal_in_mean_and_scale(strategy):
    holds(
        lambda t: ex.sample("x", dist.Normal(t["m"], t["s"]), gradient=strategy) ** 2,
        {"m": 0.5, "s": 1.5},
        [2.5, 1.0, 3.0],
    )


def test_f18_multivariate_normals_in_their_covariance():
    """E |x|^2 = |m|^2 + tr S: slope 2 m, and 1 on the diagonal of S; with scales s: 2 s."""
    s = jnp.array([[1.0, 0.3], [0.3, 2.0]])
    cost = lambda t: jnp.sum(ex.sample("x", dist.MultivariateNormal(t["m"], t["s"])) ** 2)  # noqa: E731
    holds(cost, {"m": jnp.array([1.0, -2.0]), "s": s}, [8.0, 2.0, -4.0, 1.0, 0.0, 0.0, 1.0])
    cost = lambda t: jnp.sum(ex.sample("x", dist.Normal(t["m"], t["s"]).to_event(1)) ** 2)  # noqa: E731
    holds(cost, {"m": jnp.array([1.0, -2.0]), "s": jnp.array([1.0, 0.5])}, [6.25, 2.0, -4.0, 2.0, 1.0])


IMPLICIT = {
    "beta": (lambda a: ex.sample("x", dist.Beta(a, 2.0)), 3.0, [0.6, 0.08]),  # a / (a + 2)
    "gamma": (lambda a: ex.sample("x", dist.Gamma(a, 2.0)) ** 2, 3.0, [3.0, 1.75]),  # a (a + 1) / 4
    "dirichlet": (lambda a: ex.sample("x", dist.Dirichlet(jnp.stack([a, 1.0, 1.0])))[0], 2.0, [0.5, 0.125]),
    "student": (lambda d: ex.sample("x", dist.StudentT(d, 0.0, 1.0)) ** 2, 9.0, [9 / 7, -2 / 49]),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_f19_implicit_derivatives(name):
    cost, theta, exact = IMPLICIT[name]
    holds(cost, theta, exact)


def test_f19_a_mixture_and_von_mises_by_their_distribution_functions():
    def mixture(t: Any) -> Any:
        normals = dist.Normal(jnp.stack([t["m"], 2.0]), 1.0)
        mixed = dist.MixtureSameFamily(dist.Categorical(probs=jnp.stack([t["w"], 1.0 - t["w"]])), normals)
        return ex.sample("x", mixed, gradient=vi.Reparam()) ** 2

    holds(mixture, {"m": -1.0, "w": 0.3}, [4.1, -0.6, -3.0])
    ratio = lambda k: jax.scipy.special.i1e(k) / jax.scipy.special.i0e(k)  # noqa: E731
    circle = lambda t: jnp.cos(ex.sample("x", dist.VonMises(t["m"], t["k"]), gradient=vi.Reparam()))  # noqa: E731
    exact = [ratio(2.0) * np.cos(0.5), jax.grad(ratio)(2.0) * np.cos(0.5), -ratio(2.0) * np.sin(0.5)]
    holds(circle, {"k": 2.0, "m": 0.5}, exact)


WEAK = {
    "poisson": (lambda r: ex.sample("k", dist.Poisson(r), gradient=vi.MVD()) ** 2.0, 3.0, [12.0, 7.0]),
    "exponential": (lambda r: ex.sample("x", dist.Exponential(r), gradient=vi.MVD()) ** 2, 2.0, [0.5, -0.5]),
    "geometric": (lambda p: 1.0 * ex.sample("k", dist.Geometric(p), gradient=vi.MVD()), P, [7 / 3, -1 / 0.09]),
    "binomial": (lambda p: ex.sample("k", dist.Binomial(5, p), gradient=vi.MVD()) ** 2.0, P, [3.3, 17.0]),
    "categorical": (
        lambda q: jnp.array([1.0, 4.0, -9.0])[ex.sample("z", dist.Categorical(probs=q), gradient=vi.MVD())],
        np.array([0.2, 0.5, 0.3]),
        [-0.5, 1, 4, -9],
    ),
    "gamma": (
        lambda t: ex.sample("x", dist.Gamma(t["a"], t["b"]), gradient=vi.MVD()) ** 2,
        {"a": 2.0, "b": 1.5},
        [8 / 3, 5 / 2.25, -12 / 1.5**3],
    ),
    "logits": (
        lambda t: 2.0 * ex.sample("b", dist.Bernoulli(logits=t), gradient=vi.MVD()),
        0.0,
        [1.0, 0.5],
    ),
}


@pytest.mark.parametrize("name", WEAK)
def test_f20_weak_derivatives(name):
    cost, theta, exact = WEAK[name]
    holds(cost, theta, exact)


def test_f21_geometric_by_its_score():
    holds(lambda p: 1.0 * ex.sample("k", dist.Geometric(p), gradient=PLAIN), P, [7 / 3, -1 / 0.09])


@pytest.mark.parametrize("strategy", [vi.Enum(), vi.MVD(), PLAIN, vi.DisARM()], ids=["enum", "weak", "score", "disarm"])
def test_f22_costs_on_the_way(strategy):
    """E[3 b] added as a cost: 0.9, slope 3. Weak derivatives elsewhere lose it (slope 0.9)."""

    def cost(p: Any) -> Any:
        vi.add_cost(3.0 * ex.sample("b", dist.Bernoulli(p), gradient=strategy))
        return 0.0

    holds(cost, P, [0.9, 3.0])


def test_f22_costs_need_not_be_added_by_hand():
    """c1(b1) + c2(b2): the sd is that of separate costs, whether c1 is in the value or added on the way."""

    def written(p: Any, by_hand: bool) -> Any:
        first = 20.0 + 3.0 * ex.sample("b1", dist.Bernoulli(p), gradient=PLAIN)
        if by_hand:
            vi.add_cost(first)
        second = 1.0 * ex.sample("b2", dist.Bernoulli(p), gradient=PLAIN)
        return second if by_hand else first + second

    whole, apart = spread(lambda p: written(p, False), P), spread(lambda p: written(p, True), P)
    one_box = spread(lambda p: jnp.square(jnp.sqrt(written(p, False))), P)  # not seen to be a sum
    np.testing.assert_allclose(whole, apart, rtol=1e-10)
    assert whole < 10.0 < one_box


def test_f23_weak_derivative_then_score():
    """b ~ flip(p), x ~ N(p (1 + b), 1): E x^2 = 1 + p^2 + 3 p^3 = 1.171, slope 2 p + 9 p^2 = 1.41."""

    def cost(p: Any) -> Any:
        b = ex.sample("b", dist.Bernoulli(p), gradient=vi.MVD())
        return ex.sample("x", dist.Normal(p * (1.0 + b), 1.0), gradient=PLAIN) ** 2

    holds(cost, P, [1.171, 1.41])


@pytest.mark.parametrize("first", [vi.MVD(), vi.DisARM(), vi.Enum(), PLAIN], ids=["weak", "disarm", "enum", "score"])
def test_f23_then_an_enumerated_choice(first):
    """b ~ flip(p), c ~ flip(p (1 + b) / 2) enumerated: with another b the probabilities of c are others."""

    def cost(p: Any) -> Any:
        b = ex.sample("b", dist.Bernoulli(p), gradient=first)
        return (1.0 + b) * ex.sample("c", dist.Bernoulli(p * (1.0 + b) / 2.0), gradient=vi.Enum())

    holds(cost, P, [0.5 * (1.0 - P) * P + 2.0 * P**2, 0.5 - P + 4.0 * P])


@pytest.mark.parametrize("strategy", [vi.Enum(), vi.MVD(), PLAIN, None], ids=["enum", "weak", "score", "default"])
def test_f24_choices_in_a_branch(strategy):
    """If b ~ flip(p), x ~ N(p, 1) costs x^2: p (p^2 + 1) = 0.327, slope 1.27."""

    def cost(p: Any) -> Any:
        b = ex.sample("b", dist.Bernoulli(p), gradient=strategy)
        return lax.cond(b == 1, lambda: ex.sample("x", dist.Normal(p, 1.0)) ** 2, lambda: 0.0)

    holds(cost, P, [0.327, 1.27])


def test_f25_a_switch_of_three_branches():
    def cost(p: Any) -> Any:
        z = ex.sample("z", dist.Categorical(probs=jnp.stack([p, p, 1.0 - 2.0 * p])))
        flip = lambda q, v: lambda: v * ex.sample("b", dist.Bernoulli(q))  # noqa: E731
        return lax.switch(z, [flip(p, 1.0), flip(0.5, 2.0), lambda: 3.0])

    is_exact(cost, P, [P**2 + P + 3.0 * (1.0 - 2.0 * P), 2.0 * P + 1.0 - 6.0])


def test_f26_choices_in_a_scan():
    normals = lambda m: lax.scan(lambda c, _: (c + ex.sample("x", dist.Normal(m, 1.0)) ** 2, None), 0.0, length=4)[0]  # noqa: E731
    holds(normals, P, [4.36, 2.4])
    flips = lambda p: lax.scan(lambda c, _: (c, 1.0 * ex.sample("b", dist.Bernoulli(p))), 0.0, length=4)[1].sum()  # noqa: E731
    is_exact(flips, P, [1.2, 4.0])


@pytest.mark.parametrize(
    "strategy", [PLAIN, vi.MVD(), vi.DisARM(), vi.Rebar()], ids=["score", "weak", "disarm", "rebar"]
)
def test_f27_three_flips_in_lanes_and_their_squared_sum(strategy):
    flip = lambda p: jax.vmap(lambda _: ex.sample("b", dist.Bernoulli(p), gradient=strategy))(jnp.arange(3))  # noqa: E731
    holds(lambda p: jnp.sum(1.0 * flip(p)) ** 2, P, [1.44, 6.6])


def test_f28_inner_jit_relu_and_a_nested_expectation():
    flip = vi.expectation(lambda p: 2.0 * ex.sample("b", dist.Bernoulli(p)) + 1.0)
    nested = lambda p: 1.0 + flip(p) * ex.sample("c", dist.Bernoulli(p))  # noqa: E731
    is_exact(lambda p: jax.jit(nested)(p), P, [1.48, 2.2])
    relu = lambda m: jax.nn.relu(ex.sample("x", dist.Normal(m, 1.0)))  # noqa: E731
    phi, level = np.exp(-0.125) / np.sqrt(2 * np.pi), 0.6914624612740131
    holds(relu, 0.5, [0.5 * level + phi, level])


@pytest.mark.parametrize(
    "function",
    [jnp.log, jnp.square, lambda e: e * e, lambda e: 1.0 * e.astype(int), lambda e: jnp.where(e > 1.0, e, 1.0)],
)
def test_f28_expectations_are_used_linearly(function):
    flip = vi.expectation(lambda p: 2.0 * ex.sample("b", dist.Bernoulli(p)) + 1.0)
    with pytest.raises(ControlFlowError, match="not linear"):
        vi.objective(lambda p: function(flip(p))).surrogate(P, KEY)
    in_scan = lambda p: lax.scan(lambda c, _: (c + function(flip(p)), None), 0.0, length=2)[0]  # noqa: E731
    with pytest.raises(ControlFlowError, match="not linear"):
        vi.objective(in_scan).surrogate(P, KEY)


def test_f29_a_flip_that_never_comes_up():
    value, gradient = gradients(paper(vi.Enum()), 0.0)(KEY, 1)[0]
    assert np.isfinite([value, gradient]).all() and value == 0.0


def test_f30_an_indicator_by_score():
    """P(x < 0.3) for x ~ N(m, 1) at m = 0: slope -phi(0.3) = -0.3814."""
    cost = lambda m: 1.0 * (ex.sample("x", dist.Normal(m, 1.0), gradient=PLAIN) < 0.3)  # noqa: E731
    holds(cost, 0.0, [0.6179114221889526, -0.3813878154605241])


def test_f31_a_sampler_of_ones_own_has_a_gradient():
    """A distribution made of two functions is not silently treated as constant: by default its score is used."""
    coin = ex.distribution(
        lambda key, p: jax.random.bernoulli(key, p).astype(float),
        lambda x, p: jnp.where(x == 1.0, jnp.log(p), jnp.log1p(-p)),
    )
    holds(lambda p: jnp.where(ex.sample("b", coin(p)) == 1.0, 2.0, -p), P, [0.39, 1.6])


def test_f32_a_strategy_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class StochasticDerivative:
        """Stochastic AD (Arya et al. 2022): a flip that came up 0 is replaced by 1 at the rate dp / (1 - p)."""

        def couple(self, distribution: Any, value: Any, key: Any) -> vi.Draw:
            rate = jnp.where(value == 0, -jnp.log1p(-distribution.probs), 0.0)
            return vi.Draw(value, alternatives=[(jnp.ones_like(value), rate), (value, -rate)])

    holds(paper(StochasticDerivative()), P, [0.39, 1.6])


def test_f33_the_surrogate_is_an_ordinary_function():
    objective = vi.objective(lambda t: t["k"] * paper(vi.MVD())(t["p"]) * t["v"])
    params = {"k": 3, "p": jnp.asarray(P), "v": jnp.asarray(2.0)}

    def at(p: Any, v: Any, key: Any = KEY) -> Any:
        return objective.surrogate({**params, "p": p, "v": v}, key)

    slopes = jax.grad(at, (0, 1))(P, 2.0)
    _, along = jax.jvp(at, (P, 2.0), (0.7, -1.1))
    np.testing.assert_allclose(along, 0.7 * slopes[0] - 1.1 * slopes[1], rtol=1e-12)
    keys = jax.random.split(KEY, 5)
    each = jax.jit(jax.vmap(jax.grad(at), (None, None, 0)))(P, 2.0, keys)
    mean = jax.grad(lambda p: jnp.mean(jax.vmap(lambda key: at(p, 2.0, key))(keys)))(P)
    np.testing.assert_allclose(mean, np.mean(each), rtol=1e-12)
    assert vi.value_and_grad(objective)(params, KEY)[1]["k"] is None


def equations(cost: Any) -> int:
    def size(jaxpr: Any) -> int:
        inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(e.params, is_leaf=lambda x: hasattr(x, "eqns"))]
        return len(jaxpr.eqns) + sum(size(getattr(v, "jaxpr", v)) for v in inner if hasattr(v, "eqns"))

    return size(jax.make_jaxpr(jax.grad(vi.objective(cost).surrogate))(P, KEY).jaxpr)


@pytest.mark.parametrize(
    ("strategy", "order"), [(PLAIN, 1), (vi.MVD(), 2), (vi.Enum(), 2)], ids=["score", "weak", "enum"]
)
def test_f34_the_code_of_ten_flips(strategy, order):
    """Linear for scores; k reruns of what comes after for k weak derivatives; never 2^k."""

    def chain(count: int) -> Any:
        def cost(p: Any) -> Any:
            total = 0.0
            for i in range(count):
                b = ex.sample(f"b{i}", dist.Bernoulli(p / (1.0 + total)), gradient=strategy)
                total = total + jnp.sin(1.0 * b)
            return total

        return equations(cost)

    five, ten = chain(5), chain(10)
    assert ten < 1.25 * 2**order * five


def test_a_discrete_latent_comes_out_right_by_default():
    """z ~ flip(1/2), y ~ N(4 z, 1) at y = 4: the posterior is 1 / (1 + e^-8) = 0.99966."""

    @ex.model
    def coin() -> None:
        z = ex.sample("z", dist.Bernoulli(0.5))
        ex.sample("y", dist.Normal(4.0 * z, 1.0))

    guide = ex.model(lambda logit: ex.sample("z", dist.Bernoulli(logits=logit)))
    fit = vi.fit(vi.elbo(coin().given({"y": 4.0}), guide), jnp.asarray(0.0), optax.adam(0.1), key=KEY, num_steps=6000)
    np.testing.assert_allclose(jax.nn.sigmoid(fit.params), 1.0 / (1.0 + np.exp(-8.0)), atol=1e-4)
