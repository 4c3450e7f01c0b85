r"""What an algorithm must do so that a marginal, or a normalised target, is a distribution.

An algorithm estimates the evidence $Z = \int \gamma(z)\, dz$ of an unnormalised target $\gamma$, a posterior, and can be
run *conditionally*, so that a given $z$ is the one it would have returned. Let $P$ be the law of its run and $Q_z$ that
of the conditional run. The one law is

$$E_{(z, \hat Z) \sim P}[\hat Z g(z, \hat Z)] = \int \gamma(z)\, E_{\hat Z \sim Q_z}[g(z, \hat Z)]\, dz \quad (g \ge 0).$$

With $g = 1$ it says that the evidence is unbiased. All three methods are keyless programs of the objective language, so
that one algorithm serves simulation, scoring and gradients.

Sources: Andrieu, Doucet and Holenstein 2010 (conditional runs); Lew et al. 2022 (RAVI); Becker et al., PLDI 2024.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from expectax.ppl import DistributionError, Posterior, Program, ShapeError, _jax
from expectax.ppl._evaluate import Unweighed
from expectax.ppl._masked import Masked
from expectax.ppl._match import check_guide
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._staging import scalar, stage
from expectax.ppl._visitors import projecting, weighing

from ._objective import log_density, simulate


class Run(NamedTuple):
    r"""What a run returns.

    Example: see `Algorithm`.

    Attributes:
        latents: nested dict, the $z$ that stands for the posterior.
        log_density: $\log \gamma(z)$, or the very estimate of it that the run used.
        log_evidence: $\log \hat Z$.
    """

    latents: Choices
    log_density: Float[Array, ""]
    log_evidence: Float[Array, ""]


@runtime_checkable
class Algorithm(Protocol):
    """A keyless inference algorithm; see the module's law, which `vi.check_joint_identity` tests.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> class OneDraw:
        ...     '''Importance sampling with one particle of a wide normal.'''
        ...     def run(self, target):
        ...         z, log_q = vi.simulate(wide())
        ...         log_p = vi.log_density(target, z)
        ...         return vi.Run(z, log_p, log_p - log_q)
        ...     def conditional(self, target, latents, log_density):
        ...         return log_density - vi.log_density(wide(), latents)
        >>> @ex.model
        ... def wide():
        ...     ex.sample("u", dist.Normal(0.0, 2.0))
        >>> isinstance(OneDraw(), vi.Algorithm)
        True
    """

    def run(self, target: Posterior) -> Run:
        """Run on a target."""
        ...

    def conditional(self, target: Posterior, latents: Choices, log_density: Any) -> Any:
        """Return the log evidence of a run that returns the given latents, whose log density is given."""
        ...


def evidence(algorithm: Algorithm, target: Posterior) -> Any:
    """Return the log evidence of a run alone; an algorithm may have a method `evidence` that spares choices."""
    own = getattr(algorithm, "evidence", None)
    return algorithm.run(target).log_evidence if own is None else own(target)


def check_algorithm(algorithm: Any, what: str) -> Algorithm:
    """Refuse what is no algorithm."""
    if isinstance(algorithm, type) or not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"{what} at {_jax.caller()}: an algorithm has the methods run(target) and conditional(target, latents, "
            f"log_density), such as vi.sir(10) or vi.exact(), got {algorithm!r}."
        )
    return algorithm


# --- proposals --------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    r"""How an algorithm draws latents of a target: from a program, or from the target's own prior along the run."""

    program: Program | None
    target: Posterior

    @classmethod
    def of(cls, proposal: Any, target: Posterior) -> Proposal:
        """Return the proposal that a user gave: a program, a function of the observations that returns one, or None."""
        if any(isinstance(value, Masked) for _, value in leaves_of(target.observations)):
            raise ShapeError(
                "a target with missing data cannot be marginalised or normalised: give whole observations."
            )
        if proposal is None:
            return cls(None, target)
        program = proposal if isinstance(proposal, Program) else proposal(target.observations)
        if not isinstance(program, Program):
            raise TypeError(f"a proposal is a bound program, or a function that returns one, got {program!r}.")
        check_guide(program, target, _jax.caller(), covering=True)
        return cls(program, target)

    def draw(self) -> tuple[Choices, Any, Any]:
        r"""Draw latents; return them with $\log \gamma(z)$ and the log weight $\log \gamma(z) / r(z)$."""
        if self.program is None:
            outcome = self.target.program.rebind(self.target.observations)
            return self.target.latents(outcome.choices), outcome.log_density, outcome.log_weight
        latents, log_r = simulate(self.program)
        log_gamma = log_density(self.target, latents)
        return latents, log_gamma, log_gamma - log_r

    def log_weight(self, latents: Choices, log_gamma: Any) -> Any:
        r"""Return the log weight of given latents, of which $\log \gamma(z)$ is known."""
        if self.program is None:
            return _log_weight_by_prior(self.target, latents, log_gamma)
        return log_gamma - log_density(self.program, latents)


def _log_weight_by_prior(target: Posterior, latents: Choices, log_gamma: Any) -> Any:
    """Return the log density of what is observed, along the run: of an estimate only the one in `log_gamma` counts."""
    entries = dict(leaves_of(stage(target.program).sites))
    if not any(entries[path].estimated for path, _ in leaves_of(target.observations)):
        return _projected(target, latents, target.observations, weighing)
    estimated = next((path for path, _ in leaves_of(latents) if entries[path].estimated), None)
    if estimated is not None:
        raise DistributionError(
            f"the densities of {estimated!r} and of what is observed or kept are both only estimated: the prior's part "
            "of the weight is not known. Give a proposal: vi.sir(n, proposal)."
        )
    return log_gamma - _projected(target, target.observations, latents, projecting)


def _projected(target: Posterior, rest: Choices, wanted: Choices, visitor: Any) -> Any:
    """Return the log density of some choices' own sites, given the rest."""
    others = nested((path, Unweighed(value)) for path, value in leaves_of(rest))
    total = stage(target.program).run(visitor, None, merged(wanted, others)).log_weight
    return jnp.asarray(scalar(total))
