r"""Changing a trace: `update`, `regenerate`, `project` (Cusumano-Towner et al., PLDI 2019).

Every old value is offered to the new run as far as it was present in the old one and is not changed; the interpreter
draws what is left. With $K$ the elements that are kept, the weights come out of two sums over $K$.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from . import _jax
from ._choices import check_values
from ._evaluate import Outcome, Visitor
from ._masked import Masked, over_base
from ._nested import Choices, leaves_of, nested
from ._selection import chosen_by
from ._staging import Staged, scalar, stage
from ._visitors import generating, projecting, weighing

if TYPE_CHECKING:
    from ._program import Program
    from ._trace import Trace


def update(trace: Trace, key: Any, constraints: Choices, program: Program) -> tuple[Staged, Outcome, Any, Choices]:
    """Walk the program with the old values where they fit; see `Trace.update`."""
    staged = stage(program)
    given = dict(leaves_of(check_values(staged.table, constraints, "update", _jax.caller())))
    old = _kept(trace, staged)
    offered = {path: over_base(given.get(path), old.get(path)) for path in given | old}
    outcome = staged.run(generating, key, nested(offered.items()))
    return staged, outcome, scalar(outcome.log_weight) - trace.log_density, _discarded(trace, given, old, outcome)


def _kept(trace: Trace, staged: Staged) -> dict[str, Any]:
    """Return the old values that have a place in a program: masked where not all of them were present."""
    sites = dict(leaves_of(staged.sites))
    present = dict(leaves_of(trace.present))
    return {
        path: Masked(value, present[path]) if path in present else value
        for path, value in leaves_of(trace.choices)
        if path in sites and jnp.shape(value) == sites[path].shape
    }


def _discarded(trace: Trace, given: dict[str, Any], kept: dict[str, Any], outcome: Outcome) -> Choices:
    """Return the old values that were replaced, or whose place is gone."""
    before, after = dict(leaves_of(trace.present)), dict(leaves_of(outcome.present))
    discard: dict[str, Any] = {}
    for path, value in leaves_of(trace.choices):
        gone = None  # which elements were dropped: None stands for all
        if path in kept:
            replaced = given[path].mask if isinstance(given.get(path), Masked) else path in given
            if replaced is False and path not in before:
                continue
            dropped = ~after[path] if path in after else False
            gone = None if replaced is True else replaced | dropped
        if path in before:
            gone = before[path] if gone is None else before[path] & gone
        discard[path] = value if gone is None else Masked(value, gone)
    return nested(discard.items())


def regenerate(trace: Trace, key: Any, selection: Any) -> tuple[Staged, Outcome, Any]:
    """Walk the program with the selected elements drawn anew; see `Trace.regenerate`."""
    staged = stage(trace.program)
    chosen = chosen_by(selection, staged.sites, "regenerate")
    offered = {}
    for path, value in _kept(trace, staged).items():
        if chosen[path] is False:
            offered[path] = value
        elif chosen[path] is not True:
            rest = jnp.asarray(~chosen[path])
            offered[path] = Masked(value.value, value.mask & rest) if isinstance(value, Masked) else Masked(value, rest)
    outcome = staged.run(generating, key, nested(offered.items()))
    after = dict(leaves_of(outcome.present))
    kept_in_both = {
        path: _and(value.mask if isinstance(value, Masked) else True, after.get(path, True))
        for path, value in offered.items()
    }
    return staged, outcome, scalar(outcome.log_weight) - _weight(trace, staged, kept_in_both, weighing)


def _and(a: Any, b: Any) -> Any:
    return b if a is True else a if b is True else a & b


def project(trace: Trace, selection: Any) -> Any:
    """See `Trace.project`."""
    staged = stage(trace.program)
    return _weight(trace, staged, chosen_by(selection, staged.sites, "project"), projecting)


def _weight(trace: Trace, staged: Staged, wanted: dict[str, Any], visitor: Visitor) -> Any:
    """Return the sum of the log densities of the wanted elements of a trace."""
    sites = dict(leaves_of(staged.sites))
    given = {}
    for path, value in leaves_of(trace.choices):
        mask = wanted.get(path, False)
        if mask is not True:
            library = jnp if _jax.is_traced(mask) else np  # what is known stays known under jit
            mask = library.broadcast_to(library.asarray(mask), sites[path].elements)
            value = Masked(value, mask)
        given[path] = value
    return scalar(staged.run(visitor, None, nested(given.items())).log_weight)
