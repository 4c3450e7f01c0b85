"""A `cond` over lanes: what a vmap makes of a `cond` whose branches hold sites and whose predicate differs by lane.

The index then has one number per lane. Every interpreter runs all branches, with a mask at each site that tells in
which lanes the branch is taken, and selects among the results: a branch that is not taken never scores.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from . import _jax
from ._errors import ControlFlowError, OutsideModelError
from ._masked import expand
from ._sample import sample_p
from ._sources import addresses


def _abstract(index: Any, *_: Any, branches: Any) -> Any:
    del index
    return [_jax.ShapedArray(aval.shape, aval.dtype) for aval in branches[0].out_avals]


def _batch(axis: Any, args: Any, dims: Any, *, branches: Any) -> Any:
    index = _jax.to_front(args[0], dims[0], axis.size)
    operands, in_axes = [], []
    for x, dim in zip(args[1:], dims[1:], strict=True):
        # numbers that may have a derivative get the lanes, so that `guarded` can stop it where a branch is not taken
        moves = dim is not None or jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        operands.append(_jax.to_front(x, dim, axis.size) if moves else x)
        in_axes.append(0 if moves else None)
    mapped = tuple(_jax.over_axis(branch, axis, in_axes) for branch in branches)
    outputs = branch_p.bind(index, *operands, branches=mapped)
    return outputs, [0] * len(outputs)


def _names(branches: Any) -> str:
    return ", ".join(sorted({repr(a) for branch in branches for a in addresses(branch)}))


def _outside(*_: Any, branches: Any, **__: Any) -> Any:
    raise OutsideModelError(
        f"the sites {_names(branches)} in the branches of a cond, met at {_jax.caller()}, ran outside a model. Put them in a function "
        "decorated with @expectax.model and call a method of the bound model, such as simulate(key)."
    )


def _jvp(primals: Any, tangents: Any, *, branches: Any) -> Any:
    del primals, tangents
    raise ControlFlowError(
        f"the sites {_names(branches)} in the branches of a cond, met at {_jax.caller()}, stand inside a derivative (jax.grad, jax.jvp). A "
        "random choice has no derivative there. Differentiate a function without sites, or use vi.value_and_grad."
    )


branch_p = _jax.define_primitive(
    "branch",
    abstract=_abstract,
    batch=_batch,
    implementation=_outside,
    lowering=_outside,
    jvp=_jvp,
    multiple_results=True,
    site=True,
)

_jax.replace_batched_cond(sample_p, _batch)


def branches_of(eqn: Any) -> tuple[Any, ...] | None:
    """Return the branches of a `cond`, over lanes or not; None for other equations."""
    return _jax.branches_of(eqn) if eqn.primitive is branch_p or eqn.primitive in _jax.COND else None


def clamped(index: Any, count: int) -> Any:
    """Return the index of the branch that is taken, as `lax.switch` clamps it."""
    return jnp.clip(index, 0, count - 1)


def guarded(taken: Any, operands: list[Any]) -> list[Any]:
    """Return a branch's operands without a derivative where the branch is not taken.

    What the branch computes there is dropped; but a nan among its derivatives, times zero, would not be.
    """

    def guard(x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return x
        return jnp.where(expand(taken, x), x, lax.stop_gradient(x))

    return [guard(x) for x in operands]


def select(index: Any, cases: list[Any]) -> Any:
    """Return the array of the branch that each lane takes."""
    result = cases[-1]
    for number in reversed(range(len(cases) - 1)):
        result = jnp.where(expand(index == number, result), cases[number], result)
    return result
