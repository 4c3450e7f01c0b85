r"""Simulation-based calibration: whether a sampler samples the posteriors of a model.

Source: Talts et al. 2018; Modrák et al. 2023 for the log joint density as a test quantity; Cook, Gelman and Rubin 2006.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from expectax.ppl import AddressError, Posterior, Program, ShapeError
from expectax.ppl._compile import compiled
from expectax.ppl._errors import nearest
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._program import program_of
from expectax.ppl._staging import check_key

from ._chains import Chains
from ._ranks import rank

_MOST_BINS, _LEAST_EXPECTED = 20, 10


class Calibration(NamedTuple):
    """Ranks of true values among a sampler's draws, which are uniform if the sampler is right. Made by `sbc`.

    Example: see `sbc`.

    Attributes:
        ranks: name, such as `theta[2]`, or `log_joint` -> ranks in `0 .. num_draws`, shape `(num_simulations,)`.
        num_draws: draws among which the true value is ranked.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int

    @property
    def p_values(self) -> dict[str, float]:
        r"""The p-value of uniformity of each quantity's ranks: $\chi^2 = \sum_b (n_b - e_b)^2 / e_b$ over equal bins."""
        return {name: uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """The least p-value times the number of quantities, at most 1 (Bonferroni)."""
        values = self.p_values.values()
        return min(1.0, min(values) * len(values))

    def __str__(self) -> str:
        """Return a table of p-values, and of how the ranks lean and spread."""
        width = max(map(len, self.ranks))
        lines = [f"{'':{width}}  {'p-value':>8} {'mean rank':>9} {'sd rank':>8}   (uniform: 0.500, 0.289)"]
        for name, p in self.p_values.items():
            u = (self.ranks[name] + 0.5) / (self.num_draws + 1)
            lines.append(f"{name:{width}}  {p:8.1e} {u.mean():9.3f} {u.std():8.3f}")
        return "\n".join([*lines, f"all together: p = {self.p_value:.1e}"])

    __repr__ = __str__


def uniformity(ranks: np.ndarray, num_draws: int) -> float:
    """Return the p-value of the chi-square test that ranks in `0 .. num_draws` are uniform."""
    number = len(ranks)
    bins = int(np.clip(number // _LEAST_EXPECTED, 2, min(_MOST_BINS, num_draws + 1)))
    bin_of = np.arange(num_draws + 1) * bins // (num_draws + 1)
    expected = number * np.bincount(bin_of) / (num_draws + 1)
    counts = np.bincount(bin_of[ranks], minlength=bins)
    from scipy import stats  # here, because importing it takes long

    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), bins - 1))


def sbc(
    program: Program,
    observed_addresses: str | Sequence[str],
    sampler: Callable[[Posterior, PRNGKeyArray], Any],
    *,
    key: PRNGKeyArray,
    num_simulations: int = 1000,
    num_draws: int = 99,
    jit: bool = True,
) -> Calibration:
    r"""Check a sampler by simulation: the rank of the truth among posterior draws is uniform.

    With $z^*, y \sim p(z, y)$ and independent $z_1, \dots, z_L \sim p(z \mid y)$ the rank
    $\sum_l 1\{f(z_l) < f(z^*)\}$ is uniform on $0, \dots, L$ for every $f$. It is taken of each scalar latent and of the log
    joint density, which alone sees errors common to many latents; ties, as discrete latents have them, are broken at
    random. The test knows as much as the simulations do: a variance that is wrong by a fraction $\epsilon$ in $d$ latents
    shifts the log joint by about $\epsilon \sqrt{d / 2}$ of its standard deviation, and shows clearly in $S$ simulations
    if $\epsilon \sqrt{d S / 2}$ exceeds about 8. Dependent draws are not uniform: thin a chain until they are independent.

    Args:
        program: a bound program, `model(...)`.
        observed_addresses: the address, or addresses (paths such as `"sub/x"`), to simulate as data.
        sampler: `sampler(posterior, key)` returns draws of the latents: a nested dict of arrays with a leading axis of
            draws, or `Chains`. Of more than `num_draws` draws as many are taken at equal distances, chain after chain.
        key: a typed key.
        num_simulations: data sets.
        num_draws: $L$; with $L + 1$ a multiple of 20 all bins are of one size.
        jit: run all simulations in one compiled program, which needs a sampler of plain JAX, such as `mcmc`. Without,
            they are run one after the other, and the sampler may be any Python function.

    Returns:
        A `Calibration`, with `.p_value`; it prints as a table.

    Raises:
        AddressError: an address is unknown, a latent has no draws, or all or none of the addresses are observed.
        ShapeError: the draws are too few, or not of the latents' shapes.
        ValueError: a number is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> def sampler(posterior, key, sd=0.5**0.5):
        ...     return {"z": posterior.observations["y"] / 2 + sd * jax.random.normal(key, (99,))}
        >>> inference.sbc(model(), "y", sampler, key=jax.random.key(0), num_simulations=500).p_value > 1e-3
        True
        >>> wrong = lambda posterior, key: sampler(posterior, key, sd=1.0)
        >>> inference.sbc(model(), "y", wrong, key=jax.random.key(0), num_simulations=500).p_value < 1e-6
        True
    """
    program = program_of(program, "sbc")
    check_key(key)
    if min(num_simulations, num_draws) < 1:
        raise ValueError(f"sbc: need num_simulations and num_draws >= 1, got {num_simulations}, {num_draws}.")
    addresses = (observed_addresses,) if isinstance(observed_addresses, str) else tuple(observed_addresses)
    observed = _observed(program, addresses)
    keys = jax.random.split(key, num_simulations)
    if jit:
        ranks = _all_ranks(program, observed, sampler, num_draws, keys)
    else:
        each = [_ranks(program, observed, sampler, num_draws, key) for key in keys]
        ranks = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
    return Calibration(dict(_named(jax.device_get(ranks))), num_draws)


def _observed(program: Program, addresses: tuple[str, ...]) -> frozenset[str]:
    """Return the paths of the sites to simulate as data."""
    paths = [path for path, _ in leaves_of(program.sites())]
    for address in addresses:
        if not any(path == address or path.startswith(f"{address}/") for path in paths):
            raise AddressError(f"sbc: the program has no site {address!r}.{nearest(address, paths)}")
    found = frozenset(p for p in paths if any(p == a or p.startswith(f"{a}/") for a in addresses))
    if not 0 < len(found) < len(paths):
        raise AddressError(
            f"sbc: some sites have to be observed and some not, got observed_addresses={list(addresses)} of the sites {paths}."
        )
    return found


@compiled
def _all_ranks(program: Program, observed: frozenset[str], sampler: Any, num_draws: int, keys: Any) -> Any:
    return jax.vmap(lambda key: _ranks(program, observed, sampler, num_draws, key))(keys)


def _ranks(program: Program, observed: frozenset[str], sampler: Any, num_draws: int, key: Any) -> dict[str, Any]:
    """Simulate latents and data, and rank the latents among draws given the data."""
    key_data, key_draws, key_ties = jax.random.split(key, 3)
    simulated = list(leaves_of(program.simulate(key_data).choices))
    truth = nested((path, value) for path, value in simulated if path not in observed)
    posterior = program.given(nested((path, value) for path, value in simulated if path in observed))
    draws = _draws(sampler(posterior, key_draws), truth, num_draws)
    quantities = [*((path, value, dict(leaves_of(draws))[path]) for path, value in leaves_of(truth))]
    quantities.append(("log_joint", posterior.log_density_inside(truth), jax.vmap(posterior.log_density_inside)(draws)))
    keys = jax.random.split(key_ties, len(quantities))
    return {path: rank(key, true, drawn) for key, (path, true, drawn) in zip(keys, quantities, strict=True)}


def _draws(result: Any, truth: Choices, num_draws: int) -> Choices:
    """Return `num_draws` draws of every latent, the draws first."""
    chains = isinstance(result, Chains)
    given = dict(leaves_of(result.choices if chains else result))
    taken = {}
    for path, value in leaves_of(truth):
        if path not in given:
            raise AddressError(f"sbc: the sampler returned no draws of {path!r}.{nearest(path, given)}")
        drawn = jnp.asarray(given[path])
        drawn = drawn.reshape(-1, *drawn.shape[2:]) if chains else drawn
        if drawn.shape[1:] != jnp.shape(value) or len(drawn) < num_draws:
            raise ShapeError(
                f"sbc: the sampler has to return at least num_draws={num_draws} draws of {path!r}, of shape "
                f"{jnp.shape(value)} each, got an array of shape {drawn.shape}."
            )
        taken[path] = drawn[np.linspace(0, len(drawn) - 1, num_draws).round().astype(int)]
    return nested(taken.items())


def _named(ranks: dict[str, Any]) -> Any:
    """Yield `(name, ranks)` of each scalar."""
    for path, values in ranks.items():
        for index in np.ndindex(values.shape[1:]):
            suffix = "[" + ",".join(map(str, index)) + "]" if index else ""
            yield path + suffix, np.asarray(values)[(slice(None), *index)]
