r"""Sums in loops: a scan's carry that only adds up, $c_{t+1} = c_t + x_t$, is $c_0 + \sum_t x_t$.

Written as a sum of outputs, each step's part is a term of its own, which is charged to the choices of its step; as a carry
all steps would be one term, charged to all of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from expectax.ppl import _jax


class Sum(NamedTuple):
    """A carry that adds up: its place, the equations of its additions, and what they add."""

    carry: int
    additions: frozenset[int]
    parts: tuple[Any, ...]


def sums_of(closed: Any, num_carry: int) -> list[Sum]:
    """Return the carries of a body `(carry, x) -> (carry, y)` that add up and that nothing else reads."""
    opened = closed.jaxpr
    producers = {v: i for i, eqn in enumerate(opened.eqns) for v in eqn.outvars}
    atoms = [v for eqn in opened.eqns for v in eqn.invars] + list(opened.outvars)
    uses = Counter(v for v in atoms if not isinstance(v, _jax.Literal))
    found = (_sum(opened, producers, uses, n) for n in range(num_carry))
    return [s for s in found if s is not None]


def _sum(opened: Any, producers: dict[Any, int], uses: Counter[Any], carry: int) -> Sum | None:
    start, value = opened.invars[carry], opened.outvars[carry]
    if uses[start] != 1 or not jnp.issubdtype(start.aval.dtype, jnp.inexact):
        return None
    additions: list[int] = []
    parts: list[Any] = []
    while value is not start:  # back through c + x + y + ...
        i = _linear(opened, producers, value)
        if i is None or uses[value] != 1:
            return None
        inner = [v for v in opened.eqns[i].invars if _reaches(opened, producers, v, start)]
        if len(inner) != 1:
            return None
        additions.append(i)
        parts += [v for v in opened.eqns[i].invars if v is not inner[0]]
        value = inner[0]
    return Sum(carry, frozenset(additions), tuple(parts)) if parts else None


def _reaches(opened: Any, producers: dict[Any, int], value: Any, start: Any) -> bool:
    """Tell whether a value is made of `start` by additions."""
    if value is start:
        return True
    i = _linear(opened, producers, value)
    return i is not None and any(_reaches(opened, producers, v, start) for v in opened.eqns[i].invars)


def _linear(opened: Any, producers: dict[Any, int], value: Any) -> int | None:
    """Return the equation that makes a value by an addition, or by a change of type that is none."""
    i = None if isinstance(value, _jax.Literal) else producers.get(value)
    if i is None:
        return None
    eqn: Any = opened.eqns[i]
    same = eqn.primitive.name in ("convert_element_type", "copy") and jnp.result_type(
        eqn.invars[0].aval
    ) == jnp.result_type(value.aval)
    return i if same or eqn.primitive.name in ("add", "add_any") else None


def scan_with_sums(
    closed: Any, structure: Any, sums: list[Sum], carry: list[Any], xs: list[Any], **options: Any
) -> tuple[list[Any], Any]:
    """Run a scan whose carries `sums` are summed outside of it; see `lax.scan`.

    `closed` is the body as a jaxpr of flat carry and inputs, `structure` that of its outputs after the carry.
    """
    num_carry, summed = len(carry), {s.carry for s in sums}
    skipped = frozenset(i for s in sums for i in s.additions)
    kept = [n for n in range(num_carry) if n not in summed]

    def step(some: list[Any], x: list[Any]) -> Any:
        whole = [jnp.zeros_like(c) for c in carry]
        for n, c in zip(kept, some, strict=True):
            whole[n] = c
        env, opened = _jax.Environment.of(closed, [*whole, *x]), closed.jaxpr
        for i, eqn in enumerate(opened.eqns):
            if i not in skipped:
                env.update(zip(eqn.outvars, _jax.bind(eqn, [env.read(v) for v in eqn.invars]), strict=True))
        parts = [sum((env.read(v) for v in s.parts[1:]), env.read(s.parts[0])) for s in sums]
        return [env.read(opened.outvars[n]) for n in kept], ([env.read(v) for v in opened.outvars[num_carry:]], parts)

    last, (ys, parts) = jax.lax.scan(step, [carry[n] for n in kept], xs, **options)
    result = list(carry)
    for n, c in zip(kept, last, strict=True):
        result[n] = c
    for s, part in zip(sums, parts, strict=True):
        result[s.carry] = carry[s.carry] + jnp.sum(part, axis=0)
    return result, jax.tree.unflatten(structure, ys)
