"""Tools that show a program or keep a trace: tables, graphs, the search for bad numbers, text, files."""

import io
import json
import os
import pickle
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl._nested import leaves_of

KEY = jax.random.key(20260814)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@ex.model
def inner(centre):
    e = ex.sample("e", dist.Normal(centre, 1.0))
    return ex.deterministic("twice", 2 * e)


@ex.model
def everything(y):
    """Every kind of dependence: nested, carried, in lanes, by a predicate, through a recorded value."""
    a = ex.sample("a", dist.Gamma(2.0, 1.0), gradient=vi.Reparam())
    b = ex.sample("b", dist.Bernoulli(0.5))
    e = ex.sample("sub", inner(a))
    ex.sample("alone", dist.LKJCholesky(3, 1.0))

    def step(x, _):
        x = ex.sample("x", dist.Normal(x, 1.0))
        z = lambda i: ex.sample("z", dist.MultivariateNormal(x * i * jnp.ones((4, 2)), jnp.eye(2)))  # noqa: E731
        return x, jax.vmap(z)(jnp.arange(3.0))

    last, _ = lax.scan(step, e, None, length=5)
    c = lax.cond(b == 1, lambda: ex.sample("c", dist.Normal(last, 1.0)), lambda: 0.0)
    ex.observe("y", dist.Normal(c, 1.0), y)
    ex.factor("w", 0.1 * a)
    ex.sample("k", dist.Categorical(jnp.ones(4) / 4).expand([2]))


def test_the_table_of_shapes():
    table = ex.shapes(everything(0.3).given({"k": jnp.zeros(2, int)}))
    columns = ("kind", "distribution", "time", "lanes", "batch", "event", "gradient")
    expected = {
        "a": ("choice", "Gamma", (), (), (), (), repr(vi.Reparam())),
        "b": ("choice", "BernoulliProbs", (), (), (), (), "finite"),
        "sub/e": ("choice", "Normal", (), (), (), (), "pathwise"),
        "sub/twice": ("deterministic", "", (), (), (), (), ""),
        "alone": ("choice", "LKJCholesky", (), (), (), (3, 3), "pathwise"),
        "x": ("choice", "Normal", (5,), (), (), (), "pathwise"),
        "z": ("choice", "MultivariateNormal", (5,), (3,), (4,), (2,), "pathwise"),
        "c": ("choice, in a branch", "Normal", (), (), (), (), "pathwise"),
        "y": ("observed", "Normal", (), (), (), (), "pathwise"),
        "w": ("observed", "Unit", (), (), (), (0,), table["w"]["gradient"]),
        "k": ("observed", "CategoricalProbs", (), (), (2,), (), "finite"),
    }
    assert {row["address"]: tuple(row[c] for c in columns) for row in table.rows} == expected
    for row in table.rows:
        assert row["place"].split(":")[0] == "test_tools.py"
    assert (table["a"]["dtype"], table["b"]["dtype"], table["z"]["dtype"]) == ("float32", "int32", "float32")
    assert "Positive" in table["a"]["support"] and "Real" in table["x"]["support"]
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines] == ["address", *expected]
    assert table._repr_html_().count("<tr>") == 12
    assert repr(ex.shapes(ex.model(lambda: None)())) == "no sites"
    for entry, row in zip(leaves_of(everything(0.3).table()), table.rows, strict=True):
        assert row["time"] + row["lanes"] + row["batch"] + row["event"] == entry[1].shape


def test_the_edges_are_the_dependences():
    graph = ex.render(everything(0.3))
    expected = {
        ("a", "sub/e"),
        ("sub/e", "sub/twice"),
        ("sub/e", "x"),  # through what the nested model returns
        ("x", "z"),
        ("x", "c"),
        ("sub/e", "c"),  # the first carry, for all that the equations say
        ("b", "c"),  # decides whether c is made
        ("b", "y"),
        ("c", "y"),
        ("a", "w"),
    }
    assert set(graph.edges) - {("sub/e", "c")} == expected - {("sub/e", "c")}
    assert '"x" -> "x" [style=dotted, label="next step"];' in graph.source
    assert graph.source.count("subgraph") == 2
    for label in ("5 time steps", "3 lanes"):
        assert f'label="{label}"' in graph.source
    assert '"y" [shape=ellipse, style=filled' in graph.source and '"sub/twice" [shape=box' in graph.source
    assert graph.source.count("{") == graph.source.count("}") and repr(graph) == graph.source
    grey = ex.render(everything(0.3).given({"a": 1.0})).source
    assert '"a" [shape=ellipse, style=filled' in grey and '"a" [shape=ellipse];' in graph.source


def test_edges_of_transformed_programs():
    cut = set(ex.render(ex.do(everything(0.3), {"c": 1.0})).edges)
    assert ("c", "y") not in cut and ("x", "c") not in cut
    renamed = set(ex.render(ex.rename(everything(0.3), {"a": "q", "sub": "s"})).edges)
    assert {("q", "s/e"), ("s/e", "x"), ("q", "w")} <= renamed


@ex.model
def fragile(bad, site):
    """A scale of 0, nan or minus one at one index of one site."""
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    scale = lambda name, i: jnp.where((site == name) & (i == bad), 0.0, 1.0)  # noqa: E731

    def step(c, t):
        x = ex.sample("x", dist.Normal(0.0, scale("x", t)))
        jax.vmap(lambda i: ex.sample("z", dist.Normal(jnp.zeros(2), scale("z", 3 * t + i))))(jnp.arange(3.0))
        return c, x

    lax.scan(step, 0.0, jnp.arange(4.0))
    sub = ex.model(lambda: ex.sample("e", dist.Normal(0.0, scale("e", jnp.arange(3.0))).to_event(1)))
    ex.sample("sub", sub())
    lane = lambda i: lax.cond(i > 0, lambda: ex.sample("g", dist.Normal(a, scale("g", i))), lambda: 0.0)  # noqa: E731
    jax.vmap(lane)(jnp.arange(3.0))
    lax.cond(a > 0, lambda: ex.sample("c", dist.Normal(a, scale("c", 0.0))), lambda: 0.0)


CHOICES: dict[str, Any] = {
    "a": 0.5,
    "x": np.full(4, 0.1),
    "z": np.full((4, 3, 2), 0.1),
    "sub": {"e": np.full(3, 0.1)},
    "g": np.full(3, 0.1),
    "c": 0.1,
}
FINDINGS = {  # (site, where the scale is 0): path and index
    ("x", 2.0): ("x", (2,)),
    ("z", 7.0): ("z", (2, 1, 0)),
    ("e", 1.0): ("sub/e", ()),
    ("g", 2.0): ("g", (2,)),
    ("c", 0.0): ("c", ()),
}


@pytest.mark.parametrize("site, bad", FINDINGS)
def test_debug_finds_the_element(site, bad):
    path, index = FINDINGS[site, bad]
    found = ex.debug(fragile(bad, site), CHOICES)
    name = "Independent" if site == "e" else "Normal"
    assert (found.address, found.index, found.what, found.distribution) == (path, index, "the log density", name)
    assert "test_tools.py" in found.place
    assert not np.isfinite(found.log_density)
    np.testing.assert_allclose(found.value, 0.1)
    if site != "e":
        assert found.parameters["scale"] == 0.0
    assert f"site {path!r}{list(index) if index else ''}" in repr(found)
    assert ex.debug(fragile(-1.0, site), CHOICES) is None


@pytest.mark.parametrize("what", ["lane", "mask"])
def test_debug_leaves_alone_what_does_not_count(what):
    """The lane whose branch is not taken, and what a mask leaves out."""
    lane, masked = fragile(0.0, "g"), ex.mask(fragile(2.0, "x"), np.arange(4) != 2, "x")
    assert ex.debug(lane if what == "lane" else masked, CHOICES) is None


def test_debug_leaves_a_branch_alone_that_is_not_taken():
    assert ex.debug(fragile(0.0, "c"), CHOICES | {"a": -0.5}) is None


def test_debug_of_parameters_values_and_data():
    @ex.model
    def model(loc):
        x = ex.sample("x", dist.Normal(loc, 1.0))
        ex.observe("y", dist.Gamma(2.0, jnp.exp(x)), jnp.array([0.5, 0.7, 0.9])[0])

    found = ex.debug(model(jnp.array([0.0, jnp.nan, 0.0])[1]), key=KEY)
    assert (found.address, found.what) == ("x", "a parameter") and np.isnan(found.parameters["loc"])
    found = ex.debug(model(0.0).given({"x": 2000.0}), {})
    assert (found.address, found.what, found.parameters["rate"]) == ("y", "a parameter", np.inf)
    assert ex.debug(model(0.0), key=KEY) is None
    with pytest.raises(TypeError, match="key"):
        ex.debug(model(0.0))
    with pytest.raises(ex.ppl.AddressError, match="'x'"):
        ex.debug(model(0.0), {"q": 1.0})


def test_text_is_readable():
    program = everything(0.3)
    trace = program.simulate(KEY)
    lines = repr(trace).splitlines()
    assert "trace of <program everything(" in lines[0] and "log_density" in lines[0]
    shown = {line.split()[0]: line for line in lines[1:]}
    assert set(shown) == {p for p, e in leaves_of(program.table()) if e.kind != "observed"}
    assert "float32[5, 3, 4, 2]" in shown["z"] and "mean" in shown["z"]
    assert "(deterministic)" in shown["sub/twice"] and "(present: " in shown["c"]
    assert "<pre>" in trace._repr_html_()
    assert repr(program.given({"b": 1})).startswith("<posterior of <program everything(")
    assert repr(everything) == "<model everything>"
    transformed = ex.rename(ex.condition(program, {"b": 1}), {"x": "q"})
    assert "everything" in repr(transformed)
    assert len(repr(jax.vmap(program.simulate)(jax.random.split(KEY, 100)))) < 3000


def test_text_under_jit_has_no_tracer_errors():
    texts = []

    @jax.jit
    def run(y: Any, key: Any) -> Any:
        program = ex.scale(everything(y), y)
        trace = program.simulate(key)
        things = [program, trace, program.given({"a": y}), ex.shapes(program), ex.render(program)]
        texts.extend(map(repr, things))
        return trace.log_density

    run(0.3, KEY)
    assert len(texts) == 5 and "(traced)" in texts[1]


@ex.model
def kept(scale):
    """Nested, in a branch, in lanes; numbers of four kinds."""
    a = ex.sample("sub", inner(0.0))
    on = ex.sample("on", dist.Bernoulli(0.5))
    lax.cond(on == 1, lambda: ex.sample("c", dist.Normal(a, scale)), lambda: 0.0)
    coin = ex.distribution(jax.random.bernoulli, lambda x: jnp.log(0.5), support=dist.constraints.boolean)
    jax.vmap(lambda m: (ex.sample("z", dist.Normal(m, scale)), ex.sample("flag", coin())))(jnp.arange(3.0))
    ex.sample("n", dist.Poisson(3.0).expand([2]))
    ex.sample("p", dist.Gamma(2.0, 1.0))


@pytest.mark.parametrize("seed", range(4))
def test_a_file_gives_the_trace_back(seed, tmp_path):
    trace = kept(0.7).simulate(jax.random.key(seed))
    trace.save(tmp_path / "t.zip")
    again = ex.load_trace(tmp_path / "t.zip", kept(0.7))
    for part in ("choices", "retval", "present", "deterministic", "log_density"):
        old, new = getattr(trace, part), getattr(again, part)
        assert jax.tree.structure(old) == jax.tree.structure(new)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), old, new)
        assert [x.dtype for x in jax.tree.leaves(old)] == [x.dtype for x in jax.tree.leaves(new)]
    for old, new in zip(jax.tree.leaves(trace.choices), jax.tree.leaves(again.choices), strict=True):
        np.testing.assert_array_equal(old, new)
    assert os.listdir(tmp_path) == ["t.zip"]


def test_a_file_of_float64_is_read_in_float32(tmp_path):
    with jax.enable_x64(True):
        trace = kept(0.7).simulate(KEY)
        assert trace["z"].dtype == jnp.float64
        trace.save(tmp_path / "t")
        np.testing.assert_array_equal(ex.load_trace(tmp_path / "t", kept(0.7))["z"], trace["z"])
    again = ex.load_trace(tmp_path / "t", kept(0.7))
    assert again["z"].dtype == jnp.float32
    np.testing.assert_allclose(again["z"], np.asarray(trace["z"]), rtol=1e-6)


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    old, new = (kept(0.7).simulate(jax.random.key(i)) for i in range(2))
    old.save(tmp_path / "t")
    before, count = (tmp_path / "t").read_bytes(), []
    write = zipfile.ZipFile.writestr

    def break_off(self: Any, name: str, *args: Any) -> Any:
        count.append(name)
        if len(count) == 3:
            raise KeyboardInterrupt
        return write(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", break_off)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path / "t")
    assert len(count) == 3 and os.listdir(tmp_path) == ["t"]
    assert (tmp_path / "t").read_bytes() == before


def test_a_file_of_another_program_is_refused(tmp_path):
    kept(0.7).simulate(KEY).save(tmp_path / "t")
    with pytest.raises(ex.ppl.StorageError, match="log density"):
        ex.load_trace(tmp_path / "t", kept(7.0))
    with pytest.raises(ex.ppl.StorageError, match="holds choices"):
        ex.load_trace(tmp_path / "t", everything(0.3))
    with pytest.raises(ex.ppl.StorageError, match="batch"):
        jax.vmap(kept(0.7).simulate)(jax.random.split(KEY, 2)).save(tmp_path / "u")
    with pytest.raises(FileNotFoundError):
        ex.load_trace(tmp_path / "none", kept(0.7))


# --- hostile files ----------------------------------------------------------------------------------------------------


@ex.model
def small():
    ex.sample("x", dist.Normal(jnp.zeros(2), 1.0))
    ex.sample("p", dist.Gamma(2.0, 1.0))


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Any):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def packed(header: Any, members: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        if header is not None:
            archive.writestr("header.json", header if isinstance(header, (str, bytes)) else json.dumps(header))
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def good() -> tuple[dict[str, Any], dict[str, bytes]]:
    choices = {"x": {"shape": [2], "dtype": "<f4"}, "p": {"shape": [], "dtype": "<f4"}}
    header = {"format": "expectax trace", "version": 1, "model": "small", "choices": choices}
    header["log_density"] = float(small().assess({"x": jnp.ones(2), "p": 1.0})[0])
    return header, {"0.bin": np.ones(2, "<f4").tobytes(), "1.bin": np.ones((), "<f4").tobytes()}


def hostile() -> dict[str, bytes]:
    header, members = good()
    entry, files = header["choices"]["x"], {}

    def add(name: str, value: Any) -> None:
        changed = dict(entry) if name in entry else dict(header)
        changed[name] = value
        new = header | {"choices": header["choices"] | {"x": changed}} if name in entry else changed
        files[f"{name}: {value!r:.30}"] = packed(new, members)

    odd: list[Any] = [None, [], {}, "x", 7, 1e400, ["x", "p"], {"x": 1}, "\ud800", 10**30]
    for value in odd:
        files[f"the whole header: {value!r}"] = packed(json.dumps(value), members)
        for name in ("format", "version", "choices", "shape", "dtype"):
            add(name, value)
    for value in (None, [], "x", {}, 5.0):
        add("log_density", value)
    for value in ([3], [10**12], [2**63] * 2, [-2], [2.5], "2", {"2": 2}, [[2]], [None], [2] * 10**4):
        add("shape", value)
    for value in "<f8 O |V4 <U1 <c8 <M8[s] f4,f4 (2,)f4 <f2 >i8 <f16 [ {'a':".split():
        add("dtype", value)
    for name in set(header) - {"model"}:
        files[f"no {name}"] = packed({k: v for k, v in header.items() if k != name}, members)
    for text in (b"", b"{", b"\xff\xfe", b"[" * 10**5, b"nan"):
        files[f"header {text!r:.30}"] = packed(text, members)
    files["no header"], files["no arrays"] = packed(None, members), packed(header, {})
    files["a short array"] = packed(header, members | {"0.bin": b"\0" * 7})
    files["a large array"] = packed(header, members | {"0.bin": b"\0" * 10**6}, zipfile.ZIP_DEFLATED)
    files["a large header"] = packed(b" " * (2**24 + 1), members, zipfile.ZIP_DEFLATED)
    files["nan"] = packed(header, members | {"0.bin": np.full(2, np.nan, "<f4").tobytes()})
    files["outside the support"] = packed(header, members | {"1.bin": np.full((), -1, "<f4").tobytes()})
    whole, squeezed = packed(header, members), packed(header, members, zipfile.ZIP_DEFLATED)
    for n in range(0, len(whole), 50):
        files[f"cut at {n}"], files[f"cut out at {n}"] = whole[:n], whole[:n] + whole[n + 60 :]
    for n in range(45, 160, 7):
        files[f"squeezed, byte {n}"] = squeezed[:n] + bytes([squeezed[n] ^ 255]) + squeezed[n + 1 :]
    flags = whole.index(b"PK\1\2") + 8
    files["encrypted"] = whole[:flags] + b"\1" + whole[flags + 1 :]
    files["text"], files["a pickle"] = b"hello", pickle.dumps(Touch("never"))
    return files


def test_hostile_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "good").write_bytes(packed(*good()))
    np.testing.assert_array_equal(ex.load_trace(tmp_path / "good", small())["x"], 1.0)
    wrong, read, sizes = {}, zipfile.ZipFile.read, []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda z, n: sizes.append(z.getinfo(n).file_size) or read(z, n))
    for name, data in hostile().items():
        (tmp_path / "bad").write_bytes(data)
        try:
            ex.load_trace(tmp_path / "bad", small())
            wrong[name] = "was read"
        except ex.ppl.StorageError:
            pass
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:80]}"
    assert not wrong and max(sizes) < 2**18  # no bomb is unpacked


def test_nothing_else_in_a_file_is_touched(tmp_path):
    """More members, links and pickles in the archive are neither read nor unpacked."""
    header, members = good()
    mark = tmp_path / "mark"
    more = {"../evil": b"x", "/abs": b"x", "data.pkl": pickle.dumps(Touch(mark)), "2.bin": b"x" * 10}
    (tmp_path / "t").write_bytes(packed(header, members | more))
    try:
        np.testing.assert_array_equal(ex.load_trace(tmp_path / "t", small())["x"], 1.0)
    except ex.ppl.StorageError:
        pass
    for payload in (pickle.dumps(Touch(mark)), b"\x93NUMPY" + pickle.dumps(Touch(mark))):
        (tmp_path / "t").write_bytes(packed(header, members | {"0.bin": payload, "1.bin": payload[:4]}))
        with pytest.raises(ex.ppl.StorageError):
            ex.load_trace(tmp_path / "t", small())
    assert sorted(os.listdir(tmp_path)) == ["t"]
