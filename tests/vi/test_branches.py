"""Sites in the branches of a cond, in objectives: every strategy, over lanes and not, against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from helpers import two_stage_z

KEY = jax.random.key(20261125)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def branchy(p, strategy):
    """E = p (q1 - p) + (1 - p) 2 q0 with q1 = p^2, q0 = (1 + p) / 2."""
    z = ex.sample("z", dist.Bernoulli(p), gradient=strategy)
    one = lambda: 1.0 * ex.sample("x", dist.Bernoulli(p**2), gradient=strategy) - p  # noqa: E731
    other = lambda: 2.0 * ex.sample("x", dist.Bernoulli((1.0 + p) / 2.0), gradient=strategy)  # noqa: E731
    return lax.cond(z == 1, one, other)


def exact(p):
    return p * (p**2 - p) + (1.0 - p) * (1.0 + p)


@pytest.mark.slow
def test_enum_is_exact():
    objective = vi.objective(lambda p: branchy(p, vi.Enum()))
    value, gradient = jax.value_and_grad(objective.surrogate)(0.3, KEY)
    np.testing.assert_allclose([value, gradient], [exact(0.3), jax.grad(exact)(0.3)], rtol=1e-12)


@pytest.mark.parametrize("around", ["plain", "lanes", "scan"])
def test_reinforce_is_unbiased(around):
    """A score of a branch that is not taken, or a box that is missing, shows as a bias of the gradient."""
    strategy = vi.Reinforce(baseline=None)

    @vi.objective
    def objective(p):
        if around == "plain":
            return branchy(p, strategy)
        if around == "lanes":
            return jax.vmap(lambda s: s * branchy(p, strategy))(jnp.array([1.0, 2.0, -0.5])).sum()
        return lax.scan(lambda c, s: (c + s * branchy(p, strategy), None), 0.0, jnp.array([1.0, 2.0, -0.5]))[0]

    factor = 1.0 if around == "plain" else 2.5

    @jax.jit
    def sampler(keys):
        return jax.vmap(lambda k: jnp.stack(jax.value_and_grad(objective.surrogate)(0.3, k)))(keys)

    expected = np.array([factor * exact(0.3), factor * jax.grad(exact)(0.3)])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), expected, KEY, 20_000)


def test_reparametrised_branches_of_a_guide():
    """The guide's density is that of the branch that was taken; the gradient passes through the select."""

    @ex.model
    def guide(m):
        z = ex.sample("z", dist.Bernoulli(0.4), gradient=vi.Enum())
        lax.cond(z == 1, lambda: ex.sample("x", dist.Normal(m, 1.0)), lambda: ex.sample("x", dist.Normal(-m, 2.0)))

    @vi.objective
    def objective(m):
        choices, log_q = vi.simulate(guide(m))
        return choices["x"] ** 2 - log_q

    @jax.jit
    def sampler(keys):
        return jax.vmap(lambda k: jnp.stack(jax.value_and_grad(objective.surrogate)(1.5, k)))(keys)

    entropy = 0.5 * np.log(2 * np.pi * np.e) + 0.6 * np.log(2.0) - 0.4 * np.log(0.4) - 0.6 * np.log(0.6)
    expected = np.array([0.4 * (1.5**2 + 1.0) + 0.6 * (1.5**2 + 4.0) + entropy, 2 * 1.5])
    two_stage_z(lambda key, n: sampler(jax.random.split(key, n)), expected, KEY, 20_000)


@pytest.mark.slow
def test_the_elbo_of_a_model_with_branches():
    """A spike and slab: the bound at the exact posterior is the evidence, whatever is drawn."""

    @ex.model
    def model():
        z = ex.sample("z", dist.Bernoulli(0.3))
        x = ex.cond(z == 1, lambda: ex.sample("x", dist.Normal(0.0, 2.0)), lambda: 0.0)
        ex.sample("y", dist.Normal(x, 1.0))

    slab, spike = 0.3 * jnp.exp(dist.Normal(0.0, 5**0.5).log_prob(1.2)), 0.7 * jnp.exp(dist.Normal(0, 1).log_prob(1.2))

    @ex.model
    def exact_guide(_):
        z = ex.sample("z", dist.Bernoulli(slab / (slab + spike)))
        posterior_of_x = dist.Normal(1.2 * 4 / 5, (4 / 5) ** 0.5)
        ex.cond(z == 1, lambda: ex.sample("x", posterior_of_x), lambda: 0.0)

    bound = vi.elbo(model().given({"y": 1.2}), exact_guide)
    values = [bound.surrogate(0.0, k) for k in jax.random.split(KEY, 8)]
    np.testing.assert_allclose(values, jnp.log(slab + spike), rtol=1e-10)


def test_eight_conds_are_linear_in_size():
    def many(n):
        def objective(p):
            return sum(branchy(p, vi.Reinforce(baseline=None)) for _ in range(n))

        return len(str(jax.make_jaxpr(lambda p: vi.objective(objective).surrogate(p, KEY))(0.3)))

    assert many(8) < 2.5 * many(4)
