"""A sigmoid belief network: layers of binary units, each the cause of the one below, and a guide that runs upwards.

Source: R. M. Neal, Connectionist learning of belief networks, Artificial Intelligence 56 (1992); the guide: A. Mnih and
K. Gregor, Neural variational inference and learning in belief networks, ICML 2014.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import distributions as dist

from expectax.ppl import Posterior, model, sample


class SigmoidBelief(eqx.Module):
    """Weights of the network: the top layer's logits, the layers down to the pixels, the guide's layers up.

    Args:
        num_pixels: pixels of an image.
        widths: units of each hidden layer, from the top.
        key: a typed key for the initial weights.

    Example:
        >>> import jax
        >>> from expectax.models import SigmoidBelief
        >>> [layer.out_features for layer in SigmoidBelief(64, (8, 16), key=jax.random.key(0)).down]
        [16, 64]
    """

    top: Float[Array, " units"]
    down: tuple[eqx.nn.Linear, ...]
    up: tuple[eqx.nn.Linear, ...]

    def __init__(self, num_pixels: int, widths: tuple[int, ...], *, key: PRNGKeyArray):
        sizes = (*widths, num_pixels)
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        keys = jax.random.split(key, (len(pairs), 2))
        self.top = jnp.zeros(widths[0])
        self.down = tuple(eqx.nn.Linear(a, b, key=k[0]) for (a, b), k in zip(pairs, keys, strict=True))
        self.up = tuple(eqx.nn.Linear(b, a, key=k[1]) for (a, b), k in zip(pairs, keys, strict=True))


@model
def sigmoid_belief(network: SigmoidBelief) -> None:
    r"""Binary layers from the top down: $h_{l+1, i} \sim \text{Bernoulli}$ with logits $(W_l h_l + b_l)_i$.

    Sites: `layer_0` (the top) to `layer_{L-1}`, and `pixels`; vectors of the integers 0 and 1.

    Args:
        network: of which `top` and `down` are used.

    Source: Neal 1992.

    Example:
        >>> import jax
        >>> from expectax.models import SigmoidBelief, sigmoid_belief
        >>> network = SigmoidBelief(64, (8, 16), key=jax.random.key(0))
        >>> sigmoid_belief(network).simulate(jax.random.key(1)).choices["layer_1"].shape
        (16,)
    """
    logits = network.top
    for n, layer in enumerate(network.down):
        units = sample(f"layer_{n}", dist.Bernoulli(logits=logits))
        logits = layer(jnp.asarray(units, float))
    sample("pixels", dist.Bernoulli(logits=logits))


@model
def sigmoid_belief_guide(network: SigmoidBelief, image: Int[Array, " pixels"]) -> None:
    """The same layers from the image upwards.

    Args:
        network: of which `up` is used.
        image: the pixels, the integers 0 and 1.

    Source: Mnih and Gregor 2014, section 2.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import SigmoidBelief, sigmoid_belief_guide
        >>> network = SigmoidBelief(64, (8, 16), key=jax.random.key(0))
        >>> sorted(sigmoid_belief_guide(network, jnp.zeros(64, int)).simulate(jax.random.key(1)).choices)
        ['layer_0', 'layer_1']
    """
    below = jnp.asarray(image, float)
    for n, layer in reversed(list(enumerate(network.up))):
        below = jnp.asarray(sample(f"layer_{n}", dist.Bernoulli(logits=layer(below))), float)


def sigmoid_belief_posterior(network: SigmoidBelief, image: Int[Array, " pixels"]) -> Posterior:
    """Return the network of one image, given the image.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from expectax import models, vi
        >>> images = jnp.zeros((4, 64), int)
        >>> bound = functools.partial(vi.vimco, num_particles=5)
        >>> batch = models.amortised(models.sigmoid_belief_posterior, models.sigmoid_belief_guide, images, bound)
        >>> batch.surrogate(models.SigmoidBelief(64, (8, 16), key=jax.random.key(0)), jax.random.key(1)).shape
        ()
    """
    return sigmoid_belief(network).given({"pixels": image})
