"""Which strategy a site takes: the user's, checked, or the default."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from expectax.ppl import StrategyError, _jax
from expectax.ppl._sample import Site
from expectax.ppl._support import bounds_of

from ._implicit import Implicit, has_distribution_function
from ._strategy import Coupled, Enum, Reinforce, Reparam, Strategy
from ._supports import support_size


@dataclasses.dataclass(frozen=True)
class Enumerated(Enum):
    """`Enum` at a site with so many values per element; `asked` for, or the default."""

    size: int = 0
    asked: bool = True


def resolve(site: Site, leaves: Any) -> tuple[Strategy, str]:
    """Return the strategy of a site, and why: the user's, checked, or the default.

    The default is `Reparam` where the sampler is differentiable, else `Enum` where few values are to be enumerated
    (decided by `_layout`), else `Reinforce` with a leave-one-out baseline.
    """
    d = site.distribution([None] * site.structure.num_leaves)
    asked, size = site.gradient, support_size(site, leaves)
    place, name = f"site {site.address!r} at {site.where}", type(d).__name__
    if asked is None:
        if d.has_rsample:
            return Reparam(), "default: the sampler is differentiable"
        if size is None:
            return Reinforce(), "default: infinitely many values, no differentiable sampler"
        return Enumerated(size, asked=False), "default: few values"
    if isinstance(asked, Reparam):
        if not d.has_rsample and not has_distribution_function(d):
            raise StrategyError(
                f"{place}: {name} has no differentiable sampler and no distribution function. Use vi.Reinforce()."
            )
        if d.has_rsample:
            return asked, "given"
        return Implicit(), "given; no differentiable sampler, but a distribution function"
    if isinstance(asked, Reinforce):
        if any(_moving(b) for b in bounds_of(site.distribution(leaves).support)):
            raise StrategyError(
                f"{place}: the support of {name} depends on its parameters, so the score-function estimator would be "
                "biased. Use vi.Reparam()."
            )
        return asked, "given"
    if isinstance(asked, Enum):
        if size is None:
            raise StrategyError(f"{place}: {name} has no finite support to enumerate. Use vi.Reinforce().")
        return Enumerated(size), "given"
    if not isinstance(asked, Coupled):
        raise StrategyError(
            f"{place}: gradient must be a strategy such as vi.Reparam(), vi.Reinforce() or vi.Enum(), or an object "
            f"with a method couple(distribution, value, key); got {asked!r}."
        )
    if (fits := getattr(asked, "fits", None)) is not None and (reason := fits(d)) is not None:
        raise StrategyError(f"{place}: {asked!r} does not fit {name}: {reason}")
    return asked, "given"


def _moving(bound: Any) -> bool:
    """Tell whether a bound of a support may have a derivative."""
    return _jax.is_traced(bound) and jnp.issubdtype(jnp.result_type(bound), jnp.inexact)
