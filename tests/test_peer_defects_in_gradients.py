"""Defects of gradient estimators that were measured in another language, each as a test of this one.

G1 (what is offered) and G2 (bugs) number what was measured on GenJAX 1.0.x, as in `test_peer_defects`, which has the
defects of the language itself. What can only be tested by draws has a pinned key and two stages with a false-alarm rate of 1e-6.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from scipy import special, stats

import expectax as ex
from expectax import dist, vi
from helpers import two_stage_z
from peer_models import EFFECT, ERROR, schools

KEY = jax.random.key(2026)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
normal = stats.norm.logpdf
PLAIN = vi.Reinforce(baseline=None)


def size_of(jaxpr: Any) -> int:
    """Count the equations of a jaxpr, those of the jaxprs inside it too."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)]
    return len(jaxpr.eqns) + sum(size_of(getattr(p, "jaxpr", p)) for p in inner if is_jaxpr(p))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def code_size(objective: Any, params: Any) -> int:
    return size_of(jax.make_jaxpr(jax.grad(objective.surrogate))(params, KEY).jaxpr)


def steps(objective: Any, params: Any) -> Any:
    """Return a sampler of independent `[value, gradient...]`, one sample each, for `two_stage_z`."""

    def one(key: Any) -> Any:
        value, gradient = jax.value_and_grad(objective.surrogate)(params, key)
        return jnp.concatenate([jnp.ravel(v) for v in (value, *jax.tree.leaves(gradient))])

    run = jax.jit(jax.vmap(one))
    return lambda key, n: run(jax.random.split(key, n))


# --- estimators in loops and calls ------------------------------------------------------------------------------------


def in_scan(draw: Any, m: Any) -> Any:
    return jnp.sum(lax.scan(lambda c, w: (c, w * draw(m)), None, jnp.arange(1.0, 4.0))[1])


def in_carry(draw: Any, m: Any) -> Any:
    return lax.scan(lambda c, w: (c + w * draw(m), None), 0.0, jnp.arange(1.0, 4.0))[0]


def in_map(draw: Any, m: Any) -> Any:
    return jnp.sum(lax.map(lambda w: w * draw(m), jnp.arange(1.0, 4.0)))


def in_fori_loop(draw: Any, m: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, c: c + (i + 1.0) * draw(m), 0.0)


def in_jit(draw: Any, m: Any) -> Any:
    return 6.0 * jax.jit(draw)(m)


def in_checkpoint(draw: Any, m: Any) -> Any:
    return 6.0 * jax.checkpoint(draw)(m)


WRAPS = [in_scan, in_carry, in_map, in_fori_loop, in_jit, in_checkpoint]
DRAWS = {
    "normal, reparametrised": (lambda m: dist.Normal(m, 1.0), vi.Reparam()),
    "normal, by score": (lambda m: dist.Normal(m, 1.0), PLAIN),
    "flip, by score": (dist.Bernoulli, PLAIN),
}


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda f: f.__name__)
def test_a_sample_inside_a_loop_or_call_keeps_its_estimator_and_its_noise(wrap, how):
    """G2 (ADEV): in `scan` and `jit` the strategy was skipped and the key baked in: 11.81 +- 0.0 for 3.0.

    The weights of the draws sum to 6, so E = 6 m and the gradient is 6; distinct keys give distinct values.
    """
    law, strategy = DRAWS[how]
    objective = vi.objective(lambda m: wrap(lambda m: ex.sample("x", law(m), gradient=strategy), m))
    sampler = steps(objective, 0.4)
    two_stage_z(sampler, np.array([2.4, 6.0]), KEY, 4000)
    distinct = np.unique(np.asarray(sampler(KEY, 4000))[:, 0]).size
    assert distinct >= (2 if "flip" in how else 4000)


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda f: f.__name__)
def test_a_flip_inside_a_loop_or_call_is_enumerated_exactly(wrap):
    """G2 (ADEV): a flip in a scan gave 0.0 for 4.5. Enumerated it has no noise: 6 p, and its gradient 6."""
    objective = vi.objective(lambda p: wrap(lambda p: ex.sample("b", dist.Bernoulli(p), gradient=vi.Enum()), p))
    for seed in (1, 2):
        close(vi.value_and_grad(objective)(0.4, key=jax.random.key(seed)), (2.4, 6.0))


@pytest.mark.parametrize("strategy", [vi.Reparam(), PLAIN], ids=["pathwise", "score"])
def test_the_elbo_of_a_guide_with_a_scan(strategy):
    r"""G2 (ADEV): the ELBO with a `Scan` guide gave 2.23 (or 0.61) for 4.5.

    For x_t ~ N(0, 1), y_t ~ N(x_t, 1) and q(x_t) = N(m, 1/2) the gradient in m is $\sum_t (y_t - 2 m)$.
    """
    y, m = np.array([1.0, 2.5, 2.5]), 0.25

    @ex.model
    def model():
        def step(c: Any, _: Any) -> Any:
            x = ex.sample("x", dist.Normal(0.0, 1.0))
            return c, ex.sample("y", dist.Normal(x, 1.0))

        lax.scan(step, None, length=3)

    @ex.model
    def guide(m):
        lax.scan(lambda c, _: (c, ex.sample("x", dist.Normal(m, 0.5**0.5), gradient=strategy)), None, length=3)

    value = np.sum(normal(m) + normal(y, m) - 0.5) + 3 * stats.norm(0.0, 0.5**0.5).entropy()
    two_stage_z(steps(vi.elbo(model().given({"y": y}), guide), m), np.array([value, 4.5]), KEY, 8000)


def test_a_derivative_rule_of_the_user_is_used_in_an_objective():
    """G2 (ADEV): any custom_jvp or custom_vjp inside an expectation was a NotImplementedError or a TypeError.

    The rules below say 7 (not 2), so the pathwise gradient in m is exactly 7; enumeration needs no rule: f(1) - f(0).
    """

    @jax.custom_jvp
    def forward(x: Any) -> Any:
        return 2.0 * x

    forward.defjvp(lambda primals, tangents: (2.0 * primals[0], 7.0 * tangents[0]))

    @jax.custom_vjp
    def backward(x: Any) -> Any:
        return 2.0 * x

    backward.defvjp(lambda x: (2.0 * x, None), lambda _, g: (7.0 * g,))
    for rule in (forward, backward):
        path = vi.objective(lambda m, f=rule: f(ex.sample("x", dist.Normal(m, 1.0))))
        close(vi.value_and_grad(path)(0.3, key=KEY)[1], 7.0)
        summed = vi.objective(lambda p, f=rule: f(1.0 * ex.sample("b", dist.Bernoulli(p))))
        close(vi.value_and_grad(summed)(0.3, key=KEY), (0.6, 2.0))


# --- enumeration ------------------------------------------------------------------------------------------------------


def test_lanes_and_categories_are_enumerated_in_values_and_gradients():
    """G1: both `*_enum_parallel` estimators raised a TypeError in `estimate` and in `grad_estimate`."""
    shift, table = jnp.array([-1.0, 0.5, 2.0]), jnp.array([1.0, -2.0, 5.0])

    @vi.objective
    def cost(t):
        b = jax.vmap(lambda s: ex.sample("b", dist.Bernoulli(logits=s * t), gradient=vi.Enum()))(shift)
        k = ex.sample("k", dist.Categorical(logits=t * table), gradient=vi.Enum())
        return jnp.sin(b.sum() + t * table[k])

    def exact(t):
        total, p, q = 0.0, jax.nn.sigmoid(shift * t), jax.nn.softmax(t * table)
        for *bits, k in itertools.product((0, 1), (0, 1), (0, 1), (0, 1, 2)):
            b = jnp.array(bits)
            total += jnp.prod(jnp.where(b == 1, p, 1 - p)) * q[k] * jnp.sin(b.sum() + t * table[k])
        return total

    expected = jax.value_and_grad(exact)(0.3)
    close(vi.value_and_grad(cost)(0.3, key=KEY), expected)
    close(vi.estimate(cost, 0.3, KEY, 8), (expected[0], 0.0))


def test_the_code_of_enumerated_flips_is_linear_in_their_number():
    """G2 (ADEV): each sequential `flip_enum` doubled the code (77 HLO lines at 2 flips, 5621 at 8); lanes were unrolled.

    Here each flip is one `vmap` of the rest: twice the flips are little more than twice the code, where doubling would
    give 16 times. Values: E e^{iS} = (1 - p + p e^i)^n for S the sum of n flips.
    """

    def one_by_one(n: int) -> Any:
        return vi.objective(
            lambda p: jnp.sin(sum(1.0 * ex.sample(f"b{i}", dist.Bernoulli(p), gradient=vi.Enum()) for i in range(n)))
        )

    def lanes(n: int) -> Any:
        flip = lambda p: ex.sample("b", dist.Bernoulli(p), gradient=vi.Enum())  # noqa: E731
        return vi.objective(lambda p: jnp.sin(1.0 * jax.vmap(flip)(jnp.full(n, p)).sum()))

    assert code_size(one_by_one(8), 0.3) < 2.5 * code_size(one_by_one(4), 0.3)
    assert code_size(lanes(3), 0.3) == code_size(lanes(12), 0.3)
    for objective in (one_by_one(8), lanes(8)):
        base = 0.7 + 0.3 * np.exp(1j)
        exact = (base**8).imag, (8 * base**7 * (np.exp(1j) - 1)).imag
        close(vi.value_and_grad(objective)(0.3, key=KEY), exact)


def test_the_code_of_iwelbo_does_not_grow_with_its_particles():
    """G2 (ADEV) unrolled continuations per lane, and compiled the longer. K particles are one `vmap`, once staged."""
    posterior = schools(jnp.array(ERROR)).given({"y": EFFECT})
    runs = []

    @ex.model
    def guide(m):
        runs.append(1)
        ex.sample("mu", dist.Normal(m, 1.0), gradient=PLAIN)
        ex.sample("tau", dist.LogNormal(m, 1.0))
        jax.vmap(lambda e: ex.sample("theta", dist.Normal(m, e)))(jnp.ones(8))

    sizes, counts = [], []
    for particles in (2, 50):
        runs.clear()
        sizes.append(code_size(vi.iwelbo(posterior, guide, particles), 0.5))
        counts.append(len(runs))
    assert sizes[0] == sizes[1] and counts[0] == counts[1]


# --- variance and other demands on gradients --------------------------------------------------------------------------


def test_a_constant_added_to_the_cost_adds_no_variance():
    """G2 (ADEV): there was no baseline: adding 100 to an objective took the gradient's sd to 104.

    A constant term depends on no choice and is charged to none, whatever the baseline; inside a term that cannot be
    split, the mean of the other samples takes it off. Either way each single gradient stays what it was.
    """

    def gradients(strategy: Any, apart: bool, constant: float) -> Any:
        table = jnp.array([1.0, -2.0]) + (0.0 if apart else constant)

        def cost(p: Any) -> Any:
            b = ex.sample("b", dist.Bernoulli(p), gradient=strategy)
            return jnp.take(table, b) + (constant if apart else 0.0)

        gradient = jax.grad(vi.objective(cost).surrogate)
        return jax.vmap(lambda k: gradient(0.3, k, 4))(jax.random.split(KEY, 16))

    for strategy, apart in ((PLAIN, True), (vi.Reinforce(), True), (vi.Reinforce(), False)):
        close(gradients(strategy, apart, 100.0), gradients(strategy, apart, 0.0))
    assert np.std(gradients(PLAIN, False, 100.0)) > 20.0  # what the baseline is for


def test_lanes_by_score_are_charged_one_by_one():
    """G2 (ADEV): all lanes' scores multiplied the whole cost: sd 5.2 N^1.5 (2032 at N = 100).

    For the cost sum_i b_i, b_i ~ Bern(p), each score meets its own cost alone: the estimate is sum_i b_i / p exactly.
    """

    @vi.objective
    def cost(p):
        return jnp.sum(1.0 * jax.vmap(lambda q: ex.sample("b", dist.Bernoulli(q), gradient=PLAIN))(jnp.full(100, p)))

    values, gradients = np.asarray(steps(cost, 0.25)(KEY, 64)).T
    assert np.unique(values).size > 5
    close(gradients, values / 0.25)


def test_an_objective_that_is_no_number_is_refused():
    """G1: results had to be scalar, which was met in JAX's own words."""

    @vi.objective
    def pair(m):
        return jnp.stack([ex.sample("x", dist.Normal(m, 1.0)), m])

    with pytest.raises(ex.ppl.ShapeError, match=r"must return a scalar, but returned shape \(2,\)"):
        vi.value_and_grad(pair)(1.0, jax.random.key(0))


def test_parameters_that_are_integers_get_no_gradient():
    """G2 (ADEV): integer arguments broke `grad_estimate`. Here E = m n + i_1 with the gradient n in m, None elsewhere."""

    @vi.objective
    def cost(params):
        b = ex.sample("b", dist.Bernoulli(params["m"]))
        return 1.0 * b * params["n"] + params["i"][1]

    params = {"m": 0.5, "n": 3, "i": jnp.array([1, 2])}
    value, gradient = vi.value_and_grad(cost)(params, key=KEY)
    close([value, gradient["m"]], [3.5, 3.0])
    assert gradient["n"] is gradient["i"] is None


# --- fits -------------------------------------------------------------------------------------------------------------


def test_the_values_of_a_fit_are_those_of_its_steps():
    """G1: `loss_history` was always zeros, a placeholder. Here: gradient ascent by hand on 3 sigmoid(t)."""
    objective = vi.objective(lambda t: 3.0 * ex.sample("b", dist.Bernoulli(logits=t), gradient=vi.Enum()))
    fitted = vi.fit(objective, -1.0, optax.sgd(0.5), key=KEY, num_steps=20)
    t, values = -1.0, []
    for _ in range(20):
        p = special.expit(t)
        values.append(3 * p)
        t += 0.5 * 3 * p * (1 - p)
    close(fitted.values, values)
    close(fitted.params, t)


def test_a_guide_of_full_covariance_has_a_dict_of_parameters():
    """G1: the full-covariance family could not be passed to `elbo_vi`, its parameters being a dict.

    Bound and gradient are closed forms; at the exact posterior every sample of the bound is log p(y).
    """
    a, y = np.array([[1.0, 0.5], [-0.3, 2.0]]), np.array([1.0, -0.5])

    @ex.model
    def model():
        x = ex.sample("x", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
        ex.sample("y", dist.Normal(a @ x, 1.0))

    @ex.model
    def guide(params):
        ex.sample("x", dist.MultivariateNormal(params["loc"], scale_tril=jnp.tril(params["tril"])))

    bound = vi.elbo(model().given({"y": y}), guide)
    precision = np.eye(2) + a.T @ a
    mean, evidence = np.linalg.solve(precision, a.T @ y), stats.multivariate_normal(np.zeros(2), np.eye(2) + a @ a.T)
    best = {"loc": jnp.array(mean), "tril": jnp.linalg.cholesky(jnp.linalg.inv(precision))}
    close([bound.surrogate(best, k) for k in jax.random.split(KEY, 4)], np.full(4, evidence.logpdf(y)))

    loc, tril = np.array([0.3, 0.1]), np.array([[0.8, 0.0], [0.4, 0.5]])
    off = loc - mean
    divergence = 0.5 * (np.trace(precision @ (tril @ tril.T + np.outer(off, off))) - 2.0)
    divergence -= 0.5 * np.linalg.slogdet(precision)[1] + np.log(np.diag(tril)).sum()
    gradient = [-precision @ off, np.tril(-precision @ tril + np.diag(1 / np.diag(tril)))]
    exact = np.concatenate([[evidence.logpdf(y) - divergence], *map(np.ravel, gradient)])
    two_stage_z(steps(bound, {"loc": jnp.array(loc), "tril": jnp.array(tril)}), exact, KEY, 4000)
