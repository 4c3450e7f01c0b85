"""Settings for every test, made before JAX is imported."""

import gc
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


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """Forget a module's compiled programs: each holds memory maps, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()
    gc.collect()
