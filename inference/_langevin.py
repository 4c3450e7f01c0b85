"""The Metropolis-adjusted Langevin algorithm and Barker's proposal: BlackJAX's steps on the unconstrained latents."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._accept import check_exact_density, chosen
from ._kernel import Adaptation, Info, State
from ._target import Target
from ._windows import Windows

_UNADAPTED_STEP = 0.1


class Langevin(eqx.Module):
    """A kernel that moves by one gradient step and noise; made by `mala` or `barker`. Example: see `mala`."""

    name: Literal["mala", "barker"] = eqx.field(static=True)
    target_acceptance: float = eqx.field(static=True)

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position, its density and gradient."""
        check_exact_density(target, self.name)
        flat = target.flat()
        position = flat.unconstrain(latents)
        log_density, gradient = jax.value_and_grad(flat.log_density)(position)
        return State(position, log_density, gradient)

    def step(self, target: Target, state: State, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Do one transition of BlackJAX's in coordinates divided by their scales."""
        import blackjax  # here, because importing it starts JAX's backend

        algorithm = getattr(blackjax, self.name)
        scale = jnp.sqrt(parameters["inverse_mass_matrix"])
        log_density = target.flat().log_density
        here = algorithm.init(state.position / scale, lambda _: state.log_density)
        here = here._replace(logdensity_grad=state.cache * scale)
        moved, info = algorithm.build_kernel()(
            random_key(), here, lambda x: log_density(x * scale), parameters["step_size"]
        )
        there = State(moved.position * scale, moved.logdensity, moved.logdensity_grad / scale)
        after = chosen(info.is_accepted, there, state)  # so that one who stays does not drift by rounding
        return after, Info(info.acceptance_rate, energy=-after.log_density)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune the step size by dual averaging, and the scales in windows."""
        del target
        return Windows(False, self.target_acceptance).adaptation(state.position, _UNADAPTED_STEP)


def mala(*, target_acceptance: float = 0.574) -> Langevin:
    r"""The Metropolis-adjusted Langevin algorithm, by BlackJAX.

    On the unconstrained scale, with a step size $\epsilon$ and a diagonal $M^{-1}$ from the warm-up, it proposes

    $$u' = u + \epsilon M^{-1} \nabla \log \gamma(u) + \sqrt{2 \epsilon}\, M^{-1/2} \xi, \qquad \xi \sim N(0, I).$$

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: `target_acceptance` is out of range.
        DistributionError: the target's density is only estimated.

    Sources: Roberts and Tweedie 1996; the acceptance: Roberts and Rosenthal 1998.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> chains = inference.mcmc(model().given({"y": 1.0}), inference.mala(), key=jax.random.key(0), num_warmup=300)
        >>> bool(abs(chains.mean()["z"] - 0.5) < 0.15)
        True
    """
    check_acceptance(target_acceptance)
    return Langevin("mala", target_acceptance)


def barker(*, target_acceptance: float = 0.4) -> Langevin:
    r"""Barker's proposal, by BlackJAX: nearly as quick as `mala`, and robust to a step size that is off.

    Each coordinate's jump $w_i \sim N(0, \epsilon^2)$ keeps its sign with probability $1 / (1 + e^{-w_i g_i})$, where $g$ is
    the gradient in coordinates divided by the scales of the warm-up, and is turned round else.

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: `target_acceptance` is out of range.
        DistributionError: the target's density is only estimated.

    Sources: Livingstone and Zanella 2022; the acceptance: Vogrinc, Livingstone and Zanella 2023.

    Example: see `mala`.
        >>> from expectax import inference
        >>> inference.barker().target_acceptance
        0.4
    """
    check_acceptance(target_acceptance)
    return Langevin("barker", target_acceptance)


def check_acceptance(target_acceptance: float) -> None:
    """Refuse a rate that is none."""
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must be in (0, 1), got {target_acceptance}.")
