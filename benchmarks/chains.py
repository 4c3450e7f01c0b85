"""NUTS beside BlackJAX's own, with log densities written by hand: run time, first call, compilations.

Both have four chains in one program, Stan's windows in the warm-up and as many draws. `--volatility` adds what writing a
stochastic volatility model centred costs, and what `auto_reparameterize` makes of it. Run it by itself.
"""

import argparse
import os
import warnings

os.environ.setdefault("NPROC", "8")

import time
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from timing import CompileCounter, normal

import expectax as ex
from expectax import dist, inference
from expectax.models import eight_schools

CHAINS = 4
RNG = np.random.default_rng(20261125)
EFFECT = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERROR = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
INPUTS = jnp.asarray(RNG.standard_normal((1000, 25)), jnp.float32)
LABELS = jnp.asarray(RNG.random(1000) < 1 / (1 + np.exp(-np.asarray(INPUTS) @ RNG.standard_normal(25) / 3)), jnp.int32)


@ex.model
def logistic(x: Any) -> None:
    slopes = ex.sample("slopes", dist.Normal(jnp.zeros(25), 1.0))
    ex.sample("y", dist.Bernoulli(logits=x @ slopes))


@ex.model
def volatility(length: int) -> None:
    """Kim, Shephard and Chib 1998 with Student tails, as in NumPyro's example: the walk is centred."""
    sigma = ex.sample("sigma", dist.Exponential(50.0))
    nu = ex.sample("nu", dist.Exponential(0.1))

    def step(s: Any, _: Any) -> Any:
        s = ex.sample("s", dist.Normal(s, sigma))
        return s, ex.sample("r", dist.StudentT(nu, 0.0, jnp.exp(s)))

    jax.lax.scan(step, 0.0, None, length=length)


def returns(length: int) -> Any:
    walk = np.cumsum(0.03 * RNG.standard_normal(length))
    return jnp.asarray(np.exp(walk) * RNG.standard_t(10.0, length), jnp.float32)


RETURNS = returns(500)


def schools_by_hand(u: Any) -> Any:
    mu, log_tau, z = u[0], u[1], u[2:]
    tau = jnp.exp(log_tau)
    half_cauchy = jnp.log(2.0) - jnp.log(jnp.pi * 5.0) - jnp.log1p((tau / 5.0) ** 2) + log_tau
    prior = normal(mu, 0.0, 5.0) + half_cauchy + jnp.sum(normal(z, 0.0, 1.0))
    return prior + jnp.sum(normal(EFFECT, mu + tau * z, ERROR))


def logistic_by_hand(u: Any) -> Any:
    logits = INPUTS @ u
    return jnp.sum(normal(u, 0.0, 1.0)) + jnp.sum(LABELS * logits - jax.nn.softplus(logits))


def volatility_by_hand(u: Any) -> Any:
    sigma, nu, s = jnp.exp(u[0]), jnp.exp(u[1]), u[2:]
    prior = jnp.log(50.0) - 50.0 * sigma + u[0] + jnp.log(0.1) - 0.1 * nu + u[1]
    walk = jnp.sum(normal(s, jnp.concatenate([jnp.zeros(1), s[:-1]]), sigma))
    y = RETURNS / jnp.exp(s)
    constant = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * jnp.log(nu * jnp.pi)
    return prior + walk + jnp.sum(constant - s - (nu + 1) / 2 * jnp.log1p(y**2 / nu))


CASES: dict[str, Any] = {
    "eight schools": (eight_schools(ERROR).given({"y": EFFECT}), schools_by_hand, 10, 1000, 9),
    "logistic 1000 x 25": (logistic(INPUTS).given({"y": LABELS}), logistic_by_hand, 25, 1000, 5),
    "stochastic volatility 500, centred": (volatility(500).given({"r": RETURNS}), volatility_by_hand, 502, 200, 1),
}


def ours(posterior: Any, draws: int) -> Callable[[Any], Any]:
    def run(key: Any) -> Any:
        chains = inference.mcmc(posterior, inference.nuts(), key=key, num_warmup=draws, num_samples=draws)
        return chains.choices, chains.statistics["num_integration_steps"]

    return run


def theirs(log_density: Any, size: int, draws: int) -> Callable[[Any], Any]:
    kernel = blackjax.nuts.build_kernel()

    def chain(key: Any) -> Any:
        key_start, key_warm, key_run = jax.random.split(key, 3)
        start = jax.random.uniform(key_start, (size,), minval=-2.0, maxval=2.0)
        warm_up = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), _ = warm_up.run(key_warm, start, draws)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel(key, state, log_density, **parameters)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(step, state, jax.random.split(key_run, draws))[1]

    return jax.jit(lambda key: jax.vmap(chain)(jax.random.split(key, CHAINS)))


def least_size(draws: Any) -> float:
    """Return the smallest bulk effective sample size of all numbers."""
    rows = inference.summarize(draws if isinstance(draws, dict) else {"u": draws})
    return min(row.ess_bulk for row in rows.values())


def measured(run: Callable[[Any], Any], repeats: int) -> tuple[list[float], list[float], list[float], float]:
    """Return seconds, effective sizes and leapfrog steps of warm runs, and the seconds of the first call."""
    start = time.perf_counter()
    jax.block_until_ready(run(jax.random.key(0)))
    first = time.perf_counter() - start
    seconds, sizes, steps = [], [], []
    for n in range(1, repeats + 1):
        start = time.perf_counter()
        draws, taken = jax.block_until_ready(run(jax.random.key(n)))
        seconds.append(time.perf_counter() - start)
        sizes.append(least_size(draws))
        steps.append(float(np.asarray(taken).sum()))
    return seconds, sizes, steps, first


def compare(name: str) -> None:
    posterior, log_density, size, draws, repeats = CASES[name]
    runs = {"expectax": ours(posterior, draws), "BlackJAX": theirs(log_density, size, draws)}
    firsts, rows = {}, {who: ([], [], []) for who in runs}
    for who, run in runs.items():
        _, _, _, firsts[who] = measured(run, 0)
    counter = CompileCounter()
    for n in range(1, repeats + 1):
        for who, run in runs.items():
            start = time.perf_counter()
            draws_found, taken = jax.block_until_ready(run(jax.random.key(n)))
            rows[who][0].append(time.perf_counter() - start)
            before = counter.count
            rows[who][1].append(least_size(draws_found))
            rows[who][2].append(float(np.asarray(taken).sum()))
            counter.count = before
    for who, (seconds, sizes, steps) in rows.items():
        middle, per = np.median(seconds), np.median(np.array(seconds) / np.array(steps)) * 1e6
        print(
            f"| {name} | {who} | {firsts[who] - middle:.2f} | {middle:.3f} | {np.median(sizes) / middle:.1f} | "
            f"{per:.2f} |"
        )
    print(f"  compilations in {2 * repeats} warm runs: {counter.count}", flush=True)


def reparameterised() -> None:
    """Minimal effective sizes per second of the volatility model as it is written, and after a pilot."""
    posterior = CASES["stochastic volatility 500, centred"][0]
    start = time.perf_counter()
    easier = inference.auto_reparameterize(posterior, key=jax.random.key(0)).posterior
    pilot = time.perf_counter() - start
    for name, target in (("centred", posterior), ("automatic", easier)):
        seconds, sizes, steps, first = measured(ours(target, 1000), 1)
        print(
            f"| {name} | {seconds[0]:.1f} | {sizes[0]:.0f} | {sizes[0] / seconds[0]:.2f} | {1e3 * sizes[0] / steps[0]:.3f} |"
            f" first call {first:.1f} s, pilot {pilot:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--volatility", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | | compile, s | run, s | min bulk ESS/s | us a leapfrog step |\n|---|---|---|---|---|---|")
    for case in CASES:
        if options.only in case:
            compare(case)
    if options.volatility:
        print("| written | run, s | min bulk ESS | ESS/s | ESS per 1000 leapfrog steps |\n|---|---|---|---|---|")
        reparameterised()
