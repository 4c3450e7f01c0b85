"""MCMC kernels as values: which BlackJAX kernel, with which settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

LogDensity = Callable[..., Any]
"""Of a position; with a key where the density is only estimated."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Hamiltonian kernel and its warm-up; made by `nuts` or `hmc`. Example: see `nuts`."""

    name: Literal["nuts", "hmc"]
    target_acceptance: float
    dense_mass: bool
    settings: tuple[tuple[str, Any], ...]

    @property
    def _algorithm(self) -> Any:
        import blackjax  # here, because importing it starts JAX's backend

        return getattr(blackjax, self.name)

    def init(self, position: Any, log_density: LogDensity) -> Any:
        """Return the kernel's state at a position."""
        return self._algorithm.init(position, log_density)

    def warm_up(self, key: Any, position: Any, log_density: LogDensity, num_steps: int) -> tuple[Any, dict[str, Any]]:
        """Adapt step size and mass matrix in windows as Stan does; return the state and the parameters."""
        import blackjax
        import blackjax.adaptation.base as adaptation_base

        adaptation: Any = blackjax.window_adaptation(
            self._algorithm,
            log_density,
            is_mass_matrix_diagonal=not self.dense_mass,
            target_acceptance_rate=self.target_acceptance,
            adaptation_info_fn=adaptation_base.get_filter_adapt_info_fn(),
            **dict(self.settings),
        )
        (state, parameters), _ = adaptation.run(key, position, num_steps)
        adapted = {name: parameters[name] for name in ("step_size", "inverse_mass_matrix")}
        return state, adapted

    def step(self, key: Any, state: Any, log_density: LogDensity, parameters: dict[str, Any]) -> tuple[Any, Any]:
        """Do one transition; return the state and BlackJAX's info."""
        kernel = self._algorithm.build_kernel()
        return kernel(key, state, log_density, **parameters, **dict(self.settings))


def nuts(*, target_acceptance: float = 0.8, max_tree_depth: int = 10, dense_mass: bool = False) -> Kernel:
    """The no-U-turn sampler (Hoffman and Gelman 2014; multinomial form of Betancourt 2017), by BlackJAX.

    Args:
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1); nearer to 1 for hard geometries.
        max_tree_depth: at most `2**max_tree_depth` leapfrog steps a transition.
        dense_mass: adapt a full mass matrix instead of a diagonal one.

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> from expectax import inference
        >>> inference.nuts(target_acceptance=0.95).name
        'nuts'
    """
    _check(target_acceptance, max_tree_depth, "max_tree_depth")
    return Kernel("nuts", target_acceptance, dense_mass, (("max_num_doublings", max_tree_depth),))


def hmc(*, num_integration_steps: int = 10, target_acceptance: float = 0.8, dense_mass: bool = False) -> Kernel:
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps (Duane et al. 1987; Neal 2011), by BlackJAX.

    Args:
        num_integration_steps: leapfrog steps a transition.
        target_acceptance: mean acceptance that the warm-up aims at, in (0, 1).
        dense_mass: adapt a full mass matrix instead of a diagonal one.

    Returns:
        A `Kernel` for `mcmc`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> from expectax import inference
        >>> inference.hmc(num_integration_steps=20).name
        'hmc'
    """
    _check(target_acceptance, num_integration_steps, "num_integration_steps")
    return Kernel("hmc", target_acceptance, dense_mass, (("num_integration_steps", num_integration_steps),))


def _check(target_acceptance: float, count: int, name: str) -> None:
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must be in (0, 1), got {target_acceptance}.")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
