"""The laws of traces, over models with exact answers, plain and under JAX's transformations.

Every model is run once in every context; laws are functions of what came out. A law that fails names the law, the
model and the context.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from exact_models import EXACT, Exact
from expectax import dist, ppl
from helpers import enumerate_choices, gaussian_log_integral, two_stage_z

KEY = jax.random.key(20260801)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def everything(case: Exact, key: Any, x: Any, y: Any) -> dict[str, Any]:
    """Run every method that the laws speak about on one data set."""
    program = case.model(x)
    simulated = program.simulate(key)
    unconstrained, no_weight = program.generate(key, {})
    generated, weight = program.generate(key, {"y": y})
    conditioned, same_weight = program.given({"y": y}).generate(key)
    replayed, full_weight = program.generate(key, generated.choices)
    density, retval = program.assess(generated.choices)
    posterior = program.given({"y": y})
    latents = posterior.latents(generated.choices)
    runs = {"simulated": simulated, "unconstrained": unconstrained, "generated": generated, "conditioned": conditioned}
    return {name: (t.choices, t.retval, t.log_density) for name, t in (runs | {"replayed": replayed}).items()} | {
        "no_weight": no_weight,
        "weight": weight,
        "same_weight": same_weight,
        "full_weight": full_weight,
        "assessed": (density, retval),
        "posterior_density": posterior.log_density(latents),
    }


# --- contexts: run f on rows (key, x, y); each yields the rows' outputs stacked ------------------------------------

ROWS = {  # context: (which key, which data set) of each row
    "plain": ((1,), (1,)),  # op by op, slow
    "jit": ((0, 1, 2), (0, 1, 2)),
    "vmap": ((0, 1, 2), (0, 1, 2)),
    "vmap over keys": ((0, 1, 2), (1, 1, 1)),
    "vmap over data": ((2, 2, 2), (0, 1, 2)),
    "scan": ((0, 1, 2), (0, 1, 2)),
}


def run(f: Any, context: str, keys: Any, xs: Any, ys: Any) -> Any:
    match context:
        case "plain":
            return _stack([f(*row) for row in zip(keys, xs, ys, strict=True)])
        case "jit":
            return _stack([jax.jit(f)(*row) for row in zip(keys, xs, ys, strict=True)])
        case "vmap":
            return jax.jit(jax.vmap(f))(keys, xs, ys)
        case "vmap over keys":
            return jax.jit(jax.vmap(f, in_axes=(0, None, None)))(keys, xs[0], ys[0])
        case "vmap over data":
            return jax.jit(jax.vmap(f, in_axes=(None, 0, 0)))(keys[0], xs, ys)
        case "scan":
            return jax.jit(lambda rows: lax.scan(lambda carry, row: (carry, f(*row)), None, rows)[1])((keys, xs, ys))
    raise ValueError(context)


def _stack(trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@functools.cache
def methods(name: str) -> Any:
    """Return `everything` of one model; one function, so that it is compiled once."""
    return functools.partial(everything, EXACT[name])


@functools.cache
def outputs(name: str, context: str) -> list[tuple[Any, Any, Any]]:
    """Return (x, y, outputs) of each row, in numpy."""
    case, (which_keys, which_data) = EXACT[name], ROWS[context]
    keys = jax.random.split(KEY, 3)[np.array(which_keys)]
    xs, ys = (part[np.array(which_data)] for part in case.data)
    out = run(methods(name), context, keys, jnp.asarray(xs), jnp.asarray(ys))
    return [
        (x, y, jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], out))
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]


# --- laws ---------------------------------------------------------------------------------------------------------


def log_joint(case: Exact, choices: Any, x: Any) -> float:
    return case.log_prior(choices, x) + case.log_likelihood(choices, x, choices["y"])


def trace_density_is_exact(case, x, y, out):
    """Every trace's log_density is log p at its choices, and its retval is the function of them that it should be."""
    for name in ("simulated", "unconstrained", "generated", "conditioned", "replayed"):
        choices, retval, log_density = out[name]
        close(log_density, log_joint(case, choices, x))
        close(retval, case.retval(choices))


def assess_agrees(case, x, y, out):
    """`assess` at a trace's choices gives its log_density and retval, and so does the posterior at its latents."""
    _, retval, log_density = out["generated"]
    close(out["assessed"], (log_density, retval))
    close(out["posterior_density"], log_density)


def no_constraints_weigh_nothing(case, x, y, out):
    """With no constraints generate is simulate, with weight 0."""
    assert out["no_weight"] == 0.0
    close(out["unconstrained"], out["simulated"])


def all_constraints_weigh_the_density(case, x, y, out):
    """With every choice given the weight is log p, and the choices are kept."""
    close(out["full_weight"], out["generated"][2])
    close(out["replayed"][0], out["generated"][0])


def weight_is_the_likelihood(case, x, y, out):
    """With y given, the weight is log p(y | z): the joint less the prior of what was drawn. z is not always the same."""
    choices = out["generated"][0]
    np.testing.assert_array_equal(choices["y"], y)
    close(out["weight"], case.log_likelihood(choices, x, y))
    close(out["conditioned"], out["generated"])
    close(out["same_weight"], out["weight"])


LAWS = [
    trace_density_is_exact,
    assess_agrees,
    no_constraints_weigh_nothing,
    all_constraints_weigh_the_density,
    weight_is_the_likelihood,
]


def close(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), got, expected)


@pytest.mark.parametrize("context", ROWS)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, name, context):
    for x, y, out in outputs(name, context):
        law(EXACT[name], x, y, out)


@pytest.mark.parametrize("context", [c for c in ROWS if c != "jit"])
@pytest.mark.parametrize("name", EXACT)
def test_a_transformation_equals_the_python_loop(name, context):
    """Draw for draw: keys and data of a row give the same choices and weights however the row is run."""
    case, (which_keys, which_data) = EXACT[name], ROWS[context]
    keys = jax.random.split(KEY, 3)
    single = jax.jit(methods(name))
    for i, (k, d) in enumerate(zip(which_keys, which_data, strict=True)):
        close(outputs(name, context)[i][2], jax.tree.map(np.asarray, single(keys[k], *case.one(d))))


# --- evidence -------------------------------------------------------------------------------------------------------

FINITE = [name for name, case in EXACT.items() if case.states]
GAUSSIAN = [name for name, case in EXACT.items() if case.moments]


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("name", FINITE)
def test_posterior_density_sums_to_the_evidence(name, i):
    case = EXACT[name]
    posterior = case.posterior(*case.one(i))
    every = enumerate_choices(posterior.latent_shapes, case.states)
    density = np.exp(jax.jit(jax.vmap(posterior.log_density))(every))
    np.testing.assert_allclose(density.sum(), np.exp(case.log_evidence(*case.one(i))), rtol=1e-10)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("name", GAUSSIAN)
def test_posterior_density_integrates_to_the_evidence(name, i):
    case = EXACT[name]
    posterior = case.posterior(*case.one(i))
    flat, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape), posterior.latent_shapes))
    log_integral = gaussian_log_integral(lambda z: posterior.log_density(unravel(z)), flat.size)
    np.testing.assert_allclose(log_integral, case.log_evidence(*case.one(i)), rtol=1e-10)


@functools.cache
def weighted_latents(name: str) -> Any:
    """Return a sampler (key, n) -> (latents, weights, log densities) of `generate` with the first y given."""
    posterior = EXACT[name].posterior(*EXACT[name].one(0))

    @functools.partial(jax.jit, static_argnums=1)
    def sampler(key, n):
        trace, weight = jax.vmap(posterior.generate)(jax.random.split(key, n))
        return posterior.latents(trace.choices), weight, trace.log_density

    return sampler


@pytest.mark.parametrize("name", FINITE)
def test_mean_weight_is_the_evidence_exactly(name):
    r"""E[exp w] = sum_z q(z) exp(w(z)) over the drawn z, with q(z) = exp(log_density - w): 1e-10."""
    case = EXACT[name]
    latents, weight, log_density = weighted_latents(name)(KEY, 4096)
    flat = np.concatenate([np.asarray(leaf).reshape(4096, -1) for leaf in jax.tree.leaves(latents)], axis=1)
    distinct, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    weight, log_density = np.asarray(weight), np.asarray(log_density)
    np.testing.assert_allclose(weight, weight[first][inverse.ravel()], rtol=1e-10)  # the weight is a function of z
    q = np.exp(log_density - weight)[first]
    assert len(distinct) == np.prod([n ** np.size(leaf[0]) for n, leaf in _zip_leaves(case.states, latents)])
    np.testing.assert_allclose(q.sum(), 1.0, rtol=1e-10)
    np.testing.assert_allclose(q @ np.exp(weight[first]), np.exp(case.log_evidence(*case.one(0))), rtol=1e-10)


def _zip_leaves(a: Any, b: Any) -> Any:
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize("name", EXACT)
def test_mean_weight_is_the_evidence(name):
    """E[exp w] = p(y), by a z-test on Z, for which the estimate is unbiased (log Z is not)."""
    case = EXACT[name]
    sampler = weighted_latents(name)
    two_stage_z(lambda key, n: jnp.exp(sampler(key, n)[1]), np.exp(case.log_evidence(*case.one(0))), KEY, 20_000)


@pytest.mark.parametrize("name", FINITE)
def test_draws_have_the_prior_law(name):
    """The frequency of each joint assignment: sees sites, lanes or time steps that share noise."""
    case = EXACT[name]
    x, _ = case.one(0)
    sampler = weighted_latents(name)
    shapes = case.posterior(*case.one(0)).latent_shapes
    every = enumerate_choices(shapes, case.states)
    table = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(every)], axis=1)
    prior = np.array([np.exp(case.log_prior(jax.tree.map(lambda a, i=i: a[i], every), x)) for i in range(len(table))])

    def indicators(key: Any, n: int) -> Any:
        latents = jax.tree.leaves(sampler(key, n)[0])
        flat = jnp.concatenate([leaf.reshape(n, -1) for leaf in latents], axis=1)
        return (flat[:, None, :] == table).all(-1)

    two_stage_z(indicators, prior, KEY, 20_000)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_draws_have_the_prior_moments(name):
    """Mean and second moments of the whole path: sees time steps or components that share noise."""
    case = EXACT[name]
    mean, cov = case.moments(case.one(0)[0])
    sampler = weighted_latents(name)

    def moments(key: Any, n: int) -> Any:
        z = jnp.concatenate([leaf.reshape(n, -1) for leaf in jax.tree.leaves(sampler(key, n)[0])], axis=1) - mean
        return jnp.concatenate([z[:, None, :], z[:, :, None] * z[:, None, :]], axis=1)

    two_stage_z(moments, np.concatenate([0 * mean[None], cov]), KEY, 20_000)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_no_key_is_used_twice(name):
    case = EXACT[name]
    with jax.debug_key_reuse(True):
        jax.jit(lambda key: case.model(case.one(0)[0]).simulate(key).choices)(jax.random.key(1))


# --- programs under transformations ---------------------------------------------------------------------------------------


def test_methods_can_be_jitted():
    case = EXACT["conjugate"]
    x, y = case.one(0)
    jax.jit(case.posterior(x, y).generate)(KEY)
    jax.jit(case.model(x).simulate)(KEY)


@pytest.mark.parametrize(
    "transform", [jax.jit, lambda f: lambda key: jax.tree.map(lambda a: a[0], jax.vmap(f)(key[None]))]
)
def test_a_trace_keeps_the_fixed_arguments_of_its_program(transform):
    """An integer argument is a fixed part of the program: the program of a trace can be run again."""
    vector = ppl.model(lambda n: ppl.sample("x", dist.Normal(jnp.zeros(n), 1.0)))
    trace = transform(lambda key: vector(3).simulate(key))(KEY)
    assert trace.args == (3,)
    close(trace.program.assess(trace.choices)[0], trace.log_density)
