"""Malformed inputs: addresses, selections, shapes and values that do not fit a program. See `malformed`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import malformed
from expectax import dist, ppl
from expectax.ppl import (
    AddressError,
    ControlFlowError,
    DistributionError,
    ShapeError,
    SupportError,
)
from malformed import KEY, UNIT, fixed, gamma_scale, line, nest, posterior, run, slab, trace

CASES: list[Any] = []
bad = functools.partial(malformed.bad, CASES)
HEIGHT = jnp.zeros(4)
FULL = {"slope": 0.5, "height": HEIGHT, "noise": 1.0}
DRAWS = {"slope": jnp.zeros(5), "noise": jnp.ones(5)}

# --- addresses of values ------------------------------------------------------------------------------------------

for name, give in {
    "given": lambda values: line().given(values),
    "assess": lambda values: line().assess(values),
    "generate": lambda values: line().generate(KEY, values),
    "update": lambda values: trace().update(KEY, values),
    "condition": lambda values: ppl.condition(line(), values),
    "do": lambda values: ppl.do(line(), values),
    "substitute": lambda values: ppl.substitute(line(), values),
    "debug": lambda values: ppl.debug(line(), values),
}.items():
    bad(f"{name}: misspelt", AddressError, name, "'hieght'", "Did you mean 'height'?")(give, FULL | {"hieght": HEIGHT})
    bad(f"{name}: recorded", AddressError, name, "'twice'", "computed")(give, FULL | {"twice": 1.0})
    bad(f"{name}: a dict for a site", AddressError, name, "'slope'", "not a dict")(give, FULL | {"slope": {"a": 0.0}})
    bad(f"{name}: a column", ShapeError, name, "'height'", "(4, 1)", "Reshape")(
        give, FULL | {"height": HEIGHT[:, None]}
    )
    bad(f"{name}: nan", SupportError, name, "'slope'", "nan", "ex.masked")(give, FULL | {"slope": jnp.nan})
    bad(f"{name}: outside", SupportError, name, "'noise'", "Positive", "-1.0")(give, FULL | {"noise": -1.0})
    bad(f"{name}: at, out of range", ShapeError, name, "'height'", "4")(give, FULL | {"height": ppl.at(4, 0.0)})

bad("site_log_densities, missing", AddressError, "'noise'")(lambda: posterior().site_log_densities({"slope": 0.0}))
bad("trace at latents, missing", AddressError, "'noise'")(lambda: posterior().trace({"slope": 0.0}))
bad("constrain, misspelt", AddressError, "'nose'", "Did you mean 'noise'?")(
    lambda: posterior().constrain({"slope": 0.0, "nose": 0.0})
)
bad("predictive, misspelt", AddressError, "predictive", "'slop'", "Did you mean 'slope'?")(
    lambda: ppl.predictive(line(), {"slop": jnp.zeros(5)}, key=KEY)
)
bad(
    "predictive, a value for a nested model",
    AddressError,
    "'line'",
    "nested model",
)(lambda: ppl.predictive(nest(), {"line": jnp.zeros(5)}, key=KEY))
bad("log_likelihood, misspelt", AddressError, "log_likelihood", "'slop'", "'slope'")(
    lambda: ppl.log_likelihood(posterior(), {"slop": jnp.zeros(5)})
)
bad("log_likelihood, missing", AddressError, "log_likelihood", "'noise'")(
    lambda: ppl.log_likelihood(posterior(), {"slope": jnp.zeros(5)})
)
bad("log_likelihood, of data", AddressError, "'height'")(
    lambda: ppl.log_likelihood(posterior(), DRAWS | {"height": jnp.zeros((5, 4))})
)
bad("fixed by the program", AddressError, "'y'", "fixed by the program")(
    lambda: fixed(jnp.zeros(3)).given({"y": jnp.zeros(3)})
)
bad("a factor", AddressError, "'tilt'", "fixed by the program")(
    lambda: fixed(jnp.zeros(3)).assess({"m": 0.0, "tilt": 0.0})
)
bad("conditioned twice", AddressError, "'slope'", "fixed by the program")(
    lambda: ppl.condition(ppl.condition(line(), {"slope": 0.0}), {"slope": 1.0})
)
bad("done twice", AddressError, "'slope'", "computed")(lambda: ppl.do(ppl.do(line(), {"slope": 0.0}), {"slope": 1.0}))
bad("the wrong level", AddressError, "'slope'", "Did you mean 'line/slope'?")(lambda: nest().given({"slope": 0.0}))
bad("a path, misspelt", AddressError, "'line/slop'", "'line/slope'")(lambda: nest().generate(KEY, {"line/slop": 0.0}))
bad("a nested record", AddressError, "'line/twice'", "computed")(lambda: nest().given({"line": {"twice": 0.0}}))
bad("masked, for a nested model", AddressError, "'line'", "nested model", "'slope'")(
    lambda: nest().given({"line": ppl.masked(HEIGHT)})
)
bad("a number as address", AddressError, "'3'", "'slope'")(lambda: line().given({3: 0.0}))
bad("None for a dict", AddressError, "given", "NoneType")(lambda: line().given(None))
bad("nothing for a misspelt model", AddressError, "'lnie'")(lambda: nest().generate(KEY, {"lnie": {}}))
bad("nothing for a site", AddressError, "'slope'")(lambda: line().given({"slope": {}}))
bad("two values for one site", AddressError, "'line/slope'")(
    lambda: nest().given({"line/slope": 0.0, "line": {"slope": 1.0}})
)
bad("trace[...], misspelt", AddressError, "'slpe'", "Did you mean 'slope'?")(lambda: trace()["slpe"])
bad("trace[...], a number", AddressError, "3")(lambda: trace()[3])
bad("shapes[...], misspelt", AddressError, "'slpe'", "'slope'")(lambda: ppl.shapes(line())["slpe"])

# --- selections ---------------------------------------------------------------------------------------------------

for name, chosen_by in {
    "regenerate": lambda selection: trace().regenerate(KEY, selection),
    "project": lambda selection: trace().project(selection),
    "mask": lambda selection: ppl.mask(line(), True, selection),
    "scale": lambda selection: ppl.scale(line(), 2.0, selection),
    "block": lambda selection: ppl.block(line(), selection),
    "reparameterize": lambda selection: ppl.reparameterize(line(), selection),
    "with_data_subsample": lambda selection: ppl.with_data_subsample(line(), selection, total=10),
}.items():
    bad(f"{name}: misspelt", AddressError, name, "'hieght'", "Did you mean 'height'?")(chosen_by, ~ppl.select("hieght"))
    bad(f"{name}: out of range", ShapeError, name, "'height'", "(4,)", "9")(chosen_by, ppl.select(("height", 9)))

bad("select, a number in a list", AddressError, "3", "ex.select")(lambda: trace().project([3]))
bad("select, a number", AddressError, "3", "ex.select")(lambda: trace().regenerate(KEY, 3))
bad("select, a nested model by index", AddressError, "'line'", "nested model", "'line/slope'")(
    lambda: nest().simulate(KEY).project(ppl.select(("line", 0)))
)
bad("select, a dict", AddressError, "dict")(lambda: trace().project({"slope": True, "noise": False}))
bad("mask, by index", AddressError, "mask", "array")(lambda: ppl.mask(line(), True, ppl.select(("height", 1))))
bad("block, by index", AddressError, "block", "whole")(lambda: ppl.block(line(), ppl.select(("height", 1))))
bad(
    "with_data_subsample, by index",
    AddressError,
    "with_data_subsample",
)(lambda: ppl.with_data_subsample(line(), ppl.select(("height", 1)), total=10))
bad("block, others depend on it", ControlFlowError, "'height'", "['slope']", "integral")(
    lambda: ppl.block(line(), "slope")
)
bad("block, a branch depends on it", ControlFlowError, "'x'", "['on']", "integral")(lambda: ppl.block(slab(), "on"))
bad("block, a factor depends on it", ControlFlowError, "'y'", "['m']", "integral")(
    lambda: ppl.block(fixed(jnp.zeros(3)), "m")
)
bad("reparameterize, observed", AddressError, "'height'", "observed")(lambda: ppl.reparameterize(posterior(), "height"))
bad("reparameterize, no location", DistributionError, "'noise'", "no location and scale")(
    lambda: ppl.reparameterize(line(), "noise")
)
bad("reparameterize, auto without data", TypeError, "'auto'", "program.given")(lambda: ppl.reparameterize(line()))

# --- shapes -------------------------------------------------------------------------------------------------------

bad("observe, a column", ShapeError, "'x'", "(3,)", "(3, 1)")(
    lambda: run(lambda: ppl.observe("x", UNIT.expand([3]), jnp.zeros((3, 1))))
)
bad("observe, a scalar", ShapeError, "'x'", "(3,)", "()")(lambda: run(lambda: ppl.observe("x", UNIT.expand([3]), 0.0)))
bad("observe, other arguments", ShapeError, "'y'", "(3,)", "(4,)")(
    lambda: fixed(jnp.zeros(3)).simulate(KEY).update(KEY, {}, HEIGHT)
)
bad("mask of a value, too short", ShapeError, "'height'", "(4,)", "(3,)")(
    lambda: line().given({"height": ppl.masked(HEIGHT, np.ones(3, bool))})
)
bad("mask of a value, a column", ShapeError, "'height'", "(4,)", "(4, 1)")(
    lambda: line().given({"height": ppl.masked(HEIGHT, np.ones((4, 1), bool))})
)
bad("mask of a value, lanes first", ShapeError, "'walk'", "(5, 2)", "(2, 5)")(
    lambda: nest().given({"walk": ppl.masked(jnp.zeros((5, 2)), np.ones((2, 5), bool))})
)
bad("mask of a value, the lanes alone", ShapeError, "'walk'", "(5, 2)", "(2,)")(
    lambda: nest().given({"walk": ppl.masked(jnp.zeros((5, 2)), np.ones(2, bool))})
)
bad("masked, a column", ShapeError, "'height'", "(4, 1)", "Reshape")(
    lambda: line().given({"height": ppl.masked(HEIGHT[:, None], np.ones(4, bool))})
)
bad("masked in condition", ShapeError, "condition", "'height'", "whole value")(
    lambda: ppl.condition(line(), {"height": ppl.masked(HEIGHT)})
)
bad("masked in assess", ShapeError, "assess", "'height'", "whole value")(
    lambda: line().assess(FULL | {"height": ppl.masked(HEIGHT)})
)
bad("at, two axes for one", ShapeError, "'height'", "(4,)", "(0, 0)")(
    lambda: line().given({"height": ppl.at((0, 0), 0.0)})
)
bad("at, from the end", ShapeError, "'height'", "-5")(lambda: line().given({"height": ppl.at(-5, 0.0)}))
bad("at, an array out of range", ShapeError, "'height'", "(4,)")(
    lambda: line().given({"height": ppl.at(jnp.array([0, 7]), jnp.zeros(2))})
)
bad("at, a value of another shape", ShapeError, "'height'", "(2,)", "()")(
    lambda: line().given({"height": ppl.at(slice(2), 0.0)})
)
bad("at, booleans too short", ShapeError, "'height'", "(4,)")(
    lambda: line().given({"height": ppl.at(np.ones(3, bool), jnp.zeros(3))})
)
bad("at, of a scalar", ShapeError, "'slope'", "()")(lambda: line().given({"slope": ppl.at(0, 0.0)}))
bad("mask, too short", ShapeError, "mask", "'height'", "(4,)", "(3,)")(
    lambda: ppl.mask(line(), jnp.ones(3, bool), "height")
)
bad("scale, lanes first", ShapeError, "scale", "'walk'", "(5, 2)", "(2, 5)")(
    lambda: ppl.scale(nest(), jnp.ones((2, 5)), "walk")
)
bad("with_data_subsample, a scalar", ShapeError, "'slope'", "first axis")(
    lambda: ppl.with_data_subsample(line(), "slope", total=10)
)
bad("with_data_subsample, two sizes", ShapeError, "'walk'", "'line/height'")(
    lambda: ppl.with_data_subsample(nest(), ["walk", "line/height"], total=10)
)
bad(
    "with_data_subsample, valid too short",
    ShapeError,
    "with_data_subsample",
    "'height'",
    "(3,)",
)(lambda: ppl.with_data_subsample(line(), "height", total=10, valid=jnp.ones(3, bool)))
bad("predictive, one draw", ShapeError, "'slope'", "()", "leading axes")(
    lambda: ppl.predictive(line(), {"slope": 0.0}, key=KEY)
)
bad("predictive, draws unlike", ShapeError, "'noise'", "(4,)", "(5,)")(
    lambda: ppl.predictive(line(), DRAWS | {"noise": HEIGHT}, key=KEY)
)
bad("predictive, draws of another shape", ShapeError, "'height'", "(5, 3)", "(4,)")(
    lambda: ppl.predictive(line(), {"height": jnp.zeros((5, 3))}, key=KEY)
)
bad("predictive, no draws", ShapeError, "no draws")(lambda: ppl.predictive(line(), {}, key=KEY))
bad("constrain, a simplex", ShapeError, "'p'", "(2,)", "(3,)")(
    lambda: ppl.model(lambda: ppl.sample("p", dist.Dirichlet(jnp.ones(3))))().given({}).constrain({"p": jnp.zeros(3)})
)
bad("constrain, lanes first", ShapeError, "'walk'", "(5, 2)", "(2, 5)")(
    lambda: nest().given({"line": FULL}).constrain({"walk": jnp.zeros((2, 5))})
)

# --- values -------------------------------------------------------------------------------------------------------

bad("at, nan", SupportError, "'height'", "nan")(lambda: line().given({"height": ppl.at(0, jnp.nan)}))
bad("masked, nan where it counts", SupportError, "'height'", "nan")(
    lambda: line().given({"height": ppl.masked(HEIGHT * jnp.nan, np.ones(4, bool))})
)
bad("a negative count", SupportError, "'n'", "-1")(
    lambda: ppl.condition(ppl.model(lambda: ppl.sample("n", dist.Poisson(2.0)))(), {"n": -1})
)
bad("half a count", SupportError, "'n'", "discrete", "not whole")(
    lambda: ppl.do(ppl.model(lambda: ppl.sample("n", dist.Poisson(2.0)))(), {"n": 1.5})
)
bad("no simplex", SupportError, "'p'", "Simplex")(
    lambda: ppl.model(lambda: ppl.sample("p", dist.Dirichlet(jnp.ones(3))))().given({"p": jnp.ones(3)})
)
bad("None for a number", SupportError, "'slope'", "float32 numbers", "object")(lambda: line().given({"slope": None}))
bad("a key for a number", SupportError, "'slope'", "float32 numbers")(lambda: line().given({"slope": KEY}))
bad("observe, nan", SupportError, "'x'", "nan")(lambda: run(lambda: ppl.observe("x", UNIT, np.nan)))
bad("predictive, a draw outside", SupportError, "'s'", "Positive")(
    lambda: ppl.predictive(gamma_scale(), {"s": -jnp.ones(2)}, key=KEY)
)
bad("predictive, a draw of nan", SupportError, "'s'", "nan")(
    lambda: ppl.predictive(gamma_scale(), {"s": jnp.full(2, jnp.nan)}, key=KEY)
)
bad("log_likelihood, a draw outside", SupportError, "'s'", "Positive")(
    lambda: ppl.log_likelihood(gamma_scale().given({"y": 0.0}), {"s": -jnp.ones(2)})
)
bad("unconstrain, discrete", SupportError, "'on'", "discrete")(
    lambda: slab().given({}).unconstrain({"on": 1, "x": 0.0})
)
bad("given, a traced mask", SupportError, "'height'", "outside jit")(
    lambda: jax.jit(
        lambda m: line().given({"height": ppl.masked(HEIGHT, m)}).log_density({"slope": 0.0, "noise": 1.0})
    )(HEIGHT > 0)
)
bad("mask, a word", TypeError, "mask")(lambda: ppl.mask(line(), "height"))
bad("with_data_subsample, nothing in total", ValueError, "total")(
    lambda: ppl.with_data_subsample(line(), "height", total=-2)
)
bad("predictive, neither draws nor a number", ValueError, "num_samples")(lambda: ppl.predictive(line(), key=KEY))
bad("predictive, both", ValueError, "num_samples")(lambda: ppl.predictive(line(), DRAWS, key=KEY, num_samples=3))
bad("predictive, fewer than none", ValueError, "num_samples")(lambda: ppl.predictive(line(), key=KEY, num_samples=-1))
