r"""Gradient strategies: how the derivative of an expectation passes a random choice.

A strategy belongs to a site, not to its distribution, and never changes what the program means. All of them are of one
form: a value $x$, a *score* that multiplies the costs of $x$, and *alternative* values $x_j$ with coefficients,

$$\nabla_\theta E[f(x)] = E\Big[\nabla_\theta f(x(\theta)) + f(x) \nabla_\theta s + \sum_j f(x_j) \nabla_\theta c_j\Big].$$
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, PRNGKeyArray


class Relaxation(NamedTuple):
    """A differentiable value `free`, and one `bound` to the choice that was made, for a control variate of RELAX.

    Example: see `vi.Rebar`, which makes one.
    """

    free: Array
    bound: Array
    scale: Any


class Draw(NamedTuple):
    r"""What a strategy makes of one draw of a site.

    Attributes:
        value: the choice $x$, with the site's law; derivatives pass through it.
        score: $s$, shape of the distribution's batch, or None: the costs that depend on $x$ are multiplied by
            $\exp(s - \text{sg}\,s)$. Usually $\log p(x;\theta)$.
        alternatives: pairs $(x_j, c_j)$: the gradient gains $\nabla c_j\, f(x_j)$, the rest of the program being run
            again with $x_j$ and the same random numbers. $c_j$ has the shape of the batch.
        relaxation: a control variate, see `vi.Rebar`.

    Example: see `vi.Coupled`.
    """

    value: Any
    score: Any = None
    alternatives: Sequence[tuple[Any, Any]] = ()
    relaxation: Relaxation | None = None


@runtime_checkable
class Coupled(Protocol):
    r"""The protocol of a strategy of one's own: a frozen dataclass with this one method.

    `couple(distribution, value, key)` sees one lane of a site: its distribution, a draw of it (without derivative) and
    a key of its own. It returns a `vi.Draw`. Lanes, batches, loops, branches and credit are the toolkit's.

    Class attributes that may be set: `joint = True` if all elements (lanes, batch) of a site may take an alternative
    at once (by default one at a time, where a cost depends on several); `biased = True` if gradients are biased, which
    then has to be allowed.

    Example:
        The weak derivative of a Poisson in its rate, $\partial_\lambda E f(x) = E[f(x + 1) - f(x)]$:

        >>> import dataclasses, jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @dataclasses.dataclass(frozen=True)
        ... class Difference:
        ...     def couple(self, distribution, value, key):
        ...         rate = distribution.rate
        ...         return vi.Draw(value, alternatives=[(value + 1, rate), (value, -rate)])
        >>> @vi.objective
        ... def square(rate):
        ...     return ex.sample("k", dist.Poisson(rate), gradient=Difference()) ** 2.0
        >>> gradient = jax.grad(square.surrogate)(3.0, jax.random.key(0), num_samples=4096)
        >>> abs(float(gradient) - 7.0) < 0.2  # 2 rate + 1
        True
    """

    def couple(self, distribution: Any, value: Any, key: PRNGKeyArray) -> Draw:
        """Return the draw with what its gradient needs."""
        ...


@dataclasses.dataclass(frozen=True)
class Reparam:
    r"""Differentiate through the sampler: $x = g(\epsilon, \theta)$.

    The pathwise estimator (Kingma and Welling 2014), implicit for gamma, beta, Dirichlet and Student-t (Figurnov et
    al. 2018). A distribution without a differentiable sampler, but with a distribution function $F$, such as a mixture
    of normals or von Mises, is differentiated by $\partial_\theta x = -\partial_\theta F(x;\theta) / p(x;\theta)$.
    Needs a cost that is continuous in the value.

    Example:
        >>> from expectax import vi
        >>> vi.Reparam()
        Reparam()
    """


@dataclasses.dataclass(frozen=True)
class Reinforce:
    r"""Score-function estimator: the costs that depend on $x$ are multiplied by $p(x;\theta) / \text{sg}\,p(x;\theta)$.

    Works for any distribution whose support does not move with the parameters (Williams 1992; in the form of Foerster
    et al. 2018, right to every order).

    Attributes:
        baseline: `"leave-one-out"` subtracts the mean cost of the other samples (needs `num_samples > 1`, else nothing
            is subtracted); a number or an array of the batch shape subtracts that; None subtracts nothing. None of
            them biases the gradient. The array may come from a network that sees anything but the choice itself. Where
            it depends on the parameters it is learned: its gradient is that of $-\frac12 (\text{cost} - b)^2$, so
            that the same ascent fits it to the costs (a running mean, if it is a parameter by itself).

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def square(params):
        ...     flip = dist.Bernoulli(params["p"])
        ...     return ex.sample("b", flip, gradient=vi.Reinforce(baseline=params["baseline"])) * 3.0
        >>> vi.Reinforce(baseline=None)
        Reinforce(baseline=None)
    """

    baseline: Literal["leave-one-out"] | Array | float | None = "leave-one-out"


@dataclasses.dataclass(frozen=True)
class Enum:
    r"""Sum the rest of the program over the site's finite support: $\sum_i p(x_i;\theta)\, k(x_i)$.

    No variance from this site, in one of three ways, the first that applies (`vi.estimators` says which):

    - *by lanes*: where every cost depends on one lane (or batch element) at a time, $K$ runs whatever their number;
    - *jointly*: $K^n$ runs for $n$ elements (scan steps included), at most 4096 in one objective;
    - *locally*: the choice is drawn, and each element is then replaced by each value in turn, all else being drawn
      with the same random numbers: $\nabla E f = E \sum_e \sum_i \nabla p_e(x_i) f(x_e := x_i)$ (local expectation
      gradients, Titsias and Lazaro-Gredilla 2015). $nK$ runs; first derivatives only.

    A value of probability exactly 0 is left out, with its derivative.

    Example:
        >>> from expectax import vi
        >>> vi.Enum()
        Enum()
    """


Strategy = Any
"""One of `Reparam`, `Reinforce`, `Enum`, or what satisfies `Coupled`."""


def pathwise(strategy: Strategy) -> bool:
    """Tell whether all of a strategy's gradient goes through the value."""
    return isinstance(strategy, Reparam) or bool(getattr(strategy, "pathwise", False))


def biased(strategy: Strategy) -> bool:
    """Tell whether a strategy says of itself that its gradients are biased."""
    return bool(getattr(strategy, "biased", False))
