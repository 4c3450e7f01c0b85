r"""Exact tests of weighted particles: is an algorithm properly weighted for its posterior?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expectax.ppl import Posterior
from expectax.ppl._joint_values import joint_values
from expectax.ppl._nested import leaves_of

from ._absent import without_absent
from ._exact import exact, tolerance_or_default
from ._particles import Particles
from ._population import Population


def assert_valid(
    algorithm: Callable[[Posterior], Any], posterior: Posterior, *, tolerance: float | None = None
) -> None:
    r"""Prove, by enumeration, that an algorithm is properly weighted: $E[\frac1n \sum_i w_i f(z_i)] = \int \gamma f$.

    All runs of the algorithm are enumerated, with their probabilities; the equation is checked for the indicator $f$ of
    every joint value of the latents, and so for every $f$. With $f = 1$ it says that the evidence is unbiased. There
    are no false alarms.

    Args:
        algorithm: a keyless program of the posterior that returns `Particles` or a `Population`.
        posterior: a target with few finite latents. Of those in a branch that is not taken the value does not matter.
        tolerance: the largest error allowed, relative to the largest density; by default 1e-10 in float64, 1e-5 in
            float32.

    Raises:
        AssertionError: the equation fails; the worst latents are named.
        ControlFlowError: the algorithm or the posterior has a choice without finite support, or too many.

    Source: Scibior et al. 2018; Naesseth, Lindsten and Schön 2015.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Bernoulli(0.3))
        ...     ex.sample("y", dist.Normal(1.0 * z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> inference.assert_valid(lambda target: inference.resample(inference.spawn(target, 2)), posterior)
    """
    values = joint_values(posterior, "assert_valid", conditional=True)
    plain = jax.vmap(lambda z: without_absent(posterior, z))
    kept = np.asarray(jnp.diagonal(matches(values, plain(values))))
    values = jax.tree.map(lambda x: x[kept], values)
    expected = np.exp(np.asarray(jax.jit(jax.vmap(posterior.log_density))(values)))

    def masses() -> Any:
        result = algorithm(posterior)
        particles = result.particles if isinstance(result, Population) else result
        if not isinstance(particles, Particles):
            raise TypeError(f"assert_valid: the algorithm must return Particles or a Population, got {result!r}.")
        weights = jnp.exp(particles.log_weights + particles.log_offset) / particles.log_weights.shape[0]
        same = matches(values, plain(particles.choices))
        return same.astype(weights.dtype) @ weights

    found = np.asarray(exact(masses).expectation())
    error = np.abs(found - expected) / expected.max()
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    if not error[worst] <= tolerance_or_default(tolerance):
        shown = {path: np.asarray(x[worst]).tolist() for path, x in leaves_of(values)}
        raise AssertionError(
            f"the algorithm is not properly weighted: at {shown} the expected mass is {found[worst]:.12g}, but the density is "
            f"{expected[worst]:.12g}; in all {found.sum():.12g} for an evidence of {expected.sum():.12g}."
        )


def matches(values: Any, others: Any) -> Any:
    """Return which of some latents equals which of others, shape `(values, others)`."""
    columns = zip(jax.tree.leaves(values), jax.tree.leaves(others), strict=True)
    rows = [(jnp.reshape(a, (a.shape[0], 1, -1)), jnp.reshape(b, (1, b.shape[0], -1))) for a, b in columns]
    return jnp.all(jnp.concatenate([a == b for a, b in rows], axis=-1), axis=-1)
