"""`fit`: stochastic gradient ascent on an objective, as compiled chunks of a loop."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import NonFiniteError
from expectax.ppl._compile import Static, compiled
from expectax.ppl._progress import chunks, progress_bar
from expectax.ppl._staging import as_data, check_key

from ._objective import Objective, first_nonfinite, gradient_step

_BLOCK = 64


class Fit(eqx.Module):
    """The result of `vi.fit`.

    Example: see `vi.fit`.

    Attributes:
        params: the final parameters (the last finite ones).
        values: the objective's estimate at each step done, shape `(num_steps,)`; nan where a step was not done.
        num_steps: how many steps were done.
        optimizer_state: the optimiser's final state.
        skipped: how many steps were left out for a value or gradient that was not finite.
    """

    params: Any
    values: Float[Array, " num_steps"]
    num_steps: int = eqx.field(static=True)
    optimizer_state: Any
    skipped: int = eqx.field(static=True)


class _Progress(eqx.Module):
    """The state of the loop: `bad` is the first step that was not finite, or -1.

    `bad_params` are its parameters, and `skipped` counts such steps; both are None if the loop stops there.
    """

    params: Any
    optimizer_state: Any
    values: Array
    bad: Array
    bad_params: Any
    skipped: Any


def fit(
    objective: Objective,
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: PRNGKeyArray,
    num_steps: int,
    num_samples: int = 1,
    on_nonfinite: Literal["stop", "skip", "raise"] = "stop",
    progress: bool = False,
) -> Fit:
    r"""Maximise an objective over its parameters.

    Args:
        objective: what to maximise.
        params: initial parameters, a pytree (an equinox module, a dict); entries that are not floats stay as they are.
        optimizer: any `optax` optimiser (it is given the gradient of minus the objective).
        key: a typed key; step `i` uses `jax.random.fold_in(key, i)`.
        num_steps: number of steps.
        num_samples: independent samples averaged in each step's gradient.
        on_nonfinite: what to do when a value or a gradient is not finite: `"stop"` warns and returns what was reached,
            `"skip"` leaves the step out, `"raise"` raises. All three keep the last finite parameters, and name the
            step and the first site that was not finite.
        progress: show a progress bar; it does not change the result.

    Returns:
        A `Fit`.

    Raises:
        TypeError: no parameter is a float.
        NonFiniteError: with `on_nonfinite="raise"`; its `result` is the `Fit` up to there.
        AddressError, ShapeError, SupportError, StrategyError: the objective is malformed.

    A second call with a new key, new parameters or new data of the same shapes compiles nothing.

    Example:
        >>> import jax, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def quadratic(mean):
        ...     return -(ex.sample("x", dist.Normal(mean, 1.0)) - 3.0) ** 2
        >>> fit = vi.fit(quadratic, 0.0, optax.adam(0.05), key=jax.random.key(0), num_steps=500, num_samples=16)
        >>> bool(abs(fit.params - 3.0) < 0.2)
        True
    """
    check_key(key)
    if on_nonfinite not in ("stop", "skip", "raise"):
        raise ValueError(f"on_nonfinite must be 'stop', 'skip' or 'raise', got {on_nonfinite!r}.")
    if num_steps < 1 or num_samples < 1:
        raise ValueError(f"num_steps and num_samples must be at least 1, got {num_steps} and {num_samples}.")
    length, count = chunks(num_steps)
    rule, stop = Static(optimizer), on_nonfinite != "skip"
    trained, rest = eqx.partition(as_data(params), eqx.is_inexact_array)
    if not jax.tree.leaves(trained):
        raise TypeError("vi.fit: no parameter is a float array, so there is nothing to fit. Write 0.0 instead of 0.")
    state = _start(rule, trained, count * length, stop)
    with progress_bar(num_steps, "fit", progress) as advance:
        for chunk in range(count):
            start = chunk * length
            end = min(start + length, num_steps)
            state = _run(objective, rule, state, rest, key, jnp.asarray([start, end], jnp.int32), num_samples, stop)
            if progress:
                advance(end - start, f"objective {float(jnp.nanmean(state.values[start:end])):.3f}")
            if stop and int(state.bad) >= 0:
                break
    return _finish(objective, state, rest, key, num_steps, num_samples, on_nonfinite)


@compiled
def _start(rule: Static, params: Any, size: int, stop: bool) -> _Progress:
    values = jnp.full(size + _BLOCK, jnp.nan, jnp.result_type(float))
    none = jnp.asarray(-1, jnp.int32)
    bad_params, skipped = (None, None) if stop else (params, jnp.asarray(0, jnp.int32))
    state = _Progress(params, rule.value.init(params), values, none, bad_params, skipped)
    # strong dtypes from the start, so that the first chunk and the later ones are one program
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype) if eqx.is_array(x) else x, state)


@compiled
def _run(
    objective: Objective, rule: Static, state: _Progress, rest: Any, key: Any, span: Any, num_samples: int, stop: bool
) -> _Progress:
    """Do the steps of a span; with `stop` the loop ends at the first step that is not finite.

    The values go through a block of `_BLOCK` numbers: XLA's CPU backend runs a loop whose arrays are all small
    without its thread pool, which for small models is twice as fast.
    """

    def going(carry: tuple[Any, _Progress], end: Any) -> Any:
        step, state = carry
        return (step < end) & ((state.bad < 0) | (not stop))

    def one(carry: tuple[Any, _Progress], first: Any) -> tuple[Any, _Progress]:
        step, state = carry
        key_step = jax.random.fold_in(key, step)
        return step + 1, _step(objective, rule.value, state, rest, step, step - first, key_step, num_samples)

    def block(carry: tuple[Any, _Progress]) -> tuple[Any, _Progress]:
        first, state = carry
        end = jnp.minimum(first + _BLOCK, span[1])
        inner = dataclasses.replace(state, values=jnp.full(_BLOCK, jnp.nan, state.values.dtype))
        step, inner = lax.while_loop(lambda c: going(c, end), lambda c: one(c, first), (first, inner))
        values = lax.dynamic_update_slice(state.values, inner.values, (first,))
        return step, dataclasses.replace(inner, values=values)

    return lax.while_loop(lambda c: going(c, span[1]), block, (span[0], state))[1]


def _step(
    objective: Objective, optimizer: Any, state: _Progress, rest: Any, step: Any, slot: Any, key: Any, num_samples: int
) -> _Progress:
    value, gradient = gradient_step(objective, eqx.combine(state.params, rest), key, num_samples)
    descent = jax.tree.map(jnp.negative, gradient)
    updates, optimizer_state = optimizer.update(descent, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        finite &= jnp.all(jnp.isfinite(leaf))
    kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, optimizer_state), (state.params, state.optimizer_state)
    )
    first = ~finite if state.skipped is None else (state.bad < 0) & ~finite
    return _Progress(
        *kept,
        values=state.values.at[slot].set(value),
        bad=jnp.where(first, step, state.bad),
        bad_params=jax.tree.map(lambda new, old: jnp.where(first, new, old), state.params, state.bad_params)
        if state.skipped is not None
        else None,
        skipped=None if state.skipped is None else state.skipped + (~finite).astype(jnp.int32),
    )


def _finish(
    objective: Objective, state: _Progress, rest: Any, key: Any, num_steps: int, num_samples: int, on_nonfinite: str
) -> Fit:
    bad = int(state.bad)
    done = num_steps if bad < 0 or on_nonfinite == "skip" else bad
    skipped = int(bad >= 0) if state.skipped is None else int(state.skipped)
    result = Fit(eqx.combine(state.params, rest), state.values[:num_steps], done, state.optimizer_state, skipped)
    if bad < 0:
        return result
    at = state.params if state.bad_params is None else state.bad_params
    site = first_nonfinite(objective, eqx.combine(at, rest), jax.random.fold_in(key, bad), num_samples)
    where = f"first at site {site!r}" if site else "though every site is finite: see the objective's own arithmetic"
    message = (
        f"vi.fit: the objective or its gradient was not finite at step {bad} of {num_steps}, {where}. "
        "Try a smaller learning rate, other initial parameters, or a guide inside the model's support."
    )
    if on_nonfinite == "raise":
        raise NonFiniteError(message, result)
    if on_nonfinite == "skip":
        message += f" {skipped} steps were left out (on_nonfinite='skip')."
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return result
