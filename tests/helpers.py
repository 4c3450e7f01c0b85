"""What tests share: exact references in plain numpy, two-stage statistical tests, and a counter of compilations."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

# --- exact references -------------------------------------------------------------------------------------------


def enumerate_choices(shapes: Any, states: Any) -> Any:
    """Return every assignment of finite latents, stacked along a new leading axis.

    `shapes` is a nested dict of things with a `.shape`, `states` a like dict of how many values each address takes.
    """
    leaves, structure = jax.tree.flatten(shapes)
    counts = [(leaf.shape, n) for leaf, n in zip(leaves, jax.tree.leaves(states), strict=True)]
    sizes = [math.prod(shape) for shape, _ in counts]
    entries = [range(n) for (_, n), size in zip(counts, sizes, strict=True) for _ in range(size)]
    table = np.array(list(itertools.product(*entries)), np.int32)
    columns = np.split(table, np.cumsum(sizes)[:-1], axis=1)
    stacked = [column.reshape(len(table), *shape) for column, (shape, _) in zip(columns, counts, strict=True)]
    return jax.tree.unflatten(structure, stacked)


def hmm_log_evidence(initial: np.ndarray, transition: np.ndarray, emission: np.ndarray) -> float:
    """Forward recursion; `emission[t, k]` is the log density of observation t in state k."""
    alpha = np.log(initial) + emission[0]
    for log_likelihood in emission[1:]:
        alpha = special.logsumexp(alpha[:, None] + np.log(transition), axis=0) + log_likelihood
    return float(np.asarray(special.logsumexp(alpha)))


def kalman_log_evidence(a: Any, q: Any, h: Any, r: Any, mean: Any, cov: Any, ys: np.ndarray) -> float:
    """Kalman filter for s' = A s + N(0, Q), y = H s + N(0, R), where (mean, cov) is the law of the state before s_1."""
    total = 0.0
    for y in ys:
        mean, cov = a @ mean, a @ cov @ a.T + q
        spread = h @ cov @ h.T + r
        total += stats.multivariate_normal(h @ mean, spread).logpdf(y)
        gain = cov @ h.T @ np.linalg.inv(spread)
        mean, cov = mean + gain @ (y - h @ mean), cov - gain @ h @ cov
    return float(total)


def gaussian_log_integral(log_density: Callable[[jax.Array], jax.Array], dimension: int) -> float:
    r"""Return $\log\int e^{f(x)}\,dx$ of a quadratic $f$, from its value, gradient and Hessian at 0: exact."""

    def taylor(x: jax.Array) -> Any:
        return log_density(x), jax.grad(log_density)(x), jax.hessian(log_density)(x)

    value, gradient, hessian = map(np.asarray, jax.jit(taylor)(jnp.zeros(dimension)))
    quadratic = gradient @ np.linalg.solve(-hessian, gradient) / 2
    return float(value + quadratic + dimension / 2 * np.log(2 * np.pi) - np.linalg.slogdet(-hessian)[1] / 2)


# --- statistical tests in two stages ----------------------------------------------------------------------------


def two_stage(p_value: Callable[[jax.Array, int], float], key: jax.Array, n: int) -> None:
    """Fail if a Monte Carlo test rejects for certain; `p_value(key, n)` runs it on n fresh samples.

    Stage 1 fails below 1e-6 and passes above 0.01; in between, stage 2 takes 8 n fresh samples and fails below 1e-6.
    The false-alarm rate over keys is 1e-6 + 0.01 * 1e-6; keys are pinned, so a test that passes goes on passing.
    A bias of 2.6 standard errors (p = 0.01) is sent on, and stands at 7 standard errors in stage 2.
    """
    first, second = jax.random.split(key)
    p = p_value(first, n)
    if p > 0.01:
        return
    assert p >= 1e-6, f"stage 1 with {n} samples: p = {p:.1e}"
    p = p_value(second, 8 * n)
    assert p >= 1e-6, f"stage 2 with {8 * n} samples: p = {p:.1e}"


def two_stage_z(sampler: Callable[[jax.Array, int], Any], exact: Any, key: jax.Array, n: int) -> None:
    """Test that the mean of i.i.d. `sampler(key, n)`, shape (n, ...), is `exact`; see `two_stage`.

    Entries are tested together by Bonferroni, so the false-alarm rate of 1e-6 holds for the whole array.
    """

    def p_value(key: jax.Array, n: int) -> float:
        samples = np.asarray(sampler(key, n), np.float64)
        assert samples.shape == (n, *np.shape(exact)) and np.isfinite(samples).all()
        error = samples.mean(0) - exact
        spread = samples.std(0, ddof=1) / np.sqrt(n)
        exactly = np.abs(error) <= 1e-12 * (1 + np.abs(exact))  # a constant entry has no spread
        z = np.where(exactly, 0.0, error / np.where(spread > 0, spread, 1e-300))
        return bonferroni(2 * stats.norm.sf(np.abs(z)))

    two_stage(p_value, key, n)


def two_stage_uniform(sampler: Callable[[jax.Array, int], Any], key: jax.Array, n: int) -> None:
    """Kolmogorov-Smirnov test that each column of `sampler(key, n)`, shape (n, ...), is uniform; see `two_stage`."""

    def p_value(key: jax.Array, n: int) -> float:
        columns = np.asarray(sampler(key, n), np.float64).reshape(n, -1).T
        return bonferroni([stats.kstest(column, "uniform").pvalue for column in columns])

    two_stage(p_value, key, n)


def bonferroni(p_values: Any) -> float:
    """Return a p-value for the worst of several tests."""
    return float(np.min(p_values) * np.size(p_values))


# --- compilations -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def count_compiles() -> Iterator[list[float]]:
    """Collect the XLA compilations made inside the block: a list of their durations."""
    compiles: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
