"""Amortised inference: one guide for all data, and the mean of a bound over a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from expectax.ppl import Posterior, Program
from expectax.vi import Objective, elbo

Bound = Callable[[Any, Any], Objective]
"""Makes an objective of a target and a guide: `vi.elbo`, or `lambda p, q: vi.iwelbo(p, q, 5)`."""


def amortised(
    posterior: Callable[[Any, Any], Posterior], guide: Callable[[Any, Any], Program], data: Any, bound: Bound = elbo
) -> Objective:
    r"""Return the mean of a bound over data: $\frac1N \sum_n L(p_\theta(\cdot \mid y_n), q_\phi(\cdot; y_n))$.

    The mean is inside the objective, so that its derivative is taken once and not example by example; the data are
    data, so that another batch of the same shape compiles nothing.

    Args:
        posterior: `posterior(params, datum)`, the target for one datum.
        guide: `guide(params, datum)`, a bound program for one datum.
        data: an array, or a pytree of arrays, with the batch as first axis.
        bound: makes an objective of a target and a guide, each a function of the parameters.

    Returns:
        An objective to maximise over `params`.

    Raises:
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Kingma and Welling 2014, Auto-encoding variational Bayes.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> from expectax.models import amortised
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(slope, y):
        ...     ex.sample("z", dist.Normal(slope * y, 0.5**0.5))
        >>> batch = amortised(lambda _, y: model().given({"y": y}), guide, jnp.array([1.0, -1.0]))
        >>> round(float(vi.estimate(batch, 0.5, jax.random.key(0)).mean), 3)  # tight: the guide is the posterior
        -1.516
    """
    return Objective(_mean, (posterior, guide, data, bound))


def _mean(posterior: Any, guide: Any, data: Any, bound: Bound, params: Any) -> Any:
    def one(datum: Any) -> Any:
        return bound(lambda params: posterior(params, datum), lambda params: guide(params, datum))(params)

    return jnp.mean(jax.vmap(one)(data))
