"""Changing a trace: `update`, `regenerate`, `project` (Cusumano-Towner et al., PLDI 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from . import _jax
from ._choices import Choices, check_values, leaves_of, nested
from ._errors import AddressError, nearest
from ._evaluate import Outcome, evaluate
from ._staging import Staged, stage
from ._visitors import generating, recording

if TYPE_CHECKING:
    from ._program import Program, Trace


def update(trace: Trace, key: Any, constraints: Choices, program: Program) -> tuple[Staged, Outcome, Any, Choices]:
    """Walk the program with the old values where they fit; see `Trace.update`."""
    staged = stage(program)
    given = dict(leaves_of(check_values(staged.sites, constraints, "update", _jax.caller())))
    sites, old = dict(leaves_of(staged.sites)), dict(leaves_of(trace.choices))
    kept = {
        path: value
        for path, value in old.items()
        if path not in given and path in sites and jnp.shape(value) == sites[path].shape
    }
    outcome = evaluate(staged.jaxpr, staged.arguments, generating, key, nested((kept | given).items()))
    discard = nested((path, value) for path, value in old.items() if path not in kept)
    return staged, outcome, outcome.log_weight - trace.log_density, discard


def regenerate(trace: Trace, key: Any, selection: Iterable[str]) -> tuple[Staged, Outcome, Any]:
    """Walk the program with the selected sites drawn anew; see `Trace.regenerate`."""
    staged = stage(trace.program)
    chosen = select(staged.sites, selection, "regenerate")
    kept = nested((path, value) for path, value in leaves_of(trace.choices) if path not in chosen)
    outcome = evaluate(staged.jaxpr, staged.arguments, generating, key, kept)
    before = _scores(trace, lambda path: path not in chosen)
    return staged, outcome, outcome.log_weight - before


def project(trace: Trace, selection: Iterable[str]) -> Any:
    """See `Trace.project`."""
    chosen = select(trace.program.sites(), selection, "project")
    return _scores(trace, lambda path: path in chosen)


def _scores(trace: Trace, wanted: Any) -> Any:
    """Return the sum of the wanted sites' log densities."""
    staged = stage(trace.program)
    recorded = evaluate(staged.jaxpr, staged.arguments, recording, given=trace.choices).choices
    terms = [jnp.sum(value) for path, value in leaves_of(recorded) if wanted(path)]
    return sum(terms, jnp.zeros((), jnp.result_type(float)))


def select(sites: Choices, selection: Iterable[str], what: str) -> set[str]:
    """Return the paths of the selected sites; an address of a nested model selects all below it."""
    if isinstance(selection, str):
        selection = [selection]
    paths = [path for path, _ in leaves_of(sites)]
    chosen: set[str] = set()
    for name in selection:
        found = {path for path in paths if path == name or path.startswith(f"{name}/")}
        if not found:
            raise AddressError(f"{what} at {_jax.caller()}: the model has no site {name!r}.{nearest(name, paths)}")
        chosen |= found
    return chosen
