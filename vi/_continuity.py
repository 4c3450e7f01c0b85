r"""Is a value continuous in the draws? Decided by numbers, in float64, without JAX.

A value is followed back through elementwise equations to *atoms*: draws, parameters, data, and what other equations
(sums, products of matrices, scans) made. Each element of the value is one and the same scalar function $f(a_1, \dots,
a_k)$ of its atoms. The *steps* in $f$ (comparisons, `floor`, `sign`, ...) have signals that are constant but at
boundaries. Along random lines $a(t) = a_0 + t\,d$ in the space of the atoms we look for the $t$ where a signal flips, close
in on it by bisection to neighbouring floats $t^- < t^+$, and compare $f(t^-)$ with $f(t^+)$. The atoms are taken as
independent, which can only refuse more: what agrees for all atoms agrees for those that occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special

LINES, FLIPS, MOST = 24, 96, 400
_GRID = np.geomspace(1e-3, 1e12, 240)
_T = np.concatenate([-_GRID[::-1], _GRID])


class Node:
    """A value of a program: its equation, and what is known of it.

    Attributes:
        op: the primitive's name; `"literal"`, `"site"`, or `"atom"` for what is not looked into.
        params: of a literal its number; else what tells equations apart.
        inputs: nodes; of a site the two bounds of its support, or none where they are not known.
        shape: of the value.
        kind: numpy's letter for its dtype: `"b"`, `"i"`, `"f"`.
        sites: continuous draws that it varies with.
        moved: whether it has a derivative by the parameters, through draws or not.
        jumps: steps in the draws that it may jump at.
        step: whether this node is such a step.
    """

    __slots__ = ("inputs", "jumps", "kind", "moved", "op", "params", "shape", "sites", "step")

    def __init__(
        self,
        op: str,
        params: Any,
        inputs: Any,
        shape: Any,
        kind: str,
        sites: Any,
        jumps: Any = frozenset(),
        moved: bool | None = None,
    ) -> None:
        self.op, self.params, self.inputs, self.shape, self.kind = op, params, tuple(inputs), tuple(shape), kind
        self.sites, self.jumps, self.step = frozenset(sites), frozenset(jumps), False
        self.moved = any(x.moved for x in self.inputs) if moved is None else moved

    @property
    def single(self) -> bool:
        """Whether the value has one element."""
        return all(size == 1 for size in self.shape)


def _select(which: Any, *cases: Any) -> Any:
    index = np.clip(np.nan_to_num(which), 0, len(cases) - 1)
    return np.select([index == n for n in range(len(cases))], cases)


def _clipped(function: Callable[..., Any], low: float, high: float) -> Callable[..., Any]:
    """Return a function that is nowhere rounded to its limits, which it never takes."""
    return lambda x: function(np.clip(x, low, high))


def _differ(a: Any, b: Any) -> Any:
    return np.sign(a - b)


def _is_nan(a: Any, b: Any) -> Any:
    """Return whether a value differs from itself."""
    del b
    return np.isnan(a)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{name: (function, _differ) for name, function in COMPARISONS.items()},
    **{name: (f, f) for name, f in (("floor", np.floor), ("ceil", np.ceil), ("round", np.round), ("sign", np.sign))},
    "rem": (np.fmod, lambda a, b: np.trunc(a / b)),
    "to_int": (np.trunc, np.trunc),
    "to_bool": (lambda x: x != 0, np.sign),
    "eq infinity": (np.equal, np.equal), "ne infinity": (np.not_equal, np.not_equal),
    "is_finite": (np.isfinite, np.isfinite), "is_nan": (_is_nan, _is_nan),
    "is_number": (lambda x, y: ~_is_nan(x, y), _is_nan),
}  # fmt: skip
"""Steps by name: the value, and the signal that is constant between jumps."""

NEAR: dict[str, float] = dict.fromkeys(("is_finite", "is_nan", "is_number", "eq infinity", "ne infinity"), 30.0)
"""How far along a line these are looked at: where numbers overflow they flip, but no draw comes there."""

POLES: dict[str, Callable[..., Any]] = {
    "div": lambda a, b: np.sign(b),
    "atan2": lambda y, x: np.where(x < 0, np.sign(y), 0.0),
}
"""Smooth equations that jump where a signal flips, if they have finite limits there: at a denominator's zero, at a cut."""

SMOOTH: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "exp": _clipped(np.exp, -700, np.inf), "exp2": _clipped(np.exp2, -1000, np.inf), "expm1": _clipped(np.expm1, -30, np.inf), "log": np.log,
    "log1p": np.log1p, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt, "square": np.square,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": _clipped(np.tanh, -15, 15), "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "logistic": _clipped(special.expit, -30, 30), "erf": _clipped(special.erf, -5, 5), "erfc": special.erfc, "erf_inv": special.erfinv,
    "lgamma": special.gammaln, "digamma": special.digamma, "add": np.add, "add_any": np.add, "sub": np.subtract,
    "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum, "pow": np.power, "atan2": np.arctan2,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high), "select_n": _select,
    "integer_pow": lambda x, y: x**y, "integer_div": lambda a, b: np.trunc(a / b), "stop_gradient": lambda x: x,
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not, "to_number": lambda x: x,
}  # fmt: skip
"""Elementwise primitives; those on booleans are taken so only where their values are booleans."""

VIEWS = frozenset(
    "broadcast_in_dim reshape squeeze transpose slice rev dynamic_slice gather expand_dims reduce_sum reduce_max "
    "reduce_min reduce_prod reduce_and reduce_or".split()
)
"""Equations whose elements are elements of the first input; reductions only where nothing is reduced."""


def is_view(node: Node) -> bool:
    """Tell whether every element of a node is an element of its first input."""
    if node.op not in VIEWS or any(index.sites or index.jumps for index in node.inputs[1:]):
        return False
    return not node.op.startswith("reduce") or np.prod(node.inputs[0].shape, dtype=int) == np.prod(
        node.shape, dtype=int
    )


def base(node: Node) -> Node:
    """Return what a node is a view of."""
    while is_view(node):
        node = node.inputs[0]
    return node


def _fits(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Tell whether an operand of an elementwise equation has an element for each of the result's."""
    alike = len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))
    return alike or all(size == 1 for size in shape)


def _widened(view: tuple[Any, ...], operand: Node, node: Node) -> tuple[Any, ...]:
    return view if operand.shape == node.shape else (*view, ("widen", None, node.shape))


class _Scalar:
    """The scalar function of one element: instructions over the registers that `run` fills."""

    def __init__(self, node: Node) -> None:
        self.instructions: list[tuple[Any, tuple[int, ...]]] = []
        self.atoms: list[tuple[int, Node]] = []
        self.signals: list[tuple[Any, tuple[int, ...]]] = []
        self.limits: list[float] = []  # how far each signal is looked at
        self.poles: list[bool] = []
        self._known: dict[Any, int] = {}
        self.result = self._expand(node, ())

    def _expand(self, node: Node, view: tuple[Any, ...]) -> int:
        """Return the register of a node's element, seen through a chain of views."""
        view = () if node.single else view
        key = (node, view)
        if key not in self._known:
            if is_view(node):
                same_rank = node.op == "broadcast_in_dim" and len(node.shape) == len(node.inputs[0].shape)
                through = ("widen", None) if same_rank else (node.op, node.params, *node.inputs[1:])
                self._known[key] = self._expand(node.inputs[0], (*view, (*through, node.shape)))
            else:
                self._known[key] = self._instruction(node, view)
        return self._known[key]

    def _instruction(self, node: Node, view: tuple[Any, ...]) -> int:
        known = node.op in SMOOTH or node.op in STEPS
        fits = all(_fits(x.shape, node.shape) for x in node.inputs)
        args: tuple[int, ...] = ()
        function: Any = None
        if node.op == "literal":
            function = node.params
        elif node.op == "site" and node.inputs and fits:
            bounds = tuple(self._expand(x, _widened(view, x, node)) for x in node.inputs)
            self.atoms.append((len(self.instructions), node))
            self.instructions.append((None, ()))
            function, args = _draw, (*bounds, len(self.instructions) - 1)
        elif known and fits and len(self.instructions) < MOST:
            args = tuple(self._expand(x, _widened(view, x, node)) for x in node.inputs)
            function = STEPS[node.op][0] if node.op in STEPS else _with_parameters(node)
            if node.step:
                self.signals.append((POLES.get(node.op) or STEPS[node.op][1], args))
                self.limits.append(NEAR.get(node.op, np.inf))
                self.poles.append(node.op in POLES)
        else:
            self.atoms.append((len(self.instructions), node))
        self.instructions.append((function, args))
        return len(self.instructions) - 1

    def run(self, values: dict[int, Any]) -> tuple[Any, list[Any]]:
        """Return the result and the signals for values of the atoms."""
        registers: list[Any] = []
        with np.errstate(all="ignore"):
            for number, (function, args) in enumerate(self.instructions):
                if number in values:
                    registers.append(values[number])
                elif not callable(function):
                    registers.append(function)
                else:
                    registers.append(np.asarray(function(*(registers[a] for a in args)), float))
            return registers[self.result], [f(*(registers[a] for a in args)) for f, args in self.signals]


def _draw(low: Any, high: Any, s: Any) -> Any:
    """Map a real number into an interval."""
    bounded, above = np.isfinite(low) & np.isfinite(high), np.isfinite(low)
    part, size = special.expit(np.clip(s, -20, 20)), np.exp(np.clip(s, -30, 30))
    one_sided = np.where(above, low + size, np.where(np.isfinite(high), high - size, s))
    return np.where(bounded, low + (high - low) * part, one_sided)


def _with_parameters(node: Node) -> Callable[..., Any]:
    function = SMOOTH[node.op]
    return (lambda x: function(x, node.params)) if node.op == "integer_pow" else function


class _Lines(NamedTuple):
    """Random lines in the space of the atoms: per atom a start, a direction (0 for what is no draw), and which are exp."""

    start: list[Any]
    direction: list[Any]
    positive: list[Any]

    def at(self, atoms: Any, line: Any, t: Any) -> dict[int, Any]:
        """Return the atoms' values at points `t` of some lines."""
        values = {}
        for (number, _), a, d, positive in zip(atoms, self.start, self.direction, self.positive, strict=True):
            s = a[line] + d[line] * t
            values[number] = np.where(positive[line], np.exp(np.clip(s, -30, 30)), s)
        return values


def _lines(atoms: Any) -> _Lines:
    """Half of the lines have all reals for what has no known support, the others positive numbers only."""
    random = np.random.default_rng(20260801)
    lines = _Lines([], [], [])
    for _, node in atoms:
        start = random.normal(size=LINES) * 10.0 ** random.uniform(-1, 0.7, size=LINES)
        direction = random.normal(size=LINES) * (node.kind == "f" and bool(node.sites))
        if node.kind != "f":
            start = np.floor(np.abs(start)) if node.kind == "i" else (start > 0).astype(float)
        positive = (np.arange(LINES) >= LINES // 2) & (node.kind == "f") & (node.op != "site")
        for part, made in zip(lines, (start, direction, positive), strict=True):
            part.append(made)
    return lines


class _Search:
    """The flips of a scalar function's signals along lines."""

    def __init__(self, node: Node) -> None:
        self.scalar = _Scalar(node)
        self.lines = _lines(self.scalar.atoms)
        rows = np.broadcast_to(np.arange(LINES)[:, None], (LINES, len(_T)))
        found = self._run(rows, np.broadcast_to(_T, rows.shape))[1]
        self.grid = [np.broadcast_to(signal, rows.shape) for signal in found]

    def _run(self, line: Any, t: Any) -> tuple[Any, list[Any]]:
        return self.scalar.run(self.lines.at(self.scalar.atoms, line, t))

    def flips(self, number: int) -> tuple[Any, Any]:
        """Return `(lines, positions)` of the grid's intervals in which a signal changes."""
        signal = self.grid[number]
        change = (signal[:, 1:] != signal[:, :-1]) & np.isfinite(signal[:, 1:]) & np.isfinite(signal[:, :-1])
        change &= np.fmax(np.abs(_T[1:]), np.abs(_T[:-1])) <= self.scalar.limits[number]
        line, at = np.nonzero(change)
        return line, at

    def agrees(self, number: int) -> bool:
        """Tell whether the function has the same limits on both sides wherever a signal flips, and somewhere it does."""
        line, at = self.flips(number)
        some = np.unique(np.linspace(0, len(line) - 1, min(FLIPS, len(line))).astype(int))
        line, low, high = line[some], _T[at[some]], _T[at[some] + 1]
        before = self._signal(number, line, low)
        for _ in range(80):
            middle = (low + high) / 2
            left = self._signal(number, line, middle) == before
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        if self.scalar.poles[number]:
            return not self._breaks(line, low, high).any()
        near, wide = self._gap(line, low, high), 1e-9 * np.abs(low) + 1e-12
        far = np.fmax(self._gap(line, low, low - wide), self._gap(line, high, high + wide))
        scale = np.fmax(np.abs(self._value(line, low - 1)), np.abs(self._value(line, high + 1)))
        scale = np.fmax(scale, np.abs(self._value(line, low)))
        told = ~np.isnan(near)
        jumps = np.isinf(near) | ((near > 1e-2 * far) & (near > 1e-6 * np.where(np.isfinite(scale), scale, 0.0)))
        return bool(told.any()) and not (told & jumps).any()

    def _breaks(self, line: Any, low: Any, high: Any) -> Any:
        """Tell where the function has two finite limits at a pole: seen from a little way off, where it is no noise."""
        wide = 1e-4 * (1.0 + np.abs(low))
        near, far = self._gap(line, low - wide, high + wide), self._gap(line, low - 4 * wide, high + 4 * wide)
        sides = [np.abs(self._value(line, t)) for t in (low - wide, high + wide, low - 1.0, high + 1.0)]
        closer = self._gap(line, low - wide / 64, high + wide / 64)
        tame = np.fmax(sides[0], sides[1]) < 1e3 * (1.0 + np.fmax(sides[2], sides[3]))
        with np.errstate(all="ignore"):
            stays = (near > 0.9 * far) & (closer > 0.9 * near) & (closer < 1.1 * near)
            return tame & stays & (near > 1e-3 * np.fmax(sides[2], sides[3]))

    def _signal(self, number: int, line: Any, t: Any) -> Any:
        return np.broadcast_to(self._run(line, t)[1][number], t.shape)

    def _value(self, line: Any, t: Any) -> Any:
        return np.broadcast_to(self._run(line, t)[0], t.shape)

    def _gap(self, line: Any, low: Any, high: Any) -> Any:
        """Return the distance of the function's values; infinite from a number to infinity, nan if it is not known."""
        with np.errstate(all="ignore"):
            return np.abs(self._value(line, low) - self._value(line, high))


def flips(step: Node) -> bool:
    """Tell whether a step takes more than one value; True also if its operands are nowhere defined."""
    search = _Search(step)
    if any(node.jumps for _, node in search.scalar.atoms):
        return True
    if not search.scalar.signals:
        return True
    own = search.grid[-1]
    return not np.isfinite(own).any() or len(search.flips(len(search.grid) - 1)[0]) > 0


def supports_known(node: Node) -> bool:
    """Tell whether a node is made of draws whose support is known, and of nothing else."""
    return all(atom.op == "site" and atom.inputs for _, atom in _Scalar(node).atoms)


def continuous(node: Node) -> bool:
    """Tell whether a value made with steps is continuous in the draws all the same."""
    search = _Search(node)
    if any(atom.jumps for _, atom in search.scalar.atoms) or not search.scalar.signals:
        return False
    return all(search.agrees(number) for number in range(len(search.grid)))


def continuous_at_poles(node: Node) -> bool:
    """Tell whether a quotient has no two finite limits where its denominator changes sign; True if it never does."""
    search = _Search(node)
    if any(atom.jumps for _, atom in search.scalar.atoms) or not search.scalar.signals:
        return True
    number = len(search.grid) - 1
    return not len(search.flips(number)[0]) or search.agrees(number)
