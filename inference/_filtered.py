"""What a particle filter returns: particles, evidence with its variance, and the genealogy."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._particles import Particles
from ._weights import normalized_weights


class History(eqx.Module):
    """What the particles were at each step, before later resampling: for smoothing.

    Example: see `Filtered`.

    Attributes:
        before: nested dict of the latents before the scan, particles first.
        log_weights_before: their log weights.
        choices: nested dict of the scan's latents, shape `(T, num_particles, ...)`, in the order of the model's arrays.
        log_weights: shape `(T, num_particles)`.
        ancestors: of each particle of a step, the particle of the step before it, shape `(T, num_particles)`.
    """

    before: dict[str, Any]
    log_weights_before: Float[Array, " n"]
    choices: dict[str, Any]
    log_weights: Float[Array, "T n"]
    ancestors: Int[Array, "T n"]


class Filtered(eqx.Module):
    r"""The result of a particle filter.

    Attributes:
        particles: with final weights: $p(x_{1:T} \mid y_{1:T})$, scanned choices of shape `(num_particles, T, ...)`; early
            times have few distinct ancestors. With `store="filtering"` they have only the last step's choices, with
            `"evidence"` only those before the scan.
        ess: effective sample size at each time.
        resampled: whether the particles were resampled before each time.
        eves: which particle of the start each particle descends from.
        history: a `History`; None where nothing was stored.
        reverse: whether the scan goes backwards through the arrays.
        unbiased: whether $\hat Z$ is unbiased. It is for this filter with any threshold: that the decision to resample
            depends on the particles does not matter, since given the past each step keeps the mean (Whiteley, Lee and
            Heine 2016; limit theorems in Del Moral, Doucet and Jasra 2012).

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def walk():
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, 1.0))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=3)
        >>> posterior = walk().given({"y": jnp.array([0.5, 1.0, 0.0])})
        >>> filtered = inference.particle_filter(posterior, key=jax.random.key(0), num_particles=1000)
        >>> filtered.mean()["x"].shape, filtered.ancestors.shape, filtered.unbiased
        ((3,), (3, 1000), True)
        >>> bool(filtered.log_evidence_standard_error < 0.1)
        True
    """

    particles: Particles
    ess: Float[Array, " T"]
    resampled: Bool[Array, " T"]
    eves: Int[Array, " n"]
    history: History | None = None
    unbiased: bool = eqx.field(static=True, default=True)
    reverse: bool = eqx.field(static=True, default=False)

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$, with $\hat Z$ an unbiased estimate of $p(y_{1:T})$."""
        return self.particles.log_evidence

    @property
    def relative_variance(self) -> Float[Array, ""]:
        r"""An estimate of $\mathrm{var}(\hat Z) / Z^2$ from this one run, by the Eve indices.

        $$ V = 1 - \Bigl(\frac{n}{n - 1}\Bigr)^{R + 1} \Bigl(1 - \sum_e \bigl(\sum_{i : E_i = e} W_i\bigr)^2\Bigr) $$

        with $R$ resampling steps. For multinomial resampling at fixed times $\hat Z^2 V$ has the mean
        $\mathrm{var}(\hat Z)$ exactly (and so it may be negative). For other methods it is an approximation: with 500
        particles, 50 steps and resampling by need the mean estimate was 0.94 of the variance of 300 runs for multinomial
        resampling and for killing, but 0.57 for systematic and 0.66 for SSP resampling.
        It is near 1, and says nothing, when all particles descend from one: use more particles. Source: Lee and Whiteley 2018.
        """
        n = self.eves.shape[0]
        families = jnp.zeros(n, self.particles.weights.dtype).at[self.eves].add(self.particles.weights)
        times = jnp.sum(self.resampled) + 1
        return 1 - (n / (n - 1)) ** times * (1 - jnp.sum(families**2)) if n > 1 else jnp.asarray(jnp.nan)

    @property
    def log_evidence_standard_error(self) -> Float[Array, ""]:
        r"""Standard error of $\log \hat Z$: the square root of `relative_variance`, 0 where that is negative."""
        return jnp.sqrt(jnp.maximum(self.relative_variance, 0.0))

    @property
    def choices(self) -> dict[str, Any]:
        """The scan's latents at each time before later resampling, shape `(T, num_particles, ...)`."""
        return self._stored().choices

    @property
    def log_weights(self) -> Float[Array, "T n"]:
        r"""Their log weights, shape `(T, num_particles)`: $p(x_t \mid y_{1:t})$."""
        return self._stored().log_weights

    @property
    def ancestors(self) -> Int[Array, "T n"]:
        """The ancestors of each time's particles among those of the time before, shape `(T, num_particles)`."""
        return self._stored().ancestors

    def mean(self) -> Any:
        """Return the filtering mean $E[x_t | y_{1:t}]$ of every scanned latent, time first."""
        weights = jax.vmap(normalized_weights)(self.log_weights)
        return jax.tree.map(lambda v: jnp.einsum("tn,tn...->t...", weights, v), self.choices)

    def sd(self) -> Any:
        """Return the filtering standard deviation of every scanned latent, time first."""
        weights = jax.vmap(normalized_weights)(self.log_weights)
        return jax.tree.map(
            lambda v, m: jnp.sqrt(jnp.einsum("tn,tn...->t...", weights, (v - m[:, None]) ** 2)),
            self.choices,
            self.mean(),
        )

    def _stored(self) -> History:
        if self.history is None:
            raise ValueError(
                'the filter ran with store="evidence": use "filtering" or "trajectories" to keep its steps.'
            )
        return self.history


def lineage(ancestors: Any) -> tuple[Any, Any]:
    """Return which particle of each time the final ones descend from, shape `(T, n)`, and from which at the start."""

    def back(index: Any, parents: Any) -> tuple[Any, Any]:
        return parents[index], index

    first, found = lax.scan(back, jnp.arange(ancestors.shape[1], dtype=ancestors.dtype), ancestors, reverse=True)
    return found, first


def follow(values: Any, lineage: Any) -> Any:
    """Pick each trajectory's values, particles first."""
    return jnp.moveaxis(jax.vmap(lambda v, i: v[i])(values, lineage), 1, 0)
