"""Who made an equation: the frames of the code behind it, on through calls that were written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


class _Called(str):
    """The name of a call that was written out, in the name stack of the equations it was made of."""

    traceback: Any = None


def written_out(eqn: Any) -> Any:
    """Return a context in which equations remember the call that they are written out of."""
    name = _Called(f"{eqn.primitive.name}({eqn.params.get('name', '')})")
    name.traceback = eqn.source_info.traceback
    return jax.named_scope(name)


def frames(eqn: Any) -> Iterator[tuple[str, str, int]]:
    """Yield `(file, function, line)` of the code that made an equation, innermost first.

    JAX keeps no frames outside a `jit` for the equations inside, so one call's frames follow the other's.
    """
    scopes = [getattr(scope, "name", None) for scope in eqn.source_info.name_stack.stack]
    calls = [name.traceback for name in reversed(scopes) if isinstance(name, _Called)]
    for traceback in (eqn.source_info.traceback, *calls):
        if traceback is not None:
            for code, position in zip(*traceback.raw_frames(), strict=True):
                yield code.co_filename, code.co_qualname, type(traceback).code_addr2line(code, position)
