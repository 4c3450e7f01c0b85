"""The bounds of supports, as far as the soundness check needs them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from expectax.ppl._sample import Site
from expectax.ppl._support import bounds_of, whole_space

from ._continuity import Node, base, supports_known

_SIDES = (("lower_bound", -np.inf), ("upper_bound", np.inf))


def fixed_bounds(support: Any) -> tuple[float, float] | None:
    """Return the bounds of an elementwise support that are the same for all elements, else None."""
    if whole_space(support):
        return -np.inf, np.inf
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.simplex:
        return 0.0, 1.0
    found = [np.unique(np.asarray(bound, float)) for bound in bounds_of(support)]
    if not found or any(len(bound) != 1 for bound in found):
        return None
    low, high = (getattr(support, name, default) for name, default in _SIDES)
    return float(np.unique(low)[0]), float(np.unique(high)[0])


def interval_of(site: Site, leaves: Any) -> tuple[Any, Any]:
    """Return the bounds of a draw for given parameters of its distribution."""
    support: Any = site.distribution(leaves).support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not bounds_of(support):
        raise TypeError("no interval")
    low, high = (jnp.asarray(getattr(support, name, default), float) for name, default in _SIDES)
    return jnp.broadcast_to(low, site.shape), jnp.broadcast_to(high, site.shape)


def crosses_support(node: Node) -> bool:
    """Tell whether a support's test of a value (first) against a bound (second) is a step in the draws.

    A bound that moves with a draw is one. A bound that stands is one if the value is made of draws of known support
    alone, which then cross it; otherwise the value is taken to lie inside, as a value that is scored should. A relation
    of a value to itself (order, symmetry) and equalities, which hold everywhere or nowhere, are none.
    """
    if node.op not in ("gt", "ge", "lt", "le"):
        return False
    value, bound = (base(x) for x in node.inputs)
    unbounded = value.op == "site" and all(x.op == "literal" and np.isinf(x.params) for x in value.inputs)
    return value is not bound and (
        bool(bound.sites) or bound.moved or supports_known(node) or (unbounded and bool(value.inputs))
    )
