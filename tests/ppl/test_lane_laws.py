"""Every distribution with lanes in its parameters: type, density and law of its draws, lane by lane.

The table holds every class that draws its lanes fused or from base noise, each with a scalar and a vector batch, and
wrappers and classes that fall back to a key per lane. The first parameter carries its lanes in front, the second
behind its batch axes, the third is shared.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

from expectax import dist, ppl
from expectax.ppl import _distribution, _jax, _pathwise
from helpers import two_stage_uniform, two_stage_z

KEY = jax.random.key(20260804)
LANES = 3
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@dataclasses.dataclass(frozen=True)
class Laned:
    """`build(*parameters of one lane)` is a distribution; `values` hold the parameters with lanes at `axes`."""

    build: Callable[..., dist.Distribution]
    values: tuple[np.ndarray, ...]
    axes: tuple[int | None, ...]

    def lane(self, i: int) -> tuple[Any, ...]:
        """Return the parameters of lane i, taken by hand."""
        pairs = zip(self.values, self.axes, strict=True)
        return tuple(jnp.asarray(v if axis is None else np.take(v, i, axis)) for v, axis in pairs)

    def simulate(self, key: Any) -> tuple[Any, Any]:
        """Run a model with the distribution under a vmap."""
        site = jax.vmap(lambda *own: ppl.sample("x", self.build(*own)), in_axes=self.axes)
        trace = ppl.model(lambda: site(*map(jnp.asarray, self.values)))().simulate(key)
        return trace["x"], trace.log_density


# --- the table ------------------------------------------------------------------------------------------------------


def parameter(cls: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return parameters of a batch shape, all different, in the range of the constraint."""
    constraint = cls.arg_constraints[name]
    if name in ("low", "high"):
        return rng.uniform(*{"low": (0.5, 1.0), "high": (2.0, 3.0)}[name], shape)
    if name == "scale_tril":
        return np.tril(rng.uniform(0.5, 1.0, (*shape, 4, 4)))
    if constraint is constraints.simplex:
        return rng.dirichlet(np.ones(4), shape)
    event = (4,) * constraint.event_dim
    negative, large = (np.all(constraint(np.full(event, value))) for value in (-1.0, 2.0))
    return rng.uniform(*((-1.0, 1.0) if negative else (0.8, 3.0) if large else (0.2, 0.8)), shape + event)


def of_class(cls: Any, names: tuple[str, ...], batch: tuple[int, ...]) -> Laned:
    """Put the lanes of the first parameter in front, of the second behind its batch, and share the third."""
    rng = np.random.default_rng(5)
    axes = (0, len(batch), None)[: len(names)]
    values = [
        parameter(cls, name, batch if axis is None else (LANES, *batch), rng)
        for name, axis in zip(names, axes, strict=True)
    ]
    moved = [v if axis is None else np.moveaxis(v, 0, axis) for v, axis in zip(values, axes, strict=True)]
    return Laned(lambda *own: cls(**dict(zip(names, own, strict=True))), tuple(moved), axes)


def wrapped(build: Callable[..., dist.Distribution]) -> Laned:
    """Give `build(m, s)` lanes of m in (-1, 1) and lanes of s in (0.5, 2)."""
    return Laned(build, (np.array([-0.9, 0.1, 0.8]), np.array([0.5, 1.9, 1.2])), (0, 0))


FINITE = (dist.BernoulliProbs, dist.BernoulliLogits, dist.CategoricalProbs, dist.CategoricalLogits)
TABLE = {
    f"{cls.__name__}, batch {batch}": of_class(cls, names, batch)
    for cls, names in _distribution._PARAMETERS.items()
    for batch in [(), (2,)]
}
WEIGHTS, MASK = np.array([0.3, 0.7]), np.array([True, False, True])
TABLE |= {
    name: wrapped(build)
    for name, build in {
        "Independent": lambda m, s: dist.Normal(m * jnp.ones(2), s).to_event(1),
        "Independent, two of three axes": lambda m, s: dist.Gamma(s * jnp.ones((2, 1, 2)), jnp.exp(m)).to_event(2),
        "Independent of vectors": lambda m, s: dist.MultivariateNormal(m * jnp.ones((2, 2)), s * jnp.eye(2)).to_event(1),
        "Expanded": lambda m, s: dist.Weibull(s, jnp.exp(m)).expand([2]),
        "Expanded, as many as lanes": lambda m, s: dist.Normal(m, s).expand([LANES]),
        "Expanded inside": lambda m, s: dist.StudentT(9.0, m * jnp.arange(2.0)[:, None], s).expand([2, 3]),
        "Expanded in front": lambda m, s: dist.Weibull(s * jnp.arange(1.0, 3.0), jnp.exp(m)).expand([2, 2]),
        "Expanded vectors": lambda m, s: dist.Dirichlet(s * jnp.arange(1.0, 3.0)).expand([2]),
        "Expanded to an event": lambda m, s: dist.Laplace(m, s).expand([2]).to_event(1),
        "Masked": lambda m, s: dist.Normal(m * jnp.ones(3), s).mask(MASK),
        "Masked by lane": lambda m, s: dist.Gamma(s, 1.0).mask(m > 0),
        "Transformed": lambda m, s: dist.TransformedDistribution(dist.Normal(m, 1.0), dist.transforms.AffineTransform(1.0, s)),
        "Transformed twice": lambda m, s: dist.TransformedDistribution(
            dist.Normal(m, 0.3), [dist.transforms.AffineTransform(m, s), dist.transforms.ExpTransform()]
        ),
        "MixtureSameFamily": lambda m, s: dist.MixtureSameFamily(
            dist.Categorical(probs=WEIGHTS), dist.Normal(jnp.stack([m, m + 4.0]), s)
        ),
        "MixtureGeneral": lambda m, s: dist.MixtureGeneral(
            dist.Categorical(probs=WEIGHTS), [dist.Normal(m, s), dist.Laplace(m + 3.0, s)]
        ),
        "TruncatedNormal": lambda m, s: dist.TruncatedNormal(m, s, low=m),
        "Binomial": lambda m, s: dist.Binomial(10, jax.nn.sigmoid(m * s)),
        "Multinomial": lambda m, s: dist.Multinomial(5, probs=jax.nn.softmax(jnp.stack([m, s, 0.0]))),
        "ZeroInflatedPoisson": lambda m, s: dist.ZeroInflatedPoisson(jax.nn.sigmoid(m), s),
        "LowRankMultivariateNormal": lambda m, s: dist.LowRankMultivariateNormal(
            m * jnp.ones(3), s * jnp.ones((3, 1)), s * jnp.ones(3)
        ),
        "Delta": lambda m, s: dist.Delta(m + s),
    }.items()
}  # fmt: skip


# --- the laws ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 2))
def draws(name: str, key: Any, n: int) -> Any:
    """Return values (n, lanes, batch, event) and log densities (n,)."""
    return _jax.over_lanes(TABLE[name].simulate, n)(key)


@functools.partial(jax.jit, static_argnums=0)
def exact(name: str, own: Any, values: Any) -> dict[str, Any]:
    """Return what numpyro says of one lane: log densities of the values, and the best known test of their law."""
    d = TABLE[name].build(*own)
    terms = {"log_density": jnp.asarray(d.log_prob(values)).reshape(len(values), -1).sum(1)}
    if isinstance(d, FINITE):  # frequencies
        states = d.enumerate_support(expand=False)
        equal = jnp.stack([values == k for k in states.ravel()], axis=1)
        return terms | {"got": equal, "expected": jnp.exp(d.log_prob(states))}
    if not d.is_discrete and d.event_shape == () and has_cdf(d):
        return terms | {"levels": d.cdf(values)}
    error = values - d.mean
    variance = jnp.broadcast_to(d.variance, d.shape())
    return terms | {"got": jnp.stack([error, error**2], axis=1), "expected": jnp.stack([0 * variance, variance])}


def has_cdf(d: dist.Distribution) -> bool:
    try:
        return d.cdf(d.sample(KEY)) is not None
    except NotImplementedError:
        return False


SLOW = [f"{cls.__name__}, batch ()" for cls in set(_distribution._PARAMETERS) - set(_pathwise._RULES)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TABLE])
def test_lanes(name):
    """Shape and dtype, the density to 1e-10, and the law by levels, frequencies, or mean and variance."""
    case = TABLE[name]
    lanes = [case.lane(i) for i in range(LANES)]

    def lane_by_lane(key: Any, n: int) -> tuple[Any, Any, list[Any]]:
        values, log_density = draws(name, key, n)
        return values, log_density, [exact(name, own, values[:, i]) for i, own in enumerate(lanes)]

    values, log_density, known = lane_by_lane(KEY, 1000)
    one = jax.eval_shape(lambda own: case.build(*own).sample(KEY), lanes[0])
    assert (values.shape, values.dtype) == ((1000, LANES, *one.shape), one.dtype)
    np.testing.assert_allclose(log_density, sum(k["log_density"] for k in known), rtol=1e-10, atol=1e-10)
    if "levels" in known[0]:
        two_stage_uniform(lambda key, n: np.stack([k["levels"] for k in lane_by_lane(key, n)[2]], 1), KEY, 1000)
    else:
        expected = np.stack([k["expected"] for k in known])
        two_stage_z(lambda key, n: np.stack([k["got"] for k in lane_by_lane(key, n)[2]], 1), expected, KEY, 1000)


def test_the_table_covers_every_class_with_a_rule():
    """Base noise is given only to classes of the table above."""
    assert set(_pathwise._RULES) <= set(_distribution._PARAMETERS)


def test_a_masked_entry_is_not_scored():
    """A masked entry has density 1, whatever stands there: numpyro's meaning, and what missing data needs."""
    d = dist.Exponential(jnp.ones(3)).mask(np.array([True, False, True]))
    x = jnp.array([0.5, -1.0, 2.0])
    density, _ = jax.jit(lambda x: ppl.model(lambda: ppl.sample("x", d))().assess({"x": x}))(x)
    np.testing.assert_allclose(density, -2.5, rtol=1e-10)
