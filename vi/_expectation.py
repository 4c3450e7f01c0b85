r"""Nested expectations, and the check that they are used linearly.

An estimate of $E[g]$ may stand for it only where the rest is linear in it: $E[2 \hat g + 1] = 2 E[g] + 1$, but
$E[\log \hat g] \neq \log E[g]$. Going forward through the equations, each value is free of expectations, linear in
them, or neither.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from expectax.ppl import ControlFlowError, _jax
from expectax.ppl._branch import branches_of

_LINEAR = {
    "add", "add_any", "sub", "neg", "reduce_sum", "cumsum", "squeeze", "broadcast_in_dim", "reshape", "transpose", "copy",
    "copy_p", "name", "expectation", "concatenate", "pad", "slice", "rev", "expand_dims",
    "stop_gradient", "split", "stack",
}  # fmt: skip
_BILINEAR = {"mul", "dot_general"}
_FIRST = {"div": 0, "gather": 0, "dynamic_slice": 0}


class Use(enum.IntEnum):
    """How a value depends on nested expectations."""

    FREE = 0
    LINEAR = 1
    OTHER = 2


def expectation(function: Callable[..., Any]) -> Callable[..., Any]:
    r"""Return the expectation of a function with random choices, to be used linearly inside an objective.

    Args:
        function: a function (or objective) that makes choices and returns a scalar or an array.

    Returns:
        A function of the same arguments. Its value is an unbiased estimate of $E[f]$, its choices belong to the
        enclosing objective.

    Raises:
        ControlFlowError: at first use, if the objective is not linear in it: $\log E[f]$ has no unbiased estimate.

    Source: the nested $E$ of ADEV (Lew et al. 2023) and of programmable VI (Becker et al. 2024).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> flip = vi.expectation(lambda p: 2.0 * ex.sample("b", dist.Bernoulli(p)))
        >>> @vi.objective
        ... def outer(p):
        ...     return 3.0 * flip(p) + 1.0
        >>> float(vi.value_and_grad(outer)(0.25, jax.random.key(0))[1])
        6.0
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        where = _jax.caller()
        return jax.tree.map(lambda x: expectation_p.bind(x, where=where), function(*args, **kwargs))

    return call


def check_linear(jaxpr: Any) -> None:
    """Refuse an objective that is not linear in its nested expectations."""
    if not _jax.contains(jaxpr, expectation_p):
        return
    culprits: list[Any] = []
    (use,) = _through(jaxpr, [Use.FREE] * len(_jax.close(jaxpr)[0].invars), culprits)
    if use == Use.OTHER:
        places = [e.params["where"] for e in _expectations(jaxpr)]
        raise ControlFlowError(
            f"the objective is not linear in the expectation at {places[0]}: it enters {culprits[0].primitive.name!r} at "
            f"{_jax.place(culprits[0])}. An estimate there would be biased. Move the operation inside the expectation."
        )


def _expectations(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in _jax.close(jaxpr)[0].eqns:
        found += [eqn] if eqn.primitive is expectation_p else []
        for inner in _jax.sub_jaxprs(eqn):
            found += _expectations(inner)
    return found


def _through(jaxpr: Any, inputs: list[Use], culprits: list[Any]) -> list[Use]:
    opened = _jax.close(jaxpr)[0]
    known: dict[Any, Use] = dict(zip(opened.invars, inputs, strict=True))

    def read(atom: Any) -> Use:
        return Use.FREE if isinstance(atom, _jax.Literal) else known.get(atom, Use.FREE)

    for eqn in opened.eqns:
        outputs = _equation(eqn, [read(v) for v in eqn.invars], culprits)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in opened.outvars]


def _equation(eqn: Any, inputs: list[Use], culprits: list[Any]) -> list[Use]:
    name, worst = eqn.primitive.name, max(inputs, default=Use.FREE)
    if eqn.primitive is expectation_p:
        return [max(worst, Use.LINEAR)]
    if (inner := _jax.called_jaxpr(eqn)) is not None:
        return _through(inner, inputs, culprits)
    if eqn.primitive in _jax.SCAN:
        return _scan(eqn, inputs, culprits)
    if (branches := branches_of(eqn)) is not None and inputs[0] == Use.FREE:
        outputs = [_through(b, inputs[1:], culprits) for b in branches]
        return [max(uses) for uses in zip(*outputs, strict=True)]
    if worst == Use.FREE:
        return [Use.FREE] * len(eqn.outvars)
    among = [n for n, use in enumerate(inputs) if use != Use.FREE]
    linear = name in _LINEAR or (name in _BILINEAR and len(among) == 1) or (name in _FIRST and among == [_FIRST[name]])
    linear = linear or (name == "select_n" and 0 not in among)
    linear = linear or (name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact))
    if worst == Use.LINEAR and not linear:
        culprits.append(eqn)
    return [worst if linear else Use.OTHER] * len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Use], culprits: list[Any]) -> list[Use]:
    num_consts, num_carry = _jax.scan_sizes(eqn)
    uses = list(inputs)
    while True:
        found: list[Any] = []
        outputs = _through(eqn.params["jaxpr"], uses, found)
        carry = [max(a, b) for a, b in zip(uses[num_consts:][:num_carry], outputs, strict=False)]
        if carry == uses[num_consts:][:num_carry]:
            culprits += found
            return outputs
        uses[num_consts : num_consts + num_carry] = carry


def _abstract(value: Any, *, where: str) -> Any:
    del where
    return _jax.ShapedArray(value.shape, value.dtype)


def _batch(axis: Any, args: Any, dims: Any, *, where: str) -> Any:
    if dims[0] is None:
        return expectation_p.bind(*args, where=where), None
    return expectation_p.bind(*args, where=where), dims[0]


def _identity(value: Any, *, where: str) -> Any:
    del where
    return value


def _jvp(primals: Any, tangents: Any, *, where: str) -> Any:
    return expectation_p.bind(*primals, where=where), tangents[0]


expectation_p = _jax.define_primitive(
    "expectation",
    abstract=_abstract,
    batch=_batch,
    implementation=_identity,
    lowering=_jax.lower_as(_identity),
    jvp=_jvp,
)
