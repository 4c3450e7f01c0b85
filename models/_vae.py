"""A variational autoencoder: normal latents, a network to the pixels, and a network back.

Source: D. P. Kingma and M. Welling, Auto-encoding variational Bayes, ICLR 2014; sizes of Becker et al., PLDI 2024,
table 1.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import distributions as dist

from expectax.ppl import model, sample
from expectax.vi import Objective

from ._amortised import amortised
from ._networks import mlp


class VAE(eqx.Module):
    """The two networks, each with one hidden layer: the decoder to pixels and the encoder to latents.

    Args:
        num_pixels: pixels of an image.
        num_latents: latent coordinates.
        width: units of the hidden layers.
        key: a typed key for the initial weights.

    Example:
        >>> import jax
        >>> from expectax.models import VAE
        >>> VAE(64, key=jax.random.key(0)).decoder.in_size
        10
    """

    decoder: eqx.nn.MLP
    encoder: eqx.nn.MLP

    def __init__(self, num_pixels: int, num_latents: int = 10, width: int = 200, *, key: PRNGKeyArray):
        down, up = jax.random.split(key)
        self.decoder = eqx.nn.MLP(num_latents, num_pixels, width, 1, jax.nn.leaky_relu, key=down)
        self.encoder = eqx.nn.MLP(num_pixels, 2 * num_latents, width, 1, jax.nn.leaky_relu, key=up)


@model
def vae(decoder: eqx.nn.MLP) -> Float[Array, " pixels"]:
    r"""An image: $z \sim N(0, I)$, $y_i \sim \text{Bernoulli}$ with logits $d_\theta(z)_i$.

    Args:
        decoder: network $d_\theta$ from the latents to the pixels' logits.

    Returns:
        The logits. Sites: `z` of shape `(latents,)`, `pixels` of shape `(pixels,)`.

    Source: Kingma and Welling 2014.

    Example:
        >>> import jax
        >>> from expectax.models import VAE, vae
        >>> vae(VAE(64, key=jax.random.key(0)).decoder).simulate(jax.random.key(1)).choices["pixels"].shape
        (64,)
    """
    z = sample("z", dist.Normal(jnp.zeros(decoder.in_size), 1.0))
    logits = mlp(decoder, z)
    sample("pixels", dist.Bernoulli(logits=logits))
    return logits


@model
def vae_guide(encoder: eqx.nn.MLP, image: Int[Array, " pixels"]) -> None:
    r"""An amortised guide: $z \sim N(\mu, \text{softplus}(s))$ with $(\mu, s) = e_\phi(y)$.

    Args:
        encoder: network $e_\phi$ from the pixels to two numbers per latent.
        image: the pixels, the integers 0 and 1.

    Source: Kingma and Welling 2014.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models import VAE, vae_guide
        >>> networks = VAE(64, key=jax.random.key(0))
        >>> vae_guide(networks.encoder, jnp.zeros(64, int)).simulate(jax.random.key(1)).choices["z"].shape
        (10,)
    """
    mean, spread = jnp.split(mlp(encoder, jnp.asarray(image, float)), 2)
    sample("z", dist.Normal(mean, jax.nn.softplus(spread)))


def vae_elbo(images: Int[Array, "batch pixels"]) -> Objective:
    """Return the mean ELBO of a batch of images, to maximise over the networks (a `VAE`).

    Args:
        images: pixels, the integers 0 and 1.

    Source: Kingma and Welling 2014.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax import vi
        >>> from expectax.models import VAE, vae_elbo
        >>> networks = VAE(64, key=jax.random.key(0))
        >>> value, gradient = vi.value_and_grad(vae_elbo(jnp.zeros((3, 64), int)))(networks, jax.random.key(1))
        >>> gradient.decoder.layers[1].bias.shape
        (64,)
    """
    return amortised(_posterior, _guide, images)


def _posterior(networks: VAE, image: Any) -> Any:
    return vae(networks.decoder).given({"pixels": image})


def _guide(networks: VAE, image: Any) -> Any:
    return vae_guide(networks.encoder, image)
