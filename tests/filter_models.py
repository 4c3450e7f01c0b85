"""Small state-space models with finite states, of every form that a filter may meet, to be enumerated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from expectax import dist, ppl

Y = np.array([0.3, 1.4, -0.2])
MODELS: dict[str, Any] = {}


def case(**observations: Any) -> Any:
    """Register a model with its observations."""

    def register(function: Any) -> Any:
        MODELS[function.__name__] = lambda: ppl.model(function)().given(observations)
        return function

    return register


def coin(address: str, probability: Any) -> Any:
    return 1.0 * ppl.sample(address, dist.Bernoulli(probability))


def look(address: str, mean: Any) -> Any:
    return ppl.sample(address, dist.Normal(mean, 0.7))


def switch(z: Any, _: Any) -> Any:
    """One step of a chain of two states, observed."""
    z = coin("z", 0.25 + 0.5 * z)
    look("y", z)
    return z, z


@case(y=Y)
def chain():
    lax.scan(switch, 0.0, None, length=3)


@case(y=Y[:2])
def several():
    """A carry of several values: the state, the one before it, and a running mean."""

    def step(state, _):
        last, (older, mean) = state
        z = coin("z", 0.2 + 0.3 * last + 0.3 * older)
        look("y", z + mean)
        return (z, (last, 0.5 * (mean + z))), None

    lax.scan(step, (1.0, (0.0, jnp.zeros(()))), None, length=2)


@case(y=Y[:2])
def backwards():
    lax.scan(lambda z, x: switch(z * x, None), 0.0, jnp.array([0.6, 1.0]), reverse=True)


@case(first=0.8, y=Y[:2])
def latents_before():
    start = coin("start", 0.4)
    look("first", start)

    def step(z, _):
        z = coin("z", 0.2 + 0.2 * start + 0.4 * z)
        look("y", z - 0.3 * start)
        return z, None

    lax.scan(step, start, None, length=2)


@case(y=Y[:2], last=0.9)
def sites_after():
    final, states = lax.scan(switch, 0.0, None, length=2)
    look("last", final + 0.5 * states[0])


@ppl.model
def inner(z):
    z = coin("to", 0.25 + 0.5 * z)
    look("at", 1.2 * z)
    return z


@case(y=Y[:2], inside={"at": Y[:2] + 0.1})
def nested():
    def step(z, _):
        z = ppl.sample("inside", inner(z))
        look("y", z)
        return z, None

    lax.scan(step, 0.0, None, length=2)


@case(y=np.stack([Y[:2], Y[1:]], 1))
def lanes():
    def lane(z, bias):
        z = coin("z", 0.2 + 0.5 * z + bias)
        look("y", z)
        return z

    lax.scan(lambda z, _: (jax.vmap(lane)(jnp.roll(z, 1), jnp.array([0.0, 0.2])), None), jnp.zeros(2), None, length=2)


@ppl.model
def guide(probability):
    coin("z", probability)


def guided(now):
    """Between the prior and the conditional law: far from either, and it sees the carry, the data and the time."""
    return guide(jax.nn.sigmoid(0.7 * now.observed["y"] + 0.5 * now.carry - 0.2 * now.time))
