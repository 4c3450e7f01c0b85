"""An objective compiles once: a new key, new parameters or new data of the same shape cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import expectax as ex
from expectax import dist, vi
from helpers import count_compiles

KEYS = [jax.random.key(seed) for seed in range(3)]


@ex.model
def regression(x):
    slope = ex.sample("slope", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Normal(slope * x, 1.0))


@ex.model
def guide(params):
    ex.sample("slope", dist.Normal(params["mean"], jnp.exp(params["log_sd"])))


def elbo(shift=0.0):
    x = np.arange(4.0, dtype=np.float32) + np.float32(shift)
    return vi.elbo(regression(x).given({"y": x + 1.0}), guide)


def params(mean):
    return {"mean": mean, "log_sd": -1.0}


RUNS = {
    "value_and_grad": lambda objective, p, key: vi.value_and_grad(objective)(p, key, 8),
    "estimate": lambda objective, p, key: vi.estimate(objective, p, key, 8),
}


@pytest.mark.parametrize("name", RUNS)
def test_new_key_parameters_and_data_cost_no_compilation(name):
    """Catches data that is a constant of the program, and a cache keyed by the identity of a rebuilt object."""
    run = RUNS[name]
    first = jax.device_get(run(elbo(), params(0.0), KEYS[0]))
    cases = [elbo(), elbo(), elbo(2.0)], [params(0.0), params(0.5), params(0.0)], [KEYS[1], KEYS[0], KEYS[0]]
    with count_compiles() as compiles:
        found = [run(*case) for case in zip(*cases, strict=True)]
    assert compiles == []
    for other in jax.device_get(found):
        assert float(other[0]) != float(first[0])


def test_new_shape_or_number_of_samples_compiles():
    """The counter counts: what is part of the program is compiled anew."""
    run = RUNS["value_and_grad"]
    run(elbo(), params(0.0), KEYS[0])
    with count_compiles() as compiles:
        vi.value_and_grad(elbo())(params(0.0), KEYS[0], 3)
    assert compiles


def test_changed_python_state_is_noticed():
    """A closure's number is part of the program: catches a stale compiled program after it has changed."""
    scale = 1.0

    @vi.objective
    def cost(m):
        return scale * ex.sample("b", dist.Bernoulli(m))

    estimator = vi.value_and_grad(cost)
    before = estimator(0.25, KEYS[0])
    scale = 3.0
    np.testing.assert_allclose(estimator(0.25, KEYS[0]), 3.0 * np.asarray(before), rtol=1e-6)


def test_estimator_runs_inside_jit_and_scan():
    """The user may compile a whole loop; it gives what the steps give one by one."""
    estimator = vi.value_and_grad(elbo())

    def step(p, key):
        _, gradient = estimator(p, key, 4)
        return jax.tree.map(lambda a, g: a + 0.01 * g, p, gradient), None

    start = jax.tree.map(jnp.asarray, params(0.0))
    looped = jax.jit(lambda p: jax.lax.scan(step, p, jnp.stack(KEYS))[0])(start)
    alone = start
    for key in KEYS:
        alone = step(alone, key)[0]
    np.testing.assert_allclose(looped["mean"], alone["mean"], rtol=1e-5)
