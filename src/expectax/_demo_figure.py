"""The demonstration's one figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from expectax import models

COLORS = {"NUTS": "#222222", "IS (guide)": "#1b7837", "IWELBO (5)": "#2166ac", "ELBO": "#d6604d"}


def save_figure(schools: list[Any], river: Any, folder: Path) -> Path:
    """Draw four panels and save them whole or not at all; return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _tau(axes[0, 0], schools)
    _effects(axes[0, 1], schools)
    _bounds(axes[1, 0], schools)
    _river(axes[1, 1], river)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "expectax.png"
    temporary = folder / f".expectax-{os.getpid()}.png"
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _tau(axes: Any, schools: list[Any]) -> None:
    grid = np.linspace(0.0, 20.0, 41)
    for result in schools:
        axes.hist(
            result.draws[:, 1], grid, density=True, histtype="step", lw=1.5, label=result.method,
            color=COLORS[result.method],
        )  # fmt: skip
    axes.set(title="Eight schools: spread between schools", xlabel=r"$\tau$ (points)", ylabel="posterior density")
    axes.legend(frameon=False)


def _effects(axes: Any, schools: list[Any]) -> None:
    place = np.arange(len(models.EFFECT))
    for shift, result in zip(np.linspace(-0.27, 0.27, len(schools)), schools, strict=True):
        low, middle, high = np.quantile(result.draws[:, 2:], [0.1, 0.5, 0.9], axis=0)
        axes.errorbar(
            place + shift, middle, [middle - low, high - middle], fmt="o", ms=4, lw=1.5,
            color=COLORS[result.method], label=result.method,
        )  # fmt: skip
    axes.plot(place, models.EFFECT, "x", color="#999999", label="observed")
    axes.set(title="Effect of each school: median and 80 % interval", xlabel="school", ylabel=r"$\theta_j$ (points)")
    axes.set_xticks(place, list("ABCDEFGH"))
    axes.legend(frameon=False, ncols=3, fontsize=8)


def _bounds(axes: Any, schools: list[Any]) -> None:
    for result in schools:
        if result.curve is not None:
            block = max(1, len(result.curve) // 100)
            means = result.curve[: len(result.curve) // block * block].reshape(-1, block).mean(1)
            axes.plot(np.arange(len(means)) * block, means, color=COLORS[result.method], label=result.method)
        elif result.bound is not None:
            axes.axhline(result.bound[0], color=COLORS[result.method], ls="--", label="log evidence (IS)")
    axes.set(title="Bounds during the fit", xlabel="step", ylabel="nats")
    top = max(r.bound[0] for r in schools if r.bound)
    axes.set_ylim(top - 1.5, top + 0.25)
    axes.legend(frameon=False)


def _river(axes: Any, river: Any) -> None:
    years = 1871 + np.arange(len(models.NILE))
    axes.plot(years, models.NILE, ".", color="#999999", label="flow")
    axes.plot(years, river.mean, color="#2166ac", lw=2, label="particle filter")
    axes.fill_between(years, river.mean - 2 * river.sd, river.mean + 2 * river.sd, color="#2166ac", alpha=0.2)
    axes.plot(years, river.exact.mean, "--", color="#d6604d", lw=1, label="Kalman (exact)")
    axes.set(title="Nile at Aswan: filtered level, mean ± 2 sd", xlabel="year", ylabel=r"$10^8$ m$^3$ a year")
    axes.legend(frameon=False)
