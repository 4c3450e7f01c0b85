"""How the code lies: short files, one place for JAX's internals, one name per package, no effects of the import."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("ppl", "vi", "inference", "models")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
INTERNALS = re.compile(
    r"\bjax\._src|\bjax\.extend|\bjax\.interpreters|\bfrom jax import [^\n]*\b(extend|interpreters)\b"
)
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|opt)/")
in_checkout = pytest.mark.skipif(not SOURCES or not (ROOT / "src").is_dir(), reason="needs a checkout")


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


@in_checkout
def test_every_package_is_seen():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES) and len(SOURCES) > 30


@in_checkout
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@in_checkout
def test_the_internals_of_jax_stand_in_one_file():
    others = [path for path in [*SOURCES, *(ROOT / "src").rglob("*.py")] if path.name != "_jax.py"]
    assert [str(path) for path in others if INTERNALS.search(path.read_text())] == []
    assert INTERNALS.search((ROOT / "ppl" / "_jax.py").read_text())


@in_checkout
@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_is_no_package_of_its_own(package):
    result = python(f"import {package}", cwd=ROOT)
    assert result.returncode == 1
    assert f"ImportError: import expectax.{package}, not {package}" in result.stderr


IMPORT = """
import jax
before = dict(jax.config.values)
import expectax, expectax.models, expectax.__main__
changed = {k: v for k, v in jax.config.values.items() if before.get(k, v) != v}
from jax._src import xla_bridge
print(changed, list(xla_bridge._backends))
"""


def test_the_import_starts_no_backend_and_changes_no_setting():
    result = python(IMPORT)
    assert result.stdout.strip() == "{} []", result.stderr


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_no_tracked_file_names_a_place_on_some_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_symlink():
            assert not path.readlink().is_absolute(), name
        elif path.is_file() and MACHINE_PATH.search(path.read_bytes().decode(errors="ignore")):
            found.append(name)
    assert found == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [("see /" + "work/main", True), ("'/" + "opt/venv'", True), ("a/work/b", False), ("https://x.org/opt/y", False)],
)
def test_the_search_finds_such_places(text, caught):
    assert bool(MACHINE_PATH.search(text)) == caught
