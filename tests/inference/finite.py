"""Finite models with a scan, and a kernel for bits: small enough that an algorithm's own choices can be enumerated."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import expectax as ex
from expectax import dist, inference


@ex.model
def hidden(stay, length):
    """A hidden Markov model of bits, with a bit before the scan."""
    z = ex.sample("start", dist.Bernoulli(0.3))

    def step(z, _):
        z = ex.sample("z", dist.Bernoulli(jnp.where(z == 1, stay, 1.0 - stay)))
        return z, ex.sample("y", dist.Normal(1.0 * z, 1.0))

    lax.scan(step, z, None, length=length)


@ex.model
def backwards(length):
    """Time runs backwards; each step has an input that depends on a choice before the scan, and two bits."""
    slope = ex.sample("slope", dist.Bernoulli(0.4))

    def step(carry, x):
        a, count = carry
        a = ex.sample("a", dist.Bernoulli(jnp.where(a == 1, 0.7, 0.2 + 0.1 * x)))
        b = ex.sample("b", dist.Bernoulli(0.3 + 0.1 * a))
        ex.sample("y", dist.Normal(1.0 * a - b + 0.1 * count, 1.0))
        return (a, count + b), None

    lax.scan(step, (jnp.asarray(0), jnp.asarray(0)), slope * jnp.arange(1.0 * length), reverse=True)


@ex.model
def inner(p):
    return ex.sample("bit", dist.Bernoulli(p))


@ex.model
def lanes_and_models(length):
    """A nested model and lanes inside each step."""

    def step(z, _):
        z = ex.sample("inner", inner(jnp.where(z == 1, 0.8, 0.3)))
        jax.vmap(lambda m: ex.sample("y", dist.Normal(m + z, 1.0)))(jnp.arange(2.0))
        return z, None

    lax.scan(step, jnp.asarray(1), None, length=length)


def hidden_posterior(length: int = 2, stay: float = 0.8) -> ex.Posterior:
    return hidden(stay, length).given({"y": jnp.array([0.3, 1.2, -0.4])[:length]})


def in_time() -> dict[str, ex.Posterior]:
    """Return finite posteriors with a scan of two steps."""
    return {
        "hidden Markov": hidden_posterior(),
        "backwards": backwards(2).given({"y": jnp.array([0.4, -0.6])}),
        "lanes and models": lanes_and_models(2).given({"y": jnp.array([[0.1, 1.5], [0.9, 0.2]])}),
    }


class Flip:
    """Metropolis on bits: flip one of all, chosen at random."""

    name = "flip"

    def init(self, target: Any, latents: Any) -> Any:
        return inference.State(latents, target.log_density(latents))

    def step(self, target: Any, state: Any, parameters: Any) -> Any:
        del parameters
        leaves, structure = jax.tree.flatten(state.position)
        sizes = [leaf.size for leaf in leaves]
        chosen, first, flipped = ex.sample("which", dist.Categorical(logits=jnp.zeros(sum(sizes)))), 0, []
        for leaf, size in zip(leaves, sizes, strict=True):
            here = (first + jnp.arange(size) == chosen).reshape(leaf.shape)
            flipped.append(jnp.where(here, 1 - leaf, leaf))
            first += size
        proposed = self.init(target, jax.tree.unflatten(structure, flipped))
        accept = jnp.exp(jnp.minimum(proposed.log_density - state.log_density, 0.0))
        yes = ex.sample("accept", dist.Bernoulli(accept)) == 1
        return jax.tree.map(lambda a, b: jnp.where(yes, a, b), proposed, state), inference.Info(accept)

    def latents(self, target: Any, position: Any) -> Any:
        del target
        return position

    def adaptation(self, target: Any, state: Any) -> Any:
        del target, state
        return inference.Adaptation.none()
