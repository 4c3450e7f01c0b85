"""The result of `mcmc`: draws of several chains, and what each transition told."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from expectax.ppl import Posterior

from ._summary import Summary, summarize


class Chains(eqx.Module):
    """Draws of several chains.

    Example: see `mcmc`.

    Attributes:
        choices: nested dict of latents, shape `(num_chains, num_samples, ...)`.
        statistics: `divergent` (bool), `acceptance_rate`, `num_integration_steps` (evaluations of the density or its
            gradient), `energy`, `log_density` in the kernel's space; each `(num_chains, num_samples)`.
        parameters: what the warm-up has tuned, chains first: of `nuts` and `hmc` a `step_size` and an
            `inverse_mass_matrix`.
    """

    choices: dict[str, Any]
    statistics: dict[str, Array]
    parameters: Any = ()

    @property
    def step_size(self) -> Array:
        """The adapted step size of each chain, of a kernel that has one."""
        return self.parameters["step_size"]

    @property
    def inverse_mass_matrix(self) -> Array:
        """The adapted inverse mass matrix of each chain, of a kernel that has one."""
        return self.parameters["inverse_mass_matrix"]

    def summary(self) -> Summary:
        """Return mean, sd, Monte Carlo error, split rank R-hat, bulk and tail ESS of every number."""
        return summarize(self.choices)

    def mean(self) -> Any:
        """Return the posterior mean of every latent."""
        return jax.tree.map(lambda v: jnp.mean(v, axis=(0, 1)), self.choices)

    def sd(self) -> Any:
        """Return the posterior standard deviation of every latent."""
        return jax.tree.map(lambda v: jnp.std(v, axis=(0, 1)), self.choices)

    def to_arviz(self, posterior: Posterior | None = None) -> Any:
        """Return the draws for ArviZ: an `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x).

        Args:
            posterior: if given, its observations are stored as `observed_data`.
        """
        from ._arviz import to_arviz

        return to_arviz(self, posterior)
