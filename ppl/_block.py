"""`block`: a program without some of its sites, where nothing that remains depends on them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from . import _jax
from ._dependence import dependences
from ._errors import AddressError, ControlFlowError
from ._nested import leaves_of
from ._program import Program, bound_program, model
from ._rewrite import Place, outputs_of
from ._selection import chosen_by
from ._staging import stage


def block(program: Program, selection: Any) -> Program:
    """Leave sites out of a program: predictions, for instance, that no inference needs.

    Args:
        program: a bound program.
        selection: the sites to leave out. No other site may depend on them: the density of the rest would then be an
            integral over them (see `marginalize_discrete`).

    Returns:
        A program without these sites and without the recorded values that depend on them. Parts of the return value
        that depend on them become None.

    Raises:
        AddressError: the selection is unknown.
        ControlFlowError: another site depends on one that is left out.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def predict():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     return ex.sample("y_new", dist.Normal(x, 1.0))
        >>> sorted(ex.block(predict(), "y_new").sites())
        ['x']
    """
    staged = stage(bound_program(program, "block"))
    chosen = chosen_by(selection, staged.sites, "block")
    hidden = frozenset(path for path, wanted in chosen.items() if wanted is not False)
    if any(wanted is not False and wanted is not True for wanted in chosen.values()):
        raise AddressError(f"block at {_jax.caller()}: a site is left out as a whole, not by index.")
    known, entries = dependences(staged.jaxpr), dict(leaves_of(staged.table))
    for path, parents in known.parents.items():
        if path not in hidden and parents & hidden and entries[path].kind != "deterministic":
            raise ControlFlowError(
                f"block at {_jax.caller()}: {path!r} (at {entries[path].site.where}) depends on {sorted(parents & hidden)}, "
                "so the density without them would be an integral. Leave out what depends on them too, or sum them out "
                "with ex.marginalize_discrete."
            )
    lost = tuple(bool(paths & hidden) for paths in known.outputs)
    gone = [path for path, parents in known.parents.items() if path in hidden or parents & hidden]
    return _block(program, tuple(sorted(gone)), lost)


@model
def _block(program: Program, hidden: tuple[str, ...], lost: tuple[bool, ...]) -> Any:
    def rule(place: Place) -> Any:
        if place.path in hidden:
            return jnp.zeros(place.site.shape, place.site.dtype)  # nothing that remains depends on it
        return place.bind()

    staged, outputs = outputs_of(program, rule, {}, lambda path: None if path in hidden else path.rsplit("/", 1)[-1])
    return staged.returned([None if gone else x for gone, x in zip(lost, outputs, strict=True)])
