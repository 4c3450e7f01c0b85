"""The result of an SMC sampler, and the schedule that it can leave to the next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from expectax.ppl import NonFiniteError, Posterior, _jax

from ._importance import blamed_site
from ._particles import Particles


class Schedule(eqx.Module):
    r"""Temperatures and kernel parameters that are fixed before a run; with them a run's evidence is unbiased.

    Example: see `tempered`.

    Attributes:
        temperatures: $0 < \beta_1 \le \dots \le \beta_K = 1$.
        parameters: of the kernel, temperatures first; None for parameters that are fixed by the run itself.
        resampled: at which steps particles are resampled and moved; None for all.
    """

    temperatures: Float[Array, " K"]
    parameters: Any = None
    resampled: Bool[Array, " K"] | None = None


class Sampled(eqx.Module):
    r"""Weighted particles of the last target, and what each step of the sampler told.

    Example: see `tempered`.

    Attributes:
        particles: of the last target; their evidence is the product of all steps.
        temperatures: $\beta_1, \dots, \beta_K = 1$; of a sequence of posteriors 1 throughout.
        ess: of each step, the effective sample size after its reweighting; where each step resamples, that is the
            conditional one of Zhou, Johansen and Aston 2016.
        log_evidences: of each step, $\log \hat Z_k$.
        acceptance_rate: of each step, the mean of its moves; nan where there were none.
        resampled: at which steps particles were resampled and moved.
        parameters: of the kernel at each step, steps first.
        log_evidence_variance: an estimate, from this one run, of the relative variance of $\hat Z$ (see
            `log_evidence_standard_error`); nan where there is none.
        unbiased: whether $E[\hat Z] = Z$ exactly: nothing in the run was tuned by the run.
    """

    particles: Particles
    temperatures: Float[Array, " K"]
    ess: Float[Array, " K"]
    log_evidences: Float[Array, " K"]
    acceptance_rate: Float[Array, " K"]
    resampled: Bool[Array, " K"]
    parameters: Any
    log_evidence_variance: Float[Array, ""]
    unbiased: bool = eqx.field(static=True)

    @property
    def choices(self) -> dict[str, Any]:
        """The particles' latents, particles first."""
        return self.particles.choices

    @property
    def log_evidence(self) -> Float[Array, ""]:
        r"""$\log \hat Z$."""
        return self.particles.log_evidence

    @property
    def log_evidence_standard_error(self) -> Float[Array, ""]:
        r"""Standard error of $\log \hat Z$ by the delta method, from this one run.

        With $S_e$ the share of the last weights that descends from the first particle $e$, the relative variance is
        estimated by $1 - \prod_p c_p (1 - \sum_e S_e^2)$ (Lee and Whiteley 2018). For multinomial resampling $c_p = n / (n -
        1)$, and the variance of $\hat Z$ is estimated without bias; for the other methods $c_p$ follows from the variance
        of an ancestor's number of descendants. Few first particles must have descendants left, or it says nothing.
        """
        return jnp.sqrt(jnp.maximum(self.log_evidence_variance, 0.0))

    def expectation(self, function: Callable[[Any], Any]) -> Any:
        """Return the weighted mean of `function(choices of one particle)`, a pytree."""
        return self.particles.expectation(function)

    def mean(self) -> Any:
        """Return the posterior mean of every latent."""
        return self.particles.mean()

    def sd(self) -> Any:
        """Return the posterior standard deviation of every latent."""
        return self.particles.sd()

    def freeze_schedule(self) -> Schedule:
        r"""Return this run's temperatures, parameters and steps of resampling, to fix those of another with a new key.

        A run whose schedule depends on its own particles is consistent, but $E[\hat Z] \ne Z$; one with the schedule of
        an earlier run is unbiased, given that run and so over both.
        """
        return Schedule(self.temperatures, self.parameters, self.resampled)


def check_sampled(sampled: Sampled, posterior: Posterior, what: str) -> Sampled:
    """Refuse weights that are nan, or all zero at some step; nothing is known of a result that is still traced."""
    values = sampled.log_evidences
    if _jax.is_traced(values):
        return sampled
    bad = ~np.isfinite(np.asarray(values))
    if bad.any():
        step = int(np.argmax(bad))
        first = jax.tree.map(lambda x: x[0], sampled.choices)
        site = blamed_site(posterior, first)
        raise NonFiniteError(
            f"{what}: the log evidence is {np.asarray(values)[step]} at step {step + 1} of {bad.size}"
            f"{f'; the first site to blame is {site!r}' if site else ''}. No particle explains the data, or a density is nan "
            "there: use more particles, or a proposal nearer to the posterior.",
            sampled,
        )
    return sampled
