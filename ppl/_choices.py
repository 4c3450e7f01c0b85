"""Nested dicts of choices: paths, nearest spellings, and the checks of values against sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _jax
from ._errors import AddressError, ShapeError, SupportError, nearest
from ._evaluate import Entry
from ._support import whole_space

Choices = dict[str, Any]


def leaves_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, leaf)` of a nested dict, paths joined by `/`."""
    for address, value in tree.items():
        here = f"{path}/{address}" if path else str(address)
        if isinstance(value, dict):
            yield from leaves_of(value, here)
        else:
            yield here, value


def nested(pairs: Iterable[tuple[str, Any]]) -> Choices:
    """Return the nested dict of `(path, leaf)` pairs."""
    tree: Choices = {}
    for path, leaf in pairs:
        *scopes, last = path.split("/")
        inner = tree
        for scope in scopes:
            inner = inner.setdefault(scope, {})
        inner[last] = leaf
    return tree


def check_addresses(
    table: Choices, values: Any, what: str, where: str, complete: bool = False
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return sites and values by path; refuse an unknown address and, if `complete`, a missing one."""
    if not isinstance(values, dict):
        raise AddressError(f"{what} at {where}: expected a dict of address to value, got {type(values).__name__}.")
    sites = dict(leaves_of(table))
    given = dict(leaves_of(values))
    for path in given:
        if path not in sites:
            raise AddressError(f"{what} at {where}: the model has no site {path!r}.{nearest(path, sites)}")
    missing = [path for path in sites if path not in given]
    if complete and missing:
        raise AddressError(
            f"{what} at {where}: no value for site {missing[0]!r} (at {sites[missing[0]].site.where})."
            + (nearest(missing[0], given) if given else "")
            + (f" Missing: {', '.join(map(repr, missing))}." if len(missing) > 1 else "")
        )
    return sites, given


def check_values(table: Choices, values: Any, what: str, where: str, complete: bool = False) -> Choices:
    """Return `values` as arrays of the sites' dtypes, or say which address, shape or value does not fit.

    `complete` demands a value for every site. Values may be tracers; what is a number is checked as a number.
    """
    sites, given = check_addresses(table, values, what, where, complete)
    return nested((path, check_value(path, sites[path], value, what, where)) for path, value in given.items())


def check_value(path: str, entry: Entry, value: Any, what: str, where: str) -> jax.Array:
    """Return one value as an array of its site's dtype, or raise."""
    try:
        shape = np.shape(value)
    except ValueError as error:
        raise ShapeError(f"{what} at {where}: site {path!r} has shape {entry.shape}, the value is ragged.") from error
    if shape != entry.shape:
        raise ShapeError(
            f"{what} at {where}: site {path!r} has shape {entry.shape} but the value has shape {shape} "
            f"(site at {entry.site.where}).{_shape_hint(entry, shape)}"
        )
    dtype = value.dtype if _jax.is_traced(value) else np.asarray(value).dtype
    if jnp.issubdtype(dtype, jnp.complexfloating) or not jnp.issubdtype(dtype, jnp.number) and dtype != jnp.bool_:
        raise SupportError(f"{what} at {where}: site {path!r} takes {entry.dtype} numbers, got {dtype}.")
    known = not _jax.is_traced(value)
    if jnp.issubdtype(entry.dtype, jnp.integer) and jnp.issubdtype(dtype, jnp.floating):
        if not known or np.any(np.asarray(value) != np.round(np.asarray(value))):
            raise SupportError(
                f"{what} at {where}: site {path!r} is discrete ({entry.dtype}) but the value is {dtype}"
                f"{'' if not known else ' and not whole'}. Give integers, for instance value.astype(int)."
            )
    if (
        known
        and dtype.kind in "iu"
        and entry.dtype.kind == "i"
        and np.any(np.asarray(value) > np.iinfo(entry.dtype).max)
    ):
        raise SupportError(f"{what} at {where}: site {path!r} holds {entry.dtype}; the value is too large for it.")
    if known:
        _check_support(path, entry, np.asarray(value), what, where)
    return jnp.asarray(value).astype(entry.dtype)


def _shape_hint(entry: Entry, shape: tuple[int, ...]) -> str:
    if sorted(shape) == sorted(entry.shape):
        return " Transpose it: time axes come first, then vmap lanes (outermost first), then the distribution's own."
    if tuple(s for s in shape if s != 1) == tuple(s for s in entry.shape if s != 1):
        return " Reshape it: expectax never broadcasts a value against its site."
    return ""


def _check_support(path: str, entry: Entry, value: np.ndarray, what: str, where: str) -> None:
    """Check known values against the support, where that is known too."""
    if np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
        raise SupportError(f"{what} at {where}: site {path!r} is given nan ({int(np.isnan(value).sum())} values).")
    support = entry.site.support
    if support is None or whole_space(support) or not value.size:
        return
    with jax.ensure_compile_time_eval():
        inside = np.asarray(support(jnp.asarray(value)))
    if not inside.all():
        first = np.argwhere(~inside)[0]
        raise SupportError(
            f"{what} at {where}: site {path!r} takes values in {support}, but the value at index "
            f"{tuple(int(i) for i in first)} is {value[tuple(first)]} (site at {entry.site.where})."
        )
