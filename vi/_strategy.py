"""Gradient strategies: how the derivative of an expectation passes a random choice.

A strategy belongs to a site, not to its distribution, and never changes what the program means.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from expectax.ppl import StrategyError, _jax
from expectax.ppl._finite import single_support
from expectax.ppl._sample import Site
from expectax.ppl._support import bounds_of

MAX_ENUMERATED = 4096
"""The most joint values that `Enum` sites of one objective may be enumerated over."""

SMALL_SUPPORT = 64
"""By default a site is enumerated only if its joint values are at most this many."""


@dataclasses.dataclass(frozen=True)
class Reparam:
    r"""Differentiate through the sampler: $x = g(\epsilon, \theta)$.

    The pathwise estimator (Kingma and Welling 2014), implicit for gamma, beta, Dirichlet and Student-t (Figurnov et
    al. 2018). Needs a distribution whose sampler is differentiable in all its parameters, and a cost that is
    continuous in the value.

    Example:
        >>> from expectax import vi
        >>> vi.Reparam()
        Reparam()
    """


@dataclasses.dataclass(frozen=True)
class Reinforce:
    r"""Score-function estimator: the costs that depend on $x$ are multiplied by $p(x;\theta) / \text{sg}\,p(x;\theta)$.

    Works for any distribution whose support does not move with the parameters (Williams 1992; in the form of Foerster
    et al. 2018, right to every order).

    Attributes:
        baseline: `"leave-one-out"` subtracts the mean cost of the other samples (needs `num_samples > 1`, else nothing
            is subtracted); a number subtracts that; None subtracts nothing. None of them biases the gradient.

    Example:
        >>> from expectax import vi
        >>> vi.Reinforce(baseline=None)
        Reinforce(baseline=None)
    """

    baseline: Literal["leave-one-out"] | float | None = "leave-one-out"


@dataclasses.dataclass(frozen=True)
class Enum:
    r"""Sum the rest of the program over the site's finite support: $\sum_i p(x_i;\theta)\, k(x_i)$.

    No variance from this site. A value of probability exactly 0 is left out, with its derivative. Lanes, batch elements and scan steps are enumerated jointly (K values and n elements
    cost $K^n$ runs, at most 4096 in one objective).

    Example:
        >>> from expectax import vi
        >>> vi.Enum()
        Enum()
    """


Strategy = Reparam | Reinforce | Enum


def elements_of(site: Site, event: int) -> tuple[int, ...]:
    """Return the shape of a site's independent elements: lanes and batch."""
    return site.value_shape[: len(site.value_shape) - event]


def joint_size(site: Site, leaves: Any, repeats: int = 1) -> int | None:
    """Return how many joint values a site has over its lanes, batch and scan steps; None if they are not finite."""
    single = single_support(site, leaves)
    if single is None:
        return None
    count = math.prod(elements_of(site, single.ndim - 1)) * repeats
    return len(single) ** count if count < 64 or len(single) == 1 else 2**64


def joint_support(site: Site, leaves: Any) -> Array:
    """Return all joint values of a site, shape `(runs, *value_shape)`."""
    single = single_support(site, leaves)
    assert single is not None
    count = math.prod(elements_of(site, single.ndim - 1))
    index = np.array(list(itertools.product(range(len(single)), repeat=count)), int).reshape(-1, count)
    return jnp.asarray(single[index].reshape(len(index), *site.value_shape), site.dtype)


def _moving(bound: Any) -> bool:
    """Tell whether a bound of a support may have a derivative."""
    return _jax.is_traced(bound) and jnp.issubdtype(jnp.result_type(bound), jnp.inexact)


def resolve(site: Site, leaves: Any, enumerated: int, repeats: int = 1) -> Strategy:
    """Return the strategy of a site: the user's, checked, or the default.

    The default is `Reparam` where the sampler is differentiable, else `Enum` where few values are left to
    enumerate, else `Reinforce` with a leave-one-out baseline. `enumerated` counts the joint values of the sites
    before; `repeats` the scan steps.
    """
    d = site.distribution([None] * site.structure.num_leaves)
    d_known = site.distribution(leaves)
    asked, size = site.gradient, joint_size(site, leaves, repeats)
    place = f"site {site.address!r} at {site.where}"
    if asked is None:
        if d.has_rsample:
            return Reparam()
        return Enum() if size is not None and size * enumerated <= SMALL_SUPPORT else Reinforce()
    if isinstance(asked, Reparam) and not d.has_rsample:
        raise StrategyError(f"{place}: {type(d).__name__} has no differentiable sampler. Use vi.Reinforce().")
    if isinstance(asked, Reinforce) and any(_moving(b) for b in bounds_of(d_known.support)):
        raise StrategyError(
            f"{place}: the support of {type(d).__name__} depends on its parameters, so the score-function estimator "
            "would be biased. Use vi.Reparam()."
        )
    if isinstance(asked, Enum) and size is None:
        raise StrategyError(f"{place}: {type(d).__name__} has no finite support to enumerate. Use vi.Reinforce().")
    if isinstance(asked, Enum) and size is not None and size * enumerated > MAX_ENUMERATED:
        raise StrategyError(
            f"{place}: Enum would enumerate more than {MAX_ENUMERATED} joint values of this objective. Use "
            "vi.Reinforce(), or fewer lanes or steps."
        )
    if not isinstance(asked, (Reparam, Reinforce, Enum)):
        raise StrategyError(f"{place}: gradient must be vi.Reparam(), vi.Reinforce() or vi.Enum(), got {asked!r}.")
    return asked
