r"""Automatic reparameterisation: a posterior that is easier to sample, chosen by a pilot, and the way back from its draws."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, reparameterize
from expectax.ppl._compile import compiled
from expectax.ppl._nested import Choices, leaves_of, nested


class Reparameterized(NamedTuple):
    """A posterior written anew, and the way back; made by `auto_reparameterize`. Example: see `auto_reparameterize`.

    Attributes:
        posterior: with base variables, such as `theta_base`, in the place of some latents.
        original: the posterior as it was.
    """

    posterior: Posterior
    original: Posterior

    @property
    def non_centred(self) -> tuple[str, ...]:
        """The addresses that were written non-centred."""
        left = dict(leaves_of(self.posterior.latent_shapes))
        return tuple(path for path, _ in leaves_of(self.original.latent_shapes) if path not in left)

    def back(self, latents: Choices) -> Choices:
        """Return the original latents of latents of the new posterior.

        Args:
            latents: nested dict, such as `chains.choices`, with any axes (chains and draws, say) in front.

        Returns:
            Nested dict of the original latents, with the same axes in front.
        """
        return _back(self, latents)


def auto_reparameterize(posterior: Posterior, *, key: PRNGKeyArray) -> Reparameterized:
    r"""Decide for each location-scale latent between centred and non-centred, from a pilot.

    A latent $x \sim D(\mu, \sigma)$ whose $\mu$ or $\sigma$ depends on latents is written $x = \mu + \sigma e$ where the
    data say less of it than its prior does: where the curvature $I$ of the rest of the log density, averaged over a
    mean-field variational approximation, is below the prior's, $I \sigma^2 < 1$. Else it is left as it is. In a
    `lax.scan` the decision is one for all steps: a random walk $x_t \sim N(x_{t-1}, \sigma)$ that the data hardly know
    turns into its innovations.

    Args:
        posterior: the target, all of whose latents are continuous.
        key: a typed key, for the pilot.

    Returns:
        A `Reparameterized`: `.posterior` to sample, `.back(latents)` to the original latents, `.non_centred`.

    Raises:
        SupportError: a latent is discrete.

    Source: Papaspiliopoulos, Roberts and Sköld 2007; Gorinova, Moore and Hoffman 2020, whose pilot is variational, too.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def funnel():
        ...     scale = ex.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     x = ex.sample("x", dist.Normal(0.0, scale).expand([3]))
        ...     ex.sample("y", dist.Normal(x, 10.0))
        >>> easier = inference.auto_reparameterize(funnel().given({"y": jnp.zeros(3)}), key=jax.random.key(0))
        >>> easier.non_centred
        ('x',)
        >>> latents = {"scale": jnp.asarray(2.0), "x_base": jnp.array([0.0, 0.5, 1.0])}
        >>> easier.back(latents)["x"]
        Array([0., 1., 2.], dtype=float32)
    """
    return Reparameterized(reparameterize(posterior, "auto", key=key), posterior)


@compiled
def _back(pair: Reparameterized, latents: Choices) -> Choices:
    shapes = dict(leaves_of(pair.posterior.latent_shapes))
    path, value = next(iter(leaves_of(latents)))
    axes = jnp.ndim(value) - len(shapes[path].shape) if path in shapes else 0

    def one(latents: Choices) -> Any:
        trace, given = pair.posterior.trace(latents), dict(leaves_of(latents))
        wanted = [path for path, _ in leaves_of(pair.original.latent_shapes)]
        return nested((path, given[path] if path in given else trace[path]) for path in wanted)

    for _ in range(axes):
        one = jax.vmap(one)
    return one(latents)
