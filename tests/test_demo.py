"""The command `python -m expectax`: help, a clean refusal, and the whole run with its table and figure."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from expectax import _demo, _demo_figure, models
from expectax.__main__ import main


def command(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NPROC": "8", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "expectax", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_help(tmp_path):
    result = command("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert "python -m expectax" in result.stdout and "--seed" in result.stdout and "--out" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused(tmp_path):
    """With a message and not a traceback; nothing is written."""
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = command("--out", str(taken), cwd=tmp_path)
    assert result.returncode == 2
    assert "--out" in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and taken.read_text() == "mine"


@pytest.mark.parametrize("name", ["taken", "taken/folder"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr(_demo, "run", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / name)])
    assert "--out" in capsys.readouterr().err


def test_other_nonsense_is_refused(capsys):
    for arguments in (["--seed", "one"], ["--what"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "usage: python -m expectax" in capsys.readouterr().err


# --- the whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command in a process of its own: the folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    result = command("--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    return folder, result.stdout


def row(text: str, name: str) -> np.ndarray:
    """Return (mean, standard error, sd) of each method from a line of the table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return np.array(re.findall(r"(-?\d+\.\d\d) ± (\d+\.\d\d) \((\d+\.\d\d)\)", line), float)


@pytest.mark.slow
def test_means_agree_with_the_reference(finished):
    """NUTS, importance sampling and the bound's distribution: within 5 combined standard errors, sds within 10 %."""
    _, text = finished
    for name, (mean, sd) in models.REFERENCE.items():
        table = row(text, name)
        assert table.shape == (4, 3), name
        combined = np.hypot(table[:3, 1], sd / 100) + 0.005  # the reference has 10,000 draws; printed to 0.01
        assert (np.abs(table[:3, 0] - mean) < 5 * combined).all(), name
        assert (table[:3, 1] < 0.02 * sd).all(), name
        np.testing.assert_allclose(table[:3, 2], sd, rtol=0.1)
    (worst,) = re.findall(r"largest difference (\d+\.\d) standard errors", text)
    assert float(worst) < 5


@pytest.mark.slow
def test_bounds_are_in_order_and_the_filter_is_right(finished):
    _, text = finished
    (line,) = [line for line in text.splitlines() if line.startswith("log evidence") and line.count("±") == 3]
    values = np.array(re.findall(r"(-\d+\.\d+) ± (\d+\.\d+)", line), float)
    (evidence, tight, loose), errors = values.T
    assert loose < tight < evidence and (errors < 0.01).all()
    river = re.search(r"(-\d+\.\d+) ± (\d+\.\d+)   exact \(Kalman\) (-\d+\.\d+)   difference", text)
    estimate, error, exact = map(float, river.groups())
    assert abs(exact - models.kalman(models.NILE).log_evidence) < 1e-3
    assert abs(estimate - exact) < 5 * error < 0.5


@pytest.mark.slow
def test_one_figure_and_nothing_else_is_left(finished):
    folder, text = finished
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == ["out", os.path.join("out", "expectax.png")]
    figure = (folder / "out" / "expectax.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 50_000
    assert "Figure: out" in text and "nan" not in text


# --- printing and saving, with results made up ------------------------------------------------------------------------


def made_up():
    rng = np.random.default_rng(0)
    mean, sd = np.array(list(models.REFERENCE.values())).T
    schools = [
        _demo.Result(method, mean + k, sd / 100, sd, bound, 1.0, 0.1, mean + sd * rng.normal(size=(100, 10)), curve)
        for k, (method, bound, curve) in enumerate(
            [
                ("NUTS", None, None),
                ("IS (guide)", (-31.3, 0.01), None),
                ("IWELBO (5)", (-31.4, 0.01), -32 + rng.normal(size=250)),
                ("ELBO", (-31.5, 0.01), -33 + rng.normal(size=250)),
            ]
        )
    ]
    exact = models.kalman(models.NILE)
    return schools, _demo.Filter(-639.0, 0.1, exact, np.asarray(exact.mean), np.asarray(exact.sd), 1.0, 0.1)


def test_the_table_has_every_parameter_and_method():
    schools, river = made_up()
    out = io.StringIO()
    _demo.print_schools(schools, out)
    _demo.print_nile(river, out)
    for number, name in enumerate(models.REFERENCE):
        expected = [(r.mean[number], r.error[number], r.sd[number]) for r in schools]
        np.testing.assert_allclose(row(out.getvalue(), name), expected, atol=0.0051)
    lines = out.getvalue().splitlines()
    assert all(any(r.method in line for line in lines) for r in schools) and max(map(len, lines)) <= 120
    off = 2.0 / np.hypot(min(sd for _, sd in models.REFERENCE.values()) / 100, 0.05)  # IWELBO's means are 2 too high
    assert f"largest difference {off:.1f} standard errors (IWELBO (5))" in out.getvalue()
    assert "-639.000 ± 0.100" in out.getvalue() and "difference +2.6 standard errors" in out.getvalue()


def test_the_figure_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    schools, river = made_up()
    folder = tmp_path / "new" / "folder"
    path = _demo_figure.save_figure(schools, river, folder)
    assert [p.name for p in folder.iterdir()] == ["expectax.png"] and path == folder / "expectax.png"
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG") and len(before) > 20_000

    def broken(self, name, **options):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        _demo_figure.save_figure(schools, river, folder)
    assert [p.name for p in folder.iterdir()] == ["expectax.png"] and path.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_the_figure_is_as_readable_as_any_new_file(tmp_path):
    path = _demo_figure.save_figure(*made_up(), tmp_path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
