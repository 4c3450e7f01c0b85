"""Markov chains that leave a posterior alone, all chains vectorised in one program."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._progress import progress_bar
from expectax.ppl._staging import check_key

from ._chains import Chains
from ._kernel import Info, Kernel, State, check_kernel_value
from ._starts import check_estimates, check_starts, starts
from ._target import Target
from ._windows import schedule


def mcmc(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 1,
    initial: dict[str, Any] | None = None,
    progress: bool = False,
) -> Chains:
    r"""Sample a posterior by Markov chains, all chains vectorised in one program.

    Args:
        posterior: the target.
        kernel: a `Kernel`, such as `nuts()`; `pseudo_marginal()` for a density that is only estimated.
        key: a typed key.
        num_warmup: adaptation steps, whose draws are dropped.
        num_samples: draws kept of each chain.
        num_chains: number of chains.
        thinning: kernel steps per kept draw. The steps between are never stored; their divergences and integration
            steps are counted, their acceptance rates averaged.
        initial: nested dict of latents to start every chain at; by default uniform in (-2, 2) on the unconstrained
            scale, tried again where the density is not finite.
        progress: show a progress bar; it does not change the draws.

    Returns:
        `Chains`.

    Raises:
        SupportError: a latent is discrete.
        NonFiniteError: no chain start has a finite density; the first site to blame is named.

    A second call with a new key or new data of the same shapes compiles nothing. Divergent transitions warn.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> chains = inference.mcmc(posterior, inference.nuts(), key=jax.random.key(0), num_warmup=300, num_samples=300)
        >>> bool(abs(chains.mean()["z"] - 0.5) < 0.15)
        True
    """
    check_key(key)
    check_kernel_value(kernel, "mcmc")
    if min(num_samples, num_chains, thinning) < 1 or num_warmup < 0:
        raise ValueError(
            f"need num_samples, num_chains and thinning >= 1 and num_warmup >= 0, got {num_samples}, {num_chains}, "
            f"{thinning}, {num_warmup}."
        )
    key_start, key_warm, key_run = jax.random.split(key, 3)
    length, count = _even_chunks(num_samples)
    with progress_bar(num_warmup + num_samples, kernel.name, progress) as advance:
        start = starts(posterior, key_start, num_chains, initial)
        traced = _jax.is_traced(jax.tree.leaves(start)[0])
        if not traced:
            check_starts(posterior, start)
        state, parameters = _warm_up(posterior, kernel, key_warm, start, num_warmup)
        if not traced and Target(posterior).estimated:
            check_estimates(state.log_density, num_warmup)
        if progress:
            jax.block_until_ready(state)
            advance(num_warmup)
        keys = jax.vmap(lambda k: jax.random.split(k, num_samples))(jax.random.split(key_run, num_chains))
        pieces = []
        for chunk in range(count):
            part = keys[:, chunk * length : (chunk + 1) * length]
            state, piece = _sample(posterior, kernel, part, state, parameters, thinning)
            pieces.append(piece)
            if progress:
                jax.block_until_ready(state)
                advance(length, f"divergences {sum(int(p[1]['divergent'].sum()) for p in pieces)}")
    choices, statistics = jax.tree.map(lambda *vs: jnp.concatenate(vs, axis=1), *pieces)
    chains = Chains(choices, statistics, parameters)
    _warn_divergent(chains)
    return chains


def _even_chunks(total: int, most: int = 20) -> tuple[int, int]:
    """Return `(length, count)` of equal chunks, at most `most`; chunks of one length are compiled once."""
    count = next(n for n in range(min(most, total), 0, -1) if total % n == 0)
    return total // count, count


@compiled
def _warm_up(posterior: Posterior, kernel: Kernel, key: Any, start: Any, num_warmup: int) -> tuple[State, Any]:
    target = Target(posterior)

    def one(key: Any, latents: Any) -> Any:
        key_init, key_run = jax.random.split(key)
        state = keyed(lambda latents: kernel.init(target, latents))(key_init, latents)
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

    return jax.vmap(one)(jax.random.split(key, jax.tree.leaves(start)[0].shape[0]), start)


def transition(kernel: Kernel, target: Target) -> Any:
    """Return `step(key, state, parameters) -> (state, info)`, the kernel's step with a key."""

    def step(state: State, parameters: Any) -> tuple[State, Info]:
        after, info = kernel.step(target, state, parameters)
        return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, state), info

    return keyed(step)


@compiled
def _sample(posterior: Posterior, kernel: Kernel, keys: Any, state: State, parameters: Any, thinning: int) -> Any:
    target = Target(posterior)

    def chain(keys: Any, state: State, parameters: Any) -> Any:
        def step(state: State, key: Any) -> Any:
            state, info = transition(kernel, target)(key, state, parameters)
            return state, statistics_of(state, info)

        def kept(state: State, key: Any) -> Any:
            state, statistics = step(state, key) if thinning == 1 else thinned(state, key)
            return state, (state.position, statistics)

        def thinned(state: State, key: Any) -> Any:
            state, statistics = lax.scan(step, state, jax.random.split(key, thinning))
            return state, {name: _over_steps(name, x) for name, x in statistics.items()}

        state, (positions, statistics) = lax.scan(kept, state, keys)
        return state, (jax.vmap(lambda x: kernel.latents(target, x))(positions), statistics)

    return jax.vmap(chain)(keys, state, parameters)


def statistics_of(state: State, info: Info) -> dict[str, Any]:
    """Return the numbers that are kept of each transition."""
    return {
        "divergent": jnp.asarray(info.is_divergent),
        "acceptance_rate": jnp.asarray(info.acceptance_rate),
        "num_integration_steps": jnp.asarray(info.num_steps),
        "energy": jnp.asarray(info.energy, jnp.result_type(state.log_density)),
        "log_density": state.log_density,
    }


def _over_steps(name: str, values: Any) -> Any:
    """Return one statistic of a kept draw from those of its steps."""
    over = {"divergent": jnp.any, "acceptance_rate": jnp.mean, "num_integration_steps": jnp.sum}
    return over[name](values) if name in over else values[-1]


def _warn_divergent(chains: Chains) -> None:
    divergent = chains.statistics["divergent"]
    if _jax.is_traced(divergent) or not int(divergent.sum()):
        return
    warnings.warn(
        f"mcmc: {int(divergent.sum())} of {divergent.size} transitions diverged, so parts of the posterior may be "
        "missed. Raise target_acceptance (0.95), or write the model non-centred.",
        RuntimeWarning,
        stacklevel=3,
    )
