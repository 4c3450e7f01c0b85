"""`marginalize_discrete` against enumeration in plain numpy, the forward recursion, and its own laws; float64, 1e-10."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

import expectax as ex
from exact_models import EXACT
from expectax import dist, inference
from expectax.ppl import AddressError, ControlFlowError
from helpers import count_compiles, hmm_log_evidence

KEY = jax.random.key(20261124)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731


@pytest.mark.parametrize("name", ["three_states", "mixture", "hmm"])
@pytest.mark.parametrize("i", range(3))
def test_the_density_is_the_evidence(name, i):
    case = EXACT[name]
    x, y = case.one(i)
    program = ex.marginalize_discrete(case.model(x))
    assert set(program.sites()) == {"y"}
    exact = case.log_evidence(x, y)
    close(program.assess({"y": y})[0], exact)
    trace, weight = program.generate(KEY, {"y": y})
    close([weight, trace.log_density, program.given({"y": y}).log_density({})], [exact] * 3)
    drawn, nothing = program.generate(KEY, {})
    assert nothing == 0.0
    close(drawn.log_density, program.assess(drawn.choices)[0])


# --- lanes, chains and a global choice at once, against enumeration ---------------------------------------------------

CENTRE, STAY = np.array([-1.0, 2.0]), np.array([[0.5, 0.5], [0.0, 1.0]])


@ex.model
def chains(centre):
    """A global choice; two chains in lanes; in each step two more choices in lanes; the last state is seen again."""
    g = ex.sample("g", dist.Categorical(probs=jnp.array([0.3, 0.7])))

    def chain(shift):
        def step(z, _):
            z = ex.sample("z", dist.Categorical(probs=jnp.asarray(STAY)[z]))

            def emit(_):
                w = ex.sample("w", dist.Bernoulli(jnp.array([0.2, 0.9])[z]))
                ex.sample("y", dist.Normal(centre[z] + w + g, 1.0))

            jax.vmap(emit)(jnp.arange(2))
            return z, None

        z, _ = lax.scan(step, 0, length=3)
        ex.sample("end", dist.Normal(centre[z] + shift, 1.0))

    jax.vmap(chain)(jnp.arange(2.0))


def chains_by_hand(centre, y, end):
    total = []
    for g in range(2):
        log_g = np.log([0.3, 0.7][g])
        for n in range(2):
            paths = []
            for path in itertools.product(range(2), repeat=3):
                weight, before = 1.0, 0
                for t, z in enumerate(path):
                    weight *= STAY[before, z]
                    before = z
                    for k in range(2):
                        p = [0.2, 0.9][z]
                        none, one = (stats.norm.pdf(y[t, n, k], centre[z] + w + g) for w in range(2))
                        weight *= (1 - p) * none + p * one
                paths.append(weight * stats.norm.pdf(end[n], centre[path[-1]] + n))
            log_g += np.log(sum(paths))
        total.append(log_g)
    return special.logsumexp(total)


def test_chains_in_lanes_with_a_global_choice():
    program = ex.marginalize_discrete(chains(jnp.asarray(CENTRE)))
    trace = program.simulate(KEY)
    y, end = np.asarray(trace["y"]), np.asarray(trace["end"])
    assert y.shape == (3, 2, 2) and set(trace.choices) == {"y", "end"}
    close(trace.log_density, chains_by_hand(CENTRE, y, end))


def test_the_gradient_is_right_also_with_impossible_transitions():
    """nan would come out of a log-sum-exp whose terms are all impossible, as in state 0 after state 1."""
    trace = ex.marginalize_discrete(chains(jnp.asarray(CENTRE))).simulate(KEY)
    y, end = np.asarray(trace["y"]), np.asarray(trace["end"])
    found = jax.grad(lambda c: ex.marginalize_discrete(chains(c)).assess(trace.choices)[0])(jnp.asarray(CENTRE))
    for j, step in enumerate(np.eye(2) * 1e-5):
        slope = (chains_by_hand(CENTRE + step, y, end) - chains_by_hand(CENTRE - step, y, end)) / 2e-5
        np.testing.assert_allclose(found[j], slope, rtol=1e-7)


@ex.model
def chain_of(transition, length):
    def step(z, _):
        z = ex.sample("z", dist.Categorical(probs=transition[z]))
        ex.sample("y", dist.Normal(jnp.arange(4.0)[z], 1.0))
        return z, None

    lax.scan(step, 1, length=length)


def test_a_long_chain_costs_the_forward_recursion():
    """4^500 paths: only the recursion can do it. The program does not grow with the length."""
    transition = np.random.default_rng(1).dirichlet(np.ones(4), size=4)
    y = np.random.default_rng(2).normal(size=500)
    exact = hmm_log_evidence(transition[1], transition, stats.norm.logpdf(y[:, None], np.arange(4.0), 1.0))
    program = ex.marginalize_discrete(chain_of(jnp.asarray(transition), 500))
    close(program.assess({"y": jnp.asarray(y)})[0], exact)
    sizes = [
        len(
            str(
                jax.make_jaxpr(lambda y, t=t: ex.marginalize_discrete(chain_of(transition, t)).assess({"y": y})[0])(
                    y[:t]
                )
            )
        )
        for t in (5, 400)
    ]
    assert sizes[1] < sizes[0] + 200


def test_lanes_cost_their_number_of_values_each():
    """5^300 assignments: only the product over lanes can do it; a batch of the distribution counts as lanes."""
    y = np.random.default_rng(3).normal(size=300)
    probs = np.random.default_rng(4).dirichlet(np.ones(5))
    exact = np.log(stats.norm.pdf(y[:, None], np.arange(5.0), 1.0) @ probs).sum()

    @ex.model
    def lanes():
        k = ex.sample("k", dist.Categorical(probs=jnp.asarray(probs)).expand([300]))
        ex.sample("y", dist.Normal(1.0 * k, 1.0))

    @ex.model
    def mapped():
        def one(_):
            k = ex.sample("k", dist.Categorical(probs=jnp.asarray(probs)))
            ex.sample("y", dist.Normal(jnp.arange(5.0)[k], 1.0))

        jax.vmap(one)(jnp.arange(300))

    for model in (lanes, mapped):
        close(ex.marginalize_discrete(model()).assess({"y": jnp.asarray(y)})[0], exact)


def test_branches_chosen_by_a_summed_choice():
    """A mixture written as a switch: the site stands in all branches, so it is always made."""

    @ex.model
    def switched(m):
        def point(_):
            k = ex.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
            kinds = (lambda: dist.Normal(m, 1.0), lambda: dist.Laplace(m, 2.0), lambda: dist.Cauchy(0.0, 1.0))
            ex.switch(k, [lambda d=d: ex.sample("y", d()) for d in kinds])

        jax.vmap(point)(jnp.arange(4))

    y = np.array([0.3, -2.0, 5.0, 0.0])
    each = 0.2 * stats.norm.pdf(y, 0.7) + 0.5 * stats.laplace.pdf(y, 0.7, 2.0) + 0.3 * stats.cauchy.pdf(y)
    program = ex.marginalize_discrete(switched(0.7))
    close(program.assess({"y": jnp.asarray(y)})[0], np.log(each).sum())
    assert program.simulate(KEY).present == {}


def test_within_lanes_and_steps_of_another_program():
    case = EXACT["three_states"]
    x, ys = case.one(0)[0], case.data[1]

    @ex.model
    def around():
        program = ex.marginalize_discrete(case.model(x))
        jax.vmap(lambda _: ex.sample("lane", program))(jnp.arange(3))
        lax.scan(lambda c, _: (c, ex.sample("step", program)), 0, length=3)

    total = sum(case.log_evidence(x, y) for y in ys)
    close(around().assess({"lane": {"y": jnp.asarray(ys)}, "step": {"y": jnp.asarray(ys)}})[0], 2 * total)


# --- the laws of traces, with choices left over ----------------------------------------------------------------------


@ex.model
def left_over(p):
    """`k` is summed out; `a` and `b` stay and have finite supports, so that laws can be enumerated."""
    a = ex.sample("a", dist.Bernoulli(p))
    k = ex.sample("k", dist.Categorical(probs=jnp.array([[0.2, 0.8], [0.6, 0.4]])[a]))
    b = ex.sample("b", dist.Bernoulli(jnp.array([0.1, 0.7])[k]))
    ex.observe("data", dist.Normal(1.0 * k + b, 1.0), 0.4)
    ex.deterministic("sum", a + k)
    return a, k + b


STATES = [{"a": jnp.asarray(a), "b": jnp.asarray(b)} for a in range(2) for b in range(2)]


def left_over_by_hand(z, p=0.3):
    a, b = int(z["a"]), int(z["b"])
    terms = [
        [[0.2, 0.8], [0.6, 0.4]][a][k] * [[0.9, 0.1], [0.3, 0.7]][k][b] * stats.norm.pdf(0.4, k + b) for k in range(2)
    ]
    return np.log([1 - p, p][a]) + np.log(sum(terms))


@pytest.mark.slow
def test_densities_weights_and_what_is_lost():
    program = ex.marginalize_discrete(left_over(0.3), "k")
    for z in STATES:
        close(program.assess(z)[0], left_over_by_hand(z))
    trace = program.simulate(KEY)
    assert trace.retval[1] is None and trace.retval[0] == trace["a"] and trace.deterministic == {}
    evidence = np.log(sum(np.exp(left_over_by_hand(z)) for z in STATES))
    for given in ({}, {"a": 1}, {"b": 0}):
        keys = jax.random.split(KEY, 400)
        traces, weights = jax.vmap(lambda k, given=given: program.generate(k, given))(keys)
        flat = np.stack([traces["a"], traces["b"]], 1)
        _, first = np.unique(flat, axis=0, return_index=True)
        density = np.asarray(traces.log_density)[first]
        q = np.exp(density - np.asarray(weights)[first])
        close(q.sum(), 1.0)
        wanted = [z for z in STATES if all(int(z[k]) == v for k, v in given.items())]
        close(q @ np.exp(np.asarray(weights)[first]), sum(np.exp(left_over_by_hand(z)) for z in wanted))
    assert evidence < 0


@pytest.mark.slow
def test_update_and_regenerate():
    program = ex.marginalize_discrete(left_over(0.3), "k")
    trace = program.simulate(KEY)
    there, weight, discard = trace.update(KEY, {"a": 1 - trace["a"]}, left_over(0.6), ("k",), (False, True), ("sum",))
    back, opposite, _ = there.update(KEY, discard, left_over(0.3), ("k",), (False, True), ("sum",))
    close(weight, left_over_by_hand(there.choices, 0.6) - left_over_by_hand(trace.choices))
    close([weight + opposite, back.log_density], [0.0, trace.log_density])
    log_p = np.array([left_over_by_hand(z) for z in STATES])
    posterior = np.exp(log_p - special.logsumexp(log_p))
    for selection in (["a"], ["b"], ["a", "b"]):
        kernel = np.zeros((4, 4))
        for i, z in enumerate(STATES):
            start, _ = program.generate(KEY, z)
            new, w = jax.vmap(lambda k, s=start, sel=selection: s.regenerate(k, sel))(jax.random.split(KEY, 500))
            to = np.asarray(2 * new["a"] + new["b"])
            states, first = np.unique(to, return_index=True)
            # the proposal's probability is what makes p(new) q(old | new) / (p(old) q(new | old)) = e^w; both ways known
            for j, at in zip(states, first, strict=True):
                kernel[i, j] = np.asarray(w)[at]
        for i, j in itertools.product(range(4), repeat=2):
            close(kernel[i, j], -kernel[j, i])
    assert posterior.sum() == pytest.approx(1.0)


# --- inference on what is left ---------------------------------------------------------------------------------------


@ex.model
def mixture_of(y):
    spread = ex.sample("spread", dist.HalfNormal(2.0))
    centre = ex.sample("centre", dist.Normal(jnp.zeros(2), 3.0))

    def point(value):
        k = ex.sample("k", dist.Bernoulli(0.3))
        ex.observe("y", dist.Normal(centre[k], spread), value)

    jax.vmap(point)(y)


def test_unconstrained_density_and_nuts_ready_gradients():
    y = jnp.array([-1.0, 0.0, 2.0, 2.5])
    posterior = ex.marginalize_discrete(mixture_of(y)).given({})
    z = {"spread": jnp.asarray(0.8), "centre": jnp.array([-0.5, 2.0])}
    each = 0.7 * stats.norm.pdf(y, -0.5, 0.8) + 0.3 * stats.norm.pdf(y, 2.0, 0.8)
    prior = stats.halfnorm.logpdf(0.8, scale=2.0) + stats.norm.logpdf([-0.5, 2.0], 0, 3.0).sum()
    close(posterior.log_density(z), prior + np.log(each).sum())
    u = posterior.unconstrain(z)
    close(posterior.unconstrained_log_density(u), prior + np.log(each).sum() + np.log(0.8))
    jax.tree.map(close, posterior.constrain(u), z)
    gradient = jax.grad(posterior.unconstrained_log_density)(u)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_importance_sampling_is_exact_where_nothing_is_left_and_compiles_once():
    case = EXACT["hmm"]

    def run(i, x, y):
        program = ex.marginalize_discrete(case.model(jnp.asarray(x)))
        return inference.importance(program.given({"y": y}), key=jax.random.key(i), num_particles=3).log_evidence

    close(run(0, *case.one(0)), case.log_evidence(*case.one(0)))
    with count_compiles() as compiles:
        found = run(1, *case.one(1))
    close(found, case.log_evidence(*case.one(1)))
    assert not compiles


# --- what is refused -------------------------------------------------------------------------------------------------


def coins(use):
    def model():
        k = jax.vmap(lambda _: ex.sample("k", dist.Bernoulli(0.5)))(jnp.arange(3))
        use(k)

    return ex.model(model)()


def second_order():
    def step(carry, _):
        z, before = carry
        new = ex.sample("k", dist.Bernoulli(0.3 + 0.2 * z + 0.1 * before))
        ex.sample("y", dist.Normal(1.0 * new, 1.0))
        return (new, z), None

    lax.scan(step, (0, 0), length=4)


def outside_the_scan():
    _, k = lax.scan(lambda c, _: (c, ex.sample("k", dist.Bernoulli(0.5))), 0, length=3)
    ex.sample("y", dist.Normal(1.0 * k, 1.0))


def decides():
    k = ex.sample("k", dist.Bernoulli(0.5))
    ex.cond(k == 1, lambda: ex.sample("y", dist.Normal(0.0, 1.0)), lambda: 0.0)


def moving_support():
    k = ex.sample("k", dist.Bernoulli(0.5))
    ex.sample("y", dist.Uniform(0.0, 1.0 + k))


REFUSED = {
    "lanes added up": (lambda: coins(lambda k: ex.sample("y", dist.Normal(1.0 * k.sum(), 1.0))), {"y": 0.5}, "several"),
    "a second-order chain": (ex.model(second_order), {"y": jnp.zeros(4)}, "first order"),
    "steps seen after the scan": (ex.model(outside_the_scan), {"y": jnp.zeros(3)}, "inside the scan"),
    "a choice that decides about another": (ex.model(decides), {"y": 0.5}, "whether 'y' is made"),
    "a scaled site": (
        lambda: ex.scale(coins(lambda k: ex.sample("y", dist.Normal(1.0 * k, 1.0))), 2.0, "y"),
        {"y": jnp.zeros(3)},
        "scaled",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    program, choices, message = REFUSED[name]
    with pytest.raises(ControlFlowError, match=message) as caught:
        ex.marginalize_discrete(program()).assess(choices)
    assert "'" in str(caught.value) or "[" in str(caught.value)


def test_other_refusals():
    program = ex.marginalize_discrete(left_over(0.3), "k")
    with pytest.raises(ControlFlowError, match="no densities or draws of their own"):
        program.given({"b": 1}).site_log_densities({"a": 1})
    with pytest.raises(AddressError, match="Did you mean 'k'"):
        ex.marginalize_discrete(left_over(0.3), "kk")
    with pytest.raises(ControlFlowError, match="no finite support"):
        ex.marginalize_discrete(EXACT["conjugate"].model(jnp.ones(2)), "mu")
    with pytest.raises(ControlFlowError, match="the support of 'y'"):
        posterior = ex.marginalize_discrete(ex.model(moving_support)()).given({})
        posterior.unconstrained_log_density({"y": 0.0})
