r"""Does a kernel leave the posterior invariant? A test by exact draws of the joint, for any kernel.

A draw $(z, y)$ of the joint is an exact draw of the posterior of $y$: no chain has to converge, and a false alarm has the
probability that the p-value says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray

from expectax.ppl import ControlFlowError, NonFiniteError, Posterior, Program
from expectax.ppl._compile import compiled
from expectax.ppl._keyless import keyed
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._program import bound_program
from expectax.ppl._selection import chosen_by
from expectax.ppl._staging import check_key

from ._kernel import Kernel, check_kernel_value, stationary_state
from ._ranks import rank
from ._run import transition
from ._target import Target

Statistics = Callable[[Choices, Choices], Any]

_IMPOSSIBLE, _UNUSABLE = -1, -2
"""What stands for a rank where a moved draw, or the exact draw, has a nan."""

_NUMBERS = 4
"""How many numbers of the latents are statistics by default."""


class KernelCheck(NamedTuple):
    """What `check_kernel` found.

    Example: see `check_kernel`.

    Attributes:
        p_value: of the worst statistic, times their number (Bonferroni), at most 1: small if the kernel is wrong.
        worst: the name of that statistic.
        p_values: of each statistic alone.
        acceptance_rate: the mean over all steps; the test has its power where this is neither near 0 nor near 1.
    """

    p_value: float
    worst: str
    p_values: dict[str, float]
    acceptance_rate: float


def check_kernel(
    kernel: Kernel,
    program: Program,
    observed: Any,
    *,
    key: PRNGKeyArray,
    parameters: Any = None,
    num_chains: int = 4000,
    num_steps: int = 9,
    statistics: Statistics | None = None,
    reversible: bool = True,
) -> KernelCheck:
    r"""Test whether a kernel leaves the posterior invariant, with exact p-values and no convergence.

    Latents and data $(z, y)$ are drawn from the program together, so that $z$ is an exact draw of $p(z \mid y)$. Then

    - of a reversible kernel, $z$ is put at a uniformly random place of a path of $L + 1$ states, which the kernel continues
      to both sides. All orders of the states are then alike, so that the rank of a statistic of $z$ among its values on the
      path (ties broken at random) is uniform on $0, \dots, L$: a $\chi^2$ test of $L + 1$ counts.
    - of any other, $L$ steps from $z$ give a draw of the joint again, which is compared with fresh ones by the two-sample
      Kolmogorov-Smirnov test.

    Args:
        kernel: any kernel, also one of your own.
        program: a bound program, from which latents and data are drawn.
        observed: the sites that are data: addresses or a selection; `()` for none.
        key: a typed key.
        parameters: of the kernel's step; by default those of a chain without a warm-up.
        num_chains: number of paths.
        num_steps: $L$.
        statistics: `statistics(latents, observations)`, a dict of numbers; by default a few of the latents' numbers, their
            sum of squares and their sum times the data's. The log joint density is always one more.
        reversible: whether the kernel is reversible, as `cycle` and `replica_exchange` are not.

    Returns:
        A `KernelCheck`.

    Raises:
        AddressError: an address of `observed` is unknown.
        ControlFlowError: a latent stands in a branch or has a mask, or there is none.
        NonFiniteError: a statistic is nan at an exact draw (where only a moved draw's is, the p-value is 0).
        ValueError: a number is out of range.

    Source: Gandy and Scott 2020, "Unit testing for MCMC and other Monte Carlo methods"; the two-sample form: Geweke 2004.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 0.5))
        >>> tuned = {"step_size": jnp.asarray(1.0), "inverse_mass_matrix": jnp.ones(1)}
        >>> check = inference.check_kernel(
        ...     inference.random_walk(), model(), "y", key=jax.random.key(0), parameters=tuned, num_chains=1000
        ... )
        >>> check.p_value > 1e-6, 0.3 < check.acceptance_rate < 0.7
        (True, True)
    """
    check_kernel_value(kernel, "check_kernel")
    check_key(key)
    if num_chains < 1 or num_steps < 1:
        raise ValueError(f"check_kernel: need num_chains and num_steps >= 1, got {num_chains}, {num_steps}.")
    paths = _observed(bound_program(program, "check_kernel"), observed)
    run = _ranks if reversible else _pairs
    found, acceptance = run(kernel, program, paths, statistics or _default, key, parameters, num_chains, num_steps)
    p_values = {name: _p_value(name, x, num_steps) for name, x in sorted(found.items())}
    worst = min(p_values, key=lambda name: p_values[name])
    p_value = min(1.0, p_values[worst] * len(p_values))
    return KernelCheck(p_value, worst, p_values, float(acceptance))


def _observed(program: Program, observed: Any) -> tuple[str, ...]:
    """Return the paths of the data; refuse what has no exact draw on the kernel's space."""
    entries = program.sites()
    wanted = chosen_by(observed, entries, "check_kernel")
    paths = tuple(path for path, take in wanted.items() if take is not False)
    for path, entry in leaves_of(entries):
        if path in paths and wanted[path] is not True:
            raise ControlFlowError(f"check_kernel: select {path!r} at {entry.site.where} as a whole, not by index.")
        if path not in paths and entry.conditional:
            raise ControlFlowError(
                f"check_kernel: the latent {path!r} at {entry.site.where} stands in a branch or has a mask, so that it is not "
                "always drawn. Draw it in every branch; where all is finite, see inference.assert_invariant."
            )
    if len(paths) == len(wanted):
        raise ControlFlowError("check_kernel: all sites are observed, so that there is no latent to move.")
    return paths


def _p_value(name: str, found: Any, num_steps: int) -> float:
    from scipy import stats

    columns = [np.asarray(x, np.float64) for x in (found if isinstance(found, tuple) else (found, found))]
    if isinstance(found, tuple):
        impossible, unusable = map(np.isnan, columns)
    else:
        impossible, unusable = columns[0] == _IMPOSSIBLE, columns[0] == _UNUSABLE
    if unusable.any():
        raise NonFiniteError(
            f"check_kernel: the statistic {name!r} is nan at {int(unusable.sum())} exact draws. Give statistics that are "
            "numbers wherever the program can draw."
        )
    if impossible.any():  # where a kernel that is right never goes
        return 0.0
    if isinstance(found, tuple):
        result: Any = stats.ks_2samp(columns[0], columns[1], method="asymp")
        return float(result.pvalue)
    return float(stats.chisquare(np.bincount(columns[0].astype(int), minlength=num_steps + 1)).pvalue)


def _default(latents: Choices, observations: Choices) -> dict[str, Any]:
    """Return some of the latents' numbers, their sum of squares, and how they go with the data."""
    found: dict[str, Any] = {}
    for path, value in leaves_of(latents):
        flat = jnp.ravel(value).astype(float)
        for i in range(flat.size):
            found[f"{path}[{i}]" if jnp.ndim(value) else path] = flat[i]
    spread = np.unique(np.linspace(0, len(found) - 1, _NUMBERS).round().astype(int))
    numbers, names = jnp.stack(list(found.values())), [list(found)[i] for i in spread]
    chosen = {name: found[name] for name in names} | {"sum of squares": jnp.sum(numbers**2)}
    if leaves := jax.tree.leaves(observations):
        chosen["times data"] = jnp.sum(numbers) * sum(jnp.sum(jnp.asarray(y).astype(float)) for y in leaves)
    return chosen


def _drawn(program: Program, paths: tuple[str, ...], key: Any) -> tuple[Choices, Choices]:
    """Draw latents and data together."""
    choices = list(leaves_of(program.simulate(key).choices))
    return nested((p, v) for p, v in choices if p not in paths), nested((p, v) for p, v in choices if p in paths)


def _measured(statistics: Statistics, target: Target, latents: Choices) -> dict[str, Any]:
    """Return all statistics by name."""
    found = statistics(latents, target.posterior.observations)
    named = {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree_util.tree_leaves_with_path(found)}
    return {**{n: jnp.asarray(x).astype(float) for n, x in named.items()}, "log joint": target.log_density(latents)}


def _begun(kernel: Kernel, target: Target, key: Any, latents: Choices, parameters: Any) -> tuple[Any, Any, Any]:
    """Return a stationary state, the step, and its parameters."""
    state = keyed(lambda z: stationary_state(kernel, target, z))(key, latents)
    own = kernel.adaptation(target, state).unadapted if parameters is None else parameters
    return state, transition(kernel, target), own


@compiled
def _ranks(
    kernel: Kernel,
    program: Program,
    paths: tuple[str, ...],
    statistics: Any,
    key: Any,
    parameters: Any,
    chains: int,
    steps: int,
) -> Any:
    """Return the ranks of the exact draws on their paths, and the mean acceptance."""

    def one(key: Any) -> Any:
        key_draw, key_start, key_place, key_steps, key_ties = jax.random.split(key, 5)
        latents, observations = _drawn(program, paths, key_draw)
        target = Target(Posterior(program, observations))
        start, step, own = _begun(kernel, target, key_start, latents, parameters)
        place = jax.random.randint(key_place, (), 0, steps + 1)

        def move(state: Any, inputs: Any) -> Any:
            number, key = inputs
            # the first steps lead back from the draw; then the path goes on from the draw again
            state = jax.tree.map(lambda a, b: jnp.where(number == place, a, b), start, state)
            state, info = step(key, state, own)
            return state, (state.position, jnp.mean(info.acceptance_rate))

        _, (path, rates) = lax.scan(move, start, (jnp.arange(steps), jax.random.split(key_steps, steps)))
        whole = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a, b.dtype)[None], b]), start.position, path)
        measured = jax.vmap(lambda x: _measured(statistics, target, kernel.latents(target, x)))(whole)
        keys = jax.random.split(key_ties, len(measured))
        return {n: _rank(k, x) for k, (n, x) in zip(keys, measured.items(), strict=True)}, jnp.mean(rates)

    ranks, rates = jax.vmap(one)(jax.random.split(key, chains))
    return ranks, jnp.mean(rates)


def _rank(key: Any, values: Any) -> Any:
    """Return the rank of the first value, or the mark of one that is nan or stands among such."""
    first, others = values[0], values[1:]
    found = jnp.where(jnp.any(jnp.isnan(others)), _IMPOSSIBLE, rank(key, first, others))
    return jnp.where(jnp.isnan(first), _UNUSABLE, found)


@compiled
def _pairs(
    kernel: Kernel,
    program: Program,
    paths: tuple[str, ...],
    statistics: Any,
    key: Any,
    parameters: Any,
    chains: int,
    steps: int,
) -> Any:
    """Return the statistics of exact draws that were moved, and of fresh ones."""

    def one(key: Any) -> Any:
        key_draw, key_start, key_steps, key_fresh, key_other = jax.random.split(key, 5)
        latents, observations = _drawn(program, paths, key_draw)
        target = Target(Posterior(program, observations))
        start, step, own = _begun(kernel, target, key_start, latents, parameters)

        def move(state: Any, key: Any) -> Any:
            state, info = step(key, state, own)
            return state, jnp.mean(info.acceptance_rate)

        state, rates = lax.scan(move, start, jax.random.split(key_steps, steps))
        moved = _measured(statistics, target, kernel.latents(target, state.position))
        latents, observations = _drawn(program, paths, key_fresh)
        other = Target(Posterior(program, observations))
        fresh = keyed(lambda z: kernel.init(other, z))(key_other, latents)  # for the same rounding
        return moved, _measured(statistics, other, kernel.latents(other, fresh.position)), jnp.mean(rates)

    moved, fresh, rates = jax.vmap(one)(jax.random.split(key, chains))
    return {name: (moved[name], fresh[name]) for name in moved}, jnp.mean(rates)
