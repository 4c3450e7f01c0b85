r"""Attend, Infer, Repeat: images made of a few objects, each with a presence, a place and a look.

The model has three slots. The guide looks at the image once for each: a recurrent network says whether there is one more
object and where it is; the image is cropped there, and an encoder says what it looks like.

Source: S. M. A. Eslami et al., Attend, Infer, Repeat: fast scene understanding with generative models, NeurIPS 2016;
sizes and priors of Becker et al., PLDI 2024, section 7. As in its later versions the guide's presences do not depend on
each other given the image, so that summing over all of them shares the guide's work.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import distributions as dist

from expectax.ppl import Posterior, Program, model, sample

from ._networks import affine, lstm, mlp
from ._spatial import crop, paste

PRESENCE = (0.05, 0.05**2.3, 0.05**5)
"""Prior probability that each slot holds an object."""

PLACE_MEAN, PLACE_SD = (3.0, 0.0, 0.0), (0.2, 1.0, 1.0)
"""Prior of a place: scale, shift to the right, shift down; see `paste`."""

PIXEL_SD = 0.3
"""Standard deviation of a pixel's noise."""


class AIRSizes(NamedTuple):
    """Sizes of the images and networks; these are those of the paper, `SMALL_AIR` are for a laptop.

    Example:
        >>> from expectax.models import SMALL_AIR, AIRSizes
        >>> AIRSizes().canvas, SMALL_AIR.canvas
        (50, 24)
    """

    canvas: int = 50
    window: int = 20
    looks: int = 50
    recurrent: int = 256
    width: int = 200


SMALL_AIR = AIRSizes(canvas=24, window=12, looks=16, recurrent=64, width=64)
"""Small sizes: objects of 8 pixels on a canvas of 24."""


class AIRNetworks(eqx.Module):
    """The networks: a decoder from looks to a window, and for the guide an LSTM, its readout and an encoder.

    Args:
        sizes: of the images and layers.
        key: a typed key for the initial weights.

    Example:
        >>> import jax
        >>> from expectax.models import SMALL_AIR, AIRNetworks
        >>> AIRNetworks(SMALL_AIR, key=jax.random.key(0)).decoder.out_size  # 12 x 12 pixels
        144
    """

    decoder: eqx.nn.MLP
    lstm: eqx.nn.LSTMCell
    readout: eqx.nn.Linear
    encoder: eqx.nn.MLP
    sizes: AIRSizes = eqx.field(static=True)

    def __init__(self, sizes: AIRSizes = SMALL_AIR, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        pixels, inputs = sizes.window**2, sizes.canvas**2 + 3 + sizes.looks
        leaky, sigmoid = jax.nn.leaky_relu, jax.nn.sigmoid
        self.decoder = eqx.nn.MLP(sizes.looks, pixels, sizes.width, 1, leaky, sigmoid, key=keys[0])
        self.lstm = eqx.nn.LSTMCell(inputs, sizes.recurrent, key=keys[1])
        self.readout = eqx.nn.Linear(sizes.recurrent, 7, key=keys[2])
        self.encoder = eqx.nn.MLP(pixels, 2 * sizes.looks, sizes.width, 1, leaky, key=keys[3])
        self.sizes = sizes


@model
def air(networks: AIRNetworks) -> Float[Array, "canvas canvas"]:
    """An image with up to three objects, each decoded from its looks and pasted at its place.

    Args:
        networks: of which the decoder is used.

    Returns:
        The image without its noise. Sites, for `t` in 0, 1, 2: `presence_t` (a scalar, 0 or 1), `place_t` of shape `(3,)`,
        `looks_t` of shape `(looks,)`; and `image` of shape `(canvas, canvas)`.

    Source: Eslami et al. 2016, section 2.

    Example:
        >>> import jax
        >>> from expectax.models import SMALL_AIR, AIRNetworks, air
        >>> networks = AIRNetworks(SMALL_AIR, key=jax.random.key(0))
        >>> air(networks).simulate(jax.random.key(1)).choices["image"].shape
        (24, 24)
    """
    presences, places, looks = [], [], []
    for t, probability in enumerate(PRESENCE):
        presences.append(sample(f"presence_{t}", dist.Bernoulli(probability)))
        places.append(sample(f"place_{t}", dist.Normal(jnp.array(PLACE_MEAN), jnp.array(PLACE_SD))))
        looks.append(sample(f"looks_{t}", dist.Normal(jnp.zeros(networks.sizes.looks), 1.0)))
    objects = jax.vmap(functools.partial(_drawn, networks))(jnp.stack(looks), jnp.stack(places))
    mean = jnp.tensordot(jnp.asarray(jnp.stack(presences), float), objects, 1)
    sample("image", dist.Normal(mean, PIXEL_SD))
    return mean


def _drawn(networks: AIRNetworks, looks: Array, place: Array) -> Array:
    """Return a canvas with one object."""
    window = mlp(networks.decoder, looks).reshape(networks.sizes.window, networks.sizes.window)
    return paste(window, place, networks.sizes.canvas)


@model
def air_guide(networks: AIRNetworks, image: Float[Array, "canvas canvas"]) -> None:
    """A guide that attends to one object after the other.

    Args:
        networks: of which all but the decoder are used.
        image: the pixels.

    Source: Eslami et al. 2016, section 2.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import SMALL_AIR, AIRNetworks, air_guide
        >>> networks = AIRNetworks(SMALL_AIR, key=jax.random.key(0))
        >>> air_guide(networks, jnp.zeros((24, 24))).simulate(jax.random.key(1)).choices["looks_2"].shape
        (16,)
    """
    sizes = networks.sizes
    state = (jnp.zeros(sizes.recurrent), jnp.zeros(sizes.recurrent))
    place, looks = jnp.zeros(3), jnp.zeros(sizes.looks)
    for t in range(len(PRESENCE)):
        state = lstm(networks.lstm, jnp.concatenate([image.ravel(), place, looks]), state)
        presence, shift, spread = jnp.split(affine(networks.readout, state[0]), [1, 4])
        sample(f"presence_{t}", dist.Bernoulli(logits=presence[0]))
        place_sd = jnp.array(PLACE_SD) * (jax.nn.softplus(spread) + 1e-4)
        place = sample(f"place_{t}", dist.Normal(jnp.array(PLACE_MEAN) + shift, place_sd))
        window = crop(image, place, sizes.window)
        mean, spread = jnp.split(mlp(networks.encoder, window.ravel()), 2)
        looks = sample(f"looks_{t}", dist.Normal(mean, jax.nn.softplus(spread) + 1e-4))


def air_posterior(networks: AIRNetworks, image: Float[Array, "canvas canvas"]) -> Posterior:
    """Return the model of one image, given the image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax import vi
        >>> from expectax.models import SMALL_AIR, AIRNetworks, air_guide, air_posterior, amortised
        >>> batch = amortised(air_posterior, air_guide, jnp.zeros((4, 24, 24)))
        >>> networks = AIRNetworks(SMALL_AIR, key=jax.random.key(0))
        >>> batch.surrogate(networks, jax.random.key(1)).shape
        ()
    """
    return air(networks).given({"image": image})


def air_count(guide: Program, key: PRNGKeyArray) -> Array:
    """Return how many objects a guide sees in an image, by one draw of it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import SMALL_AIR, AIRNetworks, air_count, air_guide
        >>> guide = air_guide(AIRNetworks(SMALL_AIR, key=jax.random.key(0)), jnp.zeros((24, 24)))
        >>> int(air_count(guide, jax.random.key(1))) in range(4)
        True
    """
    choices: Any = guide.simulate(key).choices
    return sum((choices[f"presence_{t}"] for t in range(len(PRESENCE))), jnp.asarray(0))
