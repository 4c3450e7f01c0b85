"""An objective's equations as nodes: what each value varies with, and where it may jump; see `_soundness.py`."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from expectax.ppl import _jax
from expectax.ppl._branch import branches_of
from expectax.ppl._distribution import Lane, over
from expectax.ppl._frames import frames
from expectax.ppl._sample import Site, sample_p
from expectax.ppl._support import bounds_of

from ._continuity import POLES, SMOOTH, STEPS, VIEWS, Node, continuous, continuous_at_poles, flips
from ._strategy import pathwise
from ._support_bounds import crosses_support, fixed_bounds, interval_of

_TESTS = 200
_JUMPS_BY_NATURE = ("rankdata", "mode")
_FUNCTIONS = ("interp", "_interp", "_interp_general", "quantile", "_quantile", "percentile", "sinc", "logaddexp")
_LIBRARIES = tuple(
    os.path.join(os.sep, *path)
    for path in (
        ("jax", "_src", "scipy", ""), ("jax", "_src", "nn", ""), ("jax", "_src", "numpy", "linalg.py"),
        ("jax", "_src", "lax", "linalg.py"), ("jax", "experimental", ""), ("site-packages", "numpyro", ""),
        ("site-packages", "equinox", ""), ("site-packages", "flowjax", ""), ("site-packages", "optax", ""),
    )
)  # fmt: skip
_CONSTRAINTS = os.path.join("numpyro", "distributions", "constraints.py")
_ALWAYS_STEPS = {"nextafter"}
_SAME = {"copy", "copy_p", "name", "reduce_precision", "optimization_barrier", "expectation"}
_MAY_REST = VIEWS - {"rev", "transpose", "gather"}
_CANNOT_HEAL = {"add", "sub", "mul", "div", "neg", "exp", "log", "to_number"}


class Source(NamedTuple):
    """A site with a continuous draw, and whether derivatives pass it."""

    address: str
    where: str
    pathwise: bool


@dataclasses.dataclass(frozen=True)
class Jump:
    """A step in draws at a boundary that the parameters move, in a support's test or elsewhere; `number` counts them as they are met."""

    primitive: str
    place: str
    sources: frozenset[Source]
    support: bool
    number: int = dataclasses.field(compare=False)


# --- places -----------------------------------------------------------------------------------------------------

_UNKNOWN = "an unknown place"


class _Origin(NamedTuple):
    """Who made an equation: the user (at a place), a trusted library, or a support's test."""

    place: str
    trusted: bool
    support: bool


def _origin(chain: tuple[Any, ...]) -> _Origin:
    """Read the frames of an equation and of the calls around it, innermost first, up to the user's."""
    trusted, by_nature, support = False, False, False
    for eqn in chain:
        for file, function, line in frames(eqn):
            name = function.split(".<locals>")[0]
            library = any(part in file for part in _LIBRARIES)
            by_nature = by_nature or (library and name in _JUMPS_BY_NATURE)
            support = support or file.endswith(_CONSTRAINTS)
            trusted = trusted or library or (name in _FUNCTIONS and _jax.is_machinery(file))
            if not library and not _jax.is_machinery(file) and os.path.isabs(file) and "<" not in file:
                return _Origin(f"{file}:{line}", trusted and not by_nature, support)
    return _Origin(_UNKNOWN, trusted and not by_nature, support)


# --- reading equations ------------------------------------------------------------------------------------------


def _kind(dtype: Any) -> str:
    kind = getattr(dtype, "kind", "V")
    return {"b": "b", "i": "i", "u": "i"}.get(kind, "f")


def atom(aval: Any, sites: Any = (), jumps: Any = (), moved: bool = False) -> Node:
    """Return the node of a value that is not looked into."""
    kind = _kind(getattr(aval, "dtype", None))
    return Node("atom", None, (), getattr(aval, "shape", ()), kind, sites, jumps, moved)


def _like(aval: Any, *nodes: Node) -> Node:
    """Return the node of a value of which all that is known of some others is true."""
    return atom(aval, _union(nodes, "sites"), _union(nodes, "jumps"), any(x.moved for x in nodes))


def _number(value: Any, aval: Any) -> Node:
    """Return the node of a constant: its number if it has one element."""
    known = not _jax.is_traced(value) and getattr(aval, "size", 0) == 1 and aval.dtype.kind in "biuf"
    if not known:
        return atom(aval, moved=_jax.is_traced(value))
    return Node("literal", float(np.asarray(value, aval.dtype).reshape(())), (), aval.shape, _kind(aval.dtype), ())


def _union(nodes: Any, what: str) -> frozenset[Any]:
    return frozenset().union(*(getattr(n, what) for n in nodes))


class Reader:
    """Turns equations into nodes; equal equations of equal inputs become one node."""

    def __init__(self, allow: frozenset[str]) -> None:
        self.allow, self.known, self.tests, self.steps = allow, {}, 0, 0
        self.densities: dict[Jump, tuple[str, str]] = {}

    def run(self, jaxpr: Any, inputs: list[Node], calls: tuple[Any, ...]) -> list[Node]:
        """Return the nodes of a jaxpr's outputs; `calls` are the equations around it, innermost first."""
        opened, consts = _jax.close(jaxpr)
        env = {v: _number(c, v.aval) for v, c in zip(opened.constvars, consts, strict=False)}
        env.update(zip(opened.invars, inputs, strict=True))

        def read(v: Any) -> Node:
            if isinstance(v, _jax.Literal):
                return self._shared(_number(v.val, v.aval))
            return env[v]

        for eqn in opened.eqns:
            outputs = self._equation(eqn, [read(v) for v in eqn.invars], (eqn, *calls))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in opened.outvars]

    def _equation(self, eqn: Any, inputs: list[Node], chain: tuple[Any, ...]) -> list[Node]:
        inner = _jax.called_jaxpr(eqn)
        inner = _jax.custom_jaxpr(eqn) if inner is None else inner
        if eqn.primitive is sample_p:
            return [self._site(eqn, inputs)]
        if inner is not None:
            return self.run(inner, inputs, chain)
        if eqn.primitive in _jax.SCAN:
            return self._scan(eqn, inputs, chain)
        if eqn.primitive in _jax.COND:
            return self._branches(eqn, inputs, chain)
        if _jax.while_parts(eqn) is not None:
            return self._while(eqn, inputs, chain)
        if len(eqn.outvars) == 1:
            return [self._single(eqn, inputs, chain)]
        return [self._opaque(eqn, n, v.aval, inputs, chain) for n, v in enumerate(eqn.outvars)]

    def _site(self, eqn: Any, inputs: list[Node]) -> Node:
        """A draw is moved by what moves its parameters if derivatives pass it; baselines bias nothing."""
        site: Site = eqn.params["site"]
        count = site.structure.num_leaves
        inputs = [x for n, x in enumerate(inputs) if n < count or site.extras[n - count] != "baseline"]
        relaxed = bool(getattr(site.gradient, "relaxed", False))  # run at values between, too
        passes = relaxed or pathwise(site.gradient)
        kind = "f" if passes else _kind(site.dtype)
        own = kind == "f" and site.address not in self.allow
        sites = {Source(site.address, site.where, passes)} if own else frozenset()
        sites |= _union(inputs, "sites") if passes else frozenset()
        moved = passes and any(x.moved for x in inputs)
        bounds = self._bounds(site, inputs[:count]) if kind == "f" and not relaxed else ()
        return Node("site", None, bounds, site.value_shape, kind, sites, _union(inputs, "jumps"), moved)

    def _bounds(self, site: Site, leaves: list[Node]) -> tuple[Node, ...]:
        """Return the bounds of every element of a draw as functions of its parameters; none if they are not known."""
        if site.support is not None and not any(_jax.is_traced(b) for b in bounds_of(site.support)):
            fixed = fixed_bounds(site.support)
            return () if fixed is None else tuple(Node("literal", b, (), (), "f", ()) for b in fixed)
        lanes = tuple(Lane(lane.size, lane.dims[: len(leaves)]) for lane in site.lanes)
        types = [jax.ShapeDtypeStruct(x.shape, np.dtype({"f": float, "i": int, "b": bool}[x.kind])) for x in leaves]
        try:
            jaxpr = jax.make_jaxpr(lambda *xs: over(lanes, lambda ys: interval_of(site, ys), 0)(list(xs)))(*types)
        except Exception:  # a support that only the parameters' values would tell
            return ()
        return tuple(self.run(jaxpr, leaves, ()))

    def _opaque(self, eqn: Any, number: int, aval: Any, inputs: list[Node], chain: tuple[Any, ...]) -> Node:
        """An equation that is not looked into: a whole number made of draws is a step in them.

        Of a sort only the first output, the sorted keys, is continuous.
        """
        sites, jumps = _union(inputs, "sites"), _union(inputs, "jumps")
        name = eqn.primitive.name
        permuted = name == "sort" and number > 0 and inputs[0].sites
        whole = _kind(getattr(aval, "dtype", None)) != "f" and not jumps
        moved = any(x.moved for x in inputs)
        if sites and moved and (whole or permuted or name in _ALWAYS_STEPS):
            origin = _origin(chain)
            jumps |= set() if origin.trusted or origin.support else {self._jump(name, origin, sites)}
        return atom(aval, sites, jumps, moved)

    def _single(self, eqn: Any, inputs: list[Node], chain: tuple[Any, ...]) -> Node:
        aval, (op, params) = eqn.outvars[0].aval, _meaning(eqn, inputs)
        if op in _SAME or (op in _MAY_REST and aval.shape == inputs[0].shape):
            if (site := _jax.tagged_site(eqn)) is not None:
                for jump in inputs[0].jumps:
                    self.densities.setdefault(jump, site)
            return inputs[0]
        sites, jumps = _union(inputs, "sites"), _union(inputs, "jumps")
        if op == "stop_gradient":
            return self._shared(Node(op, None, inputs, aval.shape, _kind(aval.dtype), sites, (), False))
        floats = [x for x in inputs if x.kind == "f"]
        if op in STEPS and _union(floats, "sites") and any(x.moved for x in floats):
            return self._step(Node(op, params, inputs, aval.shape, _kind(aval.dtype), sites, jumps), _origin(chain))
        crossing = inputs[1:] if op == "div" else inputs
        if op in POLES and _union(crossing, "sites") and any(x.moved for x in floats) and aval.dtype.kind == "f":
            return self._pole(Node(op, params, inputs, aval.shape, "f", sites, jumps), chain)
        if op not in SMOOTH and op not in STEPS and op not in VIEWS:
            made = self._opaque(eqn, 0, aval, inputs, chain)
            made.params, made.inputs = (op, params), tuple(inputs)
            return made if params is None else self._shared(made)
        node = Node(op, params, inputs, aval.shape, _kind(aval.dtype), sites, jumps)
        return self._healed(self._shared(node))

    def _shared(self, node: Node, *more: Any) -> Node:
        """Return the node that equal equations of equal inputs share."""
        try:
            return self.known.setdefault((node.op, node.params, node.inputs, node.shape, node.kind, *more), node)
        except TypeError:  # parameters that cannot be compared
            return node

    def _step(self, node: Node, origin: _Origin) -> Node:
        """Decide whether a step is one; `Jump`s of its operands stay."""
        shared = self._shared(node, origin)
        if shared is not node:
            return shared
        jumps = self._jumps(node, origin)
        if jumps:
            node.jumps = node.jumps | {self._jump(node.op, origin, node.sites)}
        elif node.op != "rem" and (node.kind != "f" or not origin.trusted):
            node.sites, node.moved = frozenset(), False
        return node

    def _pole(self, node: Node, chain: tuple[Any, ...]) -> Node:
        """Decide whether a quotient, or an angle, jumps where its denominator changes sign, or at its cut."""
        shared = self._shared(node)
        if shared is not node or node.jumps or (origin := _origin(chain)).trusted or origin.support:
            return shared if shared is not node else self._healed(node)
        node.step = True
        if not self._count() and not continuous_at_poles(node):
            node.jumps = frozenset({self._jump(node.op, origin, node.sites)})
        else:
            node.step = False
        return node

    def _jump(self, primitive: str, origin: _Origin, sites: frozenset[Source]) -> Jump:
        self.steps += 1
        return Jump(primitive, origin.place, sites, origin.support, self.steps)

    def _jumps(self, node: Node, origin: _Origin) -> bool:
        node.step = True
        crossed = self._count() or flips(node)
        if crossed and origin.support:
            crossed = crosses_support(node)
        elif origin.trusted:
            crossed = False
        node.step = crossed
        return crossed

    def _healed(self, node: Node) -> Node:
        """Forget the jumps of a value that is continuous in spite of them."""
        if not node.jumps or node.kind != "f" or node.op in VIEWS or self._idle(node):
            return node
        if not self._count() and continuous(node):
            node.jumps = frozenset()
        return node

    def _idle(self, node: Node) -> bool:
        return node.op in _CANNOT_HEAL and sum(bool(x.sites) for x in node.inputs) < 2

    def _count(self) -> bool:
        """Count a test; tell whether there were too many."""
        self.tests += 1
        return self.tests > _TESTS

    # --- control flow -------------------------------------------------------------------------------------------

    def _branches(self, eqn: Any, inputs: list[Node], chain: tuple[Any, ...]) -> list[Node]:
        """A `cond` without sites selects among the results of its branches."""
        which, operands = inputs[0], inputs[1:]
        runs = [self.run(branch, operands, chain) for branch in branches_of(eqn) or ()]
        results = []
        for cases in zip(*runs, strict=True):
            parts = (which, *cases)
            first = cases[0]
            node = Node(
                "select_n", None, parts, first.shape, first.kind, _union(parts, "sites"), _union(parts, "jumps")
            )
            results.append(self._healed(self._shared(node)))
        return results

    def _scan(self, eqn: Any, inputs: list[Node], chain: tuple[Any, ...]) -> list[Node]:
        """What is known of the carry only grows; a step of the loop is read until it grows no more."""
        num_consts, num_carry = _jax.scan_sizes(eqn)
        cut, body = num_consts + num_carry, eqn.params["jaxpr"]
        avals = [v.aval for v in _jax.close(body)[0].invars]
        xs = [_like(a, x) for a, x in zip(avals[cut:], inputs[cut:], strict=True)]
        step = functools.partial(self._step_of, body, inputs[:num_consts], xs, chain)
        carry, outputs = _grown(step, inputs[num_consts:cut], avals[num_consts:cut])
        made = [*carry, *outputs[num_carry:]]
        return [_like(v.aval, x) for v, x in zip(eqn.outvars, made, strict=True)]

    def _step_of(self, body: Any, consts: Any, xs: Any, chain: tuple[Any, ...], carry: list[Node]) -> list[Node]:
        return self.run(body, [*consts, *carry, *xs], chain)

    def _while(self, eqn: Any, inputs: list[Node], chain: tuple[Any, ...]) -> list[Node]:
        """The number of rounds is a step in what the condition depends on."""
        condition, body, before, consts = _jax.while_parts(eqn) or (None, None, 0, 0)
        first, rest, start = inputs[:before], inputs[before : before + consts], inputs[before + consts :]
        step = functools.partial(self._step_of, body, rest, [], chain)
        carry, _ = _grown(step, start, [v.aval for v in eqn.outvars])
        (going,) = self.run(condition, [*first, *carry], chain)
        rounds = atom(None, (), going.jumps)
        return [_like(v.aval, x, rounds) for v, x in zip(eqn.outvars, carry, strict=True)]


def _grown(step: Any, start: list[Node], avals: Any) -> tuple[list[Node], list[Node]]:
    carry = [_like(a, x) for a, x in zip(avals, start, strict=True)]
    while True:
        outputs = step(carry)
        made = list(zip(avals, carry, outputs, strict=False))
        wider = [_like(a, x, y) for a, x, y in made]
        if all(_known(a) == _known(b) for a, b in zip(carry, wider, strict=True)):
            return carry, outputs
        carry = wider


def _known(node: Node) -> Any:
    return node.sites, node.jumps, node.moved


# --- meanings ---------------------------------------------------------------------------------------------------


def _meaning(eqn: Any, inputs: list[Node]) -> tuple[str, Any]:
    """Return the name under which `_continuity` knows an equation, and parameters that tell it apart."""
    op, kind = eqn.primitive.name, _kind(getattr(eqn.outvars[0].aval, "dtype", None))
    if op == "convert_element_type":
        was = inputs[0].kind
        if was == "f" and kind == "f":
            return "copy", None
        return ("to_number" if kind == "f" or was == "b" else "to_bool" if kind == "b" else "to_int"), None
    if op in ("ne", "eq") and inputs[0] is inputs[1]:
        return ("is_nan" if op == "ne" else "is_number"), None
    if op in ("eq", "ne") and any(x.op == "literal" and np.isinf(x.params) for x in inputs):
        return f"{op} infinity", None
    if op in ("and", "or", "xor", "not") and kind != "b":
        return f"{op} of integers", None
    if op == "div" and kind == "i":
        return "integer_div", None
    if op == "integer_pow":
        return op, eqn.params["y"]
    if op in SMOOTH or op in STEPS:
        return op, None
    if any(True for _ in _jax.sub_jaxprs(eqn)):
        return op, None
    return op, tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
