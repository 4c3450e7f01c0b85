"""The rank of a number among others, uniform in law where they are alike in law."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def rank(key: Any, value: Any, others: Any) -> Any:
    """Return how many of `others`, along their first axis, are less; ties, and what differs by rounding, are broken at random."""
    value, others = (jnp.asarray(x).astype(float) for x in (value, others))
    tied = jnp.abs(others - value) <= 256 * jnp.finfo(value.dtype).eps * (1 + jnp.abs(value))
    tied = tied | (others == value)  # infinite ones too
    less, ties = jnp.sum(~tied & (others < value), 0), jnp.sum(tied, 0)
    return less + jax.random.randint(key, jnp.shape(less), 0, ties + 1)
