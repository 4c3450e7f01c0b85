r"""Values of which only some elements are given: missing data, and constraints on single lanes or time steps."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import _jax


class Masked(eqx.Module):
    """A value that counts only where its mask is set. Example: see `masked`.

    Attributes:
        value: an array of the site's shape; what stands where the mask is not set does not matter.
        mask: which elements are given: the axes of the value without those of the event, or some of the first of them.
        missing: flat positions of the elements that are not given, known where the mask was: they become latents.
    """

    value: Any
    mask: Any
    missing: Any = None


def masked(value: Any, mask: Any = None) -> Masked:
    r"""Give a site's value where a mask is set, and leave the rest open: missing data.

    `program.given({"y": masked(y)})` takes the elements of `y` that are not nan as data; the others are latents, in one
    array of the missing elements. `generate` and `update` draw them, or keep them.

    Args:
        value: an array of the site's shape.
        mask: booleans, True where the value is given; over the site's elements (time, lanes, batch) or their first
            axes. By default: where the value is not nan.

    Returns:
        A `Masked`, to stand in a nested dict of constraints or observations.

    Raises:
        ShapeError: when it is used, if the shapes do not fit the site.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> model = ex.model(lambda: ex.sample("y", dist.Normal(jnp.zeros(3), 1.0)))
        >>> posterior = model().given({"y": ex.masked(jnp.array([0.5, jnp.nan, 1.5]))})
        >>> posterior.latent_shapes["y"].shape
        (1,)
    """
    value = value if _jax.is_traced(value) else np.asarray(value)
    if mask is None:
        inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        mask = ~jnp.isnan(value) if inexact else np.ones(np.shape(value), bool)
    return Masked(value, mask if _jax.is_traced(mask) else np.asarray(mask, bool))


class At(eqx.Module):
    """A constraint on some elements by their index; Example: see `at`."""

    index: Any
    value: Any


def at(index: Any, value: Any) -> At:
    """Give some elements of a site by their index: lanes, time steps or batch elements.

    Args:
        index: what stands in brackets: an integer, a slice, an integer or boolean array, or a tuple of these. Axes are
            those of the site's choice: time first, then lanes, then the distribution's own.
        value: the values there, of the shape of `choice[index]`.

    Returns:
        A constraint, to stand in a nested dict.

    Raises:
        ShapeError: when it is used, if the index or the values do not fit the site. An index that is being traced and
            turns out to be out of range makes the density nan, or that of a discrete site zero.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> model = ex.model(lambda: ex.sample("y", dist.Normal(jnp.zeros(3), 1.0)))
        >>> trace, _ = model().generate(jax.random.key(0), {"y": ex.at(1, 9.0)})
        >>> float(trace["y"][1])
        9.0
    """
    return At(index, value)


def is_leaf(value: Any) -> bool:
    """Tell whether a value stands for one site in a dict of constraints."""
    return isinstance(value, (Masked, At))


def expand(mask: Any, value: Any) -> Any:
    """Return a mask with trailing axes of size 1, to stand beside a value."""
    return jnp.reshape(mask, jnp.shape(mask) + (1,) * (jnp.ndim(value) - jnp.ndim(mask)))


def over_base(top: Any, base: Any) -> Any:
    """Return a constraint that falls back on another where it is open; either may be None."""
    if base is None or not isinstance(top, Masked):
        return base if top is None else top
    if not isinstance(base, Masked):
        return jnp.where(expand(top.mask, top.value), top.value, base)
    rank = max(jnp.ndim(top.mask), jnp.ndim(base.mask))
    both = [jnp.reshape(m.mask, jnp.shape(m.mask) + (1,) * (rank - jnp.ndim(m.mask))) for m in (top, base)]
    return Masked(jnp.where(expand(top.mask, top.value), top.value, base.value), both[0] | both[1])


def pick(value: Array, missing: Array, shape: tuple[int, ...], elements: int) -> Array:
    """Return the missing elements, `(..., number, *event)`, of a value `(..., *shape)`; `elements` axes are elements."""
    batch = jnp.ndim(value) - len(shape)
    sizes = jnp.shape(value)
    flat = jnp.reshape(value, (*sizes[:batch], -1, *sizes[batch + elements :]))
    return jnp.take(flat, missing, axis=batch)


def fill(given: Masked, latents: Array, shape: tuple[int, ...], elements: int) -> Array:
    """Return the whole value: the given elements, and the missing ones from `latents` of shape `(number, *event)`."""
    flat = jnp.reshape(given.value, (-1, *shape[elements:]))
    return jnp.reshape(flat.at[given.missing].set(latents), shape)


def positions(mask: Any) -> jax.Array | None:
    """Return the flat positions where a known mask is not set; None where it is traced."""
    return None if _jax.is_traced(mask) else jnp.asarray(np.flatnonzero(~np.asarray(mask)))
