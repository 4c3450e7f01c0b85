"""Kernels that are wrong on purpose, each by one mistake that is easily made: the tests of kernels must catch them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from expectax import dist, inference, ppl


class Wrong(eqx.Module):
    """A kernel over latents, made of one function `step(target, latents) -> latents`."""

    move: Callable[..., Any] = eqx.field(static=True)
    name: str = eqx.field(static=True, default="wrong")

    def init(self, target, latents):
        return inference.State(latents, target.log_density(latents))

    def step(self, target, state, parameters):
        del parameters
        latents, acceptance = self.move(target, state.position)
        return self.init(target, latents), inference.Info(acceptance)

    def latents(self, target, position):
        del target
        return position

    def adaptation(self, target, state):
        del target, state
        return inference.Adaptation.none()


def accept(log_ratio: Any, there: Any, here: Any) -> Any:
    probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
    go = ppl.sample("accept", dist.Bernoulli(probability)) == 1
    return jax.tree.map(lambda a, b: jnp.where(go, a, b), there, here), probability


def draw(program: Any, latents: Any) -> Any:
    """Return what a proposal makes of latents, and the log proposal density."""
    drawn = program.rebind()
    return {**latents, **drawn.choices}, drawn.log_density


# --- finite targets ---------------------------------------------------------------------------------------------------


def without_hastings(proposal):
    def move(target, here):
        there, _ = draw(proposal(here), here)
        return accept(target.log_density(there) - target.log_density(here), there, here)

    return Wrong(move)


def hastings_upside_down(proposal):
    def move(target, here):
        there, forward = draw(proposal(here), here)
        backward = proposal(there).assess_inside({a: here[a] for a in proposal(here).sites()})[0]
        return accept(target.log_density(there) - target.log_density(here) + forward - backward, there, here)

    return Wrong(move)


def always_accept(proposal):
    return Wrong(lambda target, here: (draw(proposal(here), here)[0], 1.0))


def root_of_the_ratio(proposal):
    def move(target, here):
        there, forward = draw(proposal(here), here)
        backward = proposal(there).assess_inside({a: here[a] for a in proposal(here).sites()})[0]
        return accept((target.log_density(there) - target.log_density(here) + backward - forward) / 2, there, here)

    return Wrong(move)


def _gibbs(address: str, count: int, log_density: Callable[..., Any], index: Any = (), source: Any = None) -> Any:
    """Draw one element by any density, at latents or at another source of the conditioning values."""

    def move(target, here):
        base = here if source is None else source
        with_value = lambda v: {**base, address: base[address].at[index].set(v)}  # noqa: E731
        values = jnp.arange(count, dtype=here[address].dtype)
        logits = jax.vmap(lambda v: log_density(target, with_value(v)))(values)
        return {**here, address: here[address].at[index].set(ppl.sample("v", dist.Categorical(logits=logits)))}

    return move


def gibbs_without_the_prior(address, count):
    likelihood = lambda target, z: ravel_pytree(target.posterior.site_log_densities(z)["y"])[0].sum()  # noqa: E731
    return Wrong(lambda target, here: (_gibbs(address, count, likelihood)(target, here), 1.0))


def gibbs_without_the_likelihood(address, count):
    prior = lambda target, z: jnp.sum(target.posterior.site_log_densities(z)[address])  # noqa: E731
    return Wrong(lambda target, here: (_gibbs(address, count, prior)(target, here), 1.0))


def mode_instead_of_draw(address, count):
    def move(target, here):
        logits = jax.vmap(lambda v: target.log_density({**here, address: v}))(
            jnp.arange(count, dtype=here[address].dtype)
        )
        return {**here, address: jnp.argmax(logits).astype(here[address].dtype)}, 1.0

    return Wrong(move)


def all_elements_at_once(address, count):
    """Each element given the old values of the others, instead of the new ones."""
    full = lambda target, z: target.log_density(z)  # noqa: E731

    def move(target, here):
        after = here
        for i in range(here[address].shape[0]):
            after = _gibbs(address, count, full, i, source=here)(target, after)
        return after, 1.0

    return Wrong(move)


def state_dependent_mixture(first, second, weight):
    """The weight of the first kernel depends on where the chain stands."""

    def move(target, here):
        number = ppl.sample("which", dist.Bernoulli(weight(here)))
        cases = []
        for kernel in (second, first):
            after, _ = kernel.step(target, kernel.init(target, here), ())
            cases.append(after.position)
        return jax.tree.map(lambda a, b: jnp.where(number == 1, b, a), *cases), 1.0

    return Wrong(move)


def involutive_without_proposal(proposal, involution):
    def move(target, here):
        latents, _ = involution(here, proposal(here).rebind().choices)
        return accept(target.log_density(latents) - target.log_density(here), latents, here)

    return Wrong(move)


# --- continuous targets -----------------------------------------------------------------------------------------------


def involutive_without_jacobian(proposal, involution):
    def move(target, here):
        drawn = proposal(here).rebind()
        latents, auxiliary = involution(here, drawn.choices)
        backward = proposal(latents).assess_inside(auxiliary)[0]
        ratio = target.log_density(latents) - target.log_density(here) + backward - drawn.log_density
        return accept(ratio, latents, here)

    return Wrong(move)


class Flat(eqx.Module):
    """A kernel over the unconstrained vector, made of one function `move(key, flat, position) -> (position, rate)`."""

    move: Callable[..., Any] = eqx.field(static=True)
    name: str = eqx.field(static=True, default="wrong")

    def init(self, target, latents):
        flat = target.flat()
        position = flat.unconstrain(latents)
        return inference.State(position, flat.log_density(position))

    def step(self, target, state, parameters):
        del parameters
        flat = target.flat()
        position, rate = self.move(inference.random_key(), flat, state.position)
        return inference.State(position, flat.log_density(position)), inference.Info(rate)

    def latents(self, target, position):
        return target.flat().constrain(position)

    def adaptation(self, target, state):
        del target, state
        return inference.Adaptation.none()


def _metropolis(key: Any, log_ratio: Any, there: Any, here: Any) -> Any:
    rate = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
    return jnp.where(jax.random.uniform(key) < rate, there, here), rate


def hamiltonian(
    size: float, steps: int = 3, kinetic: float = 1.0, momentum: float = 1.0, last_half: bool = True
) -> Flat:
    """Leapfrog steps; right as it stands, wrong with another kinetic energy, momentum or without the last half step."""

    def move(key, flat, x):
        key_momentum, key_accept = jax.random.split(key)
        p = start = momentum * jax.random.normal(key_momentum, x.shape)
        gradient, u = jax.grad(flat.log_density), x
        for i in range(steps):
            p = p + size / 2 * gradient(u)
            u = u + size * p
            p = p + size / 2 * gradient(u) if last_half or i < steps - 1 else p
        energy = kinetic * (jnp.sum(start**2) - jnp.sum(p**2)) / 2
        return _metropolis(key_accept, flat.log_density(u) - flat.log_density(x) + energy, u, x)

    return Flat(move)


def langevin(size: float, corrected: bool = True, accepts: bool = True) -> Flat:
    def move(key, flat, x):
        key_noise, key_accept = jax.random.split(key)
        gradient = jax.grad(flat.log_density)
        mean = lambda x: x + size * gradient(x)  # noqa: E731
        u = mean(x) + jnp.sqrt(2 * size) * jax.random.normal(key_noise, x.shape)
        log_q = lambda a, b: -jnp.sum((b - mean(a)) ** 2) / (4 * size)  # noqa: E731
        ratio = flat.log_density(u) - flat.log_density(x) + (log_q(u, x) - log_q(x, u) if corrected else 0.0)
        return _metropolis(key_accept, ratio, u, x) if accepts else (u, jnp.ones(()))

    return Flat(move)


def random_walk(size: Callable[[Any], Any], corrected: bool) -> Flat:
    """A random walk whose step depends on the state."""

    def move(key, flat, x):
        key_noise, key_accept = jax.random.split(key)
        u = x + size(x) * jax.random.normal(key_noise, x.shape)
        log_q = lambda a, b: -jnp.sum((b - a) ** 2) / (2 * size(a) ** 2) - x.size * jnp.log(size(a))  # noqa: E731
        ratio = flat.log_density(u) - flat.log_density(x) + (log_q(u, x) - log_q(x, u) if corrected else 0.0)
        return _metropolis(key_accept, ratio, u, x)

    return Flat(move)


def in_the_wrong_space(size: float) -> Wrong:
    """A random walk on the unconstrained scale that forgets the Jacobian of the map there."""

    def move(target, here):
        flat = target.flat()
        x = flat.unconstrain(here)
        u = x + size * jax.random.normal(inference.random_key(), x.shape)
        there = flat.constrain(u)
        return accept(target.log_density(there) - target.log_density(here), there, here)

    return Wrong(move)
