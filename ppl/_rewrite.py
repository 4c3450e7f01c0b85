"""Rewriting a program site by site: the same equations, scans, branches and nested models, with other sites in them.

A rule sees one lane of one site, as if no vmap and no scan stood around it: what it binds is batched again by JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from . import _jax
from ._branch import branch_p, branches_of
from ._distribution import over
from ._evaluate import underived
from ._nested import Choices, leaves_of
from ._nesting import nest, scope_address
from ._observe import Recorded, deterministic_p
from ._sample import Site, bind_site, sample_p
from ._staging import Staged, stage
from ._table import has_sites, unfollowable


class Place(NamedTuple):
    """One lane of a site: its path, its distribution, what it is bound with, and the data that the rewriting has."""

    path: str
    site: Site
    distribution: Any
    extras: dict[str, Any]
    data: Any

    @property
    def address(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    def bind(self, address: str | None = None, distribution: Any = None, **extras: Any) -> Any:
        """Bind the site again; what is not changed stays, an extra that is None goes."""
        kept = {"observed": self.site.observed, "gradient": self.site.gradient, **self.extras, **extras}
        d = self.distribution if distribution is None else distribution
        return bind_site(address or self.address, d, self.site.where, **kept)


Rule = Callable[[Place], Any]
Renaming = Callable[[str], str | None]


def rewritten(program: Any, rule: Rule, data: Choices | None = None, renaming: Renaming | None = None) -> Any:
    """Run a program's equations with a rule at every site; return what the program returns.

    A rule must not close over traced values, for branches over lanes and marginal programs are traced by themselves:
    what it needs goes by `data`.

    `data` is a nested dict by address; its leaves carry the site's time axes and lanes in front. `renaming` gives
    the new address of a nested model or of a recorded value, by its path; None drops a recorded value.
    """
    staged, outputs = outputs_of(program, rule, data, renaming)
    return staged.returned(outputs)


def outputs_of(
    program: Any, rule: Rule, data: Choices | None = None, renaming: Renaming | None = None
) -> tuple[Staged, list[Any]]:
    """Return the staged program, and its flat outputs under a rule; see `rewritten`."""
    staged = stage(program)
    walk = _Rewriting(rule, renaming or (lambda path: path.rsplit("/", 1)[-1]))
    return staged, walk.run(staged.jaxpr, staged.arguments, data or {}, "")


class _Rewriting(NamedTuple):
    rule: Rule
    renaming: Renaming

    def run(self, jaxpr: Any, args: Any, data: Choices, path: str) -> list[Any]:
        env, opened = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
        for eqn in opened.eqns:
            values = [env.read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, values, data, path), strict=True))
        return [env.read(v) for v in opened.outvars]

    def _equation(self, eqn: Any, values: list[Any], data: Choices, path: str) -> list[Any]:
        if eqn.primitive is sample_p:
            return [self._site(eqn.params["site"], values, data, path)]
        if eqn.primitive is deterministic_p:
            new = self.renaming(path + eqn.params["site"].address)
            return values if new is None else [_recorded(eqn.params["site"], new, values[0])]
        if not has_sites(eqn):
            return _jax.bind(eqn, values)
        with _jax.at_line_of(eqn):
            return self._inside(eqn, values, data, path)

    def _inside(self, eqn: Any, values: list[Any], data: Choices, path: str) -> list[Any]:
        inner = _jax.called_jaxpr(eqn)
        if (address := scope_address(eqn)) is not None:
            below = f"{path}{address}/"
            new = self.renaming(path + address) or address
            return nest(new, lambda: self.run(inner, values, data.get(address, {}), below))
        if inner is not None:
            return self.run(inner, values, data, path)
        if (custom := _jax.custom_jaxpr(eqn)) is not None:
            return underived(eqn, lambda values, data: self.run(custom, values, data, path))(values, data)
        if eqn.primitive in _jax.SCAN:
            return self._scan(eqn, values, data, path)
        if (branches := branches_of(eqn)) is not None:
            return self._branches(eqn, branches, values, data, path)
        if eqn.primitive.name == "marginal":
            return self._marginal(eqn, values, data, path)
        if eqn.primitive.name == "stochastic" and not self._meant(eqn, data, path):
            return _jax.bind(eqn, values)
        raise unfollowable(eqn)

    def _meant(self, eqn: Any, data: Choices, path: str) -> bool:
        """Tell whether a change is meant for choices that have one density together."""
        changed = dict(leaves_of(data))
        return any(
            name in changed or self.renaming(path + name) != name.rsplit("/", 1)[-1]
            for name, _ in eqn.params["density"].entries
        )

    def _site(self, site: Site, operands: list[Any], data: Choices, path: str) -> Any:
        count = site.structure.num_leaves

        def one(own: Any, operands: Any) -> Any:
            extras = dict(zip(site.extras, operands[count:], strict=True))
            d = site.distribution(operands[:count])
            return self.rule(Place(path + site.address, site, d, extras, own))

        return over(site.lanes, one)(data.get(site.address), list(operands))

    def _scan(self, eqn: Any, values: list[Any], data: Choices, path: str) -> list[Any]:
        num_consts, num_carry = _jax.scan_sizes(eqn)
        cut, params = num_consts + num_carry, eqn.params
        consts, carry, xs = values[:num_consts], values[num_consts:cut], values[cut:]
        here = {a: data[a] for a in _addresses(params["jaxpr"]) if a in data}

        def step(carry: Any, inputs: Any) -> Any:
            own, x = inputs
            out = self.run(params["jaxpr"], [*consts, *carry, *x], own, path)
            return out[:num_carry], out[num_carry:]

        carry, ys = lax.scan(
            step, carry, (here, xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*carry, *ys]

    def _marginal(self, eqn: Any, values: list[Any], data: Choices, path: str) -> list[Any]:
        """Rewrite the program whose choices are summed out; those themselves stay, at their addresses."""
        known = _addresses(eqn.params["jaxpr"])
        here = {a: value for a, value in data.items() if a in known}
        leaves, structure = jax.tree.flatten((values, here))
        walk = _Rewriting(self.rule, lambda p: p.rsplit("/", 1)[-1])

        def run(*xs: Any) -> list[Any]:
            values, own = jax.tree.unflatten(structure, xs)
            return walk.run(eqn.params["jaxpr"], values, own, path)

        closed = jax.make_jaxpr(run)(*leaves)
        return eqn.primitive.bind(*leaves, jaxpr=closed, hidden=eqn.params["hidden"])

    def _branches(self, eqn: Any, branches: Any, values: list[Any], data: Choices, path: str) -> list[Any]:
        index, *operands = values
        known = {a for branch in branches for a in _addresses(branch)}
        here = {a: value for a, value in data.items() if a in known}
        runs = [lambda xs, own, b=branch: self.run(b, xs, own, path) for branch in branches]
        if eqn.primitive is not branch_p:
            return lax.switch(index, runs, operands, here)
        leaves, structure = jax.tree.flatten((operands, here))
        closed = tuple(
            jax.make_jaxpr(lambda *xs, run=run: run(*jax.tree.unflatten(structure, xs)))(*leaves) for run in runs
        )
        return branch_p.bind(index, *leaves, branches=closed)


def _recorded(site: Recorded, address: str, value: Any) -> Any:
    """Record a value again, in its lanes."""

    def record(x: Any) -> Any:
        return deterministic_p.bind(x, site=Recorded(address, (), site.shape, site.dtype, site.where))

    for size in reversed(site.sizes):
        record = jax.vmap(record, axis_size=size)
    return record(value)


def _addresses(jaxpr: Any) -> set[str]:
    from ._table import site_table

    return set(site_table(jaxpr))
