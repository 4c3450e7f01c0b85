r"""Sums over finite variables of products of factors, by variable elimination.

A variable has one value per *element* of its site (lanes, batch); all elements are summed at once. A factor is an
array of log densities: first one axis per variable that it depends on, then element axes, of which each variable's
own elements are a part. Eliminating a variable first adds up the element axes that are not its own (they are
independent given it), then takes the log of the sum over its values (Zhang and Poole 1996; plates as in Obermeyer et
al. 2019).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._errors import ControlFlowError
from ._flow import Axes, Dependence


class Variable(NamedTuple):
    """A summed site: its path, how many values an element has, and the shape of its elements."""

    path: str
    num_values: int
    elements: tuple[int, ...]


Variables = dict[int, Variable]


class Factor(NamedTuple):
    """Log densities: one leading axis per variable of `depends`, in order of their numbers, then element axes.

    `depends[i][a]` is the element axis along which axis `a` of variable `i`'s elements runs (None if it has size 1).
    """

    array: Any
    depends: Dependence

    @property
    def numbers(self) -> list[int]:
        """The variables, in the order of the leading axes."""
        return sorted(self.depends)


def make_factor(array: Any, depends: Dependence, variables: Variables, where: str) -> Factor:
    """Return a factor; refuse one that mixes the elements of a variable."""
    for number, axes in depends.items():
        variable = variables[number]
        for size, axis in zip(variable.elements, axes, strict=True):
            if axis is None and size > 1:
                raise ControlFlowError(
                    f"{where} depends on several elements of {variable.path!r} at once, so summing them out would cost "
                    f"{variable.num_values}^{size} terms. Let each element enter its own lane (jax.vmap or elementwise "
                    "operations), or put a chain into lax.scan."
                )
    return Factor(array, depends)


def log_sum(values: Any, axis: int) -> Any:
    """Return the log of a sum of exponentials; impossible terms have no derivative, not nan."""
    most = lax.stop_gradient(jnp.max(values, axis=axis, keepdims=True))
    safe = jnp.where(jnp.isneginf(most), 0.0, most)
    total = jnp.sum(jnp.exp(values - safe), axis=axis)
    possible = total != 0.0
    return jnp.where(possible, jnp.log(jnp.where(possible, total, 1.0)), -jnp.inf) + jnp.squeeze(safe, axis)


def eliminate(factors: list[Factor], numbers: list[int], variables: Variables) -> list[Factor]:
    """Sum out some variables, cheapest first."""
    left = list(numbers)
    while left:
        plans = [(number, _plan(number, factors, variables)) for number in left]
        ready = [(cost, number) for number, cost in plans if cost is not None]
        if not ready:
            paths = ", ".join(repr(variables[number].path) for number in left)
            raise ControlFlowError(
                f"{paths} cannot be summed out site by site: they meet in factors that run along different lanes. Sum "
                "out fewer of them, or write the model with one of them per lane."
            )
        _, number = min(ready)
        factors = _without(number, factors, variables)
        left.remove(number)
    return factors


def _plan(number: int, factors: list[Factor], variables: Variables) -> int | None:
    """Return how large the factor would be that eliminating a variable makes; None if others must go first."""
    involved: set[int] = set()
    for factor in factors:
        if number not in factor.depends:
            continue
        own = {axis for axis in factor.depends[number] if axis is not None}
        if any(axis is not None and axis not in own for axes in factor.depends.values() for axis in axes):
            return None
        involved |= set(factor.depends)
    size = 1
    for other in involved:
        size *= variables[other].num_values
    return size


def _without(number: int, factors: list[Factor], variables: Variables) -> list[Factor]:
    involved = [reduced(f, number, variables) for f in factors if number in f.depends]
    rest = [f for f in factors if number not in f.depends]
    joined = product(involved, variables, variables[number].elements)
    at = joined.numbers.index(number)
    depends = {n: axes for n, axes in joined.depends.items() if n != number}
    return [*rest, Factor(log_sum(joined.array, at), depends)]


def reduced(factor: Factor, number: int, variables: Variables) -> Factor:
    """Add up the element axes of a factor that are not those of a variable, and bring the others into its order."""
    elements = variables[number].elements
    lead = len(factor.depends)
    own = factor.depends[number]
    kept = [axis for axis in own if axis is not None]
    gone = [axis for axis in range(jnp.ndim(factor.array) - lead) if axis not in kept]
    array = jnp.sum(factor.array, axis=tuple(lead + axis for axis in gone))
    remaining = [axis for axis in range(jnp.ndim(factor.array) - lead) if axis not in gone]
    order = [remaining.index(axis) for axis in kept]
    array = jnp.transpose(array, (*range(lead), *(lead + axis for axis in order)))
    array = jnp.reshape(array, (*jnp.shape(array)[:lead], *elements))  # axes of size 1 come back
    place = {axis: position for position, axis in enumerate(own) if axis is not None}
    depends = {n: _moved(axes, place) for n, axes in factor.depends.items()}
    return Factor(array, depends)


def _moved(axes: Axes, place: dict[int, int]) -> Axes:
    return tuple(None if axis is None else place.get(axis) for axis in axes)


def product(factors: list[Factor], variables: Variables, elements: tuple[int, ...]) -> Factor:
    """Add factors over the same element axes, each broadcast over the variables of the others."""
    numbers = sorted({number for factor in factors for number in factor.depends})
    total: Any = 0.0
    depends: Dependence = {}
    for factor in factors:
        own = factor.numbers
        index = tuple(slice(None) if number in own else None for number in numbers)
        total = total + factor.array[index]
        for number, axes in factor.depends.items():
            known = depends.setdefault(number, axes)
            depends[number] = tuple(a if b is None else b for a, b in zip(axes, known, strict=True))
    shape = (*(variables[number].num_values for number in numbers), *elements)
    return Factor(jnp.broadcast_to(total, shape), depends)


def scalar_total(factors: list[Factor]) -> Any:
    """Return the sum of factors that depend on no variable any more."""
    total: Any = jnp.zeros((), jnp.result_type(float))
    for factor in factors:
        assert not factor.depends
        total = total + jnp.sum(factor.array)
    return total


# --- values that depend on variables ----------------------------------------------------------------------------


class Lifted(NamedTuple):
    """A value for every joint assignment of the variables it depends on: their axes lead, in order of their numbers."""

    array: Any
    depends: Dependence


def lift(function: Any, *inputs: Lifted) -> tuple[Any, list[int]]:
    """Apply a function to plain values, for every assignment; return its arrays and the variables that lead them."""
    numbers = sorted({number for x in inputs for number in x.depends})
    mapped = function
    for number in reversed(numbers):
        mapped = jax.vmap(mapped, in_axes=tuple(0 if number in x.depends else None for x in inputs))
    return mapped(*(x.array for x in inputs)), numbers
