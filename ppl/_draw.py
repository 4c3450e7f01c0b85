"""`draw`: one random draw for all lanes.

A vmap that does not map the key, and that the library made (`_jax.over_lanes`) or that stands in the model, extends
the lanes of a single draw. A user's own vmap keeps JAX's meaning: with a mapped key it equals a loop over the keys,
with an unmapped key every lane sees the same noise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _jax
from ._distribution import Lane, NotFusable, align, batched, draw_type, lane_shape, rebuild, type_of

_ODD = (1009,)
"""A size that no distribution has for an axis of its own, to see where a sampler puts its sample axes."""


class KeyLane(NamedTuple):
    """A vmap around a draw: `key_dim` is the mapped axis of the key, `axis` the library's name if it made the vmap."""

    lane: Lane
    key_dim: int | None
    axis: _jax.LaneAxis | None


def draw(key: jax.Array, structure: Any, lanes: tuple[Lane, ...], leaves: Any) -> jax.Array:
    """Draw one value per lane, shape `lanes + batch + event`; lanes are independent."""
    plain = structure_type(structure, lanes, leaves)
    return draw_p.bind(
        key, *leaves, structure=structure, inner=lanes, outer=(), shape=plain.shape, dtype=jnp.dtype(plain.dtype)
    )


def structure_type(structure: Any, lanes: tuple[Lane, ...], leaves: Any) -> jax.ShapeDtypeStruct:
    """Return shape (lanes first) and dtype of a draw."""
    one = draw_type(structure, lane_types(lanes, [type_of(leaf) for leaf in leaves]))
    return jax.ShapeDtypeStruct(lane_shape(lanes) + one.shape, one.dtype)


def lane_types(lanes: tuple[Lane, ...], types: list[Any]) -> list[jax.ShapeDtypeStruct]:
    """Return the parameters' types in one lane."""
    for lane in reversed(lanes):
        types = [_without(t, d) for t, d in zip(types, lane.dims, strict=True)]
    return types


def _without(t: Any, dim: int | None) -> jax.ShapeDtypeStruct:
    shape = t.shape if dim is None else t.shape[:dim] + t.shape[dim + 1 :]
    return jax.ShapeDtypeStruct(shape, t.dtype, weak_type=t.weak_type)


def fused_sample(key: jax.Array, structure: Any, lanes: tuple[Lane, ...], leaves: Any) -> jax.Array:
    """Draw all lanes from one key."""
    if all(dim is None for lane in lanes for dim in lane.dims):
        d = rebuild(structure, leaves)
        # some samplers put the sample axes elsewhere: an odd shape shows where they go, whatever the sizes
        odd = jax.eval_shape(lambda key: d.sample(key, _ODD), key).shape if lanes and d.shape() else None
        if odd is not None and odd != _ODD + tuple(d.shape()):
            return _split_sample(key, structure, lanes, leaves)
        return jnp.asarray(d.sample(key, lane_shape(lanes)))
    aligned = rebuild(structure, align(lanes, leaves))
    try:
        whole = batched(aligned, len(lanes), lane_shape(lanes) + tuple(aligned.batch_shape))
    except NotFusable:
        return _split_sample(key, structure, lanes, leaves)
    return jnp.asarray(whole.sample(key))


def _split_sample(key: jax.Array, structure: Any, lanes: tuple[Lane, ...], leaves: Any) -> jax.Array:
    def one(key: jax.Array, leaves: Any) -> jax.Array:
        return jnp.asarray(rebuild(structure, leaves).sample(key))

    for lane in lanes:
        one = jax.vmap(one, in_axes=(0, list(lane.dims)), axis_size=lane.size)
    return one(jax.random.split(key, lane_shape(lanes)), list(leaves))


def _implementation(key: jax.Array, *leaves: Any, structure: Any, inner: Any, outer: Any, **_: Any) -> jax.Array:
    if (at := _shared_inside_lanes(outer)) is not None:
        # all of a vmap that shares its noise sees what would be drawn without it: reruns depend on that
        rest, dims = _moved_out(outer, at)

        def one(key: jax.Array, leaves: Any) -> jax.Array:
            return _implementation(key, *leaves, structure=structure, inner=inner, outer=rest)

        mapped = jax.vmap(one, in_axes=(None, list(dims)), axis_size=outer[at].lane.size)
        return jnp.moveaxis(mapped(key, list(leaves)), 0, len(rest) - at)
    lanes, rest = tuple(inner), list(outer)
    while rest and rest[0].key_dim is None and rest[0].axis is not None:
        lanes += (rest.pop(0).lane,)

    def sample(key: jax.Array, leaves: Any) -> jax.Array:
        return fused_sample(key, structure, lanes, leaves)

    for around in rest:
        sample = _vmapped(sample, around)
    return sample(key, list(leaves))


def _shared_inside_lanes(outer: Any) -> int | None:
    """Return the place of a vmap that shares its noise and has lanes of the library around it."""
    library = [n for n, around in enumerate(outer) if around.key_dim is None and around.axis is not None]
    shared = [n for n, around in enumerate(outer) if around.key_dim is None and around.axis is None]
    return next((n for n in reversed(shared) if library and n < library[-1]), None)


def _moved_out(outer: Any, at: int) -> tuple[tuple[KeyLane, ...], tuple[int | None, ...]]:
    """Take one vmap out; return the others, and where its axes stand in the leaves when all are there."""
    rest, places = list(outer[:at]), list(outer[at].lane.dims)
    for around in outer[at + 1 :]:
        dims = list(around.lane.dims)
        for j, (dim, place) in enumerate(zip(dims, places, strict=True)):
            if dim is not None and place is not None:
                places[j] = place + (dim <= place)
                dims[j] = dim - (places[j] < dim)
        rest.append(around._replace(lane=Lane(around.lane.size, tuple(dims))))
    return tuple(rest), tuple(places)


def _vmapped(sample: Any, around: KeyLane) -> Any:
    size, dims = around.lane
    if around.key_dim is None and around.axis is not None:  # the library's lanes around lanes with keys of their own
        mapped = jax.vmap(sample, in_axes=(0, list(dims)), axis_size=size)
        return lambda key, leaves: mapped(_jax.split_each(key, size), leaves)
    return jax.vmap(sample, in_axes=(around.key_dim, list(dims)), axis_size=size)


def _abstract(*_: Any, shape: Any, dtype: Any, **__: Any) -> Any:
    return _jax.ShapedArray(shape, dtype)


def _batch(axis: Any, args: Any, dims: Any, *, outer: Any, shape: Any, **params: Any) -> tuple[Any, int | None]:
    key_dim, *leaf_dims = dims
    name = axis.name if isinstance(axis.name, _jax.LaneAxis) else None
    if name is None and all(d is None for d in dims):
        return draw_p.bind(*args, outer=outer, shape=shape, **params), None
    around = KeyLane(Lane(axis.size, tuple(leaf_dims)), key_dim, name)
    return draw_p.bind(*args, outer=(*outer, around), shape=(axis.size, *shape), **params), 0


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    """Differentiate through the sampler (pathwise), noise held fixed."""
    key, *leaves = primals
    moving = [j for j, t in enumerate(tangents[1:]) if not _jax.is_zero(t)]
    for name in _jax.lane_axes():  # a derivative taken inside the library's lanes: give each lane its own key
        if name not in {around.axis for around in params["outer"]}:
            key = jax.random.fold_in(key, _jax.axis_index(name))

    def sample(*moved: Any) -> jax.Array:
        filled = list(leaves)
        for j, value in zip(moving, moved, strict=True):
            filled[j] = value
        return _implementation(key, *filled, **params)

    if not moving or not jnp.issubdtype(params["dtype"], jnp.inexact):
        value = sample(*[leaves[j] for j in moving])
        return value, _jax.zero_tangent(value)
    return jax.jvp(sample, [leaves[j] for j in moving], [tangents[1 + j] for j in moving])


def _eager(*args: Any, **params: Any) -> jax.Array:
    return jax.jit(_implementation, static_argnames=tuple(params))(*args, **params)


draw_p = _jax.define_primitive(
    "draw", abstract=_abstract, batch=_batch, implementation=_eager, lowering=_jax.lower_as(_implementation), jvp=_jvp
)
