r"""`observe`, `factor` and `deterministic`: what a model says about data, weights and derived quantities."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import distributions as dist

from . import _jax
from ._errors import DistributionError, ShapeError, SupportError
from ._nesting import nested_program
from ._sample import bind_site, check_address


def observe(address: str, distribution: Any, value: Any) -> Array:
    r"""Fix a random choice to data inside the model: the density is multiplied by $p(\text{value}; \theta)$.

    Args:
        address: as for `sample`.
        distribution: as for `sample`, but no bound model.
        value: an array of exactly the shape `batch_shape + event_shape`; it is never broadcast.

    Returns:
        The value.

    Raises:
        ShapeError: the value does not have that shape.
        DistributionError: `distribution` is none.

    The site is no choice: it stands in no trace and takes no constraint. It counts in every `log_density` and
    `log_weight`; `predictive` draws it anew. Usually `program.given({"y": y})` is better: the model stays free.

    Source: Staton 2017; `observe` in Becker et al., PLDI 2024, section 3.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def coin(heads):
        ...     p = ex.sample("p", dist.Beta(1.0, 1.0))
        ...     ex.observe("heads", dist.Bernoulli(p), heads)
        >>> round(float(coin(1.0).assess({"p": 0.25})[0]), 4)
        -1.3863
    """
    where = _jax.caller()
    check_address(address, where)
    return _fixed(address, distribution, value, where)


def _fixed(address: str, distribution: Any, value: Any, where: str, observed: bool = True, **extras: Any) -> Array:
    """Bind a site whose value the program fixes."""
    if nested_program(distribution):
        raise ShapeError(
            f"observe {address!r} at {where}: a bound model has no single value. Condition it: "
            "sample(address, condition(program, {...}))."
        )
    if isinstance(value, dist.Distribution):
        raise DistributionError(f"observe {address!r} at {where}: write observe(address, distribution, value).")
    known = not _jax.is_traced(value)
    if known and np.asarray(value).dtype.kind == "f" and np.isnan(np.asarray(value)).any():
        raise SupportError(
            f"observe {address!r} at {where}: the value holds nan. For missing data make the site a choice and condition "
            "on ex.masked(value)."
        )
    value = as_array(value, f"observe {address!r} at {where}")
    if isinstance(distribution, dist.Distribution):
        expected = tuple(distribution.batch_shape) + tuple(distribution.event_shape)
        if value.shape != expected:
            raise ShapeError(
                f"observe {address!r} at {where}: the distribution has shape {expected} but the value has shape "
                f"{value.shape}. Give them one shape (dist.expand, or jax.vmap around the site)."
            )
    return bind_site(address, distribution, where, value=value, observed=observed, **extras)


def as_array(value: Any, what: str) -> Array:
    """Return numbers as an array; refuse what is none."""
    if not _jax.is_traced(value):
        dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
        numeric = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
        if not numeric:
            raise TypeError(f"{what}: expected numbers, got {type(value).__name__} {value!r}.")
    return jnp.asarray(value)


def factor(address: str, log_weight: Any) -> None:
    r"""Multiply the trace's density by $e^{w}$.

    Args:
        address: as for `sample`.
        log_weight: $w$, a scalar or an array whose elements are added.

    Raises:
        AddressError: when the model runs: the address is used twice.

    It counts in every `log_density` and `log_weight` (`score` in Becker et al., PLDI 2024; `factor` in NumPyro).

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def tilted():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     ex.factor("tilt", 2.0 * x)
        >>> plain = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
        >>> float(tilted().assess({"x": 1.5})[0] - plain().assess({"x": 1.5})[0])
        3.0
    """
    where = _jax.caller()
    check_address(address, where)
    weight = as_array(log_weight, f"factor {address!r} at {where}").astype(jnp.result_type(float))
    bind_site(address, dist.Unit(weight), where, value=jnp.zeros((*weight.shape, 0)), observed=False)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The static part of a deterministic value; `shape` and `dtype` are those of one lane's."""

    address: str
    sizes: tuple[int, ...]  # of the lanes, outermost first
    shape: tuple[int, ...]
    dtype: Any
    where: str = dataclasses.field(default="unknown", compare=False)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the value: lanes (outermost first), then its own."""
        return self.sizes + self.shape

    @property
    def element_shape(self) -> tuple[int, ...]:
        """The same: a deterministic value has no events."""
        return self.value_shape


def deterministic(address: str, value: Any) -> Any:
    """Record a derived quantity of the model under an address.

    Args:
        address: as for `sample`.
        value: an array or a number.

    Returns:
        The value, unchanged.

    Recorded values stand in `trace.deterministic` and in the result of `predictive`, with the same leading axes
    (scan steps, lanes) as a choice would have. They have no density.

    Raises:
        AddressError: the address is malformed or used twice.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def scale():
        ...     log_scale = ex.sample("log_scale", dist.Normal(0.0, 1.0))
        ...     ex.deterministic("scale", jax.numpy.exp(log_scale))
        >>> sorted(scale().simulate(jax.random.key(0)).deterministic)
        ['scale']
    """
    where = _jax.caller()
    check_address(address, where)
    value = as_array(value, f"deterministic {address!r} at {where}")
    return deterministic_p.bind(value, site=Recorded(address, (), value.shape, value.dtype, where))


def _abstract(value: Any, *, site: Recorded) -> Any:
    del site
    return _jax.ShapedArray(value.shape, value.dtype)


def _batch(axis: Any, args: Any, dims: Any, *, site: Recorded) -> Any:
    (value,), (dim,) = args, dims
    wider = dataclasses.replace(site, sizes=(axis.size, *site.sizes))
    return deterministic_p.bind(_jax.to_front(value, dim, axis.size), site=wider), 0


def _identity(value: Any, *, site: Recorded) -> Any:
    del site
    return value


def _jvp(primals: Any, tangents: Any, *, site: Recorded) -> Any:
    return deterministic_p.bind(*primals, site=site), tangents[0]


deterministic_p = _jax.define_primitive(
    "deterministic",
    abstract=_abstract,
    batch=_batch,
    implementation=_identity,
    lowering=_jax.lower_as(_identity),
    jvp=_jvp,
    site=True,
)
