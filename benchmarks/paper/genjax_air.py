"""One value-and-gradient step of the small AIR in GenJAX 1.0.14, for `air_speed.py --genjax PYTHON`.

Reads names of estimators from standard input, one a line; for each does one step and answers with its seconds. It needs
an environment of its own (Python 3.12 or newer): `pip install genjax==1.0.14`.

Model, guide, networks and spatial transformer are those of `expectax.models.air`, number by number; as in GenJAX's own
example the slots are written one by one. `mean` takes the mean over the batch inside the derivative, by a derivative rule
around `Expectation.jvp_estimate`; `each` takes `grad_estimate` per image and then the mean, as GenJAX's example does.
"""

# pyright: reportMissingImports=false, reportFunctionMemberAccess=false, reportUnusedExpression=false

import os

os.environ.setdefault("NPROC", "8")

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from genjax import gen, seed
from genjax.adev import Dual, expectation, flip_enum, flip_mvd, flip_reinforce, multivariate_normal_diag_reparam
from genjax.core import distribution
from genjax.distributions import flip

BATCH, STEPS, CANVAS, WINDOW, LOOKS, WIDTH, RECURRENT = 64, 3, 24, 12, 16, 64, 64
PRESENCE = (0.05, 0.05**2.3, 0.05**5)
PLACE_MEAN, PLACE_SD, PIXEL_SD = jnp.array([3.0, 0.0, 0.0]), jnp.array([0.2, 1.0, 1.0]), 0.3
FLIPS = {
    "reinforce": flip_reinforce,
    "mvd": distribution(flip_mvd, flip.logpdf),
    "enum": distribution(flip_enum, flip.logpdf),
}
normal = multivariate_normal_diag_reparam


def linear(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    """Initial weights, uniform as equinox's."""
    a, b = jax.random.split(key)
    limit = inputs**-0.5
    return {
        "w": jax.random.uniform(a, (outputs, inputs), minval=-limit, maxval=limit),
        "b": jax.random.uniform(b, (outputs,), minval=-limit, maxval=limit),
    }


def networks(key: Any) -> dict[str, Any]:
    """All weights."""
    keys = jax.random.split(key, 7)
    return {
        "decoder": [linear(keys[0], LOOKS, WIDTH), linear(keys[1], WIDTH, WINDOW**2)],
        "inputs": linear(keys[2], CANVAS**2 + 3 + LOOKS, 4 * RECURRENT),
        "hidden": linear(keys[3], RECURRENT, 4 * RECURRENT)["w"],
        "readout": linear(keys[4], RECURRENT, 7),
        "encoder": [linear(keys[5], WINDOW**2, WIDTH), linear(keys[6], WIDTH, 2 * LOOKS)],
    }


def apply(layer: Any, x: Any) -> Any:
    """An affine layer."""
    return layer["w"] @ x + layer["b"]


def mlp(layers: Any, x: Any) -> Any:
    """One hidden layer."""
    return apply(layers[1], jax.nn.leaky_relu(apply(layers[0], x)))


def weights(coordinates: Any, size: int) -> Any:
    """Linear interpolation."""
    positions = (coordinates + 1.0) / 2.0 * (size - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(positions[:, None] - jnp.arange(size)))


def moved(picture: Any, scale: Any, across: Any, down: Any, size: int) -> Any:
    """The spatial transformer, both ways."""
    grid = jnp.linspace(-1.0, 1.0, size)
    rows, columns = weights(scale * grid + down, len(picture)), weights(scale * grid + across, len(picture))
    return rows @ picture @ columns.T


@gen
def air(decoder: Any) -> Any:
    """The model."""
    presences, places, codes = [], [], []
    for t in range(STEPS):
        presences.append(jnp.where(flip_reinforce(PRESENCE[t]) @ f"presence_{t}", 1.0, 0.0))
        places.append(normal(PLACE_MEAN, PLACE_SD) @ f"place_{t}")
        codes.append(normal(jnp.zeros(LOOKS), jnp.ones(LOOKS)) @ f"looks_{t}")

    def drawn(looks: Any, place: Any) -> Any:
        window = jax.nn.sigmoid(mlp(decoder, looks)).reshape(WINDOW, WINDOW)
        return moved(window, place[0], place[1], place[2], CANVAS)

    mean = jnp.tensordot(jnp.stack(presences), jax.vmap(drawn)(jnp.stack(codes), jnp.stack(places)), 1)
    normal(mean.ravel(), jnp.full(CANVAS**2, PIXEL_SD)) @ "image"
    return mean


def air_guide(presences: Any) -> Any:
    """The guide, with a distribution for the presences."""

    @gen
    def guide(image: Any, weights: Any) -> Any:
        hidden, cell, place, looks = jnp.zeros(RECURRENT), jnp.zeros(RECURRENT), jnp.zeros(3), jnp.zeros(LOOKS)
        for t in range(STEPS):
            inputs = jnp.concatenate([image.ravel(), place, looks])
            i, f, g, o = jnp.split(apply(weights["inputs"], inputs) + weights["hidden"] @ hidden, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            presence, shift, spread = jnp.split(apply(weights["readout"], hidden), [1, 4])
            presences(jax.nn.sigmoid(presence[0])) @ f"presence_{t}"
            place = normal(PLACE_MEAN + shift, PLACE_SD * (jax.nn.softplus(spread) + 1e-4)) @ f"place_{t}"
            window = moved(image, 1.0 / place[0], -place[1] / place[0], -place[2] / place[0], WINDOW)
            mean, spread = jnp.split(mlp(weights["encoder"], window.ravel()), 2)
            looks = normal(mean, jax.nn.softplus(spread) + 1e-4) @ f"looks_{t}"

    return guide


def elbo(presences: Any) -> Any:
    """The ELBO of one image, a function of image and weights."""
    guide = air_guide(presences)

    @expectation
    def objective(image: Any, weights: Any) -> Any:
        trace = guide.simulate(image, weights)
        choices = {"image": image.ravel(), **trace.get_choices()}
        log_p, _ = air.assess(choices, weights["decoder"])
        return jnp.sum(log_p) + trace.get_score()  # its score is -log q

    return objective


def mean_step(objective: Any) -> Any:
    """Value and gradient of the mean over the batch, the derivative taken once."""

    @jax.custom_jvp
    def one(key: Any, image: Any, weights: Any) -> Any:
        return seed(objective.prog.source.value)(key, image, weights)

    @one.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        key, image, weights = primals

        def run(image: Any, weights: Any, tangent: Any) -> Any:
            duals = Dual.dual_tree((image, weights), (jnp.zeros_like(image), tangent))
            (value,), (slope,) = Dual.tree_unzip(objective.jvp_estimate(*duals))
            return value, slope

        return seed(run)(key, image, weights, tangents[2])

    def loss(weights: Any, images: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(images))
        return jnp.mean(jax.vmap(one, (0, 0, None))(keys, images, weights))

    return jax.jit(jax.value_and_grad(loss))


def each_step(objective: Any) -> Any:
    """Value and gradient per image, and then the means."""
    run = seed(lambda x, w: (objective.prog.source.value(x, w), objective.grad_estimate(x, w)[1]))

    def step(weights: Any, images: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(images))
        found = jax.vmap(run, (0, 0, None))(keys, images, weights)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

    return jax.jit(step)


def main() -> None:
    """Answer until the input ends."""
    parameters = networks(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (BATCH, CANVAS, CANVAS))
    ways = {"mean": mean_step, "each": each_step}
    steps: dict[str, Any] = {}
    print(json.dumps({"ready": jax.__version__}), flush=True)
    for count, line in enumerate(sys.stdin):
        estimator, way = line.split()
        if line not in steps:
            jax.clear_caches()
            steps[line] = ways[way](elbo(FLIPS[estimator]))
        start, cpu = time.perf_counter(), time.process_time()
        value, gradient = jax.block_until_ready(steps[line](parameters, images, jax.random.key(count)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        bias = float(gradient["readout"]["b"][0])
        print(json.dumps({"seconds": seconds, "cpu": cpu, "value": float(value), "gradient": bias}), flush=True)


if __name__ == "__main__":
    main()
