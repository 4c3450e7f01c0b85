"""Time of one AIR value-and-gradient step, by estimator (Becker et al. 2024, table 2).

python benchmarks/paper/air_speed.py [--genjax PYTHON] [--size full] [--quick] [--output FOLDER]

Batch 64, random images, the candidates taking turns; the first call (tracing and compiling, caches cleared) stands
apart. `--genjax` takes the Python of an environment with `genjax==1.0.14` and times `genjax_air.py` in turn with ours:
"each" is written as GenJAX's own example (gradients per image, then the mean), "mean" has the mean inside the derivative.
"""

import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import air
import common  # noqa: I001  (first: it sets NPROC before JAX)
import equinox as eqx
import jax

from expectax import models, vi

BATCH = 64
PAPER = {
    "ENUM": (6.22, 122.93),
    "MVD": (1.74, None),
    "REINFORCE": (1.52, 12.28),
    "IWAE2 + REINFORCE": (2.28, 22.17),
    "IWAE2 + MVD": (3.74, None),
}
"""Seconds for an epoch of 60,000 images on an RTX 4090: genjax.vi, and Pyro."""


class Seconds(NamedTuple):
    """What a call took: by the clock, and of all processors together."""

    wall: float
    cpu: float


def ours(estimator: air.Estimator, networks: models.AIRNetworks, images: Any) -> Callable[[int], Seconds]:
    """Return a function that does one step and says how long it took."""
    params, rest = eqx.partition(networks, eqx.is_inexact_array)

    def loss(params: Any, images: Any, key: Any) -> Any:
        return estimator.objective(images).surrogate(eqx.combine(params, rest), key, estimator.num_samples)

    step = jax.jit(jax.value_and_grad(loss))

    def timed(i: int) -> Seconds:
        key = jax.random.key(i)
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(params, images, key))
        return Seconds(time.perf_counter() - start, time.process_time() - cpu)

    return timed


class GenJAX:
    """The other environment's process, which answers a line with the seconds of a step."""

    def __init__(self, python: str):
        script = Path(__file__).parent / "genjax_air.py"
        self.process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(f"GenJAX 1.0.14 with JAX {self.answer()['ready']}", flush=True)

    def step(self, estimator: str, way: str) -> Seconds:
        """Do one step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{estimator.lower()} {way}\n")
        self.process.stdin.flush()
        found = self.answer()
        return Seconds(found["seconds"], found["cpu"])

    def answer(self) -> dict[str, Any]:
        """Read a line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("GenJAX's process ended: see its message above.")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Found(NamedTuple):
    """The first call, and the median and the least seconds of the warm ones."""

    first: Seconds
    median: float
    least: float


def measured(candidates: dict[str, Callable[[int], Seconds]], repeats: int) -> dict[str, Found]:
    """Call the candidates in turns, each round in another order."""
    order = random.Random(0)
    first = {}
    for name, step in candidates.items():
        jax.clear_caches()
        first[name] = step(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(1, repeats + 1):
        for name in order.sample(list(candidates), len(candidates)):
            times[name].append(candidates[name](repeat).wall)
    return {name: Found(first[name], statistics.median(t), min(t)) for name, t in times.items()}


def main() -> None:
    """Measure all estimators."""
    genjax = {"default": None, "help": "a Python with genjax==1.0.14"}
    only = {"default": None, "help": "some of the estimators, separated by commas"}
    chosen = common.options(__doc__, sizes=True, genjax=genjax, only=only)
    sizes = models.SMALL_AIR if chosen.size == "small" else models.AIRSizes()
    networks = models.AIRNetworks(sizes, key=jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (BATCH, sizes.canvas, sizes.canvas))
    names = ["ENUM", "MVD"] if chosen.quick else list(air.ESTIMATORS)
    names = names if chosen.only is None else chosen.only.split(",")
    candidates = {name: ours(air.ESTIMATORS[name], networks, images) for name in names}
    other = GenJAX(chosen.genjax) if chosen.genjax else None
    if other is not None:
        for name in (name for name in ("REINFORCE", "MVD", "ENUM") if name in names):
            for way in ("each", "mean"):
                candidates[f"GenJAX {name}, {way}"] = lambda _, p=other, name=name, way=way: p.step(name, way)
    vi.value_and_grad(models.amortised(models.air_posterior, models.air_guide, images[:1]))(networks, jax.random.key(0))
    found = measured(candidates, 3 if chosen.quick else 60)
    if other is not None:
        other.close()
    rows = []
    for name, (first, median, least) in found.items():
        theirs, pyro = PAPER.get(name, (None, None))
        times = f"{1e3 * median:.2f}", f"{1e3 * least:.2f}", f"{first.wall:.2f} ({first.cpu:.2f})"
        rows.append((name, theirs or "-", pyro or "-", *times))
    header = ("estimator", "paper, s an epoch", "Pyro, s an epoch", "ms a step", "least", "first call, s (CPU s)")
    title = f"AIR, {chosen.size} size, batch {BATCH}, value and gradient"
    common.report(title, header, rows, chosen.output, f"air-speed-{chosen.size}")
    figure, axes = common.panels(1, 1, 7.0, 3.5)
    axes[0, 0].barh(list(found), [1e3 * f.median for f in found.values()])
    axes[0, 0].set(xlabel="ms a step", title=title)
    axes[0, 0].invert_yaxis()
    common.save(figure, chosen.output, f"air-speed-{chosen.size}")


if __name__ == "__main__":
    main()
