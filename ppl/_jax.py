"""The one file that touches JAX internals.

Every name that JAX keeps in `jax.extend`, `jax.interpreters` or a jaxpr's parameters is wrapped here, so that a
change in JAX is mended in one place. The rest of expectax sees equations, sub-jaxprs and primitives only through
these functions.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
from jax import core, lax
from jax._src import effects
from jax._src.core import no_axis_name, trace_ctx
from jax._src.source_info_util import user_frames
from jax.ad_checkpoint import checkpoint_name
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.extend.core import primitives as known
from jax.extend.random import threefry_2x32
from jax.interpreters import ad, batching, mlir

__all__ = ["ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "ad", "batching", "jaxpr_as_fun", "mlir"]

ShapedArray = core.ShapedArray

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_MACHINERY = (
    *(os.path.join(_ROOT, folder) + os.sep for folder in ("ppl", "vi", "inference")),
    *(os.path.dirname(os.path.abspath(str(package.__file__))) + os.sep for package in (jax, eqx)),
)
_staging: contextvars.ContextVar[Any] = contextvars.ContextVar("staging", default=None)  # the trace of a model


def _primitives(*names: str) -> frozenset[Any]:
    return frozenset(p for name in names if (p := getattr(known, name, None)) is not None)


JIT = _primitives("jit_p", "pjit_p")
REMAT = _primitives("remat_p", "checkpoint_p")
_TAG = "expectax_site:"
SCAN = _primitives("scan_p")
COND = _primitives("cond_p")
CUSTOM = _primitives("custom_jvp_call_p", "custom_vjp_call_p", "custom_vjp_call_jaxpr_p")


class SiteEffect(effects.Effect):
    """Marks a site in a jaxpr, so that no derivative or dead-code elimination of JAX may drop it."""

    def __repr__(self) -> str:
        """Show the effect in a printed jaxpr."""
        return "site"


SITE = SiteEffect()
for _allowed in (
    effects.control_flow_allowed_effects,
    effects.custom_derivatives_allowed_effects,
    effects.lowerable_effects,
    effects.remat_allowed_effects,
):
    _allowed.add_type(SiteEffect)


def is_array(value: Any) -> bool:
    """Tell whether a value is an array, traced or not."""
    return isinstance(value, jax.Array)


def is_traced(value: Any) -> bool:
    """Tell whether a value is being traced, so that its numbers are not known."""
    return isinstance(value, core.Tracer)


# --- jaxprs -----------------------------------------------------------------------------------------------------


def close(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return `(open jaxpr, constants)` of an open or a closed jaxpr."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item


def contains(jaxpr: Any, *primitives: Primitive) -> bool:
    """Tell whether one of some primitives stands anywhere in `jaxpr`."""
    return any(e.primitive in primitives or holds(e, *primitives) for e in close(jaxpr)[0].eqns)


def holds(eqn: JaxprEqn, *primitives: Primitive) -> bool:
    """Tell whether one of some primitives stands in a sub-jaxpr of `eqn`."""
    return any(contains(j, *primitives) for j in sub_jaxprs(eqn))


def called_jaxpr(eqn: JaxprEqn) -> Any | None:
    """Return the jaxpr of a call that only wraps a computation (`jit`, `checkpoint`), else None."""
    return eqn.params["jaxpr"] if eqn.primitive in JIT | REMAT else None


def call_name(eqn: JaxprEqn) -> str:
    """Return the name of a `jit` equation (empty for others)."""
    return str(eqn.params.get("name", "")) if eqn.primitive in JIT else ""


def custom_jaxpr(eqn: JaxprEqn) -> Any | None:
    """Return the primal jaxpr of a call with a derivative rule of its own, else None."""
    if eqn.primitive not in CUSTOM:
        return None
    return eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))


def scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """Return `(number of constants, number of carries)` of a scan equation."""
    if "num_consts" in eqn.params:  # until JAX 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # from JAX 0.11
    return len(consts), len(carry)


def at_line_of(eqn: JaxprEqn) -> Any:
    """Return a context in which what is traced has the user's line of an equation, for errors and profiles."""
    info = eqn.source_info
    return source_info_util.user_context(
        info.traceback, name_stack=source_info_util.current_name_stack() + info.name_stack
    )


def while_parts(eqn: JaxprEqn) -> tuple[Any, Any, int, int] | None:
    """Return `(condition, body, constants of the condition, of the body)` of a while loop, else None."""
    if eqn.primitive.name != "while":
        return None
    params = eqn.params
    return params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"], params["body_nconsts"]


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Run one equation on new arguments, keeping the user's line."""
    with at_line_of(eqn):
        bound = eqn.primitive.get_bind_params(eqn.params)  # (subfuns, params) until JAX 0.9, one dict from 0.10
        subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
        out = eqn.primitive.bind(*subfuns, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


class Environment(dict):
    """The values of a jaxpr's variables."""

    def read(self, atom: Any) -> Any:
        """Return the value of a variable or a literal."""
        return atom.val if isinstance(atom, Literal) else self[atom]

    @classmethod
    def of(cls, jaxpr: Any, args: Sequence[Any]) -> Environment:
        """Return the environment at the start of `jaxpr`."""
        opened, consts = close(jaxpr)
        env = cls(zip(opened.constvars, consts, strict=True))
        env.update(zip(opened.invars, args, strict=True))
        return env


# --- places in the user's code ----------------------------------------------------------------------------------


def caller() -> str:
    """Return `file:line` of the nearest frame outside the machinery of expectax, JAX and equinox."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown"


def place(eqn: JaxprEqn) -> str:
    """Return `file:line` of the user's code that made `eqn`."""
    for frame in user_frames(eqn.source_info.traceback):
        if not frame.file_name.startswith(_MACHINERY):
            return f"{frame.file_name}:{frame.start_line}"
    return source_info_util.summarize(eqn.source_info).split(" (")[0]


def is_machinery(file: str) -> bool:
    """Tell whether a file belongs to the machinery of expectax, JAX and equinox."""
    return file.startswith(_MACHINERY)


# --- the trace of a model ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging() -> Iterator[None]:
    """Mark the present trace as that of a model: its values are dead when the model has been traced."""
    token = _staging.set(trace_ctx.trace)
    try:
        yield
    finally:
        _staging.reset(token)


def enclosing(trace: Any = None) -> Iterator[Any]:
    """Yield a trace (the present one, if None) and those around it, innermost first."""
    trace = trace_ctx.trace if trace is None else trace
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


def dies_with_the_model(value: Any) -> bool:
    """Tell whether a value is being traced by the model that is being staged, or by a trace inside it."""
    if not is_traced(value) or _staging.get() is None:
        return False
    return any(trace is _staging.get() for trace in enclosing(value._trace))


# --- primitives -------------------------------------------------------------------------------------------------


def define_primitive(
    name: str,
    abstract: Callable[..., Any],
    batch: Callable[..., Any],
    implementation: Callable[..., Any],
    lowering: Callable[..., Any],
    jvp: Callable[..., Any],
    multiple_results: bool = False,
    site: bool = False,
) -> Primitive:
    """Make a primitive; `batch(axis, args, dims, **params)` runs for every vmap, mapped operands or not.

    A primitive that is a `site`, or holds some, is never dropped from a jaxpr.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_effectful_abstract_eval(
        lambda *args, **params: (abstract(*args, **params), {SITE} if site else set())
    )
    primitive.def_impl(implementation)
    batching.fancy_primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lowering)
    ad.primitive_jvps[primitive] = jvp
    return primitive


def lower_as(function: Callable[..., Any], multiple_results: bool = False) -> Callable[..., Any]:
    """Return the lowering rule of a primitive that means `function`."""
    return mlir.lower_fun(function, multiple_results=multiple_results)


def is_zero(tangent: Any) -> bool:
    """Tell whether a tangent is JAX's symbolic zero."""
    return type(tangent) is ad.Zero


def zero_tangent(value: Any) -> Any:
    """Return the symbolic zero tangent of a value."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def tag(value: Any, address: str, where: str) -> Any:
    """Return the value, marked in the jaxpr as belonging to a site; it costs nothing when compiled."""
    return checkpoint_name(value, f"{_TAG}{address}\n{where}")


def tagged(eqn: JaxprEqn) -> str | None:
    """Return the address of a tag's equation, else None."""
    found = tagged_site(eqn)
    return None if found is None else found[0]


def tagged_site(eqn: JaxprEqn) -> tuple[str, str] | None:
    """Return `(address, file:line)` of a tag's equation, else None."""
    name = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
    address, _, where = name[len(_TAG) :].rpartition("\n")
    return (address, where) if name.startswith(_TAG) else None


# --- keys -------------------------------------------------------------------------------------------------------


def is_threefry(key: Any) -> bool:
    """Tell whether a typed key is of JAX's default, counter-based generator."""
    return str(jax.random.key_impl(key)) == "threefry2x32"


def threefry(key: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """Return the two words of `threefry2x32(key, (high, low))` for arrays of counters of equal size."""
    words = threefry_2x32(tuple(jax.random.key_data(key)), jax.numpy.concatenate([high, low]))
    return words[: high.size], words[high.size :]


def split_each(key: Any, size: int) -> Any:
    """Split every key of an array of keys; the new axis comes first."""
    split = jax.vmap(lambda k: jax.random.split(k, size))(key.ravel())
    return jax.numpy.moveaxis(split, 1, 0).reshape(size, *key.shape)


# --- the lanes that the library makes itself --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LaneAxis:
    """The name of a vmap axis along which draws with one unmapped key are independent."""

    depth: int


def lane_axes() -> list[LaneAxis]:
    """Return the library's own vmap axes that enclose the present trace, outermost first."""
    from jax._src.core import get_axis_env

    return [name for name in get_axis_env().axis_sizes if isinstance(name, LaneAxis)]


def over_lanes(function: Callable[..., Any], size: int, in_axes: Any = None, mean_axis: bool = False) -> Callable:
    """Return `function` over `size` independent lanes: `vmap`, except that an unmapped key draws afresh in each lane.

    One random draw then serves all lanes: splitting a key per lane costs five to seven times as much on a CPU.
    `function` is given the axis' name first if `mean_axis` is set.
    """

    def call(*args: Any) -> Any:
        name = LaneAxis(len(lane_axes()))
        mapped = (lambda *xs: function(name, *xs)) if mean_axis else function
        axes = (None,) * len(args) if in_axes is None else in_axes
        return jax.vmap(mapped, in_axes=axes, axis_size=size, axis_name=name)(*args)

    return call


def axis_index(name: LaneAxis) -> Any:
    """Return the number of the lane along one of the library's axes."""
    return lax.axis_index(name)


# --- `cond` under `vmap` ----------------------------------------------------------------------------------------


def branches_of(eqn: JaxprEqn) -> tuple[Any, ...]:
    """Return the branches of a `cond` equation, in the order of its index."""
    return tuple(eqn.params["branches"])


def opened(jaxpr: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
    """Return a jaxpr whose constants, which may be traced, are its first arguments; and the constants."""
    consts = list(jaxpr.consts)

    def run(*args: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, args[: len(consts)]))(*args[len(consts) :])

    types = [jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x)) for x in consts]
    return jax.make_jaxpr(run)(*types, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals)), consts


def over_axis(
    jaxpr: ClosedJaxpr, axis: Any, in_axes: Sequence[int | None], out_axes: Sequence[int] | int = 0
) -> ClosedJaxpr:
    """Return a jaxpr mapped over an axis that a vmap has just met; its outputs carry the axis in front, or as told."""
    named = {} if axis.name is None or axis.name is no_axis_name else {"axis_name": axis.name}
    mapped = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(in_axes), out_axes=out_axes, axis_size=axis.size, **named)
    types = []
    for aval, dim in zip(jaxpr.in_avals, in_axes, strict=True):
        shape = aval.shape if dim is None else (*aval.shape[:dim], axis.size, *aval.shape[dim:])
        types.append(jax.ShapeDtypeStruct(shape, aval.dtype))
    return jax.make_jaxpr(mapped)(*types)


def to_front(value: Any, dim: int | None, size: int) -> Any:
    """Return a value with its mapped axis in front, repeated where it has none."""
    if dim is None:
        return jax.numpy.broadcast_to(value, (size, *jax.numpy.shape(value)))
    return jax.numpy.moveaxis(value, dim, 0)


def replace_batched_cond(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Let `rule(axis, args, dims, branches)` batch a `cond` whose predicate is batched and whose branches hold sites.

    JAX batches such a `cond` by running *every* branch and selecting among the results. Sites in the branches would
    then all be scored, taken or not: a silent wrong number. Other conds go on to JAX's own rule.
    """
    for cond in COND:
        original = batching.fancy_primitive_batchers[cond]

        def wrapped(axis: Any, args: Any, dims: Any, *, _original: Any = original, **params: Any) -> Any:
            if dims[0] is not None and any(contains(b, primitive) for b in params["branches"]):
                return rule(axis, args, dims, branches=tuple(params["branches"]))
            return _original(axis, args, dims, **params)

        batching.fancy_primitive_batchers[cond] = wrapped
