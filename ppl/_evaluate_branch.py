"""Branches with sites: the taken one is run, or all of them with masks, and one trace is made of both."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax
from ._branch import branch_p, branches_of, clamped, guarded, select
from ._evaluate import Outcome, Visitor, as_arrays, evaluate
from ._masked import expand
from ._nested import leaves_of, merged, nested
from ._support import whole_space
from ._table import Entry, site_table


def evaluate_branches(eqn: Any, values: Any, visitor: Visitor, key: Any, given: Any, mask: Any) -> Outcome:
    """Run a `cond` or `switch` whose branches hold sites, over lanes or not."""
    branches = branches_of(eqn)
    assert branches is not None
    index, *operands = values
    index = clamped(index, len(branches))
    if eqn.primitive is branch_p or visitor.everywhere:
        return _all(branches, index, operands, visitor, key, given, mask)
    return _taken(branches, index, operands, visitor, key, given, mask)


# --- the branch that is taken -----------------------------------------------------------------------------------


def _taken(branches: Any, index: Any, operands: Any, visitor: Visitor, key: Any, given: Any, mask: Any) -> Outcome:
    inputs = (operands, key, _constraints(branches, given))
    runs, shapes = [], []
    for branch in branches:
        run = functools.partial(_run, branch, visitor, mask)
        jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(*inputs)
        runs.append(_jax.jaxpr_as_fun(jaxpr))
        shapes.append(shape)
    tables = [dict(leaves_of(site_table(branch))) for branch in branches]
    whole = {name: merged(*(getattr(s, name) for s in shapes)) for name in ("choices", "deterministic")}

    def padded(number: int, flat: Any) -> Outcome:
        outcome = jax.tree.unflatten(jax.tree.structure(shapes[number]), runs[number](*flat))
        return _padded(outcome, whole, tables)

    flat = jax.tree.leaves(inputs)
    return lax.switch(index, [functools.partial(padded, number) for number in range(len(branches))], flat)


def _run(branch: Any, visitor: Visitor, mask: Any, operands: Any, key: Any, given: Any) -> Outcome:
    return as_arrays(evaluate(branch, operands, visitor, key, given, mask))


def _constraints(branches: Any, given: Any) -> Any:
    """Return what is given at the addresses of the branches."""
    known = {address for branch in branches for address in site_table(branch)}
    return {address: value for address, value in given.items() if address in known}


def _padded(outcome: Outcome, whole: Any, tables: list[dict[str, Entry]]) -> Outcome:
    """Give an outcome the choices of the other branches too, as zeros that are marked as absent."""
    present, completed = dict(leaves_of(outcome.present)), {}
    for name, shapes in whole.items():
        own = dict(leaves_of(getattr(outcome, name)))
        for path, shape in leaves_of(shapes):
            entry = next(table[path] for table in tables if path in table)
            if path in own:
                present.setdefault(path, jnp.ones(entry.elements, bool))
                continue
            present[path] = jnp.zeros(entry.elements, bool)
            own[path] = jax.tree.map(lambda s, entry=entry: _absent(s, entry), shape)
        completed[name] = nested((path, own[path]) for path, _ in leaves_of(shapes))
    return outcome._replace(present=nested(sorted(present.items())), **completed)


def _absent(shape: Any, entry: Entry) -> Any:
    """Return what stands for a choice that is not made: zeros, or a value of its support where zero is none."""
    zeros = jnp.zeros(shape.shape, shape.dtype)
    support = getattr(entry.site, "support", None)
    if support is None or whole_space(support) or shape.shape != entry.shape:
        return zeros
    return jnp.broadcast_to(jnp.asarray(support.feasible_like(zeros), shape.dtype), shape.shape)


# --- all branches, with masks -----------------------------------------------------------------------------------


def _all(branches: Any, index: Any, operands: Any, visitor: Visitor, key: Any, given: Any, mask: Any) -> Outcome:
    outcomes = []
    for number, branch in enumerate(branches):
        taken = index == number
        if mask is not None:
            taken = taken & jnp.reshape(mask, jnp.shape(mask) + (1,) * (jnp.ndim(taken) - jnp.ndim(mask)))
        own = None if key is None else jax.random.fold_in(key, number)
        outcomes.append(evaluate(branch, guarded(taken, operands), visitor, own, given, taken))
    outputs = [select(index, list(cases)) for cases in zip(*(o.outputs for o in outcomes), strict=True)]
    total = outcomes[0]
    for other in outcomes[1:]:
        total = _overlaid(total, other)
    return total._replace(outputs=outputs)


def _overlaid(a: Outcome, b: Outcome) -> Outcome:
    """Join two branches of which each lane takes at most one."""
    present = dict(leaves_of(a.present))
    shown: dict[str, Any] = {}
    for name in ("choices", "deterministic"):
        values = dict(leaves_of(getattr(a, name)))
        for path, value in leaves_of(getattr(b, name)):
            here = dict(leaves_of(b.present))[path]
            values[path] = _chosen(here, value, values[path]) if path in values else value
        shown[name] = nested(values.items())
    for path, here in leaves_of(b.present):
        present[path] = here | present[path] if path in present else here
    return Outcome(
        [], shown["choices"], a.log_density + b.log_density, a.log_weight + b.log_weight, nested(present.items()),
        shown["deterministic"],
    )  # fmt: skip


def _chosen(here: Any, ours: Any, theirs: Any) -> Any:
    """Return what a branch recorded where it was taken, else what another did."""
    return jax.tree.map(lambda a, b: jnp.where(expand(here, a), a, b), ours, theirs)
