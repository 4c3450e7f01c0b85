"""Kernels at finite targets, where every run is enumerated: invariance and transition probabilities to 1e-10."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wrong_kernels as wrong

from expectax import dist, inference, ppl

pytestmark = pytest.mark.usefixtures("quick_compiles", "x64")


# --- targets ----------------------------------------------------------------------------------------------------------


@ppl.model
def lanes():
    """Elements that depend on each other through the data, and a site that scales them."""
    z = jax.vmap(lambda p: ppl.sample("z", dist.Categorical(probs=p)))(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))
    b = ppl.sample("b", dist.Bernoulli(0.3))
    ppl.sample("y", dist.Normal(z.sum() * (1.0 + b), 1.3))


@ppl.model
def steps():
    """A hidden Markov chain, with one parameter."""
    sticky = ppl.sample("sticky", dist.Bernoulli(0.4))

    def step(x, _):
        x = ppl.sample("x", dist.Bernoulli(jnp.where(x == 1, 0.6 + 0.3 * sticky, 0.2)))
        ppl.sample("y", dist.Normal(1.0 * x, 0.8))
        return x, None

    jax.lax.scan(step, 1, length=3)


@ppl.model
def branch():
    """A choice that is made in one branch only, and one that both branches make in their own ways."""
    b = ppl.sample("b", dist.Bernoulli(0.35))

    def three():
        k = ppl.sample("k", dist.Categorical(probs=jnp.array([0.5, 0.2, 0.3])))
        return k + 2.0 * ppl.sample("w", dist.Bernoulli(0.8))

    mean = jax.lax.cond(b == 1, three, lambda: 0.5 + ppl.sample("w", dist.Bernoulli(0.3)))
    ppl.sample("y", dist.Normal(mean, 1.0))


@ppl.model
def inner(p):
    return ppl.sample("v", dist.Bernoulli(p))


@ppl.model
def nested():
    a = ppl.sample("left", inner(0.3))
    b = ppl.sample("right", inner(0.2 + 0.5 * a))
    ppl.sample("seen", dist.Bernoulli(jnp.full(3, 0.1 + 0.6 * (a * b))))


TARGETS = {
    "lanes": lambda: lanes().given({"y": 2.1}),
    "steps": lambda: steps().given({"y": jnp.array([0.9, 0.2, -0.4])}),
    "branch": lambda: branch().given({"y": 1.2}),
    "nested": lambda: nested().given({"seen": ppl.masked(jnp.array([1, 0, 0]), np.array([True, False, True]))}),
}


# --- proposals --------------------------------------------------------------------------------------------------------


@ppl.model
def next_b(z):
    ppl.sample("b", dist.Bernoulli(jnp.where(z["b"] == 1, 0.3, 0.85)))


@ppl.model
def next_z(z):
    ppl.sample("z", dist.Categorical(probs=jax.nn.one_hot(z["z"], 3) * 0.5 + jnp.array([0.1, 0.15, 0.25])))


@ppl.model
def next_path(z):
    ppl.sample("sticky", dist.Bernoulli(0.7))
    jax.lax.scan(lambda c, x: (c, ppl.sample("x", dist.Bernoulli(0.2 + 0.5 * x))), 0, z["x"])


@ppl.model
def shift(z):
    ppl.sample(
        "by", dist.Categorical(probs=jnp.where(z["b"] == 1, jnp.array([0.1, 0.6, 0.3]), jnp.array([0.5, 0.2, 0.3])))
    )


def turn(z, u):
    """Add modulo 3 to the first element, and flip b."""
    moved = z["z"].at[0].set((z["z"][0] + u["by"]) % 3)
    return {"z": moved, "b": 1 - z["b"]}, {"by": (3 - u["by"]) % 3}


M = inference
KERNELS = {
    "gibbs": ("lanes", lambda: M.gibbs()),
    "gibbs of one": ("lanes", lambda: M.gibbs("z")),
    "gibbs by index": ("lanes", lambda: M.gibbs(("z", 1), "b")),
    "gibbs, jointly": ("lanes", lambda: M.gibbs("z", jointly=True)),
    "gibbs in a scan": ("steps", lambda: M.gibbs()),
    "gibbs in a branch": ("branch", lambda: M.gibbs()),
    "gibbs, jointly in a branch": ("branch", lambda: M.gibbs("b", "k", jointly=True)),
    "gibbs, nested and missing": ("nested", lambda: M.gibbs()),
    "gibbs, jointly missing": ("nested", lambda: M.gibbs("left", "seen", jointly=True)),
    "mh of one": ("lanes", lambda: M.mh(next_b)),
    "mh in lanes": ("lanes", lambda: M.mh(next_z)),
    "mh in a scan": ("steps", lambda: M.mh(next_path)),
    "mh in a branch": ("branch", lambda: M.mh(next_b)),
    "involutive": ("lanes", lambda: M.involutive(shift, turn)),
    "on": ("lanes", lambda: M.on("z", M.gibbs())),
    "on a branch": ("branch", lambda: M.on("b", M.gibbs())),
    "on, missing held": ("nested", lambda: M.on(["left", "right"], M.gibbs(jointly=True))),
    "on on": ("lanes", lambda: M.on(~ppl.select("b"), M.on("z", M.mh(next_z)))),
    "cycle": ("lanes", lambda: M.cycle(M.mh(next_b), M.on("z", M.gibbs()))),
    "cycle in a branch": ("branch", lambda: M.cycle(M.on("b", M.mh(next_b)), M.gibbs("k"), M.on("w", M.gibbs()))),
    "mixture": ("lanes", lambda: M.mixture(M.mh(next_b), M.involutive(shift, turn), weights=[1.0, 3.0])),
    "repeat": ("lanes", lambda: M.repeat(M.mh(next_b), 3)),
    "all together": ("branch", lambda: M.mixture(M.cycle(M.gibbs("k"), M.mh(next_b)), M.repeat(M.gibbs("w"), 2))),
}


SLOW = (
    "gibbs",
    "mh in a branch",
    "gibbs in a scan",
    "all together",
    "cycle in a branch",
    "on on",
    "gibbs, jointly missing",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.by_hand) if n in SLOW else n for n in KERNELS])
def test_kernels_are_invariant(name):
    """What it would catch is in WRONG: each of them fails here."""
    target, kernel = KERNELS[name]
    assert inference.assert_invariant(kernel(), TARGETS[target]()) < 1e-12


WRONG = {
    "no Hastings term": ("lanes", lambda: wrong.without_hastings(next_b)),
    "Hastings term upside down": ("lanes", lambda: wrong.hastings_upside_down(next_z)),
    "always accept": ("lanes", lambda: wrong.always_accept(next_b)),
    "root of the ratio": ("lanes", lambda: wrong.root_of_the_ratio(next_b)),
    "Gibbs without the prior": ("lanes", lambda: wrong.gibbs_without_the_prior("b", 2)),
    "Gibbs without the likelihood": ("lanes", lambda: wrong.gibbs_without_the_likelihood("b", 2)),
    "mode instead of draw": ("lanes", lambda: wrong.mode_instead_of_draw("b", 2)),
    "all elements at once": ("lanes", lambda: wrong.all_elements_at_once("z", 3)),
    "state-dependent mixture": (
        "lanes",
        lambda: wrong.state_dependent_mixture(M.gibbs("b"), M.gibbs("z"), lambda z: 0.2 + 0.6 * z["b"]),
    ),
    "involutive without proposal": ("lanes", lambda: wrong.involutive_without_proposal(shift, turn)),
    "no inverse": ("lanes", lambda: M.involutive(shift, lambda z, u: (turn(z, u)[0], u))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(name):
    target, kernel = WRONG[name]
    with pytest.raises(AssertionError, match="does not leave the posterior invariant: the state .* has probability"):
        inference.assert_invariant(kernel(), TARGETS[target]())


def test_the_state_that_is_named_is_the_worst():
    """From 0 the chain goes to 1 for certain, and stays."""
    two = ppl.model(lambda: ppl.sample("a", dist.Bernoulli(0.25)))
    kernel = wrong.Wrong(lambda target, here: ({"a": jnp.ones_like(here["a"])}, 1.0))
    with pytest.raises(AssertionError) as caught:
        inference.assert_invariant(kernel, two().given({}))
    shown = "{'a': 0} has probability 0.75, and 0 after", "{'a': 1} has probability 0.25, and 1 after"
    assert any(s in str(caught.value) for s in shown)
    assert "difference 0.75, tolerance 1e-10" in str(caught.value)


# --- not only invariant: the right transition probabilities -----------------------------------------------------------


def law_after(kernel, posterior, latents):
    """Return the probabilities of the latents after one step, by their flat values."""
    target = inference.Target(posterior)

    def once():
        own = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), latents, posterior.latent_shapes)
        state = kernel.init(target, own)
        return kernel.step(target, state, kernel.adaptation(target, state).unadapted)[0].position

    law, found = inference.exact(once), {}
    for number, p in enumerate(np.asarray(law.probabilities)):
        flat = tuple(int(v) for x in jax.tree.leaves(law.values) for v in np.ravel(x[number]))
        found[flat] = found.get(flat, 0.0) + float(p)
    return {flat: p for flat, p in found.items() if p > 0}


def posterior_of_lanes():
    """Return p(b, z | y) by hand."""
    table, p = {}, np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    for b, z0, z1 in itertools.product(range(2), range(3), range(3)):
        prior = (0.3 if b else 0.7) * p[0, z0] * p[1, z1]
        table[b, z0, z1] = prior * np.exp(-0.5 * ((2.1 - (z0 + z1) * (1 + b)) / 1.3) ** 2)
    return {k: v / sum(table.values()) for k, v in table.items()}


def close(found, exact):
    assert set(found) == {k for k, v in exact.items() if v > 0}
    np.testing.assert_allclose([found[k] for k in sorted(found)], [exact[k] for k in sorted(found)], rtol=1e-10)


def test_gibbs_draws_from_the_conditionals():
    """In turn, and the later elements given the new values of the earlier ones; jointly it is the posterior itself."""
    posterior, exact = TARGETS["lanes"](), posterior_of_lanes()
    start = {"b": np.int32(1), "z": np.array([2, 0], np.int32)}
    close(law_after(inference.gibbs(jointly=True), posterior, start), exact)
    given = lambda b, z0: sum(exact[b, z0, k] for k in range(3))  # noqa: E731
    first = {z0: exact[1, z0, 0] / sum(exact[1, k, 0] for k in range(3)) for z0 in range(3)}
    both = {(1, z0, z1): first[z0] * exact[1, z0, z1] / given(1, z0) for z0 in range(3) for z1 in range(3)}
    close(law_after(inference.gibbs("z"), posterior, start), both)
    close(law_after(inference.on("z", inference.gibbs()), posterior, start), both)


def test_metropolis_accepts_as_often_as_it_should():
    posterior, exact = TARGETS["lanes"](), posterior_of_lanes()
    start = {"b": np.int32(0), "z": np.array([1, 1], np.int32)}
    rate = 0.85 * min(1.0, exact[1, 1, 1] * 0.7 / (exact[0, 1, 1] * 0.85))
    close(law_after(inference.mh(next_b), posterior, start), {(1, 1, 1): rate, (0, 1, 1): 1 - rate})
    lazy = {(1, 1, 1): rate / 4, (0, 1, 1): 1 - rate / 4}
    same = inference.involutive(ppl.model(lambda z: None), lambda z, u: (z, u))
    close(law_after(inference.mixture(inference.mh(next_b), same, weights=[0.5, 1.5]), posterior, start), lazy)


def test_an_involution_moves_by_its_auxiliary_choices():
    posterior, exact = TARGETS["lanes"](), posterior_of_lanes()
    start, law = {"b": np.int32(0), "z": np.array([1, 2], np.int32)}, {}
    forward, backward = np.array([0.5, 0.2, 0.3]), np.array([0.1, 0.6, 0.3])
    for by in range(3):
        there = (1, (1 + by) % 3, 2)
        law[there] = forward[by] * min(1.0, exact[there] * backward[(3 - by) % 3] / (exact[0, 1, 2] * forward[by]))
    close(law_after(inference.involutive(shift, turn), posterior, start), law | {(0, 1, 2): 1 - sum(law.values())})


# --- replica exchange -------------------------------------------------------------------------------------------------

INSIDE = {
    "gibbs": ("steps", lambda: M.gibbs(), "likelihood"),
    "mh": ("lanes", lambda: M.mh(next_b), "likelihood"),
    "whole density": ("lanes", lambda: M.mh(next_b), "density"),
    "in a branch": ("branch", lambda: M.mh(next_b), "likelihood"),
    "on": ("nested", lambda: M.on("left", M.gibbs()), "likelihood"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_replicas_are_invariant_together(name):
    """The law of all replicas, which start from their own tempered laws."""
    target, kernel, tempered = INSIDE[name]
    betas = [1.0, 0.4] if tempered == "density" else [1.0, 0.0]
    replicas = inference.replica_exchange(kernel(), betas, tempered=tempered)
    assert inference.assert_invariant(replicas, TARGETS[target]()) < 1e-12


def few():
    a = ppl.sample("a", dist.Bernoulli(0.3))
    ppl.sample("y", dist.Normal(2.0 * a, 1.0))


FEW = ppl.model(few)


def test_three_replicas_swap_by_turns():
    still = wrong.Wrong(lambda target, here: (here, 1.0))
    kernel = inference.replica_exchange(still, [1.0, 0.5, 0.1])
    posterior = FEW().given({"y": 1.7})
    assert inference.assert_invariant(kernel, posterior) < 1e-12
    assert inference.assert_invariant(inference.repeat(kernel, 2), posterior) < 1e-12
    target = inference.Target(posterior)
    gap = (1.7**2 - 0.3**2) / 2  # how much likelier 1 is than 0

    def once(parity):
        state = inference.State({"a": jnp.array([0, 1, 0])}, jnp.zeros(()), jnp.asarray(parity))
        after, _ = kernel.step(target, state, ())
        assert after.cache.shape == ()
        return after.position["a"]

    for parity, swapped, beta in ((0, [1, 0, 0], 0.5), (1, [0, 0, 1], -0.4)):
        law = inference.exact(lambda parity=parity: once(parity))
        found = float(law.expectation(lambda a, swapped=swapped: 1.0 * jnp.all(a == jnp.array(swapped))))
        np.testing.assert_allclose(found, np.exp(min(0.0, beta * gap)), rtol=1e-10)


def test_swaps_that_forget_the_temperature_are_caught(monkeypatch):
    from expectax.inference import _replica

    kernel = inference.replica_exchange(inference.gibbs(), [1.0, 0.3])
    right = _replica.ReplicaExchange._swapped
    monkeypatch.setattr(
        _replica.ReplicaExchange, "_swapped", lambda self, target, betas, z, c: right(self, target, 2 * betas, z, c)
    )
    with pytest.raises(AssertionError, match="does not leave"):
        inference.assert_invariant(kernel, FEW().given({"y": 1.7}))


def test_a_dropped_pseudo_prior_is_caught(monkeypatch):
    """Without the density of what is not made, a branch would weigh by the number of values that it leaves open."""
    from expectax.inference import _target

    kernel = inference.on("b", inference.gibbs())
    assert inference.assert_invariant(kernel, TARGETS["branch"]()) < 1e-12
    marginal = lambda: marginal_of_b(TARGETS["branch"]())  # noqa: E731
    by_hand = 0.35 * np.array([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3]]) * np.array([[0.2], [0.8]])
    by_hand = by_hand * np.exp(-0.5 * (1.2 - (np.arange(3) + np.array([[0.0], [2.0]]))) ** 2)
    other = 0.65 * np.array([0.7, 0.3]) * np.exp(-0.5 * (1.2 - np.array([0.5, 1.5])) ** 2)
    np.testing.assert_allclose(marginal(), by_hand.sum() / (by_hand.sum() + other.sum()), rtol=1e-10)
    monkeypatch.setattr(_target, "absent_log_density", lambda *_: 0.0)
    assert abs(marginal() - by_hand.sum() / (by_hand.sum() + other.sum())) > 0.01


def marginal_of_b(posterior):
    """Return P(b = 1) under the target that kernels see."""
    target = inference.Target(posterior)
    law = law_after(inference.gibbs(jointly=True), posterior, {"b": np.int32(0), "k": np.int32(0), "w": np.int32(0)})
    assert target.posterior is posterior
    return sum(p for (b, *_), p in law.items() if b == 1)
