r"""Strategies by relaxation: a discrete choice as the limit of a differentiable one.

A flip is $b = 1[z > 0]$ with $z = \text{logit}(p) + \text{logit}(u)$, a one-hot choice $\arg\max_i (\ell_i + g_i)$ with
Gumbel $g$; the relaxed values are $\sigma(z / \tau)$ and $\text{softmax}((\ell + g) / \tau)$. The site's value is a float.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from expectax.ppl._log_prob import log_prob

from ._measure_valued import innermost
from ._strategy import Draw, Relaxation

sg = lax.stop_gradient
_FLIPS = (dist.BernoulliProbs, dist.BernoulliLogits)
_ONE_HOT = (dist.MultinomialProbs, dist.MultinomialLogits)


class _Perturbed(NamedTuple):
    """Logits with noise, free and bound to a choice; `relaxed(z, temperature)` brings them into the simplex."""

    free: Any
    bound: Any
    relaxed: Any


def _perturbed(d: Any, value: Any, key: Any) -> _Perturbed:
    """Return perturbed logits: drawn freely, and such that they make the choice `value` (Maddison et al. 2017)."""
    free, bound = jax.random.split(key)
    dtype = jnp.result_type(float)
    if is_flip(d):
        u, v = (jax.random.uniform(k, jnp.shape(value), dtype, 1e-6, 1.0 - 1e-6) for k in (free, bound))
        # the level of u that the choice leaves: above 1 - p for 1, below for 0
        level = jnp.where(value == 1, 1.0 - d.probs * (1.0 - v), (1.0 - d.probs) * v)
        level = jnp.clip(level, 1e-6, 1.0 - 1e-6)
        logit = lambda p: jnp.log(p) - jnp.log1p(-p)  # noqa: E731
        return _Perturbed(d.logits + logit(u), d.logits + logit(level), lambda z, t: jax.nn.sigmoid(z / t))
    logits = jax.nn.log_softmax(d.logits if hasattr(d, "logits") else jnp.log(d.probs))
    first = jax.random.gumbel(free, jnp.shape(value), dtype)
    exponential = jax.random.exponential(bound, jnp.shape(value), dtype)
    # the largest perturbed logit is a standard Gumbel, the others are truncated below it
    top = jnp.sum(value * exponential, axis=-1, keepdims=True)
    others = -jnp.log(exponential / jnp.exp(logits) + top)
    return _Perturbed(
        logits + first, jnp.where(value == 1, -jnp.log(top), others), lambda z, t: jax.nn.softmax(z / t, axis=-1)
    )


def is_flip(d: Any) -> bool:
    """Tell a Bernoulli from a one-hot choice."""
    return isinstance(d, _FLIPS)


def _fits(name: str, distribution: Any) -> str | None:
    d = innermost(distribution)
    if isinstance(d, _FLIPS) or (isinstance(d, _ONE_HOT) and isinstance(d.total_count, int) and d.total_count == 1):
        return None
    return f"{name} is for Bernoulli sites, and one-hot ones: Multinomial(1, probs), for n categories."


@dataclasses.dataclass(frozen=True)
class GumbelSoftmax:
    r"""The relaxed choice in place of the discrete one: **biased**, the program is run at values between.

    The value is $\sigma(z / \tau)$ or a point of the simplex; costs must be defined there. Because values and gradients
    are those of another program, the objective must say `allow={"address"}`.

    Attributes:
        temperature: $\tau > 0$; the bias goes with it, the variance grows as it falls.

    Source: Jang, Gu and Poole 2017; Maddison, Mnih and Teh 2017.

    Example:
        >>> from expectax import vi
        >>> vi.GumbelSoftmax(temperature=0.5)
        GumbelSoftmax(temperature=0.5)
    """

    temperature: float = 0.5
    biased = True
    relaxed = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the relaxed choice."""
        perturbed = _perturbed(innermost(distribution), value, key)
        return Draw(perturbed.relaxed(perturbed.free, self.temperature))

    def fits(self, distribution: Any) -> str | None:
        """Say why the strategy does not fit a distribution, or None."""
        return _fits("GumbelSoftmax", distribution)


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    r"""The discrete value forward, the derivative of the relaxed one backward: **biased** gradients, right values.

    The value is $b + r - \text{sg}\,r$, a float, with $r$ the relaxed choice that led to $b$. The objective must say
    `allow={"address"}`.

    Attributes:
        temperature: $\tau > 0$.

    Source: Bengio, Leonard and Courville 2013; with Gumbel noise: Jang, Gu and Poole 2017.

    Example:
        >>> from expectax import vi
        >>> vi.StraightThrough()
        StraightThrough(temperature=1.0)
    """

    temperature: float = 1.0
    biased = True
    relaxed = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the choice with the derivative of its relaxation."""
        perturbed = _perturbed(innermost(distribution), value, key)
        soft = perturbed.relaxed(perturbed.bound, self.temperature)
        return Draw(value + soft - sg(soft))

    def fits(self, distribution: Any) -> str | None:
        """Say why the strategy does not fit a distribution, or None."""
        return _fits("StraightThrough", distribution)


@dataclasses.dataclass(frozen=True)
class Rebar:
    r"""Score function with the relaxed program as its control variate: unbiased, for costs that are smooth between.

    $\hat g = (f(b) - \eta f(\tilde z)) \nabla \log p(b) + \eta \nabla f(z) - \eta \nabla f(\tilde z)$, with $z$ a free
    relaxed value and $\tilde z$ one bound to $b$. Two more runs for all elements of the site together; the cost must be
    finite at values between. Not in loops, nor where another drawn choice depends on this one. First derivatives only.

    Attributes:
        temperature: $\tau > 0$.
        scale: $\eta$; 0 is plain `Reinforce` without baseline.

    Source: Tucker et al. 2017; Grathwohl et al. 2018.

    Example:
        >>> from expectax import vi
        >>> vi.Rebar(temperature=0.3)
        Rebar(temperature=0.3, scale=1.0)
    """

    temperature: float = 0.5
    scale: float = 1.0
    relaxed = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the choice with its score and its relaxations."""
        perturbed = _perturbed(innermost(distribution), value, key)
        free, bound = (perturbed.relaxed(z, self.temperature) for z in (perturbed.free, perturbed.bound))
        return Draw(
            value, score=log_prob(distribution, value), relaxation=Relaxation(free, bound, jnp.asarray(self.scale))
        )

    def fits(self, distribution: Any) -> str | None:
        """Say why the strategy does not fit a distribution, or None."""
        return _fits("Rebar", distribution)


@dataclasses.dataclass(frozen=True)
class NoGradient:
    """No derivative at all through a choice's distribution: **biased**; the objective must say `allow={"address"}`.

    For ancestors in a particle filter, for instance, whose score is often left out.

    Example:
        >>> from expectax import vi
        >>> vi.NoGradient()
        NoGradient()
    """

    biased = True

    def couple(self, distribution: Any, value: Any, key: Any) -> Draw:
        """Return the draw alone."""
        del distribution, key
        return Draw(value)
