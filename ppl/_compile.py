"""Compile once: the entry points' cache, which notices when the Python state that a model reads has changed.

JAX caches a compiled function by the identity of the Python function. A model that reads a global or a closure
variable would then go on with the old value after the user has changed it. `compiled` adds a fingerprint of that
state to the key: numbers and small containers by value, other objects by identity.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

_OWN = ("expectax.ppl", "expectax.vi", "expectax.inference")


@functools.cache
def _library(module: str) -> bool:
    """Tell whether a module is a library's, whose state a user does not change between calls."""
    if module.split(".")[0] in sys.stdlib_module_names - {"__main__"} or module.startswith(_OWN):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file


class _Identity:
    """An object compared by identity and kept alive, so that its identity cannot be given to another."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Seen(NamedTuple):
    """Which containers the walk stands in, and the functions and objects that it has walked, by number."""

    path: tuple[int, ...]
    known: dict[int, int]

    def below(self, value: Any) -> _Seen:
        """Return what has been seen inside a value."""
        return self._replace(path=(*self.path, id(value)))


class Fingerprint:
    """The Python state behind some values; equal fingerprints may share a compiled program."""

    def __init__(self, *values: Any):
        """Walk the values: arrays that they hold openly are data, those behind functions are state."""
        seen = _Seen((), {})
        self.state = tuple(_walk(value, seen, True) for value in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.state == other.state

    def __hash__(self) -> int:
        return hash(self.state)


class Fixed:
    """The arguments of a program that are no data, made hashable: equal if their parts are."""

    def __init__(self, value: Any):
        """Keep a pytree without arrays."""
        self.value = value

    def _parts(self) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(self.value)
        return structure, tuple(leaf if _hashable(leaf) else id(leaf) for leaf in leaves)

    def __eq__(self, other: object) -> bool:
        """Compare structure and parts; what cannot be hashed is compared by identity."""
        return isinstance(other, Fixed) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def __repr__(self) -> str:
        """Show the parts."""
        return repr(self.value)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Static:
    """A value that is part of the program (an optimiser, a kernel); equal if made of equal functions and numbers."""

    def __init__(self, value: Any):
        """Wrap a value."""
        self.value = value
        self.fingerprint = Fingerprint(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def _walk(value: Any, seen: _Seen, data: bool) -> Any:
    """Return a hashable picture of a value; `data` marks arrays that are arguments, not state."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, types.ModuleType)):
        return (type(value), value)
    if isinstance(value, jax.Array):
        return None if data else _Identity(value)
    if isinstance(value, np.ndarray):
        return None if data else (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, Static):
        return value
    if isinstance(value, Fixed):
        return (Fixed, _walk(value.value, seen, data))
    if id(value) in seen.path:
        return "inside itself"
    seen = seen.below(value)
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), *(_walk(v, seen, data) for v in value))
    if isinstance(value, dict):
        return (dict, *((k if _plain(k) else _Identity(k), _walk(v, seen, data)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (set, frozenset(_walk(v, seen, data) for v in value))
    if id(value) in seen.known:
        return ("again", seen.known[id(value)])
    seen.known[id(value)] = len(seen.known)
    return _walk_callable(value, seen) or _walk_object(value, seen, data)


def _walk_callable(value: Any, seen: _Seen) -> Any:
    if isinstance(value, types.FunctionType):
        return _walk_function(value, seen)
    if isinstance(value, types.MethodType):
        return (_walk(value.__func__, seen, False), _walk(value.__self__, seen, False))
    if isinstance(value, jax.tree_util.Partial):  # a pytree: its arrays are data
        return (jax.tree_util.Partial, _walk(value.func, seen, False), _walk((value.args, value.keywords), seen, True))
    if isinstance(value, functools.partial):
        return (_walk(value.func, seen, False), _walk(value.args, seen, False), _walk(value.keywords, seen, False))
    return None


def _walk_object(value: Any, seen: _Seen, data: bool) -> Any:
    """Walk the attributes of a pytree, of a frozen value, or of an object or class of the user's own."""
    kind = type(value)
    if isinstance(value, type):
        return _walk_class(value, seen)
    if isinstance(value, eqx.Module) or (dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value])):
        return (kind, *(_walk(v, seen, data) for v in vars(value).values()))
    if dataclasses.is_dataclass(value) and kind.__hash__ is not None and kind.__hash__ is not object.__hash__:
        return (kind, *(_walk(getattr(value, f.name), seen, False) for f in dataclasses.fields(value)))
    transparent = not _library(kind.__module__) or isinstance(value, types.SimpleNamespace) or hasattr(value, "_state")
    if not transparent:
        return _Identity(value)
    state = getattr(value, "_state", lambda: _attributes(value))()
    return (_Identity(value), _walk(kind, seen, False), _walk(state, seen, False))


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots too."""
    slots = (n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ()))
    return {n: getattr(value, n) for n in slots if hasattr(value, n)} | getattr(value, "__dict__", {})


def _walk_class(kind: type, seen: _Seen) -> Any:
    """Walk the methods and values of a class of the user's own."""
    if _library(kind.__module__):
        return kind
    owners = [c for c in kind.__mro__ if not _library(c.__module__)]
    found = [item for c in owners for item in vars(c).items()]
    members = [(n, v) for n, v in found if not n.startswith("__") or n in ("__call__", "__init__")]
    return (kind, *((n, _walk(v, seen, False)) for n, v in members))


def _plain(key: Any) -> bool:
    return isinstance(key, (str, int, bool, bytes))


def _walk_function(function: types.FunctionType, seen: _Seen) -> Any:
    if _library(function.__module__ or ""):
        return _with_cells(function, seen)
    used = sorted(_names(function.__code__))
    state = [(n, _walk(function.__globals__[n], seen, False)) for n in used if n in function.__globals__]
    imported = [sys.modules[n] for n in used if n in sys.modules and n not in function.__globals__]
    modules = [m for n in used if isinstance(m := function.__globals__.get(n), types.ModuleType)]
    while modules or imported:
        module = (modules or imported).pop()
        if _library(module.__name__):
            continue
        for n in (n for n in used if n in vars(module)):
            value = vars(module)[n]
            if isinstance(value, types.ModuleType):
                modules.append(value)
            state.append((f"{module.__name__}.{n}", _walk(value, seen, False)))
    return (_with_cells(function, seen), tuple(state))


def _with_cells(function: types.FunctionType, seen: _Seen) -> Any:
    cells = tuple(_walk(_content(cell), seen, False) for cell in function.__closure__ or ())
    defaults = _walk((function.__defaults__, function.__kwdefaults__), seen, False)
    return (_Identity(function.__code__), cells, defaults)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: types.CodeType) -> set[str]:
    """Return the global names that a code object, or one nested in it, may read."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jit an entry point of the library: arrays are data, everything else is part of the program.

    While it is traced, each program of a user's is staged once, however often a kernel asks for its density.
    """

    @eqx.filter_jit
    def run(state: Fingerprint, args: Any, kwargs: Any) -> Any:
        from ._staging import staging_once

        del state  # part of the cache's key only
        with staging_once():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(Fingerprint(args, kwargs), args, kwargs)

    return call
