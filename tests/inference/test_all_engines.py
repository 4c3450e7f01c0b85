"""One model, untouched, through every engine: a scan with a known posterior, and all means against the exact ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import expectax as ex
from expectax import dist, inference, vi

KEY = jax.random.key(20261125)
Y = np.array([0.8, 1.5, 0.4])
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@ex.model
def level(length):
    """A random walk around an unknown level: everything is Gaussian."""
    mu = ex.sample("mu", dist.Normal(0.0, 1.0))

    def step(x, _):
        x = ex.sample("x", dist.Normal(0.7 * x + 0.3 * mu, 0.5))
        return x, ex.sample("y", dist.Normal(x, 0.6))

    lax.scan(step, mu, None, length=length)


POSTERIOR = level(3).given({"y": jnp.asarray(Y)})


def exact() -> np.ndarray:
    """Return the posterior means of mu and x, from the precision matrix of the joint density."""

    def log_density(z: Any) -> Any:
        return POSTERIOR.log_density({"mu": z[0], "x": z[1:]})

    precision = -np.asarray(jax.hessian(log_density)(jnp.zeros(4)))
    return np.linalg.solve(precision, np.asarray(jax.grad(log_density)(jnp.zeros(4))))


def numbers(choices: Any) -> Any:
    return jnp.concatenate([jnp.asarray(choices["mu"])[..., None], jnp.asarray(choices["x"])], axis=-1)


@ex.model
def family(params):
    """A normal guide with its own mean and sd for each number, in the model's own structure."""
    ex.sample("mu", dist.Normal(params["mean"][0], jnp.exp(params["log_sd"][0])))

    def step(_, own):
        mean, log_sd = own
        return None, ex.sample("x", dist.Normal(mean, jnp.exp(log_sd)))

    lax.scan(step, None, (params["mean"][1:], params["log_sd"][1:]))


@ex.model
def walk(z):
    ex.sample("mu", dist.Normal(z["mu"], 0.5))
    lax.scan(lambda _, x: (None, ex.sample("x", dist.Normal(x, 0.3))), None, z["x"])


CHAINS: dict[str, Any] = {
    "nuts": inference.nuts(),
    "hmc": inference.hmc(num_integration_steps=5),
    "mala": inference.mala(),
    "barker": inference.barker(),
    "random walk": inference.random_walk(),
    "mh": inference.mh(walk),
    "slice": inference.slice(),
    "blocks": inference.cycle(inference.on("mu", inference.slice()), inference.on("x", inference.mala())),
    "mixture": inference.mixture(inference.random_walk(), inference.hmc(num_integration_steps=3)),
    "replicas": inference.replica_exchange(inference.hmc(num_integration_steps=3), [1.0, 0.4]),
    "particle Gibbs": inference.cycle(
        inference.on("x", inference.particle_gibbs(10)), inference.on("mu", inference.elliptical_slice())
    ),
}


def of_chains(kernel: Any, key: Any) -> tuple[Any, Any]:
    """Return the means and their Monte Carlo errors."""
    chains = inference.mcmc(POSTERIOR, kernel, key=key, num_warmup=300, num_samples=1500)
    rows = inference.summarize({"z": numbers(chains.choices)})
    return [row.mean for row in rows.values()], [row.mcse_mean for row in rows.values()]


def repeated(run: Any, key: Any, times: int = 24) -> tuple[Any, Any]:
    """Return the mean, weighted by the evidence, of independent runs that return particles, and its error."""

    def one(key: Any) -> tuple[Any, Any]:
        particles = run(key)
        return numbers(particles.mean()), particles.log_evidence

    means, log_z = jax.jit(jax.vmap(one))(jax.random.split(key, times))
    weights = np.asarray(inference.normalized_weights(log_z))[:, None]
    mean = (weights * np.asarray(means)).sum(0)
    return mean, np.sqrt((weights**2 * (np.asarray(means) - mean) ** 2).sum(0))


PARTICLES: dict[str, Any] = {
    "importance": lambda key: inference.importance(POSTERIOR, key=key, num_particles=2000),
    "filter": lambda key: inference.particle_filter(POSTERIOR, key=key, num_particles=1000).particles,
    "verbs": lambda key: inference.keyed(lambda: inference.smc(POSTERIOR, 1000))(key).particles,
    "resample-move": lambda key: (
        inference.keyed(lambda: inference.rmsmc(POSTERIOR, 300, inference.hmc(num_integration_steps=3)))(key).particles
    ),
    "tempering": lambda key: (
        inference.tempered(
            POSTERIOR, inference.random_walk(), key=key, num_particles=500, temperatures=[0.2, 0.5, 1.0], num_moves=3
        ).particles
    ),
    "annealed importance": lambda key: (
        inference.annealed_importance(
            POSTERIOR, inference.hmc(num_integration_steps=3), key=key, num_particles=500, temperatures=[0.2, 0.5, 1.0]
        ).particles
    ),
}


def of_variational_inference(key: Any) -> tuple[Any, Any]:
    """A mean-field guide's mean is exact for a Gaussian; Adam's averaged end is within its own scatter."""
    start = {"mean": jnp.zeros(4), "log_sd": jnp.zeros(4)}
    steps = optax.exponential_decay(0.05, 1000, 0.3)
    fits = [
        vi.fit(vi.elbo(POSTERIOR, family), start, optax.adam(steps), key=k, num_steps=3000, num_samples=8).params[
            "mean"
        ]
        for k in jax.random.split(key, 6)
    ]
    return np.mean(fits, 0), np.std(fits, 0, ddof=1) / np.sqrt(len(fits)) + 1e-3


ENGINES: dict[str, Any] = {
    **{name: lambda key, kernel=kernel: of_chains(kernel, key) for name, kernel in CHAINS.items()},
    **{name: lambda key, run=run: repeated(run, key) for name, run in PARTICLES.items()},
    "variational inference": of_variational_inference,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_all_means_are_the_exact_ones(name):
    """|z| <= 5 for each of the four numbers, a second time with a fresh key if not: false alarm below 1e-6.

    An error of 0.1 posterior standard deviations (about 0.04) is seen by all but the slowest chains.
    """
    for key in jax.random.split(KEY):
        mean, error = map(np.asarray, ENGINES[name](key))
        assert np.all(error < 0.05), error
        z = (mean - exact()) / error
        if np.all(np.abs(z) <= 5):
            return
    raise AssertionError(f"{name}: z = {z}, means {mean}, exact {exact()}")
