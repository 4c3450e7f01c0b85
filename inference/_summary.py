"""Summaries of chains: moments, Monte Carlo errors, convergence diagnostics by ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from expectax.ppl._nested import leaves_of


class Row(NamedTuple):
    """One number's summary. Example: see `summarize`."""

    mean: float
    sd: float
    mcse_mean: float
    ess_bulk: float
    ess_tail: float
    r_hat: float


class Summary(dict[str, Row]):
    """Name -> `Row`, with names such as `theta[2]`; prints as a table. Example: see `summarize`."""

    def __str__(self) -> str:
        """Return an aligned table."""
        width = max(map(len, self), default=4)
        head = f"{'':{width}}  {'mean':>9} {'sd':>9} {'mcse':>8} {'ess_bulk':>9} {'ess_tail':>9} {'r_hat':>7}"
        lines = [
            f"{name:{width}}  {r.mean:9.3f} {r.sd:9.3f} {r.mcse_mean:8.3f} {r.ess_bulk:9.0f} {r.ess_tail:9.0f} "
            f"{r.r_hat:7.3f}"
            for name, r in self.items()
        ]
        return "\n".join([head, *lines])

    __repr__ = __str__


def summarize(choices: dict[str, Any]) -> Summary:
    r"""Summarise draws of several chains.

    Args:
        choices: nested dict of arrays of shape `(num_chains, num_draws, ...)`.

    Returns:
        A `Summary`: mean, standard deviation, Monte Carlo standard error of the mean, bulk and tail effective sample
        size, and split rank-normalised $\hat R$ (Vehtari et al. 2021), computed by ArviZ.

    Example:
        >>> import jax
        >>> from expectax import inference
        >>> draws = {"x": jax.random.normal(jax.random.key(0), (4, 500))}
        >>> abs(inference.summarize(draws)["x"].r_hat - 1.0) < 0.02
        True
    """
    return Summary((name, _row(draws)) for name, draws in scalars(choices))


def scalars(choices: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(name[index], draws)` of every number in a nested dict of `(chains, draws, ...)` arrays."""
    for path, value in leaves_of(jax.device_get(choices)):
        value = np.asarray(value)
        for index in np.ndindex(value.shape[2:]):
            suffix = "[" + ",".join(map(str, index)) + "]" if index else ""
            yield path + suffix, value[(slice(None), slice(None), *index)]


def _row(draws: np.ndarray) -> Row:
    draws = np.asarray(draws, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own refactoring at import
        import arviz as az

        return Row(
            float(draws.mean()),
            float(draws.std(ddof=1)) if draws.size > 1 else float("nan"),
            float(az.mcse(draws, method="mean")),
            float(az.ess(draws, method="bulk")),
            float(az.ess(draws, method="tail", prob=(0.05, 0.95))),
            float(az.rhat(draws, method="rank")),
        )
