"""`from_numpyro`: a NumPyro model as a model of expectax, site by site and with the same density.

NumPyro sends a message for every statement through a stack of handlers. Ours is the outermost: when it sees a message,
the model's own plates, masks, scales and conditions have done their part.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import lax
from numpyro import distributions as dist
from numpyro import handlers, primitives

from . import _jax
from ._errors import AddressError, ControlFlowError, DistributionError, ExpectaxError, ShapeError
from ._masked import expand
from ._observe import Recorded, deterministic_p
from ._program import Model
from ._sample import bind_site, check_address

_MACHINERY = (*_jax._MACHINERY, os.path.dirname(str(numpyro.__file__)) + os.sep)


def from_numpyro(model_fn: Callable[..., Any]) -> Model:
    r"""Turn a NumPyro model function into a model of the same arguments and the same density.

    Args:
        model_fn: a function with `numpyro.sample`, `plate`, `deterministic`, `factor`, `handlers.mask`, `handlers.scale`
            and the control flow `scan` and `cond`. It may be wrapped in other handlers (`condition`, `substitute`,
            `reparam`, `lift`); it needs no `seed`.

    Returns:
        A `Model` with the sites' names. A site has its distribution's shape in all its plates; in a scan, time comes
        first. With `obs=` it is fixed, as by `observe`; with `obs=None` it is a choice, for `.given({"y": y})`. An
        observation larger than the site's batch makes the site as large; a smaller one is refused.

    Raises:
        ControlFlowError: when the model runs: a plate draws a subsample; `numpyro.prng_key`; a scan or cond under a
            plate, or under a handler that has no meaning for each step.
        DistributionError: a `numpyro.param` or `module` has no value: pass it as an argument.
        AddressError, ShapeError: a name has a `/` or is used twice; an observation or scale does not fit its site.

    $\log p$ equals `numpyro.infer.util.log_density` (Phan et al. 2019) inside the supports; outside it is minus
    infinity. A choice under a mask counts, and is `present`, only where the mask is set (NumPyro: flat elsewhere).
    `infer=` hints are ignored. A reversed scan's choices are in the order of time (NumPyro's `log_density`: of steps).

    Example:
        >>> import jax.numpy as jnp, numpyro, expectax as ex
        >>> from expectax import dist
        >>> def coins(n, y=None):
        ...     p = numpyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with numpyro.plate("tosses", n):
        ...         numpyro.sample("y", dist.Bernoulli(p), obs=y)
        >>> posterior = ex.from_numpyro(coins)(3).given({"y": jnp.array([1, 0, 1])})
        >>> round(float(posterior.log_density({"p": 0.5})), 4)
        -2.0794
    """
    if not callable(model_fn) or isinstance(model_fn, Model):
        raise TypeError(f"from_numpyro takes a function with numpyro.sample statements, got {model_fn!r}.")

    @functools.wraps(model_fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _Binder():
                return model_fn(*args, **kwargs)
        except NotImplementedError as error:  # numpyro's own refusal has no type and no place
            if isinstance(error, ExpectaxError) or "control flow" not in str(error):
                raise
            where = _place(reversed(list(traceback.walk_tb(error.__traceback__))))
            refusal = f"numpyro scan or cond at {where} stands under a numpyro.plate. Put the plate into its body."
            raise ControlFlowError(refusal) from error

    return Model(run)


class _Binder(primitives.Messenger):
    """Turns each message into equations of expectax, and lets none go on to handlers that enclose it."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            _sample(msg)
        elif msg["type"] == "deterministic":
            value = jnp.asarray(msg["value"])
            site = Recorded(_address(msg), (), value.shape, value.dtype, _place())
            msg["value"] = deterministic_p.bind(value, site=site)
        elif msg["type"] == "control_flow":
            stack = primitives._PYRO_STACK  # no public name tells which handlers a message has met
            _control_flow(msg, stack[stack.index(self) + 1 :])
        elif msg["type"] not in ("inspect", "subsample"):  # the handlers inside have answered those
            _fixed(msg)
        msg["stop"] = True


# --- sites ------------------------------------------------------------------------------------------------------


def _sample(msg: Any) -> None:
    address, where, value = _address(msg), _place(), msg["value"]
    d, mask = _unmasked(msg["fn"])
    auxiliary = isinstance(getattr(d, "base_dist", d), dist.Unit)  # a factor: its value has no elements
    if value is None:
        d = d.expand((*msg["kwargs"].get("sample_shape", ()), *d.batch_shape))
    else:
        value = jnp.zeros(d.shape()) if auxiliary else jnp.asarray(value)
        d = d.expand(_observed_batch(address, d, value, where))
    mask, scale = (_spread(x, tuple(d.batch_shape)) for x in (mask, msg.get("scale")))
    fixed, observed = value, bool(msg.get("is_observed")) and not auxiliary
    if value is not None and mask is not None:  # where it is masked, a nan would spoil derivatives
        with contextlib.suppress(NotImplementedError):
            fixed = jnp.where(expand(mask, value), value, jnp.asarray(d.support.feasible_like(value), value.dtype))
    bound = bind_site(address, d, where, value=fixed, mask=mask, scale=scale, observed=observed)
    if value is not None:  # the model goes on with what it gave, also where it is masked or of another dtype
        bound = lax.convert_element_type(bound, value.dtype)
        bound = bound if mask is None else jnp.where(expand(mask, value), bound, value)
    msg["value"] = bound


def _unmasked(d: Any) -> tuple[Any, Any]:
    """Return a distribution without its outermost masks, and their conjunction (None: all is counted)."""
    if not isinstance(d, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        return d, None
    inner, mask = _unmasked(d.base_dist)
    if isinstance(d, dist.ExpandedDistribution):
        return (d, None) if mask is None else (inner.expand(d.batch_shape), mask)
    own = None if d._mask is True else jnp.asarray(d._mask)
    return inner, own if mask is None else mask if own is None else own & mask


def _observed_batch(address: str, d: dist.Distribution, value: Any, where: str) -> Any:
    """Return the batch shape of a site that has this value; refuse a value that would be counted more than once."""
    event = tuple(d.event_shape)
    with contextlib.suppress(ValueError):
        batch = lax.broadcast_shapes(tuple(d.batch_shape), value.shape[: value.ndim - len(event)])
        if value.shape == (*batch, *event):
            return batch
    raise ShapeError(
        f"site {address!r} at {where} has batch shape {tuple(d.batch_shape)} and event shape {event}, obs {value.shape}; "
        "numpyro would broadcast one of them. Reshape obs, or put the site in the plate of its data."
    )


def _spread(x: Any, batch: tuple[int, ...]) -> Any:
    """Return a mask or scale over the whole batch, if it fits; `bind_site` refuses what does not."""
    with contextlib.suppress(ValueError):
        return x if x is None or jnp.ndim(x) == 0 else jnp.broadcast_to(x, batch)
    return x


# --- control flow -----------------------------------------------------------------------------------------------

_CARRIED = (handlers.mask, handlers.scale, handlers.scope)  # around each step they mean the same as around the whole
_NO_TRACE = types.SimpleNamespace(trace={})
_ANSWERED = (handlers.condition, handlers.substitute, handlers.seed, handlers.infer_config)


def _control_flow(msg: Any, enclosing: list[Any]) -> None:
    """Run a scan or cond as JAX's, with a binder inside; the results are numpyro's, with nothing in its trace."""
    name = msg["fn"].__name__.removesuffix("_wrapper")
    for handler in enclosing:
        array = any(jnp.ndim(getattr(handler, part, 0)) for part in ("mask", "scale"))
        if array or type(handler) not in _CARRIED + _ANSWERED:
            raise ControlFlowError(
                f"numpyro {name} at {_place()} stands under handlers.{type(handler).__name__}{' with an array' * array}, "
                "whose meaning for each step is not known. Put the handler into the body."
            )
    carried = [handler for handler in enclosing if type(handler) in _CARRIED]
    inside = functools.partial(_inside, carried, msg["kwargs"]["substitute_stack"])
    if name == "cond":
        pred, *bodies, operand = msg["args"]
        msg["value"] = lax.cond(pred, *(functools.partial(inside, f, None, None) for f in bodies), operand), _NO_TRACE
        return
    f, init, xs, length, reverse = msg["args"]
    length = jnp.shape(jax.tree.leaves(xs)[0])[0] if length is None else length
    steps = jnp.arange(length)[:: -1 if reverse else 1]  # numpyro counts steps, not places, in a handler's values
    carry, ys = lax.scan(lambda c, x: inside(f, x[0], length, c, x[1]), init, (steps, xs), length, reverse)
    msg["value"] = (length, None, carry), (_NO_TRACE, ys)


def _inside(carried: list[Any], given: Any, f: Any, index: Any, length: Any, *operands: Any) -> Any:
    """Run a body whose messages go to a binder of its own, under the enclosing handlers' part in it."""
    for kind, data in given:
        f = getattr(handlers, kind)(f, **{f"{kind}_fn": functools.partial(_given, data, index, length)})
    with contextlib.ExitStack() as stack:
        for handler in (_Binder(), *carried):
            stack.enter_context(handler)
        return f(*operands)


def _given(data: Any, index: Any, length: Any, msg: Any) -> Any:
    """Return the value that a handler around the control flow has for one site (of one step)."""
    if index is not None and msg["type"] != "sample":
        return None
    value: Any = data(msg) if callable(data) else data.get(msg["name"])
    if value is None or index is None:
        return value
    shape = (*msg["kwargs"]["sample_shape"], *msg["fn"].shape())
    if jnp.ndim(value) == len(shape):
        return value
    if jnp.ndim(value) == len(shape) + 1 and jnp.shape(value)[0] == length:
        return jnp.asarray(value)[index]
    raise ShapeError(f"{_met(msg)}: a handler around its scan gives {jnp.shape(value)}, give {(length, *shape)}.")


# --- what is refused, and places --------------------------------------------------------------------------------

_REFUSED = {
    "plate": "it draws a subsample anew in each run, which has no density. Pass the batch as an argument, and write "
    "numpyro.plate(name, len(batch)) and numpyro.handlers.scale(scale=size / len(batch)).",
    "param": "a parameter, or a numpyro.module's, is no choice. Pass it as an argument of the model, or give it a value "
    "(numpyro.handlers.substitute) or a prior (numpyro.handlers.lift).",
    "prng_key": "randomness without a site (also a choice under handlers.block or handlers.uncondition) has no density. "
    "Make it a numpyro.sample, or pass a key as an argument.",
}


def _fixed(msg: Any) -> None:
    """Refuse a statement to which no handler of the model has given a value."""
    if msg["type"] not in _REFUSED or msg["value"] is None:
        error = DistributionError if msg["type"] == "param" else ControlFlowError
        raise error(f"{_met(msg)}: {_REFUSED.get(msg['type'], 'it has no meaning in expectax. Remove it.')}")


def _met(msg: Any) -> str:
    return f"numpyro {msg['type']} {msg.get('name', '')!r} at {_place()}"


def _address(msg: Any) -> str:
    if "/" in str(msg["name"]):
        raise AddressError(f"{_met(msg)}: an address has no '/'. Rename it, or use handlers.scope(..., divider='.').")
    check_address(msg["name"], _place())
    return msg["name"]


def _place(frames: Iterable[Any] | None = None) -> str:
    """Return `file:line` of the nearest frame outside the machinery, of which numpyro is a part here."""
    for frame, line in traceback.walk_stack(None) if frames is None else frames:
        if not frame.f_code.co_filename.startswith(_MACHINERY):
            return f"{frame.f_code.co_filename}:{line}"
    return "unknown"
