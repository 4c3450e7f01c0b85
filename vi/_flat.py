"""An objective as one flat list of equations, with a strategy chosen for each site.

Calls that only wrap (`jit`, `checkpoint`, nested models) are written out, so that the additive structure of the
objective is in view. A scan with a site that is enumerated jointly is unrolled; other scans stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from expectax.ppl import _jax
from expectax.ppl._branch import branches_of, clamped, guarded, select
from expectax.ppl._errors import ControlFlowError
from expectax.ppl._frames import written_out
from expectax.ppl._masked import expand
from expectax.ppl._nesting import scope_address
from expectax.ppl._observe import deterministic_p
from expectax.ppl._sample import Site, rebind, sample_p, with_mask
from expectax.ppl._stochastic import stochastic_p
from expectax.ppl._table import unfollowable

from ._accumulators import scan_with_sums, sums_of
from ._cost import cost_p
from ._expectation import check_linear
from ._layout import Layout
from ._resolve import resolve

Strategies = Mapping[str, Any]
"""Gradient strategies by path."""


class _Flattener:
    """Rewrites a jaxpr; loops that hold a site of `unrolled` are written out step by step."""

    def __init__(self, unrolled: frozenset[str], strategies: Strategies) -> None:
        self.unrolled, self.strategies = unrolled, strategies
        self.costs: list[Any] = []
        self.reasons: dict[str, str] = {}

    def objective(self, jaxpr: Any, args: Any) -> list[Any]:
        """Return the outputs of an objective: the first is its value, with the costs that were added on the way."""
        value, *others = self.run(jaxpr, args, "")
        return [sum((jnp.sum(cost) for cost in self.costs), value), *others]

    def run(self, jaxpr: Any, args: Any, scope: str, mask: Any = None) -> list[Any]:
        """Re-bind every equation of a jaxpr, calls written out; `mask` tells in which outermost lanes it counts."""
        env = _jax.Environment.of(jaxpr, args)
        opened = _jax.close(jaxpr)[0]
        for eqn in opened.eqns:
            values = [env.read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, values, scope, mask), strict=True))
        return [env.read(v) for v in opened.outvars]

    def _equation(self, eqn: Any, values: list[Any], scope: str, mask: Any) -> list[Any]:
        if eqn.primitive is sample_p:
            return [self._site(eqn.params["site"], values, scope, mask)]
        if eqn.primitive is deterministic_p:
            return values
        if eqn.primitive is cost_p:
            self.costs.append(values[0] if mask is None else jnp.where(expand(mask, values[0]), values[0], 0.0))
            return values
        inner = _jax.called_jaxpr(eqn)
        sites = _jax.holds(eqn, sample_p, cost_p)
        if inner is not None and (sites or eqn.primitive in _jax.JIT):
            address = scope_address(eqn)
            with written_out(eqn):
                return self.run(inner, values, scope if address is None else f"{scope}{address}/", mask)
        if not sites:
            return _jax.bind(eqn, values)
        if eqn.primitive in _jax.SCAN:
            return self._scan(eqn, values, scope, mask)
        if (branches := branches_of(eqn)) is not None:
            return self._branches(branches, values, scope, mask)
        if eqn.primitive is stochastic_p:  # sampled by the objective itself, which asks for no weight
            density = eqn.params["density"]
            return self.run(density.draw, values[: density.cut], scope, mask)[1:]
        raise unfollowable(eqn)

    def _branches(self, branches: Any, values: list[Any], scope: str, mask: Any) -> list[Any]:
        """Write out all branches, their sites masked where the branch is not taken."""
        index, operands = clamped(values[0], len(branches)), values[1:]
        results = []
        for number, branch in enumerate(branches):
            taken = index == number
            if mask is not None:
                taken = taken & jnp.reshape(mask, jnp.shape(mask) + (1,) * (jnp.ndim(taken) - jnp.ndim(mask)))
            results.append(self.run(branch, guarded(taken, operands), scope, taken))
        return [select(index, list(cases)) for cases in zip(*results, strict=True)]

    def _site(self, site: Site, operands: list[Any], scope: str, mask: Any) -> Any:
        if site.fixed:
            raise ControlFlowError(
                f"site {site.address!r} at {site.where} is observed inside an objective, which has no density of its "
                "own. Add its log density to the objective's value, or observe it in the model."
            )
        if mask is not None:
            site, operands = with_mask(site, operands, mask)
        bare, leaves, _ = site.split(operands)
        path = scope + site.address
        if path in self.strategies:
            bare = dataclasses.replace(bare, gradient=self.strategies[path])
        strategy, self.reasons[path] = resolve(bare, leaves)
        if "baseline" in site.extras and path not in self.strategies:
            strategy = site.gradient
        return rebind(dataclasses.replace(site, address=path, gradient=strategy), operands)

    def _scan(self, eqn: Any, values: list[Any], scope: str, mask: Any) -> list[Any]:
        """Choose the strategies of a scan's sites."""
        params, (num_consts, num_carry) = eqn.params, _jax.scan_sizes(eqn)
        consts, carry, xs = _cut(values, num_consts, num_carry)
        length, reverse = params["length"], params["reverse"]

        def step(carry: Any, x: Any) -> Any:
            before, self.costs = self.costs, []
            out = self.run(params["jaxpr"], [*consts, *carry, *x], scope, mask)
            costs, self.costs = self.costs, before
            return out[:num_carry], (out[num_carry:], costs)

        if self.unrolled.isdisjoint(_paths(params["jaxpr"], scope)):
            options = {"length": length, "reverse": reverse, "unroll": params["unroll"]}
            ones = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
            closed, shape = jax.make_jaxpr(step, return_shape=True)(list(carry), ones)
            if sums := sums_of(closed, num_carry):
                structure = jax.tree.structure(shape[1])
                carry, (ys, costs) = scan_with_sums(closed, structure, sums, list(carry), xs, **options)
            else:
                carry, (ys, costs) = jax.lax.scan(step, carry, xs, **options)
            self.costs += costs
            return [*carry, *ys]
        outputs: dict[int, Any] = {}
        for t in reversed(range(length)) if reverse else range(length):
            carry, (outputs[t], costs) = step(carry, [x[t] for x in xs])
            self.costs += costs
        ys = [jnp.stack([outputs[t][j] for t in range(length)]) for j in range(len(outputs[0]))]
        return [*carry, *ys]


def _cut(values: list[Any], num_consts: int, num_carry: int) -> tuple[list[Any], list[Any], list[Any]]:
    cut = num_consts + num_carry
    return values[:num_consts], values[num_consts:cut], values[cut:]


def _paths(jaxpr: Any, scope: str) -> Iterator[str]:
    """Yield the paths of the sites in a jaxpr."""
    for eqn in _jax.close(jaxpr)[0].eqns:
        if eqn.primitive is sample_p:
            yield scope + eqn.params["site"].address
        address = scope_address(eqn)
        for inner in _jax.sub_jaxprs(eqn):
            yield from _paths(inner, scope if address is None else f"{scope}{address}/")


def flatten(
    jaxpr: Any, args: Any, unrolled: frozenset[str] = frozenset(), strategies: Strategies | None = None
) -> tuple[Any, dict[str, str]]:
    """Return a closed jaxpr like `jaxpr`, flat, with a strategy at every site, and why by path.

    `strategies` replace those of the sites, by path.
    """
    flattener = _Flattener(unrolled, strategies or {})
    return jax.make_jaxpr(lambda *xs: flattener.objective(jaxpr, xs))(*args), flattener.reasons


def planned(jaxpr: Any, args: Any, strategies: Strategies | None = None) -> tuple[Any, Layout]:
    """Return a flat jaxpr with its layout, loops with sites that are enumerated jointly written out."""
    unrolled: frozenset[str] = frozenset()
    while True:
        flat, reasons = flatten(jaxpr, args, unrolled, strategies)
        layout = Layout(flat.jaxpr, reasons)
        jointly = frozenset(c.site.address for c in layout.choices if c.loops and c.mode == "jointly")
        if not jointly:
            check_linear(flat.jaxpr)
            return flat, layout
        unrolled |= jointly
