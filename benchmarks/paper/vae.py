"""The cost of a VAE's value and gradient beside hand-written JAX (Becker et al. 2024, table 1).

python benchmarks/paper/vae.py [--size full] [--quick] [--output FOLDER]

Goal: a ratio of at most 1.03, and as many XLA flops. Both take the mean over the batch inside the derivative. `small` has
the pixels of scikit-learn's digits and the paper's layers; `full` the paper's 28 x 28 pixels.
"""

from collections.abc import Callable
from typing import Any

import common  # noqa: I001  (first: it sets NPROC before JAX)
import equinox as eqx
import jax
import jax.numpy as jnp
from timing import interleaved

from expectax import dist, models

BATCHES = (64, 128, 256, 512, 1024)
PAPER = {64: (0.11, 0.09), 128: (0.22, 0.16), 256: (0.31, 0.29), 512: (0.56, 0.54), 1024: (1.58, 1.07)}
"""Milliseconds on an RTX 4090: theirs, and their hand-written gradient."""


def mlp(layers: Any, x: Any) -> Any:
    """One hidden layer, by hand; a batch is a matrix."""
    hidden = jax.nn.leaky_relu(x @ layers[0].weight.T + layers[0].bias)
    return hidden @ layers[1].weight.T + layers[1].bias


def by_hand(networks: models.VAE, images: Any, key: Any) -> Any:
    """The mean ELBO of a batch, one sample an image, as one writes it for this one model; numpyro's densities."""
    mean, spread = jnp.split(mlp(networks.encoder.layers, jnp.asarray(images, float)), 2, axis=1)
    scale = jax.nn.softplus(spread)
    z = mean + scale * jax.random.normal(key, mean.shape)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    log_p += dist.Bernoulli(logits=mlp(networks.decoder.layers, z)).log_prob(images).sum(1)
    return jnp.mean(log_p - dist.Normal(mean, scale).log_prob(z).sum(1))


def ours(networks: models.VAE, images: Any, key: Any) -> Any:
    """The same by the toolkit."""
    return models.vae_elbo(images).surrogate(networks, key)


def gradient(function: Callable[..., Any], networks: models.VAE) -> tuple[Any, Any]:
    """Return the compiled value-and-gradient of a function of networks, images and a key, and its float parameters."""
    params, rest = eqx.partition(networks, eqx.is_inexact_array)
    return jax.jit(jax.value_and_grad(lambda p, x, key: function(eqx.combine(p, rest), x, key))), params


def flops(compiled: Any) -> float:
    """Return what XLA counts."""
    return compiled.cost_analysis()["flops"]


def main() -> None:
    """Measure each batch size."""
    chosen = common.options(__doc__, sizes=True)
    pixels, repeats = (64 if chosen.size == "small" else 784), (5 if chosen.quick else 200)
    networks = models.VAE(pixels, key=jax.random.key(0))
    (run, params), (run_by_hand, _) = gradient(ours, networks), gradient(by_hand, networks)
    rows, curves = [], []
    for batch in BATCHES[:2] if chosen.quick else BATCHES:
        images = jax.random.bernoulli(jax.random.key(1), 0.2, (batch, pixels)).astype(jnp.int32)
        key = jax.random.key(0)
        counted = [flops(f.lower(params, images, key).compile()) for f in (run, run_by_hand)]
        candidates = {
            name: lambda i, f=f, x=images: f(params, x, jax.random.key(i))
            for name, f in (("ours", run), ("hand", run_by_hand))
        }
        found = interleaved(candidates, repeats)
        a, b = 1e3 * found["ours"]["median"], 1e3 * found["hand"]["median"]
        curves.append((batch, a, b))
        rows.append(
            (
                batch,
                "{} / {}".format(*PAPER[batch]),
                f"{a:.3f} / {b:.3f}",
                f"{a / b:.3f}",
                "yes" if a / b <= 1.03 else "NO",
                f"{counted[0] / 1e6:.3f} / {counted[1] / 1e6:.3f}",
                f"{counted[0] / counted[1]:.4f}",
            )
        )
    header = (
        "batch",
        "paper, ms on a GPU",
        "ours / by hand, ms",
        "ratio",
        "<= 1.03",
        "Mflops, ours / by hand",
        "ratio",
    )
    common.report(f"VAE of {pixels} pixels, value and gradient", header, rows, chosen.output, f"vae-{chosen.size}")
    figure, axes = common.panels(1, 1, 5.0, 3.5)
    for n, label in ((1, "ours"), (2, "by hand")):
        axes[0, 0].loglog([c[0] for c in curves], [c[n] for c in curves], "o-", label=label, base=2)
    axes[0, 0].set(xlabel="batch", ylabel="ms", title=f"VAE gradient, {pixels} pixels")
    axes[0, 0].legend(frameon=False)
    common.save(figure, chosen.output, f"vae-{chosen.size}")


if __name__ == "__main__":
    main()
