r"""The densities between a proposal and a posterior: $\gamma_\beta = r^{1 - \beta} \gamma^\beta$."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from expectax.ppl import ControlFlowError, DistributionError, Posterior, Program, ShapeError, _jax
from expectax.ppl._evaluate import Unweighed
from expectax.ppl._marginalize import marginal_p
from expectax.ppl._masked import Masked
from expectax.ppl._match import check_guide
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._program import bound_program
from expectax.ppl._staging import scalar, stage
from expectax.ppl._stochastic import stochastic_p
from expectax.ppl._transforms import _scale
from expectax.ppl._visitors import weighing

from ._target import Target


class Path(eqx.Module):
    r"""A posterior $\gamma$ and a normalised program $r$ over its latents; by default its own prior along the run.

    With the prior, $\gamma_\beta$ is the prior times the likelihood to the power $\beta$.
    """

    posterior: Posterior
    proposal: Program | None

    def checked(self, what: str) -> Path:
        """Refuse a proposal that does not fit, and densities that are not exact; to be called once, while compiling."""
        posterior, proposal = self.posterior, self.proposal
        for path, y in leaves_of(posterior.observations):
            if isinstance(y, Masked):
                raise ShapeError(f"{what}: the data of {path!r} are given in part. Give them whole (see ppl.mask).")
        if proposal is not None:
            check_guide(bound_program(proposal, "the proposal"), posterior, _jax.caller(), covering=True)
        for program in (posterior.program, proposal):
            for path, entry in leaves_of(program.sites()) if program is not None else ():
                if entry.estimated:
                    raise DistributionError(
                        f"{what}: the density of {path!r} at {entry.site.where} is only estimated, but a temperature needs "
                        "its powers, and a kernel its values again and again. Use importance."
                    )
        if proposal is None and self._sums:
            raise ControlFlowError(
                f"{what}: the model sums over choices, so that its prior has no density apart from its data's. Give a "
                "proposal: a bound program whose sites are the latents."
            )
        return self

    @property
    def _sums(self) -> bool:
        """Tell whether the program sums over choices, so that its density is no product over sites."""
        return _jax.contains(_jax.close(stage(self.posterior.program).jaxpr)[0], marginal_p, stochastic_p)

    def draw(self) -> tuple[Choices, Float[Array, ""]]:
        r"""Draw latents from $r$, with $\log \gamma(z) / r(z)$; a keyless program."""
        if self.proposal is None:
            outcome = self.posterior.program.rebind(self.posterior.observations)
            return self.posterior.latents(outcome.choices), outcome.log_weight
        outcome = self.proposal.rebind()
        return outcome.choices, self.posterior.log_density_inside(outcome.choices) - outcome.log_density

    def log_ratio(self, latents: Choices) -> Float[Array, ""]:
        r"""Return $\log \gamma(z) / r(z)$: with the prior, the log likelihood."""
        if self.proposal is not None:
            return self.posterior.log_density_inside(latents) - self.proposal.assess_inside(latents)[0]
        prior = nested((path, Unweighed(x)) for path, x in leaves_of(latents))
        outcome = stage(self.posterior.program).run(weighing, None, merged(self.posterior.observations, prior))
        return jnp.asarray(scalar(outcome.log_weight))

    def at(self, beta: Float[Array, ""]) -> Target:
        r"""Return $\gamma_\beta$, for $\beta > 0$.

        A power of a density is the same program with its sites scaled, so that one evaluation, and one gradient, does;
        what sums over hidden choices has no such program, and is corrected afterwards.
        """
        program, proposal = self.posterior.program, self.proposal
        if self._sums:
            return Target(self.posterior, lambda z: _finite(-(1.0 - beta) * self.log_ratio(z)))
        observed = dict(leaves_of(self.posterior.observations))
        powers = nested(
            (path, jnp.broadcast_to(beta, entry.elements))
            for path, entry in leaves_of(stage(program).table)
            if entry.kind == "observed" or path in observed or (entry.kind == "choice" and proposal is not None)
        )
        powered = Posterior(_scale(program, powers), self.posterior.observations)
        if proposal is None:
            return Target(powered)
        return Target(powered, lambda z: (1.0 - beta) * proposal.assess_inside(z)[0])


def powered(change: Float[Array, ""], log_ratio: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""Return $(\beta' - \beta) \log \gamma / r$; where the temperature stays, an impossible particle weighs as any other."""
    return jnp.where(change == 0.0, 0.0, jnp.where(change == 0.0, 1.0, change) * log_ratio)


def _finite(correction: Any) -> Any:
    """Leave an impossible point to the posterior's own density, which is 0."""
    return jnp.where(jnp.isfinite(correction), correction, 0.0)
