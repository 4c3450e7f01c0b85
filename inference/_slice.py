"""Slice sampling of one unconstrained coordinate after the other: BlackJAX's steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._accept import check_exact_density
from ._kernel import Adaptation, Info, Stage, State
from ._pseudo_marginal import number
from ._target import Target
from ._windows import floats

_WIDTH = 2.0
"""Width of the first bracket, in standard deviations."""


class Slice(eqx.Module):
    """A coordinate-wise slice kernel; made by `slice`. Example: see `slice`."""

    max_expansions: int = eqx.field(static=True)
    name: str = eqx.field(static=True, default="slice")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position and its density."""
        check_exact_density(target, self.name)
        flat = target.flat()
        position = flat.unconstrain(latents)
        return State(position, number(flat.log_density(position)))

    def step(self, target: Target, state: State, parameters: dict[str, Any]) -> tuple[State, Info]:
        """Move every coordinate once, in a random order, which keeps the kernel reversible."""
        from blackjax.mcmc.slice import SliceState, build_coordinate_kernel, stepping_out

        log_density = target.flat().log_density

        def along(key: Any, position: Any, log_density: Any, index: Any) -> Any:
            del key

            def at(shift: Any) -> Any:
                moved = position.at[index].add(shift.astype(position.dtype))
                value = number(log_density(moved)).astype(position.dtype)
                return SliceState(moved, value), value > -jnp.inf  # a level of minus infinity admits nothing impossible

            return at

        kernel = build_coordinate_kernel(
            interval=stepping_out,
            axis_proposal=along,
            initial_widths=parameters["width"],
            max_expansions=self.max_expansions,
        )
        moved, info = kernel(random_key(), SliceState(state.position, state.log_density), log_density)
        steps = info.num_expansions + info.num_shrink
        after = State(moved.position, moved.logdensity)
        return after, Info(info.is_accepted.astype(float), num_steps=steps, energy=-after.log_density)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Adapt the widths to the coordinates' standard deviations at the end of each window."""
        del target
        return _width_adaptation(state.position)


class _Tuning(NamedTuple):
    """The variances that are being learned, and the widths in use."""

    moments: Any
    width: Any


def _width_adaptation(position: Any) -> Adaptation:
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation

    init, learn, finish = mass_matrix_adaptation(True)
    size, dtype = position.shape[0], position.dtype

    def update(own: _Tuning, stage: Stage, state: State, info: Info) -> _Tuning:
        del info
        moments = lax.cond(stage.slow, lambda: learn(own.moments, state.position), lambda: own.moments)
        return lax.cond(stage.window_end, renewed, lambda own: own, _Tuning(moments, own.width))

    def renewed(own: _Tuning) -> _Tuning:
        moments = finish(own.moments)
        return _Tuning(moments, _WIDTH * jnp.sqrt(moments.inverse_mass_matrix))

    def parameters(own: _Tuning) -> dict[str, Any]:
        return {"width": own.width}

    unit = jnp.full(size, _WIDTH, dtype)
    return Adaptation(_Tuning(floats(init(size), dtype), unit), update, parameters, parameters, {"width": unit})


def slice(*, max_expansions: int = 10) -> Slice:
    r"""Slice sampling of every unconstrained coordinate in turn, in a random order, by BlackJAX.

    For each coordinate a level $\log \gamma(u) + \log U(0, 1)$ is drawn; a bracket of the warm-up's width steps out until both
    ends are below the level, and shrinks to the present point until a uniform draw is above it. No gradient, no rejection.

    Args:
        max_expansions: at most so many steps out, for one coordinate; any number is exact.

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: `max_expansions` is out of range.
        DistributionError: the target's density is only estimated.

    Source: Neal 2003.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.StudentT(3.0, 1.0, 0.5))
        >>> chains = inference.mcmc(model().given({}), inference.slice(), key=jax.random.key(0), num_warmup=100)
        >>> bool(abs(chains.mean()["z"] - 1.0) < 0.15)
        True
    """
    if max_expansions < 1:
        raise ValueError(f"slice: need max_expansions >= 1, got {max_expansions}.")
    return Slice(max_expansions)
