"""Reparameterisation from a pilot: what is chosen, that the law stays, and the way back, also through scans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from expectax import dist, inference, ppl

KEY = jax.random.key(20261128)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


@ppl.model
def walk(noise):
    """A random walk in a scan, in a nested model, seen with more or less noise."""
    scale = ppl.sample("scale", dist.LogNormal(-1.0, 0.5))
    x = ppl.sample("path", steps(scale))
    ppl.sample("y", dist.Normal(x, noise))


@ppl.model
def steps(scale):
    def step(x, _):
        x = ppl.sample("x", dist.Normal(x, scale))
        return x, x

    return jax.lax.scan(step, 0.0, length=12)[1]


def posterior(noise: float) -> ppl.Posterior:
    y = np.cumsum(0.4 * np.random.default_rng(5).normal(size=12))
    return walk(noise).given({"y": y})


def test_a_walk_is_non_centred_where_the_data_are_weak():
    assert inference.auto_reparameterize(posterior(5.0), key=KEY).non_centred == ("path/x",)
    sharp = inference.auto_reparameterize(posterior(0.01), key=KEY)
    assert sharp.non_centred == () and sharp.posterior.latent_shapes == posterior(0.01).latent_shapes


def test_the_law_stays(x64):
    """The density of the old latents times the Jacobian of the way back is that of the new ones, up to nothing."""
    easier = inference.auto_reparameterize(posterior(5.0), key=KEY)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), easier.posterior.latent_shapes)
    flat, unravel = ravel_pytree(zeros)
    for seed in range(3):
        at = jnp.abs(jax.random.normal(jax.random.key(seed), flat.shape)) + 0.1
        old = easier.back(unravel(at))
        jacobian = jax.jacobian(lambda v: ravel_pytree(easier.back(unravel(v)))[0])(at)
        expected = easier.original.log_density(old) + np.linalg.slogdet(jacobian)[1]
        np.testing.assert_allclose(easier.posterior.log_density(unravel(at)), expected, rtol=1e-12)
        innovations = np.asarray(unravel(at)["path"]["x_base"])
        np.testing.assert_allclose(old["path"]["x"], np.cumsum(innovations * float(old["scale"])), rtol=1e-12)


def test_the_way_back_takes_chains_and_draws():
    easier = inference.auto_reparameterize(posterior(5.0), key=KEY)
    chains = inference.mcmc(easier.posterior, inference.hmc(), key=KEY, num_warmup=100, num_samples=50)
    back = easier.back(chains.choices)
    assert back["path"]["x"].shape == (4, 50, 12) and set(back) == {"scale", "path"}
    one = easier.back(jax.tree.map(lambda v: v[1, 7], chains.choices))
    np.testing.assert_allclose(back["path"]["x"][1, 7], one["path"]["x"], rtol=1e-5)
    np.testing.assert_array_equal(back["scale"], chains.choices["scale"])


def test_missing_data_keep_their_place():
    @ppl.model
    def model():
        scale = ppl.sample("scale", dist.LogNormal(0.0, 1.0))
        x = ppl.sample("x", dist.Normal(0.0, scale).expand([3]))
        ppl.sample("y", dist.Normal(x, 10.0))

    seen = ppl.masked(jnp.zeros(3), np.array([True, False, True]))
    easier = inference.auto_reparameterize(model().given({"y": seen}), key=KEY)
    assert easier.non_centred == ("x",)
    back = easier.back({"scale": 2.0, "x_base": jnp.arange(3.0), "y": jnp.array([7.0])})
    np.testing.assert_allclose(back["x"], [0.0, 2.0, 4.0])
    np.testing.assert_array_equal(back["y"], [7.0])
