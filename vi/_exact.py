"""Exact enumeration, as an algorithm for marginals and normalised targets with finite latents."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from expectax.ppl import ControlFlowError, Posterior, marginalize_discrete
from expectax.ppl._joint_values import joint_values
from expectax.ppl._nested import Choices, leaves_of

from ._algorithm import Run
from ._importance import chosen
from ._objective import log_density as score

_MOST_TOGETHER = 2**14
"""The most joint values that are enumerated to draw one of them."""


class Exact(eqx.Module):
    """Exact enumeration. Example: see `vi.exact`."""

    def run(self, target: Posterior) -> Run:
        """Draw from the posterior: one of all joint values, by their weights."""
        values, log_gamma = _joint(target)
        z, log_density = chosen((values, log_gamma), log_gamma)
        return Run(z, log_density, jax.nn.logsumexp(log_gamma))

    def conditional(self, target: Posterior, latents: Choices, log_density: Any) -> Any:
        """Return the exact log evidence."""
        del latents, log_density
        return self.evidence(target)

    def evidence(self, target: Posterior) -> Any:
        """Sum all latents out: by variable elimination, or all joint values where it refuses and they are few."""
        hidden = [path for path, _ in leaves_of(target.latent_sites())]
        try:
            return score(marginalize_discrete(target.program, hidden), target.observations)
        except ControlFlowError as refused:
            try:
                return jax.nn.logsumexp(_joint(target)[1])
            except ControlFlowError:
                raise refused from None


def exact() -> Exact:
    r"""Exact enumeration: $\log Z = \log \sum_z \gamma(z)$ for latents of finite support.

    A marginal is found by variable elimination: N independent lanes of K values cost N K, a chain in a `lax.scan` the
    forward recursion, $T K^2$ (see `expectax.marginalize_discrete`). The density has no randomness: such a marginal
    is an ordinary likelihood, also in NUTS. Drawing from a normalised target enumerates all joint values.

    Returns:
        An algorithm for `vi.marginal` and `vi.normalize`.

    Raises:
        ControlFlowError: at first use, if a latent has no finite support, or the joint values are too many to draw from.

    Source: Zhang and Poole 1996; Rabiner 1989.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def mixture():
        ...     k = ex.sample("k", dist.Bernoulli(0.3))
        ...     ex.sample("x", dist.Normal(4.0 * k, 1.0))
        >>> round(float(vi.marginal(mixture(), "x", vi.exact()).assess({"x": 0.0})[0]), 4)
        -1.2755
    """
    return Exact()


def _joint(target: Posterior) -> tuple[Choices, Any]:
    r"""Return all joint values of the latents, along a new first axis, and their $\log \gamma$."""
    values = joint_values(target, "vi.exact")
    return values, jax.vmap(lambda z: score(target, z))(values)
