"""The checks of values against sites: addresses with the nearest spelling, shapes, dtypes, supports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _jax
from ._errors import AddressError, ShapeError, SupportError, nearest
from ._masked import At, Masked, expand, positions
from ._nested import Choices, leaves_of, nested
from ._support import bounds_of, relaxed, whole_space
from ._table import Entry, choices_of


def check_addresses(
    table: Choices, values: Any, what: str, where: str, complete: bool = False, whole: Choices | None = None
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return choices and values by path; refuse an unknown address and, if `complete`, a missing one.

    `whole` is the table of all sites, of which `table` holds those that may be given.
    """
    if not isinstance(values, dict):
        raise AddressError(f"{what} at {where}: expected a dict of address to value, got {type(values).__name__}.")
    sites = dict(leaves_of(choices_of(table)))
    given = dict(leaves_of(values))
    times = Counter(path for path, _ in leaves_of(values))
    for path in [*(p for p, n in times.items() if n > 1), *_empty(values)]:
        if path in given:
            raise AddressError(f"{what} at {where}: {path!r} is given twice, as a path and in a nested dict.")
        if not any(site.startswith(f"{path}/") for site in sites):
            raise AddressError(unknown(path, whole or table, sites, what, where))
    for path in given:
        if path not in sites:
            raise AddressError(unknown(path, whole or table, sites, what, where))
    missing = [path for path in sites if path not in given]
    if complete and missing:
        raise AddressError(
            f"{what} at {where}: no value for site {missing[0]!r} (at {sites[missing[0]].site.where})."
            + (nearest(missing[0], given) if given else "")
            + (f" Missing: {', '.join(map(repr, missing))}." if len(missing) > 1 else "")
        )
    return sites, given


def _empty(tree: Choices, path: str = "") -> Iterator[str]:
    """Yield the paths of empty dicts, which stand for no value but still name something."""
    for address, value in tree.items():
        here = f"{path}/{address}" if path else str(address)
        if isinstance(value, dict):
            yield from _empty(value, here) if value else [here]


def unknown(path: str, table: Choices, sites: dict[str, Entry], what: str, where: str) -> str:
    """Say why a path takes no value."""
    entry = dict(leaves_of(table)).get(path)
    if entry is not None:
        reasons = {"deterministic": "computed, not chosen", "observed": "fixed by the program itself"}
        reason = reasons.get(entry.kind, "observed")
        return f"{what} at {where}: {path!r} (at {entry.site.where}) takes no value: it is {reason}."
    below = [site for site in sites if site.startswith(f"{path}/")]
    if below:
        return (
            f"{what} at {where}: {path!r} is a nested model, which takes a dict of its own addresses: "
            f"{', '.join(repr(b[len(path) + 1 :]) for b in below)}."
        )
    above = [site for site in sites if path.startswith(f"{site}/")]
    if above:
        return f"{what} at {where}: {above[0]!r} is one site, which takes a value, not a dict."
    return f"{what} at {where}: the model has no site {path!r}.{nearest(path, sites)}"


def check_values(
    table: Choices, values: Any, what: str, where: str, complete: bool = False, whole: Choices | None = None
) -> Choices:
    """Return `values` as arrays of the sites' dtypes, or say which address, shape or value does not fit.

    `complete` demands a value for every site. Values may be tracers; what is a number is checked as a number.
    """
    sites, given = check_addresses(table, values, what, where, complete, whole)
    return nested((path, check_value(path, sites[path], value, what, where)) for path, value in given.items())


def check_value(path: str, entry: Entry, value: Any, what: str, where: str) -> Any:
    """Return one value as an array of its site's dtype, or a `Masked`, or raise."""
    place = f"{what} at {where}: site {path!r}"
    if isinstance(value, At):
        value = _placed(place, entry, value)
    if not isinstance(value, Masked):
        return _check_array(place, entry, value)
    if entry.missing is not None or what == "assess":
        raise ShapeError(f"{place} takes a whole value here, not a masked one.")
    mask = value.mask if _jax.is_traced(value.mask) else np.asarray(value.mask)
    if mask.shape != entry.elements[: mask.ndim] or mask.ndim > len(entry.elements):
        raise ShapeError(
            f"{place} has elements of shape {entry.elements} (without the event's axes), but the mask has shape "
            f"{mask.shape}; it takes the whole shape or some of its first axes (site at {entry.site.where})."
        )
    library = jnp if _jax.is_traced(mask) else np
    padded = library.reshape(mask, mask.shape + (1,) * (len(entry.elements) - mask.ndim))
    whole = library.broadcast_to(padded, entry.elements)
    return Masked(_check_array(place, entry, value.value, whole), jnp.asarray(whole), positions(whole))


def _placed(place: str, entry: Entry, at: At) -> Masked:
    """Return the masked value that a constraint by index means."""
    try:
        mask = _mask_at(at.index, entry.elements)
        target = jax.eval_shape(lambda: jnp.zeros(entry.shape)[at.index])
    except (IndexError, TypeError) as error:
        raise ShapeError(f"{place} has shape {entry.shape}, which the index {at.index!r} does not fit.") from error
    if _out_of_range(at.index, entry.elements):
        raise ShapeError(f"{place} has elements of shape {entry.elements}; the index {at.index!r} is out of range.")
    if np.shape(at.value) != target.shape:
        raise ShapeError(f"{place} at index {at.index!r} has shape {target.shape}, got {np.shape(at.value)}.")
    if not _jax.is_traced(mask) and mask.sum() != np.zeros(entry.elements)[at.index].size:
        raise ShapeError(f"{place}: the index {at.index!r} names an element twice.")
    value = jnp.zeros(entry.shape, entry.dtype).at[at.index].set(jnp.asarray(at.value))
    inside = _traced_inside(at.index, entry.elements)
    if inside is None:
        return Masked(value, mask)
    floats = jnp.issubdtype(entry.dtype, jnp.inexact)
    impossible = jnp.asarray(jnp.nan if floats else jnp.iinfo(entry.dtype).min, entry.dtype)
    return Masked(jnp.where(inside, value, impossible), mask | ~inside)


def _traced_inside(index: Any, shape: tuple[int, ...]) -> Any:
    """Tell whether an index is in range where it is being traced; None where it is known."""
    parts = index if isinstance(index, tuple) else (index,)
    traced = [(i, n) for i, n in zip(parts, shape, strict=False) if _jax.is_traced(i) and i.dtype != bool]
    inside = [jnp.all((-n <= i) & (i < n)) for i, n in traced]
    return jnp.all(jnp.stack(inside)) if inside else None


def _mask_at(index: Any, shape: tuple[int, ...]) -> Any:
    """Return the elements that an index means; known if the index is."""
    if any(_jax.is_traced(i) for i in jax.tree.leaves(index)):
        return jnp.zeros(shape, bool).at[index].set(True)
    mask = np.zeros(shape, bool)
    mask[index] = True
    return mask


def _out_of_range(index: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether a plain index leaves the shape; JAX would clamp or drop it."""
    parts = index if isinstance(index, tuple) else (index,)
    known = [(i, n) for i, n in zip(parts, shape, strict=False) if isinstance(i, (int, np.ndarray)) and i is not True]
    return any(not np.all((-n <= np.asarray(i)) & (np.asarray(i) < n)) for i, n in known if np.asarray(i).dtype != bool)


def _check_array(place: str, entry: Entry, value: Any, mask: Any = None) -> jax.Array:
    try:
        shape = np.shape(value)
    except ValueError as error:
        raise ShapeError(f"{place} has shape {entry.shape}, the value is ragged.") from error
    if shape != entry.shape:
        raise ShapeError(
            f"{place} has shape {entry.shape} but the value has shape {shape} "
            f"(site at {entry.site.where}).{_shape_hint(entry, shape)}"
        )
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if jnp.issubdtype(dtype, jnp.complexfloating) or not jnp.issubdtype(dtype, jnp.number) and dtype != jnp.bool_:
        raise SupportError(f"{place} takes {entry.dtype} numbers, got {dtype}.")
    known = not _jax.is_traced(value) and not _jax.is_traced(mask)
    if known and mask is not None:  # what is not given is not checked
        value = np.where(np.asarray(expand(mask, value)), np.asarray(value), np.zeros((), dtype))
    if jnp.issubdtype(entry.dtype, jnp.integer) and jnp.issubdtype(dtype, jnp.floating):
        if not known and (complaints := relaxed.get()) is not None:
            complaints.append(f"{place} is discrete ({entry.dtype}) but the value is {dtype}. Give integers.")
            return jnp.asarray(value)
        if not known or np.any(np.asarray(value) != np.round(np.asarray(value))):
            raise SupportError(
                f"{place} is discrete ({entry.dtype}) but the value is {dtype}"
                f"{'' if not known else ' and not whole'}. Give integers, for instance value.astype(int)."
            )
    if known and dtype.kind in "iu" and entry.dtype.kind == "i":
        if np.any(np.asarray(value) > np.iinfo(entry.dtype).max):
            raise SupportError(f"{place} holds {entry.dtype}; the value is too large for it.")
    if known:
        check_support(place, entry, np.asarray(value), None if mask is None else np.asarray(mask))
    return jnp.asarray(value).astype(entry.dtype)


def _shape_hint(entry: Entry, shape: tuple[int, ...]) -> str:
    if sorted(shape) == sorted(entry.shape):
        return " Transpose it: time axes come first, then vmap lanes (outermost first), then the distribution's own."
    if tuple(s for s in shape if s != 1) == tuple(s for s in entry.shape if s != 1):
        return " Reshape it: expectax never broadcasts a value against its site."
    return ""


def check_support(place: str, entry: Entry, value: np.ndarray, mask: np.ndarray | None) -> None:
    """Check known values against the support, where that is known too."""
    if entry.conditional:  # what is not made may have any value; what is made and impossible has density zero
        return
    if np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
        raise SupportError(
            f"{place} is given nan ({int(np.isnan(value).sum())} values). For missing data write ex.masked(value)."
        )
    support = entry.site.support
    if support is None or whole_space(support) or not value.size:
        return
    if entry.missing is not None and any(np.ndim(bound) for bound in bounds_of(support)):
        return
    with jax.ensure_compile_time_eval():
        inside = np.asarray(support(jnp.asarray(value)))
    if mask is not None:
        inside = inside | ~np.reshape(mask, mask.shape + (1,) * (inside.ndim - mask.ndim))
    if not inside.all():
        first = np.argwhere(~inside)[0]
        raise SupportError(
            f"{place} takes values in {support}, but the value at index "
            f"{tuple(int(i) for i in first)} is {value[tuple(first)]} (site at {entry.site.where})."
        )
