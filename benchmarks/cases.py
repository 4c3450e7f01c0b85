"""The benchmarks: each returns rows of (name, ours, rival, unit, limit on ours / rival or on ours)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from language import compile_time, run_time, staging
from timing import CompileCounter, Row, interleaved, normal, ratio_row

import expectax as ex
from expectax import dist, inference, models, vi

STEPS, SAMPLES, RATE = 5000, 64, 1e-3
START = jnp.array([3.0, 0.0, 1.0, 1.0])


@ex.model
def cone() -> None:
    """The noisy cone, two scalar sites (Becker et al. 2024, figure 2)."""
    x = ex.sample("x", dist.Normal(0.0, 10.0))
    y = ex.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    ex.sample("z", dist.Normal(r, 0.1 + r / 100.0))


@ex.model
def cone_guide(phi: Any) -> None:
    """A mean-field guide."""
    ex.sample("x", dist.Normal(phi[0], jnp.exp(phi[2])))
    ex.sample("y", dist.Normal(phi[1], jnp.exp(phi[3])))


@ex.model
def cone_vector() -> None:
    """The same cone with one site for both coordinates."""
    xy = ex.sample("xy", dist.Normal(jnp.zeros(2), 10.0))
    r = jnp.sum(xy**2)
    ex.sample("z", dist.Normal(r, 0.1 + r / 100.0))


@ex.model
def cone_vector_guide(phi: Any) -> None:
    """The same guide with one site."""
    ex.sample("xy", dist.Normal(phi[:2], jnp.exp(phi[2:])))


def hand_elbo(phi: Any, eps: Any) -> Any:
    """The ELBO of one sample, coordinate by coordinate."""
    mx, my, sx, sy = phi[0], phi[1], jnp.exp(phi[2]), jnp.exp(phi[3])
    x, y = mx + sx * eps[0], my + sy * eps[1]
    r = x**2 + y**2
    log_p = normal(x, 0.0, 10.0) + normal(y, 0.0, 10.0) + normal(5.0, r, 0.1 + r / 100.0)
    return log_p - normal(x, mx, sx) - normal(y, my, sy)


def hand_elbo_vector(phi: Any, eps: Any) -> Any:
    """The ELBO of one sample, both coordinates in one array."""
    sd = jnp.exp(phi[2:])
    xy = phi[:2] + sd * eps
    r = jnp.sum(xy**2)
    return jnp.sum(normal(xy, 0.0, 10.0)) + normal(5.0, r, 0.1 + r / 100.0) - jnp.sum(normal(xy, phi[:2], sd))


def ascend(loss: Any) -> Any:
    """Gradient ascent as one scan, compiled."""

    @jax.jit
    def run(phi: Any, key: Any) -> Any:
        def step(phi: Any, key: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(phi, key)
            return phi + RATE * gradient, value

        return jax.lax.scan(step, phi, jax.random.split(key, STEPS))

    return run


def by_hand(elbo: Any) -> Any:
    """The estimator by hand: one array of normals for all samples."""
    return lambda phi, key: jnp.mean(jax.vmap(elbo, (None, 0))(phi, jax.random.normal(key, (SAMPLES, 2))))


def cone_elbo() -> list[Row]:
    """5000 steps of gradient ascent on the cone's ELBO with 64 samples, one scan."""
    rows = []
    pairs = {
        "two scalar sites": (cone, cone_guide, hand_elbo),
        "one vector site": (cone_vector, cone_vector_guide, hand_elbo_vector),
    }
    for name, (model, guide, elbo) in pairs.items():
        objective = vi.elbo(model().given({"z": 5.0}), guide)
        ours = ascend(lambda phi, key, objective=objective: objective.surrogate(phi, key, SAMPLES))
        hand = ascend(by_hand(elbo))

        def fitted(i: int, objective: Any = objective) -> Any:
            optimizer = optax.sgd(RATE)
            key = jax.random.key(i)
            return vi.fit(objective, START, optimizer, key=key, num_steps=STEPS, num_samples=SAMPLES).values

        found = interleaved(
            {
                "ours": lambda i, f=ours: f(START, jax.random.key(i)),
                "fit": fitted,
                "hand": lambda i, f=hand: f(START, jax.random.key(i)),
            }
        )
        for label, who in (("surrogate in one scan", "ours"), ("vi.fit", "fit")):
            rows.append(ratio_row(f"cone ELBO, {name}, {label}", found, who, 1.05))
    return rows


def importance_sampling() -> list[Row]:
    """100,000 particles of eight schools, from the prior and through a guide."""
    y, sigma = jnp.array(models.EFFECT), jnp.array(models.STANDARD_ERROR)
    posterior = models.eight_schools(sigma).given({"y": y})
    params = models.eight_schools_start()

    @jax.jit
    def prior(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        mu = 5.0 * jax.random.normal(keys[0], (100_000,))
        tau = jnp.abs(5.0 * jax.random.cauchy(keys[1], (100_000,)))
        z = jax.random.normal(keys[2], (100_000, 8))
        theta = mu[:, None] + tau[:, None] * z
        return {"mu": mu, "tau": tau, "z": z}, jnp.sum(normal(y, theta, sigma), 1)

    @jax.jit
    def guided(key: Any) -> Any:
        eps = jax.random.normal(key, (10, 100_000))
        scale_mu, scale_tau = jnp.exp(params["mu_log_scale"]), jnp.exp(params["tau_log_scale"])
        mu = params["mu"] + scale_mu * eps[0]
        log_mean = params["log_tau"] + params["slope"] * (mu - params["mu"])
        log_tau = log_mean + scale_tau * eps[1]
        tau = jnp.exp(log_tau)
        total = sigma**2 + tau[:, None] ** 2
        mean, sd = tau[:, None] * (y - mu[:, None]) / total, jnp.sqrt(sigma**2 / total)
        z = mean + sd * eps[2:].T
        theta = mu[:, None] + tau[:, None] * z
        half_cauchy = jnp.log(2 / (jnp.pi * 5.0)) - jnp.log1p((tau / 5.0) ** 2)
        log_p = normal(mu, 0.0, 5.0) + half_cauchy + jnp.sum(normal(z, 0.0, 1.0) + normal(y, theta, sigma), 1)
        log_q = normal(mu, params["mu"], scale_mu) + normal(log_tau, log_mean, scale_tau) - log_tau
        return {"mu": mu, "tau": tau, "z": z}, log_p - log_q - jnp.sum(normal(z, mean, sd), 1)

    def ours(i: int, proposal: Any) -> Any:
        return inference.importance(posterior, proposal, key=jax.random.key(i), num_particles=100_000).log_weights

    proposal = models.eight_schools_guide(params, y, sigma)
    rows = []
    for name, guide, hand in (("prior", None, prior), ("guide", proposal, guided)):
        found = interleaved(
            {"ours": lambda i, g=guide: ours(i, g), "hand": lambda i, h=hand: h(jax.random.key(i))}, repeats=25
        )
        rows.append(ratio_row(f"importance sampling, 1e5 particles, {name}", found, "ours", 1.05))
    return rows


def recompilation() -> list[Row]:
    """Compilations of second calls with a new key, new data and new parameters."""
    y, sigma = jnp.array(models.EFFECT), jnp.array(models.STANDARD_ERROR)

    def everything(i: int) -> None:
        posterior = models.eight_schools(sigma + i).given({"y": y - i})
        key = jax.random.key(i)
        params = {name: value + 0.01 * i for name, value in models.eight_schools_start().items()}
        guide = DataGuide(y - i, sigma + i)
        vi.fit(vi.elbo(posterior, guide), params, optax.adam(1e-2), key=key, num_steps=50, num_samples=4)
        inference.importance(posterior, guide(params), key=key, num_particles=100)
        inference.mcmc(posterior, inference.nuts(), key=key, num_warmup=50, num_samples=20, num_chains=2)
        river = models.local_level(20, models.OBSERVATION_SD, models.LEVEL_SD)
        flows = jnp.array(models.NILE[:20], float) + i
        inference.particle_filter(river.given({"flow": flows}), key=key, num_particles=50)

    everything(0)
    counter = CompileCounter()
    everything(1)
    return [Row("compilations at a second call, all entry points", counter.count, None, "", 0)]


class DataGuide(eqx.Module):
    """A guide that carries its data as arrays, so that new data compiles nothing."""

    y: Any
    sigma: Any

    def __call__(self, params: Any) -> ex.Program:
        """Bind the guide to parameters."""
        return models.eight_schools_guide(params, self.y, self.sigma)


CASES = {
    "cone": cone_elbo,
    "importance": importance_sampling,
    "staging": staging,
    "compile": compile_time,
    "language": run_time,
    "recompilation": recompilation,
}
