"""SMC samplers beside BlackJAX's, on a mixture of two normals in ten dimensions whose evidence is 1.

The prior is N(0, 25 I), the posterior 0.3 N(-3, I) + 0.7 N(3, I). Each candidate runs with 1000 particles and four HMC moves
of five leapfrog steps, step size 0.6, unit mass; the candidates take turns, the first call stands apart, and the standard
deviation of the log evidence is over all keys. Run it by itself: `python benchmarks/samplers.py`.
"""

import argparse
import os

os.environ.setdefault("NPROC", "8")

from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import extend_params
from blackjax.smc import resampling as blackjax_resampling
from timing import interleaved

import expectax as ex
from expectax import dist, inference

DIMENSION, PARTICLES, MOVES, LEAPFROGS = 10, 1000, 4, 5
STEP = {"step_size": jnp.asarray(0.6), "inverse_mass_matrix": jnp.ones(DIMENSION)}


def log_prior(z: Any) -> Any:
    """N(0, 25 I)."""
    return -0.5 * jnp.sum((z / 5.0) ** 2) - DIMENSION * (jnp.log(5.0) + 0.5 * jnp.log(2 * jnp.pi))


def log_likelihood(z: Any) -> Any:
    """The mixture over the prior."""
    one = lambda m: -0.5 * jnp.sum((z - m) ** 2) - 0.5 * DIMENSION * jnp.log(2 * jnp.pi)  # noqa: E731
    return jnp.logaddexp(jnp.log(0.3) + one(-3.0), jnp.log(0.7) + one(3.0)) - log_prior(z)


@ex.model
def mixture() -> None:
    """The same as a model."""
    z = ex.sample("z", dist.Normal(jnp.zeros(DIMENSION), 5.0).to_event(1))
    ex.factor("likelihood", log_likelihood(z))


POSTERIOR = mixture().given({})
KERNEL = inference.hmc(num_integration_steps=LEAPFROGS)


class Run(NamedTuple):
    """What is kept of a run: log evidence, weight of the larger mode, the number of temperatures."""

    log_evidence: Any
    mode: Any
    temperatures: Any


def told(found: Any) -> Run:
    """Return what is kept of a run."""
    if isinstance(found, Run):
        return found
    mode = found.expectation(lambda z: (jnp.mean(z["z"]) > 0) * 1.0)
    return Run(found.log_evidence, mode, found.temperatures.shape[0])


def ours(i: int, **settings: Any) -> Any:
    """Adaptive tempering."""
    settings = {"num_particles": PARTICLES, "num_moves": MOVES, "parameters": STEP} | settings
    return inference.tempered(POSTERIOR, KERNEL, key=jax.random.key(i), **settings)


def blackjax_run() -> Any:
    """BlackJAX's adaptive tempering, compiled as one loop."""
    settings: Any = STEP | {"num_integration_steps": LEAPFROGS}
    parameters = extend_params(settings)
    algorithm: Any = blackjax.adaptive_tempered_smc(
        log_prior, log_likelihood, blackjax.hmc.build_kernel(), blackjax.hmc.init, parameters,
        blackjax_resampling.systematic, 0.5, num_mcmc_steps=MOVES,
    )  # fmt: skip

    def step(carry: Any) -> Any:
        key, state, log_z, count = carry
        key, own = jax.random.split(key)
        state, info = algorithm.step(own, state)
        return key, state, log_z + info.log_likelihood_increment, count + 1

    @jax.jit
    def run(key: Any) -> Run:
        key, first = jax.random.split(key)
        state = algorithm.init(5.0 * jax.random.normal(first, (PARTICLES, DIMENSION)))
        start = (key, state, jnp.zeros(()), 0)
        _, state, log_z, count = jax.lax.while_loop(lambda carry: carry[1].tempering_param < 1.0, step, start)
        return Run(log_z, state.weights @ (jnp.mean(state.particles, 1) > 0), count)

    return lambda i: run(jax.random.key(i))


def candidates() -> dict[str, Any]:
    """All that are compared; the last four at the likelihood evaluations of the first, on its temperatures."""
    schedule = inference.tempered(
        POSTERIOR, KERNEL, key=jax.random.key(10**6), num_particles=4 * PARTICLES, num_moves=MOVES, parameters=STEP
    ).freeze_schedule()
    long = 40
    waste_free = {"num_particles": PARTICLES * MOVES // long * (long + 1), "num_moves": long, "waste_free": True}
    persistent = lambda i: inference.persistent(  # noqa: E731
        POSTERIOR, KERNEL, key=jax.random.key(i), num_particles=PARTICLES, num_moves=MOVES, temperatures=schedule
    )
    return {
        "adaptive, target 0.5": ours,
        "adaptive, target 0.65": lambda i: ours(i, target_ess=0.65),
        "BlackJAX adaptive, target 0.5": blackjax_run(),
        "frozen schedule": lambda i: ours(i, temperatures=schedule, parameters=None),
        "frozen, waste-free": lambda i: ours(i, temperatures=schedule, parameters=None, **waste_free),
        "persistent": persistent,
        "tuned kernel, target 0.5": lambda i: ours(i, parameters=None),
    }


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    runs: dict[str, list[Any]] = {}

    def recorded(name: str, function: Any) -> Any:
        def call(i: int) -> Any:
            runs.setdefault(name, []).append(function(i))
            return runs[name][-1]

        return call

    found = interleaved({name: recorded(name, f) for name, f in candidates().items()}, repeats)
    rival = found["BlackJAX adaptive, target 0.5"]["median"]
    print("| | ms | / BlackJAX | first call, s | temperatures | sd(log Z) | mean of Z | weight of the mode at 3 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, times in found.items():
        log_z, mode, count = (
            np.array([float(x) for x in column]) for column in zip(*map(told, runs[name]), strict=True)
        )
        spread = np.std(log_z, ddof=1)
        z = np.exp(log_z)
        print(
            f"| {name} | {1e3 * times['median']:.1f} | {times['median'] / rival:.2f} | {times['first']:.1f} | {count.mean():.1f} "
            f"| {spread:.3f} +- {spread / np.sqrt(2 * len(z)):.3f} | {z.mean():.3f} +- {z.std() / np.sqrt(len(z)):.3f} "
            f"| {mode.mean():.3f} +- {mode.std():.3f} |"
        )


if __name__ == "__main__":
    main()
