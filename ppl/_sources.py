"""Where the sites of a scope get their randomness from: pooled noise, or a key of their own."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from . import _jax
from ._nesting import scope_address
from ._noise import Noise, Request, noise
from ._pathwise import rule_of
from ._sample import Site, sample_p

Wanted = Callable[[Site], bool]


def sources(equations: Any, key: Any, wanted: Wanted = lambda site: True) -> Iterator[Any]:
    """Return, in the order of a walk, one source per site, nested model and scan of some equations.

    A source is `Noise` or a key; None for a site that is not `wanted` (its value is given). Each is made of the
    address (and, in objectives, of how often the address came before), so that adding a site leaves the draws of the
    others alone.
    """
    return itertools.chain(*sources_of_each(equations, key, wanted))


def sources_of_each(equations: Any, key: Any, wanted: Wanted = lambda site: True) -> list[list[Any]]:
    """Return the sources of each equation; see `sources`."""
    counts: dict[str, int] = {}
    codes: set[int] = set()
    items = [(i, item) for i, eqn in enumerate(equations) for item in _items([eqn], counts, codes)]
    drawn = [n for n, (_, (site, _)) in enumerate(items) if site is None or (not site.fixed and wanted(site))]
    pooled = [n for n in drawn if (site := items[n][1][0]) is not None and _pools(site)]
    keyed = sorted(set(drawn) - set(pooled))
    found: dict[int, Any] = {}
    if pooled:
        dtype = jnp.result_type(float)
        rows = noise(key, [_request(*items[n][1]) for n in pooled], dtype)
        for n, (array, row) in zip(pooled, rows, strict=True):
            found[n] = Noise(array, row, items[n][1][0].value_shape)
    if keyed:
        number_of = jnp.asarray([items[n][1][1] for n in keyed], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number_of)
        found.update((n, keys[m]) for m, n in enumerate(keyed))
    result: list[list[Any]] = [[] for _ in equations]
    for n, (i, _) in enumerate(items):
        result[i].append(found.get(n))
    return result


def _pools(site: Site) -> bool:
    return rule_of(site.distribution([None] * site.structure.num_leaves)) is not None


def _request(site: Site, code: int) -> Request:
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
