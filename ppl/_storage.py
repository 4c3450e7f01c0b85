"""Traces in files, without pickle: reading one runs no code, and a file that does not fit is refused."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import zipfile
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import _jax
from ._choices import check_values
from ._errors import StorageError, SupportError
from ._nested import leaves_of, nested
from ._program import Program
from ._staging import stage
from ._trace import Trace, finish
from ._visitors import assessing

_FORMAT = "expectax trace"
_VERSION = 1
_HEADER = "header.json"
_MOST_HEADER_BYTES = 2**24
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a damaged or hostile file may raise."""


def save_trace(trace: Trace, path: Any) -> None:
    """Write the choices and the log density of one trace; see `Trace.save`."""
    if jnp.ndim(trace.log_density) != 0:
        raise StorageError(f"save at {_jax.caller()}: this is a batch of traces; save them one by one.")
    arrays = {p: np.asarray(value) for p, value in leaves_of(trace.choices)}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": getattr(trace.program.model, "__name__", "?"),
        "log_density": float(trace.log_density),
        "choices": {p: {"shape": list(a.shape), "dtype": a.dtype.str} for p, a in arrays.items()},
    }
    temporary = f"{os.fspath(path)}.{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_HEADER, json.dumps(header))
            for number, array in enumerate(arrays.values()):
                archive.writestr(f"{number}.bin", np.ascontiguousarray(array).tobytes())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_trace(path: Any, program: Program) -> Trace:
    """Read a trace that `trace.save(path)` wrote, for a program like the one that made it.

    Args:
        path: a file name. The file may be anybody's: no code of it is run, and nothing is read that does not fit.
        program: the bound program; files hold no code, so it must be given.

    Returns:
        The trace, scored anew.

    Raises:
        StorageError: the file is none of ours, damaged, of a later version, or of another program (other addresses,
            shapes, or another log density).

    Example:
        >>> import jax, os, tempfile, expectax as ex
        >>> from expectax import dist
        >>> normal = ex.model(lambda: ex.sample("x", dist.Normal(0.0, 1.0)))
        >>> trace = normal().simulate(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "trace.zip")
        ...     trace.save(file)
        ...     again = ex.load_trace(file, normal())
        >>> bool(again["x"] == trace["x"])
        True
    """
    staged, where = stage(program), _jax.caller()
    try:
        with zipfile.ZipFile(path) as archive:
            header = _header(archive, path)
            arrays = _arrays(archive, header, dict(leaves_of(staged.sites)), path)
            stored = float(header["log_density"])
    except (StorageError, FileNotFoundError):
        raise
    except (*_DAMAGED, OSError) as error:
        raise StorageError(f"load_trace at {where}: {path} is damaged or no trace of expectax ({error}).") from error
    try:
        given = check_values(staged.table, nested(arrays.items()), "load_trace", where, complete=True)
    except SupportError as error:
        raise StorageError(
            f"load_trace at {where}: {path} holds values that the program cannot have: {error}"
        ) from error
    if any(entry.estimated for _, entry in leaves_of(staged.sites)):  # the estimate that the trace was made with stays
        trace = finish(program, staged, staged.run(assessing, jax.random.key(0), given))
        return eqx.tree_at(lambda t: t.log_density, trace, jnp.asarray(stored, trace.log_density.dtype))
    trace = finish(program, staged, staged.run(assessing, given=given))
    found = float(trace.log_density)
    close = stored == found or math.isclose(stored, found, rel_tol=1e-4, abs_tol=1e-3) or stored != stored
    if not close:
        raise StorageError(
            f"load_trace at {where}: the trace in {path} had log density {stored}, but this program gives it {found}. It was made "
            "by a program with other arguments, or the model has changed."
        )
    return trace


def _header(archive: zipfile.ZipFile, path: Any) -> dict[str, Any]:
    if archive.getinfo(_HEADER).file_size > _MOST_HEADER_BYTES:
        raise StorageError(f"load_trace at {_jax.caller()}: the header of {path} is too large to be ours.")
    header = json.load(io.BytesIO(archive.read(_HEADER)))
    if header["format"] != _FORMAT:
        raise StorageError(f"load_trace at {_jax.caller()}: {path} is no trace of expectax.")
    if not isinstance(header["version"], int) or header["version"] > _VERSION:
        raise StorageError(
            f"load_trace at {_jax.caller()}: {path} has version {header['version']!r}; this expectax reads up to {_VERSION}. Update it."
        )
    return header


def _arrays(archive: zipfile.ZipFile, header: Any, sites: dict[str, Any], path: Any) -> dict[str, np.ndarray]:
    """Read the arrays whose addresses, shapes and sizes are the program's."""
    described = header["choices"]
    if set(described) != set(sites):
        raise StorageError(
            f"load_trace at {_jax.caller()}: {path} holds choices {sorted(described)}, the program has {sorted(sites)}. Load it with the "
            "program that made it."
        )
    expected = {_HEADER, *(f"{number}.bin" for number in range(len(described)))}
    if sorted(archive.namelist()) != sorted(expected):
        raise StorageError(f"load_trace at {_jax.caller()}: {path} holds other files than a trace does.")
    arrays = {}
    for number, (address, form) in enumerate(described.items()):
        shape, dtype = tuple(form["shape"]), np.dtype(form["dtype"])
        if shape != sites[address].shape or dtype.kind not in "biuf":
            raise StorageError(
                f"load_trace at {_jax.caller()}: in {path} site {address!r} has shape {shape} ({dtype}), in the program "
                f"{sites[address].shape} ({sites[address].dtype})."
            )
        if archive.getinfo(f"{number}.bin").file_size != math.prod(shape) * dtype.itemsize:
            raise StorageError(
                f"load_trace at {_jax.caller()}: {path} is damaged: the size of site {address!r} is wrong."
            )
        arrays[address] = np.frombuffer(archive.read(f"{number}.bin"), dtype).reshape(shape)
    return arrays
