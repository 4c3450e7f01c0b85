r"""Distributions of a user's own: from a sampler and a log density, or from any object that has both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from ._differentiable import differentiable as differentiable_sampler
from ._errors import DistributionError


def distribution(
    sampler: Callable[..., Any],
    log_density: Callable[..., Any],
    *,
    support: Any = constraints.real,
    differentiable: bool | None = None,
) -> Callable[..., dist.Distribution]:
    r"""Make a distribution of one event from a sampler and a log density.

    Args:
        sampler: `sampler(key, *parameters)` returns one draw, of any shape.
        log_density: `log_density(value, *parameters)` returns a scalar, $\log p(x; \theta)$.
        support: a constraint of `numpyro.distributions.constraints`; each number of the value lies in it.
        differentiable: whether the sampler may be differentiated in all its parameters (`vi.Reparam`). By default this
            is read off its equations: False where a parameter meets a comparison, a rounding or an unbounded loop.

    Returns:
        A constructor: `constructor(*parameters)` is a distribution to `sample` from. Parameters are arrays or pytrees;
        for independent copies use `jax.vmap` around the site.

    Raises:
        DistributionError: when a site uses it and the log density is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> Triangle = ex.distribution(
        ...     lambda key, width: width * (jax.random.uniform(key, (2,)).sum() - 1.0),
        ...     lambda x, width: jnp.log(jnp.maximum(1.0 - jnp.abs(x / width), 0.0) / width),
        ... )
        >>> triangle = ex.model(lambda: ex.sample("x", Triangle(2.0)))
        >>> round(float(triangle().assess({"x": 0.0})[0]), 4)
        -0.6931
    """

    def constructor(*parameters: Any) -> dist.Distribution:
        return UserDistribution(sampler, log_density, support, parameters, differentiable)

    return constructor


class UserDistribution(dist.Distribution):
    """One event with a given sampler and log density; see `distribution`."""

    pytree_data_fields = ("parameters",)
    pytree_aux_fields = ("sampler", "density", "constraint", "static", "smooth")

    def __init__(self, sampler: Any, density: Any, support: Any, parameters: Any, smooth: bool | None = None):
        """Keep the functions, and the parameters as arrays and the rest."""
        as_array = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, parameters)
        self.parameters, rest = eqx.partition(as_array, eqx.is_array)
        leaves, structure = jax.tree.flatten(rest)
        self.sampler, self.density, self.constraint, self.static = sampler, density, support, (tuple(leaves), structure)
        key = jax.eval_shape(lambda: jax.random.key(0))
        draw = lambda key, arrays: jnp.asarray(sampler(key, *eqx.combine(arrays, rest)))  # noqa: E731
        one = jax.eval_shape(draw, key, self.parameters)
        self.smooth = differentiable_sampler(draw, self.parameters) if smooth is None else smooth
        super().__init__(batch_shape=(), event_shape=one.shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the sampler may be differentiated."""
        return self.smooth

    @property
    def support(self) -> Any:
        """The set of possible values."""
        event = len(self.event_shape)
        return constraints.independent(self.constraint, event) if event else self.constraint

    def _parameters(self) -> Any:
        return eqx.combine(self.parameters, jax.tree.unflatten(self.static[1], self.static[0]))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw values of shape `sample_shape + event`."""
        parameters = self._parameters()
        if not sample_shape:
            return jnp.asarray(self.sampler(key, *parameters))
        keys = jax.random.split(key, sample_shape)
        draw = lambda key: jnp.asarray(self.sampler(key, *parameters))  # noqa: E731
        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(keys)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Return the log density of each event."""
        del intermediates

        def one(value: Any) -> Any:
            density = jnp.asarray(self.density(value, *self._parameters()))
            if density.shape != ():
                raise DistributionError(
                    f"log_density of {getattr(self.density, '__name__', self.density)!r} returned the shape "
                    f"{density.shape} for one event of shape {self.event_shape}; it must return a scalar: sum over it."
                )
            return density

        for _ in range(jnp.ndim(value) - len(self.event_shape)):
            one = jax.vmap(one)
        return one(value)


def _sample_object(key: Any, thing: Any) -> Any:
    return thing.sample(key)


def _object_density(value: Any, thing: Any) -> Any:
    return thing.log_prob(value) if hasattr(thing, "log_prob") else thing.log_density(value)


def as_distribution(value: Any, address: str, where: str) -> dist.Distribution:
    """Return a numpyro distribution: the value itself, or an object with `sample(key)` and `log_prob(value)`."""
    if isinstance(value, dist.Distribution):
        return value
    has_density = hasattr(value, "log_prob") or hasattr(value, "log_density")
    if not isinstance(value, type) and hasattr(value, "sample") and has_density:
        smooth = getattr(value, "has_rsample", None)
        if type(value).__module__.startswith("flowjax."):  # bijections of smooth noise, with comparisons inside
            smooth = True
        support = getattr(value, "support", constraints.real)
        return UserDistribution(_sample_object, _object_density, support, (value,), smooth)
    raise DistributionError(
        f"site {address!r} at {where}: expected a numpyro distribution, an object with sample(key) and "
        f"log_prob(value), or a bound model, got {type(value).__name__}. Write sample({address!r}, dist.Normal(...)) "
        f"or sample({address!r}, submodel(arguments))."
    )
