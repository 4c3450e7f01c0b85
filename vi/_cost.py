"""Costs that are added where they arise."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from expectax.ppl import OutsideModelError, _jax
from expectax.ppl._observe import as_array


def add_cost(value: Any) -> None:
    r"""Add a number to the value of the enclosing objective, from wherever it arises.

    Args:
        value: a scalar, or an array whose elements are added; in a `vmap` or a loop each lane and step adds its own,
            in a branch only if it is taken.

    Raises:
        OutsideModelError: there is no enclosing objective.

    The cost is charged to the choices that it depends on, as every additive part of an objective is, so that
    `add_cost` changes nothing but where things are written (the cost effect of stochastic computation graphs, Schulman
    et al. 2015; ADEV, Lew et al. 2023).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def walk(p):
        ...     def step(x, _):
        ...         x = x + ex.sample("step", dist.Bernoulli(p))
        ...         vi.add_cost(2.0 * x)
        ...         return x, None
        ...     jax.lax.scan(step, 0.0, length=3)
        ...     return 0.0
        >>> value, gradient = vi.value_and_grad(walk)(0.25, jax.random.key(0))
        >>> float(value), float(gradient)  # 2 p (1 + 2 + 3), enumerated
        (3.0, 12.0)
    """
    where = _jax.caller()
    cost_p.bind(as_array(value, f"add_cost at {where}").astype(jnp.result_type(float)), where=where)


def _abstract(value: Any, *, where: str) -> Any:
    del where
    return _jax.ShapedArray(value.shape, value.dtype)


def _batch(axis: Any, args: Any, dims: Any, *, where: str) -> Any:
    return cost_p.bind(_jax.to_front(args[0], dims[0], axis.size), where=where), 0


def _outside(*_: Any, where: str) -> Any:
    raise OutsideModelError(f"add_cost at {where} ran outside an objective. Call it within a vi.objective.")


def _lowering(_: Any, *__: Any, where: str) -> Any:
    return _outside(where=where)


def _jvp(primals: Any, tangents: Any, *, where: str) -> Any:
    del primals, tangents
    raise OutsideModelError(f"add_cost at {where} stands inside a derivative. Add the cost outside it.")


cost_p = _jax.define_primitive(
    "cost", abstract=_abstract, batch=_batch, implementation=_outside, lowering=_lowering, jvp=_jvp, site=True
)
