r"""Control flow around sites: `cond`, `switch`, `bounded_while`, with the signatures of `jax.lax`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax


def cond(pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any) -> Any:
    r"""Run one of two functions, which may hold sites: `jax.lax.cond`, over lanes too.

    Only the branch that is taken scores: with predicate $b$, $\log p = b \log p_1 + (1 - b) \log p_0$. The choices of
    both branches enter the trace; `trace.present` tells which were made. An address may stand in both branches, with
    one shape and dtype. (`jax.lax.cond` itself means the same in a model, also under `jax.vmap`.)

    Args:
        pred: a boolean scalar, traced or not.
        true_fun: called as `true_fun(*operands)` where `pred` holds.
        false_fun: called otherwise; it returns the same shapes and dtypes.
        *operands: arguments, pytrees of arrays.

    Returns:
        What the branch that is taken returns.

    Raises:
        TypeError: the branches return different shapes or dtypes.
        AddressError, ShapeError: when the model runs: an address is used with different shapes in the branches.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def slab():
        ...     on = ex.sample("on", dist.Bernoulli(0.5))
        ...     return ex.cond(on == 1, lambda: ex.sample("x", dist.Normal(0.0, 1.0)), lambda: 0.0)
        >>> round(float(slab().assess({"on": 0, "x": 7.0})[0]), 4)
        -0.6931
    """
    return lax.cond(pred, true_fun, false_fun, *operands)


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """Run one of several functions, which may hold sites: `jax.lax.switch`, over lanes too.

    Args:
        index: an integer scalar; clamped into the range of the branches.
        branches: functions, called as `branch(*operands)`, that return the same shapes and dtypes.
        *operands: arguments, pytrees of arrays.

    Returns:
        What the branch that is taken returns.

    Raises:
        TypeError: the branches return different shapes or dtypes.

    See `cond` for what the trace holds.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def mixture():
        ...     k = ex.sample("k", dist.Categorical(jax.numpy.ones(3) / 3))
        ...     return ex.switch(k, [lambda m=m: ex.sample("x", dist.Normal(m, 1.0)) for m in (-5.0, 0.0, 5.0)])
        >>> round(float(mixture().assess({"k": 2, "x": 5.0})[0]), 4)
        -2.0176
    """
    return lax.switch(index, branches, *operands)


def bounded_while(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any, *, max_steps: int
) -> Any:
    r"""Repeat a body, which may hold sites, while a condition holds, at most `max_steps` times.

    A loop without a bound has no trace of a fixed shape; this one is a scan of `max_steps` steps, of which those after
    the end are masked: the choices get a leading axis of length `max_steps`, and `trace.present` tells which steps ran.

    Args:
        cond_fun: `cond_fun(state)` returns a boolean scalar.
        body_fun: `body_fun(state)` returns the next state, of the same shapes and dtypes.
        init_val: the first state.
        max_steps: the greatest number of steps. A run that would go on is cut off there: give the bound a probability
            that does not matter, or check `cond_fun` of the result.

    Returns:
        The last state.

    Raises:
        ValueError: `max_steps` is not a positive whole number.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def geometric(p):
        ...     def toss(state):
        ...         tails, _ = state
        ...         heads = ex.sample("heads", dist.Bernoulli(p))
        ...         return tails + 1 - heads, heads
        ...     return ex.bounded_while(lambda s: s[1] == 0, toss, (0, 0), max_steps=10)[0]
        >>> trace = geometric(0.5).simulate(jax.random.key(1))
        >>> int(trace.present["heads"].sum()) == int(trace.retval) + 1
        True
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, (int, np.integer)) or max_steps < 1:
        raise ValueError(f"bounded_while at {_jax.caller()}: max_steps is a positive whole number, got {max_steps!r}.")
    init_val = jax.tree.map(jnp.asarray, init_val)

    def step(state: Any, _: Any) -> tuple[Any, None]:
        return lax.cond(cond_fun(state), body_fun, lambda s: s, state), None

    return lax.scan(step, init_val, length=int(max_steps))[0]
