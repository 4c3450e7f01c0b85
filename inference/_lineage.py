r"""The variance of an evidence, from one run: how unevenly the last weights descend from the first particles.

Source: Lee and Whiteley 2018, "Variance estimation in the particle filter".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._ancestors import Method


class Lineage(NamedTuple):
    r"""Which first particle (*Eve*) each particle descends from, and the factor $\prod_p c_p$ of the generations so far.

    With $S_e$ the weight of Eve $e$'s descendants, those of two Eves have $\sum_{e \ne f} S_e S_f = 1 - \sum_e S_e^2$ in
    common. A resampling step takes some of that away on average, and $c_p$ gives it back; what is missing in the end is
    the relative variance of $\hat Z$, estimated by $1 - \prod_p c_p\, (1 - \sum_e S_e^2)$.
    """

    eves: Int[Array, " n"]
    factor: Float[Array, ""]

    @classmethod
    def of(cls, count: int, dtype: Any) -> Lineage:
        """Return the first generation: independent draws."""
        factor = jnp.full((), count / (count - 1) if count > 1 else jnp.inf, dtype)
        return cls(jnp.arange(count), factor)

    def shares(self, weights: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the weight of each Eve's descendants."""
        return jax.ops.segment_sum(weights, self.eves, num_segments=weights.shape[0])

    def variance(self, weights: Float[Array, " n"]) -> Float[Array, ""]:
        r"""Return the estimated relative variance of $\hat Z$ after a reweighting."""
        return 1.0 - self.factor * (1.0 - jnp.sum(self.shares(weights) ** 2))

    def resampled(self, weights: Any, index: Int[Array, " m"], method: Method, copies: int = 1) -> Lineage:
        r"""Return the next generation, of $m$ particles with some copies each, descendants side by side.

        Of $m$ indices an Eve gets $N_e$, with mean $m S_e$. From $E \sum_{e \ne f} N_e N_f / m^2 = 1 - \sum_e S_e^2 -
        \sum_e Var(N_e) / m^2$ follows $c_p$; for multinomial resampling it is Lee and Whiteley's $m / (m - 1)$.
        """
        shares, count = self.shares(weights), index.shape[0]
        before = 1.0 - jnp.sum(shares**2)
        lost = jnp.sum(_variances(method, shares, count)) / count**2
        factor = jnp.where(before > lost, before / jnp.where(before > lost, before - lost, 1.0), jnp.inf)
        return Lineage(jnp.repeat(self.eves[index], copies), self.factor * factor)


def _variances(method: Method, shares: Any, count: int) -> Any:
    """Return the variance of how many indices each Eve gets; its descendants stand side by side."""
    if method == "multinomial":
        return count * shares * (1.0 - shares)
    expected = count * shares
    if method == "systematic":
        rest = expected - jnp.floor(expected)
        return rest * (1.0 - rest)
    last = jnp.cumsum(expected)
    first = last - expected
    inside = jnp.floor(first) == jnp.floor(last)
    begin, end = jnp.ceil(first) - first, last - jnp.floor(last)  # what it has of the strata at its two ends
    return jnp.where(inside, expected * (1.0 - expected), begin * (1.0 - begin) + end * (1.0 - end))
