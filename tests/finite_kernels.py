"""A Metropolis kernel over finite latents, small enough to be enumerated."""

import jax
import jax.numpy as jnp

import expectax as ex
from expectax import dist, inference


class Metropolis:
    """Propose a value of one latent by given probabilities, the same from everywhere; accept by Hastings' ratio."""

    name = "metropolis"

    def __init__(self, address, probs):
        self.address, self.probs = address, probs

    def init(self, target, latents):
        return inference.State(latents, target.log_density(latents))

    def step(self, target, state, parameters):
        probs = jnp.asarray(self.probs)
        value = ex.sample("to", dist.Categorical(probs=probs))
        old = state.position[self.address]
        proposed = self.init(target, state.position | {self.address: value.astype(old.dtype)})
        ratio = proposed.log_density - state.log_density + jnp.log(probs[old]) - jnp.log(probs[value])
        accept = jnp.exp(jnp.minimum(ratio, 0.0))
        yes = ex.sample("accept", dist.Bernoulli(accept)) == 1
        return jax.tree.map(lambda a, b: jnp.where(yes, a, b), proposed, state), inference.Info(accept)

    def latents(self, target, position):
        return position

    def adaptation(self, target, state):
        return inference.Adaptation.none()


class Flip(Metropolis):
    """Propose the other value of a coin."""

    def __init__(self, address):
        super().__init__(address, ())

    def step(self, target, state, parameters):
        proposed = self.init(target, state.position | {self.address: 1 - state.position[self.address]})
        accept = jnp.exp(jnp.minimum(proposed.log_density - state.log_density, 0.0))
        yes = ex.sample("accept", dist.Bernoulli(accept)) == 1
        return jax.tree.map(lambda a, b: jnp.where(yes, a, b), proposed, state), inference.Info(accept)
