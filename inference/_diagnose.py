r"""What is wrong with some chains, in plain sentences.

Sources: Vehtari et al. 2021 for R-hat and effective sample sizes; Betancourt 2016 for the fraction of missing
information; Betancourt 2017 for divergences, and where they gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ._hamiltonian import Hamiltonian
from ._summary import scalars, summarize

if TYPE_CHECKING:
    from ._chains import Chains

_R_HAT, _ESS_PER_CHAIN, _ENERGY_FRACTION, _STUCK = 1.01, 100, 0.3, 0.01
_APART = 0.5
"""How far the mean normal scores of divergent and other starts must lie apart to be worth a word."""


class Diagnosis(list[str]):
    """Problems, a sentence each; prints as lines, or as "no problem found". Example: see `diagnose`."""

    def __str__(self) -> str:
        """Return the sentences, one a line."""
        return "\n".join(self) or "no problem found"

    __repr__ = __str__


def diagnose(chains: Chains) -> Diagnosis:
    r"""Say what is wrong with chains, in one sentence for each problem, with what to try.

    Looked at are, in this order: chains that are stuck (mean acceptance below 0.01); split rank-normalised $\hat R$ above
    1.01; bulk and tail effective sample sizes below 100 a chain; divergences, and where they gather; trees that reach
    `max_tree_depth`; and a fraction of missing information $\sum_n (E_n - E_{n-1})^2 / \sum_n (E_n - \bar E)^2$ below 0.3.

    Where divergences gather: the values from which the divergent transitions start are compared with the others, each
    latent by the difference of the mean normal scores of its ranks, which no monotone change of scale alters.

    Args:
        chains: the result of `mcmc`.

    Returns:
        A list of sentences that prints as lines; without a problem it is empty and prints "no problem found".

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> posterior = model().given({"y": 1.0})
        >>> inference.mcmc(posterior, inference.nuts(), key=jax.random.key(0)).diagnose()
        no problem found
    """
    if chains.statistics["divergent"].ndim != 2:
        raise ValueError("diagnose needs the chains of one run of mcmc, with axes (num_chains, num_samples).")
    statistics = {name: np.asarray(x) for name, x in jax.device_get(chains.statistics).items()}
    found = [_stuck(statistics), *_convergence(chains), _divergences(chains, statistics)]
    return Diagnosis(problem for problem in (*found, *_hamiltonian(chains, statistics)) if problem)


def _stuck(statistics: dict[str, np.ndarray]) -> str | None:
    acceptance = statistics["acceptance_rate"].mean(1)
    chains = np.flatnonzero(~(acceptance >= _STUCK))
    if not len(chains):
        return None
    return (
        f"{_some(chains, 'chain')} hardly moved (mean acceptance {acceptance[chains[0]]:.1e}): warm up longer, start "
        "elsewhere (initial=), or give the kernel a smaller step."
    )


def _convergence(chains: Chains) -> Iterator[str | None]:
    """Tell of R-hat and effective sample sizes."""
    shape = chains.statistics["divergent"].shape
    if not jax.tree.leaves(chains.choices):
        return
    if shape[1] < 4:
        yield f"there are only {shape[1]} draws a chain, too few to tell whether the chains agree: raise num_samples."
        return
    rows = summarize(chains.choices)
    still = [name for name, row in rows.items() if not row.sd > 0]
    if still:
        yield f"{_some(still, 'number')} never moved: look at what the kernel updates, and at where it starts."
    rows = {name: row for name, row in rows.items() if name not in still}
    bad = {name: row.r_hat for name, row in rows.items() if not row.r_hat <= _R_HAT}
    if bad:
        worst = max(bad, key=lambda name: np.nan_to_num(bad[name], nan=np.inf))
        yield (
            f"R-hat is above {_R_HAT} for {len(bad)} of {len(rows)} numbers, worst {worst} ({bad[worst]:.3f}): the chains "
            "do not agree yet; run longer (num_warmup, num_samples), and if it stays, look for several modes or "
            "reparameterise the model."
        )
    for kind, why in (("bulk", "means are not yet to be trusted"), ("tail", "quantiles are not yet to be trusted")):
        sizes = {name: getattr(row, f"ess_{kind}") for name, row in rows.items()}
        least = _ESS_PER_CHAIN * shape[0]
        few = {name: size for name, size in sizes.items() if not size >= least}
        if few:
            worst = min(few, key=lambda name: np.nan_to_num(few[name]))
            yield (
                f"the {kind} effective sample size is below {least} ({_ESS_PER_CHAIN} a chain) for {len(few)} of "
                f"{len(rows)} numbers, worst {worst} ({few[worst]:.0f}): {why}; raise num_samples, or reparameterise the "
                "model (inference.auto_reparameterize)."
            )


def _divergences(chains: Chains, statistics: dict[str, np.ndarray]) -> str | None:
    divergent = statistics["divergent"]
    if not divergent.any():
        return None
    gather = " and ".join(
        f"{'small' if difference < 0 else 'large'} {name}" for name, difference in divergent_region(chains)[:2]
    )
    where = f"; divergences gather at {gather}" if gather else ""
    return (
        f"{int(divergent.sum())} of {divergent.size} transitions diverged, so that a part of the posterior may be missed"
        f"{where}: raise target_acceptance (0.95, 0.99), or write the sites around there non-centred "
        "(inference.auto_reparameterize)."
    )


def divergent_region(chains: Chains) -> list[tuple[str, float]]:
    """Return the numbers in whose values divergent transitions start apart from others, the farthest first.

    A transition starts at the draw before it. A difference counts if it exceeds both a half and what chance makes of the
    largest of so many differences of independent draws.
    """
    from scipy import special, stats  # here, because importing it takes long

    divergent = np.asarray(chains.statistics["divergent"])[:, 1:].ravel()
    number = int(divergent.sum())
    if not 0 < number < divergent.size:
        return []
    starts = [(name, draws[:, :-1].ravel()) for name, draws in scalars(chains.choices)]
    chance = np.sqrt(2 * np.log(20 * max(len(starts), 1)) * (1 / number + 1 / (divergent.size - number)))
    found = []
    for name, values in starts:
        scores = special.ndtri((stats.rankdata(values) - 0.5) / values.size)
        difference = float(scores[divergent].mean() - scores[~divergent].mean())
        if abs(difference) > max(_APART, chance):
            found.append((name, difference))
    return sorted(found, key=lambda pair: -abs(pair[1]))


def _hamiltonian(chains: Chains, statistics: dict[str, np.ndarray]) -> Iterator[str | None]:
    """Tell what only Hamiltonian kernels can suffer from."""
    kernel = None if chains.last is None else chains.last.run[1]
    if not isinstance(kernel, Hamiltonian) or chains.last is None:
        return
    depth = dict(kernel.settings).get("max_num_doublings")
    if depth is not None:
        full = statistics["num_integration_steps"] >= chains.last.way.thinning * (2**depth - 1)
        if full.any():
            yield (
                f"{int(full.sum())} of {full.size} trees reached max_tree_depth={depth}: each step is costly and stays "
                "near; warm up longer, use dense_mass=True for correlated latents, or reparameterise the model."
            )
    fraction = np.array([_energy_fraction(chain) for chain in statistics["energy"]])
    low = np.flatnonzero(fraction < _ENERGY_FRACTION)
    if len(low):
        yield (
            f"the fraction of missing information is below {_ENERGY_FRACTION} in {_some(low, 'chain')} "
            f"(least {fraction[low].min():.2f}): the momentum cannot carry the chain through the tails; reparameterise the "
            "model (heavy tails, scales that depend on each other), or warm up longer."
        )


def _energy_fraction(energy: np.ndarray) -> float:
    """Return the fraction of missing information of a chain, of its finite energies (a divergence has an infinite one)."""
    finite = np.isfinite(energy)
    pairs = finite[1:] & finite[:-1]
    energy = np.where(finite, energy, 0.0).astype(np.float64)
    if pairs.sum() < 3:
        return np.inf
    spread = energy[finite].var()
    return float((np.diff(energy)[pairs] ** 2).mean() / spread) if spread > 0 else 0.0


def _some(names: Any, what: str) -> str:
    """Name the first few."""
    shown = ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{what}{'s' if len(names) > 1 else ''} {shown}"
