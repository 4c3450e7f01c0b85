"""Pooled base noise: one random call for all straight-line sites of a scope, whatever the number of lanes.

Each site owns a stream of the counter-based generator, named by a code made of its address: word `i` of the stream is
`threefry(key, (code, i))` (Salmon et al. 2011). So a site's noise does not depend on which other sites there are, and
one call serves them all. Keys of another generator fall back to `fold_in` and one call per site.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax

_MANY = {"normal": 4, "uniform": 16}
"""From so many sites on, the numbers of a kind are made in a loop: see `_opaque`."""


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
    return dict(sorted(groups.items(), key=lambda group: group[0][0]))  # those of a kind side by side


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
    # a number is made of a word of each; or the first half of a site's numbers of `first`, the second of `second`
    bits = [first[None], second[None]] if words == 2 else [jnp.stack([first, second])]
    arrays, start = [], 0
    for kind, groups in itertools.groupby(zip(halves, plan, strict=True), key=lambda group: group[1][0]):
        sizes = [(len(codes), half, size * math.prod(lanes)) for half, (_, size, codes) in groups]
        end = start + sum(rows * half for rows, half, _ in sizes)
        numbers = _converted(kind, [word[:, start:end] for word in bits], sum(rows for rows, _, _ in sizes))
        arrays += _cut(numbers.astype(dtype), sizes)
        start = end
    return [array.reshape(len(codes), *lanes, size) for array, (_, size, codes) in zip(arrays, plan, strict=True)]


def _cut(numbers: jax.Array, sizes: list[tuple[int, int, int]]) -> list[jax.Array]:
    """Cut out an array of so many rows for each group, of so many words each, and keep as many numbers as are wanted."""
    ends = np.cumsum([rows * half for rows, half, _ in sizes])
    arrays = []
    for (rows, half, wanted), end in zip(sizes, ends, strict=True):
        own = numbers[:, end - rows * half : end].reshape(numbers.shape[0], rows, half)
        arrays.append(jnp.concatenate(list(own), axis=1)[:, :wanted])
    return arrays


def _stream(codes: tuple[int, ...], half: int) -> jax.Array:
    # a lookup, not a broadcast: XLA 0.10 for CPU makes a kernel of that which crashes at 17 to 19 codes
    return jnp.asarray(codes, jnp.uint32)[lax.broadcasted_iota(jnp.uint32, (len(codes), half), 0).reshape(-1)]


def _counter(count: int, half: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.uint32, (count, half), 1).reshape(-1)


def _converted(kind: str, bits: list[jax.Array], sites: int) -> jax.Array:
    """Turn words into numbers, one or two words each."""
    convert = functools.partial(_convert, kind)
    return _opaque(convert, bits) if sites >= _MANY[kind] else convert(*bits)


def _opaque(convert: Callable[..., jax.Array], bits: list[jax.Array]) -> jax.Array:
    """Convert in a loop of two steps.

    XLA compiles what it can see through once more for each site that reads it, but it does not look into loops.
    """
    shape, count = bits[0].shape, bits[0].size
    halves = [jnp.pad(word.reshape(-1), (0, count % 2)).reshape(2, -1) for word in bits]
    return lax.map(lambda words: convert(*words), halves).reshape(-1)[:count].reshape(shape)


def _convert(kind: str, *bits: jax.Array) -> jax.Array:
    """Turn words into numbers: `(k + 1/2) 2^-m`, never 0 or 1; normals by the inverse of the distribution function."""
    if len(bits) == 2:
        high, low = (word.astype(jnp.uint64) for word in bits)
        whole = ((high << 32) | low) >> 12
        uniform = (whole.astype(jnp.float64) + 0.5) * 2.0**-52
    else:
        uniform = ((bits[0] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return uniform if kind == "uniform" else math.sqrt(2.0) * lax.erf_inv(2.0 * uniform - 1.0)


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
