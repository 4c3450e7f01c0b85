"""Which choices does each site, and each output, depend on? Read off the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _jax
from ._branch import branches_of
from ._nesting import scope_address
from ._observe import deterministic_p
from ._sample import sample_p
from ._table import has_sites

Paths = frozenset[str]


class Dependences(NamedTuple):
    """`parents[path]`: the choices whose values enter a site's distribution (or a recorded value) directly.

    `outputs`: the same for each output of the equations.
    """

    parents: dict[str, Paths]
    outputs: list[Paths]

    def ancestors(self, paths: Paths) -> Paths:
        """Return some choices and all that they depend on, however far."""
        known: set[str] = set()
        stack = list(paths)
        while stack:
            path = stack.pop()
            if path not in known:
                known.add(path)
                stack.extend(self.parents.get(path, ()))
        return frozenset(known)


def dependences(jaxpr: Any) -> Dependences:
    """Return the dependences of a staged program."""
    parents: dict[str, Paths] = {}
    outputs = _flow(jaxpr, [frozenset()] * len(_jax.close(jaxpr)[0].invars), "", frozenset(), parents)
    return Dependences(parents, outputs)


def _flow(jaxpr: Any, inputs: list[Paths], path: str, taken: Paths, parents: dict[str, Paths]) -> list[Paths]:
    """Return what each output depends on; `taken` are the choices that decide whether the equations run."""
    opened = _jax.close(jaxpr)[0]
    known: dict[Any, Paths] = dict(zip(opened.invars, inputs, strict=True))

    def read(atom: Any) -> Paths:
        return frozenset() if isinstance(atom, _jax.Literal) else known.get(atom, frozenset())

    for eqn in opened.eqns:
        outputs = _equation(eqn, [read(v) for v in eqn.invars], path, taken, parents)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in opened.outvars]


def _equation(eqn: Any, inputs: list[Paths], path: str, taken: Paths, parents: dict[str, Paths]) -> list[Paths]:
    joined = frozenset().union(*inputs)
    if eqn.primitive in (sample_p, deterministic_p):
        site = eqn.params["site"]
        here = path + site.address
        parents[here] = parents.get(here, frozenset()) | joined | taken
        if eqn.primitive is deterministic_p:
            return [joined]
        if site.fixed:
            return [inputs[site.structure.num_leaves + site.extras.index("value")]]
        return [frozenset({here})]
    if not has_sites(eqn):
        return [joined] * len(eqn.outvars)
    if (address := scope_address(eqn)) is not None:
        return _flow(_jax.called_jaxpr(eqn), inputs, f"{path}{address}/", taken, parents)
    inner = _jax.called_jaxpr(eqn)
    inner = _jax.custom_jaxpr(eqn) if inner is None else inner
    if inner is not None:
        return _flow(inner, inputs, path, taken, parents)
    if (branches := branches_of(eqn)) is not None:
        runs = [_flow(b, inputs[1:], path, taken | inputs[0], parents) for b in branches]
        return [inputs[0].union(*cases) for cases in zip(*runs, strict=True)]
    if eqn.primitive.name == "marginal":
        return _marginal(eqn, inputs, path, taken, parents)
    if eqn.primitive.name == "stochastic":
        own = [path + name for name, _ in eqn.params["density"].entries]
        for here in own:
            parents[here] = parents.get(here, frozenset()) | joined | taken
        return [frozenset(own)] * len(own)
    num_consts, num_carry = _jax.scan_sizes(eqn)
    cut = num_consts + num_carry
    carry = inputs[num_consts:cut]
    while True:  # the carry's dependence only grows
        outputs = _flow(eqn.params["jaxpr"], [*inputs[:num_consts], *carry, *inputs[cut:]], path, taken, parents)
        wider = [a | b for a, b in zip(carry, outputs[:num_carry], strict=True)]
        if wider == carry:
            return [*carry, *outputs[num_carry:]]
        carry = wider


def _marginal(eqn: Any, inputs: list[Paths], path: str, taken: Paths, parents: dict[str, Paths]) -> list[Paths]:
    """Sites that depend on a choice that is summed out depend on what it depends on."""
    own: dict[str, Paths] = {}
    outputs = _flow(eqn.params["jaxpr"], inputs, path, taken, own)
    hidden = {path + name for name in eqn.params["hidden"]}
    for child, found in own.items():
        if child in hidden:
            continue
        while found & hidden:
            through = found & hidden
            found = (found - hidden).union(*(own[name] - {name} for name in through))
        parents[child] = parents.get(child, frozenset()) | found
    return outputs
