"""The laws of `update`, `regenerate` and `project` on exact models, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from exact_models import EXACT
from expectax import dist
from expectax.ppl import AddressError, ShapeError

KEY = jax.random.key(20261123)
KEYS = jax.random.split(KEY, 3)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def latents(trace):
    return sorted(a for a in trace.choices if a != "y")


def values(trace):
    return jax.tree.map(np.asarray, {a: trace[a] for a in latents(trace)})


def in_scan(function):
    return lambda *args: jax.tree.map(lambda v: v[0], lax.scan(lambda c, _: (c, function(*args)), 0, length=1)[1])


def in_vmap(function):
    return lambda *args: jax.tree.map(
        lambda v: v[1], jax.vmap(function)(*jax.tree.map(lambda a: jnp.stack([a, a]), args))
    )


AROUND = {"jit": jax.jit, "vmap": lambda f: jax.jit(in_vmap(f)), "scan": lambda f: jax.jit(in_scan(f))}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXACT)
def test_update_there_and_back_cancels(name, around):
    """Also with changed arguments; the weight is the difference of the exact log densities."""
    case = EXACT[name]
    (x0, _), (x1, y1) = case.one(0), case.one(1)

    def there_and_back(key, x0, x1, y1):
        trace = case.model(x0).simulate(key)
        there, weight, discard = trace.update(key, {"y": y1}, x1)
        back, opposite, undone = there.update(key, discard, x0)
        return trace, there, weight, back, opposite, undone

    arguments = (KEYS[0], *(jnp.asarray(v) for v in (x0, x1, y1)))
    trace, there, weight, back, opposite, undone = AROUND[around](there_and_back)(*arguments)
    np.testing.assert_allclose(weight + opposite, 0.0, atol=1e-10)
    np.testing.assert_allclose(weight, there.log_density - trace.log_density, atol=1e-10)
    np.testing.assert_allclose(back.log_density, trace.log_density, atol=1e-10)
    np.testing.assert_array_equal(undone["y"], y1)
    jax.tree.map(np.testing.assert_array_equal, back.choices, trace.choices)
    z = values(trace)
    exact = case.log_prior(z, x1) + case.log_likelihood(z, x1, y1)
    np.testing.assert_allclose(there.log_density, exact, atol=1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_project_splits_the_log_density(name):
    case = EXACT[name]
    x, _ = case.one(2)
    trace = case.model(x).simulate(KEYS[1])
    z = values(trace)
    np.testing.assert_allclose(trace.project(["y"]), case.log_likelihood(z, x, np.asarray(trace["y"])), atol=1e-10)
    np.testing.assert_allclose(trace.project(latents(trace)), case.log_prior(z, x), atol=1e-10)
    assert trace.project([]) == 0.0


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXACT)
def test_regenerate_of_all_latents_is_weighed_by_the_likelihood(name, around):
    """log p(t') q(t | t') / (p(t) q(t' | t)) leaves the observed site: independent of how the prior is written."""
    case = EXACT[name]
    x, y = case.one(0)

    def move(key, again, x, y):
        trace, _ = case.model(x).generate(key, {"y": y})
        return trace, *trace.regenerate(again, latents(trace))

    trace, new, weight = AROUND[around](move)(KEYS[0], KEYS[1], jnp.asarray(x), jnp.asarray(y))
    old_z, new_z = values(trace), values(new)
    np.testing.assert_allclose(weight, case.log_likelihood(new_z, x, y) - case.log_likelihood(old_z, x, y), atol=1e-10)
    np.testing.assert_array_equal(new["y"], y)


# --- regenerate makes Metropolis-Hastings exact: the transition matrix keeps the posterior, as a matrix identity ----


@ex.model
def chain():
    """Three sites, each seen by the next; one of them in a nested model, one in a scan."""
    a = ex.sample("a", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
    b = ex.sample("sub", child(a))

    def step(c, _):
        c = ex.sample("c", dist.Categorical(logits=jnp.array([[0.0, 1.0], [1.0, -1.0]])[c]))
        return c, None

    c, _ = lax.scan(step, b, length=2)
    ex.sample("y", dist.Normal(1.0 * c + a, 0.7))


@ex.model
def child(a):
    return ex.sample("b", dist.Bernoulli(jnp.array([0.1, 0.6, 0.9])[a]))


STATES = [(a, b, c, d) for a in range(3) for b in range(2) for c in range(2) for d in range(2)]


def choices_of(state):
    a, b, c, d = state
    return {"a": jnp.asarray(a), "sub": {"b": jnp.asarray(b)}, "c": jnp.asarray([c, d]), "y": jnp.asarray(0.8)}


@pytest.mark.parametrize(
    "selection",
    [
        ["sub/b", "c"],
        *(pytest.param(s, marks=pytest.mark.slow) for s in (["a"], ["sub"], ["c"], ["a", "c"], ["a", "sub", "c"])),
    ],
)
def test_metropolis_hastings_with_regenerate_keeps_the_posterior(selection):
    program = chain()
    log_p = np.array([program.assess(choices_of(s))[0] for s in STATES])
    posterior = np.exp(log_p - np.logaddexp.reduce(log_p))
    traces = jax.vmap(lambda z: program.generate(KEY, z)[0])(
        jax.tree.map(lambda *v: jnp.stack(v), *map(choices_of, STATES))
    )
    keys = jax.random.split(KEY, 4000)

    @jax.jit
    def move(trace):
        new, weight = jax.vmap(lambda k: trace.regenerate(k, selection))(keys)
        return new.choices, jax.vmap(lambda t: t.project(selection))(new), weight

    kernel = np.zeros((len(STATES), len(STATES)))
    for i in range(len(STATES)):
        new, drawn, weights = jax.tree.map(np.asarray, move(jax.tree.map(lambda v, i=i: v[i], traces)))
        table = np.column_stack([new["a"], new["sub"]["b"], new["c"]])
        states, first = np.unique(table, axis=0, return_index=True)  # every reachable state
        proposed, accepted = np.exp(drawn[first]), np.minimum(1.0, np.exp(weights[first]))
        np.testing.assert_allclose(proposed.sum(), 1.0, atol=1e-10)  # none was missed
        for state, probability in zip(states, proposed * accepted, strict=True):
            kernel[i, STATES.index(tuple(map(int, state)))] += probability
        kernel[i, i] += 1.0 - kernel[i].sum()
    np.testing.assert_allclose(posterior @ kernel, posterior, atol=1e-10)


def test_a_changed_shape_draws_anew():
    """A site whose shape changes with the arguments has no old value: it is drawn, and its density leaves the weight."""

    @ex.model
    def lanes(x):
        a = ex.sample("a", dist.Normal(0.0, 1.0))
        jax.vmap(lambda m: ex.sample("b", dist.Normal(m + a, 1.0)))(x)

    trace = lanes(jnp.zeros(2)).simulate(KEYS[0])
    new, weight, discard = trace.update(KEYS[1], {}, jnp.ones(3))
    np.testing.assert_array_equal(discard["b"], trace["b"])
    assert new["b"].shape == (3,) and new["a"] == trace["a"]
    np.testing.assert_allclose(weight, new.project(["a"]) - trace.log_density, atol=1e-10)


def test_errors():
    trace = chain().simulate(KEY)
    with pytest.raises(AddressError, match=r"regenerate at .*test_trace_edits.*no site 'aa'.*Did you mean 'a'"):
        trace.regenerate(KEY, ["aa"])
    with pytest.raises(AddressError, match=r"project at .*test_trace_edits.*no site 'sub/c'"):
        trace.project("sub/c")
    with pytest.raises(ShapeError, match=r"update at .*test_trace_edits.*'c' has shape \(2,\).*\(3,\)"):
        trace.update(KEY, {"c": jnp.zeros(3, int)})
