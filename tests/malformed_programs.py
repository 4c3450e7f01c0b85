"""Malformed programs: addresses, distributions, control flow, models that are not bound. See `malformed`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import malformed
from expectax import dist, ppl, vi
from expectax.ppl import (
    AddressError,
    ControlFlowError,
    DistributionError,
    OutsideModelError,
    ShapeError,
    StrategyError,
)
from malformed import KEY, UNIT, cond, line, nest, posterior, run, trace

CASES: list[Any] = []
bad = functools.partial(malformed.bad, CASES)
HEIGHT = jnp.zeros(4)
TRUE = jnp.array(True)
DRAWS = {"slope": jnp.zeros(5), "noise": jnp.ones(5)}


def x() -> Any:
    return ppl.sample("x", UNIT)


def two() -> Any:
    return ppl.sample("x", UNIT.expand([2]))


@jax.custom_jvp
def with_a_rule(m: Any) -> Any:
    return ppl.sample("x", dist.Normal(m, 1.0))


with_a_rule.defjvp(lambda primals, tangents: (with_a_rule(*primals), tangents[0]))


# --- addresses of sites -------------------------------------------------------------------------------------------

bad("twice: lanes and outside", AddressError, "'x'", "twice")(lambda: run(x, lambda: jax.vmap(lambda _: x())(HEIGHT)))
bad("twice: in a loop", AddressError, "'x'", "twice", "a loop?")(lambda: run(*[x] * 3))
bad("twice: in a checkpoint", AddressError, "'x'", "twice")(lambda: run(x, jax.checkpoint(x)))
bad("twice: deterministic", AddressError, "'x'", "twice")(lambda: run(x, lambda: ppl.deterministic("x", 1.0)))
bad("twice: factors", AddressError, "'x'", "twice")(lambda: run(*[lambda: ppl.factor("x", 1.0)] * 2))
bad("twice: observed", AddressError, "'x'", "twice")(lambda: run(x, lambda: ppl.observe("x", UNIT, 0.0)))
bad("twice: in a branch and outside", AddressError, "'x'", "twice")(
    lambda: run(x, lambda: ppl.cond(TRUE, x, lambda: 0.0))
)
bad("twice: in two conds", AddressError, "'x'", "twice")(lambda: run(*[lambda: ppl.cond(TRUE, x, lambda: 0.0)] * 2))
bad("twice: in one branch", AddressError, "'x'", "twice")(lambda: cond(lambda: x() + x(), lambda: 0.0))
bad("twice: in bounded_while", AddressError, "'x'", "twice")(
    lambda: run(lambda: ppl.bounded_while(lambda s: s < 3, lambda s: s + x() + x(), 0.0, max_steps=2))
)
bad("twice: inside a derivative rule", AddressError, "'x'", "twice")(lambda: run(x, lambda: jax.nn.relu(x())))
bad("twice: a nested model and a record", AddressError, "'s'", "twice")(
    lambda: run(lambda: ppl.sample("s", line()), lambda: ppl.deterministic("s", 1.0))
)
bad(
    "twice: nested models",
    AddressError,
    "'s'",
    "twice",
    place="own",
)(lambda: run(*[lambda: ppl.sample("s", line())] * 2))
bad("no address: deterministic", AddressError, "''", "non-empty string")(
    lambda: run(lambda: ppl.deterministic("", 1.0))
)
bad("no address: factor", AddressError, "'a/b'", "without '/'")(lambda: run(lambda: ppl.factor("a/b", 1.0)))
bad("no address: observe", AddressError, "3", "non-empty string")(lambda: run(lambda: ppl.observe(3, UNIT, 1.0)))
bad("no address: bytes", AddressError, "b'x'")(lambda: run(lambda: ppl.sample(b"x", UNIT)))
bad("address and distribution swapped", AddressError, "Normal", "non-empty string")(
    lambda: run(lambda: ppl.sample(UNIT, "x"))
)
bad("scope, malformed", AddressError, "'a/b'", "without '/'")(lambda: ppl.scope(line(), "a/b"))
bad("rename, malformed", AddressError, "'a/b'", "without '/'")(lambda: ppl.rename(line(), {"slope": "a/b"}))
bad("rename, taken", AddressError, "'noise'", "twice")(lambda: ppl.rename(line(), {"slope": "noise"}))
bad("rename, taken by a record", AddressError, "'twice'", "twice")(lambda: ppl.rename(line(), {"slope": "twice"}))
bad("rename, two onto one", AddressError, "'a'", "twice")(lambda: ppl.rename(line(), {"slope": "a", "noise": "a"}))
bad("rename, a nested model onto a site", AddressError, "'walk'", "twice")(lambda: ppl.rename(nest(), {"line": "walk"}))
bad("rename, misspelt", AddressError, "'slpe'", "Did you mean 'slope'?")(lambda: ppl.rename(line(), {"slpe": "s"}))
bad("rename, a number", AddressError, "3")(lambda: ppl.rename(line(), {3: "s"}))
bad("reparameterize, the base is taken", AddressError, "'x_base'", "twice")(
    lambda: ppl.reparameterize(ppl.model(lambda: (x(), ppl.sample("x_base", UNIT)))(), "x").sites()
)

# --- distributions ------------------------------------------------------------------------------------------------


class Broadcasts(dist.Distribution):
    """Its log density broadcasts a value against the parameters."""

    arg_constraints = {}
    support = dist.constraints.real
    pytree_data_fields = ("loc",)

    def __init__(self, loc: Any):
        self.loc = jnp.asarray(loc)
        super().__init__(batch_shape=self.loc.shape, event_shape=())

    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return self.loc + jax.random.normal(key, sample_shape + self.batch_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return -((value[..., None] - self.loc) ** 2)


class Sums(Broadcasts):
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return -jnp.sum((value - self.loc) ** 2)


class DrawsTooMuch(Sums):
    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return jnp.zeros((*sample_shape, *self.batch_shape, 2))


Vector = ppl.distribution(lambda key: jax.random.normal(key, (3,)), lambda value: -(value**2))
Complex = ppl.distribution(jax.random.normal, lambda value: 1j * value)


def objective(body: Callable[[], Any]) -> Any:
    return vi.value_and_grad(vi.objective(lambda p: p * body()))(1.0, key=KEY)


bad("a word as distribution", DistributionError, "'x'", "expected a numpyro distribution", "str")(
    lambda: run(lambda: ppl.sample("x", "Normal"))
)
bad("a class as distribution", DistributionError, "'x'", "expected a numpyro distribution")(
    lambda: run(lambda: ppl.sample("x", dist.Normal))
)
bad("a tuple as distribution", DistributionError, "'x'", "expected a numpyro distribution", "tuple")(
    lambda: run(lambda: ppl.sample("x", (UNIT, UNIT)))
)
bad("a function as distribution", DistributionError, "'x'", "expected a numpyro distribution", "function")(
    lambda: run(lambda: ppl.sample("x", lambda key: 0.0))
)
bad("a posterior as distribution", DistributionError, "'x'", "expected a numpyro distribution", "Posterior")(
    lambda: run(lambda: ppl.sample("x", posterior()))
)
bad("observe, without arguments", DistributionError, "'x'", "expected a numpyro distribution", "Model")(
    lambda: run(lambda: ppl.observe("x", line, 0.0))
)
bad("observe, a bound model", ShapeError, "'x'", "bound model")(lambda: run(lambda: ppl.observe("x", line(), 0.0)))
bad("observe, arguments swapped", DistributionError, "'x'")(lambda: run(lambda: ppl.observe("x", 0.0, UNIT)))
bad("factor, a word", TypeError, "'x'")(lambda: run(lambda: ppl.factor("x", "heavy")))
bad("deterministic, a word", TypeError, "'x'")(lambda: run(lambda: ppl.deterministic("x", "heavy")))
bad("log_prob broadcasts", ShapeError, "'x'", "Broadcasts", "(3, 3)", "(3,)")(
    lambda: run(lambda: ppl.sample("x", Broadcasts(jnp.zeros(3))))
)
bad("log_prob broadcasts in a lane", ShapeError, "'x'", "Broadcasts", "(1,)")(
    lambda: run(lambda: jax.vmap(lambda m: ppl.sample("x", Broadcasts(m)))(HEIGHT))
)
bad("log_prob sums", ShapeError, "'x'", "Sums", "()", "(3,)")(
    lambda: ppl.model(lambda: ppl.sample("x", Sums(jnp.zeros(3))))().assess({"x": jnp.zeros(3)})
)
bad(
    "draws of another shape",
    DistributionError,
    "'x'",
    "(3, 2)",
    "(3,)",
)(lambda: run(lambda: ppl.sample("x", DrawsTooMuch(jnp.zeros(3)))))
bad("a log density for each number", DistributionError, "(3,)", "scalar", place=False)(
    lambda: run(lambda: ppl.sample("x", Vector()))
)
bad("a log density for each number: where", DistributionError, "'x'")(lambda: run(lambda: ppl.sample("x", Vector())))
bad("a complex log density", DistributionError, "complex")(lambda: run(lambda: ppl.sample("x", Complex())))
bad("a strategy by name", StrategyError, "'x'", "vi.Reparam()")(
    lambda: objective(lambda: ppl.sample("x", UNIT, gradient="reparam"))
)
bad("Reparam, discrete", StrategyError, "'x'", "differentiable")(
    lambda: objective(lambda: ppl.sample("x", dist.Bernoulli(0.5), gradient=vi.Reparam()))
)
bad("Enum, continuous", StrategyError, "'x'", "finite support")(
    lambda: objective(lambda: ppl.sample("x", UNIT, gradient=vi.Enum()))
)

# --- control flow -------------------------------------------------------------------------------------------------

bad("while_loop, observed", ControlFlowError, "'x'", "'while'", "bounded_while")(
    lambda: run(lambda: lax.while_loop(lambda c: c < 3, lambda c: c + ppl.observe("x", UNIT, c), 0.0))
)
bad("while_loop, nested", ControlFlowError, "'slope'", "'while'")(
    lambda: run(lambda: lax.while_loop(lambda c: c < 3, lambda c: (ppl.sample("s", line()), c + 1)[1], 0.0))
)
bad("while_loop, in its condition", ControlFlowError, "'x'", "'while'")(
    lambda: run(lambda: lax.while_loop(lambda c: x() < c, lambda c: c + 1, 0.0))
)
bad("while_loop, recorded", ControlFlowError, "'x'", "'while'")(
    lambda: run(lambda: lax.while_loop(lambda c: c < 3, lambda c: ppl.deterministic("x", c + 1), 0.0))
)
bad("a linear solve", ControlFlowError, "'x'", "'custom_linear_solve'")(
    lambda: run(lambda: lax.custom_linear_solve(lambda v: v * x(), jnp.ones(()), lambda f, v: f(v)))
)
bad("grad, observed", ControlFlowError, "'x'", "derivative", "vi.value_and_grad")(
    lambda: run(lambda: jax.grad(lambda m: ppl.observe("x", dist.Normal(m, 1.0), 0.0))(0.0))
)
bad("grad, a factor", ControlFlowError, "'x'", "derivative", "vi.value_and_grad")(
    lambda: run(lambda: jax.grad(lambda m: (ppl.factor("x", m), m)[1])(0.0))
)
bad("grad of a jit", ControlFlowError, "'x'", "derivative", "vi.value_and_grad")(
    lambda: run(lambda: jax.grad(jax.jit(lambda m: m * ppl.sample("x", dist.Normal(m, 1.0))))(0.0))
)
bad("jacfwd of a scan", ControlFlowError, "'x'", "derivative", "vi.value_and_grad")(
    lambda: run(
        lambda: jax.jacfwd(
            lambda m: lax.scan(lambda c, _: (ppl.sample("x", dist.Normal(c, 1.0)), None), m, length=2)[0]
        )(0.0)
    )
)
bad("grad of a branch over lanes", ControlFlowError, "'x'", "derivative")(
    lambda: run(
        lambda: jax.grad(lambda m: jax.vmap(lambda m: lax.cond(m > 0, lambda: m * x(), lambda: m))(m).sum())(HEIGHT)
    )
)
bad("derivative of custom_jvp", ControlFlowError, "derivative rule of its own", "Take the sites out")(
    lambda: jax.grad(lambda m: ppl.model(lambda: with_a_rule(m))().assess({"x": 1.0})[0])(0.0)
)
bad("derivative of custom_jvp: which", ControlFlowError, "'x'")(
    lambda: jax.grad(lambda m: ppl.model(lambda: with_a_rule(m))().assess({"x": 1.0})[0])(0.0)
)
bad(
    "derivative of custom_jvp, scaled",
    ControlFlowError,
    "derivative rule of its own",
    place=False,  # only the site's, which stands in the function with the rule
)(lambda: jax.grad(lambda m: ppl.scale(ppl.model(lambda m: with_a_rule(m))(m), 2.0).assess({"x": 1.0})[0])(0.0))
bad("branches: shapes", ShapeError, "'x'", "two branches", "(2,)", "()")(lambda: cond(x, two))
bad("branches: shapes over lanes", ShapeError, "'x'", "two branches", "(4, 2)", "(4,)")(
    lambda: run(lambda: jax.vmap(lambda h: lax.cond(h > 0, lambda: x(), lambda: two().sum()))(HEIGHT))
)
bad("branches: dtypes", ShapeError, "'x'", "two branches", "int32", "float32")(
    lambda: cond(x, lambda: ppl.sample("x", dist.Poisson(1.0)))
)
bad("branches: recorded and chosen", ShapeError, "'x'", "two branches", "deterministic", "choice")(
    lambda: cond(x, lambda: ppl.deterministic("x", 0.0))
)
bad("branches: observed and chosen", ShapeError, "'x'", "two branches", "observed", "choice")(
    lambda: cond(x, lambda: ppl.observe("x", UNIT, 0.0))
)
bad("branches: a nested model and a site", ShapeError, "'x'", "two branches", "nested model", "choice")(
    lambda: cond(x, lambda: (ppl.sample("x", line()), 0.0)[1])
)
bad("branches: a scan and a site", ShapeError, "'x'", "two branches", "(2,)")(
    lambda: cond(x, lambda: lax.scan(lambda c, _: (x(), None), 0.0, length=2)[0])
)
bad("branches: batch and event", ShapeError, "'x'", "two branches", "(2,)")(
    lambda: cond(two, lambda: ppl.sample("x", UNIT.expand([2]).to_event(1)))
)
bad("switch: shapes", ShapeError, "'x'", "two branches")(
    lambda: run(lambda: ppl.switch(TRUE.astype(int), [x, lambda: 0.0, lambda: two().sum()]))
)
bad("bounded_while, no steps", ValueError, "max_steps", "positive whole number")(
    lambda: run(lambda: ppl.bounded_while(lambda s: s < 3, lambda s: s + x(), 0.0, max_steps=0))
)
bad("bounded_while, half a step", ValueError, "max_steps", "positive whole number")(
    lambda: run(lambda: ppl.bounded_while(lambda s: s < 3, lambda s: s + x(), 0.0, max_steps=2.5))
)
bad("bounded_while, traced steps", ValueError, "max_steps", "positive whole number")(
    lambda: run(lambda: ppl.bounded_while(lambda s: s < 3, lambda s: s + x(), 0.0, max_steps=jnp.asarray(3)))
)

# --- outside a model, unbound, keys -------------------------------------------------------------------------------

bad("outside: factor", OutsideModelError, "'x'", "expectax.model")(lambda: ppl.factor("x", 0.0))
bad("outside: observe", OutsideModelError, "'x'", "expectax.model")(lambda: ppl.observe("x", UNIT, 0.0))
bad("outside: a nested model", OutsideModelError, "'slope'", "expectax.model")(lambda: ppl.sample("sub", line()))
bad("outside: a branch", OutsideModelError, "'x'", "expectax.model")(lambda: ppl.cond(TRUE, x, lambda: 0.0))
bad("outside: a branch over lanes", OutsideModelError, "'x'", "expectax.model")(
    lambda: jax.vmap(lambda h: lax.cond(h > 0, x, lambda: 0.0))(HEIGHT)
)
for name, use in {
    "condition": lambda program: ppl.condition(program, {"slope": 0.0}),
    "substitute": lambda program: ppl.substitute(program, {"slope": 0.0}),
    "do": lambda program: ppl.do(program, {"slope": 0.0}),
    "mask": lambda program: ppl.mask(program, True),
    "scale": lambda program: ppl.scale(program, 2.0),
    "rename": lambda program: ppl.rename(program, {"slope": "s"}),
    "block": lambda program: ppl.block(program, "noise"),
    "with_data_subsample": lambda program: ppl.with_data_subsample(program, "height", total=10),
    "reparameterize": lambda program: ppl.reparameterize(program, "slope"),
    "predictive": lambda program: ppl.predictive(program, key=KEY, num_samples=2),
    "scope": lambda program: ppl.scope(program, "s"),
    "log_likelihood": lambda program: ppl.log_likelihood(program, DRAWS),
    "shapes": lambda program: ppl.shapes(program),
    "render": lambda program: ppl.render(program),
    "debug": lambda program: ppl.debug(program, key=KEY),
    "load_trace": lambda program: ppl.load_trace("none", program),
}.items():
    bad(f"{name}: not bound", TypeError, "bound program")(use, line)
for name, use in {
    "update": lambda key: trace().update(key, {}),
    "regenerate": lambda key: trace().regenerate(key, "slope"),
    "predictive": lambda key: ppl.predictive(line(), DRAWS, key=key),
    "debug": lambda key: ppl.debug(line(), key=key),
}.items():
    bad(f"{name}: an old key", TypeError, "typed key", "jax.random.key", place=False)(use, jax.random.PRNGKey(0))
    bad(f"{name}: keys", TypeError, "one key", "(3,)", place=False)(use, jax.random.split(KEY, 3))

bad("an old key: where", TypeError, "typed key")(lambda: line().simulate(jax.random.PRNGKey(0)))
