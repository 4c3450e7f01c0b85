"""Traces: one run of a program, and how to change it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import _edit as edit
from . import _jax
from ._errors import AddressError, nearest
from ._evaluate import Outcome
from ._nested import Choices, leaves_of, merged, nested
from ._staging import Staged, check_key, scalar

if TYPE_CHECKING:
    from ._program import Program


class Trace(eqx.Module):
    """One run of a program: what was chosen, what was returned, and how dense it was.

    Example: see `Program`.

    Attributes:
        program: the bound program that ran.
        choices: nested dict of address to value.
        retval: what the model returned.
        log_density: log joint density of the choices, a scalar.
        present: nested dict of booleans, one per element, for those choices that stand in a branch or have a mask:
            was the choice made? What was not made has some value that does not count.
        deterministic: nested dict of the values that `deterministic` recorded.
    """

    program: Program
    choices: Choices
    retval: Any
    log_density: Float[Array, ""]
    present: Choices = eqx.field(default_factory=dict)
    deterministic: Choices = eqx.field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments that the program was bound to."""
        return self.program.args

    def update(
        self, key: PRNGKeyArray, constraints: Choices, *args: Any, **kwargs: Any
    ) -> tuple[Trace, Float[Array, ""], Choices]:
        r"""Change some choices, or the arguments, and keep the rest.

        Args:
            key: a typed key, for sites that have no old value of the right shape.
            constraints: nested dict of new values.
            *args: new arguments of the model; none for the old ones.
            **kwargs: new keyword arguments.

        Returns:
            `(trace, log_weight, discard)`: the new trace $t'$; $\log p(t') - \log p(t)$ less the log density of
            what had to be drawn; and the old values that were replaced or dropped. When a branch flips, the choices
            of the new branch are drawn if they are not given, and those of the old one are discarded; of a choice in
            a branch the discarded part is `Masked`. `there.update(key, discard)` leads back.

        Raises:
            AddressError, ShapeError, SupportError: a constraint does not fit the program.

        Example:
            >>> import jax, expectax as ex
            >>> from expectax import dist
            >>> @ex.model
            ... def normal(scale):
            ...     ex.sample("x", dist.Normal(0.0, scale))
            >>> key = jax.random.key(0)
            >>> trace = normal(1.0).simulate(key)
            >>> there, weight, discard = trace.update(key, {"x": 2.0})
            >>> back, opposite, _ = there.update(key, discard)
            >>> bool(abs(weight + opposite) < 1e-6)
            True
        """
        check_key(key)
        program = self.program.model(*args, **kwargs) if args or kwargs else self.program
        staged, outcome, log_weight, discard = edit.update(self, key, constraints, program)
        return finish(program, staged, outcome), log_weight, discard

    def regenerate(self, key: PRNGKeyArray, selection: Any) -> tuple[Trace, Float[Array, ""]]:
        r"""Draw the selected choices anew from the prior, along the run, and keep the rest.

        Args:
            key: a typed key.
            selection: a `Selection` made by `select`, an address or several (`"sub/x"` in nested models; `"sub"` for
                all of one).

        Returns:
            `(trace, log_weight)` with the weight of a Metropolis-Hastings move,
            $\log \frac{p(t')\,q(t \mid t')}{p(t)\,q(t' \mid t)}$: accept with probability $\min(1, e^w)$.

        Raises:
            AddressError: an address is unknown.

        Example: as `update`, with `trace.regenerate(key, ["x"])`.
        """
        check_key(key)
        staged, outcome, log_weight = edit.regenerate(self, key, selection)
        return finish(self.program, staged, outcome), log_weight

    def project(self, selection: Any) -> Float[Array, ""]:
        """Return the sum of the log densities of the selected sites.

        Args:
            selection: as in `regenerate`.

        Raises:
            AddressError: an address is unknown.

        Example: as `update`, with `trace.project(["x"])`.
        """
        return edit.project(self, selection)

    def __getitem__(self, address: str) -> Any:
        """Return the choice, or the recorded value, at an address or path (`trace["mu"]`, `trace["sub/x"]`)."""
        found: Any = merged(self.deterministic, self.choices)
        for name in str(address).split("/"):
            if not isinstance(found, dict) or name not in found:
                known = [path for tree in (self.choices, self.deterministic) for path, _ in leaves_of(tree)]
                raise AddressError(
                    f"at {_jax.caller()}: the trace has no address {address!r}.{nearest(address, known)}"
                )
            found = found[name]
        return found

    def save(self, path: Any) -> None:
        """Write the trace to a file without pickle; see `load_trace`, which reads it back.

        Args:
            path: a file name; the file is replaced at once or not at all.

        Example: see `load_trace`.
        """
        from ._storage import save_trace

        save_trace(self, path)

    def __repr__(self) -> str:
        """Show a table of the choices."""
        return shown(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(shown(self))}</pre>"


def finish(program: Program, staged: Staged, outcome: Outcome) -> Trace:
    """Return the trace of a walk."""
    conditional = {path for path, entry in leaves_of(staged.table) if entry.conditional}
    present = nested((path, flags) for path, flags in leaves_of(outcome.present) if path in conditional)
    retval = staged.returned(outcome.outputs)
    return Trace(program, outcome.choices, retval, scalar(outcome.log_density), present, outcome.deterministic)


def shown(trace: Trace) -> str:
    """Return a trace as a table: address, shape, dtype, value or range."""
    lines = [f"trace of {trace.program!r}, log_density {_number(trace.log_density)}"]
    present = dict(leaves_of(trace.present))
    rows = [(path, value, "") for path, value in leaves_of(trace.choices)]
    rows += [(path, value, " (deterministic)") for path, value in leaves_of(trace.deterministic)]
    width = max((len(path) for path, _, _ in rows), default=0)
    for path, value, note in rows:
        if path in present:
            note += f" (present: {_number(present[path])})"
        lines.append(f"  {path:<{width}}  {value.dtype}{list(value.shape)}  {_number(value)}{note}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    """Return a short form of an array: itself, or its range."""
    if _jax.is_traced(value):
        return "(traced)"
    if not jnp.issubdtype(value.dtype, jnp.number) and value.dtype != bool:
        return "..."
    array = np.asarray(value)
    if array.size <= 6:
        return np.array2string(array, precision=4, threshold=6).replace("\n", "")
    if array.dtype == bool:
        return f"{int(array.sum())} of {array.size}"
    return f"mean {array.mean():.4g}, from {array.min():.4g} to {array.max():.4g}"
