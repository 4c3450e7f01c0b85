r"""Programs made of programs: `condition`, `do`, `substitute`, `mask`, `scale`, `rename`, `scope`, `block`, subsampling.

Each returns a program with the same return value and the same control flow, whose sites are changed. All of them are
pure: the program that they take stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import _jax
from ._choices import check_values
from ._errors import AddressError, ShapeError, nearest
from ._masked import Masked
from ._nested import Choices, leaves_of, nested
from ._observe import as_array, deterministic
from ._program import Program, bound_program, model
from ._rewrite import Place, rewritten
from ._sample import check_address, sample
from ._selection import Selection, chosen_by, select
from ._staging import stage


def _values(program: Program, values: Choices, name: str) -> Choices:
    given = check_values(stage(bound_program(program, name)).table, values, name, _jax.caller())
    for path, value in leaves_of(given):
        if isinstance(value, Masked):
            raise ShapeError(
                f"{name} at {_jax.caller()}: site {path!r} takes a whole value; for missing data write "
                "program.given({...: ex.masked(...)})."
            )
    return given


def condition(program: Program, observations: Choices) -> Program:
    r"""Fix choices to data: the new program's density is $p(z, y)$ over the other choices $z$ alone.

    Args:
        program: a bound program.
        observations: nested dict of values.

    Returns:
        A program in which these sites are observed, as by `observe`; `predictive` draws them anew.

    Raises:
        AddressError, ShapeError, SupportError: a value does not fit the program.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def pair():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     return ex.sample("y", dist.Normal(x, 1.0))
        >>> conditioned = ex.condition(pair(), {"y": 1.0})
        >>> bool(conditioned.assess({"x": 0.5})[0] == pair().assess({"x": 0.5, "y": 1.0})[0])
        True
    """
    return _condition(program, _values(program, observations, "condition"), True)


@model
def _condition(program: Program, data: Choices, observed: bool) -> Any:
    def rule(place: Place) -> Any:
        return place.bind() if place.data is None else place.bind(value=place.data, observed=observed)

    return rewritten(program, rule, data)


def substitute(program: Program, values: Choices) -> Program:
    """Fix choices to values that are no data: as `condition`, but `predictive` keeps them.

    Args:
        program: a bound program.
        values: nested dict of values.

    Raises:
        AddressError, ShapeError, SupportError: a value does not fit the program.

    Example: see `condition`.
    """
    return _condition(program, _values(program, values, "substitute"), False)


def do(program: Program, interventions: Choices) -> Program:
    r"""Set variables from outside: the sites no longer depend on their causes and have no density (Pearl 2009).

    Args:
        program: a bound program.
        interventions: nested dict of values.

    Returns:
        A program without these choices; their values are recorded as deterministic.

    Raises:
        AddressError, ShapeError, SupportError: a value does not fit the program.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def pair():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     return ex.sample("y", dist.Normal(x, 1.0))
        >>> round(float(ex.do(pair(), {"x": 3.0}).assess({"y": 3.0})[0]), 4)
        -0.9189
    """
    return _do(program, _values(program, interventions, "do"))


@model
def _do(program: Program, data: Choices) -> Any:
    def rule(place: Place) -> Any:
        return place.bind() if place.data is None else deterministic(place.address, place.data)

    return rewritten(program, rule, data)


def mask(program: Program, mask: Any, selection: Selection | str | None = None) -> Program:
    r"""Let only some elements of sites count: the others have no density, weight nothing, and take no constraint.

    Args:
        program: a bound program.
        mask: booleans, a scalar or over the first axes of every selected site's elements (time, lanes, batch).
        selection: which sites; all, if None. What the program observes is addressed like a choice.

    Returns:
        A program; `trace.present` tells what counts.

    Raises:
        AddressError: the selection is unknown.
        ShapeError: the mask does not fit a site.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> three = ex.model(lambda: ex.sample("y", dist.Normal(jnp.zeros(3), 1.0)))
        >>> masked = ex.mask(three(), jnp.array([True, False, False]), "y")
        >>> round(float(masked.assess({"y": jnp.array([0.0, 9.0, 9.0])})[0]), 4)
        -0.9189
    """
    return _mask(program, _spread(program, _booleans(mask, "mask"), selection, "mask"))


def _booleans(flags: Any, name: str) -> Any:
    dtype = flags.dtype if hasattr(flags, "dtype") else np.asarray(flags).dtype
    if not np.issubdtype(dtype, np.bool_):
        raise TypeError(f"{name} at {_jax.caller()}: a mask is made of booleans, got {flags!r}.")
    return jnp.asarray(flags)


@model
def _mask(program: Program, data: Choices) -> Any:
    def rule(place: Place) -> Any:
        if place.data is None:
            return place.bind()
        own = place.extras.get("mask")
        return place.bind(mask=place.data if own is None else place.data & own)

    return rewritten(program, rule, data)


def scale(program: Program, factor: Any, selection: Selection | str | None = None) -> Program:
    r"""Multiply the log density of sites by a factor: $\log p \to s \log p$.

    Args:
        program: a bound program.
        factor: $s$, a scalar or numbers over the first axes of every selected site's elements.
        selection: which sites; all, if None.

    Raises:
        AddressError: the selection is unknown.
        ShapeError: the factor does not fit a site.
        TypeError: the factor is no number or array of numbers.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> normal = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
        >>> round(float(ex.scale(normal(), 2.0).assess({"x": 0.0})[0]), 4)
        -1.8379
    """
    number = as_array(factor, f"scale at {_jax.caller()}: the argument factor")
    return _scale(program, _spread(program, number.astype(jnp.result_type(float)), selection, "scale"))


@model
def _scale(program: Program, data: Choices) -> Any:
    def rule(place: Place) -> Any:
        if place.data is None:
            return place.bind()
        return place.bind(scale=place.data * place.extras.get("scale", 1.0))

    return rewritten(program, rule, data)


def _spread(program: Program, value: Any, selection: Any, name: str) -> Choices:
    """Return for each selected site the value over all its elements."""
    table = stage(bound_program(program, name)).table
    sites = {path: e for path, e in leaves_of(table) if e.kind != "deterministic"}
    chosen = chosen_by(~select() if selection is None else selection, nested(sites.items()), name)
    data = {}
    for path, wanted in chosen.items():
        if wanted is False:
            continue
        elements = sites[path].elements
        if wanted is not True:
            raise AddressError(f"{name} at {_jax.caller()}: give the {name} itself an array instead of an index.")
        if value.shape != elements[: value.ndim]:
            raise ShapeError(
                f"{name} at {_jax.caller()}: site {path!r} has elements of shape {elements}, whose first axes do not "
                f"have the shape {value.shape} (site at {sites[path].site.where})."
            )
        padded = jnp.reshape(value, value.shape + (1,) * (len(elements) - value.ndim))
        data[path] = jnp.broadcast_to(padded, elements)
    return nested(data.items())


def with_data_subsample(program: Program, selection: Any, total: int, *, valid: Any = None) -> Program:
    r"""Scale a program on a minibatch to the whole data set: $\frac{N}{n} \sum_{i \in B} \log p(y_i)$.

    The log density and its gradient are unbiased for the whole data set's if all batches of one size are equally likely,
    or if a batch is drawn with probability $n / N$ (a short last batch less often than the others).

    Args:
        program: a program bound to one batch.
        selection: the sites whose first axis runs over the batch (data, and latents of each datum).
        total: $N$, the size of the whole data set.
        valid: booleans of shape `(batch,)`, False for padding: a short last batch may be padded to the full size, so
            that nothing is compiled again. $n$ counts the valid ones; padding has no density.

    Raises:
        AddressError: the selection is unknown.
        ShapeError: a site has no such first axis, or batches differ in size.

    Source: Hoffman et al. 2013, Stochastic variational inference.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> batch = ex.model(lambda y: ex.observe("y", dist.Normal(jnp.zeros(y.shape), 1.0), y))
        >>> part = ex.with_data_subsample(batch(jnp.zeros(2)), "y", total=10)
        >>> bool(jnp.allclose(part.assess({})[0], batch(jnp.zeros(10)).assess({})[0]))
        True
    """
    table = stage(bound_program(program, "with_data_subsample")).table
    sites = {path: e for path, e in leaves_of(table) if e.kind != "deterministic"}
    chosen = chosen_by(selection, nested(sites.items()), "with_data_subsample")
    if any(wanted is not False and wanted is not True for wanted in chosen.values()):
        raise AddressError(f"with_data_subsample at {_jax.caller()}: select sites as a whole, not by index.")
    sizes = {path: sites[path].elements[:1] for path, wanted in chosen.items() if wanted is not False}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ShapeError(
            f"with_data_subsample at {_jax.caller()}: the selected sites must share one first axis, the batch; they have "
            f"{ {path: sites[path].elements for path in sizes} }."
        )
    ((size,),) = set(sizes.values())
    if not _jax.is_traced(total) and (total < 1 or (valid is None and total < size)):
        raise ValueError(
            f"with_data_subsample at {_jax.caller()}: total is the size of the whole data set, at least the batch's {size}, "
            f"got {total}."
        )
    if valid is None:
        return scale(program, total / size, select(*sizes))
    valid = _booleans(valid, "with_data_subsample")
    if valid.shape != (size,):
        raise ShapeError(
            f"with_data_subsample at {_jax.caller()}: valid has shape {valid.shape}, the batch has {size} data "
            f"({', '.join(map(repr, sizes))})."
        )
    masked = mask(program, valid, select(*sizes))
    return scale(masked, total / jnp.maximum(jnp.sum(valid), 1), select(*sizes))


def rename(program: Program, addresses: Mapping[str, str]) -> Program:
    """Give sites, recorded values or nested models other addresses.

    Args:
        program: a bound program.
        addresses: old path to new address: `{"x": "z", "sub/x": "z"}` renames `x`, and `x` in `sub`.

    Raises:
        AddressError: a path is unknown, a new address is malformed or taken.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> normal = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
        >>> sorted(ex.rename(normal(), {"x": "z"}).sites())
        ['z']
    """
    table = stage(bound_program(program, "rename")).table
    paths = [path for path, _ in leaves_of(table)]
    for old, new in addresses.items():
        if not isinstance(old, str):
            raise AddressError(f"rename at {_jax.caller()}: addresses are strings, got {old!r}.")
        if not any(path == old or path.startswith(f"{old}/") for path in paths):
            raise AddressError(f"rename at {_jax.caller()}: the program has no {old!r}.{nearest(old, paths)}")
        check_address(new, _jax.caller())
    renamed = _rename(program, tuple(sorted(addresses.items())))
    try:
        stage(renamed)  # an address that is taken is refused here; two branches may share one
    except AddressError as error:
        new = [old.rpartition("/")[0] + old.rpartition("/")[1] + new for old, new in addresses.items()]
        taken = [
            a for a in new if new.count(a) > 1 or a not in addresses and any(f"{p}/".startswith(f"{a}/") for p in paths)
        ]
        raise AddressError(
            f"rename at {_jax.caller()}: the new address {' or '.join(map(repr, dict.fromkeys(taken)))} is taken: it would be used twice. Choose another, "
            "or rename what has it too."
        ) from error
    return renamed


@model
def _rename(program: Program, pairs: tuple[tuple[str, str], ...]) -> Any:
    def renaming(path: str) -> str:
        return dict(pairs).get(path, path.rsplit("/", 1)[-1])

    return rewritten(program, lambda place: place.bind(address=renaming(place.path)), {}, renaming)


def scope(program: Program, address: str) -> Program:
    """Put a whole program under an address: `{"x": ...}` becomes `{"address": {"x": ...}}`.

    Args:
        program: a bound program.
        address: as for `sample`.

    Raises:
        AddressError: the address is malformed.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> normal = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
        >>> ex.scope(normal(), "left").assess({"left": {"x": 0.0}})[0].shape
        ()
    """
    check_address(address, f"scope at {_jax.caller()}")
    return _scope(bound_program(program, "scope"), address)


@model
def _scope(program: Program, address: str) -> Any:
    return sample(address, program)
