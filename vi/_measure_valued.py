r"""Measure-valued derivatives: $\partial_\theta E_{p_\theta}[f] = c_\theta\,(E_{p^+}[f] - E_{p^-}[f])$.

Two runs of the rest of the program per parameter, whatever $f$ is: it may jump. Decompositions: Mohamed et al. 2020,
table 1 and section 6; Pflug 1996; Heidergott and Vazquez-Abad 2008.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from ._strategy import Draw

sg = lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class MVD:
    r"""Measure-valued derivative: the rest of the program is run at values from $p^+$ and $p^-$, and subtracted.

    Unbiased for costs of any kind, of low variance where $f$ varies slowly. For `Bernoulli` and `Categorical` (all
    values), `Normal` in `loc` and `scale`, `Poisson` and `Exponential` in `rate`, `Gamma` in `rate` (in `concentration`
    by the score), `Geometric` and `Binomial` in `probs`; also with logits, expanded, or `to_event`-free batches. First
    derivatives only. Where a cost depends on $n$ elements (lanes, steps) together, it takes $2n$ runs per parameter.

    Source: Mohamed, Rosca, Figurnov and Mnih 2020; as an ADEV strategy: Lew et al. 2023.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def jump(mean):
        ...     return 1.0 * (ex.sample("x", dist.Normal(mean, 1.0), gradient=vi.MVD()) > 0.0)
        >>> slope = jax.grad(jump.surrogate)(0.0, jax.random.key(0), num_samples=2000)
        >>> abs(float(slope) - 0.399) < 0.02  # the density at 0
        True
    """

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the draw with values from the positive and the negative part."""
        d = innermost(distribution)
        return _RULES[type(d)](d, value, key)

    def fits(self, distribution: Any) -> str | None:
        """Say why the strategy does not fit a distribution, or None."""
        if distribution.event_shape:
            return "its elements are vectors; give it a batch shape instead (no to_event)."
        if type(innermost(distribution)) not in _RULES:
            names = ", ".join(sorted({t.__name__ for t in _RULES}))
            return f"measure-valued derivatives are known for {names}."
        return None


def innermost(d: Any) -> Any:
    """Return what `expand` was applied to."""
    while isinstance(d, dist.ExpandedDistribution):
        d = d.base_dist
    return d


def _flip(d: Any, value: Any, key: Any) -> Draw:
    del key
    return Draw(value, alternatives=[(jnp.ones_like(value), d.probs), (jnp.zeros_like(value), -d.probs)])


def _categorical(d: Any, value: Any, key: Any) -> Draw:
    del key
    return Draw(value, alternatives=[(jnp.full_like(value, i), d.probs[..., i]) for i in range(d.probs.shape[-1])])


def _normal(d: Any, value: Any, key: Any) -> Draw:
    r"""Location: $\mu \pm \sigma W$, $W$ Rayleigh. Scale: $\mu + \sigma M$ and $\mu + \sigma U M$, $M$ two-sided Maxwell."""
    rayleigh, maxwell, side, uniform = jax.random.split(key, 4)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    w = jnp.sqrt(-2.0 * jnp.log1p(-jax.random.uniform(rayleigh, shape, dtype)))
    m = jnp.linalg.norm(jax.random.normal(maxwell, (*shape, 3), dtype), axis=-1)
    m = m * jax.random.rademacher(side, shape, dtype)
    u = jax.random.uniform(uniform, shape, dtype)
    loc, scale = d.loc / (sg(d.scale) * math.sqrt(2.0 * math.pi)), jnp.log(d.scale)
    parts = [
        (d.loc + d.scale * w, loc),
        (d.loc - d.scale * w, -loc),
        (d.loc + d.scale * m, scale),
        (d.loc + d.scale * u * m, -scale),
    ]
    return Draw(value, alternatives=parts)


def _poisson(d: Any, value: Any, key: Any) -> Draw:
    del key
    return Draw(value, alternatives=[(value + 1, d.rate), (value, -d.rate)])


def _exponential(d: Any, value: Any, key: Any) -> Draw:
    r"""$\partial_\lambda p = \lambda^{-1}(\text{Exp}(\lambda) - \text{Gamma}(2, \lambda))$."""
    more = value + jax.random.exponential(key, jnp.shape(value), jnp.result_type(value)) / d.rate
    return Draw(value, alternatives=[(value, jnp.log(d.rate)), (more, -jnp.log(d.rate))])


def _gamma(d: Any, value: Any, key: Any) -> Draw:
    r"""Rate: $a\beta^{-1}(\text{Gamma}(a, \beta) - \text{Gamma}(a + 1, \beta))$; shape: the score."""
    more = value + jax.random.exponential(key, jnp.shape(value), jnp.result_type(value)) / d.rate
    rate = sg(d.concentration) * jnp.log(d.rate)
    score = dist.Gamma(d.concentration, sg(d.rate)).log_prob(value)
    return Draw(value, score=score, alternatives=[(value, rate), (more, -rate)])


def _geometric(d: Any, value: Any, key: Any) -> Draw:
    r"""$\partial_\rho p = \rho^{-1}(\text{Geom}(\rho) - (1 + \text{NegBin}(2, \rho)))$, for the number of failures."""
    more = 1 + value + dist.Geometric(probs=d.probs).sample(key).astype(value.dtype)
    return Draw(value, alternatives=[(value, jnp.log(d.probs)), (more, -jnp.log(d.probs))])


def _binomial(d: Any, value: Any, key: Any) -> Draw:
    r"""$\partial_\rho E f = n E[f(B + 1) - f(B)]$ with $B \sim \text{Binomial}(n - 1, \rho)$."""
    fewer = dist.Binomial(jnp.maximum(d.total_count - 1, 0), probs=sg(d.probs)).sample(key).astype(value.dtype)
    weight = d.total_count * d.probs
    return Draw(value, alternatives=[(jnp.minimum(fewer + 1, d.total_count), weight), (fewer, -weight)])


_RULES: dict[type, Callable[[Any, Any, Any], Draw]] = {
    dist.BernoulliProbs: _flip,
    dist.BernoulliLogits: _flip,
    dist.CategoricalProbs: _categorical,
    dist.CategoricalLogits: _categorical,
    dist.Normal: _normal,
    dist.Poisson: _poisson,
    dist.Exponential: _exponential,
    dist.Gamma: _gamma,
    dist.GeometricProbs: _geometric,
    dist.GeometricLogits: _geometric,
    dist.BinomialProbs: _binomial,
    dist.BinomialLogits: _binomial,
}
