"""What the gradients of an objective are worth: noise by site, bias, better strategies, and the guide's weights."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray
from scipy import stats

from expectax.ppl import Posterior, StrategyError
from expectax.ppl._staging import as_data, check_key

from ._antithetic import DisARM
from ._bounds import elbo
from ._measure_valued import MVD
from ._objective import Objective, log_weights_of
from ._pareto import pareto_shape
from ._semi_amortised import _semi_amortised
from ._strategy import Enum, Reinforce, Reparam, Strategy, biased, pathwise

_CANDIDATES: tuple[Strategy, ...] = (Reparam(), Enum(), MVD(), DisARM(), Reinforce(), Reinforce(baseline=None))


class Noise(NamedTuple):
    """The gradient that passes one site: length of its mean, root of its total variance, seconds per estimate.

    Example: see `diagnose`.
    """

    signal: float
    noise: float
    seconds: float

    @property
    def signal_to_noise(self) -> float:
        """Signal over noise of one estimate."""
        return self.signal / self.noise if self.noise > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. Example: see `diagnose`.

    Attributes:
        total: the `Noise` of the whole gradient.
        sites: address to the `Noise` of what passes that site.
        strategies: address to the strategy that is used.
        better: address to `(strategy, gain)`: another strategy, by whose use the same time gives `gain` times less
            variance.
        bias_p_value: of the hypothesis that the gradient's mean is that of a reference estimator (scores alone where
            they apply); nan if there is no reference.
        k_hat: Pareto shape of the guide's importance weights (`pareto_shape`); nan if the objective has no guide.
        bounds: number of particles to the importance-weighted bound of the guide.
        advice: plain sentences.
    """

    total: Noise
    sites: dict[str, Noise]
    strategies: dict[str, Strategy]
    better: dict[str, tuple[Strategy, float]]
    bias_p_value: float
    k_hat: float
    bounds: dict[int, float]
    advice: tuple[str, ...]

    def __repr__(self) -> str:
        """Show the table and the advice as text."""
        rows = [("site", "strategy", "signal", "noise", "signal/noise"), self._row("all", "", self.total)]
        rows += [self._row(a, repr(self.strategies[a]), noise) for a, noise in self.sites.items()]
        widths = [max(len(row[n]) for row in rows) for n in range(5)]
        lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.advice])

    def _row(self, address: str, strategy: str, noise: Noise) -> tuple[str, ...]:
        return (address, strategy, *(f"{x:.3g}" for x in (noise.signal, noise.noise, noise.signal_to_noise)))


def diagnose(
    objective: Objective,
    params: Any,
    key: PRNGKeyArray,
    *,
    num_estimates: int = 400,
    num_samples: int = 1,
    try_others: bool = True,
) -> Diagnosis:
    r"""Measure an objective's gradient at some parameters, site by site, and say in plain words what to change.

    The gradient that passes a site is the whole less the one with that site's derivative stopped, for the same random
    numbers. The bias check compares means with an estimator that uses scores wherever they apply (pathwise elsewhere).

    Args:
        objective: the objective.
        params: the parameters.
        key: a typed key.
        num_estimates: how many independent gradients are taken, at least 20.
        num_samples: samples averaged in each, as in `vi.fit` (2 or more for leave-one-out baselines).
        try_others: measure other strategies for the noisiest sites (up to five; each compiles).

    Returns:
        A `Diagnosis`, which prints itself.

    Raises:
        ValueError: `num_estimates` is less than 20.

    Source: signal-to-noise of gradient estimators: Rainforth et al. 2018; k-hat for guides: Yao et al. 2018.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def square(p):
        ...     return (ex.sample("b", dist.Bernoulli(p), gradient=vi.Reinforce(baseline=None)) + 3.0) ** 2
        >>> found = vi.diagnose(square, 0.3, jax.random.key(0))
        >>> found.better["b"][0]
        Enum()
    """
    check_key(key)
    if num_estimates < 20:
        raise ValueError(f"diagnose needs num_estimates >= 20, got {num_estimates}.")
    run = _Measuring(objective, as_data(params), key, num_estimates, num_samples)
    layout = objective.staged(params).layout
    strategies = {c.site.address: objective_strategy(c) for c in layout.choices}
    mean, variance, seconds = run.moments(run.gradient())
    total = _noise(mean, variance, seconds)
    sites = {a: _noise(*run.moments(run.through(a))) for a in strategies}
    p_value = run.bias(mean, variance, strategies)
    noisy = sorted(sites, key=lambda a: -sites[a].noise)[:5] if try_others else []
    better = {a: found for a in noisy if (found := run.better(a, strategies[a], sites[a], total)) is not None}
    k_hat, bounds = _weights(objective, params, key)
    advice = _advice(total, sites, strategies, better, p_value, k_hat)
    return Diagnosis(total, sites, strategies, better, p_value, k_hat, bounds, advice)


def objective_strategy(choice: Any) -> Strategy:
    """Return the strategy of a choice, as a user would write it."""
    if isinstance(choice.strategy, Enum):
        return Enum()
    return Reparam() if pathwise(choice.strategy) else choice.strategy


@dataclasses.dataclass(frozen=True)
class _Measuring:
    """Gradients of an objective, and their moments over independent estimates."""

    objective: Objective
    params: Any
    key: Any
    num_estimates: int
    num_samples: int

    def gradient(self, strategies: Mapping[str, Strategy] | None = None, stopped: tuple[str, ...] = ()) -> Any:
        """Return a function of key and parameters to the flat gradient."""

        def loss(moving: Any, rest: Any, key: Any) -> Any:
            staged = self.objective.staged(eqx.combine(moving, rest), strategies)
            return staged.mean(key, self.num_samples, frozenset(stopped))

        def flat(key: Any, params: Any) -> Any:
            moving, rest = eqx.partition(params, eqx.is_inexact_array)
            leaves = jax.tree.leaves(jax.grad(loss)(moving, rest, key))
            return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) if leaves else jnp.zeros(0)

        return flat

    def through(self, address: str) -> Callable[[Any, Any], Any]:
        """Return the part of the gradient that passes one site."""
        whole, without = self.gradient(), self.gradient(stopped=(address,))
        return lambda key, params: whole(key, params) - without(key, params)

    def moments(self, gradient: Callable[[Any, Any], Any], fold: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
        """Return mean, variance and seconds per estimate."""
        keys = jax.random.split(jax.random.fold_in(self.key, fold), self.num_estimates)

        @eqx.filter_jit
        def run(keys: Any, params: Any) -> Any:
            first = gradient(keys[0], params)

            def step(sums: Any, key: Any) -> Any:
                # about the first estimate: sums of squares of large numbers would cancel
                x = gradient(key, params) - first
                return (sums[0] + x, sums[1] + x**2), None

            (one, two), _ = lax.scan(step, (jnp.zeros_like(first), jnp.zeros_like(first)), keys)
            return first, one / len(keys), two / len(keys)

        jax.block_until_ready(run(keys, self.params))
        start = time.perf_counter()
        first, one, two = (np.asarray(x, np.float64) for x in jax.block_until_ready(run(keys, self.params)))
        seconds = (time.perf_counter() - start) / self.num_estimates
        n = self.num_estimates
        return first + one, np.maximum(two - one**2, 0.0) * n / (n - 1), seconds

    def bias(self, mean: np.ndarray, variance: np.ndarray, strategies: Mapping[str, Strategy]) -> float:
        """Return the p-value of equal means with a reference estimator, Bonferroni over parameters."""
        reference = {a: s for a in strategies if (s := self._score(a)) is not None}
        if not reference or all(strategies[a] == s for a, s in reference.items()):
            return math.nan
        other, spread, _ = self.moments(self.gradient(reference), fold=1)
        error = np.sqrt((variance + spread) / self.num_estimates)
        gap = np.abs(mean - other)
        same = gap <= 1e-5 * (1e-3 + np.abs(mean))
        z = np.where(same, 0.0, gap / np.maximum(error, 1e-300))
        return float(min(1.0, len(z) * 2.0 * stats.norm.sf(z.max(initial=0.0))))

    def _score(self, address: str) -> Strategy | None:
        return Reinforce() if self.fits(address, Reinforce()) else None

    def fits(self, address: str, strategy: Strategy) -> bool:
        """Tell whether a strategy may stand at a site."""
        try:
            eqx.filter_eval_shape(self.gradient({address: strategy}), self.key, self.params)
        except StrategyError:
            return False
        return True

    def better(self, address: str, used: Strategy, site: Noise, total: Noise) -> tuple[Strategy, float] | None:
        """Return the strategy whose variance times time is the least, if it gains a factor of 1.5."""
        best: tuple[Strategy, float] | None = None
        for strategy in _CANDIDATES:
            if (
                strategy == used
                or (isinstance(strategy, Reinforce) and pathwise(used))
                or not self.fits(address, strategy)
            ):
                continue
            mean, variance, seconds = self.moments(self.gradient({address: strategy}))
            other = _noise(mean, variance, seconds)
            cost = max(other.noise**2 * seconds, 1e-12 * total.noise**2 * total.seconds, 1e-300)
            gain = total.noise**2 * total.seconds / cost
            if gain > (1.5 if best is None else 1.2 * best[1]):
                best = (strategy, gain)
        return best


def _noise(mean: np.ndarray, variance: np.ndarray, seconds: float) -> Noise:
    return Noise(float(np.linalg.norm(mean)), float(np.sqrt(variance.sum())), seconds)


def _weights(objective: Objective, params: Any, key: Any) -> tuple[float, dict[int, float]]:
    """Return k-hat of the guide's weights, and the bound by number of particles."""
    of_other_parameters = objective.function is _semi_amortised  # its guide takes what the encoder returns
    if len(objective.captured) < 2 or not isinstance(objective.captured[0], Posterior) or of_other_parameters:
        return math.nan, {}
    posterior, guide = objective.captured[:2]
    log_weights = np.asarray(
        log_weights_of(elbo(posterior, guide).allowing(*objective.allow), params, key, 4000), np.float64
    )
    bounds = {}
    for n in (1, 2, 5, 10, 20, 50, 100):
        blocks = log_weights.reshape(-1, n)
        top = np.where(np.isfinite(blocks.max(1)), blocks.max(1), 0.0)
        bounds[n] = float(np.mean(top + np.log(np.mean(np.exp(blocks - top[:, None]), axis=1))))
    return pareto_shape(log_weights), bounds


def _advice(
    total: Noise,
    sites: Mapping[str, Noise],
    strategies: Mapping[str, Strategy],
    better: Mapping[str, tuple[Strategy, float]],
    p_value: float,
    k_hat: float,
) -> tuple[str, ...]:
    found = []
    if sites and total.noise > 0:
        worst = max(sites, key=lambda a: sites[a].noise)
        share = min(1.0, sites[worst].noise ** 2 / total.noise**2)
        if share > 0.5 and len(sites) > 1:
            found.append(f"{share:.0%} of the gradient's variance passes site {worst!r}.")
    if total.signal_to_noise < 0.1:
        count = math.ceil((0.3 / max(total.signal_to_noise, 1e-3)) ** 2)
        found.append(f"One gradient is mostly noise; {count} samples a step would make it a third signal.")
    for address, (strategy, gain) in better.items():
        times = f"{gain:.1f} times less" if gain < 1e6 else "no"
        found.append(f"At {address!r} use vi.{strategy!r}: {times} variance for the same time.")
    if p_value < 1e-4:
        found.append(f"The gradient is biased: its mean differs from that of scores (p = {p_value:.1g}).")
    wrong = [a for a, s in strategies.items() if biased(s)]
    if wrong:
        found.append(f"Strategies that are biased by construction stand at {', '.join(map(repr, wrong))}.")
    if k_hat > 0.7:
        found.append(
            f"Pareto k-hat of the guide is {k_hat:.2f} > 0.7: it misses part of the posterior; importance weights cannot "
            "mend it. Use a richer guide, or a mass-covering objective (vi.renyi, vi.wake_guide)."
        )
    return tuple(found) or ("Nothing to complain of.",)
