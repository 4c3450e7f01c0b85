"""The visitors: what each way of running a model does at a site."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ._draw import draw
from ._errors import DistributionError, ShapeError
from ._evaluate import Visit
from ._noise import Noise
from ._pathwise import transform
from ._sample import Site, lanes_of, rebind
from ._support import density_in_support, jacobian, transform_of


def draw_site(site: Site, leaves: Any, source: Any) -> Array:
    """Draw the value of a site, all lanes at once, from pooled noise or a key."""
    if not isinstance(source, Noise):
        try:
            return draw(source, site.structure, site.lanes, leaves)
        except NotImplementedError as error:
            name = type(site.distribution(leaves)).__name__
            raise DistributionError(
                f"site {site.address!r} at {site.where}: {name} cannot be drawn from. Give its value, or use a "
                "method that only needs its density (mcmc, or a guide)."
            ) from error

    def one(noise: Any, leaves: Any) -> Array:
        return transform(site.distribution(leaves), noise, site.dtype)

    return lanes_of(site, one, source.values, leaves=leaves)


def scored(site: Site, leaves: Any, value: Any) -> tuple[Array, Array]:
    """Return the log density of a value from outside, and the value to go on with; see `density_in_support`."""

    def one(value: Any, leaves: Any) -> tuple[Array, Array]:
        terms, safe = density_in_support(site.distribution(leaves), value, site.terms)
        return jnp.sum(terms), safe

    return lanes_of(site, one, value, leaves=leaves)


def generating(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Take the given value and weigh it by its density; else draw (`simulate`, `generate`)."""
    if given is None:
        value = draw_site(site, leaves, source)
        return Visit(value, value, site.log_density(value, leaves), 0.0)
    log_density, safe = scored(site, leaves, given)
    return Visit(safe, given, log_density, log_density)


def assessing(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Score the given value (`assess`)."""
    del source
    log_density, safe = scored(site, leaves, given)
    return Visit(safe, given, log_density, 0.0)


def recording(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Score the given value and record the score in its place."""
    del source
    log_density, safe = scored(site, leaves, given)
    return Visit(safe, log_density, log_density, 0.0)


def rebinding(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Leave the choice to the enclosing program, and score it (`vi.simulate`)."""
    del source, given
    value = rebind(site, leaves)
    return Visit(value, value, site.log_density(value, leaves), 0.0)


class Observed(eqx.Module):
    """A value that is kept as it is while the others change space."""

    value: Array


def constraining(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Map an unconstrained value into the support; the weight is the log Jacobian."""
    del source
    if isinstance(given, Observed):
        log_density, safe = scored(site, leaves, given.value)
        return Visit(safe, given.value, log_density, 0.0)

    def one(unconstrained: Any, leaves: Any) -> Any:
        transform = transform_of(site.distribution(leaves))
        if jnp.shape(unconstrained) != transform.inverse_shape(site.shape):
            raise ShapeError(
                f"constrain: site {site.address!r} at {site.where} has the unconstrained shape "
                f"{transform.inverse_shape(site.shape)}, got {jnp.shape(unconstrained)} (without lanes and time)."
            )
        value = transform(unconstrained)
        return value, jacobian(transform, unconstrained, value)

    value, log_jacobian = lanes_of(site, one, given, leaves=leaves)
    return Visit(value, value, site.log_density(value, leaves), log_jacobian)


def unconstraining(site: Site, leaves: Any, source: Any, given: Any) -> Visit:
    """Map a value out of its support onto the reals; the record is the unconstrained value."""
    del source
    if isinstance(given, Observed):
        return Visit(given.value, given.value, 0.0, 0.0)

    def one(value: Any, leaves: Any) -> Array:
        return transform_of(site.distribution(leaves)).inv(value)

    return Visit(given, lanes_of(site, one, given, leaves=leaves), 0.0, 0.0)
