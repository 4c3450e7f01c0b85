"""`sample`: a random choice in a model, as a JAX primitive.

The primitive carries the address, the distribution's structure and the enclosing vmaps. It has no derivative and no
lowering: a site that an interpreter missed can never become a silent wrong number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import distributions as dist

from . import _jax
from ._custom import as_distribution
from ._distribution import Lane, align, draw_type, flatten, lane_shape, over, rebuild
from ._errors import AddressError, ControlFlowError, DistributionError, OutsideModelError, ShapeError
from ._log_prob import log_prob
from ._mistakes import check_closed
from ._nesting import nested_program
from ._support import known_support


@dataclasses.dataclass(frozen=True)
class Site:
    """The static part of a sample site; `shape` and `dtype` are those of one lane's value.

    Its operands are the distribution's leaves and then one each for `extras`: a `"value"` that is fixed by the
    program, a `"mask"` and a `"scale"` of the log density, and the `"baseline"` of its gradient strategy, all three of
    the batch shape or scalar.
    """

    address: str
    structure: Any
    lanes: tuple[Lane, ...]
    shape: tuple[int, ...]
    dtype: Any
    gradient: Any = None
    extras: tuple[str, ...] = ()
    observed: bool = True  # of a site with a value: is it data, which a prediction forgets?
    where: str = dataclasses.field(default="unknown", compare=False)
    support: Any = dataclasses.field(default=None, compare=False)  # None where it depends on traced parameters

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of the site's choice: lanes (outermost first), batch, event."""
        return lane_shape(self.lanes) + self.shape

    @property
    def bare(self) -> Site:
        """The site without extras; a baseline that is an operand stays `"operand"` in its strategy."""
        count = self.structure.num_leaves
        lanes = tuple(Lane(lane.size, lane.dims[:count]) for lane in self.lanes)
        return dataclasses.replace(self, lanes=lanes, extras=())

    @property
    def fixed(self) -> bool:
        """Whether the program fixes the value, so that the site is no choice."""
        return "value" in self.extras

    @property
    def event_ndim(self) -> int:
        """How many trailing axes of the value are one event."""
        return self.distribution([None] * self.structure.num_leaves).event_dim

    @property
    def element_shape(self) -> tuple[int, ...]:
        """The shape of the site's independent elements: lanes and batch."""
        return self.value_shape[: len(self.value_shape) - self.event_ndim]

    def distribution(self, leaves: Any) -> dist.Distribution:
        """Return the distribution of one lane, for leaves of one lane."""
        return rebuild(self.structure, leaves)

    def log_density(self, value: Any, leaves: Any) -> Array:
        """Return the log density of the value's elements, shape `lanes + batch`."""
        return over(self.lanes, lambda v, xs: self.terms(self.distribution(xs), v))(value, list(leaves))

    def terms(self, d: dist.Distribution, value: Any) -> Array:
        """Return `d.log_prob(value)`, which must have the batch shape of `d`."""
        try:
            terms = jnp.asarray(log_prob(d, value))
        except DistributionError as error:
            raise DistributionError(f"site {self.address!r} at {self.where}: {error}") from error
        if jnp.shape(terms) != tuple(d.batch_shape):
            raise ShapeError(
                f"site {self.address!r} at {self.where}: log_prob of {type(d).__name__} at a value of shape "
                f"{jnp.shape(value)} has shape {jnp.shape(terms)}, not the batch shape {tuple(d.batch_shape)}. "
                "Mend the distribution's log_prob."
            )
        if jnp.issubdtype(terms.dtype, jnp.complexfloating):
            raise DistributionError(
                f"site {self.address!r} at {self.where}: the log density is complex ({terms.dtype})."
            )
        return terms

    def split(self, operands: Any) -> tuple[Site, list[Any], dict[str, Array]]:
        """Return the site without extras, its leaves, and the extras with all lanes in front."""
        if not self.extras:
            return self, list(operands), {}
        count, site = self.structure.num_leaves, self.bare
        aligned = dict(zip(self.extras, align(self.lanes, operands)[count:], strict=True))
        extras = {name: self._spread(name, x) for name, x in aligned.items()}
        if "baseline" in extras:
            strategy = dataclasses.replace(self.gradient, baseline=extras.pop("baseline"))
            site = dataclasses.replace(site, gradient=strategy)
        return site, list(operands[:count]), extras

    def _spread(self, name: str, x: Array) -> Array:
        """Return an extra with the axes of the value, or of the elements, of size 1 where it is constant."""
        if name == "value":
            return jnp.broadcast_to(x, self.value_shape)
        return along_elements(x, len(self.element_shape), len(self.lanes))


def along_elements(x: Array, ndim: int, lanes: int = 0) -> Array:
    """Return an array with `ndim` axes: after its first `lanes` axes it is either complete or scalar."""
    return x if jnp.ndim(x) == ndim else jnp.reshape(x, jnp.shape(x)[:lanes] + (1,) * (ndim - lanes))


def sample(address: str, distribution: Any, *, gradient: Any = None) -> Any:
    r"""Make a random choice at an address of the enclosing model.

    Args:
        address: a non-empty string without `/`, unique within its model (or nested model).
        distribution: a `numpyro` distribution, whose log density is summed over its batch shape; or a bound model
            (`submodel(args)`), whose choices are then nested under the address.
        gradient: the gradient strategy for this site in an objective (`vi.Reparam()`, `vi.Reinforce()`, `vi.Enum()`,
            ...); by default the best one that the distribution allows. It never changes the distribution.

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
    return bind_site(address, distribution, where, gradient=gradient)


def bind_site(
    address: str,
    distribution: Any,
    where: str,
    *,
    gradient: Any = None,
    value: Any = None,
    mask: Any = None,
    scale: Any = None,
    baseline: Any = None,
    observed: bool = True,
) -> Array:
    """Bind the primitive of one site; `value`, `mask`, `scale` and `baseline` are optional operands."""
    if baseline is None:
        gradient, baseline = apart(gradient)
    d = as_distribution(distribution, address, where)
    leaves, structure = flatten(d)
    check_closed(rebuild(structure, [None] * structure.num_leaves), address, where)
    one = draw_type(structure, leaves)
    if one.shape != tuple(d.shape()):
        raise DistributionError(
            f"site {address!r} at {where}: a draw of {type(d).__name__} has shape {one.shape}, not batch_shape + event_shape "
            f"= {tuple(d.shape())}. Mend the distribution's sample."
        )
    given = {"value": value, "mask": mask, "scale": scale, "baseline": baseline}
    extras = {name: jnp.asarray(x) for name, x in given.items() if x is not None}
    site = Site(
        address,
        structure,
        (),
        one.shape,
        jnp.result_type(float) if getattr(gradient, "relaxed", False) else jnp.dtype(one.dtype),
        gradient,
        tuple(extras),
        observed,
        where,
        known_support(d),
    )
    for name in ("mask", "scale", "baseline"):
        if name in extras and extras[name].shape not in ((), tuple(d.batch_shape)):
            raise ShapeError(
                f"site {address!r} at {where}: a {name} has the batch shape {tuple(d.batch_shape)} or is scalar, got "
                f"{extras[name].shape}."
            )
    return sample_p.bind(*leaves, *extras.values(), site=site)


def check_address(address: Any, where: str) -> None:
    """Refuse an address that is not a non-empty string without a slash."""
    if not isinstance(address, str) or not address or "/" in address:
        raise AddressError(f"address {address!r} at {where}: an address is a non-empty string without '/'.")


def rebind(site: Site, operands: Any) -> Array:
    """Leave the site to the program that encloses the present one."""
    if apart(site.gradient)[1] is not None:
        site, operands = _with_extras(site, operands, {})
    return sample_p.bind(*operands, site=site)


def with_mask(site: Site, operands: Any, mask: Array) -> tuple[Site, list[Any]]:
    """Return the site and its operands with one more mask, whose axes are the site's outermost lanes."""
    bare, leaves, extras = site.split(operands)
    mask = jnp.reshape(mask, jnp.shape(mask) + (1,) * (len(bare.element_shape) - jnp.ndim(mask)))
    extras["mask"] = mask & extras["mask"] if "mask" in extras else mask
    return _with_extras(bare, leaves, extras)


def _with_extras(bare: Site, leaves: Any, extras: dict[str, Array]) -> tuple[Site, list[Any]]:
    """Put extras, with all lanes in front, among the operands of a site that has none."""
    strategy, baseline = apart(bare.gradient)
    extras = extras if baseline is None else {**extras, "baseline": baseline}
    shapes = {name: bare.value_shape if name == "value" else bare.element_shape for name in extras}
    whole = [jnp.broadcast_to(x, shapes[name]) for name, x in extras.items()]
    lanes = tuple(Lane(lane.size, (*lane.dims, *(0 for _ in whole))) for lane in bare.lanes)
    site = dataclasses.replace(bare, lanes=lanes, extras=tuple(extras), gradient=strategy)
    return site, [*leaves, *whole]


def apart(strategy: Any) -> tuple[Any, Array | None]:
    """Take an array that a strategy has for a baseline out of it: sites are static, arrays are operands."""
    baseline = getattr(strategy, "baseline", None)
    if not isinstance(baseline, (jax.Array, np.ndarray)):
        return strategy, None
    return dataclasses.replace(strategy, baseline="operand"), jnp.asarray(baseline)


def _abstract(*_: Any, site: Site) -> Any:
    return _jax.ShapedArray(site.value_shape, site.dtype)


def _batch(axis: Any, args: Any, dims: Any, *, site: Site) -> tuple[Any, int]:
    lane = Lane(axis.size, tuple(dims))  # called for every vmap, mapped operands or not
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
    "sample", abstract=_abstract, batch=_batch, implementation=_outside, lowering=_lowering, jvp=_jvp, site=True
)


def lanes_of(site: Site, function: Any, *mapped: Any, leaves: Any) -> Any:
    """Apply `function(*values of one lane, leaves of one lane)` in every lane of a site."""
    return over(site.lanes, function, len(mapped))(*mapped, list(leaves))
