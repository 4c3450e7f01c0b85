"""SMCP3 moves: properly weighted by enumeration, with Jacobians, and refused where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import expectax as ex
from expectax import dist, inference
from helpers import two_stage_z

KEY = jax.random.key(7)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@ex.model
def three(probs, scale):
    z = ex.sample("z", dist.Categorical(probs=jnp.asarray(probs)))
    ex.sample("y", dist.Normal(1.0 * z, scale))


@ex.model
def two(p):
    """Another model, with other latents: the remainder and the quotient of three's state."""
    first = ex.sample("first", dist.Bernoulli(p))
    second = ex.sample("second", dist.Bernoulli(0.3 + 0.4 * first))
    ex.sample("y", dist.Normal(first + 0.5 * second, 1.0))


@ex.model
def step(z):
    ex.sample("k", dist.Categorical(probs=jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])[z]))


@ex.model
def new_state(z):
    ex.sample("z", dist.Categorical(probs=jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])[z]))


@ex.model
def one_more():
    ex.sample("extra", dist.Bernoulli(0.35))


@ex.model
def old_state(first, second):
    ex.sample("z", dist.Categorical(probs=jnp.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])[(first + second) % 2]))


BEFORE = lambda: three([0.5, 0.3, 0.2], 1.0).given({"y": 0.8})  # noqa: E731
AFTER = lambda: three([0.2, 0.5, 0.3], 0.6).given({"y": 1.4})  # noqa: E731


def add(z, k):
    """Go k states on, and back again by as much from there."""
    return {"z": (z["z"] + k["k"]) % 3}, {"k": (3 - k["k"]) % 3}


def quotient(z, k):
    """A state and a coin are two coins and a state: (z, e) -> (z // 2, e; z % 2 is what is lost), one to one."""
    return {"first": z["z"] // 2, "second": k["extra"]}, {"low": z["z"] % 2}


@ex.model
def low(first):
    ex.sample("low", dist.Bernoulli(jnp.where(first == 1, 0.0, 0.6)))


MOVES = {
    "reweighing alone": (AFTER, None, None, None),
    "a new state": (AFTER, lambda z: new_state(z["z"]), lambda z: new_state(z["z"]), None),
    "another way back": (AFTER, lambda z: new_state(z["z"]), lambda z: new_state((z["z"] + 1) % 3), None),
    "a bijection": (AFTER, lambda z: step(z["z"]), lambda z: step(z["z"]), add),
    "between models": (
        lambda: two(0.4).given({"y": 0.2}),
        lambda z: one_more(),
        lambda z: low(z["first"]),
        quotient,
    ),
    "new latents drawn": (
        lambda: two(0.4).given({"y": 0.2}),
        lambda z: two_states(z["z"]),
        lambda z: old_state(z["first"], z["second"]),
        None,
    ),
}


@ex.model
def two_states(z):
    first = ex.sample("first", dist.Bernoulli(0.2 + 0.2 * z))
    ex.sample("second", dist.Bernoulli(0.5 + 0.1 * first))


@pytest.mark.parametrize("name", MOVES)
def test_every_run_of_a_change(x64, name):
    """Catches: K or L left out, taken at the wrong end or swapped, the old density forgotten."""
    after, forward, backward, transform = MOVES[name]

    def run(posterior):
        cloud = inference.resample(inference.spawn(BEFORE(), 2))
        return inference.change(cloud, posterior, forward, backward, transform)

    inference.assert_valid(run, after())


def test_a_backward_program_that_misses_something_is_found(x64):
    """What L cannot draw is lost: enumeration sees it."""
    certain = ex.model(lambda: ex.sample("z", dist.Categorical(probs=jnp.array([1.0, 0.0, 0.0]))))
    run = lambda posterior: inference.change(  # noqa: E731
        inference.spawn(BEFORE(), 1), posterior, lambda z: new_state(z["z"]), lambda z: certain()
    )
    inference.assert_valid(run, AFTER())  # the ends are still covered: valid, if with some zero weights
    stuck = lambda posterior: inference.change(  # noqa: E731
        inference.spawn(BEFORE(), 1), posterior, lambda z: certain(), lambda z: new_state(z["z"])
    )
    with pytest.raises(AssertionError, match="not properly weighted"):
        inference.assert_valid(stuck, AFTER())


# --- continuous parts: the Jacobian -------------------------------------------------------------------------------------


@ex.model
def line(sd):
    x = ex.sample("x", dist.Normal(jnp.zeros(2), sd))
    ex.sample("y", dist.Normal(x.sum(), 1.0))


@ex.model
def positive():
    s = ex.sample("s", dist.LogNormal(jnp.zeros(2), 0.5))
    side = ex.sample("side", dist.Bernoulli(0.4))
    ex.sample("y", dist.Normal(jnp.log(s).sum() + side, 1.0))


@ex.model
def noise(x):
    ex.sample("e", dist.Normal(0.5 * x, 1.0))
    ex.sample("side", dist.Bernoulli(0.5))


@ex.model
def undo(s):
    ex.sample("back", dist.Normal(jnp.log(s).sum(), 1.2))


def stretch(z, k):
    """Mix the noise in, stretch, and take exponentials; what is left over is a mean."""
    a, b, e = z["x"][0], z["x"][1], k["e"]
    return {"s": jnp.exp(jnp.stack([0.5 * a + e, 0.5 * b - e])), "side": k["side"]}, {"back": 1.5 * e + b}


def unstretch(new, back):
    """Undo it: a linear system in a, b, e, and back = 1.5 e + b, log s1 = 0.5 b - e."""
    u, v = jnp.log(new["s"])
    e = (back["back"] - 2 * v) / 3.5
    b = 2 * (v + e)
    return {"x": jnp.stack([2 * (u - e), b])}, {"e": e, "side": new["side"]}


def test_weights_have_the_jacobian(x64):
    """Z and the posterior moments after a change with a curved map; the evidence of the log-normal model is known."""
    before, after = line(1.0).given({"y": 0.5}), positive().given({"y": 0.8})

    @jax.jit
    @jax.vmap
    def run(key):
        cloud = inference.keyed(
            lambda: inference.change(
                inference.spawn(before, 4),
                after,
                lambda z: noise(z["x"][0]),
                lambda z: undo(z["s"]),
                stretch,
                inverse=unstretch,
                check=True,
            )
        )(key)
        ratio = jnp.exp(cloud.log_evidence)
        return jnp.stack([ratio, ratio * cloud.particles.mean()["side"]])

    at = [(1 - p, stats.norm.pdf(0.8, s, np.sqrt(1 + 2 * 0.25))) for s, p in ((0, 0.6), (1, 0.4))]
    parts = np.array([(1 - q) * d for q, d in at])
    exact = np.array([parts.sum(), parts[1]])
    two_stage_z(lambda key, n: run(jax.random.split(key, n)), exact, KEY, 20_000)


def test_weights_by_hand(x64):
    """One particle's weight, with |det J| written out."""
    before, after = line(1.0).given({"y": 0.5}), positive().given({"y": 0.8})

    def run():
        cloud = inference.spawn(before, 3)
        return cloud, inference.change(cloud, after, lambda z: noise(z["x"][0]), lambda z: undo(z["s"]), stretch)

    old, new = inference.keyed(run)(KEY)
    x, s, side = old.latents["x"], np.asarray(new.latents["s"]), np.asarray(new.latents["side"])
    for i in range(3):
        a, b = np.asarray(x[i])
        e = np.log(s[i, 0]) - 0.5 * a
        # (a, b, e) -> (s0, s1, back): the exponentials, and det [[.5, 0, 1], [0, .5, -1], [0, 1, 1.5]]
        log_jacobian = np.log(s[i].prod()) + np.log(abs(0.5 * (0.5 * 1.5 + 1.0)))
        expected = (
            float(after.log_density({"s": s[i], "side": side[i]})) - float(before.log_density({"x": x[i]}))
            - stats.norm.logpdf(e, 0.5 * a) - np.log(0.5)
            + stats.norm.logpdf(1.5 * e + b, np.log(s[i]).sum(), 1.2) + log_jacobian
        )  # fmt: skip
        np.testing.assert_allclose(new.log_weights[i] - old.log_weights[i], expected, rtol=1e-10)


# --- checks -------------------------------------------------------------------------------------------------------------


def cloud_of(posterior, n=6):
    return inference.keyed(lambda: inference.spawn(posterior, n))(KEY)


def test_an_inverse_that_does_not_lead_back_is_named():
    before, after = line(1.0).given({"y": 0.5}), positive().given({"y": 0.8})
    arguments = (lambda z: noise(z["x"][0]), lambda z: undo(z["s"]), stretch)
    inference.check_change(cloud_of(before), after, *arguments, inverse=unstretch, key=KEY)

    def wrong(new, back):
        z, k = unstretch(new, back)
        return z, k | {"e": 1.1 * k["e"]}

    with pytest.raises(AssertionError, match="does not lead back.*'e'"):
        inference.check_change(cloud_of(before), after, *arguments, inverse=wrong, key=KEY)
    run = lambda: inference.change(cloud_of(before), after, *arguments, inverse=wrong, check=True)  # noqa: E731
    assert np.isnan(inference.keyed(run)(KEY).log_weights).all()
    with pytest.raises(ValueError, match="inverse"):
        inference.change(cloud_of(before), after, *arguments, check=True)


def test_moves_that_do_not_fit():
    before, after, cloud = BEFORE(), AFTER(), cloud_of(BEFORE())
    run = lambda *a, to=after: inference.keyed(lambda: inference.change(cloud, to, *a))(KEY)  # noqa: E731
    other = two(0.4).given({"y": 0.2})
    with pytest.raises(ex.ppl.AddressError, match="'z' behind"):
        run(lambda z: new_state(z["z"]))
    with pytest.raises(ex.ppl.AddressError, match="draws k, but .* is z"):
        run(lambda z: new_state(z["z"]), lambda z: step(z["z"]))
    with pytest.raises(ex.ppl.AddressError, match="'k', which is no latent"):
        run(lambda z: step(z["z"]), lambda z: step(z["z"]))
    with pytest.raises(ex.ppl.AddressError, match="'first' is neither"):
        run(None, None, to=other)
    with pytest.raises(ex.ppl.AddressError, match="first"):
        run(None, None, lambda z, k: (z, k), to=other)
    with pytest.raises(TypeError, match="forward program"):
        run(lambda z: z)
    with pytest.raises(ex.ppl.ShapeError, match="2 continuous numbers to 1"):
        lines = cloud_of(line(1.0).given({"y": 0.0}))
        single = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))().given({})
        inference.change(lines, single, transform=lambda z, k: ({"x": z["x"][0]}, {}))
    with pytest.raises(ValueError, match="in time"):
        inference.change(inference.Population(before, {}, jnp.zeros(2), jnp.zeros(()), (), 0), after)
