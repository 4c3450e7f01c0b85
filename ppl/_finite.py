"""Finite supports: the values that one element of a discrete site can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from . import _jax
from ._sample import Site


def single_support(site: Site, leaves: Any) -> np.ndarray | None:
    """Return the values of one element, shape `(K, *event)`, or None where there is no finite, known list."""
    d = innermost(site.distribution([_known(leaf, j, site) for j, leaf in enumerate(leaves)]))
    if not d.has_enumerate_support:
        return None
    if d.support is constraints.boolean:  # known without asking JAX, which would compile the list
        return np.arange(2, dtype=jnp.result_type(int))
    try:
        with jax.ensure_compile_time_eval():
            values = np.asarray(d.enumerate_support(expand=False))
    except Exception:  # a support that depends on traced parameters
        return None
    return values.reshape(len(values), *values.shape[1 + len(d.batch_shape) :])


def innermost(d: dist.Distribution) -> dist.Distribution:
    """Return the distribution of one element: what `to_event` and `expand` were applied to."""
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return d


def _known(leaf: Any, j: int, site: Site) -> Any:
    """Return a parameter's value if it is a known number, else nan (None for integers) of one lane's shape."""
    mapped = any(lane.dims[j] is not None for lane in site.lanes)
    if not _jax.is_traced(leaf) and not mapped:
        return np.asarray(leaf)
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return None
    shape = np.shape(leaf)
    for lane in reversed(site.lanes):  # an outer vmap's axis is counted with the inner ones still there
        dim = lane.dims[j]
        shape = shape if dim is None else shape[:dim] + shape[dim + 1 :]
    return np.full(shape, np.nan)
