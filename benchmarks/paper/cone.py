"""The noisy cone: bounds after training, and what the guides look like (Becker et al. 2024, table 4 and figure 2).

python benchmarks/paper/cone.py [--quick] [--output FOLDER]
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import common  # noqa: I001  (first: it sets NPROC before JAX)
import jax
import numpy as np
import optax

import expectax as ex
from expectax import models, vi

POSTERIOR = models.cone_posterior()
PLACES = ("x", "y")


class Case(NamedTuple):
    """A row: objective, start, the paper's number, this toolkit's goal, and the guide to draw."""

    name: str
    objective: vi.Objective
    start: Any
    paper: str
    goal: float
    drawn: Callable[[Any], ex.Program]


def ring(num_auxiliary: int) -> Callable[[Any], ex.Program]:
    """Return the ring guide with its angle integrated out."""
    return lambda params: vi.marginal(models.ring_guide(params), PLACES, vi.sir(num_auxiliary))


def chosen(guide: Callable[[Any], ex.Program], num_particles: int) -> Callable[[Any], ex.Program]:
    """Return what an importance-weighted bound stands for: one particle, chosen by its weight."""
    return lambda params: vi.normalize(POSTERIOR, vi.sir(num_particles, guide(params)))


NAIVE, RING = models.cone_guide, models.ring_guide
CASES = (
    Case("ELBO", vi.elbo(POSTERIOR, NAIVE), models.cone_start(), "-8.08", -8.08, NAIVE),
    Case(
        "IWELBO(5), batch 64", vi.iwelbo(POSTERIOR, NAIVE, 5), models.cone_start(3.0),
        "-7.79 (batch 1)", -7.53, chosen(NAIVE, 5),
    ),
    Case("HVI", vi.hvi(POSTERIOR, RING), models.ring_start(), "-9.75", -9.74, ring(1)),
    Case("IWHVI(5)", vi.iwhvi(POSTERIOR, RING, 5), models.ring_start(), "-8.18", -8.17, ring(5)),
    Case("DIWHVI(5, 5)", vi.diwhvi(POSTERIOR, RING, 5, 5), models.ring_start(), "-7.33", -7.32, chosen(ring(5), 5)),
    Case("DIWHVI(50, 50)", vi.diwhvi(POSTERIOR, RING, 50, 50), models.ring_start(), "-", -6.0, chosen(ring(50), 50)),
)  # fmt: skip


def fitted(case: Case, steps: int, samples: int) -> Any:
    """Fit one row; plain gradient ascent as in the paper."""
    optimizer = optax.sgd(1e-3)
    return vi.fit(case.objective, case.start, optimizer, key=jax.random.key(0), num_steps=steps, num_samples=samples)


def holds(case: Case, mean: float) -> bool:
    """Tell whether a bound is where it should be: at its goal, or above it for the last row; never above the evidence."""
    near = mean > case.goal if case.goal == -6.0 else abs(mean - case.goal) <= 0.05
    return near and mean < models.CONE_LOG_EVIDENCE


def draws(program: ex.Program, count: int) -> np.ndarray:
    """Return draws of a guide, shape `(count, 2)`."""
    choices = jax.jit(jax.vmap(lambda key: program.simulate(key).choices))(jax.random.split(jax.random.key(2), count))
    return np.stack([np.asarray(choices[name]) for name in PLACES], axis=1)


def main() -> None:
    """Fit, evaluate on fresh draws, draw."""
    chosen_options = common.options(__doc__)
    quick, folder = chosen_options.quick, chosen_options.output
    steps, samples, fresh = (200, 8, 2000) if quick else (5000, 64, 50_000)
    figure, axes = common.panels(2, 4)
    prior = np.random.default_rng(0).normal(scale=10.0, size=(1000, 2))
    pictures = [("prior", prior)]
    rows, begun = [], time.perf_counter()
    for case in CASES:
        heavy = case.name.endswith("50)")  # 2500 draws a sample: fewer are needed
        start = time.perf_counter()
        fit = fitted(case, steps, samples)
        found = vi.estimate(case.objective, fit.params, jax.random.key(1), fresh // 10 if heavy else fresh)
        seconds = time.perf_counter() - start
        mean, error = float(found.mean), float(found.standard_error)
        goal = f"> {case.goal}" if heavy else f"{case.goal} +- 0.05"
        verdict = "-" if quick else "yes" if holds(case, mean) else "NO"
        rows.append((case.name, case.paper, f"{mean:.3f} +- {error:.3f}", goal, verdict, f"{seconds:.1f}"))
        print(*rows[-1], sep="  ", flush=True)
        pictures.append((f"{case.name}: {mean:.2f}", draws(case.drawn(fit.params), 1000)))
    total = time.perf_counter() - begun
    rows.append(("log evidence (quadrature)", "", models.CONE_LOG_EVIDENCE, "", "", f"total {total:.1f}"))
    header = ("objective", "paper", "ours", "goal", "holds", "seconds, compiling included")
    common.report(f"Cone, {steps} steps of ascent with {samples} samples", header, rows, folder, "cone")
    for panel, (title, points) in zip(axes.flat, pictures, strict=False):
        panel.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
        panel.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    axes.flat[-1].axis("off")
    common.save(figure, folder, "cone")


if __name__ == "__main__":
    main()
