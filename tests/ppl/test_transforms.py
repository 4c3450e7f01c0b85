"""Programs made of programs: exact densities against a reference in plain numpy that scores element by element."""

import functools
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

import expectax as ex
from expectax import dist, inference
from expectax.ppl._nested import leaves_of, nested
from helpers import count_compiles

KEY = jax.random.key(20260812)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
ROWS, BIAS = np.arange(6.0).reshape(3, 2) / 10, np.array([-0.5, 0.2, 1.0])


@ex.model
def effect(centre):
    e = ex.sample("e", dist.Normal(centre, 0.5))
    ex.deterministic("twice", 2 * e)
    return e


@ex.model
def big(y, w):
    a = ex.sample("a", dist.Normal(0.3, 1.2))
    e = ex.sample("sub", effect(a))

    def step(x, row):
        return jax.vmap(lambda m: ex.sample("z", dist.Normal(x + m, 0.7)))(row).mean(), None

    last, _ = lax.scan(step, e, jnp.asarray(ROWS))
    k = ex.sample("k", dist.Bernoulli(0.3))
    c = lax.cond(k == 1, lambda: ex.sample("c", dist.Gamma(2.0, jnp.exp(last))), lambda: 0.25)

    def lane(m):
        b = ex.sample("b", dist.Bernoulli(jax.nn.sigmoid(m)))
        return lax.cond(b == 1, lambda: ex.sample("g", dist.Normal(a + m, 2.0)), lambda: m)

    g = jax.vmap(lane)(jnp.asarray(BIAS))
    ex.observe("y", dist.Normal(g + c, 1.1), y)
    ex.factor("w", w * a)
    ex.deterministic("total", a + c)
    new = ex.sample("new", dist.Normal(jnp.full(2, c), 0.4))
    ex.deterministic("doubled", 2 * new)
    return g.sum() + last


def terms(choices: dict[str, Any], y: Any, w: float) -> dict[str, np.ndarray]:
    """Return the log density of every element of every site, by path."""
    v = {path: np.asarray(value) for path, value in leaves_of(choices)}
    norm = stats.norm.logpdf
    before = np.concatenate([[v["sub/e"]], v["z"].mean(1)[:-1]])
    c = v["c"] if v["k"] else 0.25
    g = np.where(v["b"], v["g"], BIAS)
    return {
        "a": norm(v["a"], 0.3, 1.2),
        "sub/e": norm(v["sub/e"], v["a"], 0.5),
        "z": norm(v["z"], before[:, None] + ROWS, 0.7),
        "k": stats.bernoulli.logpmf(v["k"], 0.3),
        "c": np.where(v["k"], stats.gamma.logpdf(v["c"], 2, scale=np.exp(-v["z"][-1].mean())), 0.0),
        "b": stats.bernoulli.logpmf(v["b"], special.expit(BIAS)),
        "g": v["b"] * norm(v["g"], v["a"] + BIAS, 2.0),
        "y": norm(y, g + c, 1.1),
        "w": np.asarray(w * v["a"]),
        "new": norm(v["new"], c, 0.4),
    }


def returned(choices: dict[str, Any]) -> Any:
    v = choices
    return np.where(v["b"], v["g"], BIAS).sum() + np.mean(v["z"][-1])


CHOICES = [
    {
        "a": 0.4 - i,
        "sub": {"e": 0.1 + i},
        "z": np.array([[0.3, -0.2], [0.9, 0.1], [-0.4, 0.6]]) + i,
        "k": np.int32(1 - i),
        "c": 1.3,
        "b": np.array([1, i, 1 - i], np.int32),
        "g": np.array([0.5, -1.0, 2.0]) * (1 + i),
        "new": np.array([0.2, 1.5]),
    }
    for i in range(2)
]
Y, W = np.array([0.5, -0.3, 1.2]), 0.7
PATHS = [path for path, _ in leaves_of(CHOICES[0])]
SUBSETS = [[path] for path in PATHS] + [[], ["z", "g", "sub/e"], ["k", "c"], PATHS]


def part(choices: Any, paths: Any, inside: bool = True) -> Any:
    return nested((p, v) for p, v in leaves_of(choices) if (p in paths) == inside)


def total(found: dict[str, Any], paths: Any = None) -> float:
    return sum(float(np.sum(v)) for p, v in found.items() if paths is None or p in paths)


def program() -> Any:
    return big(jnp.asarray(Y), W)


close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", [ex.condition, ex.substitute, ex.do], ids=lambda f: f.__name__)
def test_fixed_choices(transform):
    """Density, weight and return value of every subset; `do` takes the sites' own terms away, and no others."""

    @jax.jit
    def run(choices: Any) -> Any:
        found = []
        for paths in SUBSETS:
            fixed = transform(program(), part(choices, paths))
            trace, weight = fixed.generate(KEY, part(choices, [*paths, "a"], False) if "a" not in paths else {})
            found.append((fixed.assess(part(choices, paths, False)), trace, weight))
        return found

    for choices in CHOICES:
        for paths, ((density, retval), trace, weight) in zip(SUBSETS, run(choices), strict=True):
            less = paths if transform is ex.do else []
            close(density, total(terms(choices, Y, W)) - total(terms(choices, Y, W), less))
            close(retval, returned(choices))
            assert set(dict(leaves_of(trace.choices))) == set(PATHS) - set(paths)
            whole = nested([*leaves_of(trace.choices), *leaves_of(part(choices, paths))])
            own = terms(whole, Y, W)
            close(trace.log_density, total(own) - total(own, less))
            drawn = {"a"} if "a" not in paths else set(PATHS) - set(paths)
            close(weight, total(own) - total(own, drawn) - total(own, less))
            close(trace.retval, returned(whole))


SHAPES = {path: np.shape(value) for path, value in leaves_of(CHOICES[0])} | {"y": (3,), "w": ()}


@pytest.mark.parametrize("name", ["mask", "scale"])
def test_elements_that_count(name):
    """An array over all elements, over the first axis, or one number; also for data and factors."""
    rng = np.random.default_rng(5)
    draw = (lambda s: rng.random(s) < 0.5) if name == "mask" else (lambda s: rng.normal(size=s))
    arrays = {path: [draw(shape), draw(shape[:1])] for path, shape in SHAPES.items()}
    transform = getattr(ex, name)

    @jax.jit
    def run(choices: Any, arrays: Any) -> Any:
        return [[transform(program(), x, p).assess(choices)[0] for x in arrays[p]] for p in SHAPES]

    for choices in CHOICES:
        own = terms(choices, Y, W)
        over = lambda a, v: np.sum((a.reshape(a.shape + (1,) * (v.ndim - a.ndim)) - 1.0) * v)  # noqa: E731
        close(run(choices, arrays), [[total(own) + over(a, own[p]) for a in arrays[p]] for p in arrays])
        for selection, paths in ((None, None), (ex.select("sub", "z"), ["sub/e", "z"])):
            new, less = transform(program(), arrays["w"][0], selection), 1 - float(arrays["w"][0])
            close([new.assess(choices)[0], new.generate(KEY, choices)[1]], total(own) - less * total(own, paths))


def test_a_scaled_site_outside_its_support_has_no_density():
    for factor in (1.0, 2.0, 0.5):
        scaled = ex.scale(ex.model(lambda: ex.sample("x", dist.Gamma(2.0, 1.0)))(), factor)
        assert jax.jit(lambda x, p=scaled: p.assess({"x": x})[0])(-1.0) == -np.inf


@pytest.mark.parametrize("new", [{"z": "q", "sub/e": "f", "sub": "top", "total": "t"}, {"b": "g", "g": "b", "y": "v"}])
def test_rename(new):
    renamed = ex.rename(program(), new)

    def path_of(path: str) -> str:
        return "/".join(new.get("/".join(path.split("/")[: i + 1]), part) for i, part in enumerate(path.split("/")))

    for choices in CHOICES:
        density, retval = renamed.assess(nested((path_of(p), v) for p, v in leaves_of(choices)))
        close(density, total(terms(choices, Y, W)))
        close(retval, returned(choices))
    recorded = dict(leaves_of(renamed.simulate(KEY).deterministic))
    assert set(recorded) == {path_of(p) for p in ("sub/twice", "total", "doubled")}
    assert set(dict(leaves_of(renamed.table()))) == {path_of(p) for p in dict(leaves_of(program().table()))}


def test_block():
    blocked = ex.block(program(), "new")
    assert set(dict(leaves_of(blocked.sites()))) == set(PATHS) - {"new"}
    assert set(blocked.simulate(KEY).deterministic) == {"sub", "total"}
    two = ex.model(lambda: [ex.sample(address, dist.Normal(0.0, 1.0)) for address in "xy"])
    assert ex.block(two(), "y").assess({"x": 2.0})[1] == [2.0, None]
    for choices in CHOICES:
        density, retval = blocked.assess(part(choices, ["new"], False))
        close(density, total(terms(choices, Y, W)) - total(terms(choices, Y, W), ["new"]))
        close(retval, returned(choices))
    for path in ("a", "sub/e", "z", "k", "c", "b", "g"):
        with pytest.raises(ex.ppl.ControlFlowError, match=f"depends on.*{path!r}"):
            ex.block(program(), path)


def compositions(p: Any, c: Any, m: Any, s: Any) -> dict[str, Any]:
    """Return pairs (program, choices) by name; all with mask `m` and scale `s` on z, whose values are data."""
    z, rest = {"z": c["z"]}, part(c, ["z"], False)
    both = lambda q, path: ex.scale(ex.mask(q, m, path), s, path)  # noqa: E731
    return {
        "scale mask condition": (both(ex.condition(p, z), "z"), rest),
        "condition scale mask": (ex.condition(both(p, "z"), z), rest),
        "twice": (ex.scale(ex.mask(both(ex.condition(p, z), "z"), jnp.roll(m, 1), "z"), s, "z"), rest),
        "scope condition": (ex.scope(both(ex.condition(p, z), "z"), "t"), {"t": rest}),
        "condition scope": (both(ex.condition(ex.scope(p, "t"), {"t": z}), "t/z"), {"t": rest}),
        "rename condition": (ex.rename(both(ex.condition(p, z), "z"), {"z": "q"}), rest),
        "condition rename": (both(ex.condition(ex.rename(p, {"z": "q"}), {"q": c["z"]}), "q"), rest),
        "block": (ex.block(both(ex.condition(p, z), "z"), "new"), part(rest, ["new"], False)),
        "substitute do": (both(ex.substitute(ex.do(p, {"a": c["a"]}), z), "z"), part(rest, ["a"], False)),
    }


def test_compositions_under_jit_and_vmap_of_the_data():
    rng = np.random.default_rng(8)
    masks, scales, ys = rng.random((2, 3, 2)) < 0.5, 0.5 + rng.random((2, 3, 2)), rng.normal(size=(2, 3))
    ws = np.array([0.7, -0.2])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *CHOICES)

    def run(c: Any, m: Any, s: Any, y: Any, w: Any) -> Any:
        return {name: q.assess(rest)[0] for name, (q, rest) in compositions(big(y, w), c, m, s).items()}

    got = jax.jit(jax.vmap(run))(stacked, masks, scales, ys, ws)
    for i, choices in enumerate(CHOICES):
        own = terms(choices, ys[i], ws[i])
        expected = total(own) + np.sum((masks[i] * scales[i] - 1) * own["z"])
        for name, density in got.items():
            less = {"block": ["new"], "substitute do": ["a"]}.get(name, [])
            both = masks[i] * scales[i] * (np.roll(masks[i], 1) * scales[i] - 1)
            again = np.sum(both * own["z"]) if name == "twice" else 0.0
            np.testing.assert_allclose(density[i], expected + again - total(own, less), rtol=1e-10, err_msg=name)


def test_new_data_compile_nothing():
    def run(i: int) -> None:
        y, z = jnp.asarray(Y + i), jnp.asarray(CHOICES[i]["z"])
        s, m = jnp.array([1.0 + i, 2.0, 0.5]), jnp.array([True, i == 0, True])
        p = ex.scale(ex.mask(ex.condition(big(y, W + i), {"z": z}), m, "y"), s, "y")
        ex.predictive(p, {"a": jnp.arange(4.0) + i}, key=jax.random.key(i))
        inference.importance(ex.rename(p, {"new": "n"}).given({"c": 1.0 + i}), key=jax.random.key(i), num_particles=8)

    run(0)
    with count_compiles() as compiles:
        run(1)
    assert not compiles


def test_traces_of_transformed_programs_can_be_pickled():
    p = ex.rename(ex.scale(ex.mask(ex.condition(program(), {"a": 0.4}), True, "z"), 2.0, "z"), {"new": "n"})
    p = ex.block(ex.do(ex.substitute(ex.scope(p, "s"), {"s": {"k": 1}}), {"s": {"c": 1.3}}), "s/n")
    again = pickle.loads(pickle.dumps(trace := p.simulate(KEY)))
    jax.tree.map(np.testing.assert_array_equal, trace.choices, again.choices)
    close(again.program.assess(again.choices)[0], trace.log_density)


GRID = np.arange(6.0).reshape(2, 3)
scan = lambda f, xs: lax.scan(lambda c, x: (c, f(x)), None, xs)[1]  # noqa: E731
NESTS = {  # each with its centres in the order of the choice: time first, then lanes
    "lanes of lanes": (lambda site: jax.vmap(jax.vmap(site))(GRID), GRID),
    "lanes of steps": (lambda site: jax.vmap(lambda row: scan(site, row))(GRID), GRID.T),
    "steps of steps": (lambda site: scan(lambda row: scan(site, row), GRID), GRID),
    "backward steps": (
        lambda site: lax.scan(lambda c, m: (c + 1.0, site(m + c)), 0.0, GRID[1], reverse=True),
        GRID[1] + np.array([2.0, 1.0, 0.0]),
    ),
}


nest = ex.model(
    lambda name: NESTS[name][0](lambda m: ex.deterministic("d", ex.sample("x", dist.Normal(m, 1.0 + m**2)) - m))
)


@pytest.mark.parametrize("name", NESTS)
def test_every_nest_is_rewritten(name):
    """A mask, a value and a recorded value find their elements."""
    p, m, rng = nest(name), NESTS[name][1], np.random.default_rng(1)
    x, keep = rng.normal(size=m.shape), rng.random(m.shape) < 0.5
    own = stats.norm.logpdf(x, m, 1 + m**2)
    close(ex.condition(ex.mask(p, keep, "x"), {"x": x}).assess({})[0], np.sum(keep * own))
    trace, _ = ex.rename(ex.scale(p, keep + 1.0, "x"), {"x": "z"}).generate(KEY, {"z": x})
    close(trace.log_density, np.sum((keep + 1.0) * own))
    close(trace["d"], x - m)
    done = ex.do(p, {"x": x}).simulate(KEY).deterministic
    close([done["d"], done["x"]], [x - m, x])
    assert set(ex.condition(p, {"x": x}).simulate(KEY).deterministic) == {"d"}


# --- subsampling ----------------------------------------------------------------------------------------------------------

X7, Y7, T7 = np.linspace(-1, 1, 7), np.array([0.2, -1.0, 0.5, 2.0, 0.0, 1.0, -0.3]), np.linspace(0.5, -0.5, 7)


@ex.model
def regression(x, y):
    """One number for all data and one for each datum."""
    slope = ex.sample("slope", dist.Normal(0.0, 1.0))
    own = jax.vmap(lambda x: ex.sample("own", dist.Normal(slope * x, 0.5)))(x)
    ex.observe("y", dist.Normal(own, 0.8), y)


def subsampled(batch: Any, padding: float, size: int) -> Any:
    """Return density and gradient in slope of one batch, padded to `size`."""
    index, valid = np.resize(batch, size), np.arange(size) < len(batch)
    x, y, own = (jnp.where(valid, v[index], fill) for v, fill in ((X7, 9.0), (Y7, padding), (T7, 1e8)))
    valid = valid if len(batch) < size else None

    def density(slope: Any, x: Any, y: Any, own: Any) -> Any:
        part = ex.with_data_subsample(regression(x, y), ["own", "y"], 7, valid=valid)
        return part.assess({"slope": slope, "own": own})[0]

    return jnp.stack(jax.jit(jax.value_and_grad(density))(0.6, x, y, own))


@pytest.mark.parametrize("padding", [0.0, np.nan])
def test_minibatches_average_to_the_whole(padding):
    """Over all subsets of one size; and over the batches of an epoch when a batch is drawn as often as it is large."""
    whole = jax.value_and_grad(lambda s: regression(X7, Y7).assess({"slope": s, "own": T7})[0])(0.6)
    subsets = [np.array(c) for c in itertools.combinations(range(7), 5)]
    close(np.mean([subsampled(b, padding, 5) for b in subsets], axis=0), whole)
    epoch = [np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([6])]
    close(sum(len(b) / 7 * subsampled(b, padding, 3) for b in epoch), whole)


# --- reparameterisation -----------------------------------------------------------------------------------------------------

SITES = {n: getattr(dist, n) for n in ("Normal", "Cauchy", "Laplace", "Logistic", "Gumbel", "LogNormal")} | {
    "StudentT": lambda m, s: dist.StudentT(4.0, m, s),
    "MultivariateNormal": lambda m, s: dist.MultivariateNormal(m * jnp.ones(2), s * jnp.eye(2) + 0.3),
    "event": lambda m, s: dist.Normal(m, jnp.stack([s, 2 * s])).to_event(1),
    "expanded event": lambda m, s: dist.LogNormal(m, s).expand([2, 3]).to_event(2),
    "expanded MultivariateNormal": lambda m, s: dist.MultivariateNormal(m * jnp.ones(2), s * jnp.eye(2)).expand([3]),
}
PLACES = {
    "alone": lambda site, m, s: site(m, s),
    "lanes": lambda site, m, s: jax.vmap(lambda i: site(m + i, s * (1 + i)))(jnp.arange(3.0)),
    "steps": lambda site, m, s: lax.scan(lambda c, i: (jnp.sum(site(0.1 * c + i, s)), None), m, jnp.arange(3.0))[0],
    "branch": lambda site, m, s: lax.cond(m > 0, lambda: jnp.sum(site(m, s)), lambda: 0.0),
    "nested": lambda site, m, s: ex.sample("sub", ex.model(lambda: site(m, s))()),
}
WHERE = [(f, "alone") for f in SITES]
WHERE += [(f, p) for f in ("Normal", "event") for p in PLACES if p != "alone"]


@ex.model
def placed(family, place):
    m = ex.sample("m", dist.Normal(0.5, 1.0))
    s = ex.sample("s", dist.LogNormal(0.0, 0.3))
    PLACES[place](lambda m, s: ex.sample("x", SITES[family](m, s)), m, s)


@pytest.mark.parametrize("family, place", WHERE)
def test_reparameterisation_is_a_change_of_variables(family, place):
    r"""$\log p(e) = \log p(x(e)) + \log|\det dx/de|$, with the Jacobian by automatic differentiation of the map."""
    p, path = placed(family, place), "sub/x" if place == "nested" else "x"
    shape, rest = dict(leaves_of(p.sites()))[path].shape, {"m": 0.4, "s": 1.7}
    e = np.linspace(-0.7, 1.1, int(np.prod(shape)))
    full = lambda name, e: nested([*rest.items(), (name, jnp.reshape(e, shape))])  # noqa: E731

    def run(e: Any, c: float) -> Any:
        new = ex.reparameterize(p, path, centred=c)
        x = lambda e: dict(leaves_of(new.given({}).trace(full(path + "_base", e)).deterministic))[path].ravel()  # noqa: E731
        log_det = jnp.linalg.slogdet(jax.jacobian(x)(e))[1]
        return new.assess(full(path + "_base", e))[0], p.assess(full(path, x(e)))[0] + log_det, x(e)

    for c in (0.0, 0.3, 1.0):
        density, expected, x = jax.jit(run, static_argnums=1)(e, c)
        close(density, expected)
    close(x, np.exp(e) if family in ("LogNormal", "expanded event") else e)  # centred


def test_a_scaled_site_is_not_reparameterised():
    scaled = ex.scale(placed("Normal", "alone"), 3.0, "x")
    with pytest.raises(ex.ppl.DistributionError, match="'x' at .*test_transforms.* scaled density"):
        ex.reparameterize(scaled, "x").sites()


@pytest.mark.parametrize("scale, chosen", [(1.0, {"mu", "tau", "theta_base"}), (0.01, {"mu", "tau", "theta"})])
def test_automatic_reparameterisation_of_schools(scale, chosen):
    """Rubin's data say little of each school (non-centred); with a hundredth of the error they say all."""
    y = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = scale * jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    @ex.model
    def schools(sigma):
        mu = ex.sample("mu", dist.Normal(0.0, 5.0))
        tau = ex.sample("tau", dist.HalfCauchy(5.0))
        theta = jax.vmap(lambda _: ex.sample("theta", dist.Normal(mu, tau)))(sigma)
        ex.sample("y", dist.Normal(theta, sigma))

    posterior = ex.reparameterize(schools(sigma).given({"y": y}), key=KEY)
    assert set(posterior.latent_shapes) == chosen
    np.testing.assert_array_equal(posterior.observations["y"], y)
