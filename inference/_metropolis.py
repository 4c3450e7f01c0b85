r"""Metropolis-Hastings with a proposal that is a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx

from expectax.ppl import AddressError, ControlFlowError, Program, ShapeError
from expectax.ppl._errors import nearest
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._program import bound_program

from ._accept import accepted, check_exact_density, chosen
from ._kernel import Adaptation, Info, State
from ._target import Target


class MetropolisHastings(eqx.Module):
    """A Metropolis-Hastings kernel; made by `mh`. Example: see `mh`."""

    proposal: Callable[[Choices], Program]
    name: str = eqx.field(static=True, default="mh")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density."""
        check_exact_density(target, self.name)
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Propose, and accept or stay."""
        del parameters
        here = state.position
        forward = _proposal(self.proposal, here, target)
        drawn = forward.rebind()
        there = merged(here, drawn.choices)
        backward = _proposal(self.proposal, there, target)
        log_backward, _ = backward.assess_inside(_part(here, drawn.choices))
        proposed = State(there, target.log_density(there))
        ratio = proposed.log_density - state.log_density + log_backward - drawn.log_density
        go, probability = accepted(ratio)
        after = chosen(go, proposed, state)
        return after, Info(probability, energy=-after.log_density)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune nothing."""
        del target, state
        return Adaptation.none()


def _part(latents: Choices, like: Choices) -> Choices:
    """Return the latents at the addresses of other choices."""
    values = dict(leaves_of(latents))
    return nested((path, values[path]) for path, _ in leaves_of(like))


def _proposal(proposal: Callable[[Choices], Program], latents: Choices, target: Target) -> Program:
    """Return the proposal at some latents; its sites must be among them."""
    program = bound_program(proposal(latents), "mh's proposal")
    known = dict(leaves_of(target.posterior.latent_sites()))
    for path, entry in leaves_of(program.sites()):
        if path not in known:
            raise AddressError(
                f"mh: the proposal's site {path!r} at {entry.site.where} is no latent of the target.{nearest(path, known)} "
                "For auxiliary choices use inference.involutive."
            )
        check_made(entry, path, "mh")
        if (entry.shape, entry.dtype) != (known[path].shape, known[path].dtype):
            raise ShapeError(
                f"mh: the proposal's site {path!r} at {entry.site.where} is {entry.dtype}{list(entry.shape)}, the latent at "
                f"{known[path].site.where} is {known[path].dtype}{list(known[path].shape)}. Propose the latent's own shape "
                "and dtype."
            )
    return program


def check_made(entry: Any, path: str, what: str) -> None:
    """Refuse a proposal's site that is not always made, or whose density is only estimated."""
    if entry.conditional:
        raise ControlFlowError(
            f"{what}: the proposal's site {path!r} at {entry.site.where} stands in a branch or has a mask, so that it is not "
            "always drawn. Draw it in every branch, or use inference.mixture of two kernels."
        )
    if entry.estimated:
        raise ControlFlowError(
            f"{what}: the density of the proposal's site {path!r} at {entry.site.where} is only estimated. Propose from a "
            "distribution, or use inference.involutive with all of its choices."
        )


def mh(proposal: Callable[[Choices], Program]) -> MetropolisHastings:
    r"""Metropolis-Hastings with a proposal of your own.

    From $z$ the proposal draws $z' \sim q(\cdot \mid z)$, which is accepted with probability

    $$\min\Big(1, \frac{\gamma(z')\, q(z \mid z')}{\gamma(z)\, q(z' \mid z)}\Big).$$

    Both proposal densities come from the program. The kernel draws no key: where the proposal is finite, `exact` and
    `assert_invariant` enumerate it.

    Args:
        proposal: `proposal(latents)` returns a bound program, whose sites are some of the latents (in their own space, not
            unconstrained); the other latents stay.

    Returns:
        A `Kernel` for `mcmc` and for the combinators.

    Raises:
        TypeError: the proposal returns no bound program.
        AddressError, ShapeError: one of its sites is no latent, or does not fit it.
        ControlFlowError: one of its sites is not always drawn.
        DistributionError: the target's density is only estimated.

    Sources: Metropolis et al. 1953; Hastings 1970.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     rate = ex.sample("rate", dist.Gamma(2.0, 1.0))
        ...     ex.sample("count", dist.Poisson(rate))
        >>> @ex.model
        ... def proposal(z):
        ...     ex.sample("rate", dist.LogNormal(jax.numpy.log(z["rate"]), 0.8))
        >>> chains = inference.mcmc(
        ...     model().given({"count": 4}), inference.mh(proposal), key=jax.random.key(0), num_warmup=100, num_samples=2000
        ... )
        >>> bool(abs(chains.mean()["rate"] - 3.0) < 0.2)
        True
    """
    if not callable(proposal):
        raise TypeError(f"mh takes a function from latents to a bound program, got {proposal!r}.")
    return MetropolisHastings(proposal)
