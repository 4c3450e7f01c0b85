r"""The Pareto shape $\hat k$ of importance weights: can they be trusted?"""

from __future__ import annotations

from typing import Any

import numpy as np


def pareto_shape(log_weights: Any) -> float:
    r"""Return $\hat k$, the shape of a generalised Pareto distribution fitted to the largest weights.

    Args:
        log_weights: log importance weights, shape `(n,)`, with `n >= 25`.

    Returns:
        $\hat k$: below 0.5 the weights have a finite variance; below 0.7 importance sampling works; above it the
        weights tell nothing reliable, and the guide is far from the target in some direction. nan if fewer than 5
        weights stand out, or some are nan; infinity if some are infinite.

    Raises:
        ValueError: there are fewer than 25 weights.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024; the fit is that of Zhang and Stephens 2009, with their weakly
    informative prior on $k$.

    Example:
        >>> import numpy as np
        >>> from expectax import vi
        >>> light = np.random.default_rng(0).normal(size=4000) * 0.1
        >>> vi.pareto_shape(light) < 0.5
        True
    """
    x = np.asarray(log_weights, np.float64).ravel()
    if len(x) < 25:
        raise ValueError(f"pareto_shape needs at least 25 log weights, got {len(x)}.")
    if np.isnan(x).any():
        return float("nan")
    if np.isposinf(x).any():
        return float("inf")
    count = int(np.ceil(min(0.2 * len(x), 3.0 * np.sqrt(len(x)))))
    ordered = np.sort(x)
    cutoff = max(ordered[-count - 1], np.log(np.finfo(np.float64).tiny) + ordered[-1])
    tail = np.exp(ordered[-count:] - ordered[-1]) - np.exp(cutoff - ordered[-1])
    tail = tail[tail > 0]
    return _fitted_shape(tail) if len(tail) >= 5 else float("nan")


def _fitted_shape(excess: np.ndarray) -> float:
    """Fit the shape to sorted positive excesses, by averaging over a grid of the other parameter."""
    n = len(excess)
    grid = 30 + int(np.sqrt(n))
    quartile = excess[int(n / 4 + 0.5) - 1]
    b = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile)
    k = np.mean(np.log1p(-b[:, None] * excess), axis=1)
    profile = n * (np.log(-b / k) - k - 1)
    with np.errstate(over="ignore"):  # a weight of 1 / inf is 0
        weights = 1 / np.sum(np.exp(profile - profile[:, None]), axis=1)
    shape = float(np.mean(np.log1p(-np.sum(b * weights) * excess)))
    return (n * shape + 5.0) / (n + 10.0)
