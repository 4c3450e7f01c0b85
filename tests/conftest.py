"""Settings for every test, made before JAX is imported."""

import os

os.environ["NPROC"] = "8"  # two LAPACK calls in one program can deadlock on two cores (DESIGN section 6)
os.environ["MPLBACKEND"] = "Agg"

import jax
import pytest


@pytest.fixture
def x64():
    """Run the test in float64; exactness tests at 1e-10 need it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compiles():
    """Compile without most of XLA's optimisations, for tests of many small programs that run once: a third faster."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
