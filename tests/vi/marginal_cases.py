"""Programs with estimated densities, and the joint identity that each must obey."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exact_runs import all_runs

import expectax as ex
from expectax import dist, vi


@ex.model
def chain(p):
    u = ex.sample("u", dist.Bernoulli(p))
    ex.sample("x", dist.Bernoulli(0.2 + 0.5 * u))


@ex.model
def skewed():
    ex.sample("u", dist.Bernoulli(0.8))


@ex.model
def by_x(x):
    ex.sample("u", dist.Bernoulli(0.3 + 0.4 * x))


@ex.model
def two_layers(p):
    inner = ex.sample("sub", vi.marginal(chain(p), "x", vi.sir(1)))
    v = ex.sample("v", dist.Bernoulli(0.4))
    ex.sample("y", dist.Bernoulli(0.1 + 0.3 * inner["x"] + 0.5 * v))


def flip(log_density: Any, z: Any) -> Any:
    """A kernel on bits: flip one of them, accept by Metropolis."""
    (name,) = z
    which = {name: 1 - z[name]}
    accept = ex.sample("accept", dist.Bernoulli(jnp.exp(jnp.minimum(0.0, log_density(which) - log_density(z)))))
    return {name: jnp.where(accept == 1, which[name], z[name])}


@ex.model
def normals(scale):
    u = ex.sample("u", dist.Normal(0.0, scale))
    ex.sample("x", dist.Normal(u, 1.0))


@ex.model
def guess(x):
    ex.sample("u", dist.Normal(0.5 * x, 0.8))


def log_mean_exp(w: Any) -> tuple[float, float]:
    """Return the log of the mean of `exp(w)` and its standard error relative to the mean."""
    values = np.exp(np.asarray(w))
    return np.log(values.mean()), values.std() / values.mean() / len(values) ** 0.5


def check_identity(program: Any, values: list[Any]) -> None:
    """Check the joint identity of a program with an estimated density: for each value, the sums of test functions."""
    p, (choices, log_w) = all_runs(lambda: vi.simulate(program))
    assert abs(p.sum() - 1.0) < 1e-10
    for value in values:
        q, estimates = all_runs(lambda value=value: vi.log_density(program, value))
        here = np.ones(len(p), bool)
        for a, b in zip(*map(jax.tree.leaves, (choices, value)), strict=True):
            here &= np.all(np.reshape(np.asarray(a) == np.asarray(b), (len(p), -1)), axis=1)
        for g in (np.ones_like, np.exp, lambda w: np.exp(-w), np.cos, lambda w: w**2, lambda w: np.sin(3.0 * w)):
            left = np.sum(np.where(here, p * g(log_w), 0.0))
            right = np.sum(q * np.exp(estimates) * g(estimates))
            assert abs(left - right) < 1e-10
