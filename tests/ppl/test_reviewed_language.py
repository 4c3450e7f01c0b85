"""Defects of the language that a hostile reader found, each with its smallest case; exact ones at 1e-10 in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference
from expectax.ppl import ControlFlowError, DistributionError, OutsideModelError, SupportError

KEY = jax.random.key(3)
UNIT = dist.Normal(0.0, 1.0)
FILE = r"test_reviewed_language\.py:\d+"
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731


def simulate(function, *args):
    return ex.model(function)(*args).simulate(KEY)


# --- reparameterize after marginalize_discrete -------------------------------------------------------------------------


@ex.model
def rows():
    mu = ex.sample("mu", UNIT)
    tau = ex.sample("tau", dist.HalfNormal(1.0))

    def row(_):
        z = ex.sample("z", dist.Bernoulli(0.3))
        th = ex.sample("th", dist.Normal(mu, tau))
        ex.sample("y", dist.Normal(th + z, 1.0))

    jax.vmap(row)(jnp.arange(4))


@pytest.mark.parametrize("centred", [0.0, 0.4])
def test_reparameterize_and_marginalize_in_both_orders(centred):
    one = ex.reparameterize(ex.marginalize_discrete(rows()), "th", centred=centred)
    other = ex.marginalize_discrete(ex.reparameterize(rows(), "th", centred=centred))
    trace = one.simulate(KEY)
    assert set(trace.choices) == {"mu", "tau", "th_base", "y"}
    close(trace.log_density, other.assess(trace.choices)[0])
    z = trace.choices
    th = z["mu"] + z["tau"] ** (1 - centred) * (z["th_base"] - centred * z["mu"])
    close(trace["th"], th)
    y = np.asarray(z["y"])
    each = np.log(0.7 * stats.norm.pdf(y, th) + 0.3 * stats.norm.pdf(y, th + 1))
    base = stats.norm.logpdf(z["th_base"], centred * z["mu"], z["tau"] ** centred)
    prior = stats.norm.logpdf(z["mu"]) + stats.halfnorm.logpdf(z["tau"])
    close(trace.log_density, prior + (base + each).sum())
    u = one.given({"y": y}).unconstrain({k: v for k, v in z.items() if k != "y"})
    found = [p.given({"y": y}).unconstrained_log_density(u) for p in (one, other)]
    close(found[0], found[1])
    _, weight = one.generate(KEY, {"y": y})
    assert np.isfinite(weight)


def test_a_rewriting_that_closes_over_its_argument_in_a_branch_over_lanes():
    @ex.model
    def model():
        def lane(_):
            z = ex.sample("z", dist.Bernoulli(0.5))
            return ex.cond(z == 1, lambda: ex.sample("x", dist.Normal(2.0, 3.0)), lambda: 0.0)

        jax.vmap(lane)(jnp.arange(2))

    z = {"z": jnp.array([0, 1]), "x_base": jnp.array([0.0, 1.5])}
    density, _ = ex.reparameterize(model(), "x", centred=0.5).assess(z)
    close(density, 2 * np.log(0.5) + stats.norm.logpdf(1.5, 1.0, np.sqrt(3.0)))


# --- scans inside scans, and summing twice -----------------------------------------------------------------------------

MOVE = np.array([0.2, 0.6])


def chain(z, w, length=2):
    def step(z, _):
        z = ex.sample("z", dist.Bernoulli(0.5 * jnp.asarray(MOVE)[z] + 0.3 * w))
        ex.sample("y", dist.Normal(1.0 * z + w, 1.0))
        return z, None

    return lax.scan(step, z, length=length)[0]


def inside():
    def step(w, _):
        w = ex.sample("w", dist.Bernoulli(jnp.asarray(MOVE)[w]))
        chain(0, w)
        return w, None

    lax.scan(step, 0, length=2)


def onwards():
    lax.scan(lambda z, _: (chain(z, 0), None), 0, length=2)


def in_lanes():
    jax.vmap(lambda _: inside())(jnp.arange(2))


def chain_by_hand(z, w, y):
    total, p = 0.0, lambda before, now: (1 - q, q)[now] if (q := 0.5 * MOVE[before] + 0.3 * w) else 1.0 - now
    for path in itertools.product(range(2), repeat=len(y)):
        steps = [p(a, b) * stats.norm.pdf(v, b + w) for a, b, v in zip((z, *path), path, y, strict=False)]
        total += np.prod(steps)
    return total


def inside_by_hand(y):
    total = 0.0
    for path in itertools.product(range(2), repeat=2):
        moves = [(1 - MOVE[a], MOVE[a])[b] for a, b in zip((0, *path), path, strict=False)]
        total += np.prod(moves) * np.prod([chain_by_hand(0, w, y[t]) for t, w in enumerate(path)])
    return total


NESTED = {
    "steps apart": (
        lambda: lax.scan(lambda c, _: (c, chain(0, 0)), 0, length=2) and None,
        lambda y: np.prod([chain_by_hand(0, 0, v) for v in y]),
    ),
    "a state outside": (inside, inside_by_hand),
    "one chain through both": (onwards, lambda y: chain_by_hand(0, 0, y.ravel())),
    "in lanes": (in_lanes, lambda y: inside_by_hand(y[..., 0]) * inside_by_hand(y[..., 1])),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_scan_inside_a_scan(name):
    function, by_hand = NESTED[name]
    program = ex.marginalize_discrete(ex.model(lambda: (function(), None)[1])())
    y = np.random.default_rng(0).normal(size=program.sites()["y"].shape)
    close(program.assess({"y": y})[0], np.log(by_hand(y)))


def test_summing_out_twice_is_summing_out_both():
    @ex.model
    def two():
        a = ex.sample("a", dist.Bernoulli(0.3))
        b = ex.sample("b", dist.Bernoulli(0.3 + 0.2 * a))
        mu = ex.sample("mu", dist.Normal(1.0 * a, 1.0))
        ex.sample("y", dist.Normal(mu + b + a, 1.0))

    once = ex.marginalize_discrete(two())
    twice = ex.marginalize_discrete(ex.marginalize_discrete(two(), "a"), "b")
    choices = {"mu": 0.2, "y": 0.5}
    close(twice.assess(choices)[0], once.assess(choices)[0])
    pairs = [(a, b, (0.7, 0.3)[a] * (0.7 - 0.2 * a, 0.3 + 0.2 * a)[b]) for a in range(2) for b in range(2)]
    trace, weight = twice.generate(KEY, {"mu": 0.2})
    close(trace.log_density, once.assess(trace.choices)[0])
    proposal = sum(p * stats.norm.pdf(trace["y"], 0.2 + a + b) for a, b, p in pairs)
    close(weight, trace.log_density - np.log(proposal))

    @ex.model
    def around():
        c = ex.sample("c", dist.Bernoulli(0.5))
        ex.sample("part", ex.marginalize_discrete(two(), "a"))
        ex.sample("x", dist.Normal(1.0 * c, 1.0))

    found = ex.marginalize_discrete(around()).assess({"part": choices, "x": 0.1})[0]
    mixed = np.log(0.5 * stats.norm.pdf(0.1) + 0.5 * stats.norm.pdf(0.1, 1.0))
    close(found, once.assess(choices)[0] + mixed)


# --- categorical sites over lanes, against numpy -------------------------------------------------------------------------

TABLE = np.array([[0.1, 0.6, 0.3], [0.7, 0.1, 0.2], [0.25, 0.25, 0.5]])
CENTRES = np.array([-1.0, 0.5, 2.0])


def point(probs):
    ex.sample("y", dist.Normal(jnp.asarray(CENTRES)[ex.sample("k", dist.Categorical(probs=probs))], 1.0))


def two_points(probs):
    k = ex.sample("k", dist.Categorical(probs=probs))
    m = ex.sample("m", dist.Categorical(probs=jnp.asarray(TABLE)[k]))
    ex.sample("y", dist.Normal(jnp.asarray(CENTRES)[m] + k, 1.0))


def hidden_chain(probs):
    first = ex.sample("first", dist.Categorical(probs=probs))

    def step(z, _):
        z = ex.sample("z", dist.Categorical(probs=jnp.asarray(TABLE)[z]))
        ex.sample("y", dist.Normal(jnp.asarray(CENTRES)[z], 1.0))
        return z, None

    lax.scan(step, first, length=3)


def by_lane(kind, p, y):
    """Return the density of one lane's data; `y` is a number, or three for a chain."""
    pdf = stats.norm.pdf(np.reshape(y, (-1, 1)), CENTRES)
    if kind is point:
        return p @ pdf[0]
    if kind is two_points:
        return sum(p[k] * TABLE[k] @ stats.norm.pdf(y, CENTRES + k) for k in range(3))
    alpha = p
    for row in pdf:
        alpha = (alpha @ TABLE) * row
    return alpha.sum()


@pytest.mark.parametrize("kind", [point, two_points, hidden_chain])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["in_axes=0", "in_axes=1", "nested"])
def test_probabilities_over_lanes(kind, lanes, form):
    rng = np.random.default_rng(lanes)
    probs = rng.dirichlet(np.ones(3), size=(2, lanes))[slice(None) if form == "nested" else 0]

    @ex.model
    def model():
        if form == "in_axes=0":
            jax.vmap(kind)(jnp.asarray(probs))
        elif form == "in_axes=1":
            jax.vmap(kind, in_axes=1)(jnp.asarray(probs.T))
        else:
            jax.vmap(jax.vmap(kind, in_axes=-1), in_axes=1)(jnp.asarray(np.transpose(probs, (2, 0, 1))))

    program = ex.marginalize_discrete(model())
    shape = program.sites()["y"].shape
    assert shape == ((3,) if kind is hidden_chain else ()) + probs.shape[:-1]
    y = rng.normal(size=shape)
    each = [by_lane(kind, probs[lane], y[(..., *lane)]) for lane in np.ndindex(*probs.shape[:-1])]
    close(jax.jit(program.assess)({"y": y})[0], np.log(each).sum())


def test_choices_seen_along_transposed_lanes():
    @ex.model
    def model():
        k = jax.vmap(lambda p: ex.sample("k", dist.Categorical(probs=p).expand([2])))(jnp.asarray(TABLE))
        jax.vmap(lambda k: ex.sample("y", dist.Normal(jnp.asarray(CENTRES)[k], 1.0)), in_axes=1)(k)

    y = np.random.default_rng(5).normal(size=(2, 3))
    each = [by_lane(point, TABLE[i], y[j, i]) for i in range(3) for j in range(2)]
    close(ex.marginalize_discrete(model()).assess({"y": y})[0], np.log(each).sum())


# --- tools, empty sites, supports ----------------------------------------------------------------------------------------


def test_debug_where_one_address_has_two_distributions():
    @ex.model
    def model(scales):
        def lane(s):
            z = ex.sample("z", dist.Bernoulli(0.5))
            ex.cond(
                z == 1,
                lambda: ex.sample("y", dist.Normal(0.0, s)),
                lambda: ex.sample("y", dist.StudentT(3.0, 1.0, s)),
            )

        lane(scales) if jnp.ndim(scales) == 0 else jax.vmap(lane)(scales)

    assert ex.debug(model(1.0), {"z": 0, "y": 1.0}) is None
    for z, name in enumerate(["StudentT", "Normal"]):
        finding = ex.debug(model(np.inf), {"z": z, "y": 1.0})
        assert finding is not None and finding.distribution == name and finding.parameters["scale"] == np.inf
        lanes = ex.debug(model(jnp.array([1.0, np.inf])), {"z": jnp.array([1 - z, z]), "y": jnp.zeros(2)})
        assert lanes is not None and (lanes.distribution, lanes.index) == (name, (1,))
        assert set(lanes.parameters) == set(finding.parameters) and finding.place == lanes.place
    assert int(finding.place.split(":")[1]) == int(ex.debug(model(np.inf), {"z": 0, "y": 1.0}).place.split(":")[1]) - 1
    assert ex.debug(model(jnp.ones(2)), key=KEY) is None


def test_empty_sites():
    @ex.model
    def model():
        ex.sample("batch", dist.Normal(jnp.zeros(0), 1.0))
        ex.sample("event", dist.Normal(jnp.zeros((2, 0)), 1.0).to_event(1))
        jax.vmap(lambda m: ex.sample("lanes", dist.HalfNormal(m)))(jnp.zeros(0))
        ex.sample("x", dist.HalfNormal(1.0))

    assert ex.debug(model(), key=KEY) is None
    posterior = model().given({})
    latents = posterior.generate(KEY)[0].choices
    u = posterior.unconstrain(latents)
    jax.tree.map(close, posterior.constrain(u), latents)
    close(posterior.unconstrained_log_density(u), stats.halfnorm.logpdf(latents["x"]) + np.log(latents["x"]))


@pytest.mark.parametrize(
    ("d", "match"),
    [
        (dist.Poisson(1.0), "is discrete .*marginalize_discrete"),
        (dist.GeometricProbs(0.3), "is discrete .*marginalize_discrete"),
        (dist.GeometricLogits(0.3), "is discrete .*marginalize_discrete"),
        (dist.Levy(0.0, 1.0), "Levy has no unconstrained space"),
        (dist.ProjectedNormal(jnp.ones(3)), "ProjectedNormal has no unconstrained space"),
    ],
)
def test_sites_without_an_unconstrained_space(d, match):
    posterior = ex.model(lambda: ex.sample("x", d))().given({})
    x = jnp.ones(d.shape()) / np.sqrt(max(np.prod(d.shape()), 1))  # on the sphere, too
    for run in (
        lambda: posterior.unconstrain({"x": x}),
        lambda: posterior.unconstrained_log_density({"x": x}),
        lambda: inference.mcmc(posterior, inference.nuts(), key=KEY, num_warmup=2, num_samples=2),
    ):
        with pytest.raises(SupportError, match=rf"'x' at .*{FILE}.*{match}"):
            run()


# --- values that are not there when Python asks -------------------------------------------------------------------------


class Shifted:
    def __init__(self, shift):
        self.shift = shift

    def sample(self, key):
        return self.shift + jax.random.normal(key)

    def log_prob(self, x):
        return -((x - self.shift) ** 2)


def closing(a):
    return ex.distribution(lambda key: a * jax.random.normal(key), lambda x: -(x**2) / a)()


def by_euler(a):
    return dist.EulerMaruyama(jnp.linspace(0.0, 1.0, 4), lambda x, t: (-x * a, 1.0), UNIT)


@pytest.mark.parametrize("make", [closing, by_euler, Shifted])
@pytest.mark.parametrize("around", [lambda f: f(ex.sample("a", UNIT)), lambda f: jax.vmap(f)(jnp.arange(1.0, 3.0))])
def test_distributions_that_close_over_values_of_the_model(make, around):
    program = ex.model(lambda: around(lambda a: ex.sample("x", make(a))) * 0)()
    for run in (lambda: program.simulate(KEY), lambda: program.sites()):
        with pytest.raises(DistributionError, match=rf"'x' at .*{FILE}.*closes over.*Pass it as a parameter"):
            run()


def test_closing_over_a_value_from_outside_the_model():
    def program(a):
        return ex.model(lambda: ex.sample("x", closing(a)))()

    close(jax.grad(lambda a: program(a).assess({"x": 1.0})[0])(2.0), 0.25)
    with pytest.raises(DistributionError, match="closes over"):
        jax.grad(lambda a: program(a).simulate(KEY)["x"])(2.0)


def test_whole_numbers_of_numpy_are_fixed():
    @ex.model
    def model(n, more):
        if more:
            ex.sample("x", dist.Normal(jnp.zeros(n), 1.0))

    assert model(np.int64(3), np.bool_(True)).sites()["x"].shape == (3,)
    assert model(np.int64(3), np.bool_(True))._fixed == model(3, True)._fixed


def asks(use):
    return lambda: simulate(lambda: use(ex.sample("x", dist.Poisson(1.0))) and None)


ERRORS = {
    "if": (asks(lambda x: 1 if x > 0 else 2), ControlFlowError, rf"{FILE}.*ex\.cond"),
    "float": (asks(float), ControlFlowError, rf"{FILE}.*jax\.numpy"),
    "range": (asks(range), ControlFlowError, rf"{FILE}.*lax\.scan"),
    "size": (asks(lambda x: jnp.zeros(x)), ControlFlowError, rf"{FILE}.*fixed argument"),
    "numpy": (asks(np.sin), ControlFlowError, FILE),
    "booleans": (asks(lambda x: jnp.arange(3)[jnp.arange(3) > x]), ControlFlowError, FILE),
    "numpyro": (lambda: simulate(lambda: numpyro.sample("x", UNIT)), OutsideModelError, rf"{FILE}.*from_numpyro"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_python_asks_for_a_number(name):
    run, error, match = ERRORS[name]
    with pytest.raises(error, match=match) as caught:
        run()
    assert "Site(" not in str(caught.value) and caught.value.__cause__ is not None


def test_a_users_own_assertion_stays():
    def model():
        with numpyro.handlers.seed(rng_seed=0):
            assert ex is None

    with pytest.raises(AssertionError):
        simulate(model)
