"""The visitors: what each way of running a model does at a site."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

from ._draw import draw
from ._errors import DistributionError, ShapeError, SupportError
from ._evaluate import Observed, Unweighed, Visit, Visitor, plain
from ._masked import Masked, expand
from ._mistakes import check_closed
from ._noise import Noise
from ._pathwise import transform
from ._sample import Site, lanes_of, rebind, with_mask
from ._support import density_in_support


def draw_site(site: Site, leaves: Any, source: Any) -> Array:
    """Draw the value of a site, all lanes at once, from pooled noise or a key."""
    if not isinstance(source, Noise):
        fixed = site.distribution([None] * site.structure.num_leaves)
        check_closed(fixed, site.address, site.where, drawn=True)
        try:
            return draw(source, site.structure, site.lanes, leaves).astype(site.dtype)
        except NotImplementedError as error:
            name = type(site.distribution(leaves)).__name__
            raise DistributionError(
                f"site {site.address!r} at {site.where}: {name} cannot be drawn from. Give its value, or use a "
                "method that only needs its density (mcmc, or a guide)."
            ) from error

    return transformed(site, leaves, source.values)


def transformed(site: Site, leaves: Any, noise: Any) -> Array:
    """Return the draw that base noise makes."""

    def one(noise: Any, leaves: Any) -> Array:
        return transform(site.distribution(leaves), noise, site.dtype)

    return lanes_of(site, one, noise, leaves=leaves)


def draw_alike(sites: list[Site], leaves: list[Any], sources: list[Any]) -> Array:
    """Draw the values of sites that differ in nothing but their numbers, along a new first axis."""
    if isinstance(sources[0], Noise):
        return jax.vmap(lambda xs, noise: transformed(sites[0], xs, noise))(leaves, Noise.stacked(sources))
    # stacked as data, since JAX's key-reuse checker takes a stack of keys for a use of each
    data = jnp.stack([jax.random.key_data(key) for key in sources])
    keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(sources[0]))
    return jax.vmap(lambda xs, key: draw_site(sites[0], xs, key))(leaves, keys)


def scored(site: Site, leaves: Any, value: Any) -> tuple[Array, Array]:
    """Return the log densities of a value from outside, and the value to go on with; see `density_in_support`."""

    def one(value: Any, leaves: Any) -> tuple[Array, Array]:
        return density_in_support(site.distribution(leaves), value, site.terms)

    return lanes_of(site, one, value, leaves=leaves)


def _generate(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Take the given value and weigh it by its density; else draw."""
    del mask
    if given is None:
        value = draw_site(site, leaves, source)
        return Visit(value, value, site.log_density(value, leaves), 0.0)
    if isinstance(given, Masked):
        own = expand(given.mask, given.value)
        value = jnp.where(own, given.value, draw_site(site, leaves, source))
        log_density, safe = scored(site, leaves, value)
        return Visit(safe, value, log_density, jnp.where(expand(given.mask, log_density), log_density, 0.0))
    value = _value(given)
    log_density, safe = scored(site, leaves, value)
    return Visit(safe, value, log_density, log_density)


def _value(given: Any) -> Any:
    return plain(given)


def _assess(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Score the given value."""
    del source, mask
    value = _value(given)
    log_density, safe = scored(site, leaves, value)
    return Visit(safe, value, log_density, log_density)


def _weigh(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Score the given value, and weigh those elements that its mask wants."""
    if not isinstance(given, Masked):
        visit = _assess(site, leaves, source, given, mask)
        return visit._replace(log_weight=0.0) if isinstance(given, Unweighed) else visit
    visit = _assess(site, leaves, source, given.value, mask)
    return visit._replace(log_weight=jnp.where(given.mask, visit.log_density, 0.0))


def _project(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """As `_weigh`, but what the program observes has no weight."""
    visit = _weigh(site, leaves, source, given, mask)
    return visit._replace(log_weight=0.0) if isinstance(given, Observed) else visit


def _record(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Score the given value and record the scores in its place."""
    visit = _assess(site, leaves, source, given, mask)
    return visit._replace(record=visit.log_density if mask is None else jnp.where(mask, visit.log_density, 0.0))


def _rebind(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Leave the choice to the enclosing program, and score it."""
    if given is not None and not isinstance(given, Masked):
        return _assess(site, leaves, source, given, mask)
    bound, operands = (site, leaves) if mask is None else with_mask(site, leaves, jnp.asarray(mask))
    value = rebind(bound, operands)
    if given is None:
        return Visit(value, value, site.log_density(value, leaves), 0.0)
    own = expand(given.mask, given.value)
    log_density, safe = scored(site, leaves, jnp.where(own, given.value, value))
    return Visit(safe, safe, log_density, jnp.where(expand(given.mask, log_density), log_density, 0.0))


def bijection_of(site: Site, leaves: Any) -> Any:
    """Return the bijection from unconstrained space onto a site's support; refuse a site that has none."""
    d = site.distribution(leaves)
    return bijection_onto(site, d.support)


def bijection_onto(site: Site, support: Any) -> Any:
    """Return the bijection from unconstrained space onto a support of a site."""
    try:
        return dist.biject_to(support)
    except NotImplementedError as error:
        name = type(site.distribution([None] * site.structure.num_leaves)).__name__
        raise SupportError(
            f"site {site.address!r} at {site.where}: {name} has no unconstrained space: no bijection from the reals onto its "
            f"support ({'which it does not give' if support is None else support}) is known. Observe it, compute it from "
            "a site with another distribution, or use importance sampling or VI."
        ) from error


class Partial(eqx.Module):
    """Unconstrained values of a partly observed site: the observed elements stay."""

    unconstrained: Array
    observed: Masked


def _constrain(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Map an unconstrained value into the support; the weight is the density in unconstrained space."""
    if isinstance(given, Observed):
        return _assess(site, leaves, source, given, mask)

    def one(unconstrained: Any, leaves: Any) -> Any:
        bijection = bijection_of(site, leaves)
        if jnp.shape(unconstrained) != bijection.inverse_shape(site.shape):
            raise ShapeError(
                f"constrain: site {site.address!r} at {site.where} has the unconstrained shape "
                f"{bijection.inverse_shape(site.shape)}, got {jnp.shape(unconstrained)} (without lanes and time)."
            )
        value = bijection(unconstrained)
        jacobian = bijection.log_abs_det_jacobian(unconstrained, value)
        batch = len(site.distribution(leaves).batch_shape)
        return value, jnp.sum(jacobian, axis=tuple(range(batch, jnp.ndim(jacobian))))

    inner = given.unconstrained if isinstance(given, Partial) else given
    value, log_jacobian = lanes_of(site, one, inner, leaves=leaves)
    if isinstance(given, Partial):
        own = given.observed
        value = jnp.where(expand(own.mask, value), own.value, value)
        log_jacobian = jnp.where(expand(own.mask, log_jacobian), 0.0, log_jacobian)
        log_density, value = scored(site, leaves, value)
        return Visit(value, value, log_density, log_density + log_jacobian)
    log_density = site.log_density(value, leaves)
    return Visit(value, value, log_density, log_density + log_jacobian)


def _unconstrain(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Map a value out of its support onto the reals; the record is the unconstrained value."""
    del source, mask
    if isinstance(given, Observed):
        return Visit(given.value, given.value, 0.0, 0.0)

    def one(value: Any, leaves: Any) -> Array:
        return bijection_of(site, leaves).inv(value)

    return Visit(given, lanes_of(site, one, given, leaves=leaves), 0.0, 0.0)


generating = Visitor(_generate, kind="generate", draw=lambda *site: draw_site(*site), draw_alike=draw_alike)
"""`simulate`, `generate`."""
assessing = Visitor(_assess, kind="assess")
"""`assess`."""
assessing_inside = Visitor(_assess, kind="assess", binds=True)
"""`vi.log_density`: an estimated density leaves its randomness to the objective."""
weighing = Visitor(_weigh, kind="weigh")
"""The log density of some elements, and of what the program observes."""
projecting = Visitor(_project, kind="project")
"""The log density of some elements alone."""
recording = Visitor(_record, kind="record")
"""The log densities of all elements, in place of the choices."""
recording_all = Visitor(_record, fixed=True, kind="record")
"""The same, also of what the program observes."""
rebinding = Visitor(_rebind, everywhere=True, kind="rebind")
"""`vi.simulate`."""
constraining = Visitor(_constrain, kind="constrain")
"""From unconstrained space into the support."""
constraining_values = Visitor(_constrain, kind="constrain", weightless=True)
"""The same, for the values alone."""
unconstraining = Visitor(_unconstrain, kind="unconstrain")
"""Out of the support into unconstrained space."""
