"""Pooled base noise: one random call for all straight-line sites of a scope, whatever the number of lanes.

Each site owns a stream of the counter-based generator, named by a code made of its address: word `i` of the stream is
`threefry(key, (code, i))` (Salmon et al. 2011). So a site's noise does not depend on which other sites there are, and
one call serves them all. Keys of another generator fall back to `fold_in` and one call per site.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax

_MANY_ROWS = 16
"""From so many sites on, the numbers of one kind and size are made in a loop."""


class Request(NamedTuple):
    """What a site wants: a stream, `"normal"` or `"uniform"` (open unit interval), and how many numbers."""

    code: int
    kind: str
    size: int


class Noise:
    """Base noise handed to a site: one row of an array that serves all sites that want as many numbers."""

    def __init__(self, pool: Any, row: int, shape: tuple[int, ...]):
        """Refer to a row; it is cut out when it is asked for."""
        self.pool, self.row, self.shape = pool, row, shape

    @property
    def values(self) -> Any:
        """The site's numbers, in the shape of its value."""
        return self.pool[self.row].reshape(self.shape)

    @staticmethod
    def stacked(sources: list[Noise]) -> Any:
        """Return the numbers of several sites of one shape, along a new first axis."""
        first, rows = sources[0], [source.row for source in sources]
        if any(source.pool is not first.pool for source in sources):
            return jnp.stack([source.values for source in sources])
        pool = first.pool if rows == list(range(len(first.pool))) else first.pool[jnp.asarray(rows)]
        return pool.reshape(len(sources), *first.shape)


def noise(key: jax.Array, requests: list[Request], dtype: Any, steps: int | None = None) -> list[jax.Array]:
    """Draw the noise of all requests at once, an array for each kind and size; `places` tells whose is what.

    The arrays have shape `(rows, size)`, for a number of steps `(rows, steps, size)`.
    """
    groups = _groups(requests)
    plan = tuple((kind, size, tuple(requests[n].code for n in ns)) for (kind, size), ns in groups.items())
    outer = () if steps is None else (Around(steps, None),)
    return noise_p.bind(key, plan=plan, outer=outer, dtype=jnp.dtype(dtype))


def places(requests: list[Request]) -> list[tuple[int, int]]:
    """Return for each request which array, and which of its rows, is its own."""
    rows = {n: (a, row) for a, ns in enumerate(_groups(requests).values()) for row, n in enumerate(ns)}
    return [rows[n] for n in range(len(requests))]


def _groups(requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    groups: dict[tuple[str, int], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault((request.kind, request.size), []).append(number)
    return groups


class Around(NamedTuple):
    """A vmap (or a loop) around the noise; `key_dim` None: the library's own, whose lanes (or steps) share the key."""

    size: int
    key_dim: int | None


def _implementation(key: jax.Array, *, plan: Any, outer: Any, dtype: Any) -> list[jax.Array]:
    """Draw the library's lanes from one stream, and what has keys of its own from those keys."""
    mapped = [n for n, around in enumerate(outer) if around.key_dim is not None]
    shared = [n for n, around in enumerate(outer) if around.key_dim is None]
    lanes = tuple(outer[n].size for n in reversed(shared))

    def draw(key: jax.Array) -> list[jax.Array]:
        return _draw(key, plan, lanes, dtype)

    for n in mapped:
        draw = jax.vmap(draw, outer[n].key_dim, 1)
    stands = [*reversed(mapped), *reversed(shared)]  # the vmaps of the arrays' axes, which the later ones precede
    order = [1 + stands.index(n) for n in reversed(range(len(outer)))]
    return [jnp.transpose(array, (0, *order, array.ndim - 1)) for array in draw(key)]


def _draw(key: jax.Array, plan: Any, lanes: tuple[int, ...], dtype: Any) -> list[jax.Array]:
    """Return for each `(kind, size, codes)` of the plan an array of shape `(codes, *lanes, size)`."""
    words = 2 if jnp.dtype(dtype).itemsize == 8 else 1
    if not _jax.is_threefry(key):
        return [_draw_by_site(key, kind, size, codes, lanes, dtype) for kind, size, codes in plan]
    halves = [-(-size * words * math.prod(lanes) // 2) for _, size, _ in plan]
    high = jnp.concatenate([_stream(codes, half) for half, (_, _, codes) in zip(halves, plan, strict=True)])
    low = jnp.concatenate([_counter(len(codes), half) for half, (_, _, codes) in zip(halves, plan, strict=True)])
    first, second = _jax.threefry(key, high, low)
    arrays, start = [], 0
    for half, (kind, size, codes) in zip(halves, plan, strict=True):
        cut = slice(start, start + len(codes) * half)
        start = cut.stop
        both = jnp.concatenate([first[cut].reshape(len(codes), half), second[cut].reshape(len(codes), half)], axis=1)
        bits = both[:, : size * words * math.prod(lanes)]
        arrays.append(_converted(kind, bits, words, dtype).reshape(len(codes), *lanes, size))
    return arrays


def _stream(codes: tuple[int, ...], half: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(codes, jnp.uint32)[:, None], (len(codes), half)).reshape(-1)


def _counter(count: int, half: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.uint32, (count, half), 1).reshape(-1)


def _converted(kind: str, bits: jax.Array, words: int, dtype: Any) -> jax.Array:
    """Turn words into numbers, those of many sites in a loop of two steps.

    XLA compiles what it can see through once more for each site that reads it, but it does not look into loops.
    """
    rows = len(bits)
    if rows < _MANY_ROWS:
        return _convert(kind, bits, words, dtype)
    halves = jnp.pad(bits, ((0, rows % 2), (0, 0))).reshape(2, -1, bits.shape[1])
    numbers = lax.map(lambda half: _convert(kind, half, words, dtype), halves)
    return numbers.reshape(-1, numbers.shape[-1])[:rows]


def _convert(kind: str, bits: jax.Array, words: int, dtype: Any) -> jax.Array:
    """Turn words into numbers: `(k + 1/2) 2^-m`, never 0 or 1; normals by the inverse of the distribution function."""
    if words == 2:
        count = bits.shape[1] // 2
        high, low = bits[:, :count].astype(jnp.uint64), bits[:, count:].astype(jnp.uint64)
        whole = ((high << 32) | low) >> 12
        uniform = (whole.astype(jnp.float64) + 0.5) * 2.0**-52
    else:
        uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    if kind == "uniform":
        return uniform.astype(dtype)
    return (math.sqrt(2.0) * lax.erf_inv(2.0 * uniform - 1.0)).astype(dtype)


def _draw_by_site(key: jax.Array, kind: str, size: int, codes: Any, lanes: tuple[int, ...], dtype: Any) -> jax.Array:
    def one(code: jax.Array) -> jax.Array:
        own, shape = jax.random.fold_in(key, code), (*lanes, size)
        if kind == "normal":
            return jax.random.normal(own, shape, dtype)
        return jax.random.uniform(own, shape, dtype, minval=jnp.finfo(dtype).tiny)

    return jnp.stack([one(jnp.uint32(code)) for code in codes])


def _abstract(*_: Any, plan: Any, outer: Any, dtype: Any) -> Any:
    lanes = tuple(around.size for around in reversed(outer))
    return [_jax.ShapedArray((len(codes), *lanes, size), dtype) for _, size, codes in plan]


def _batch(axis: Any, args: Any, dims: Any, *, plan: Any, outer: Any, dtype: Any) -> Any:
    (key_dim,) = dims
    own = isinstance(axis.name, _jax.LaneAxis)
    if key_dim is None and not own:
        return noise_p.bind(*args, plan=plan, outer=outer, dtype=dtype), [None] * len(plan)
    wider = (*outer, Around(axis.size, key_dim))
    return noise_p.bind(*args, plan=plan, outer=wider, dtype=dtype), [1] * len(plan)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    del tangents  # a key has none
    values = noise_p.bind(*primals, **params)
    return values, [_jax.zero_tangent(v) for v in values]


def _eager(*args: Any, **params: Any) -> list[jax.Array]:
    return jax.jit(_implementation, static_argnames=tuple(params))(*args, **params)


noise_p = _jax.define_primitive(
    "base_noise",
    abstract=_abstract,
    batch=_batch,
    implementation=_eager,
    lowering=_jax.lower_as(_implementation, multiple_results=True),
    jvp=_jvp,
    multiple_results=True,
)
