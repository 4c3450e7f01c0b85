r"""Bounds for guides with auxiliary choices, $q(z) = \int q(z, u)\, du$: each is `vi.marginal` inside a shipped bound."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from expectax.ppl import Program
from expectax.ppl._nested import leaves_of

from ._bounds import elbo, iwelbo
from ._importance import sir
from ._marginal import marginal
from ._objective import Objective
from ._shared import Guide, Target, check_particles, check_target, target_at

Reverse = Callable[[Any, Any], Program]
"""A function of the parameters and of the latents that returns a program of the auxiliary choices."""


def hvi(posterior: Target, guide: Guide, reverse: Reverse | None = None) -> Objective:
    r"""Hierarchical variational inference: $E[\log \gamma(z) - \log q(z, u) + \log r(u; z)] \le \log p(y)$.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with the posterior's latents as sites and auxiliary ones beside them.
        reverse: `reverse(params, latents)` returns a bound program of the auxiliary choices, $r(u; z)$; by default the
            guide's own prior of them along the run.

    Returns:
        An objective to maximise over `params`.

    Raises:
        AddressError, ShapeError, SupportError: at first use, if the guide or `reverse` does not fit.

    Source: Ranganath, Tran and Blei 2016; as `vi.elbo` of a `vi.marginal`: Becker et al., PLDI 2024.

    Example: see `vi.iwhvi`, of which this is the case of one auxiliary draw.
    """
    return iwhvi(posterior, guide, 1, reverse)


def iwhvi(posterior: Target, guide: Guide, num_auxiliary: int, reverse: Reverse | None = None) -> Objective:
    r"""Importance-weighted hierarchical variational inference, $m$ auxiliary draws.

    $$E\left[\log \gamma(z) - \log \frac1m \sum_{j=0}^{m-1} \frac{q(z, u_j)}{r(u_j; z)}\right] \le \log p(y), \quad
    (z, u_0) \sim q, \; u_j \sim r(\cdot; z).$$

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with the posterior's latents as sites and auxiliary ones beside them.
        num_auxiliary: $m$; the bound grows with it to the ELBO of the marginal guide.
        reverse: as in `vi.hvi`.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_auxiliary` is less than 1.
        AddressError, ShapeError, SupportError: at first use, if the guide or `reverse` does not fit.

    Source: Sobolev and Vetrov 2019.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def target():
        ...     ex.sample("z", dist.Normal(0.0, 2.0**0.5))
        >>> @ex.model
        ... def guide(scale):
        ...     u = ex.sample("u", dist.Normal(0.0, 1.0))
        ...     ex.sample("z", dist.Normal(u, scale))
        >>> bound = vi.iwhvi(target().given({}), guide, num_auxiliary=50)
        >>> bool(abs(vi.estimate(bound, 1.0, jax.random.key(0)).mean) < 0.05)  # tight: the evidence is 1
        True
    """
    return diwhvi(posterior, guide, 1, num_auxiliary, reverse)


def diwhvi(
    posterior: Target, guide: Guide, num_particles: int, num_auxiliary: int, reverse: Reverse | None = None
) -> Objective:
    r"""Doubly importance-weighted hierarchical variational inference: $E[\log \frac1n \sum_i \gamma(z_i)/\hat q_m(z_i)]$.

    Each $\hat q_m(z_i)$ is the estimate of `vi.iwhvi` with its own auxiliary draws.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with the posterior's latents as sites and auxiliary ones beside them.
        num_particles: $n$.
        num_auxiliary: $m$.
        reverse: as in `vi.hvi`.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` or `num_auxiliary` is less than 1.
        AddressError, ShapeError, SupportError: at first use, if the guide or `reverse` does not fit.

    Source: Sobolev and Vetrov 2019, section 4.

    Example: see `vi.iwhvi`.
    """
    check_target(posterior)
    check_particles("diwhvi", num_particles)
    if num_auxiliary < 1:
        raise ValueError(f"a hierarchical bound needs num_auxiliary >= 1, got {num_auxiliary}.")
    marginal_guide = _MarginalGuide(posterior, guide, num_auxiliary, reverse)
    return elbo(posterior, marginal_guide) if num_particles == 1 else iwelbo(posterior, marginal_guide, num_particles)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["posterior"], meta_fields=["guide", "num_auxiliary", "reverse"]
)
@dataclasses.dataclass(frozen=True)
class _MarginalGuide:
    """A guide of the latents alone; the observations that its posterior carries are data, as elsewhere."""

    posterior: Any
    guide: Guide
    num_auxiliary: int
    reverse: Reverse | None

    def __call__(self, params: Any) -> Program:
        latents = [path for path, _ in leaves_of(target_at(self.posterior, params).latent_sites())]
        reverse = self.reverse
        proposal = None if reverse is None else lambda z: reverse(params, z)
        return marginal(self.guide(params), latents, sir(self.num_auxiliary, proposal))
