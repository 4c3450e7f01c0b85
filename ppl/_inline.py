"""Writing out calls that only wrap (`jit`, `checkpoint`), so that a scan inside them is in view."""

from __future__ import annotations

from typing import Any

import jax

from . import _jax
from ._nesting import scope_address
from ._sample import sample_p


def inline_calls(jaxpr: Any, args: Any) -> Any:
    """Return a closed jaxpr like `jaxpr` without wrapping calls around sites; nested models stay as they are."""

    def run(jaxpr: Any, args: Any) -> list[Any]:
        env = _jax.Environment.of(jaxpr, args)
        opened = _jax.close(jaxpr)[0]
        for eqn in opened.eqns:
            values = [env.read(v) for v in eqn.invars]
            inner = _jax.called_jaxpr(eqn)
            written = inner is not None and _jax.holds(eqn, sample_p) and scope_address(eqn) is None
            env.update(zip(eqn.outvars, run(inner, values) if written else _jax.bind(eqn, values), strict=True))
        return [env.read(v) for v in opened.outvars]

    return jax.make_jaxpr(lambda *xs: run(jaxpr, xs))(*args)
