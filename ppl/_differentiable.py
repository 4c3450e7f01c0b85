"""Is a sampler differentiable in its parameters? Read off its equations, on the safe side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _jax

_JUMPS = set(
    "eq ne lt le gt ge floor ceil round sign argmax argmin rem nextafter is_finite not and or xor "
    "shift_left shift_right_logical shift_right_arithmetic top_k".split()
)


def differentiable(sampler: Callable[..., Any], parameters: Any) -> bool:
    """Tell whether the draw moves smoothly with all its float parameters, as far as its equations show.

    False where a parameter reaches a comparison, a rounding, an index or the end of a loop, or where the draw is
    discrete. What has a derivative rule of its own (`custom_jvp`) is trusted.
    """
    leaves, structure = jax.tree.flatten(parameters)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        jaxpr = jax.make_jaxpr(lambda key, xs: sampler(key, jax.tree.unflatten(structure, xs)))(key, leaves)
    except Exception:  # a sampler that cannot be followed
        return False
    if not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in jaxpr.jaxpr.outvars):
        return False
    moving = [False, *(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves)]
    return not _jumps(jaxpr, moving)[0]


def _jumps(jaxpr: Any, moving: list[bool]) -> tuple[bool, list[bool]]:
    """Tell whether a moving value meets a jump, and which outputs move."""
    opened = _jax.close(jaxpr)[0]
    known = {v for v, moves in zip(opened.invars, moving, strict=True) if moves}
    jumped = False
    for eqn in opened.eqns:
        inputs = [not isinstance(v, _jax.Literal) and v in known for v in eqn.invars]
        if not any(inputs):
            continue
        jumps, outputs = _equation(eqn, inputs)
        jumped = jumped or jumps
        known.update(v for v, moves in zip(eqn.outvars, outputs, strict=True) if moves)
    return jumped, [not isinstance(v, _jax.Literal) and v in known for v in opened.outvars]


def _equation(eqn: Any, inputs: list[bool]) -> tuple[bool, list[bool]]:
    name, all_move = eqn.primitive.name, [True] * len(eqn.outvars)
    if eqn.primitive in _jax.CUSTOM or name.startswith("random_gamma"):
        return False, all_move
    if (inner := _jax.called_jaxpr(eqn)) is not None:
        return _jumps(inner, inputs)
    if name in ("cond", "branch", "while"):
        return True, all_move
    if eqn.primitive in _jax.SCAN:
        return _jumps(eqn.params["jaxpr"], [True] * len(inputs))[0], all_move
    to_integer = any(not jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
    return name in _JUMPS or to_integer, all_move
