"""Weighted particles: the result of importance sampling and of filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._ancestors import Method, ancestors
from ._weights import effective_sample_size, log_mean_exp, normalized_weights


class Particles(eqx.Module):
    r"""Particles $z_i$ with log weights $w_i$: $\sum_i e^{w_i} f(z_i) / n$ estimates $\int f\,\gamma$ without bias.

    Example: see `importance`.

    Attributes:
        choices: nested dict of values, particles first.
        log_weights: shape `(num_particles,)`.
        log_offset: a number to add to every log weight (what earlier resampling steps have contributed).
    """

    choices: dict[str, Any]
    log_weights: Float[Array, " n"]
    log_offset: Float[Array, ""]

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$; $\hat Z$ itself is unbiased, its logarithm is a lower bound in expectation."""
        return log_mean_exp(self.log_weights) + self.log_offset

    @property
    def log_evidence_standard_error(self) -> Float[Array, ""]:
        r"""Standard error of $\log \hat Z$ by the delta method, for independent particles (importance sampling)."""
        relative = normalized_weights(self.log_weights) * self.log_weights.shape[0]
        return jnp.std(relative, ddof=1) / jnp.sqrt(self.log_weights.shape[0])

    @property
    def weights(self) -> Float[Array, " n"]:
        """Normalised weights."""
        return normalized_weights(self.log_weights)

    @property
    def ess(self) -> Float[Array, ""]:
        """Effective sample size."""
        return effective_sample_size(self.log_weights)

    def expectation(self, function: Callable[[Any], Any]) -> Any:
        """Return the weighted mean of `function(choices of one particle)`, a pytree."""
        values = jax.vmap(function)(self.choices)
        return jax.tree.map(lambda v: jnp.tensordot(self.weights, v, axes=1), values)

    def mean(self) -> Any:
        """Return the posterior mean of every choice."""
        return self.expectation(lambda z: z)

    def sd(self) -> Any:
        """Return the posterior standard deviation of every choice."""
        mean = self.mean()
        square = self.expectation(lambda z: jax.tree.map(lambda v, m: (v - m) ** 2, z, mean))
        return jax.tree.map(jnp.sqrt, square)

    def mean_standard_error(self) -> Any:
        r"""Return the standard error of `mean()`: $\sqrt{\sum_i W_i^2 (z_i - \bar z)^2}$ (independent particles)."""
        mean, weights = self.mean(), self.weights
        return jax.tree.map(lambda v, m: jnp.sqrt(jnp.tensordot(weights**2, (v - m) ** 2, axes=1)), self.choices, mean)

    def resample(self, key: PRNGKeyArray, num: int | None = None, method: Method = "systematic") -> Particles:
        """Return equally weighted particles drawn in proportion to the weights; the evidence is kept."""
        index = ancestors(key, self.log_weights, num, method)
        choices = jax.tree.map(lambda v: v[index], self.choices)
        return Particles(choices, jnp.zeros(index.shape[0], self.log_weights.dtype), self.log_evidence)
