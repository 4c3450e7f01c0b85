"""The benchmarks of the language: compile time of unrolled models, run time of `simulate` and `assess`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from timing import Row, interleaved, normal, ratio_row

import expectax as ex
from expectax import dist

KINDS = (
    lambda i: dist.Normal(0.0, 1.0 + i),
    lambda i: dist.Gamma(2.0, 1.0 + i),
    lambda i: dist.Beta(1.0 + i, 2.0),
    lambda i: dist.Bernoulli(0.3),
    lambda i: dist.StudentT(3.0, 0.0, 1.0 + i),
    lambda i: dist.Uniform(0.0, 1.0 + i),
    lambda i: dist.Exponential(1.0 + i),
    lambda i: dist.HalfNormal(1.0 + i),
)


def unrolled(count: int) -> ex.Program:
    """A model of many scalar sites, written one by one."""

    @ex.model
    def many() -> None:
        for i in range(count):
            ex.sample(f"x{i}", KINDS[i % len(KINDS)](i))

    return many()


def compile_time() -> list[Row]:
    """Compile `simulate` of 200 mixed scalar sites, beside 200 numbers cut out of one array by hand."""

    def seconds(function: Any) -> float:
        jax.clear_caches()
        lowered = jax.jit(function).lower(jax.random.key(0))
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    def ours(key: Any) -> Any:
        trace = unrolled(200).simulate(key)
        return trace.choices, trace.log_density

    def hand(key: Any) -> Any:
        z = jax.random.normal(key, (200,))
        return [z[i] * (1.0 + i) for i in range(200)]

    found = sorted(seconds(ours) for _ in range(3))[1]
    floor = sorted(seconds(hand) for _ in range(3))[1]
    return [
        Row("compiling simulate, 200 mixed scalar sites", found, None, "s", 2.0),
        Row("  for comparison: 200 scaled normals by hand", floor, None, "s", 2.0),
    ]


def staging() -> list[Row]:
    """Stage models of 200 and 500 sites written one by one."""
    rows = []
    for count in (200, 500):
        program = unrolled(count)

        def seconds(program: Any = program) -> float:
            start = time.perf_counter()
            program.sites()
            return time.perf_counter() - start

        cold, warm = seconds(), sorted(seconds() for _ in range(9))[4]
        rows.append(
            Row(f"staging, {count} mixed sites, per site", 1e3 * warm / count, None, "ms", 2.0, 1e3 * cold / count)
        )
    return rows


X = jax.random.normal(jax.random.key(1), (1000, 25))
LABELS = (jax.random.uniform(jax.random.key(2), (1000,)) < 0.5).astype(jnp.int32)
PATH = jnp.cumsum(jax.random.normal(jax.random.key(3), (200,)))


@ex.model
def logistic(x: Any) -> None:
    """A logistic regression."""
    w = ex.sample("w", dist.Normal(jnp.zeros(25), 1.0))
    b = ex.sample("b", dist.Normal(0.0, 1.0))
    ex.sample("y", dist.Bernoulli(logits=x @ w + b))


@ex.model
def walk(scale: Any) -> None:
    """A random walk with noisy observations."""

    def step(x: Any, _: Any) -> Any:
        x = ex.sample("x", dist.Normal(x, scale))
        ex.sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, length=200)


def run_time() -> list[Row]:
    """`assess` with its gradient, and `simulate`, beside hand-written JAX."""
    rows = []

    def hand_logistic(z: Any) -> Any:
        logits = X @ z["w"] + z["b"]
        prior = jnp.sum(normal(z["w"], 0.0, 1.0)) + normal(z["b"], 0.0, 1.0)
        return prior + jnp.sum(LABELS * logits - jax.nn.softplus(logits))

    def hand_walk(z: Any) -> Any:
        def step(x: Any, pair: Any) -> Any:
            new, y = pair
            return new, normal(new, x, 0.5) + normal(y, new, 1.0)

        return jnp.sum(jax.lax.scan(step, 0.0, (z["x"], PATH))[1])

    def draw_logistic(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        w, b = jax.random.normal(keys[0], (25,)), jax.random.normal(keys[1])
        logits = X @ w + b
        y = (jax.random.uniform(keys[2], (1000,)) < jax.nn.sigmoid(logits)).astype(jnp.int32)
        log_p = jnp.sum(normal(w, 0.0, 1.0)) + normal(b, 0.0, 1.0)
        return {"w": w, "b": b, "y": y}, log_p + jnp.sum(y * logits - jax.nn.softplus(logits))

    def draw_walk(key: Any) -> Any:
        def step(x: Any, noise: Any) -> Any:
            new = x + 0.5 * noise[0]
            y = new + noise[1]
            return new, (new, y, normal(new, x, 0.5) + normal(y, new, 1.0))

        _, (x, y, log_p) = jax.lax.scan(step, 0.0, jax.random.normal(key, (200, 2)))
        return {"x": x, "y": y}, jnp.sum(log_p)

    def simulated(program: Any) -> Any:
        def run(key: Any) -> Any:
            trace = program.simulate(key)
            return trace.choices, trace.log_density

        return run

    regression = logistic(X).given({"y": LABELS})
    chain = walk(0.5).given({"y": PATH})
    cases = {
        "assess, logistic regression 1000 x 25": (regression.log_density, hand_logistic, {"w": jnp.ones(25), "b": 0.1}),
        "assess, scan of 200 steps": (chain.log_density, hand_walk, {"x": PATH}),
    }
    for name, (ours, hand, start) in cases.items():
        for what, transform in (("value", lambda f: f), ("gradient", jax.value_and_grad)):
            pair = {"ours": jax.jit(transform(ours)), "hand": jax.jit(transform(hand))}
            shifted = lambda f, start=start: lambda i: f(jax.tree.map(lambda v: v + 1e-3 * i, start))  # noqa: E731
            found = interleaved({n: shifted(f) for n, f in pair.items()}, repeats=300)
            rows.append(ratio_row(f"{name}, {what}", found, "ours", 1.05))
    draws = {
        "simulate, logistic regression 1000 x 25": (logistic(X), draw_logistic),
        "simulate, scan of 200 steps": (walk(0.5), draw_walk),
    }
    for name, (program, hand) in draws.items():
        pair = {"ours": jax.jit(simulated(program)), "hand": jax.jit(hand)}
        found = interleaved({n: lambda i, f=f: f(jax.random.key(i)) for n, f in pair.items()}, repeats=300)
        rows.append(ratio_row(name, found, "ours", 1.05))
    return rows
