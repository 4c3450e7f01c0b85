"""The finite supports of sites: how many joint values there are, and which.

An element of a site (a lane, a batch element) may be an event of several numbers, which are enumerated jointly.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from expectax.ppl._finite import single_support
from expectax.ppl._sample import Site


def support_size(site: Site, leaves: Any) -> int | None:
    """Return how many values one element of a site can take; None if they are not finitely many."""
    single = single_support(site, leaves)
    if single is None:
        return None
    count = math.prod(_repeats(site, single))
    return len(single) ** count if count < 64 or len(single) == 1 else 2**64


def equal_support(site: Site, leaves: Any) -> Array:
    """Return the values of one element, each in all elements at once, shape `(K, *value_shape)`."""
    values = _element_support(site, leaves)
    elements = site.element_shape
    spread = values.reshape(len(values), *(1 for _ in elements), *values.shape[1:])
    return jnp.broadcast_to(jnp.asarray(spread, site.dtype), (len(values), *site.value_shape))


def joint_support(site: Site, leaves: Any) -> Array:
    """Return all joint values of a site, shape `(runs, *value_shape)`."""
    values = _element_support(site, leaves)
    joint = _products(values, math.prod(site.element_shape))
    return jnp.asarray(joint.reshape(len(joint), *site.value_shape), site.dtype)


def _repeats(site: Site, single: np.ndarray) -> tuple[int, ...]:
    """Return the axes of an event along which independent numbers stand side by side."""
    event = site.value_shape[len(site.element_shape) :]
    return event[: len(event) - (single.ndim - 1)]


def _element_support(site: Site, leaves: Any) -> np.ndarray:
    """Return the values of one element, shape `(K, *event)`."""
    single = single_support(site, leaves)
    assert single is not None
    joint = _products(single, math.prod(_repeats(site, single)))
    return joint.reshape(len(joint), *site.value_shape[len(site.element_shape) :])


def _products(values: np.ndarray, count: int) -> np.ndarray:
    """Return all sequences of so many of the values, shape `(len(values) ** count, count, ...)`."""
    index = np.array(list(itertools.product(range(len(values)), repeat=count)), int).reshape(-1, count)
    return values[index]
