"""Supports: is a value in it, does one contain another, which are fixed, and how to leave it for the real line."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints

from . import _jax

relaxed: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("relaxed", default=None)
"""In an objective, the complaints about discrete sites that were given floats; these are right if it relaxes a choice."""


def whole_space(support: Any) -> bool:
    """Tell whether a support excludes nothing, or leaves the check to `log_prob` (`dependent`)."""
    if isinstance(support, constraints.independent):
        return whole_space(support.base_constraint)
    return isinstance(support, (type(constraints.real), type(constraints.dependent)))


def known_support(d: dist.Distribution) -> Any | None:
    """Return the support, or None where its bounds are being traced."""
    try:
        support = d.support
    except Exception:  # a support that only the parameters' values would tell
        return None
    return None if any(_jax.is_traced(b) for b in bounds_of(support)) else support


def bounds_of(support: Any) -> list[Any]:
    """Return the bounds that a support has."""
    base = _elementwise(support)
    found = (getattr(base, name, None) for name in ("lower_bound", "upper_bound"))
    return [bound for bound in found if bound is not None]


def density_in_support(
    d: dist.Distribution, value: Any, terms: Callable[[dist.Distribution, Any], Any]
) -> tuple[Any, Any]:
    """Return `terms(d, value)` and the value to go on with.

    Outside the support the density is minus infinity, and the run goes on with some value inside, so that neither the
    sites that depend on it nor the gradient become nan. A masked entry counts nothing, whatever its value.
    """
    if isinstance(d, dist.MaskedDistribution):
        found, safe = density_in_support(d.base_dist, value, terms)
        return jnp.where(d._mask, found, 0.0), safe
    support = d.support
    if support is None or whole_space(support):
        return terms(d, value), value
    if relaxed.get() and d.is_discrete and jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return terms(d, value), value
    inside = support(value)
    event = support.event_dim
    mask = jnp.reshape(inside, jnp.shape(inside) + (1,) * event)
    safe = jnp.where(mask, value, jnp.asarray(support.feasible_like(value), jnp.result_type(value)))
    found = terms(d, value if _finite_outside(d, value) else safe)
    while jnp.ndim(inside) > jnp.ndim(found):
        inside = jnp.all(inside, axis=-1)
    return jnp.where(inside, found, -jnp.inf), safe


_FINITE_OUTSIDE = (dist.BernoulliLogits,)
"""Distributions whose log density has a formula that is finite at every integer, and its derivatives too."""


def _finite_outside(d: dist.Distribution, value: Any) -> bool:
    """Tell whether a density may be asked about values outside the support, and minus infinity be put there afterwards.

    This spares an operation an element, and one more in the derivative. (Bernoulli's logits l: y l - softplus(l).)
    """
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return isinstance(d, _FINITE_OUTSIDE) and not jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def feasible(d: dist.Distribution, value: Any) -> Any:
    """Return some possible value of the shape of `value`."""
    support = d.support
    if support is None or whole_space(support):
        return jnp.zeros_like(value)
    return jnp.broadcast_to(jnp.asarray(support.feasible_like(value)), jnp.shape(value))


def jacobian(transform: Any, unconstrained: Any, value: Any) -> Any:
    """Return the summed log absolute Jacobian determinant of a transform."""
    return jnp.sum(transform.log_abs_det_jacobian(unconstrained, value))


# --- comparing supports -----------------------------------------------------------------------------------------


def contains(outer: Any, inner: Any) -> bool:
    """Tell whether `outer` contains `inner`; bounds that are not known while staging count as fitting."""
    outer, inner = _elementwise(outer), _elementwise(inner)
    if bool(outer.is_discrete) != bool(inner.is_discrete):
        return False
    a, b = _interval(outer), _interval(inner)
    if a is None or b is None:
        return type(outer) is type(inner)
    return _not_above(a[0], b[0]) and _not_above(b[1], a[1])


def _elementwise(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _interval(support: Any) -> tuple[Any, Any] | None:
    """Return the bounds of a support that is an interval (of reals or integers), else None."""
    if whole_space(support) or support is constraints.circular:
        return -np.inf, np.inf
    if support is constraints.boolean:
        return 0, 1
    if not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    return getattr(support, "lower_bound", -np.inf), getattr(support, "upper_bound", np.inf)


def _not_above(a: Any, b: Any) -> bool:
    if a is None or b is None or _jax.is_traced(a) or _jax.is_traced(b):
        return True
    return bool(np.all(np.asarray(a) <= np.asarray(b)))
