r"""What a kernel leaves invariant: the density of a posterior's latents, or one on the way to it.

A kernel sees no observations and no temperature: only a density over latents, in their own space or unconstrained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from expectax.ppl import Posterior
from expectax.ppl._nested import Choices, leaves_of, merged

from ._absent import absent_log_density, conditional_paths


class Target(eqx.Module):
    r"""An unnormalised density over the latents of a posterior: $\log \gamma(z) + c(z)$.

    Kernels are written with it; a user's own kernel gets one as its first argument.

    Attributes:
        posterior: $\gamma$, with the latents' addresses, shapes and supports.
        correction: $c$, a function of the latents, for instance $-(1 - \beta) \log p(y \mid z)$; None for none.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.HalfNormal(1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> target = inference.Target(model().given({"y": 1.0}))
        >>> round(float(target.log_density({"z": 1.0})), 3)
        -1.645
        >>> target.flat().size
        1
    """

    posterior: Posterior
    correction: Callable[[Choices], Any] | None = None

    def log_density(self, latents: Choices) -> Float[Array, ""]:
        """Return the log density of latents, of which every one is given; those that are not made have a pseudo-prior."""
        total = self.posterior.log_density_inside(latents)
        if paths := conditional_paths(self.posterior):
            total = total + absent_log_density(self.posterior, latents, paths)
        return total if self.correction is None else total + self.correction(latents)

    def unconstrained_log_density(self, unconstrained: Choices, key: Any = None) -> Float[Array, ""]:
        """Return the log density on the unconstrained scale, with the log Jacobian; a key is for estimated densities."""
        own = self.posterior.unconstrained_log_density(unconstrained, key)
        return own if self.correction is None else own + self.correction(self.constrain(unconstrained))

    def constrain(self, unconstrained: Choices) -> Choices:
        """Return the latents of unconstrained values."""
        return self.posterior.constrain(unconstrained)

    def unconstrain(self, latents: Choices) -> Choices:
        """Return the unconstrained values of latents."""
        return self.posterior.unconstrain(latents)

    def given(self, fixed: Choices) -> Target:
        """Return the density of the other latents, with some held at their values."""
        held = frozenset(path for path, _ in leaves_of(fixed)) & conditional_paths(self.posterior)

        def correction(latents: Choices) -> Any:
            whole = merged(latents, fixed)
            own = absent_log_density(self.posterior, whole, held) if held else 0.0
            return own if self.correction is None else own + self.correction(whole)

        return Target(self.posterior.holding(fixed), correction if held or self.correction is not None else None)

    def flat(self) -> Flat:
        """Return the density on the unconstrained scale, as a function of one vector."""
        shapes = self.posterior.unconstrained_shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        vector, unravel = ravel_pytree(zeros)
        return Flat(
            lambda position, key=None: self.unconstrained_log_density(unravel(position), key),
            lambda position: self.constrain(unravel(position)),
            lambda latents: ravel_pytree(self.unconstrain(latents))[0],
            vector.size,
        )

    @property
    def estimated(self) -> bool:
        """Whether the density is only estimated."""
        return any(entry.estimated for _, entry in leaves_of(self.posterior.program.sites()))


class Flat(NamedTuple):
    """A target's density as a function of one unconstrained vector, and the maps between vector and latents.

    Example: see `Target`.
    """

    log_density: Callable[..., Any]
    constrain: Callable[[Any], Choices]
    unconstrain: Callable[[Choices], Any]
    size: int
