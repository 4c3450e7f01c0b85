"""Drawing and scoring like sites together: two hundred gamma sites compile one sampler instead of two hundred.

Samplers that loop (gamma, beta, Poisson) are most of the compile time of models written site by site. Equations are
pure, so they may run in any order that respects their inputs: sites of one kind whose parameters are known at the same
time are drawn by one vmap over their own keys. The draws are those of the sites one by one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _jax
from ._evaluate import NOTHING, Outcome, Visitor, joined, walk
from ._sample import Site, sample_p

_MOST_NUMBERS = 1024
"""Larger sites are drawn alone: they gain nothing, and lose the fused draw of their lanes."""

_FEWEST_TOGETHER = 4
"""Fewer like sites are drawn and scored one by one: stacking them would cost more than it saves."""


class _Alike(NamedTuple):
    """A drawn site that may be scored together with its like."""

    site: Site
    leaves: list[Any]
    value: Any


def walk_together(
    equations: Any, env: _jax.Environment, visitor: Visitor, found: list[list[Any]], given: dict[str, Any]
) -> Outcome:
    """Walk equations in an order in which like sites are drawn, and then scored, together; see `evaluate`."""
    outcomes: dict[int, Outcome] = {}
    alike: dict[int, _Alike] = {}
    for step in schedule(equations, found, given):
        leaves = [[env.read(v) for v in equations[i].invars] for i in step]
        if signature(equations[step[0]], found[step[0]], given) is None:
            (i,) = step
            outcomes[i] = walk([equations[i]], env, visitor, iter(found[i]), given)
            continue
        sites = [equations[i].params["site"] for i in step]
        values = _draw_together(visitor, sites, leaves, [found[i][0] for i in step])
        for i, site, own, value in zip(step, sites, leaves, values, strict=True):
            alike[i] = _Alike(site, own, value)
            env[equations[i].outvars[0]] = alike[i].value
            outcomes[i] = NOTHING._replace(choices={alike[i].site.address: alike[i].value})
    for i, log_density in _score_together(alike).items():
        outcomes[i] = outcomes[i]._replace(log_density=log_density)
    total = NOTHING
    for i in range(len(equations)):
        total = joined(total, outcomes[i])
    return total


def schedule(equations: Any, found: list[list[Any]], given: dict[str, Any]) -> list[list[int]]:
    """Return the equations' numbers in the order of a walk; those in one list are sites to be drawn together."""
    kinds = [signature(eqn, own, given) for eqn, own in zip(equations, found, strict=True)]
    known = [kind for kind in kinds if kind is not None]
    if _jax.lane_axes() or len(set(known)) == len(known):
        return [[i] for i in range(len(equations))]
    level: dict[Any, int] = {}
    plain: dict[int, list[int]] = {}
    groups: dict[int, dict[Any, list[int]]] = {}
    for i, (eqn, kind) in enumerate(zip(equations, kinds, strict=True)):
        here = max((level.get(v, 0) for v in eqn.invars if not isinstance(v, _jax.Literal)), default=0)
        if kind is None:
            plain.setdefault(here, []).append(i)
        else:
            groups.setdefault(here, {}).setdefault(kind, []).append(i)
        level.update((v, here + (kind is not None)) for v in eqn.outvars)
    steps: list[list[int]] = []
    for here in range(max([*plain, *groups], default=-1) + 1):
        steps += [[i] for i in plain.get(here, [])]
        for group in groups.get(here, {}).values():
            steps += [group] if len(group) >= _FEWEST_TOGETHER else [[i] for i in group]
    return steps


def signature(eqn: Any, own: list[Any], given: dict[str, Any]) -> Any:
    """Return what two drawn sites must share to be treated together; None where a site stands alone."""
    if eqn.primitive is not sample_p or len(own) != 1 or own[0] is None:
        return None
    site: Site = eqn.params["site"]
    if site.extras or site.address in given or math.prod(site.value_shape) > _MOST_NUMBERS:
        return None
    types = tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars)
    return (type(own[0]), site.structure, site.lanes, site.shape, site.dtype, types)


def _draw_together(visitor: Visitor, sites: list[Site], leaves: list[list[Any]], sources: list[Any]) -> list[Any]:
    """Draw sites of one signature in one call."""
    assert visitor.draw is not None and visitor.draw_alike is not None
    if len(sites) == 1:
        return [visitor.draw(sites[0], leaves[0], sources[0])]
    values = visitor.draw_alike(sites, [_stacked(xs) for xs in zip(*leaves, strict=True)], sources)
    return [values[n] for n in range(len(sites))]


def _stacked(values: Any) -> Any:
    """Stack values; known ones without leaving an operation behind."""
    if all(isinstance(x, (bool, int, float, np.ndarray, np.generic)) for x in values):
        return jnp.asarray(np.stack([np.asarray(x, jnp.result_type(x)) for x in values]))
    return jnp.stack([jnp.asarray(x) for x in values])


def _score_together(sites: dict[int, _Alike]) -> dict[int, Any]:
    """Return the sites' log densities; the sum of those of one kind under the number of the first."""
    groups: dict[Any, list[int]] = {}
    for i, (site, leaves, value) in sites.items():
        types = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        kind = (site.structure, site.lanes, site.shape, types, jnp.result_type(value))
        groups.setdefault(i if _jax.lane_axes() else kind, []).append(i)
    found = {}
    for group in groups.values():
        first = sites[group[0]].site
        if len(group) < _FEWEST_TOGETHER:
            found.update((i, jnp.sum(sites[i].site.log_density(sites[i].value, sites[i].leaves))) for i in group)
            continue
        values = jnp.stack([sites[i].value for i in group])
        leaves = [_stacked(xs) for xs in zip(*(sites[i].leaves for i in group), strict=True)]
        found[group[0]] = jnp.sum(jax.vmap(lambda v, xs, site=first: site.log_density(v, xs))(values, leaves))
    return found
