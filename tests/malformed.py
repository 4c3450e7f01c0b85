"""What the tables of malformed programs and inputs share: how a case is written, models, and where an error should point."""

import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from expectax import dist, ppl

KEY = jax.random.key(0)
UNIT = dist.Normal(0.0, 1.0)


class Case(NamedTuple):
    error: type[Exception]
    fragments: tuple[str, ...]
    place: bool | str
    function: Callable[..., Any]
    args: tuple[Any, ...]


def bad(cases: list[Any], name: str, error: type[Exception], *fragments: str, place: bool | str = True) -> Any:
    """Register a case: a function with its arguments, which must raise.

    The message must hold the fragments, and name a line of the function or of what it names (`place`; only of the
    function itself if `"own"`).
    """

    def register(function: Callable[..., Any], *args: Any) -> None:
        cases.append(pytest.param(Case(error, fragments, place, function, args), id=name))

    return register


def own_places(function: Any, named: bool = True, seen: set[Any] | None = None) -> Iterator[tuple[str, int]]:
    """Yield file and line of a function; if `named`, also those of the functions and models that it names."""
    seen = set() if seen is None else seen
    function = getattr(function, "function", function)
    if not isinstance(function, types.FunctionType) or function in (*seen, run, cond):
        return
    seen.add(function)
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield from ((code.co_filename, line) for _, _, line in code.co_lines() if line)
        stack.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
        for name in code.co_names if named else ():
            yield from own_places(function.__globals__.get(name), named, seen)


def run(*parts: Callable[[], Any]) -> Any:
    """Simulate a model of some parts."""
    return ppl.model(lambda: [part() for part in parts] and None)().simulate(KEY)


def cond(one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """Simulate a model of two branches."""
    return run(lambda: ppl.cond(True, lambda: jnp.sum(1.0 * one()), lambda: jnp.sum(1.0 * other())))


@ppl.model
def line():
    slope = ppl.sample("slope", UNIT)
    ppl.deterministic("twice", 2.0 * slope)
    ppl.sample("height", dist.Normal(slope * jnp.arange(4.0), 1.0))
    ppl.sample("noise", dist.Gamma(2.0, 1.0))


@ppl.model
def nest():
    ppl.sample("line", line())
    jax.vmap(lambda _: lax.scan(lambda c, _: (ppl.sample("walk", UNIT), None), 0.0, None, length=5))(jnp.zeros(2))


@ppl.model
def fixed(y):
    m = ppl.sample("m", UNIT)
    ppl.observe("y", dist.Normal(m, jnp.ones(3)), y)
    ppl.factor("tilt", m)


@ppl.model
def slab():
    on = ppl.sample("on", dist.Bernoulli(0.5))
    ppl.cond(on == 1, lambda: ppl.sample("x", UNIT), lambda: 0.0)


@ppl.model
def gamma_scale():
    s = ppl.sample("s", dist.Gamma(2.0, 1.0))
    ppl.sample("y", dist.Normal(0.0, s))


def trace() -> Any:
    return line().simulate(KEY)


def posterior() -> Any:
    return line().given({"height": jnp.zeros(4)})
