"""Random-walk Metropolis on the unconstrained latents: BlackJAX's step."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._accept import check_exact_density
from ._kernel import Adaptation, Info, State
from ._langevin import check_acceptance
from ._pseudo_marginal import number, root, scale_adaptation
from ._target import Target


class RandomWalk(eqx.Module):
    """A random-walk Metropolis kernel; made by `random_walk`. Example: see `random_walk`."""

    target_acceptance: float = eqx.field(static=True)
    dense_mass: bool = eqx.field(static=True)
    name: str = eqx.field(static=True, default="random_walk")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position and its density."""
        check_exact_density(target, self.name)
        flat = target.flat()
        position = flat.unconstrain(latents)
        return State(position, number(flat.log_density(position)))

    def step(self, target: Target, state: State, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Propose a normal step, and accept or stay."""
        import blackjax  # here, because importing it starts JAX's backend

        spread, size = root(parameters["inverse_mass_matrix"]), parameters["step_size"]

        def move(key: Any, position: Any) -> Any:
            noise = jax.random.normal(key, position.shape, position.dtype)
            return size * (spread @ noise if spread.ndim == 2 else spread * noise)

        walk, log_density = blackjax.additive_step_random_walk, target.flat().log_density
        here = walk.init(state.position, lambda _: state.log_density)
        moved, info = walk.build_kernel()(random_key(), here, lambda x: number(log_density(x)), move)
        return State(moved.position, moved.logdensity), Info(info.acceptance_rate, energy=-moved.logdensity)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Adapt the scale by Robbins-Monro steps, and at the end of each window the shape of the proposals."""
        del target
        return scale_adaptation(state.position, self.target_acceptance, self.dense_mass)


def random_walk(*, target_acceptance: float = 0.234, dense_mass: bool = False) -> RandomWalk:
    r"""Random-walk Metropolis on the unconstrained scale, by BlackJAX.

    It proposes $u' = u + \epsilon L \xi$ with $\xi \sim N(0, I)$, and accepts with probability
    $\min(1, \gamma(u') / \gamma(u))$. The warm-up tunes $\epsilon$ and the covariance $L L^\top$; it needs no gradient.

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).
        dense_mass: adapt a full covariance of the proposals instead of a diagonal one.

    Returns:
        A `Kernel` for `mcmc`; for estimated densities see `pseudo_marginal`.

    Raises:
        ValueError: `target_acceptance` is out of range.
        DistributionError: the target's density is only estimated.

    Sources: Metropolis et al. 1953; the acceptance: Roberts, Gelman and Gilks 1997.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> chains = inference.mcmc(posterior, inference.random_walk(), key=jax.random.key(0), num_warmup=300)
        >>> bool(abs(chains.mean()["z"] - 0.5) < 0.15)
        True
    """
    check_acceptance(target_acceptance)
    return RandomWalk(target_acceptance, dense_mass)
