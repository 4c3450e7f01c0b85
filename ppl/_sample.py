"""`sample`: a random choice in a model, as a JAX primitive.

The primitive carries the address, the distribution's structure and the enclosing vmaps. It has no derivative and no
lowering: a site that an interpreter missed can never become a silent wrong number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

from . import _jax
from ._distribution import Lane, draw_type, flatten, lane_shape, over, rebuild
from ._errors import AddressError, ControlFlowError, DistributionError, OutsideModelError, ShapeError
from ._nesting import nested_program
from ._support import known_support


@dataclasses.dataclass(frozen=True)
class Site:
    """The static part of a sample site; `shape` and `dtype` are those of one lane's value."""

    address: str
    structure: Any
    lanes: tuple[Lane, ...]
    shape: tuple[int, ...]
    dtype: Any
    gradient: Any = None
    where: str = dataclasses.field(default="unknown", compare=False)
    support: Any = dataclasses.field(default=None, compare=False)  # None where it depends on traced parameters

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the site's choice: lanes (outermost first), batch, event."""
        return lane_shape(self.lanes) + self.shape

    def distribution(self, leaves: Any) -> dist.Distribution:
        """Return the distribution of one lane, for leaves of one lane."""
        return rebuild(self.structure, leaves)

    def log_density(self, value: Any, leaves: Any) -> Array:
        """Return the log density of the value in each lane, shape `lanes`."""
        return over(self.lanes, self._log_density_one)(value, list(leaves))

    def _log_density_one(self, value: Any, leaves: Any) -> Array:
        return jnp.sum(self.terms(self.distribution(leaves), value))

    def terms(self, d: dist.Distribution, value: Any) -> Array:
        """Return `d.log_prob(value)`, which must have the batch shape of `d`."""
        terms = jnp.asarray(d.log_prob(value))
        if jnp.shape(terms) != tuple(d.batch_shape):
            raise ShapeError(
                f"site {self.address!r} at {self.where}: log_prob of {type(d).__name__} at a value of shape "
                f"{jnp.shape(value)} has shape {jnp.shape(terms)}, not the batch shape {tuple(d.batch_shape)}. "
                "Mend the distribution's log_prob."
            )
        return terms


def sample(address: str, distribution: Any, *, gradient: Any = None) -> Any:
    r"""Make a random choice at an address of the enclosing model.

    Args:
        address: a non-empty string without `/`, unique within its model (or nested model).
        distribution: a `numpyro` distribution, whose log density is summed over its batch shape; or a bound model
            (`submodel(args)`), whose choices are then nested under the address.
        gradient: the gradient strategy for this site in an objective (`vi.Reparam()`, `vi.Reinforce()`, `vi.Enum()`);
            by default the best one that the distribution allows. It never changes the distribution.

    Returns:
        The value, of shape `batch_shape + event_shape`; for a bound model, what the model returns.

    Raises:
        AddressError: the address is not such a string, or occurs twice.
        DistributionError: `distribution` is neither of the two, or cannot be drawn from.
        OutsideModelError: there is no enclosing model.

    The site contributes $\log p(x; \theta)$ to the trace's log density (Cusumano-Towner et al., PLDI 2019).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def coin():
        ...     p = ex.sample("p", dist.Beta(1.0, 1.0))
        ...     return ex.sample("heads", dist.Bernoulli(p))
        >>> sorted(coin().simulate(jax.random.key(0)).choices)
        ['heads', 'p']
    """
    where = _jax.caller()
    check_address(address, where)
    if nested_program(distribution):
        return distribution._nest(address)
    if not isinstance(distribution, dist.Distribution):
        raise DistributionError(
            f"site {address!r} at {where}: expected a numpyro distribution or a bound model, got "
            f"{type(distribution).__name__}. Write sample({address!r}, dist.Normal(...)) or "
            f"sample({address!r}, submodel(arguments))."
        )
    leaves, structure = flatten(distribution)
    one = draw_type(structure, leaves)
    support = known_support(distribution)
    site = Site(address, structure, (), one.shape, jnp.dtype(one.dtype), gradient, where, support)
    return sample_p.bind(*leaves, site=site)


def check_address(address: Any, where: str) -> None:
    """Refuse an address that is not a non-empty string without a slash."""
    if not isinstance(address, str) or not address or "/" in address:
        raise AddressError(f"address {address!r} at {where}: an address is a non-empty string without '/'.")


def rebind(site: Site, leaves: Any) -> Array:
    """Leave the site to the program that encloses the present one."""
    return sample_p.bind(*leaves, site=site)


def _abstract(*_: Any, site: Site) -> Any:
    return _jax.ShapedArray(site.value_shape, site.dtype)


def _batch(axis: Any, args: Any, dims: Any, *, site: Site) -> tuple[Any, int]:
    lane = Lane(axis.size, tuple(dims))
    return sample_p.bind(*args, site=dataclasses.replace(site, lanes=(*site.lanes, lane))), 0


def _outside(*_: Any, site: Site) -> Any:
    raise OutsideModelError(
        f"site {site.address!r} at {site.where} ran outside a model. Put it in a function decorated with "
        "@expectax.model (or @vi.objective) and call a method of the bound model, such as simulate(key)."
    )


def _lowering(_: Any, *__: Any, site: Site) -> Any:
    return _outside(site=site)


def _jvp(primals: Any, tangents: Any, *, site: Site) -> Any:
    del primals, tangents
    raise ControlFlowError(
        f"site {site.address!r} at {site.where} stands inside a derivative (jax.grad, jax.jvp, jax.hessian). A random "
        "choice has no derivative there. Differentiate a function without sites, or use vi.value_and_grad."
    )


sample_p = _jax.define_primitive(
    "sample", abstract=_abstract, batch=_batch, implementation=_outside, lowering=_lowering, jvp=_jvp
)


def _refuse_batched_cond(where: str) -> Exception:
    return ControlFlowError(
        f"at {where}: a vmap over lax.cond (or switch) whose predicate differs between lanes would score the sites "
        "of every branch, taken or not. Use jnp.where on the distribution's parameters, or put the vmap inside the "
        "branches."
    )


_jax.guard_batched_cond(sample_p, _refuse_batched_cond)


def lanes_of(site: Site, function: Any, *mapped: Any, leaves: Any) -> Any:
    """Apply `function(*values of one lane, leaves of one lane)` in every lane of a site."""
    return over(site.lanes, function, len(mapped))(*mapped, list(leaves))
