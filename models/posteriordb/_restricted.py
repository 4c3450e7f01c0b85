"""A distribution cut down to a smaller support, as Stan's `ordered` parameters with ordinary priors are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist


class Restricted(dist.Distribution):
    r"""The density of a base distribution where a constraint holds, and zero elsewhere; it is *not* renormalised.

    The density is $p(x)\,1[x \in C]$, as Stan has it for a constrained parameter with an ordinary prior: log densities
    are those of the normalised law up to a constant, if the base has no random parameters. Draws are
    exact, by rejection.

    Args:
        base: a distribution with one event.
        constraint: the smaller support, a numpyro constraint on the same event.

    Example:
        >>> import jax
        >>> from expectax import dist
        >>> from expectax.models.posteriordb import Restricted
        >>> d = Restricted(dist.Normal(jax.numpy.zeros(3), 1.0).to_event(1), dist.constraints.ordered_vector)
        >>> x = d.sample(jax.random.key(0))
        >>> bool(x[0] < x[1] < x[2])
        True
    """

    arg_constraints = {}
    pytree_data_fields = ("base",)
    pytree_aux_fields = ("constraint",)

    def __init__(self, base: dist.Distribution, constraint: Any, *, validate_args: bool | None = None):
        """Keep the base and the constraint."""
        self.base = base
        self.constraint = constraint
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The smaller support."""
        return self.constraint

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Return the log density of the base."""
        return jnp.asarray(self.base.log_prob(value))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw from the base until every draw is in the support."""

        def again(state: Any) -> Any:
            key, value = state
            key, now = jax.random.split(key)
            outside = jnp.expand_dims(~self.constraint(value), range(-len(self.event_shape), 0))
            return key, jnp.where(outside, self.base.sample(now, sample_shape), value)

        key, now = jax.random.split(key)
        start = (key, self.base.sample(now, sample_shape))
        return jax.lax.while_loop(lambda state: ~jnp.all(self.constraint(state[1])), again, start)[1]
