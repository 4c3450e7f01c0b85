"""Like sites are drawn and scored together: the numbers are those of the sites one by one, the program is small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist

KEY = jax.random.key(20261126)
KINDS = (
    lambda i, x: dist.Gamma(2.0 + x, 1.0 + i),
    lambda i, x: dist.Normal(x, 1.0 + i),
    lambda i, x: dist.Poisson(3.0),
    lambda i, x: dist.Dirichlet(jnp.full(3, 1.0 + i)),
    lambda i, x: dist.Bernoulli(logits=0.1 * i),
)


def many(count, kinds=KINDS):
    """Sites written one by one; every tenth of the first kind depends on the one before."""

    @ex.model
    def model():
        x = 0.0
        for i in range(count):
            value = ex.sample(f"x{i}", kinds[i % len(kinds)](i, x))
            x = jnp.abs(jnp.sum(value)) if i % 10 == 0 else x

    return model()


@pytest.mark.slow
def test_the_draws_are_those_of_each_site_alone():
    """Catches keys or rows of noise that are handed to the wrong site of a group."""
    trace = many(40, tuple(lambda i, x, k=k: k(i, 0.0) for k in KINDS)).simulate(KEY)
    for i in range(40):
        alone = ex.model(lambda i=i: ex.sample(f"x{i}", KINDS[i % len(KINDS)](i, 0.0)))().simulate(KEY)
        np.testing.assert_allclose(trace[f"x{i}"], alone[f"x{i}"], rtol=1e-6)


@pytest.mark.slow
def test_the_density_is_the_sum(x64):
    program = many(60)
    trace = program.simulate(KEY)
    np.testing.assert_allclose(trace.log_density, program.assess(trace.choices)[0], rtol=1e-12)
    np.testing.assert_allclose(trace.log_density, trace.project(~ex.select()), rtol=1e-12)
    some, weight = program.generate(KEY, {f"x{i}": trace[f"x{i}"] for i in range(0, 60, 3)})
    np.testing.assert_allclose(weight, some.project([f"x{i}" for i in range(0, 60, 3)]), rtol=1e-10)


def test_constraints_by_element_are_kept():
    program = ex.model(lambda: [ex.sample(f"x{i}", dist.Normal(jnp.zeros(3), 1.0)) for i in range(6)])()
    trace, weight = program.generate(KEY, {f"x{i}": ex.at(1, 5.0) for i in range(6)})
    assert all(trace[f"x{i}"][1] == 5.0 for i in range(6))
    np.testing.assert_allclose(weight, 6 * dist.Normal(0.0, 1.0).log_prob(5.0), rtol=1e-5)


def loops(program):
    text = jax.jit(lambda key: program.simulate(key).choices).lower(KEY).as_text()
    return text.count("stablehlo.while")


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_one_sampler_serves_all(kind):
    """Samplers that loop are most of the compile time: there are as many of them for 40 sites as for 8."""
    kinds = (lambda i, x: KINDS[kind](i, 0.0),)
    assert loops(many(40, kinds)) == loops(many(8, kinds)) > 0


def test_no_key_is_used_twice():
    @ex.model
    def mixed():
        for i in range(6):
            ex.sample(f"g{i}", dist.Gamma(2.0, 1.0))
            ex.sample(f"n{i}", dist.Normal(0.0, 1.0))
        on = ex.sample("on", dist.Bernoulli(0.5))
        lax.cond(on == 1, lambda: ex.sample("a", dist.Gamma(2.0, 1.0)), lambda: ex.sample("b", dist.Beta(2.0, 1.0)))
        jax.vmap(lambda b: lax.cond(b, lambda: ex.sample("c", dist.Gamma(2.0, 1.0)), lambda: 0.0))(
            jnp.array([True, False])
        )

    with jax.debug_key_reuse(True):
        jax.jit(lambda key: mixed().simulate(key).choices)(jax.random.key(1))
