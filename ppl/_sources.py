"""Where the sites of a scope get their randomness from: pooled noise, or a key of their own."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _jax
from ._nesting import scope_address
from ._noise import Noise, Request, noise, places
from ._pathwise import rule_of
from ._sample import Site, sample_p

Wanted = Callable[[Site], bool]


_MOST_AHEAD = 2**22
"""The most numbers, per lane, that are drawn ahead of a loop."""


class Plan(NamedTuple):
    """Which sites, nested models and scans of some equations want randomness: `(equation, site or None, code)` each.

    `pooled` and `keyed` are the numbers of those that take noise, and a key of their own.
    """

    items: list[tuple[int, Site | None, int]]
    pooled: list[int]
    keyed: list[int]
    equations: int


class Drawn(NamedTuple):
    """The randomness of a plan: arrays of noise, and keys (None: nothing wanted one)."""

    noise: list[jax.Array]
    keys: Any


def planned(equations: Any, wanted: Wanted = lambda site: True, keyed: Wanted = lambda site: False) -> Plan:
    """Plan the randomness of some equations; a site that is not `wanted` (its value is given) gets none.

    Sites that are `keyed` get a key of their own, whatever their distribution.

    A source is made of the address (and, in objectives, of how often the address came before), so that adding a site
    leaves the draws of the others alone.
    """
    counts: dict[str, int] = {}
    codes: set[int] = set()
    items = [(i, *item) for i, eqn in enumerate(equations) for item in _items([eqn], counts, codes)]
    drawn = [n for n, (_, site, _) in enumerate(items) if site is None or (not site.fixed and wanted(site))]
    pooled = [n for n in drawn if (site := items[n][1]) is not None and _pools(site) and not keyed(site)]
    return Plan(items, pooled, sorted(set(drawn) - set(pooled)), len(equations))


def drawn(plan: Plan, key: Any) -> Drawn:
    """Draw the randomness of a plan, everything at once."""
    arrays = noise(key, _requests(plan), jnp.result_type(float)) if plan.pooled else []
    if not plan.keyed:
        return Drawn(arrays, None)
    number_of = jnp.asarray([plan.items[n][2] for n in plan.keyed], jnp.uint32)
    return Drawn(arrays, jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number_of))


def drawn_for_steps(plan: Plan, key: Any, length: int) -> tuple[Any, Callable[[Any], Drawn]]:
    """Draw the randomness of a loop's steps ahead of it: one random call, not one a step.

    Returns what each step takes as input, and a function that makes its `Drawn` of that. Where it would fill the
    memory each step draws its own.
    """
    requests = _requests(plan)
    if length * sum(request.size for request in requests) > _MOST_AHEAD:
        return jax.random.split(key, length), lambda own: drawn(plan, own)
    arrays = noise(key, requests, jnp.result_type(float), steps=length) if requests else []
    ahead = [jnp.moveaxis(array, 1, 0) for array in arrays]
    if not plan.keyed:
        return Drawn(ahead, None), lambda own: own
    of_steps = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(length, dtype=jnp.uint32))
    keys = jax.vmap(lambda own: drawn(plan._replace(pooled=[]), own).keys)(of_steps)
    return Drawn(ahead, keys), lambda own: own


def handed_out(plan: Plan, drawn: Drawn) -> list[list[Any]]:
    """Return for each equation, in the order of a walk, the sources of what is in it: `Noise`, a key, or None."""
    found: dict[int, Any] = {}
    if plan.pooled:
        for n, (number, row) in zip(plan.pooled, places(_requests(plan)), strict=True):
            site = plan.items[n][1]
            assert site is not None
            found[n] = Noise(drawn.noise[number], row, site.value_shape)
    found.update((n, drawn.keys[m]) for m, n in enumerate(plan.keyed))
    result: list[list[Any]] = [[] for _ in range(plan.equations)]
    for n, (i, _, _) in enumerate(plan.items):
        result[i].append(found.get(n))
    return result


def sources(equations: Any, key: Any, wanted: Wanted = lambda site: True) -> Iterator[Any]:
    """Return, in the order of a walk, one source per site, nested model and scan of some equations."""
    return itertools.chain(*sources_of_each(equations, key, wanted))


def sources_of_each(equations: Any, key: Any, wanted: Wanted = lambda site: True) -> list[list[Any]]:
    """Return the sources of each equation; see `planned`."""
    plan = planned(equations, wanted)
    return handed_out(plan, drawn(plan, key))


def _requests(plan: Plan) -> list[Request]:
    return [_request(plan.items[n]) for n in plan.pooled]


def _pools(site: Site) -> bool:
    return rule_of(site.distribution([None] * site.structure.num_leaves)) is not None


def _request(item: Any) -> Request:
    _, site, code = item
    rule = rule_of(site.distribution([None] * site.structure.num_leaves))
    assert rule is not None
    return Request(code, rule.kind, math.prod(site.value_shape))


def _items(equations: Any, counts: dict[str, int], codes: set[int]) -> Iterator[tuple[Any, int]]:
    """Yield `(site or None, code)` of all that draws, calls that only wrap written out."""
    for eqn in equations:
        site = eqn.params["site"] if eqn.primitive is sample_p else None
        if site is not None:
            label = site.address
        elif not _jax.holds(eqn, sample_p):
            continue
        elif (address := scope_address(eqn)) is not None:
            label = address + "/"
        elif (inner := _jax.called_jaxpr(eqn)) is not None:
            yield from _items(_jax.close(inner)[0].eqns, counts, codes)
            continue
        else:
            label = "/".join(("", eqn.primitive.name, *sorted({a for j in _jax.sub_jaxprs(eqn) for a in addresses(j)})))
        yield site, _code(label, counts, codes)


def _code(label: str, counts: dict[str, int], codes: set[int]) -> int:
    """Return a code of 32 bits, the first one set: never a counter that `split` or `fold_in` uses."""
    counts[label] = counts.get(label, 0) + 1
    code = zlib.crc32(f"{label}#{counts[label]}".encode()) | 0x80000000
    while code in codes:  # two labels with one checksum
        code = ((code + 1) % 2**32) | 0x80000000
    codes.add(code)
    return code


def addresses(jaxpr: Any, *others: Any) -> Iterator[str]:
    """Yield the addresses of all sites (and of other primitives with a `site`) in a jaxpr, however deep."""
    for eqn in _jax.close(jaxpr)[0].eqns:
        if eqn.primitive is sample_p or eqn.primitive in others:
            yield eqn.params["site"].address
        for inner in _jax.sub_jaxprs(eqn):
            yield from addresses(inner, *others)
