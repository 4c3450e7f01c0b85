"""Inputs at the edge: no lanes, impossible alternatives and particles, numbers that are not real."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import expectax as ex
from expectax import dist, vi

KEY = jax.random.key(7)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
STRATEGIES = [None, vi.Enum(), vi.Rebar(), vi.MVD(), vi.DisARM(), vi.Reinforce()]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_no_lanes_at_all(strategy):
    """An enumeration of nothing once ended in an error of a reshape."""

    @vi.objective
    def empty(p):
        flip = lambda t: 1.0 * ex.sample("b", dist.Bernoulli(logits=p * t), gradient=strategy)  # noqa: E731
        return jnp.sum(jax.vmap(flip)(jnp.ones(0))) ** 2 + p

    value, gradient = vi.value_and_grad(empty)(0.3, KEY)
    assert (float(value), float(gradient)) == (0.3, 1.0)


@pytest.mark.parametrize("strategy", [vi.Enum(), vi.MVD(), vi.DisARM()], ids=str)
def test_an_alternative_that_cannot_be_has_no_part_in_the_value(strategy):
    @vi.objective
    def impossible(p):
        return jnp.log(1.0 - ex.sample("b", dist.Bernoulli(0.0), gradient=strategy)) + p

    value, gradient = vi.value_and_grad(impossible)(0.3, KEY, num_samples=20)
    np.testing.assert_allclose([value, gradient], [0.3, 1.0], rtol=1e-12)


@ex.model
def overlapping():
    z = ex.sample("z", dist.Bernoulli(0.5))
    ex.sample("y", dist.Uniform(1.0 * z, z + 1.0))


@ex.model
def guide(p):
    ex.sample("z", dist.Bernoulli(p))


@pytest.mark.parametrize(
    "objective",
    [
        lambda target: vi.elbo(target, guide),
        lambda target: vi.iwelbo(target, guide, 3),
        lambda target: vi.vimco(target, guide, 3),
        lambda target: vi.thermodynamic(target, guide, 3, (0.0, 0.5, 1.0)),
    ],
    ids=["elbo", "iwelbo", "vimco", "thermodynamic"],
)
def test_bounds_of_impossible_particles_are_minus_infinity(objective):
    """Particles with z = 0 are impossible, and the guide draws them: the bounds are -inf, and never nan."""
    bound = objective(overlapping().given({"y": 1.5}))
    assert float(vi.value_and_grad(bound)(0.6, KEY)[0]) == -np.inf


def test_thermodynamic_ignores_an_impossible_particle_but_at_temperature_zero():
    """With some possible particle, the terms at temperatures above 0 are finite; the one at 0 is a plain mean."""
    from expectax.vi._tempered import _mean_at

    log_p, log_q = jnp.array([-jnp.inf, -1.0, -2.0]), jnp.array([-0.5, -1.5, -0.7])
    w = np.exp(0.5 * (np.asarray(log_p) - np.asarray(log_q)))
    mean = (w[1] * 0.5 + w[2] * -1.3) / w.sum()
    assert abs(_mean_at(0.5, log_p, log_q) - mean) < 1e-12
    gradient = jax.grad(lambda q: _mean_at(0.5, log_p, q))(log_q)
    assert np.isfinite(gradient).all() and gradient[0] == 0.0
    assert _mean_at(0.0, log_p, log_q) == -jnp.inf


def test_what_is_no_real_number_is_refused():
    with pytest.raises(TypeError, match="real number"):
        vi.value_and_grad(vi.objective(lambda p: 1j * ex.sample("x", dist.Normal(p, 1.0))))(0.3, KEY)
    with pytest.raises(ValueError, match="num_samples"):
        vi.value_and_grad(vi.objective(lambda p: ex.sample("x", dist.Normal(p, 1.0))))(0.3, KEY, num_samples=0)


def test_parameters_may_hold_functions():
    """A network holds its activation; the tables of estimators and noise once could not take it."""
    network = eqx.nn.MLP(1, 1, 2, 1, key=KEY)

    @vi.objective
    def objective(network):
        return network(ex.sample("x", dist.Normal(jnp.zeros(1), 1.0)))[0]

    assert vi.estimators(objective, network)["x"]["strategy"] == "Reparam()"
    assert np.isfinite(vi.diagnose(objective, network, KEY, num_estimates=20).total.noise)


def test_lanes_that_are_reduced_inside_are_still_lanes():
    """A reduction under a vmap names its axes by numpy's numbers, which once made lanes of all 64 images one."""

    @vi.objective
    def images(p):
        def image(y):
            z = ex.sample("z", dist.Bernoulli(p))
            return jnp.log(1.0 + jnp.sum(z * y, axis=0))

        return jnp.sum(jax.vmap(image)(jnp.ones((64, 5))))

    row = vi.estimators(images, 0.3)["z"]
    assert (row["strategy"], row["runs"]) == ("Enum() by lanes", 2)
    value, gradient = vi.value_and_grad(images)(0.3, jax.random.key(0))
    np.testing.assert_allclose([value, gradient], [64 * 0.3 * np.log(6.0), 64 * np.log(6.0)], rtol=1e-5)
