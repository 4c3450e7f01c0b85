"""What the scripts about Attend-Infer-Repeat share: data, and an objective for each estimator."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from expectax import models, vi

SLOTS = len(models.PRESENCE)


class Estimator(NamedTuple):
    """A bound, strategies for the three presences (None: the default), and how many samples its baseline needs."""

    bound: Callable[..., vi.Objective]
    strategies: tuple[Any, ...] | None = None
    num_samples: int = 1

    def objective(self, images: Any) -> vi.Objective:
        """Return the mean of the bound over images, to maximise over networks."""
        guide = models.air_guide
        if self.strategies is not None:
            named = {f"presence_{t}": strategy for t, strategy in enumerate(self.strategies)}
            guide = vi.with_gradients(guide, named)
        return models.amortised(models.air_posterior, guide, images, self.bound)


def every(strategy: Any) -> tuple[Any, ...]:
    """Return a strategy for every slot."""
    return (strategy,) * SLOTS


IWAE2 = functools.partial(vi.iwelbo, num_particles=2)
HYBRID = (vi.MVD(), vi.MVD(), vi.Enum())
ESTIMATORS = {
    "default": Estimator(vi.elbo),
    "ENUM": Estimator(vi.elbo, every(vi.Enum())),
    "MVD": Estimator(vi.elbo, every(vi.MVD())),
    "REINFORCE": Estimator(vi.elbo, every(vi.Reinforce(baseline=None))),
    "leave-one-out": Estimator(vi.elbo, every(vi.Reinforce()), num_samples=2),
    "hybrid": Estimator(vi.elbo, HYBRID),
    "IWAE2 + REINFORCE": Estimator(IWAE2, every(vi.Reinforce(baseline=None))),
    "IWAE2 + MVD": Estimator(IWAE2, every(vi.MVD())),
    "IWAE2 + ENUM": Estimator(IWAE2, every(vi.Enum())),
    "IWAE2 hybrid": Estimator(IWAE2, HYBRID),
    "VIMCO 5": Estimator(functools.partial(vi.vimco, num_particles=5)),
    "RWS 10": Estimator(functools.partial(vi.wake_sleep, num_particles=10)),
}
"""RWS is reweighted wake-sleep; the hybrid has MVD for the first two presences and ENUM for the last."""


def data(size: Literal["small", "full"], count: int, seed: int = 0) -> tuple[models.AIRSizes, models.Digits]:
    """Return sizes, and canvases with none to two digits: of 8 pixels on 24, or of 17 on 50."""
    digits = models.digits(size).images
    sizes = models.SMALL_AIR if size == "small" else models.AIRSizes()
    if size == "full":
        digits = models.resized(digits, 17)
    return sizes, models.canvases(np.clip(digits, 0.0, 1.0), count, sizes.canvas, seed=seed)
