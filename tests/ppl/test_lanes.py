"""Lanes: vmaps inside a model, in every place and along every axis, against a hand loop.

Each program has sites `x ~ Normal(centre, scale)` with tiny scales and far centres, all different. A draw then shows
which lane's parameters it got, its standardised residual shows whether two lanes share noise, and the density is
scipy's. `centre` and `scale` are written in the canonical order: time axes, lanes outermost first, own shape.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from expectax import dist, ppl
from expectax.ppl import _jax
from expectax.ppl._nested import leaves_of

KEY = jax.random.key(20260802)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def m(*shape: int) -> np.ndarray:
    """Centres: 10, 20, 30, ..."""
    return 10.0 * (1 + np.arange(math.prod(shape)).reshape(shape))


def s(*shape: int) -> np.ndarray:
    """Scales: 1.0e-3, 1.1e-3, ..."""
    return 1e-3 * (1 + np.arange(math.prod(shape)).reshape(shape) / 10)


FAMILIES = {  # how lanes are drawn: (distribution of a centre and a scale, scipy's)
    "base noise": (dist.Normal, stats.norm),
    "one draw": (lambda centre, scale: dist.AsymmetricLaplace(centre, scale, 1.0), stats.laplace),
    "a key per lane": (
        lambda centre, scale: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(centre, scale)
        ),
        stats.norm,
    ),
}
FAMILY = "base noise"


def x(centre: Any, scale: Any = 1e-3, address: str = "x") -> Any:
    return ppl.sample(address, FAMILIES[FAMILY][0](centre, scale))


PROGRAMS: dict[str, tuple[Any, Any]] = {}


def lanes(name: str, centre: Any, scale: Any = 1e-3, path: str = "x") -> Any:
    """Register a program whose one site is at `path`."""
    return several(name, {path: (centre, scale)})


def several(name: str, sites: Any) -> Any:
    """Register a program with many sites; a centre may be a function of the choices before."""

    def register(function: Any) -> Any:
        PROGRAMS[name] = (function, sites)
        return function

    return register


def expected_sites(sites: Any, choices: Any) -> Any:
    """Yield `(path, centre, scale)`, the arrays in the shape of the site, perhaps with leading axes."""
    for path, (centre, scale) in sites.items():
        known: Any = centre(choices) if callable(centre) else centre
        yield path, *np.broadcast_arrays(known, scale)


def over_time(step: Any, xs: Any, **kwargs: Any) -> Any:
    return lax.scan(lambda carry, row: (carry, step(row)), None, xs, **kwargs)[1]


# --- one vmap: which axis is mapped --------------------------------------------------------------------------------

lanes("axis 0", m(3), s(3))(lambda: jax.vmap(x)(m(3), s(3)))
lanes("one lane", m(1), s(1))(lambda: jax.vmap(x)(m(1), s(1)))
lanes("axis 1", m(2, 3).T)(lambda: jax.vmap(x, in_axes=1)(m(2, 3)))
lanes("middle axis", np.moveaxis(m(2, 3, 4), 1, 0))(lambda: jax.vmap(x, in_axes=1)(m(2, 3, 4)))
lanes("negative axis", np.moveaxis(m(2, 4, 3), 2, 0))(lambda: jax.vmap(x, in_axes=-1)(m(2, 4, 3)))
lanes("out of order", m(2, 3).T, s(3, 2))(lambda: jax.vmap(x, in_axes=(1, 0))(m(2, 3), s(3, 2)))
lanes("square, out of order", m(3, 3).T, s(3, 3))(lambda: jax.vmap(x, in_axes=(1, 0))(m(3, 3), s(3, 3)))
lanes("shared centres", m(2), s(3)[:, None])(lambda: jax.vmap(x, in_axes=(None, 0))(m(2), s(3)))
lanes("shared centres, as many as lanes", m(3), s(3)[:, None])(lambda: jax.vmap(x, in_axes=(None, 0))(m(3), s(3)))
lanes("shared scales, as many as lanes", m(3)[:, None], s(3))(lambda: jax.vmap(x, in_axes=(0, None))(m(3), s(3)))
lanes("scalar lanes, batch from the other", m(3)[:, None], s(2))(lambda: jax.vmap(lambda a: x(a, s(2)))(m(3)))
lanes("one value for both", m(3), m(3))(lambda: jax.vmap(lambda a: x(a, a))(m(3)))
lanes("nothing mapped", np.full(4, 5.0))(lambda: jax.vmap(x, in_axes=None, axis_size=4)(5.0))
lanes("nothing mapped, vector", np.tile(m(3), (3, 1)))(lambda: jax.vmap(x, in_axes=None, axis_size=3)(m(3)))
lanes("user's out_axes", m(3, 2))(lambda: jax.vmap(x, out_axes=1)(m(3, 2)))
lanes("dict of arguments", m(2, 3).T, s(2))(
    lambda: jax.vmap(lambda p: x(p["m"], p["s"]), in_axes=({"m": 1, "s": None},))({"m": m(2, 3), "s": s(2)})
)
lanes("expanded", np.tile(m(3)[:, None], 2))(
    lambda: jax.vmap(lambda a: ppl.sample("x", dist.Normal(a, 1e-3).expand([2])))(m(3))
)
lanes("expanded to an event, as many as lanes", np.tile(m(3)[:, None], 3))(
    lambda: jax.vmap(lambda a: ppl.sample("x", dist.Normal(a, 1e-3).expand([3]).to_event(1)))(m(3))
)

# --- vmaps in vmaps --------------------------------------------------------------------------------------------------

lanes("two levels, axes 2 and 1", m(2, 3, 4).transpose(2, 1, 0))(
    lambda: jax.vmap(jax.vmap(x, in_axes=1), in_axes=2)(m(2, 3, 4))
)
lanes("two levels, a parameter each", m(4)[:, None], s(3))(
    lambda: jax.vmap(lambda a: jax.vmap(lambda b: x(a, b))(s(3)))(m(4))
)
lanes("two levels, a parameter each, square", m(3), s(3)[:, None])(
    lambda: jax.vmap(lambda b: jax.vmap(lambda a: x(a, b))(m(3)))(s(3))
)
lanes("two levels, inner shares what outer maps", m(3, 2)[:, None, :], s(2)[:, None])(
    lambda: jax.vmap(jax.vmap(x, in_axes=(None, 0)), in_axes=(0, None))(m(3, 2), s(2))
)
lanes("three levels, axes 1, -1, 0", m(2, 3, 4).transpose(1, 2, 0))(
    lambda: jax.vmap(jax.vmap(jax.vmap(x), in_axes=-1), in_axes=1)(m(2, 3, 4))
)
lanes("three levels of the same size", m(3, 3, 3).transpose(2, 0, 1), s(3)[:, None])(
    lambda: jax.vmap(jax.vmap(jax.vmap(x), in_axes=(0, 0)), in_axes=(2, None))(
        m(3, 3, 3), np.broadcast_to(s(3), (3, 3)).T
    )
)
lanes("three levels, the middle one unmapped", np.broadcast_to(m(3, 2)[:, None], (3, 4, 2)))(
    lambda: jax.vmap(jax.vmap(jax.vmap(x), in_axes=None, axis_size=4))(m(3, 2))
)

several(
    "a centre that is drawn",
    {"x": (m(3), s(3)), "y": (lambda c: c["x"][..., None] + m(2), s(2)), "z": (lambda c: c["y"].sum(-1), 1e-3)},
)(
    lambda: jax.vmap(
        lambda a, b: x(
            jax.vmap(lambda drawn, c, d: x(drawn + c, d, "y"), in_axes=(None, 0, 0))(x(a, b), m(2), s(2)).sum(),
            address="z",
        )
    )(m(3), s(3))
)

# --- lanes and time ----------------------------------------------------------------------------------------------------

lanes("vmap in scan", m(5, 3))(lambda: over_time(jax.vmap(x), m(5, 3)))
lanes("vmap in scan, axis 1", m(5, 2, 3).transpose(0, 2, 1))(lambda: over_time(jax.vmap(x, in_axes=1), m(5, 2, 3)))
lanes("scan in vmap", m(5, 3))(lambda: jax.vmap(lambda a: over_time(x, a), in_axes=1)(m(5, 3)))
lanes("scan in vmap, square", m(3, 3).T)(lambda: jax.vmap(lambda a: over_time(x, a))(m(3, 3)))
lanes("reverse scan in vmap", m(5, 3))(lambda: jax.vmap(lambda a: over_time(x, a, reverse=True), in_axes=1)(m(5, 3)))
several(
    "reverse scan in vmap that carries its draw",
    {"x": (lambda c: m(5, 3) + np.concatenate([c["x"][..., 1:, :], 0 * c["x"][..., :1, :]], axis=-2), 1e-3)},
)(lambda: jax.vmap(lambda a: lax.scan(lambda c, b: (x(c + b), None), 0.0, a, reverse=True), in_axes=1)(m(5, 3)))
lanes("scan without inputs in vmap", np.broadcast_to(m(3), (5, 3)), s(3))(
    lambda: jax.vmap(lambda a, b: over_time(lambda _: x(a, b), None, length=5))(m(3), s(3))
)
lanes("scan in vmap with nothing mapped", np.broadcast_to(m(5)[:, None], (5, 3)))(
    lambda: jax.vmap(lambda a: over_time(x, a), in_axes=None, axis_size=3)(m(5))
)
lanes("vmap in scan in vmap", m(5, 3, 2))(lambda: jax.vmap(lambda a: over_time(jax.vmap(x), a), in_axes=1)(m(5, 3, 2)))
lanes("scan in scan in vmap", m(3, 5, 2).transpose(1, 2, 0), s(3))(
    lambda: jax.vmap(lambda a, b: over_time(lambda row: over_time(lambda c: x(c, b), row), a))(m(3, 5, 2), s(3))
)
lanes("lax.map in vmap", m(5, 3))(lambda: jax.vmap(lambda a: lax.map(x, a), in_axes=1)(m(5, 3)))
lanes("fori_loop with fixed bounds", m(3)[:, None] * np.ones(2))(
    lambda: lax.fori_loop(0, 3, lambda i, c: (jax.vmap(lambda a: x(a))(jnp.full(2, 10.0 * (i + 1))), c)[1], 0.0)
)

# --- lanes and wrappers --------------------------------------------------------------------------------------------------

lanes("jit in vmap", m(2, 3).T)(lambda: jax.vmap(jax.jit(x), in_axes=1)(m(2, 3)))
lanes("vmap in jit in vmap", m(3, 2), s(3)[:, None])(
    lambda: jax.vmap(jax.jit(jax.vmap(x, in_axes=(0, None))))(m(3, 2), s(3))
)
lanes("checkpoint in vmap", m(3))(lambda: jax.vmap(jax.checkpoint(x))(m(3)))
lanes("checkpoint in scan in vmap", m(5, 3))(
    lambda: jax.vmap(lambda a: over_time(jax.checkpoint(x), a), in_axes=1)(m(5, 3))
)

part = ppl.model(lambda centre, scale=1e-3: x(centre, scale))
whole = ppl.model(lambda centre: ppl.sample("part", part(centre)) + x(centre[0] + 5.0, address="own"))

lanes("model at an address in vmap", m(3), path="sub/x")(lambda: jax.vmap(lambda a: ppl.sample("sub", part(a)))(m(3)))
lanes("vmap in a model at an address in vmap", m(2, 3).T, path="sub/x")(
    lambda: jax.vmap(lambda a: ppl.sample("sub", ppl.model(jax.vmap(x))(a)), in_axes=1)(m(2, 3))
)
lanes("model at an address in scan in vmap", m(5, 3), path="sub/x")(
    lambda: jax.vmap(lambda a: over_time(lambda b: ppl.sample("sub", part(b)), a), in_axes=1)(m(5, 3))
)
several(
    "models in models, two deep, in vmap and scan",
    {
        "a/part/x": (m(5, 3, 2), 1e-3),
        "a/own": (m(5, 3, 2)[..., 0] + 5.0, 1e-3),
        "b/x": (m(5, 3, 2) + 1.0, s(3)[:, None]),
        "last": (m(3), 1e-3),
    },
)(
    lambda: jax.vmap(
        lambda a, scale, last: (
            over_time(lambda b: (ppl.sample("a", whole(b)), ppl.sample("b", part(b + 1.0, scale))), a),
            x(last, address="last"),
        ),
        in_axes=(1, 0, 0),
    )(m(5, 3, 2), s(3), m(3))
)


# --- how the whole is run ------------------------------------------------------------------------------------------------


def merged(out: Any) -> Any:
    """Merge the two leading axes."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)


KEYS = jax.random.split(KEY, 2)
RUNS = {
    "one run": lambda f: jax.tree.map(lambda leaf: leaf[None], jax.jit(f)(KEY)),
    "over_lanes in vmap over keys": lambda f: merged(jax.jit(jax.vmap(_jax.over_lanes(f, 3)))(KEYS)),
    "vmap over keys": lambda f: jax.jit(jax.vmap(f))(KEYS),
    "over_lanes": lambda f: jax.jit(_jax.over_lanes(f, 3))(KEY),
    "vmap over keys in over_lanes": lambda f: merged(jax.jit(_jax.over_lanes(jax.vmap(f), 3))(KEYS)),
    "over_lanes in over_lanes": lambda f: merged(jax.jit(_jax.over_lanes(_jax.over_lanes(f, 2), 3))(KEY)),
    "over_lanes in scan over keys": lambda f: merged(
        jax.jit(lambda keys: over_time(_jax.over_lanes(f, 3), keys))(KEYS)
    ),
}
WRAPPED = "over_lanes in vmap over keys"
SOME = ["axis 1", "nothing mapped", "two levels, a parameter each", "vmap in scan in vmap", "vmap in jit in vmap"]
MIXED = [  # lanes of several levels, or of one parameter only: what the fused draw must align
    "out of order",
    "shared centres, as many as lanes",
    "scalar lanes, batch from the other",
    "two levels, axes 2 and 1",
    "two levels, a parameter each",
    "two levels, inner shares what outer maps",
    "three levels, axes 1, -1, 0",
    "three levels, the middle one unmapped",
    "three levels of the same size",
    "vmap in scan in vmap",
    "a centre that is drawn",
]
CASES = [("base noise", name, run) for name in PROGRAMS for run in RUNS if run == WRAPPED or name in SOME]
CASES += [(family, name, WRAPPED) for family in ("one draw", "a key per lane") for name in MIXED]


@pytest.mark.parametrize(("family", "name", "run"), CASES)
def test_lanes(monkeypatch, family, name, run):
    monkeypatch.setitem(globals(), "FAMILY", family)
    function, sites = PROGRAMS[name]
    program = ppl.model(function)()

    def simulate(key: Any) -> Any:
        trace = program.simulate(key)
        return dict(leaves_of(trace.choices)), trace.log_density, program.assess(trace.choices)[0]

    choices, log_density, assessed = jax.tree.map(np.asarray, RUNS[run](simulate))
    shapes = {path: entry.shape for path, entry in leaves_of(program.sites())}
    runs, residuals, expected = len(log_density), [], np.zeros(len(log_density))
    assert shapes.keys() == sites.keys()
    for path, centre, scale in expected_sites(sites, choices):
        assert choices[path].shape == (runs, *shapes[path]) and shapes[path] == centre.shape[-len(shapes[path]) :]
        residual = (choices[path] - centre) / scale
        assert np.abs(residual).max() < 40, "a draw follows another lane's parameters"
        residuals.append(residual.ravel())
        expected += FAMILIES[family][1].logpdf(choices[path], centre, scale).reshape(runs, -1).sum(1)
    np.testing.assert_allclose(log_density, expected, rtol=1e-10)
    np.testing.assert_allclose(assessed, expected, rtol=1e-10)
    noise = np.sort(np.concatenate(residuals))
    assert np.diff(noise).min(initial=1.0) > 1e-9, "two lanes, steps, sites or runs share their noise"


# --- lanes as many as an event has entries ---------------------------------------------------------------------------------

AXES = [(0, None), (1, None), (-1, 0), (None, 0), (None, 1), (None, 2), (0, 1), (1, -1), (1, 0)]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_three_lanes_of_a_three_dimensional_normal(axes):
    loc, tril = m(3, 3), np.tril(1 + m(3, 3, 3) / 100) * 1e-3
    function = jax.vmap(lambda a, b: ppl.sample("x", dist.MultivariateNormal(a, scale_tril=b)), in_axes=axes)
    # every lane must see a lower triangle: put the lane axis of `tril` where in_axes expects it
    tril = tril[0] if axes[1] is None else np.moveaxis(tril, 0, axes[1])
    loc = loc[0] if axes[0] is None else loc
    trace = jax.jit(lambda: ppl.model(function)(loc, tril).simulate(KEY))()
    value = np.asarray(trace["x"])
    assert value.shape == (3, 3)
    expected = 0.0
    for i in range(3):
        own: Any = [p if axis is None else np.take(p, i, axis) for p, axis in zip((loc, tril), axes, strict=True)]
        a, b = own
        assert np.abs(np.linalg.solve(b, value[i] - a)).max() < 8
        expected += stats.multivariate_normal(a, b @ b.T).logpdf(value[i])
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-9)
    assert len(np.unique(value)) == 9


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_three_lanes_of_a_dirichlet_of_three(axis):
    """Concentrations of 1e8 p: a draw is within 1e-3 of its lane's p."""
    concentration = np.array([[1.0, 2.0, 3.0], [4.0, 9.0, 1.0], [2.0, 2.0, 8.0]]) * 1e8
    function = jax.vmap(lambda c: ppl.sample("x", dist.Dirichlet(c)), in_axes=axis, axis_size=3)
    own = [concentration[0] if axis is None else np.take(concentration, i, axis) for i in range(3)]
    program = ppl.model(function)(concentration[0] if axis is None else concentration)
    value = np.asarray(program.simulate(KEY)["x"])
    np.testing.assert_allclose(value, [c / c.sum() for c in own], atol=1e-3)
    assert len(np.unique(value)) == 9
    points = np.random.default_rng(0).dirichlet(np.ones(3), 3)
    density = program.assess({"x": points})[0]
    np.testing.assert_allclose(
        density, sum(stats.dirichlet(c).logpdf(p) for c, p in zip(own, points, strict=True)), rtol=1e-10
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_three_lanes_of_a_categorical_of_three(axis):
    """Each lane puts all its mass on one state, another one if the lane axis is mistaken."""
    probs = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    function = jax.vmap(lambda p: ppl.sample("x", dist.Categorical(probs=p)), in_axes=axis)
    trace = _jax.over_lanes(ppl.model(function)(probs).simulate, 5)(KEY)
    np.testing.assert_array_equal(trace["x"], np.tile(np.argmax(probs, axis=1 - axis), (5, 1)))
    np.testing.assert_allclose(trace.log_density, 0.0, atol=1e-10)


# --- noise that is shared ---------------------------------------------------------------------------------------


SHARED = {
    "one draw": lambda c: dist.AsymmetricLaplace(c, 1.0, 1.0),
    "gamma": lambda c: dist.Gamma(1.0 + c, 1.0),
    "poisson": lambda c: dist.Poisson(1.0 + c),
    "a key per lane": lambda c: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(c, 1.0)
    ),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("order", ["shared inside", "two shared", "between lanes"])
def test_a_vmap_that_shares_its_noise_sees_the_draws_without_it(name, order):
    """Reruns of a program with one choice replaced stand on this: inside lanes they once drew other numbers.

    The library's lanes are fused into one draw; a plain vmap with one key, inside of them, must not break them up.
    """
    from expectax.ppl._distribution import flatten
    from expectax.ppl._draw import draw

    def one(c: Any, key: Any) -> Any:
        leaves, structure = flatten(SHARED[name](c))
        return draw(key, structure, (), leaves)

    centres = jnp.array([0.5, 0.5, 3.0])
    if order == "between lanes":
        base = _jax.over_lanes(lambda c, key: _jax.over_lanes(lambda key: one(c, key), 4)(key), 5, (None, None))
        run = _jax.over_lanes(
            lambda key: jax.vmap(lambda c: _jax.over_lanes(lambda key: one(c, key), 4)(key))(centres), 5
        )(KEY)
        expected = [base(c, KEY) for c in centres]
        got = [run[:, n] for n in range(3)]
    else:
        alone = _jax.over_lanes(lambda c, key: one(c, key), 5, (None, None))
        expected = [alone(c, KEY) for c in centres]
        if order == "shared inside":
            run = _jax.over_lanes(lambda key: jax.vmap(lambda c: one(c, key))(centres), 5)(KEY)
            got = [run[:, n] for n in range(3)]
        else:
            inner = lambda key: jax.vmap(lambda a: jax.vmap(lambda c: one(c + a, key))(centres))(jnp.zeros(2))  # noqa: E731
            run = _jax.over_lanes(inner, 5)(KEY)
            assert run.shape == (5, 2, 3)
            assert np.array_equal(run[:, 0], run[:, 1])
            got = [run[:, 1, n] for n in range(3)]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.unique(np.asarray(got[0])).size > 1  # lanes differ
