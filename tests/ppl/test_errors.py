"""Malformed programs and inputs: each raises the right error, and the message says where, what and what to do.

A case is a function that must raise. Its message must hold the fragments and, unless `place=False`, this file's name
with the number of a line of the case, or of a model or function that the case names.
"""

import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from expectax import dist, ppl
from expectax.ppl import (
    AddressError,
    ControlFlowError,
    DistributionError,
    OutsideModelError,
    ShapeError,
    SupportError,
)

KEY = jax.random.key(0)
UNIT = dist.Normal(0.0, 1.0)
HEIGHT = jnp.zeros(4)


class Case(NamedTuple):
    error: type[Exception]
    fragments: tuple[str, ...]
    place: bool
    function: Callable[[], Any]


CASES: list[Any] = []


def raises(name: str, error: type[Exception], *fragments: str, place: bool = True) -> Any:
    """Register a case."""

    def register(function: Callable[[], Any]) -> None:
        CASES.append(pytest.param(Case(error, fragments, place, function), id=name))

    return register


def simulate(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as a model."""
    return ppl.model(function)(*args).simulate(KEY)


@ppl.model
def regression():
    slope = ppl.sample("slope", UNIT)
    ppl.sample("height", dist.Normal(slope * jnp.arange(4.0), 1.0))
    ppl.sample("noise", dist.Gamma(2.0, 1.0))


@ppl.model
def nested():
    ppl.sample("line", regression())
    jax.vmap(lambda _: lax.scan(lambda c, _: (ppl.sample("walk", UNIT), None), 0.0, None, length=5))(jnp.zeros(2))


@ppl.model
def coins():
    ppl.sample("heads", dist.Bernoulli(0.5).expand([3]))


LIST: Any = [0.0]
THREE: Any = 3
FULL = {"slope": 0.5, "height": HEIGHT, "noise": 1.0}


# --- addresses of values ---------------------------------------------------------------------------------------------

raises("given, misspelled", AddressError, "given", "no site 'hieght'", "Did you mean 'height'?")(
    lambda: regression().given({"hieght": HEIGHT})
)
raises("given, misspelled in a nested model", AddressError, "no site 'line/Slope'", "Did you mean 'line/slope'?")(
    lambda: nested().given({"line": {"Slope": 0.0}})
)
raises("given, a value for a nested model", AddressError, "'line' is a nested model", "'slope', 'height', 'noise'")(
    lambda: nested().given({"line": 0.0})
)
raises("given, like no other", AddressError, "no site 'qqq'", "Known: 'height', 'noise', 'slope'")(
    lambda: regression().given({"qqq": 0.0})
)
raises("given, a list", AddressError, "expected a dict", "got list")(lambda: regression().given(LIST))
raises("assess, one missing", AddressError, "assess", "no value for site 'noise'")(
    lambda: regression().assess({"slope": 0.5, "height": HEIGHT})
)
raises("assess, all missing", AddressError, "no value for site 'slope'", "Missing: 'slope', 'height', 'noise'")(
    lambda: regression().assess({})
)
raises("assess, one too many", AddressError, "assess", "no site 'extra'")(
    lambda: regression().assess(FULL | {"extra": 0.0})
)
raises("generate, misspelled", AddressError, "generate", "no site 'hight'", "Did you mean 'height'?")(
    lambda: regression().generate(KEY, {"hight": HEIGHT})
)
raises("log_density, missing", AddressError, "log_density", "no value for site 'noise'")(
    lambda: regression().given({"height": HEIGHT}).log_density({"slope": 0.5})
)
raises("log_density, of what is observed", AddressError, "log_density", "'height'", "it is observed")(
    lambda: regression().given({"height": HEIGHT}).log_density(FULL)
)
raises("unconstrain, misspelled", AddressError, "unconstrain", "no site 'slop'", "Did you mean 'slope'?")(
    lambda: regression().given({"height": HEIGHT}).unconstrain({"slop": 0.5, "noise": 1.0})
)
raises("constrain, missing", AddressError, "no value for site 'noise'")(
    lambda: regression().given({"height": HEIGHT}).constrain({"slope": 0.5})
)
raises("unconstrained_log_density, too many", AddressError, "no site 'extra'")(
    lambda: regression().given({}).unconstrained_log_density(FULL | {"extra": 0.0})
)
raises("constrain, shape", ShapeError, "'slope'", "()", "(3,)", "constrain")(
    lambda: regression().given({}).constrain(FULL | {"slope": jnp.zeros(3)})
)

# --- shapes ------------------------------------------------------------------------------------------------------------

raises("a column for a row", ShapeError, "'height'", "(4,)", "(4, 1)", "Reshape")(
    lambda: regression().given({"height": HEIGHT[:, None]})
)
raises("a matrix for a row", ShapeError, "'height'", "(4,)", "(1, 4)", "Reshape")(
    lambda: regression().generate(KEY, {"height": HEIGHT[None]})
)
raises("a vector for a scalar", ShapeError, "'slope'", "()", "(1,)")(
    lambda: regression().assess(FULL | {"slope": jnp.zeros(1)})
)
raises("a scalar for a vector", ShapeError, "'height'", "(4,)", "()")(
    lambda: regression().assess(FULL | {"height": 0.0})
)
raises("lanes before time", ShapeError, "'walk'", "(5, 2)", "(2, 5)", "time axes come first")(
    lambda: nested().given({"walk": jnp.zeros((2, 5))})
)
raises("too few steps", ShapeError, "'walk'", "(5, 2)", "(4, 2)")(lambda: nested().given({"walk": jnp.zeros((4, 2))}))
raises("a batch of latents", ShapeError, "'slope'", "(3,)", "()")(
    lambda: regression().given({"height": HEIGHT}).log_density({"slope": jnp.zeros(3), "noise": jnp.ones(3)})
)

# --- values --------------------------------------------------------------------------------------------------------------

raises("outside the support", SupportError, "'noise'", "Positive", "-1.0")(lambda: regression().given({"noise": -1.0}))
raises("one entry outside the support", SupportError, "'heads'", "Boolean", "index (1,)", "is 2")(
    lambda: coins().given({"heads": jnp.array([0, 2, 1])})
)
raises("nan", SupportError, "'height'", "nan", "2 values")(
    lambda: regression().given({"height": jnp.array([0.0, jnp.nan, 1.0, jnp.nan])})
)
raises("floats for a discrete site", SupportError, "'heads'", "discrete", "float32", "not whole")(
    lambda: coins().given({"heads": jnp.array([0.0, 0.5, 1.0])})
)
raises("traced floats for a discrete site", SupportError, "'heads'", "discrete", "float32")(
    lambda: jax.jit(lambda heads: coins().assess({"heads": heads})[0])(jnp.ones(3))
)
raises("a complex number", SupportError, "'slope'", "complex")(lambda: regression().given({"slope": 1j}))
raises("no number", SupportError, "'slope'", "float32 numbers", "<U3")(lambda: regression().given({"slope": "0.5"}))

# --- addresses of sites ----------------------------------------------------------------------------------------------------

raises("twice", AddressError, "'x'", "twice")(
    lambda: simulate(lambda: (ppl.sample("x", UNIT), ppl.sample("x", UNIT)))
)  # fmt: skip
raises("twice through a jit", AddressError, "'x'", "twice")(
    lambda: simulate(lambda: [f() for f in [jax.jit(lambda: ppl.sample("x", UNIT))] * 2])
)
raises("in a scan and outside", AddressError, "'x'", "twice")(
    lambda: simulate(
        lambda: (
            ppl.sample("x", UNIT),
            lax.scan(lambda c, _: (ppl.sample("x", UNIT), None), 0.0, None, length=2),
        )
    )
)
raises("a site and a nested model", AddressError, "'x'", "twice")(
    lambda: simulate(lambda: (ppl.sample("x", UNIT), ppl.sample("x", regression())))
)
raises("twice in a nested model", AddressError, "'slope'", "twice")(
    lambda: simulate(lambda: ppl.sample("sub", ppl.model(lambda: [regression.function() for _ in "ab"])()))
)
raises("a number as address", AddressError, "3", "non-empty string")(lambda: simulate(lambda: ppl.sample(THREE, UNIT)))
raises("an empty address", AddressError, "''", "non-empty string")(lambda: simulate(lambda: ppl.sample("", UNIT)))
raises("a slash", AddressError, "'a/b'", "without '/'")(lambda: simulate(lambda: ppl.sample("a/b", UNIT)))

# --- distributions ------------------------------------------------------------------------------------------------------------

raises("a number as distribution", DistributionError, "'x'", "float", "dist.Normal(...)")(
    lambda: simulate(lambda: ppl.sample("x", 1.0))
)
raises("a model without arguments", DistributionError, "'x'", "Model", "submodel(arguments)")(
    lambda: simulate(lambda: ppl.sample("x", regression))
)
raises("a negative scale", ValueError, "Normal", "invalid scale", place=False)(
    lambda: simulate(lambda: ppl.sample("x", dist.Normal(0.0, -1.0)))
)

raises("an improper distribution drawn", DistributionError, "'x'", "ImproperUniform", "cannot be drawn from")(
    lambda: simulate(lambda: ppl.sample("x", dist.ImproperUniform(dist.constraints.real, (), ())))
)

# --- control flow ---------------------------------------------------------------------------------------------------------------

raises("while_loop", ControlFlowError, "'x'", "'while'", "lax.scan")(
    lambda: simulate(lambda: lax.while_loop(lambda c: c < 3, lambda c: ppl.sample("x", dist.Normal(c, 1.0)), 0.0))
)
raises("fori_loop with a traced bound", ControlFlowError, "'x'", "'while'", "lax.scan")(
    lambda: simulate(lambda n: lax.fori_loop(0, n, lambda i, c: ppl.sample("x", UNIT), 0.0), jnp.asarray(3))
)


@jax.custom_jvp
def with_a_rule(loc):
    return ppl.sample("x", dist.Normal(loc, 1.0))


with_a_rule.defjvp(lambda primals, tangents: (with_a_rule(*primals), tangents[0]))


raises("the derivative of custom_jvp", ControlFlowError, "custom_jvp", "derivative")(
    lambda: jax.grad(lambda loc: ppl.model(lambda loc: with_a_rule(loc))(loc).assess({"x": 1.0})[0])(0.0)
)
raises("grad through a site", ControlFlowError, "'x'", "derivative", "vi.value_and_grad")(
    lambda: simulate(lambda: jax.grad(lambda loc: ppl.sample("x", dist.Normal(loc, 1.0)))(0.0))
)

# --- outside a model -------------------------------------------------------------------------------------------------------------

raises("outside", OutsideModelError, "'x'", "expectax.model")(lambda: ppl.sample("x", UNIT))
raises("outside, in jit", OutsideModelError, "'x'", "expectax.model")(lambda: jax.jit(lambda: ppl.sample("x", UNIT))())
raises("outside, in vmap", OutsideModelError, "'x'", "expectax.model")(
    lambda: jax.vmap(lambda loc: ppl.sample("x", dist.Normal(loc, 1.0)))(HEIGHT)
)
raises("outside, in a scan", OutsideModelError, "'x'", "expectax.model")(
    lambda: lax.scan(lambda c, _: (ppl.sample("x", UNIT), None), 0.0, HEIGHT)
)

# --- keys --------------------------------------------------------------------------------------------------------------------------

raises("an old-style key", TypeError, "typed key", "jax.random.key", place=False)(
    lambda: regression().simulate(jax.random.PRNGKey(0))
)
raises("a seed as key", TypeError, "typed key", "int", place=False)(lambda: regression().given({}).generate(0))
raises("an array of keys", TypeError, "one key", "(3,)", "jax.vmap", place=False)(
    lambda: regression().generate(jax.random.split(KEY, 3), {})
)


@pytest.mark.parametrize("case", CASES)
def test_error(case):
    with pytest.raises(case.error) as caught:
        case.function()
    message = str(caught.value)
    assert all(fragment in message for fragment in case.fragments), message
    if case.place:
        lines = {int(number) for number in re.findall(re.escape(__file__) + r":(\d+)", message)}
        assert lines & set(own_lines(case.function.__code__, set())), message


def own_lines(code: types.CodeType, seen: set[str]) -> Iterator[int]:
    """Yield the line numbers of a code object, of those in it, and of the functions and models that it names."""
    yield from (line for _, _, line in code.co_lines() if line)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from own_lines(inner, seen)
    for name in set(code.co_names) - seen - {"simulate"}:
        seen.add(name)
        named = globals().get(name)
        function = getattr(named, "function", getattr(named, "__wrapped__", named))
        if isinstance(function, types.FunctionType):
            yield from own_lines(function.__code__, seen)


# --- what must not raise, or not be lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: dist.Uniform(2.0, 3.0),
        lambda: dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=1.0),
        lambda: dist.DiscreteUniform(0, 3),
        lambda: dist.Delta(1.0),
    ],
)
def test_parameters_may_be_plain_numbers(build):
    trace = simulate(lambda: ppl.sample("x", build()))
    assert jnp.allclose(trace.log_density, build().log_prob(trace["x"]))


def taken(p: Any) -> Any:
    """A site in the branch where `p` is positive."""
    return lax.cond(p > 0, lambda: ppl.sample("x", UNIT), lambda: 0.0)


def either(i: Any) -> Any:
    """A site in each branch, at one address."""
    return lax.switch(i, [lambda: ppl.sample("x", UNIT), lambda: ppl.sample("x", dist.Normal(5.0, 2.0))])


def steps(p: Any) -> Any:
    """A site in the steps where the carry, a lane's own, is positive."""
    return lax.scan(lambda c, _: (taken(c), None), p, None, length=2)[0]


SIGN = jnp.array([1.0, -1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (taken, SIGN[0]),
        (taken, SIGN[1]),
        (either, jnp.asarray(1)),
        (lambda p: lax.scan(lambda c, p: (c + taken(p), None), 0.0, p), SIGN),
        (jax.vmap(taken), SIGN),
        (jax.vmap(either), jnp.array([0, 1, 1])),
        (jax.vmap(steps), SIGN),
    ],
    ids=["cond", "cond, not taken", "switch", "scan of cond", "vmap of cond", "vmap of switch", "vmap of scan of cond"],
)
def test_sites_in_branches_score_where_they_are_taken(function, argument):
    trace = ppl.model(function)(argument).simulate(KEY)
    made = trace.present.get("x", jnp.ones(jnp.shape(trace["x"]), bool))
    law = UNIT if argument.dtype == jnp.float32 else dist.Normal(5.0 * argument, 1.0 + argument)
    assert made.shape == trace["x"].shape
    np.testing.assert_allclose(trace.log_density, jnp.where(made, law.log_prob(trace["x"]), 0.0).sum(), rtol=1e-6)


def test_a_function_with_its_own_derivative_has_the_right_values():
    program = ppl.model(with_a_rule)(0.5)
    np.testing.assert_allclose(program.assess({"x": 2.0}), (dist.Normal(0.5, 1.0).log_prob(2.0), 2.0), rtol=1e-6)
    trace = program.simulate(KEY)
    assert trace.retval == trace["x"]


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, lambda f: lambda c: lax.scan(lambda c, _: (f(c), None), c, HEIGHT)[0]]
)
def test_a_derivative_loses_no_site(wrap):
    def square(loc: Any) -> Any:
        ppl.sample("y", UNIT)
        return loc**2

    trace = simulate(lambda: jax.grad(wrap(square))(1.0))
    np.testing.assert_allclose(trace.log_density, UNIT.log_prob(trace["y"]).sum(), rtol=1e-6)
