"""Unconstrained space: `constrain` and `unconstrain` are inverse, and the Jacobian is the one of the map.

With z = constrain(u) and c(z) its free coordinates (all entries of a vector, the first K - 1 of a simplex, the lower
triangle of a matrix), the law is

    unconstrained_log_density(u) - log_density(z) = log |det d c(constrain(u)) / du|.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from expectax import dist, ppl
from expectax.ppl import SupportError
from expectax.ppl._nested import leaves_of

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


class Supported(NamedTuple):
    """A distribution, whether a value is strictly inside its support, and the value's free coordinates."""

    build: Callable[[], dist.Distribution]
    inside: Callable[[np.ndarray], Any]
    free: Callable[[Any], Any] = jnp.ravel


def below(offset: int) -> Callable[[Any], Any]:
    """Return the entries of a matrix (last two axes of 3) on and below a diagonal."""
    rows, columns = np.tril_indices(3, offset)
    return lambda z: z[..., rows, columns].ravel()


def positive_definite(z: np.ndarray) -> Any:
    return np.linalg.eigvalsh(z) > 0


SCALE = np.array([[1.0, 0.0, 0.0], [0.3, 1.2, 0.0], [-0.2, 0.4, 0.8]])
SUPPORTS = {
    "real": Supported(lambda: dist.Normal(1.0, 2.0), np.isfinite),
    "real vector": Supported(lambda: dist.MultivariateNormal(jnp.zeros(3), scale_tril=SCALE), np.isfinite),
    "positive": Supported(lambda: dist.Gamma(2.0, 3.0), lambda z: z > 0),
    "positive, batch": Supported(lambda: dist.LogNormal(jnp.zeros((2, 1)), jnp.ones(3)), lambda z: z > 0),
    "positive, event": Supported(lambda: dist.HalfNormal(jnp.ones(3)).to_event(1), lambda z: z > 0),
    "positive, expanded": Supported(lambda: dist.Exponential(2.0).expand([3]), lambda z: z > 0),
    "unit interval": Supported(lambda: dist.Beta(2.0, 3.0), lambda z: (z > 0) & (z < 1)),
    "interval": Supported(
        lambda: dist.Uniform(jnp.array([-1.0, 2.0]), jnp.array(3.0)), lambda z: (z > [-1, 2]) & (z < 3)
    ),
    "half line": Supported(lambda: dist.Pareto(2.0, 3.0), lambda z: z > 2),
    "circle": Supported(lambda: dist.VonMises(0.5, 2.0), lambda z: abs(z) < np.pi),
    "simplex": Supported(
        lambda: dist.Dirichlet(jnp.array([2.0, 1.0, 3.0, 0.5])),
        lambda z: (z > 0).all(-1) & (abs(z.sum(-1) - 1) < 1e-12),
        lambda z: z[..., :-1].ravel(),
    ),
    "simplex, batch": Supported(
        lambda: dist.Dirichlet(jnp.ones(3)).expand([2]), lambda z: (z > 0).all(-1), lambda z: z[..., :-1].ravel()
    ),
    "ordered": Supported(
        lambda: dist.TransformedDistribution(
            dist.Normal(jnp.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
        lambda z: np.diff(z) > 0,
    ),
    "lower_cholesky": Supported(
        lambda: dist.WishartCholesky(5.0, scale_tril=SCALE), lambda z: np.diagonal(z, axis1=-2, axis2=-1) > 0, below(0)
    ),
    "LKJCholesky": Supported(
        lambda: dist.LKJCholesky(3, 2.0), lambda z: abs(np.linalg.norm(z, axis=-1) - 1) < 1e-12, below(-1)
    ),
    "positive definite": Supported(lambda: dist.Wishart(5.0, scale_tril=SCALE), positive_definite, below(0)),
}


# --- where the site stands -----------------------------------------------------------------------------------------


def over_time(function: Any) -> Any:
    return lax.scan(lambda carry, _: (carry, function(None)), None, None, length=2)[1]


def lanes(function: Any) -> Any:
    return jax.vmap(lambda _: function(None))(jnp.zeros(3))


PLACES = {
    "plain": lambda site: site(None),
    "lanes": lanes,
    "scan": over_time,
    "lanes in scan": lambda site: over_time(lambda _: lanes(site)),
    "scan in lanes of a nested model": lambda site: lanes(lambda _: ppl.sample("sub", ppl.model(over_time)(site))),
}


def check(posterior: ppl.Posterior, free: Callable[[Any], Any], seed: int = 0) -> Any:
    """Check round trip and Jacobian at a random point; return the latents there."""
    shapes = posterior.unconstrained_shapes
    zeros, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes))
    u = jnp.asarray(np.random.default_rng(seed).normal(size=zeros.size))

    @jax.jit
    def run(u):
        z = posterior.constrain(unravel(u))
        jacobian = jax.jacfwd(
            lambda u: jnp.concatenate([free(leaf) for leaf in jax.tree.leaves(posterior.constrain(unravel(u)))])
        )
        change = posterior.unconstrained_log_density(unravel(u)) - posterior.log_density(z)
        return z, ravel_pytree(posterior.unconstrain(z))[0], jacobian(u), change

    z, back, jacobian, change = run(u)
    assert jax.tree.map(jnp.shape, z) == jax.tree.map(lambda s: s.shape, posterior.latent_shapes)
    np.testing.assert_allclose(back, u, rtol=1e-9, atol=1e-9)
    assert jacobian.shape == (u.size, u.size)
    np.testing.assert_allclose(change, np.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    return jax.tree.map(np.asarray, z)


EVERYWHERE = ["positive", "simplex", "LKJCholesky"]
CASES = [
    (n, p) for n in SUPPORTS for p in PLACES if n in EVERYWHERE or p in ("plain", "scan in lanes of a nested model")
]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_round_trip_and_jacobian(name, place):
    case = SUPPORTS[name]
    posterior = ppl.model(lambda: PLACES[place](lambda _: ppl.sample("z", case.build())))().given({})
    ((_, z),) = leaves_of(check(posterior, case.free))
    assert np.all(case.inside(z))


# --- bounds that depend on other latents --------------------------------------------------------------------------------


@ppl.model
def bounded():
    top = ppl.sample("top", dist.Gamma(3.0, 1.0))
    low = ppl.sample("low", dist.Uniform(jnp.zeros(2), top))
    ppl.sample("y", dist.Normal(low, 0.5))


@ppl.model
def bounded_chain():
    """Each step lies between 0 and one above the step before; lanes have tops of their own."""

    def lane(start):
        def step(top, _):
            z = ppl.sample("z", dist.Uniform(jnp.zeros(()), top))
            ppl.sample("y", dist.Normal(z, 0.5))
            return z + 1.0, None

        return lax.scan(step, start, None, length=4)

    jax.vmap(lane)(jnp.array([1.0, 2.0, 3.0]))


def test_a_bound_that_is_a_latent():
    posterior = bounded().given({"y": jnp.array([0.3, 0.4])})
    for seed in range(3):
        z = check(posterior, jnp.ravel, seed)
        assert z.keys() == {"top", "low"} and np.all((z["low"] > 0) & (z["low"] < z["top"]))


def test_a_bound_that_is_carried_by_a_scan_in_lanes():
    posterior = bounded_chain().given({"y": jnp.zeros((4, 3))})
    for seed in range(3):
        z = check(posterior, jnp.ravel, seed)["z"]
        assert np.all(z[0] < [1, 2, 3]) and np.all(z[1:] < z[:-1] + 1) and np.all(z > 0)


# --- the whole density -----------------------------------------------------------------------------------------------------


def test_unconstrained_density_integrates_to_the_evidence():
    r"""$\int p(z(u), y) |dz/du| du = p(y)$ for Beta(2, 3) and y = (1, 0, 1): B(4, 4) / B(2, 3), by the trapezoid rule."""

    @ppl.model
    def coin():
        p = ppl.sample("p", dist.Beta(2.0, 3.0))
        ppl.sample("heads", dist.Bernoulli(p).expand([3]))

    posterior = coin().given({"heads": jnp.array([1, 0, 1])})
    u = jnp.linspace(-30.0, 30.0, 2001)
    density = jnp.exp(jax.jit(jax.vmap(lambda u: posterior.unconstrained_log_density({"p": u})))(u))
    exact = math.gamma(4) * math.gamma(4) / math.gamma(8) / (math.gamma(2) * math.gamma(3) / math.gamma(5))
    np.testing.assert_allclose(jnp.sum(density) * (u[1] - u[0]), exact, rtol=1e-10)


def test_unconstrained_density_under_vmap_is_the_loop():
    posterior = bounded_chain().given({"y": jnp.zeros((4, 3))})
    u = {"z": jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 3)))}
    together = jax.jit(jax.vmap(posterior.unconstrained_log_density))(u)
    one = jax.jit(lambda u: posterior.unconstrained_log_density(u))
    np.testing.assert_allclose(together, [one({"z": row}) for row in u["z"]], rtol=1e-10)


@pytest.mark.parametrize("method", ["constrain", "unconstrain", "unconstrained_log_density"])
def test_a_discrete_latent_is_refused(method):
    @ppl.model
    def mixed():
        z = ppl.sample("which", dist.Bernoulli(0.5))
        ppl.sample("x", dist.Normal(z, 1.0))

    with pytest.raises(SupportError, match="'which' at .*test_unconstrained.py:[0-9]+ is discrete"):
        getattr(mixed().given({}), method)({"which": 0.0, "x": 1.0})
    mixed().given({"which": 1}).unconstrained_log_density({"x": 1.0})  # observed, it may be discrete
