"""Common mistakes in a model's Python, which JAX or NumPyro would report in terms of their own insides."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpyro

from . import _jax
from ._errors import ControlFlowError, DistributionError, OutsideModelError

_NEED_NUMBERS = (
    jax.errors.ConcretizationTypeError,  # also that of a truth value
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_NUMPYRO = os.path.dirname(os.path.abspath(numpyro.__file__))
_LIBRARIES = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what to do where a model asks for the numbers of a traced value, or samples by NumPyro's `sample`."""
    try:
        yield
    except _NEED_NUMBERS as error:
        raise _numberless(error) from error
    except TypeError as error:
        if str(error).startswith("Shapes must be 1D sequences of concrete values"):
            raise _numberless(error) from error
        raise
    except AssertionError as error:
        files = [frame.f_code.co_filename for frame, _ in _frames(error)]
        if error.args or not files[-1].startswith(_NUMPYRO) or os.path.join(_NUMPYRO, "primitives.py") not in files:
            raise
        raise OutsideModelError(
            f"at {_raised_at(error)}: numpyro's own sample and plate do nothing in an expectax model. Write "
            "ex.sample(address, distribution) and jax.vmap, or turn the whole NumPyro model into one by ex.from_numpyro."
        ) from error


def _numberless(error: BaseException) -> ControlFlowError:
    return ControlFlowError(
        f"at {_raised_at(error)}: Python asks for a number here (if, while, range, float, int, a size, numpy, an index of "
        "booleans), but choices and what is computed from them, arrays and float arguments have none while the model is "
        "read: it is read once for all values. Choose by ex.cond, ex.switch or jax.numpy.where, repeat by lax.scan, "
        "jax.vmap or ex.bounded_while, compute with jax.numpy; pass a size as an int, which is a fixed argument."
    )


def _frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _raised_at(error: BaseException) -> str:
    """Return `file:line` of the last of the user's own frames that an error came through."""
    place = _jax.caller()
    for frame, line in _frames(error):
        file = frame.f_code.co_filename
        if not _jax.is_machinery(file) and not any(folder in file for folder in _LIBRARIES):
            place = f"{file}:{line}"
    return place


# --- distributions that close over values of the model ----------------------------------------------------------


def check_closed(fixed: Any, address: str, where: str, drawn: bool = False) -> None:
    """Refuse a distribution whose functions hold values of the model: they are dead when it is used.

    `fixed` is the distribution without its parameters. What is being `drawn` may hold no traced value at all: JAX
    could neither map nor differentiate it.
    """
    for value in _held(fixed):
        if _jax.is_traced(value) if drawn else _jax.dies_with_the_model(value):
            raise DistributionError(
                f"site {address!r} at {where}: a function of the distribution {type(fixed).__name__} closes over a traced value "
                f"({jax.typeof(value)}), such as another site's, which is no longer there when the function is called. "
                "Pass it as a parameter: ex.distribution(lambda key, a: ..., lambda x, a: ...)(a); in place of a "
                "distribution of numpyro that takes a function write one by ex.distribution."
            )


def _held(value: Any, limit: int = 1000) -> Iterator[Any]:
    """Yield what a value holds in its functions' closures, its containers and attributes, up to a number of things."""
    stack, seen = [value], set()
    while stack and len(seen) < limit:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(value))
        yield value
        if not _jax.is_array(value):
            stack.extend(_parts(value))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, types.FunctionType):
        filled = (cell for cell in value.__closure__ or () if cell != types.CellType())
        return [*(cell.cell_contents for cell in filled), *(value.__defaults__ or ()), value.__kwdefaults__]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())
