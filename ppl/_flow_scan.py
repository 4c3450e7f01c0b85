r"""Credit through loops: at step $t$ a value may depend on the choices of step $t$ alone, or on those up to $t$.

What a step reads of the loop's inputs `xs` follows their first axis. What comes by the carry has passed through the
steps before, so that an axis of steps becomes causal. The carry's dependence is the least fixed point over steps.
"""

from __future__ import annotations

from typing import Any

from . import _jax
from ._flow import Causal, Dependence, Rule, merge, through

Axis = int | Causal | None


def flow_scan(eqn: Any, inputs: list[Dependence], rule: Rule) -> list[Dependence]:
    """Return the dependence of a scan's outputs; `rule` is that of its body's equations, sites included.

    A site in the body gives its score the axes `(-d, ..., -1)` of the loops around it before those of its elements.
    """
    num_consts, num_carry = _jax.scan_sizes(eqn)
    reverse = bool(eqn.params["reverse"])
    outside = [_changed(d, _into) for d in inputs]
    consts, carry, xs = outside[:num_consts], outside[num_consts:][:num_carry], outside[num_consts + num_carry :]
    steps = [_changed(d, lambda axis: -1 if axis == 0 else axis - 1 if axis > 0 else axis) for d in xs]
    while True:
        outputs = through(eqn.params["jaxpr"], [*consts, *carry, *steps], rule)
        passed = [_changed(d, lambda axis: axis, lambda axis: _passed(axis, reverse)) for d in outputs[:num_carry]]
        joined = [merge(old, new) for old, new in zip(carry, passed, strict=True)]
        if joined == carry:
            break
        carry = joined
    last = [_changed(d, lambda axis: None if axis == -1 else _out_of(axis)) for d in carry]
    ys = [_changed(d, lambda axis: axis + 1 if axis >= -1 else _out_of(axis)) for d in outputs[num_carry:]]
    return [*last, *ys]


def _changed(dependence: Dependence, change: Any, whole: Any = None) -> Dependence:
    """Return a dependence with every axis number changed (None: mixed), or every axis as a whole."""

    def one(axis: Axis) -> Axis:
        if whole is not None:
            return whole(axis)
        if isinstance(axis, Causal):
            to = change(axis.axis)
            return None if to is None else Causal(to, axis.reverse)
        return None if axis is None else change(axis)

    return {score: tuple(one(axis) for axis in axes) for score, axes in dependence.items()}


def _into(axis: int) -> int:
    """Number the steps of the loops around from -2 on."""
    return axis - 1 if axis < 0 else axis


def _out_of(axis: int) -> int:
    return axis + 1 if axis < 0 else axis


def _passed(axis: Axis, reverse: bool) -> Axis:
    """Return what a step's own axis is for the next step: it depends on the steps up to here."""
    if axis == -1:
        return Causal(-1, reverse)
    if isinstance(axis, Causal) and axis.axis == -1 and axis.reverse != reverse:
        return None
    return axis
