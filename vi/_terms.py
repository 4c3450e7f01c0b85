r"""The additive terms of an objective's result: a linear function of values that depend on choices.

Walking back from the result through equations that are linear in what depends on a choice (add, sum, scale, reshape)
ends at the *terms*. Each is then charged to the choices it depends on, and to no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from expectax.ppl import _jax
from expectax.ppl._flow import Dependence, of

_LINEAR = {
    "neg",
    "reduce_sum",
    "squeeze",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "copy",
    "copy_p",
    "name",
    "expectation",
}


class Terms:
    """The terms of a flat jaxpr's one result."""

    def __init__(self, jaxpr: Any, depends: dict[Any, Dependence]):
        """Find the terms."""
        self.result = jaxpr.outvars[0]
        self.depends = depends
        self._producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.variables: list[Any] = []
        self._find(self.result, set())

    def _find(self, atom: Any, seen: set[Any]) -> None:
        if not of(self.depends, atom) or atom in seen:
            return
        seen.add(atom)
        parts = self._parts(atom)
        if parts is None:
            self.variables.append(atom)
        else:
            for n in parts:
                self._find(self._producers[atom].invars[n], seen)

    def combined(self, env: _jax.Environment, term: Callable[[Any], Any], constant: Callable[[Any], Any]) -> Any:
        """Return the result, with `term(variable)` for each term's value, and `constant(value)` for what is none."""
        done: dict[Any, Any] = {}

        def value(atom: Any) -> Any:
            if not of(self.depends, atom):
                return constant(env.read(atom))
            if atom not in done:
                parts = self._parts(atom)
                if parts is None:
                    done[atom] = term(atom)
                else:
                    eqn = self._producers[atom]
                    inputs = [value(v) if n in parts else env.read(v) for n, v in enumerate(eqn.invars)]
                    (done[atom],) = _jax.bind(eqn, inputs)
            return done[atom]

        return value(self.result)

    def _parts(self, atom: Any) -> set[int] | None:
        """Return the inputs in which an equation is linear, if every input that depends on a choice is among them."""
        eqn = self._producers.get(atom)
        if eqn is None or len(eqn.outvars) != 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            return None
        name = eqn.primitive.name
        dependent = {n for n, v in enumerate(eqn.invars) if of(self.depends, v)}
        if name in ("add", "sub", "add_any"):
            return {0, 1}
        if name in _LINEAR or (name == "div" and dependent == {0}):
            return {0}
        if name == "convert_element_type" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
            return {0}
        if name == "mul" and len(dependent) == 1:
            return dependent
        return None
