"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import expectax
from expectax import dist, inference, models, ppl, vi

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(expectax.__path__, "expectax.")
    if not name.endswith(".__main__")  # checked in test_demo
]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    """Return the examples of a module's own functions, classes, methods, and models (which doctest overlooks)."""
    tests = {test.name: test for test in doctest.DocTestFinder(exclude_empty=True).find(module)}
    for name, value in vars(module).items():
        full = f"{module.__name__}.{name}"
        if isinstance(value, ppl.Model) and value.function.__module__ == module.__name__ and full not in tests:
            test = doctest.DocTestParser().get_doctest(value.__doc__ or "", vars(module).copy(), full, None, None)
            if test.examples:
                tests[full] = test
    return [test for test in tests.values() if test.examples]


pytestmark = pytest.mark.usefixtures("quick_compiles")

LONG = (
    {f"expectax.models.{name}" for name in ("_air", "_sigmoid_belief", "_vae", "_spatial")}
    | {f"expectax.{name}" for name in ("vi._annealed", "vi._measure_valued", "vi._antithetic")}
    | {
        f"expectax.inference.{name}"
        for name in (
            "_pseudo_marginal _population _compositions _tempered _smc_over _annealed_importance _persistent _particle_gibbs _replica "
            "_auto_reparameterize _sbc _check_kernel _smoothing _langevin _random_walk _slice _elliptical _on _metropolis "
            "_involutive _stochastic_gradient _diagnose _change"
        ).split()
    }
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in MODULES]
)
def test_examples_run(name):
    module = importlib.import_module(name)
    printed: list[str] = []
    for test in examples_of(module):
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append)
    assert not printed, "".join(printed)


def test_the_modules_and_their_examples_are_found():
    assert {"expectax.ppl._program", "expectax.vi._fit", "expectax.inference._mcmc"} <= set(MODULES)
    names = {test.name for module in MODULES for test in examples_of(importlib.import_module(module))}
    assert {"expectax.models._eight_schools.eight_schools", "expectax.ppl._program.Program"} <= names
    assert len(names) > 20


def public_names() -> dict[str, Any]:
    """Return the public functions, classes and models by their full name; constants and exceptions need no example."""
    found = {}
    for module in (expectax, ppl, vi, inference, models):
        for name, value in vars(module).items():
            if name.startswith("_") or value is dist or inspect.ismodule(value):
                continue
            if isinstance(value, type) and issubclass(value, BaseException):
                continue
            if callable(value):
                found[f"{module.__name__}.{name}"] = value
    return found


REFERS = re.compile(r"Example: see\s+`?[\w.]+`?")


def test_public_names_have_examples():
    documents = {name: inspect.getdoc(value) or "" for name, value in public_names().items()}
    assert [name for name, text in documents.items() if not text] == []
    assert [name for name, text in documents.items() if ">>>" not in text and not REFERS.search(text)] == []


def test_public_names_are_seen():
    names = set(public_names())
    assert {"expectax.sample", "expectax.vi.fit", "expectax.inference.nuts", "expectax.models.eight_schools"} <= names
    assert "expectax.ppl.ShapeError" not in names and "expectax.models.NILE" not in names


@pytest.mark.parametrize("error", [e for e in vars(ppl).values() if isinstance(e, type) and issubclass(e, Exception)])
def test_errors_say_what_they_mean(error):
    assert error.__doc__ and error.__doc__.strip() and issubclass(error, ppl.ExpectaxError)
