"""A model called at an address of another: its equations are wrapped in a `jit` whose name carries the address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from . import _jax

_PREFIX = "expectax_scope:"


def nested_program(value: Any) -> bool:
    """Tell whether a value can be called at an address (it has `_nest`)."""
    return hasattr(value, "_nest")


def nest(address: str, function: Callable[[], Any]) -> Any:
    """Stage `function()` as one equation that carries `address`.

    The address is kept in the equation, not in the sites, so that JAX's caches of inner traces stay right.
    """
    static = []

    def body() -> Any:
        arrays, rest = eqx.partition(function(), eqx.is_array)
        static.append(rest)
        return arrays

    body.__name__ = _PREFIX + address
    return eqx.combine(jax.jit(body)(), static[-1])


def scope_address(eqn: Any) -> str | None:
    """Return the address that an equation nests its sites under, if it does."""
    name = _jax.call_name(eqn)
    return name[len(_PREFIX) :] if name.startswith(_PREFIX) else None
