"""What the interpreters need of a `numpyro` distribution: its leaves, its draw's type, its form over lanes.

A site's distribution travels through JAX as `(leaves, structure)`. Under `k` enclosing vmaps every leaf has gained up
to `k` axes; `Lane` says how many lanes there are and where each leaf carries them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import distributions as dist


class Lane(NamedTuple):
    """One enclosing vmap: how many lanes, and the axis of each leaf that it maps (None: the leaf is shared)."""

    size: int
    dims: tuple[int | None, ...]


def flatten(distribution: dist.Distribution) -> tuple[list[Any], Any]:
    """Split a distribution into array leaves and a hashable structure; Python numbers stay literal."""
    leaves, structure = jax.tree.flatten(distribution)
    return [leaf if isinstance(leaf, (bool, int, float)) else jnp.asarray(leaf) for leaf in leaves], structure


def rebuild(structure: Any, leaves: Any) -> dist.Distribution:
    """Return the distribution with these leaves."""
    return jax.tree.unflatten(structure, list(leaves))


def draw_type(structure: Any, leaves: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of one draw, traced once for each kind of distribution and parameter type."""
    types = tuple(type_of(leaf) for leaf in leaves)
    try:
        return _cached_draw_type(structure, types, jnp.result_type(float))
    except TypeError:  # an unhashable structure: trace it each time
        return _draw_type(structure, types)


def type_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and weak type of a value."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    t = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type)


def _draw_type(structure: Any, types: Any) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        out = jax.eval_shape(lambda k, xs: rebuild(structure, xs).sample(k), key, list(types))
    except NotImplementedError:  # an improper distribution: it has a density but no draws
        d = rebuild(structure, [jnp.zeros(t.shape, t.dtype) for t in types])
        return jax.ShapeDtypeStruct(d.shape(), jnp.result_type(float))
    return jax.ShapeDtypeStruct(out.shape, out.dtype)


@functools.lru_cache(maxsize=4096)
def _cached_draw_type(structure: Any, types: Any, default_float: Any) -> jax.ShapeDtypeStruct:
    del default_float  # part of the key only
    return _draw_type(structure, types)


# --- lanes ------------------------------------------------------------------------------------------------------


def lane_shape(lanes: tuple[Lane, ...]) -> tuple[int, ...]:
    """Return the lane sizes, outermost first (`lanes` itself is innermost first)."""
    return tuple(lane.size for lane in reversed(lanes))


def over(lanes: tuple[Lane, ...], function: Any, mapped: int = 1) -> Any:
    """Map `function(*mapped arguments, leaves)` over the lanes; mapped arguments carry them in front."""
    for lane in lanes:
        function = jax.vmap(function, in_axes=(0,) * mapped + (list(lane.dims),), axis_size=lane.size)
    return function


def align(lanes: tuple[Lane, ...], leaves: Any) -> list[jax.Array]:
    """Bring each leaf's lane axes to the front, outermost first, with size 1 where a lane shares the leaf."""
    return [_align_one(lanes, j, jnp.asarray(leaf)) for j, leaf in enumerate(leaves)]


def _align_one(lanes: tuple[Lane, ...], j: int, leaf: jax.Array) -> jax.Array:
    moved = 0
    present = []
    for lane in reversed(lanes):  # an outer vmap's axis is counted with the inner ones still there
        dim = lane.dims[j]
        present.append(dim is not None)
        if dim is not None:
            leaf = jnp.moveaxis(leaf, dim + moved, moved)
            moved += 1
    index = tuple(slice(None) if p else None for p in present)
    return leaf[index]


class NotFusable(Exception):
    """The distribution has no known batched form; its lanes are drawn with one key each."""


# The parameters that make a batched copy of a distribution. Those whose constructor takes exactly its
# `arg_constraints` need no entry beyond their name.
_ELEMENTWISE = (
    "AsymmetricLaplace BernoulliLogits BernoulliProbs Beta BetaProportion Cauchy Chi2 Exponential Gamma "
    "GeometricLogits GeometricProbs Gompertz Gumbel HalfCauchy HalfNormal InverseGamma Kumaraswamy Laplace LogNormal "
    "LogUniform Logistic Normal Pareto Poisson StudentT Uniform Weibull"
).split()
_PARAMETERS: dict[type, tuple[str, ...]] = {
    getattr(dist, name): tuple(getattr(dist, name).arg_constraints) for name in _ELEMENTWISE if hasattr(dist, name)
}
ELEMENTWISE = frozenset(_PARAMETERS)
"""Distributions of numbers whose parameters have the batch shape, up to broadcasting."""
CATEGORICAL = frozenset({dist.CategoricalProbs, dist.CategoricalLogits})
"""Distributions with one parameter, whose last axis is that of the categories."""
_PARAMETERS |= {
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.Dirichlet: ("concentration",),
    dist.CategoricalProbs: ("probs",),
    dist.CategoricalLogits: ("logits",),
}


def batched(d: dist.Distribution, num_lanes: int, shape: tuple[int, ...]) -> dist.Distribution:
    """Return `d`, whose leaves carry `num_lanes` leading axes, as a distribution of batch shape `shape`.

    Raises `NotFusable` where no rule is known.
    """
    if isinstance(d, dist.Independent):
        inner = shape + tuple(d.event_shape[: d.reinterpreted_batch_ndims])
        return batched(d.base_dist, num_lanes, inner).to_event(d.reinterpreted_batch_ndims)
    if isinstance(d, dist.ExpandedDistribution):
        return batched(d.base_dist, num_lanes, shape)
    if type(d) not in _PARAMETERS:
        raise NotFusable(type(d).__name__)
    arguments = {}
    for name in _PARAMETERS[type(d)]:
        value, event = getattr(d, name), type(d).arg_constraints[name].event_dim
        own = jnp.ndim(value) - num_lanes - event
        padded = jnp.expand_dims(value, tuple(range(num_lanes, len(shape) - own)))
        arguments[name] = jnp.broadcast_to(padded, shape + jnp.shape(value)[jnp.ndim(value) - event :])
    return type(d)(**arguments, validate_args=False)
