r"""Credit assignment: which random choices does each value depend on, and along which of its axes?

A *score* is the log density of a score-function site, one number per independent element: its axes are the scan
steps, lanes and batch elements. For every value we keep, per score, the axis of the value along which each score axis
runs, or None where the value mixes that axis. A cost that depends on lane `i` only is then multiplied by the box of
lane `i` only: $\exp(\tau_i - \text{sg}\,\tau_i)$. Flow rules are per primitive; a primitive without a rule mixes.
Inside the body of a loop (`_flow_scan`) an axis of steps is -1 for the present step, -2 for that of the loop around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import _jax


class Causal(NamedTuple):
    """An axis of steps where index `t` depends on the scores up to `t` (from `t` on, if `reverse`)."""

    axis: int
    reverse: bool


Axes = tuple[Any, ...]
"""For each axis of a score the value's axis that follows it: a number, a `Causal` one, or None (mixed)."""

Dependence = dict[int, Axes]
"""Score number -> for each axis of the score, the value's axis that follows it (None: mixed)."""

_ELEMENTWISE = set(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos "
    "cosh digamma div eq erf erf_inv erfc exp exp2 expectation expm1 floor ge gt integer_pow is_finite le lgamma log log1p "
    "logistic lt max min mul name ne neg nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh "
    "sqrt square stop_gradient sub tan tanh xor".split()
)
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}


def merge(a: Dependence, b: Dependence) -> Dependence:
    """Return the dependence of a value made of two: axes that disagree are mixed."""
    merged = dict(a)
    for score, axes in b.items():
        mine = merged.get(score, axes)
        merged[score] = tuple(_agreed(x, y) for x, y in zip(mine, axes, strict=True))
    return merged


def _agreed(x: int | Causal | None, y: int | Causal | None) -> int | Causal | None:
    if x == y:
        return x
    if isinstance(x, int) and isinstance(y, Causal):
        x, y = y, x
    return x if isinstance(x, Causal) and x.axis == y else None


def moved(dependence: Dependence, move: Callable[[int], int | None]) -> Dependence:
    """Return the dependence after each axis `a` of the value went to `move(a)` (None: mixed)."""
    return {score: tuple(_moved(axis, move) for axis in axes) for score, axes in dependence.items()}


def _moved(axis: int | Causal | None, move: Callable[[int], int | None]) -> int | Causal | None:
    if isinstance(axis, Causal):
        to = _moved(axis.axis, move)
        return Causal(to, axis.reverse) if isinstance(to, int) else None
    if axis is None or axis < 0:
        return axis
    to = move(axis)
    return None if to is None else int(to)  # JAX's parameters have numbers of numpy's among them


def mixed(dependence: Dependence) -> Dependence:
    """Return the dependence with every axis mixed."""
    return {score: (None,) * len(axes) for score, axes in dependence.items()}


def flow(eqn: Any, inputs: list[Dependence], loops: bool = False) -> list[Dependence]:
    """Return the dependence of each output of an equation; without `loops` a scan mixes everything."""
    if not any(inputs):
        return [{} for _ in eqn.outvars]
    inner = _jax.custom_jaxpr(eqn)
    inner = _jax.called_jaxpr(eqn) if inner is None else inner
    if inner is not None:
        return through(inner, inputs, lambda eqn, inputs: flow(eqn, inputs, loops))
    if loops and eqn.primitive in _jax.SCAN:
        from ._flow_scan import flow_scan

        return flow_scan(eqn, inputs, lambda eqn, inputs: flow(eqn, inputs, loops))
    return [_flow_to(eqn, var.aval.shape, inputs) for var in eqn.outvars]


Rule = Callable[[Any, list[Dependence]], list[Dependence]]
"""What an equation makes of its inputs' dependences."""


def through(jaxpr: Any, inputs: list[Dependence], rule: Rule) -> list[Dependence]:
    """Return the dependence of each output of a jaxpr, `rule` being that of its equations."""
    opened = _jax.close(jaxpr)[0]
    known: dict[Any, Dependence] = dict(zip(opened.invars, inputs, strict=True))
    for eqn in opened.eqns:
        known.update(zip(eqn.outvars, rule(eqn, [of(known, v) for v in eqn.invars]), strict=True))
    return [of(known, v) for v in opened.outvars]


def of(known: dict[Any, Dependence], atom: Any) -> Dependence:
    """Return what is known of a variable (nothing of a literal)."""
    return {} if isinstance(atom, _jax.Literal) else known.get(atom, {})


def _flow_to(eqn: Any, out: tuple[int, ...], inputs: list[Dependence]) -> Dependence:
    result: Dependence = {}
    for number, dependence in enumerate(inputs):
        if dependence:
            result = merge(result, moved(dependence, _mover(eqn, number, out)))
    return result


def _mover(eqn: Any, number: int, out: tuple[int, ...]) -> Callable[[int], int | None]:
    """Return where an equation takes the axes of one of its inputs."""
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.invars[number].aval.shape
    if name in _ELEMENTWISE:
        return lambda a: a if len(shape) == len(out) and shape[a] == out[a] else None
    if name in _REDUCTIONS:
        gone = params["axes"]
        return lambda a: None if a in gone else a - sum(g < a for g in gone)
    if name == "broadcast_in_dim":
        to = params["broadcast_dimensions"]
        return lambda a: to[a] if out[to[a]] == shape[a] else None
    if name == "squeeze":
        gone = params["dimensions"]
        return lambda a: None if a in gone else a - sum(g < a for g in gone)
    if name == "transpose":
        return lambda a: params["permutation"].index(a)
    if name == "reshape":
        return _reshaped(shape, out)
    if name == "concatenate":
        return lambda a: None if a == params["dimension"] else a
    if name in ("slice", "dynamic_slice"):
        return lambda a: a if number == 0 and out[a] == shape[a] else None
    if name == "rev":
        return lambda a: None if a in params["dimensions"] else a
    if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        return lambda a: None if a == params["axis"] else a
    if name == "sort":
        return lambda a: None if a == params["dimension"] else a
    if name == "split":
        return lambda a: None if a == params["axis"] else a
    if name == "cholesky":
        return lambda a: a if a < len(shape) - 2 else None
    if name == "triangular_solve":
        return lambda a: a if a < len(shape) - 2 else None
    if name == "stack":
        return lambda a: a + (a >= params["axis"])
    if name == "gather":
        return _gathered(params["dimension_numbers"], number, len(eqn.invars[1].aval.shape), len(out))
    if name == "dot_general":
        return _contracted(params["dimension_numbers"], number, len(shape), len(eqn.invars[0].aval.shape))
    return _nowhere


def _nowhere(axis: int) -> None:
    del axis


def _reshaped(shape: Any, out: Any) -> Callable[[int], int | None]:
    """An axis survives a reshape where the sizes before and after it multiply to the same numbers."""

    def move(a: int) -> int | None:
        before = _product(shape[:a])
        fits = [b for b in range(len(out)) if out[b] == shape[a] and _product(out[:b]) == before]
        return fits[0] if len(fits) == 1 else None

    return move


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _gathered(numbers: Any, number: int, index_ndim: int, out_ndim: int) -> Callable[[int], int | None]:
    """An axis of the indices, or an operand's axis batched with it, becomes one of the result's batch axes."""
    batch = [a for a in range(out_ndim) if a not in numbers.offset_dims]
    if number == 1:
        return lambda a: batch[a] if a < index_ndim - 1 else None
    with_index = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    return lambda a: batch[with_index[a]] if a in with_index else None


def _contracted(numbers: Any, number: int, ndim: int, left_ndim: int) -> Callable[[int], int | None]:
    """Batch axes come first in the result of `dot_general`, then the left's free axes, then the right's."""
    (contract, batch) = numbers
    mine, own_batch = contract[number], batch[number]
    free = [a for a in range(ndim) if a not in mine and a not in own_batch]
    before = len(own_batch) + (left_ndim - len(contract[0]) - len(batch[0]) if number == 1 else 0)

    def move(a: int) -> int | None:
        if a in mine:
            return None
        return list(own_batch).index(a) if a in own_batch else before + free.index(a)

    return move


def lane_mover(lanes: Any, j: int, ndim: int) -> Callable[[int], int | None]:
    """Return where a site takes the axes of its `j`-th leaf: a lane's axis to the lane, others are mixed."""
    axes = list(range(ndim))
    found: dict[int, int] = {}
    for position, lane in enumerate(reversed(lanes)):
        if lane.dims[j] is not None:
            found[axes.pop(lane.dims[j])] = position
    return found.get
