"""The bootstrap filter beside hand-written JAX, `particles` and `cuthbert`: `python benchmarks/filters.py`.

A linear Gaussian model, T = 100, systematic resampling when the effective sample size is below half. Times are warm
medians, the candidates taking turns; the first call stands apart. `--peers PYTHON` also runs the peers, in the
environment of that Python (`pip install particles cuthbert`), in processes of their own that take turns with ours.
"""

import os

os.environ.setdefault("NPROC", "8")

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import interleaved, normal

TIMES, COEFFICIENT, STATE_SD, OBSERVATION_SD = 100, 0.9, 0.5, 0.7


def data() -> np.ndarray:
    """Return the observations."""
    rng, x, ys = np.random.default_rng(0), 0.0, []
    for _ in range(TIMES):
        x = COEFFICIENT * x + STATE_SD * rng.normal()
        ys.append(x + OBSERVATION_SD * rng.normal())
    return np.array(ys)


def by_search(weights: Any, u: Any) -> Any:
    """Systematic resampling by a binary search for each level."""
    n = weights.shape[0]
    return jnp.searchsorted(jnp.cumsum(weights), (jnp.arange(n) + u) / n, side="right").clip(0, n - 1)


def by_scatter(weights: Any, u: Any) -> Any:
    """Systematic resampling by scattering each particle to its first offspring."""
    n = weights.shape[0]
    ends = jnp.clip(jnp.ceil(n * jnp.cumsum(weights) - u), 0, n).astype(jnp.int32).at[-1].set(n)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return lax.cummax(jnp.zeros(n, jnp.int32).at[starts].max(jnp.arange(n, dtype=jnp.int32), mode="drop"))


def by_count(weights: Any, u: Any) -> Any:
    """Systematic resampling by counting, for each offspring, the particles that have had all of theirs."""
    n = weights.shape[0]
    total = lax.associative_scan(jnp.add, weights)
    ends = jnp.clip(jnp.ceil(n * (total / total[-1]) - u), 0, n).astype(jnp.int32).at[-1].set(n)
    counts = jnp.zeros(n, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True)
    return lax.associative_scan(jnp.add, counts)


def hand(resampler: Callable[[Any, Any], Any], n: int) -> Callable[[int], Any]:
    """Return a bootstrap filter as one writes it by hand; it returns the log evidence."""
    ys = jnp.asarray(data(), float)

    @jax.jit
    def run(key: Any) -> Any:
        def step(state: Any, inputs: Any) -> Any:
            x, log_w, total = state
            y, key = inputs
            key_u, key_x = jax.random.split(key)
            top = jnp.max(log_w)
            w = jnp.exp(log_w - top)
            mean = jnp.mean(w)
            weights = w / jnp.sum(w)

            def resampled(_: Any) -> Any:
                a = resampler(weights, jax.random.uniform(key_u))
                return x[a], jnp.zeros(n), total + top + jnp.log(mean)

            needed = 1 / jnp.sum(weights**2) < n / 2
            x, log_w, total = lax.cond(needed, resampled, lambda _: (x, log_w, total), None)
            x = COEFFICIENT * x + STATE_SD * jax.random.normal(key_x, (n,))
            return (x, log_w + normal(y, x, OBSERVATION_SD), total), None

        keys = jax.random.split(key, TIMES)
        (_, log_w, total), _ = lax.scan(step, (jnp.zeros(n), jnp.zeros(n), 0.0), (ys, keys))
        return total + jax.nn.logsumexp(log_w) - jnp.log(n)

    return lambda i: run(jax.random.key(i))


def ours(n: int, store: str) -> Callable[[int], Any]:
    """Return expectax's filter on the model as a user writes it."""
    import expectax as ex
    from expectax import dist, inference

    @ex.model
    def walk() -> None:
        def step(x: Any, _: Any) -> Any:
            x = ex.sample("x", dist.Normal(COEFFICIENT * x, STATE_SD))
            ex.sample("y", dist.Normal(x, OBSERVATION_SD))
            return x, None

        lax.scan(step, 0.0, length=TIMES)

    posterior = walk().given({"y": jnp.asarray(data(), float)})

    def run(i: int) -> Any:
        filtered = inference.particle_filter(posterior, key=jax.random.key(i), num_particles=n, store=store)  # pyright: ignore[reportArgumentType]
        return filtered.particles.log_weights if store == "evidence" else filtered.particles.choices["x"]

    return run


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", help="the Python of an environment with particles and cuthbert")
    parser.add_argument("--without", nargs="*", default=[], help="leave candidates out")
    options = parser.parse_args()
    for n in options.sizes:
        candidates: dict[str, Callable[[int], Any]] = {
            "ours, evidence": ours(n, "evidence"),
            "ours, trajectories": ours(n, "trajectories"),
            "hand, search": hand(by_search, n),
            "hand, scatter": hand(by_scatter, n),
            "hand, count": hand(by_count, n),
        }
        if options.peers:
            candidates |= {f"peer, {name}": peer(options.peers, name, n) for name in ("particles", "cuthbert")}
        candidates = {name: f for name, f in candidates.items() if name not in options.without}
        found = interleaved(candidates, options.repeats)
        best = min(v["median"] for k, v in found.items() if k.startswith("hand"))
        for name, times in found.items():
            print(
                f"| {n} | {name} | {1e3 * times['first']:.0f} | {1e3 * times['median']:.2f} | {times['median'] / best:.2f} |"
            )


def peer(python: str, name: str, n: int) -> Callable[[int], Any]:
    """Return a peer's filter, in a process that runs once for each line that it is sent."""
    script = Path(__file__).with_name("filters_peer.py")
    process = subprocess.Popen(
        [python, str(script), name, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    sender, answers = process.stdin, process.stdout

    def run(i: int) -> Any:
        sender.write(json.dumps(i) + "\n")
        sender.flush()
        return json.loads(answers.readline())

    return run


if __name__ == "__main__":
    main()
