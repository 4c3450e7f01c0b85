"""Tracing a bound program into equations."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import _jax
from ._evaluate import Outcome, Visitor, evaluate
from ._mistakes import explained
from ._nested import Choices
from ._table import choices_of, site_table

if TYPE_CHECKING:
    from ._program import Program


class Staged(NamedTuple):
    """A program as equations: the jaxpr, its arguments, the table of its sites, and how to rebuild what it returns."""

    jaxpr: Any
    arguments: list[Any]
    table: Choices
    returned: Callable[[list[Any]], Any]

    @property
    def sites(self) -> Choices:
        """The table of the choices alone."""
        return choices_of(self.table)

    def run(self, visitor: Visitor, key: Any = None, given: Any = None) -> Outcome:
        """Walk the equations; see `evaluate`."""
        return evaluate(self.jaxpr, self.arguments, visitor, key, given)


def as_data(tree: Any) -> Any:
    """Make arrays of the numpy arrays and floats in a tree; whole numbers, strings and other objects stay fixed.

    A whole number or boolean of numpy's becomes Python's.
    """

    def one(x: Any) -> Any:
        if isinstance(x, (np.integer, np.bool_)):
            return x.item()
        return jnp.asarray(x) if isinstance(x, (float, complex, np.ndarray, np.generic)) else x

    return jax.tree.map(one, tree)


_kept: contextvars.ContextVar[list[tuple[Program, Any, Staged]] | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def staging_once() -> Iterator[None]:
    """Stage each program once, as long as this lasts: what one piece of the library's own work asks of a program.

    Programs with estimated densities ask several times, and stand in each other: the cost of depth would be a power.
    """
    token = None if _kept.get() is not None else _kept.set([])
    try:
        yield
    finally:
        if token is not None:
            _kept.reset(token)


def stage(program: Program) -> Staged:
    """Trace the program into equations, afresh each time (but see `staging_once`): what it reads may have changed."""
    kept = _kept.get()
    if kept is None:
        return _traced(program)
    around = list(_jax.enclosing())
    for known, trace, staged in kept:
        # what was staged in a trace around the present one may be used here, but not the other way round
        if known is program and any(trace is t for t in around):
            return staged
    staged = _traced(program)
    kept.append((program, around[0], staged))
    return staged


def _traced(program: Program) -> Staged:
    if not hasattr(program, "_fixed"):
        raise TypeError(
            f"at {_jax.caller()}: expected a bound program, model(arguments), got {program!r}."
            + (" Bind it to its arguments first." if type(program).__name__ == "Model" else "")
        )
    arguments, structure = jax.tree.flatten(program._arrays)
    box: list[Any] = []

    def run(*leaves: Any) -> Any:
        args, kwargs = eqx.combine(jax.tree.unflatten(structure, leaves), program._fixed.value)
        with _jax.staging():
            arrays, rest = eqx.partition(program.model.function(*args, **kwargs), eqx.is_array)
        flat, tree = jax.tree.flatten(arrays)
        box.append((tree, rest))
        return flat

    with explained():
        jaxpr = jax.make_jaxpr(run)(*arguments)
    tree, rest = box[-1]
    return Staged(
        jaxpr, arguments, site_table(jaxpr), lambda outputs: eqx.combine(jax.tree.unflatten(tree, outputs), rest)
    )


def check_key(key: Any) -> None:
    """Refuse what is not one typed key."""
    if not jnp.issubdtype(getattr(key, "dtype", bool), jax.dtypes.prng_key):
        raise TypeError(
            f"at {_jax.caller()}: expected a typed key, got {type(key).__name__}{getattr(key, 'shape', '')}. Write jax.random.key(seed) "
            "instead of jax.random.PRNGKey(seed)."
        )
    if key.shape != ():
        raise TypeError(
            f"at {_jax.caller()}: expected one key, got an array of keys of shape {key.shape}: use jax.vmap over keys."
        )


def scalar(total: Any) -> Any:
    """Return a sum of log densities as an array, also if there was nothing to add."""
    return jnp.asarray(total, jnp.result_type(float)) if isinstance(total, float) else total
