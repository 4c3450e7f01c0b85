"""Bringing numbers per element of a choice to the axes of a value, and back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from expectax.ppl._flow import Axes, Causal


def positions(axes: Axes) -> list[int | None]:
    """Return the value's axis of each element axis; two on one (of size 1, joined by a reshape): the second is mixed."""
    found = [axis.axis if isinstance(axis, Causal) else axis for axis in axes]
    return [None if axis in found[:n] else axis for n, axis in enumerate(found)]


def along(numbers: Any, axes: Axes, ndim: int) -> Any:
    """Sum over the mixed axes, accumulate over causal ones, and put the rest where a value has them."""
    for n, axis in enumerate(axes):
        if isinstance(axis, Causal):
            numbers = lax.cumsum(numbers, n, reverse=axis.reverse)
    found = positions(axes)
    numbers = jnp.sum(numbers, axis=tuple(n for n, axis in enumerate(found) if axis is None))
    kept = [axis for axis in found if axis is not None]
    numbers = jnp.transpose(numbers, sorted(range(len(kept)), key=lambda n: kept[n]))
    return jnp.expand_dims(numbers, tuple(a for a in range(ndim) if a not in kept))


def back(value: Any, axes: Axes, shape: tuple[int, ...]) -> Any:
    """Return for each element the sum of the value's parts that depend on it: the transpose of `along`."""
    found = positions(axes)
    kept = [axis for axis in found if axis is not None]
    summed = jnp.sum(value, axis=tuple(a for a in range(jnp.ndim(value)) if a not in kept))
    placed = jnp.transpose(summed, [sorted(kept).index(axis) for axis in kept])
    placed = jnp.expand_dims(placed, tuple(n for n, axis in enumerate(found) if axis is None))
    for n, axis in enumerate(axes):
        if isinstance(axis, Causal) and found[n] is not None:
            placed = lax.cumsum(placed, n, reverse=not axis.reverse)
    return jnp.broadcast_to(placed, shape)
