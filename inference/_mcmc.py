r"""Markov chains that leave a posterior alone, all chains vectorised in one program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, Program, _jax
from expectax.ppl._posterior import check_posterior
from expectax.ppl._progress import chunks, progress_bar
from expectax.ppl._staging import check_key

from ._chains import Chains, Last
from ._devices import devices_of
from ._initial import begun
from ._kernel import Kernel, check_kernel_value
from ._reducers import Reducer
from ._run import Way, reductions, sample, warm_up
from ._starts import check_estimates, check_starts
from ._target import Target


def mcmc(
    posterior: Posterior,
    kernel: Kernel,
    *,
    key: PRNGKeyArray,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 1,
    initial: dict[str, Any] | Program | str | None = None,
    reducers: Mapping[str, tuple[Any, Any]] | None = None,
    keep_draws: bool = True,
    devices: Sequence[Any] | Mesh | None = None,
    progress: bool = False,
) -> Chains:
    r"""Sample a posterior by Markov chains, all chains vectorised in one program.

    Args:
        posterior: the target.
        kernel: a `Kernel`, such as `nuts()`; `pseudo_marginal()` for a density that is only estimated.
        key: a typed key.
        num_warmup: adaptation steps, whose draws are dropped.
        num_samples: draws kept of each chain; `chains.resume` adds more.
        num_chains: number of chains.
        thinning: kernel steps per kept draw. The steps between are never stored; their divergences and integration
            steps are counted, their acceptance rates averaged.
        initial: nested dict of latents to start every chain at; or a guide with its parameters, `guide(params)`, at draws
            of which the chains start, and whose covariance in unconstrained space is the first inverse mass matrix of
            `nuts` and `hmc`; or `"pathfinder"`, which finds such a normal approximation along a way uphill (Zhang et
            al. 2022). By default uniform in (-2, 2) on the unconstrained scale, tried again where the density is not
            finite.
        reducers: name -> `Reducer`, such as `running_mean()`, or any pair `(init, update)`, fed with each kept draw as
            it comes; what they end with is `chains.reduced`.
        keep_draws: whether the draws are stored. Without them only the reducers see them; the statistics, five numbers
            a transition, are stored either way.
        devices: devices, or a `jax.sharding.Mesh` of them, to deal the chains to; their number divides `num_chains`.
        progress: show a progress bar; it does not change the draws.

    Returns:
        `Chains`.

    Raises:
        SupportError: a latent is discrete, or a guide's draws are outside the support.
        AddressError: a guide lacks a latent.
        NonFiniteError: no chain start has a finite density; the first site to blame is named.
        ValueError: a setting is out of range.

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
    check_posterior(posterior, "mcmc")
    check_key(key)
    check_kernel_value(kernel, "mcmc")
    if min(num_samples, num_chains, thinning) < 1 or num_warmup < 0:
        raise ValueError(
            f"need num_samples, num_chains and thinning >= 1 and num_warmup >= 0, got {num_samples}, {num_chains}, "
            f"{thinning}, {num_warmup}."
        )
    folds = {name: Reducer(*reducer) for name, reducer in (reducers or {}).items()}
    way = Way(thinning, keep_draws, devices_of(devices, num_chains))
    key_start, key_warm, key_run = jax.random.split(key, 3)
    with progress_bar(num_warmup + num_samples, kernel.name, progress) as advance:
        start, kernel = begun(posterior, kernel, key_start, num_chains, initial)
        traced = _jax.is_traced(jax.tree.leaves(start)[0])
        if not traced:
            check_starts(posterior, start)
        state, parameters = warm_up(posterior, kernel, key_warm, start, num_warmup, way.devices)
        if not traced and Target(posterior).estimated:
            check_estimates(state.log_density, num_warmup)
        if progress:
            jax.block_until_ready(state)
            advance(num_warmup)
        before = Chains(
            {},
            {},
            parameters,
            reductions(posterior, kernel, folds, state),
            Last.of((posterior, kernel, folds), way, jax.random.split(key_run, num_chains), state),
        )
        chains = _continued(before, num_samples, advance if progress else None)
    _warn_divergent(chains)
    return chains


def resumed(chains: Chains, num_samples: int, key: Any, progress: bool) -> Chains:
    """Go on with a run; see `Chains.resume`."""
    if chains.last is None or chains.statistics["divergent"].ndim != 2:
        raise ValueError("resume needs the chains of one run of mcmc, with axes (num_chains, num_samples).")
    if num_samples < 1:
        raise ValueError(f"resume: num_samples must be at least 1, got {num_samples}.")
    if key is not None:
        check_key(key)
        keys = jax.random.split(key, len(chains.last.keys))
        last = Last.of(chains.last.run, chains.last.way, keys, chains.last.state)
        chains = Chains(chains.choices, chains.statistics, chains.parameters, chains.reduced, last)
    with progress_bar(num_samples, chains.last.run[1].name, progress) as advance:  # pyright: ignore[reportOptionalMemberAccess]
        chains = _continued(chains, num_samples, advance if progress else None)
    _warn_divergent(chains, 5)  # past the method, and what equinox wraps it in
    return chains


def _continued(chains: Chains, num_samples: int, advance: Any) -> Chains:
    """Return chains with further draws, made in chunks so that progress can be told; the draws know of no chunks."""
    last = chains.last
    assert last is not None
    (posterior, kernel, folds), keys = last.run, last.chain_keys
    state, reduced, pieces = last.state, chains.reduced, []
    earlier = chains.statistics["divergent"].shape[1] if chains.statistics else 0
    length, count = (num_samples, 1) if _jax.is_traced(last.keys) else chunks(num_samples)
    for done in range(0, length * count, length):
        number = min(length, num_samples - done)
        numbers = jnp.asarray(earlier + done, jnp.uint32), jnp.asarray(number, jnp.int32)
        fixed = posterior, kernel, folds, last.way, length
        state, reduced, *piece = sample(*fixed, *numbers, keys, state, chains.parameters, reduced)
        pieces.append(piece if number == length else jax.tree.map(lambda x, n=number: x[:, :n], piece))
        if advance is not None:
            jax.block_until_ready(state)
            advance(number, f"divergences {sum(int(p[1]['divergent'].sum()) for p in pieces)}")
    before = [[chains.choices, chains.statistics]] if chains.statistics else []
    choices, statistics = jax.tree.map(lambda *vs: jnp.concatenate(vs, axis=1), *before, *pieces)
    return Chains(
        choices, statistics, chains.parameters, reduced, Last.of((posterior, kernel, folds), last.way, keys, state)
    )


def _warn_divergent(chains: Chains, stacklevel: int = 3) -> None:
    divergent = chains.statistics["divergent"]
    if _jax.is_traced(divergent) or not int(divergent.sum()):
        return
    warnings.warn(
        f"mcmc: {int(divergent.sum())} of {divergent.size} transitions diverged, so parts of the posterior may be "
        "missed. Raise target_acceptance (0.95), or write the model non-centred; chains.diagnose() tells where.",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
