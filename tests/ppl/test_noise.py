"""Base noise: one random call for all lanes, streams named by addresses, and the law of the numbers."""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from expectax import dist, ppl
from expectax.ppl import _draw, _jax, _noise, _sources
from helpers import two_stage_uniform, two_stage_z

KEY = jax.random.key(20260803)
IMPLEMENTATIONS = {_draw.draw_p: _draw._implementation, _noise.noise_p: _noise._implementation}


def random_equations(jaxpr: Any) -> list[tuple[str, int]]:
    """Return (name, size of the output) of the equations that make random bits or split keys, inside draws too."""
    found = []
    equations: Any = _jax.close(jaxpr)[0].eqns
    for eqn in equations:
        if eqn.primitive.name in ("random_bits", "random_split", "threefry2x32"):
            found.append((eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape)))
        inner = list(_jax.sub_jaxprs(eqn))
        if eqn.primitive in IMPLEMENTATIONS:
            implementation = functools.partial(IMPLEMENTATIONS[eqn.primitive], **eqn.params)
            inner.append(
                jax.make_jaxpr(implementation)(*[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars])
            )
        for j in inner:
            found += random_equations(j)
    return found


def over_lanes_of(function: Any) -> list[tuple[str, int]]:
    return random_equations(jax.make_jaxpr(_jax.over_lanes(ppl.model(function)().simulate, 1000))(KEY))


def test_one_random_call_serves_all_sites_that_take_base_noise():
    def sites():
        jax.vmap(lambda a: ppl.sample("normal", dist.Normal(a, 1.0)))(jnp.arange(7.0))
        jax.vmap(jax.vmap(lambda a: ppl.sample("uniform", dist.Uniform(a, a + 1.0))), in_axes=1)(jnp.ones((2, 3)))
        ppl.sample("scalar", dist.Exponential(2.0))

    # 14 numbers a lane of 32 bits each; threefry makes them in two halves
    assert over_lanes_of(sites) == [("threefry2x32", 7000)]


def test_the_noise_of_a_loop_is_drawn_before_it_by_one_call():
    def sites():
        step = lambda x, _: (ppl.sample("x", dist.Normal(x, 1.0)) + ppl.sample("e", dist.Exponential(1.0)), None)  # noqa: E731
        jax.lax.scan(step, 0.0, length=6)

    jaxpr = jax.make_jaxpr(ppl.model(sites)().simulate)(KEY)
    assert random_equations(jaxpr) == [("threefry2x32", 6)]  # 12 words
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert random_equations(loop.params["jaxpr"]) == []


STEPS = {  # sites that take noise, one that takes a key, and a loop in a loop, in a loop of four steps
    "noise": lambda: ppl.sample("x", dist.Normal(0.0, 1.0)),
    "key": lambda: ppl.sample("x", dist.Gamma(1.0, 1.0)),
    "inner": lambda: jax.lax.scan(lambda c, _: (c + ppl.sample("x", dist.Normal(0.0, 1.0)), None), 0.0, length=2)[0],
}


@pytest.mark.parametrize("most", [2**22, 0])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_and_lanes_of_a_loop_are_independent(kind, most, monkeypatch):
    """Also where each step draws its own noise because all of it would not fit."""
    monkeypatch.setattr(_sources, "_MOST_AHEAD", most)
    program = ppl.model(lambda: jax.lax.scan(lambda c, _: (c, STEPS[kind]()), 0.0, length=4)[1])()
    mean, variance = {"noise": (0.0, 1.0), "key": (1.0, 1.0), "inner": (0.0, 2.0)}[kind]

    def products(key: Any, n: int) -> Any:
        x = _jax.over_lanes(lambda key: program.simulate(key).retval, n)(key) - mean
        return jnp.concatenate([x[:, :, None] * x[:, None, :], x[:, :, None] * jnp.roll(x, 1, 0)[:, None, :]], axis=1)

    two_stage_z(products, np.concatenate([variance * np.eye(4), np.zeros((4, 4))]), KEY, 20_000)


def test_one_random_call_for_each_other_site():
    def sites():
        jax.vmap(lambda a: ppl.sample("weibull", dist.Weibull(a, 1.0)))(jnp.ones(7))
        jax.vmap(jax.vmap(lambda a: ppl.sample("pareto", dist.Pareto(a, 2.0))), in_axes=1)(jnp.ones((2, 3)))

    assert over_lanes_of(sites) == [("random_bits", 7000), ("random_bits", 6000)]


def test_a_draw_depends_on_its_address_not_on_its_place():
    sites = {
        "a": dist.Normal(0.0, 1.0),
        "b": dist.Gamma(2.0, 1.0),
        "c": dist.Normal(0.0, 1.0),
        "d": dist.Exponential(1.0),
    }

    def draws(addresses: str) -> Any:
        program = ppl.model(lambda: [ppl.sample(a, sites[a]) for a in addresses])()
        return {a: float(v) for a, v in program.simulate(KEY).choices.items()}

    some, all_ = draws("ab"), draws("dcba")
    assert {a: all_[a] for a in "ab"} == some
    assert len(set(all_.values())) == 4


def test_addresses_with_one_checksum_draw_apart():
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    program = ppl.model(lambda: [ppl.sample(a, dist.Normal(0.0, 1.0)) for a in ("plumless", "buckeroo")])()
    choices = program.simulate(KEY).choices
    assert choices["plumless"] != choices["buckeroo"]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_generator_of_jax_serves(impl):
    program = ppl.model(lambda: (jax.vmap(lambda a: ppl.sample("x", dist.Normal(a, 1.0)))(jnp.zeros(5)), None)[1])()
    values = _jax.over_lanes(lambda key: program.simulate(key)["x"], 2000)(jax.random.key(7, impl=impl))
    assert values.shape == (2000, 5) and len(np.unique(values)) > 9950  # float32 normals collide now and then
    assert stats.kstest(np.asarray(values).ravel(), "norm").pvalue > 1e-6


@pytest.mark.parametrize(
    "build", [lambda p: dist.Normal(p, p), lambda p: dist.Weibull(p, p), lambda p: dist.Bernoulli(p)]
)
def test_draws_have_numpyros_dtype_in_either_precision(build):
    """float32 parameters in both modes: a type cached in one must not be used in the other."""
    parameter = jnp.full(3, 0.5, jnp.float32)
    for double in (False, True, False):
        with jax.enable_x64(double):
            key = jax.random.key(0)
            trace = ppl.model(lambda: jax.vmap(lambda p: ppl.sample("x", build(p)))(parameter))().simulate(key)
            assert trace["x"].dtype == build(parameter).sample(key).dtype


SCALED = {  # x = theta * noise: pooled, drawn fused, with implicit derivatives, and with a key per lane
    "Normal": lambda theta: dist.Normal(0.0, theta),
    "Weibull": lambda theta: dist.Weibull(theta, 2.0),
    "Gamma": lambda theta: dist.Gamma(2.0, 1.0 / theta),
    "TransformedDistribution": lambda theta: dist.TransformedDistribution(
        dist.StudentT(5.0), dist.transforms.AffineTransform(0.0, theta)
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_derivatives_through_draws_in_lanes(x64, name):
    """dx/dtheta = x / theta, the derivative of the very draw; lanes stay independent under it."""

    @ppl.model
    def sites(theta):
        return jax.vmap(lambda t: ppl.sample("x", SCALED[name](t)))(theta * jnp.ones(3)).sum()

    value_and_grad = jax.value_and_grad(lambda theta, key: sites(theta).simulate(key).retval)
    value, slope = jax.jit(_jax.over_lanes(value_and_grad, 50, in_axes=(None, None)))(2.0, KEY)
    np.testing.assert_allclose(slope, value / 2.0, rtol=1e-6)
    assert len(np.unique(value)) == 50


# --- the law of the numbers -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def numbers(key: Any, n: int, dtype: str) -> Any:
    """Draw n times two streams of 3 normals and two of 2 uniforms, as uniforms: shape (n, 10)."""
    requests = [
        _noise.Request(2**31 + i, kind, size) for i, (kind, size) in enumerate([("normal", 3), ("uniform", 2)] * 2)
    ]

    def own(key: Any) -> Any:
        pools = _noise.noise(key, requests, dtype)
        return [pools[number][row] for number, row in _noise.places(requests)]

    drawn = _jax.over_lanes(own, n)(key)
    return jnp.concatenate([jax.scipy.stats.norm.cdf(a) if a.shape[1] == 3 else a for a in drawn], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_base_noise_is_normal_and_uniform(x64, dtype):
    two_stage_uniform(lambda key, n: numbers(key, n, dtype), KEY, 20_000)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_streams_are_uncorrelated(x64, dtype):
    def products(key: Any, n: int) -> Any:
        u = numbers(key, n, dtype) - 0.5
        return jnp.concatenate(
            [u[:, :, None] * u[:, None, :], (u[:, :, None] * jnp.roll(u, 1, axis=0)[:, None, :])], axis=1
        )

    two_stage_z(products, np.concatenate([np.eye(10) / 12, np.zeros((10, 10))]), KEY, 20_000)


@pytest.mark.parametrize(("kind", "dtype"), [("normal", "float32"), ("uniform", "float32"), ("uniform", "float64")])
def test_noise_never_meets_the_ends(x64, kind, dtype):
    """The smallest and the largest word make finite numbers, strictly inside (0, 1) and symmetric."""
    words = 2 if dtype == "float64" else 1
    ends = jnp.array([0, 0xFFFFFFFF], jnp.uint32)
    low, high = np.asarray(_noise._convert(kind, *[ends] * words).astype(dtype))
    if kind == "uniform":
        assert 0.0 < low < 1e-6 and low == 1.0 - high
    else:
        assert -6.0 < low == -high
