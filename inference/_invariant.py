r"""Does a kernel leave a finite target invariant? By enumeration, to rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Posterior, sample
from expectax.ppl._joint_values import joint_values
from expectax.ppl._nested import leaves_of

from ._exact import exact, tolerance_or_default
from ._kernel import Kernel, check_kernel_value, stationary_state
from ._target import Target


def assert_invariant(
    kernel: Kernel, posterior: Posterior, parameters: Any = None, *, tolerance: float | None = None
) -> float:
    r"""Assert that a kernel leaves a posterior with finite latents invariant: $\max_z |(\pi K)(z) - \pi(z)| \approx 0$.

    All joint values of the latents are enumerated, and from each of them all runs of the kernel's step, by `exact`. There
    is nothing random in it: it has no false alarms. Of a kernel that keeps more than the latents, such as
    `replica_exchange`, the law of all that it keeps is compared.

    Args:
        kernel: a kernel whose choices are finite, such as `gibbs`, `mh`, `involutive` and their compositions.
        posterior: the target, with finite latents.
        parameters: of the kernel's step; by default those of a chain without a warm-up.
        tolerance: of the largest difference; by default 1e-10 in float64 and 1e-5 in float32.

    Returns:
        The largest difference.

    Raises:
        AssertionError: it is above the tolerance; the state with the largest difference is shown.
        ControlFlowError: the latents or the kernel's choices are not finite, or too many; see `check_kernel`.
        TypeError: `kernel` is none.

    Source: Scibior et al. 2018.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     a = ex.sample("a", dist.Bernoulli(0.3))
        ...     b = ex.sample("b", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
        ...     ex.sample("y", dist.Normal(a + b, 1.0))
        >>> inference.assert_invariant(inference.gibbs(), model().given({"y": 1.0})) < 1e-5
        True
    """
    check_kernel_value(kernel, "assert_invariant")
    target = Target(posterior)
    remedy = "Use inference.check_kernel, or a smaller model."
    values = joint_values(posterior, "assert_invariant", conditional=True, remedy=remedy)
    log_densities = jnp.asarray(jax.jit(jax.vmap(target.log_density))(values))
    possible = np.flatnonzero(np.isfinite(np.asarray(log_densities)))
    if not len(possible):
        raise ControlFlowError("assert_invariant: no value of the latents has a positive density.")
    values, log_densities = jax.tree.map(lambda x: x[possible], values), log_densities[possible]

    def once() -> Any:
        number = sample("start", dist.Categorical(logits=log_densities))
        state = stationary_state(kernel, target, jax.tree.map(lambda x: x[number], values))
        own = kernel.adaptation(target, state).unadapted if parameters is None else parameters
        after, _ = kernel.step(target, state, own)
        return state.position, after.position

    law = exact(once)
    return _compared(kernel, law, tolerance_or_default(tolerance))


def _compared(kernel: Kernel, law: Any, tolerance: float) -> float:
    """Compare the law of the position before and after."""
    probabilities = np.asarray(law.probabilities, np.float64)
    reached = probabilities > 0
    before, after = (_rows(side)[reached] for side in law.values)
    rows, index = np.unique(np.concatenate([before, after]), axis=0, return_inverse=True)
    weights = np.concatenate([probabilities[reached], -probabilities[reached]])
    difference = np.bincount(index.reshape(-1), weights, minlength=len(rows))
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, np.abs(difference))))
    largest = float(abs(difference[worst]))
    if largest <= tolerance:
        return largest
    own = np.flatnonzero((np.concatenate([before, after]) == rows[worst]).all(1))
    side, run = divmod(int(own[0]), len(before))
    position = jax.tree.map(lambda x: np.asarray(x)[reached][run], law.values[side])
    here = float(probabilities[reached][(before == rows[worst]).all(1)].sum())
    raise AssertionError(
        f"{kernel.name} does not leave the posterior invariant: the state {_shown(position)} has probability {here:.6g}, and "
        f"{here - difference[worst]:.6g} after one step (difference {largest:.2g}, tolerance {tolerance:.2g})."
    )


def _rows(position: Any) -> np.ndarray:
    """Return positions, runs first, as rows of numbers."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(position)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def _shown(position: Any) -> str:
    if not isinstance(position, dict):
        return repr(position)
    return "{" + ", ".join(f"{path!r}: {np.asarray(x).tolist()}" for path, x in leaves_of(position)) + "}"
