r"""Selections: which choices an operation is about, with `|`, `&`, `-` and `~`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from . import _jax
from ._errors import AddressError, ShapeError, nearest
from ._nested import Choices, leaves_of
from ._table import Entry

Chosen = dict[str, Any]
"""Path -> True, False, or a numpy array of booleans over the site's elements."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """A set of choices, by address and perhaps index. Example: see `select`."""

    operator: str
    parts: tuple[Any, ...]

    def __or__(self, other: Selection) -> Selection:
        """Return what is in either."""
        return Selection("or", (self, other))

    def __and__(self, other: Selection) -> Selection:
        """Return what is in both."""
        return Selection("and", (self, other))

    def __sub__(self, other: Selection) -> Selection:
        """Return what is in this one but not in the other."""
        return Selection("and", (self, ~other))

    def __invert__(self) -> Selection:
        """Return all other choices."""
        return Selection("not", (self,))

    def __repr__(self) -> str:
        """Show the selection as it is written."""
        if self.operator == "is":
            return f"select({', '.join(repr(p if i is None else (p, i)) for p, i in self.parts)})"
        sign = {"or": " | ", "and": " & "}.get(self.operator)
        return f"~{self.parts[0]!r}" if sign is None else f"({sign.join(map(repr, self.parts))})"


def select(*addresses: str | tuple[str, Any]) -> Selection:
    """Select choices by their addresses.

    Args:
        *addresses: an address, a path `"sub/x"` into nested models, `"sub"` for all of a nested model, or a pair
            `(path, index)` for some elements: `("y", 3)`, `("y", slice(2))`, `("y", (0, 1))`. None at all select nothing.

    Returns:
        A `Selection`; combine selections with `|`, `&`, `-` and `~` (everything else).

    Raises:
        AddressError: when it is used, if an address is unknown; the nearest one is named.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def walk():
        ...     a = ex.sample("a", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(jax.numpy.full(3, a), 1.0))
        >>> trace = walk().simulate(jax.random.key(0))
        >>> rest = trace.project(~ex.select("a", ("y", 0)))
        >>> bool(abs(rest - trace.project(ex.select(("y", slice(1, None))))) < 1e-6)
        True
    """
    parts = tuple(a if isinstance(a, tuple) else (a, None) for a in addresses)
    return Selection("is", parts)


def chosen_by(selection: Any, table: Choices, what: str) -> Chosen:
    """Return what a selection (or address, or addresses) means for a table of choices."""
    if isinstance(selection, str):
        selection = select(selection)
    elif not isinstance(selection, Selection):
        if not isinstance(selection, Iterable) or isinstance(selection, Mapping):
            raise AddressError(
                f"{what} at {_jax.caller()}: a selection is made by ex.select(...), got a {type(selection).__name__}: {selection!r}."
            )
        selection = select(*selection)
    return _resolve(selection, dict(leaves_of(table)), what)


def _resolve(selection: Selection, sites: dict[str, Entry], what: str) -> Chosen:
    if selection.operator == "is":
        chosen: Chosen = dict.fromkeys(sites, False)
        for name, index in selection.parts:
            for path, mask in _named(name, index, sites, what).items():
                chosen[path] = _either(chosen[path], mask)
        return chosen
    parts = [_resolve(part, sites, what) for part in selection.parts]
    if selection.operator == "not":
        return {path: _not(mask) for path, mask in parts[0].items()}
    if selection.operator == "or":
        return {path: _either(parts[0][path], parts[1][path]) for path in sites}
    return {path: _not(_either(_not(parts[0][path]), _not(parts[1][path]))) for path in sites}


def _not(mask: Any) -> Any:
    return ~mask if isinstance(mask, np.ndarray) else not mask


def _either(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return True
    if a is False or b is False:
        return a if b is False else b
    return a | b


def _named(name: Any, index: Any, sites: dict[str, Entry], what: str) -> Chosen:
    where = _jax.caller()
    if not isinstance(name, str):
        raise AddressError(f"{what} at {where}: an address is a string, got {name!r}; write ex.select('a', ('y', 3)).")
    found = [path for path in sites if path == name or path.startswith(f"{name}/")]
    if not found:
        raise AddressError(f"{what} at {where}: the model has no site {name!r}.{nearest(name, sites)}")
    if index is None:
        return dict.fromkeys(found, True)
    if found != [name]:
        raise AddressError(
            f"{what} at {where}: {name!r} is a nested model; an index belongs to a site, such as {found[0]!r}."
        )
    if any(_jax.is_traced(part) for part in jax.tree.leaves(index)):
        raise ShapeError(
            f"{what} at {where}: the index of site {name!r} in a selection is being traced, but which elements are chosen "
            "is a fixed part of the program. Take an int, or a numpy array, instead of a jax.jit or jax.vmap argument."
        )
    mask = np.zeros(sites[name].elements, bool)
    try:
        mask[index] = True
    except (IndexError, TypeError, ValueError) as error:
        raise ShapeError(
            f"{what} at {where}: site {name!r} has elements of shape {sites[name].elements}, which the index {index!r} "
            "does not fit."
        ) from error
    return {name: mask}
