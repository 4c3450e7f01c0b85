"""Schedules of temperatures: given ones, and the next one of an adaptive schedule."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from expectax.ppl import _jax
from expectax.ppl._staging import as_data

from ._path import powered
from ._sampled import Sampled, Schedule
from ._weights import effective_sample_size

_CLOSE = 2e-3
"""How near, relatively, the effective sample size comes to what it should be."""
_MOST_HALVINGS = 60


def schedule_of(temperatures: Any, parameters: Any, what: str) -> Schedule | None:
    """Return the schedule that a user gave, with one set of parameters for each temperature; None for an adaptive one."""
    if temperatures is None:
        return None
    if isinstance(temperatures, Schedule):
        if parameters is not None and temperatures.parameters is not None:
            raise ValueError(f"{what}: the schedule has parameters of the kernel already; do not give others.")
        betas = checked(temperatures.temperatures, what)
        if parameters is None:
            return Schedule(betas, temperatures.parameters)
    else:
        betas = checked(temperatures, what)
    if parameters is None:
        return Schedule(betas)
    everywhere = lambda x: jnp.broadcast_to(x, (betas.shape[0], *jnp.shape(x)))  # noqa: E731
    return Schedule(betas, jax.tree.map(everywhere, as_data(parameters)))


def checked(temperatures: Any, what: str) -> Float[Array, " K"]:
    """Return temperatures as an array; refuse those that do not rise to 1."""
    if isinstance(temperatures, int) and not isinstance(temperatures, bool):
        if temperatures < 1:
            raise ValueError(f"{what} needs at least one temperature, got {temperatures}.")
        temperatures = (np.arange(1, temperatures + 1) / temperatures) ** 3
    if _jax.is_traced(temperatures):
        return jnp.asarray(temperatures)
    betas = np.asarray(temperatures, float)
    if betas.ndim != 1 or betas.size == 0 or betas[0] <= 0 or np.any(np.diff(betas) < 0) or betas[-1] != 1.0:
        raise ValueError(f"{what} needs temperatures above 0 that rise to 1, got {temperatures!r}.")
    return jnp.asarray(betas, jnp.result_type(float))


def next_temperature(log_ratio: Float[Array, " n"], beta: Float[Array, ""], target_ess: Any) -> Float[Array, ""]:
    r"""Return the temperature at which the effective sample size falls to `target_ess` of the particles, or 1.

    The size falls as the temperature rises, so that bisection finds it: $\frac{d}{d\delta} \log ESS = 2 (E_{\delta}[\ell] -
    E_{2\delta}[\ell]) \le 0$, the means being over the particles weighed by $e^{\delta \ell}$ and $e^{2 \delta \ell}$. A
    particle that is impossible counts for nothing at any temperature: the target is a fraction of the others.
    """
    wanted = target_ess * jnp.sum(~jnp.isneginf(log_ratio))
    size = lambda there: effective_sample_size(powered(there - beta, log_ratio))  # noqa: E731
    one = jnp.ones_like(beta)

    def halved(carry: Any) -> Any:
        low, high, _, count = carry
        middle = low + 0.5 * (high - low)
        found = size(middle)
        below = found < wanted
        done = jnp.abs(found - wanted) <= _CLOSE * wanted
        return jnp.where(below & ~done, low, middle), jnp.where(below | done, middle, high), done, count + 1

    def searching(carry: Any) -> Any:
        low, high, done, count = carry
        return ~done & (high > low) & (count < _MOST_HALVINGS)

    enough = ~(size(one) < wanted)  # also where the weights are nan, of which the result then tells
    _, found, _, _ = lax.while_loop(searching, halved, (beta, one, enough, 0))
    return jnp.where(enough, one, found)


def warn_cut(sampled: Sampled, count: int, most: int, target_ess: float) -> None:
    """Say that an adaptive schedule was cut off."""
    last = float(sampled.ess[-1]) / sampled.particles.log_weights.shape[0]
    if count == most and last < 0.9 * target_ess:
        warnings.warn(
            f"tempered: {most} temperatures did not reach 1, and the last step's effective sample size is {last:.3f} of the "
            f"particles, not {target_ess}. Raise max_temperatures, or lower target_ess.",
            RuntimeWarning,
            stacklevel=3,
        )
