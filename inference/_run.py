"""Warm-up and sampling of all chains in one compiled program; every draw has a key of its own number."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import Posterior
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed

from ._absent import refreshed
from ._devices import over_chains
from ._kernel import Info, Kernel, State
from ._reducers import Reducer
from ._target import Target
from ._windows import schedule


class Way(NamedTuple):
    """How a run is made, as far as its compiled program knows: thinning, what is kept, and on which devices."""

    thinning: int = 1
    keep_draws: bool = True
    devices: tuple[Any, ...] | None = None


@compiled
def warm_up(posterior: Posterior, kernel: Kernel, key: Any, start: Any, num_warmup: int, devices: Any) -> Any:
    """Return each chain's state and its tuned parameters after a warm-up."""
    target = Target(posterior)

    def one(key: Any, latents: Any) -> Any:
        key_init, key_run = jax.random.split(key)
        state = keyed(lambda z: kernel.init(target, refreshed(posterior, z, strict=False)))(key_init, latents)
        adaptation = kernel.adaptation(target, state)
        if num_warmup == 0:
            return state, adaptation.unadapted

        def step(carry: Any, inputs: Any) -> Any:
            (state, own), (key, stage) = carry, inputs
            state, info = transition(kernel, target)(key, state, adaptation.parameters(own))
            return (state, adaptation.update(own, stage, state, info)), None

        inputs = (jax.random.split(key_run, num_warmup), schedule(num_warmup))
        (state, own), _ = lax.scan(step, (state, adaptation.start), inputs)
        return state, adaptation.final(own)

    return over_chains(one, devices)(jax.random.split(key, jax.tree.leaves(start)[0].shape[0]), start)


def transition(kernel: Kernel, target: Target) -> Any:
    """Return `step(key, state, parameters) -> (state, info)`, the kernel's step with a key."""

    def step(state: State, parameters: Any) -> tuple[State, Info]:
        after, info = kernel.step(target, state, parameters)
        return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, state), info

    return keyed(step)


@compiled
def reductions(posterior: Posterior, kernel: Kernel, reducers: dict[str, Reducer], state: State) -> dict[str, Any]:
    """Return what each reducer starts with, for each chain."""

    def one(state: State) -> dict[str, Any]:
        latents = kernel.latents(Target(posterior), state.position)
        return {name: jax.tree.map(jnp.asarray, reducer.init(latents)) for name, reducer in reducers.items()}

    return jax.vmap(one)(state)


@compiled
def sample(
    posterior: Posterior,
    kernel: Kernel,
    reducers: dict[str, Reducer],
    way: Way,
    capacity: int,
    first: Any,
    number: Any,
    keys: Any,
    state: State,
    parameters: Any,
    reduced: dict[str, Any],
) -> Any:
    """Return the state, the reductions, the latents and the statistics after draws `first` to `first + number - 1`.

    The number is data and the room for draws, `capacity`, is not: a shorter run uses the program of a longer one, whose
    draws it then has to the last bit.
    """
    target = Target(posterior)

    def chain(key: Any, state: State, parameters: Any, reduced: Any) -> Any:
        def step(state: State, key: Any) -> Any:
            state, info = transition(kernel, target)(key, state, parameters)
            return state, statistics_of(state, info)

        def thinned(state: State, key: Any) -> Any:
            state, statistics = lax.scan(step, state, jax.random.split(key, way.thinning))
            return state, {name: _over_steps(name, x) for name, x in statistics.items()}

        def draw(n: Any, carry: Any) -> Any:
            state, reduced, stored = carry
            own = jax.random.fold_in(key, first + n)
            state, statistics = step(state, own) if way.thinning == 1 else thinned(state, own)
            if reducers:
                latents = kernel.latents(target, state.position)
                reduced = {name: like(r.update(reduced[name], latents), reduced[name]) for name, r in reducers.items()}
            row = (state.position if way.keep_draws else (), statistics)
            return state, reduced, jax.tree.map(lambda store, x: store.at[n].set(x), stored, row)

        row = (state.position if way.keep_draws else (), statistics_of(state, Info(1.0)))
        room = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), row)
        state, reduced, (positions, statistics) = lax.fori_loop(0, number, draw, (state, reduced, room))
        latents = jax.vmap(lambda x: kernel.latents(target, x))(positions) if way.keep_draws else {}
        return state, reduced, latents, statistics

    return over_chains(chain, way.devices)(keys, state, parameters, reduced)


def like(new: Any, old: Any) -> Any:
    """Return a pytree with the dtypes of another, as a loop needs it."""
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, old)


def statistics_of(state: State, info: Info) -> dict[str, Any]:
    """Return the numbers that are kept of each transition."""
    real = jnp.result_type(state.log_density)
    return {
        "divergent": jnp.asarray(info.is_divergent, bool),
        "acceptance_rate": jnp.asarray(info.acceptance_rate, real),
        "num_integration_steps": jnp.asarray(info.num_steps, jnp.int32),
        "energy": jnp.asarray(info.energy, real),
        "log_density": jnp.asarray(state.log_density),
    }


def _over_steps(name: str, values: Any) -> Any:
    """Return one statistic of a kept draw from those of its steps."""
    over = {"divergent": jnp.any, "acceptance_rate": jnp.mean, "num_integration_steps": jnp.sum}
    return over[name](values).astype(values.dtype) if name in over else values[-1]
