"""Runs of `mcmc` that go on, that reduce their draws as they come, and that are dealt to several devices."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, inference, ppl
from helpers import count_compiles

KEY = jax.random.key(20261125)
pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("ignore:mcmc.*diverged"),
    pytest.mark.slow,
]


@ppl.model
def line(x):
    slope = ppl.sample("slope", dist.Normal(0.0, 1.0))
    theta = ppl.sample("theta", dist.Gamma(2.0, jnp.ones(3)))
    ppl.sample("y", dist.Normal(slope * x + theta, 0.5))


POSTERIOR = line(np.arange(3.0, dtype=np.float32)).given({"y": np.array([0.5, 2.0, 2.5], np.float32)})


def run(kernel: Any = None, **options: Any) -> inference.Chains:
    settings: dict[str, Any] = {"key": KEY, "num_warmup": 60, "num_samples": 60, "num_chains": 2} | options
    return inference.mcmc(POSTERIOR, kernel or inference.hmc(), **settings)


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the last bit: draws, statistics, parameters, reductions, and where the runs stand."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 23, 100, 249])
def test_two_runs_are_one(first):
    """Also when a run has one draw (a loop of one turn may be compiled otherwise), and over the bounds of chunks."""
    options: dict[str, Any] = {"reducers": {"both": inference.running_covariance()}, "thinning": 2}
    whole = run(num_samples=250, **options)
    assert whole.choices["theta"].shape == (2, 250, 3)
    assert_equal(run(num_samples=first, **options).resume(250 - first), whole)


def test_a_resumed_run_compiles_nothing_and_takes_another_key():
    chains = run()
    chains.resume(60), chains.resume(60, key=jax.random.key(2))
    with count_compiles() as compiles:
        same, other = chains.resume(60), chains.resume(60, key=jax.random.key(1))
    assert compiles == []
    slopes, others = np.asarray(same.choices["slope"]), np.asarray(other.choices["slope"])
    np.testing.assert_array_equal(slopes[:, :60], others[:, :60])
    assert not np.isin(slopes[:, 60:], others[:, 60:]).any()
    for draws in (slopes, others):
        assert len(np.unique(draws[:, 1:])) > 100  # no draw's key is used again


def test_chains_that_cannot_go_on_are_refused():
    chains = run()
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        chains.resume(0)
    with pytest.raises(ValueError, match="one run of mcmc"):
        inference.Chains(chains.choices, chains.statistics).resume(10)
    many = jax.vmap(lambda key: run(key=key, num_samples=5, num_warmup=0))(jax.random.split(KEY, 2))
    with pytest.raises(ValueError, match="one run of mcmc"):
        many.resume(10)
    with pytest.raises(TypeError, match="typed key"):
        chains.resume(10, key=jax.random.PRNGKey(0))


def test_chains_go_through_jit_and_on():
    inside = jax.jit(lambda key: run(key=key, num_warmup=0, num_samples=4))(KEY)
    outside = run(num_warmup=0, num_samples=8).choices["slope"]
    np.testing.assert_allclose(inside.resume(4).choices["slope"], outside, rtol=1e-4)


# --- reducers ---------------------------------------------------------------------------------------------------------


def test_reducers_see_every_draw_once(x64):
    """Against numpy on the stored draws; a user's own pair sees them in order."""
    last_two = (lambda z: jnp.zeros(2), lambda carry, z: jnp.stack([carry[1], z["slope"]]))
    reducers: dict[str, Any] = {
        "mean": inference.running_mean(),
        "square": inference.running_mean(lambda z: z["slope"] ** 2),
        "both": inference.running_covariance(),
        "last": last_two,
    }
    chains = run(reducers=reducers, num_samples=140)
    draws = {name: np.asarray(v) for name, v in chains.choices.items()}
    reduced = chains.reduced
    for name, values in draws.items():
        np.testing.assert_allclose(reduced["mean"].mean[name], values.mean(1), rtol=1e-12)
        np.testing.assert_allclose(reduced["mean"].pooled()[name], values.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(reduced["square"].mean, (draws["slope"] ** 2).mean(1), rtol=1e-12)
    np.testing.assert_array_equal(reduced["last"], draws["slope"][:, -2:])
    vectors = np.concatenate([draws["slope"][..., None], draws["theta"]], -1)
    for chain in range(2):
        np.testing.assert_allclose(reduced["both"].covariance[chain], np.cov(vectors[chain].T), rtol=1e-10)
    pooled = reduced["both"].pooled()
    np.testing.assert_allclose(pooled.mean, vectors.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(pooled.covariance, np.cov(vectors.reshape(-1, 4).T), rtol=1e-10)
    assert int(pooled.count) == 280


def test_without_draws_the_reductions_are_the_same():
    reducers = {"mean": inference.running_mean()}
    stored, streamed = run(reducers=reducers), run(reducers=reducers, keep_draws=False)
    assert streamed.choices == {}
    assert_equal(streamed.reduced, stored.reduced)
    assert_equal(streamed.statistics, stored.statistics)
    for ask in (streamed.mean, streamed.sd, streamed.summary):
        with pytest.raises(ValueError, match=r"keep_draws=False.*chains\.reduced"):
            ask()


# --- devices ----------------------------------------------------------------------------------------------------------

SHARDED = """
import warnings, jax, numpy as np
warnings.simplefilter("ignore")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
from expectax import inference
from test_mcmc_resume import run, POSTERIOR
devices = jax.devices()
assert len(devices) == 2
mesh = jax.sharding.Mesh(np.array(devices), ("any",))
kernel = KERNEL
options = dict(num_chains=4, num_warmup=20, num_samples=10, reducers={"mean": inference.running_mean()})
alone = run(kernel, **options).resume(10)
for where in (devices, mesh):
    dealt = run(kernel, devices=where, **options).resume(10)
    assert len(dealt.choices["slope"].sharding.device_set) == 2
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, (alone.choices, alone.reduced), (dealt.choices, dealt.reduced))
try:
    run(devices=devices, num_chains=3)
except ValueError as error:
    assert "3 chains for 2 devices" in str(error), error
    print("all right")
"""


@pytest.mark.parametrize(
    "kernel", ["inference.hmc()", pytest.param("inference.nuts(max_tree_depth=4)", marks=pytest.mark.by_hand)]
)
def test_chains_dealt_to_two_devices_are_the_same(kernel):

    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", SHARDED.replace("KERNEL", kernel)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.stdout.split() == ["all", "right"], result.stderr
