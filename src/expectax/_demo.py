"""The demonstration behind `python -m expectax`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax

from expectax import inference, models, vi

from ._demo_figure import save_figure

STEPS, SAMPLES, PARTICLES, GROUPS = 4000, 16, 50_000, 20_000


class Result(NamedTuple):
    """One method's answer: mean, standard error of the mean and sd per parameter, bound or evidence, seconds."""

    method: str
    mean: np.ndarray
    error: np.ndarray
    sd: np.ndarray
    bound: tuple[float, float] | None
    compile_seconds: float
    run_seconds: float
    draws: np.ndarray
    curve: np.ndarray | None = None


class Filter(NamedTuple):
    """The particle filter's answer beside the exact one."""

    log_evidence: float
    error: float
    exact: models.Kalman
    mean: np.ndarray
    sd: np.ndarray
    compile_seconds: float
    run_seconds: float


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Run twice; return the result and the seconds for compiling (the difference) and running."""
    start = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(function()))
    first = time.perf_counter()
    result = function()
    jax.block_until_ready(jax.tree.leaves(result))
    end = time.perf_counter()
    return result, max(0.0, (first - start) - (end - first)), end - first


def table_values(choices: Any) -> Any:
    """Return `(mu, tau, theta_0, ..., theta_7)` of one draw."""
    theta = choices["mu"] + choices["tau"] * choices["z"]
    return jnp.concatenate([jnp.stack([choices["mu"], choices["tau"]]), theta])


def eight_schools(seed: int) -> list[Result]:
    """Fit eight schools four ways."""
    y, sigma = jnp.array(models.EFFECT), jnp.array(models.STANDARD_ERROR)
    posterior = models.eight_schools(sigma).given({"y": y})
    keys = jax.random.split(jax.random.key(seed), 8)

    def guide(params: Any) -> Any:
        return models.eight_schools_guide(params, y, sigma)

    elbo, iwelbo = vi.elbo(posterior, guide), vi.iwelbo(posterior, guide, 5)
    loose, *loose_seconds = timed(lambda: fit(elbo, keys[0]))
    tight, *tight_seconds = timed(lambda: fit(iwelbo, keys[1]))
    proposal = guide(tight.params)
    return [
        nuts(posterior, keys[2]),
        importance(posterior, proposal, keys[3]),
        weighted_groups(posterior, proposal, iwelbo, tight, keys[4], tight_seconds),
        unweighted(guide(loose.params), elbo, loose, keys[5], loose_seconds),
    ]


def fit(objective: vi.Objective, key: Any) -> vi.Fit:
    """Maximise a bound with a decaying learning rate."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))
    start = models.eight_schools_start()
    return vi.fit(objective, start, optimizer, key=key, num_steps=STEPS, num_samples=SAMPLES, progress=True)


def nuts(posterior: Any, key: Any) -> Result:
    """The no-U-turn sampler, errors from the bulk effective sample size of each number."""
    kernel = inference.nuts(target_acceptance=0.95)
    chains, compiling, running = timed(
        lambda: inference.mcmc(posterior, kernel, key=key, num_samples=2500, progress=True)
    )
    draws = jax.vmap(jax.vmap(table_values))(chains.choices)
    rows = list(inference.summarize({"x": draws}).values())
    mean, sd = np.array([r.mean for r in rows]), np.array([r.sd for r in rows])
    error = np.array([r.mcse_mean for r in rows])
    return Result("NUTS", mean, error, sd, None, compiling, running, np.asarray(draws).reshape(-1, draws.shape[-1]))


def importance(posterior: Any, proposal: Any, key: Any) -> Result:
    """Importance sampling through the fitted guide."""
    cloud, compiling, running = timed(
        lambda: inference.importance(posterior, proposal, key=key, num_particles=PARTICLES)
    )
    values = jax.vmap(table_values)(cloud.choices)
    weights = cloud.weights[:, None]
    mean = jnp.sum(weights * values, 0)
    variance = jnp.sum(weights * (values - mean) ** 2, 0)
    error = jnp.sqrt(jnp.sum(weights**2 * (values - mean) ** 2, 0))
    bound = (float(cloud.log_evidence), float(cloud.log_evidence_standard_error))
    drawn = jax.vmap(table_values)(cloud.resample(jax.random.fold_in(key, 1), 10_000).choices)
    return _result("IS (guide)", mean, error, jnp.sqrt(variance), bound, compiling, running, drawn)


def weighted_groups(posterior: Any, proposal: Any, bound: Any, fitted: vi.Fit, key: Any, seconds: Any) -> Result:
    """The distribution that the importance-weighted bound fits: one of five particles, chosen by weight.

    (Cremer, Morris and Duvenaud 2017.)
    """
    cloud = inference.importance(posterior, proposal, key=key, num_particles=5 * GROUPS)
    values = jax.vmap(table_values)(cloud.choices).reshape(GROUPS, 5, -1)
    weights = jax.nn.softmax(cloud.log_weights.reshape(GROUPS, 5), axis=1)[..., None]
    means = jnp.sum(weights * values, 1)
    mean = jnp.mean(means, 0)
    variance = jnp.mean(jnp.sum(weights * values**2, 1), 0) - mean**2
    estimate = vi.estimate(bound, fitted.params, jax.random.fold_in(key, 1), GROUPS)
    pick = jax.random.categorical(jax.random.fold_in(key, 2), jnp.log(weights[..., 0]), axis=1)
    drawn = jnp.take_along_axis(values, pick[:, None, None], 1)[:10_000, 0]
    error = jnp.std(means, 0) / jnp.sqrt(GROUPS)
    pair = (float(estimate.mean), float(estimate.standard_error))
    return _result("IWELBO (5)", mean, error, jnp.sqrt(variance), pair, *seconds, drawn, fitted.values)


def unweighted(guide: Any, bound: Any, fitted: vi.Fit, key: Any, seconds: Any) -> Result:
    """The guide itself, fitted by the ELBO: fast, and biased where the guide cannot follow the posterior."""
    keys = jax.random.split(key, GROUPS)
    values = jax.vmap(lambda k: table_values(guide.simulate(k).choices))(keys)
    estimate = vi.estimate(bound, fitted.params, jax.random.fold_in(key, 1), GROUPS)
    sd, pair = jnp.std(values, 0), (float(estimate.mean), float(estimate.standard_error))
    return _result(
        "ELBO", jnp.mean(values, 0), sd / jnp.sqrt(GROUPS), sd, pair, *seconds, values[:10_000], fitted.values
    )


def _result(method: str, mean: Any, error: Any, sd: Any, bound: Any, *rest: Any) -> Result:
    arrays: list[Any] = [np.asarray(v) if isinstance(v, jax.Array) else v for v in (mean, error, sd, bound, *rest)]
    return Result(method, *arrays)


def nile(seed: int) -> Filter:
    """Filter the Nile flows, eight times for a standard error."""
    flows = jnp.array(models.NILE, float)
    model = models.local_level(len(models.NILE), models.OBSERVATION_SD, models.LEVEL_SD)
    posterior = model.given({"flow": flows})
    keys = jax.random.split(jax.random.key(seed + 1), 8)

    def run() -> list[inference.Filtered]:
        return [inference.particle_filter(posterior, key=k, num_particles=10_000) for k in keys]

    runs, compiling, running = timed(run)
    evidence = np.array([float(r.log_evidence) for r in runs])
    filtered = runs[0]
    return Filter(
        float(np.logaddexp.reduce(evidence) - np.log(len(evidence))),
        float(evidence.std(ddof=1) / np.sqrt(len(evidence))),
        models.kalman(models.NILE),
        np.asarray(filtered.mean()["level"]),
        np.asarray(filtered.sd()["level"]),
        compiling,
        running / len(keys),
    )


# --- printing ---------------------------------------------------------------------------------------------------


def print_schools(results: list[Result], out: TextIO) -> None:
    """Print one table: mean +- standard error (sd) per parameter and method."""
    names = list(models.REFERENCE)
    width = 22
    print("\nEight schools (Rubin 1981): posterior mean ± standard error of the mean (posterior sd)\n", file=out)
    print(f"{'':14}{'reference':>16}" + "".join(f"{r.method:>{width}}" for r in results), file=out)
    for n, name in enumerate(names):
        mean, sd = models.REFERENCE[name]
        cells = [f"{r.mean[n]:.2f} ± {r.error[n]:.2f} ({r.sd[n]:.2f})" for r in results]
        print(f"{name:14}{f'{mean:.2f} ({sd:.2f})':>16}" + "".join(f"{c:>{width}}" for c in cells), file=out)
    bounds = [f"{r.bound[0]:.3f} ± {r.bound[1]:.3f}" if r.bound else "-" for r in results]
    print(f"{'log evidence':14}{'':16}" + "".join(f"{b:>{width}}" for b in bounds), file=out)
    print(f"{'':14}{'':16}" + "".join(f"{_kind(r):>{width}}" for r in results), file=out)
    seconds = [f"{r.compile_seconds:.1f} / {r.run_seconds:.2f}" for r in results]
    print(f"{'s compile/run':14}{'':16}" + "".join(f"{s:>{width}}" for s in seconds), file=out)
    worst = max(((abs(r.mean - _reference()) / np.hypot(r.error, 0.05)).max(), r.method) for r in results[:3])
    print(
        f"\nNUTS, IS and IWELBO against the reference: largest difference {worst[0]:.1f} standard errors "
        f"({worst[1]}).\nELBO is the guide itself, unweighted: its difference from the reference is the known bias of "
        "a guide\nthat cannot follow the posterior (here the tail of tau), not noise.",
        file=out,
    )


def _kind(result: Result) -> str:
    return {"IS (guide)": "(estimate)", "NUTS": ""}.get(result.method, "(lower bound)")


def _reference() -> np.ndarray:
    return np.array([mean for mean, _ in models.REFERENCE.values()])


def print_nile(result: Filter, out: TextIO) -> None:
    """Print the evidence beside the exact one."""
    z = (result.log_evidence - result.exact.log_evidence) / result.error
    print(
        "\nNile flows 1871-1970 (Cobb 1978): local-level model as a plain lax.scan, bootstrap filter, 8 x 10,000 "
        f"particles\n\n{'log evidence':14}{result.log_evidence:.3f} ± {result.error:.3f}   exact (Kalman) "
        f"{result.exact.log_evidence:.3f}   difference {z:+.1f} standard errors\n"
        f"{'level in 1970':14}{result.mean[-1]:.1f} (sd {result.sd[-1]:.1f})   exact {result.exact.mean[-1]:.1f} "
        f"(sd {result.exact.sd[-1]:.1f})\n{'s compile/run':14}{result.compile_seconds:.1f} / {result.run_seconds:.2f}",
        file=out,
    )


def run(seed: int, folder: Path, out: TextIO) -> int:
    """Run everything, print the tables, save the figure."""
    start = time.perf_counter()
    schools = eight_schools(seed)
    print_schools(schools, out)
    river = nile(seed)
    print_nile(river, out)
    path = save_figure(schools, river, folder)
    print(f"\nFigure: {path}\nTotal: {time.perf_counter() - start:.0f} s", file=out)
    return 0
