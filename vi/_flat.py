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
from expectax.ppl._branch import branches_of, clamped, guarded, select
from expectax.ppl._errors import ControlFlowError
from expectax.ppl._nesting import scope_address
from expectax.ppl._observe import deterministic_p
from expectax.ppl._sample import Site, rebind, sample_p, with_mask
from expectax.ppl._table import unfollowable

from ._strategy import Enum, joint_size, resolve


class _Flattener:
    """Rewrites a jaxpr; remembers how many joint values have been enumerated so far."""

    def __init__(self) -> None:
        self.enumerated = 1

    def run(self, jaxpr: Any, args: Any, scope: str, repeats: int = 1, mask: Any = None) -> list[Any]:
        """Re-bind every equation of a jaxpr, calls written out; `mask` tells in which outermost lanes it counts."""
        env = _jax.Environment.of(jaxpr, args)
        opened = _jax.close(jaxpr)[0]
        for eqn in opened.eqns:
            values = [env.read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, values, scope, repeats, mask), strict=True))
        return [env.read(v) for v in opened.outvars]

    def _equation(self, eqn: Any, values: list[Any], scope: str, repeats: int, mask: Any) -> list[Any]:
        if eqn.primitive is sample_p:
            return [self._site(eqn.params["site"], values, scope, repeats, mask)]
        if eqn.primitive is deterministic_p:
            return values
        inner = _jax.called_jaxpr(eqn)
        sites = _jax.holds(eqn, sample_p)
        if inner is not None and (sites or eqn.primitive in _jax.JIT):
            address = scope_address(eqn)
            return self.run(inner, values, scope if address is None else f"{scope}{address}/", repeats, mask)
        if not sites:
            return _jax.bind(eqn, values)
        if eqn.primitive in _jax.SCAN:
            return self._scan(eqn, values, scope, repeats, mask)
        if (branches := branches_of(eqn)) is not None:
            return self._branches(branches, values, scope, repeats, mask)
        raise unfollowable(eqn)

    def _branches(self, branches: Any, values: list[Any], scope: str, repeats: int, mask: Any) -> list[Any]:
        """Write out all branches, their sites masked where the branch is not taken."""
        index, operands = clamped(values[0], len(branches)), values[1:]
        results = []
        for number, branch in enumerate(branches):
            taken = index == number
            if mask is not None:
                taken = taken & jnp.reshape(mask, jnp.shape(mask) + (1,) * (jnp.ndim(taken) - jnp.ndim(mask)))
            results.append(self.run(branch, guarded(taken, operands), scope, repeats, taken))
        return [select(index, list(cases)) for cases in zip(*results, strict=True)]

    def _site(self, site: Site, operands: list[Any], scope: str, repeats: int, mask: Any) -> Any:
        if site.fixed:
            raise ControlFlowError(
                f"site {site.address!r} at {site.where} is observed inside an objective, which has no density of its "
                "own. Add its log density to the objective's value, or observe it in the model."
            )
        if mask is not None:
            site, operands = with_mask(site, operands, mask)
        bare, leaves, _ = site.split(operands)
        strategy = resolve(bare, leaves, self.enumerated, repeats)
        if isinstance(strategy, Enum):
            self.enumerated *= joint_size(bare, leaves, repeats) or 1
        return rebind(dataclasses.replace(site, address=scope + site.address, gradient=strategy), operands)

    def _scan(self, eqn: Any, values: list[Any], scope: str, repeats: int, mask: Any) -> list[Any]:
        """Choose the strategies of a scan's sites; write the scan out if one of them is `Enum`."""
        length, (num_consts, num_carry) = eqn.params["length"], _jax.scan_sizes(eqn)
        consts, carry, xs = _cut(values, num_consts, num_carry)
        before = self.enumerated

        def step(carry: Any, x: Any) -> Any:
            self.enumerated = before
            out = self.run(eqn.params["jaxpr"], [*consts, *carry, *x], scope, repeats * length, mask)
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
