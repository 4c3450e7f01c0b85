"""Malformed programs, inputs and files: each raises the right error, which says what is wrong and where."""

import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import malformed
import malformed_programs
import malformed_values
from expectax import dist, ppl
from expectax.ppl import StorageError
from malformed import KEY, line, nest, own_places, trace

# --- files ------------------------------------------------------------------------------------------------------------

FILES: list[Any] = []


def stored(compression: int = zipfile.ZIP_STORED, **changes: Any) -> bytes:
    """Return the bytes of a saved trace of `line`, with some entries of its header changed (None: left out)."""
    with tempfile.TemporaryDirectory() as folder:
        file, other = Path(folder) / "trace", Path(folder) / "other"
        trace().save(file)
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", compression) as new:
            header = json.loads(old.read("header.json")) | changes
            new.writestr("header.json", json.dumps({k: v for k, v in header.items() if v is not None}))
            for name in old.namelist()[1:]:
                new.writestr(name, old.read(name))
        return other.read_bytes()


def described(**changes: Any) -> bytes:
    """Return the bytes of a trace whose header describes `height` in another way."""
    form = {"shape": [], "dtype": "<f4"}
    return stored(choices={"slope": form, "height": {"shape": [4], "dtype": "<f4"} | changes, "noise": form})


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def bomb() -> bytes:
    """Return a small zip file whose header is 32 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bomb"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.json", b" " * 2**25)
        return file.read_bytes()


def encrypted() -> bytes:
    """Return a trace of which one entry says that it is encrypted."""
    data = bytearray(stored())
    data[data.find(b"PK\x03\x04") + 6] |= 1
    data[data.find(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def load(content: Callable[[], bytes], program: Any = line) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wanted"
        file.write_bytes(content())
        ppl.load_trace(file, program())


def bad(name: str, *fragments: str, place: bool = False) -> Any:
    return malformed.bad(FILES, f"file: {name}", StorageError, *fragments, place=place)


bad("empty", "wanted", "damaged")(load, lambda: b"")
bad("truncated", "wanted", "damaged")(load, lambda: stored()[:-30])
bad("half", "wanted", "damaged")(load, lambda: stored()[:300])
bad("a pickle", "wanted", "damaged")(load, lambda: pickle.dumps({"slope": 0.0}))
bad("one byte changed", "wanted", "CRC")(load, lambda: flipped(stored(), stored().find(b"0.bin") + 5))
bad("another format", "wanted", "no trace of expectax")(load, lambda: stored(format="a picture"))
bad("a later version", "wanted", "version 2", "Update")(load, lambda: stored(version=2))
bad("a version that is no number", "wanted", "version 'x'")(load, lambda: stored(version="x"))
bad("a header of 32 MiB", "wanted", "header", "too large")(load, bomb)
bad("a size of a terabyte", "'height'", "(250000000000,)", "(4,)")(load, lambda: described(shape=[250_000_000_000]))
bad("a negative size", "'height'", "(-4,)", "(4,)")(load, lambda: described(shape=[-4]))
bad("a column", "'height'", "(4, 1)", "(4,)")(load, lambda: described(shape=[4, 1]))
bad("Python objects", "'height'", "object")(load, lambda: described(dtype="|O"))
bad("numbers of another size", "'height'", "size")(load, lambda: described(dtype="<f8"))
bad("no dtype", "damaged", "nope")(load, lambda: described(dtype="nope"))
bad("of another program", "'height'", "'walk'")(load, stored, nest)
bad("another log density", "log density -5.0", "other arguments")(load, lambda: stored(log_density=-5.0))
bad("a batch of traces", "one by one", place=True)(
    lambda: jax.vmap(line().simulate)(jax.random.split(KEY, 2)).save("never")
)
bad("no log density", "damaged")(load, lambda: stored(log_density=None))
bad("a log density in words", "damaged")(load, lambda: stored(log_density="low"))
bad("choices in a list", "damaged")(load, lambda: stored(choices=["slope", "height", "noise"]))
bad("encrypted", "damaged")(load, encrypted)
bad("badly compressed", "damaged")(load, lambda: flipped(stored(zipfile.ZIP_DEFLATED), 60))
bad("where", "load_trace", place=True)(lambda: load(lambda: b""))

# --- the test -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", malformed_programs.CASES + malformed_values.CASES + FILES)
def test_malformed(case):
    with pytest.raises(case.error) as caught:
        case.function(*case.args)
    message = str(caught.value)
    assert all(fragment in message for fragment in case.fragments), message
    if case.place:
        places = {(file, int(number)) for file, number in re.findall(r"(/[^\s:]+\.py):(\d+)", message)}
        assert places & set(own_places(case.function, named=case.place != "own")), message


def test_there_are_many_kinds():
    cases = malformed_programs.CASES + malformed_values.CASES + FILES
    assert len({case.id for case in cases}) == len(cases) > 200


# --- what must not raise ------------------------------------------------------------------------------------------------


@ppl.model
def positive_in_a_branch(on):
    ppl.cond(on > 0, lambda: ppl.sample("x", dist.Gamma(2.0, 1.0)), lambda: 0.0)


@pytest.mark.parametrize("operation", ["assess", "update", "generate", "load", "trace", "unconstrain"])
def test_what_a_trace_holds_fits_its_program(operation, tmp_path):
    program = positive_in_a_branch(-1.0)
    made = program.simulate(KEY)
    made.save(tmp_path / "trace")
    density = {
        "assess": lambda: program.assess(made.choices)[0],
        "update": lambda: made.update(KEY, made.choices)[1],
        "generate": lambda: program.generate(KEY, made.choices)[1],
        "load": lambda: ppl.load_trace(tmp_path / "trace", program).log_density,
        "trace": lambda: program.given({}).trace(made.choices).log_density,
        "unconstrain": lambda: 0.0 * program.given({}).unconstrain(made.choices)["x"],
    }[operation]()
    assert not made.present["x"] and density == 0.0


class Triangle:
    """An object that has all that `sample` asks for, and is no pytree."""

    support = dist.constraints.interval(0.0, 1.0)

    def sample(self, key: Any) -> Any:
        return jnp.sqrt(jax.random.uniform(key))

    def log_prob(self, value: Any) -> Any:
        return jnp.log(2.0 * value)


def test_an_object_with_sample_and_log_prob():
    density, _ = ppl.model(lambda: ppl.sample("x", Triangle()))().assess({"x": 0.25})
    np.testing.assert_allclose(density, np.log(0.5), rtol=1e-6)
