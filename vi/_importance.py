"""Importance sampling with resampling, as an algorithm for marginals and normalised targets."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import Posterior, sample
from expectax.ppl._nested import Choices

from ._algorithm import Proposal, Run
from ._shared import check_particles, log_mean_exp


class SIR(eqx.Module):
    """Sampling-importance-resampling. Example: see `vi.sir`.

    Attributes:
        num_particles: how many draws of the proposal.
        proposal: as in `vi.sir`.
    """

    num_particles: int = eqx.field(static=True)
    proposal: Any = None

    def run(self, target: Posterior) -> Run:
        """Return one of the particles, chosen by weight."""
        particles, log_gamma, log_w = self._particles(target, self.num_particles)
        z, log_density = chosen((particles, log_gamma), log_w)
        return Run(z, log_density, log_mean_exp(log_w))

    def conditional(self, target: Posterior, latents: Choices, log_density: Any) -> Any:
        """Put the given latents among fresh particles."""
        own = Proposal.of(self.proposal, target).log_weight(latents, log_density)
        if self.num_particles == 1:
            return own
        _, _, others = self._particles(target, self.num_particles - 1)
        return log_mean_exp(jnp.concatenate([own[None], others]))

    def evidence(self, target: Posterior) -> Any:
        """Return the log of the mean weight."""
        return log_mean_exp(self._particles(target, self.num_particles)[2])

    def _particles(self, target: Posterior, number: int) -> tuple[Choices, Any, Any]:
        proposal = Proposal.of(self.proposal, target)
        return jax.vmap(lambda _: proposal.draw())(jnp.arange(number))


def chosen(particles: Any, log_w: Any) -> Any:
    """Choose a particle by its weight; any, if all are impossible."""
    index = sample("particle", _by_weight(log_w))
    return jax.tree.map(lambda x: x[index], particles)


def ancestors(log_w: Any) -> Any:
    """Choose the particles that go on, independently by their weights (multinomial resampling)."""
    return jax.vmap(lambda _: sample("ancestor", _by_weight(log_w)))(jnp.arange(log_w.size))


def _by_weight(log_w: Any) -> Any:
    return dist.Categorical(logits=jnp.where(jnp.any(jnp.isfinite(log_w)), log_w, 0.0))


def sir(num_particles: int, proposal: Any = None) -> SIR:
    r"""Importance sampling with $n$ particles: $\hat Z = \frac1n \sum_i \gamma(z_i) / r(z_i)$, $z_i \sim r$.

    The particles are one `vmap`: compile time does not grow with their number.

    Args:
        num_particles: $n$, at least 1.
        proposal: $r$: a bound program with exactly the target's latents as sites; or a function of the target's
            observations (of the kept choices, in a marginal) that returns one; by default the target's own prior
            along the run. It may itself have an estimated density (`vi.marginal`, `vi.normalize`): recursive nesting.

    Returns:
        An algorithm for `vi.marginal` and `vi.normalize`.

    Raises:
        ValueError: `num_particles` is less than 1.
        AddressError, ShapeError, SupportError: at first use, if the proposal does not fit the target.

    Sources: Rubin 1988; conditional form: Lew et al. 2022; Sobolev and Vetrov 2019 for marginals of guides.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def chain():
        ...     u = ex.sample("u", dist.Normal(0.0, 1.0))
        ...     ex.sample("x", dist.Normal(u, 1.0))
        >>> marginal = vi.marginal(chain(), "x", vi.sir(1000))
        >>> log_p, _ = marginal.assess({"x": 0.7}, key=jax.random.key(0))  # exactly -1.388
        >>> bool(abs(log_p + 1.388) < 0.1)
        True
    """
    check_particles("sir", num_particles)
    return SIR(num_particles, proposal)
