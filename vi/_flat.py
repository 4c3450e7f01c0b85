"""An objective as one flat list of equations, with a strategy chosen for each site.

Calls that only wrap (`jit`, `checkpoint`, nested models) are written out, so that the additive structure of the
objective is in view. A scan with an `Enum` site is unrolled; other scans stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from expectax.ppl import _jax
from expectax.ppl._evaluate import unfollowable
from expectax.ppl._nesting import scope_address
from expectax.ppl._sample import Site, rebind, sample_p

from ._strategy import Enum, joint_size, resolve


class _Flattener:
    """Rewrites a jaxpr; remembers how many joint values have been enumerated so far."""

    def __init__(self) -> None:
        self.enumerated = 1

    def run(self, jaxpr: Any, args: Any, scope: str, repeats: int = 1) -> list[Any]:
        """Re-bind every equation of a jaxpr, calls written out."""
        env = _jax.Environment.of(jaxpr, args)
        opened = _jax.close(jaxpr)[0]
        for eqn in opened.eqns:
            values = [env.read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, values, scope, repeats), strict=True))
        return [env.read(v) for v in opened.outvars]

    def _equation(self, eqn: Any, values: list[Any], scope: str, repeats: int) -> list[Any]:
        if eqn.primitive is sample_p:
            return [self._site(eqn.params["site"], values, scope, repeats)]
        inner = _jax.called_jaxpr(eqn)
        sites = _jax.holds(eqn, sample_p)
        if inner is not None and (sites or eqn.primitive in _jax.JIT):
            address = scope_address(eqn)
            return self.run(inner, values, scope if address is None else f"{scope}{address}/", repeats)
        if not sites:
            return _jax.bind(eqn, values)
        if eqn.primitive in _jax.SCAN:
            return self._scan(eqn, values, scope, repeats)
        raise unfollowable(eqn)

    def _site(self, site: Site, leaves: list[Any], scope: str, repeats: int) -> Any:
        strategy = resolve(site, leaves, self.enumerated, repeats)
        if isinstance(strategy, Enum):
            self.enumerated *= joint_size(site, leaves, repeats) or 1
        return rebind(dataclasses.replace(site, address=scope + site.address, gradient=strategy), leaves)

    def _scan(self, eqn: Any, values: list[Any], scope: str, repeats: int) -> list[Any]:
        """Choose the strategies of a scan's sites; write the scan out if one of them is `Enum`."""
        length, (num_consts, num_carry) = eqn.params["length"], _jax.scan_sizes(eqn)
        consts, carry, xs = _cut(values, num_consts, num_carry)
        before = self.enumerated

        def step(carry: Any, x: Any) -> Any:
            self.enumerated = before
            out = self.run(eqn.params["jaxpr"], [*consts, *carry, *x], scope, repeats * length)
            return out[:num_carry], out[num_carry:]

        if not _enumerates(jax.make_jaxpr(step)(carry, [x[0] for x in xs]) if length else None):
            carry, ys = jax.lax.scan(
                step, carry, xs, length=length, reverse=eqn.params["reverse"], unroll=eqn.params["unroll"]
            )
            return [*carry, *ys]
        outputs: dict[int, Any] = {}
        for t in reversed(range(length)) if eqn.params["reverse"] else range(length):
            carry, outputs[t] = step(carry, [x[t] for x in xs])
        ys = [jnp.stack([outputs[t][j] for t in range(length)]) for j in range(len(outputs[0]))]
        return [*carry, *ys]


def _cut(values: list[Any], num_consts: int, num_carry: int) -> tuple[list[Any], list[Any], list[Any]]:
    cut = num_consts + num_carry
    return values[:num_consts], values[num_consts:cut], values[cut:]


def _enumerates(jaxpr: Any) -> bool:
    """Tell whether an `Enum` site stands in a jaxpr."""
    if jaxpr is None:
        return False
    for eqn in _jax.close(jaxpr)[0].eqns:
        if eqn.primitive is sample_p and isinstance(eqn.params["site"].gradient, Enum):
            return True
        if any(_enumerates(inner) for inner in _jax.sub_jaxprs(eqn)):
            return True
    return False


def flatten(jaxpr: Any, args: Any) -> Any:
    """Return a closed jaxpr like `jaxpr`, flat, with a strategy at every site."""
    return jax.make_jaxpr(lambda *xs: _Flattener().run(jaxpr, xs, ""))(*args)
