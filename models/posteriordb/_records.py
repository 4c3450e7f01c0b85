"""The vendored JSON records: data, reference statistics and Stan's densities, read when asked for."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

import numpy as np


class Reference(NamedTuple):
    """Posterior moments of one scalar quantity from a long run of Stan, with their Monte Carlo standard errors.

    Example: see `load`.

    Attributes:
        mean: posterior mean.
        sd: posterior standard deviation.
        second_moment: posterior mean of the square.
        mcse_mean: standard error of `mean`.
        mcse_sd: standard error of `sd`.
        mcse_second_moment: standard error of `second_moment`; None where the run did not report it.
    """

    mean: float
    sd: float
    second_moment: float
    mcse_mean: float
    mcse_sd: float
    mcse_second_moment: float | None


class Points(NamedTuple):
    """Stan's log density and its gradient at a few points of Stan's unconstrained space.

    Example: see `load`.

    Attributes:
        unconstrained: the points, one a row.
        log_density: log density with the log Jacobian, up to a constant that all points share.
        log_density_without_jacobian: the same without the log Jacobian, up to the same constant.
        gradient: gradient of `log_density` in the unconstrained numbers, one row a point.
        parameters: constrained values at the points, by the names of the reference statistics.
        origin: who computed them.
    """

    unconstrained: np.ndarray
    log_density: np.ndarray
    log_density_without_jacobian: np.ndarray
    gradient: np.ndarray
    parameters: dict[str, np.ndarray]
    origin: str


def read(name: str) -> dict[str, Any]:
    """Return the JSON record of a posterior."""
    text = resources.files("expectax.models.posteriordb").joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def references(record: dict[str, Any]) -> dict[str, Reference]:
    """Return the reference statistics by quantity."""
    return {quantity: Reference(**statistics) for quantity, statistics in record["reference"].items()}


def points(record: dict[str, Any]) -> Points:
    """Return Stan's points as float64 NumPy arrays."""
    raw = record["points"]
    arrays = {field: np.array(raw[field]) for field in Points._fields[:4]}
    return Points(**arrays, parameters={k: np.array(v) for k, v in raw["parameters"].items()}, origin=raw["origin"])
