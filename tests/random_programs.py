"""Small programs as trees, run by JAX (`in_jax`) and by an interpreter in plain Python (`in_python`).

A body is a tuple of statements. Each sees the numbers that the ones before it made (`env`, the newest last) and adds
one number. The two interpreters share nothing but the trees.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from scipy import special

from control_flow_models import Seen
from expectax import dist, ppl

COVARIANCE = np.array([[1.0, 0.4], [0.4, 0.8]])
CENTRES = np.array([[-0.4, 0.1], [0.3, 0.9], [-0.8, 0.5]])  # what lanes and time steps are given


@dataclasses.dataclass(frozen=True)
class Affine:
    """A weighted sum of a constant and two of the latest numbers."""

    constant: float
    weights: tuple[float, float]
    back: tuple[int, int]  # how far back each number is

    def __call__(self, env: list[Any]) -> Any:
        picked = [env[-1 - min(b, len(env) - 1)] for b in self.back]
        return self.constant + self.weights[0] * picked[0] + self.weights[1] * picked[1]


@dataclasses.dataclass(frozen=True)
class Site:
    kind: str  # flip, flips (a batch of two), pick, normal, vector (an event of two), observe, factor, record
    affine: Affine
    address: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    kind: str  # jit, checkpoint, nested, lanes, same lanes, columns, scan, reverse, fori, while, cond, switch
    affine: Affine
    bodies: tuple[tuple[Any, ...], ...]
    share: bool = False  # do like sites of several branches have one address?
    address: str = ""


EVENTS = {"vector": (2,)}
BATCHES = {"flips": (2,)}
NO_CHOICE = ("observe", "factor", "record")
BRANCHES = {"cond": 2, "switch": 3}

# --- making trees -----------------------------------------------------------------------------------------------------

_KINDS = ["flip", "flip", "flips", "pick", "normal", "normal", "vector"]
_AROUND = ["cond"] * 4 + ["lanes"] * 3 + ["switch", "while", "scan", "same lanes", "columns", "reverse", "fori"]
_AROUND += ["nested", "jit", "checkpoint"]


def programs() -> st.SearchStrategy[tuple[tuple[Any, ...], int]]:
    """Return a strategy for pairs of a body and a seed: a site and blocks nested two or three deep.

    The tree is a function of the seed: Hypothesis' own choices, made part by part, repeat each other.
    """
    return st.integers(0, 2**32 - 1).map(example)


def example(seed: int) -> tuple[tuple[Any, ...], int]:
    """Return the body that a seed makes, and the seed."""
    return _program(random.Random(seed)), seed


def _program(rng: random.Random) -> tuple[Any, ...]:
    kinds = rng.choices(_AROUND, k=rng.choice([2, 2, 3]))
    if not set(kinds) & {*BRANCHES, "while"}:
        kinds[-1] = "cond"
    if len(kinds) == 2 and not set(kinds) & set(LANES) and rng.random() < 0.6:
        kinds.insert(0, "lanes")
    return addressed((_random_site(rng, _KINDS), *_nest(rng, kinds)))


def _affine(rng: random.Random) -> Affine:
    constant, *weights = (rng.uniform(-1.5, 1.5) for _ in range(3))
    return Affine(constant, (weights[0], weights[1]), (rng.randrange(2), rng.randrange(5)))


def _random_site(rng: random.Random, kinds: Any) -> Site:
    return Site(rng.choice(kinds), _affine(rng))


def _few(rng: random.Random) -> list[Site]:
    return [_random_site(rng, [*_KINDS, *NO_CHOICE])] if rng.random() < 0.3 else []


def _nest(rng: random.Random, kinds: list[str]) -> tuple[Any, ...]:
    """Return a body with blocks of these kinds, each inside the one before, and sites around them."""
    if not kinds:
        return (_random_site(rng, _KINDS), *_few(rng))
    parts = [_nest(rng, kinds[1:]), *(_nest(rng, []) for _ in range(BRANCHES.get(kinds[0], 1) - 1))]
    rng.shuffle(parts)
    before = [_random_site(rng, _KINDS)] if kinds[0] in BRANCHES else _few(rng)  # a branch hangs on a choice
    block = Block(kinds[0], _affine(rng), tuple(parts), share=rng.random() < 0.5)
    return (*before, block, *_few(rng))


def addressed(body: Any, numbers: Iterator[int] | None = None) -> Any:
    """Return a body whose statements have addresses, each its own but what branches share."""
    numbers = itertools.count() if numbers is None else numbers
    out: list[Any] = []
    for statement in body:
        named = dataclasses.replace(statement, address=f"{statement.kind[:4]}_{next(numbers)}".replace(" ", ""))
        if isinstance(named, Block):
            parts = [addressed(part, numbers) for part in named.bodies]
            if named.share:
                parts = [tuple(itertools.starmap(_like, itertools.zip_longest(part, parts[0]))) for part in parts]
                parts = [tuple(s for s in part if s is not None) for part in parts]
            named = dataclasses.replace(named, bodies=tuple(parts))
        out.append(named)
    return tuple(out)


def _like(own: Any, first: Any) -> Any:
    """Return a site with the address of the site of the first branch, if they are alike."""
    alike = isinstance(own, Site) and isinstance(first, Site) and own.kind == first.kind and own.kind not in NO_CHOICE
    return dataclasses.replace(own, address=first.address) if alike else own


# --- the table: path -> (kind, shape of the elements) ----------------------------------------------------------------------

LENGTH = {"lanes": 2, "same lanes": 3, "columns": 2, "scan": 2, "reverse": 3, "fori": 2, "while": 3}
LANES = ("lanes", "same lanes", "columns")


def table(body: Any, scope: str = "", times: tuple = (), lanes: tuple = ()) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for s in body:
        if isinstance(s, Site):
            if s.kind not in NO_CHOICE:
                found[scope + s.address] = (s.kind, times + lanes + BATCHES.get(s.kind, ()))
            continue
        own = (LENGTH[s.kind],) if s.kind in LENGTH else ()
        inner = f"{scope}{s.address}/" if s.kind == "nested" else scope
        for part in s.bodies:
            around = (times, lanes + own) if s.kind in LANES else (times + own, lanes)
            found |= table(part, inner, *around)
    return found


def random_choices(sites: dict[str, tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    draw = {"flip": lambda n: rng.integers(2, size=n), "pick": lambda n: rng.integers(3, size=n)}
    draw |= {"flips": draw["flip"], "normal": rng.standard_normal, "vector": rng.standard_normal}
    return {path: draw[kind]((*shape, *EVENTS.get(kind, ()))) for path, (kind, shape) in sites.items()}


# --- in JAX ---------------------------------------------------------------------------------------------------------------


def model_of(body: Any) -> ppl.Model:
    """Return the model of two numbers that a body is."""
    return ppl.model(lambda x: in_jax(body, [x[0], x[1]]))


def in_jax(body: Any, env: list[Any]) -> Any:
    made: list[Any] = []
    for statement in body:
        run = _site if isinstance(statement, Site) else _block
        made.append(run(statement, [*env, *made]))
    return jnp.tanh(sum(made))


def _site(s: Site, env: list[Any]) -> Any:
    a = s.affine(env)
    if s.kind == "flip":
        return 1.0 * ppl.sample(s.address, dist.Bernoulli(logits=a))
    if s.kind == "flips":
        return 0.5 * ppl.sample(s.address, dist.Bernoulli(logits=jnp.stack([a, 0.5 - a]))).sum()
    if s.kind == "pick":
        return 0.5 * ppl.sample(s.address, dist.Categorical(logits=jnp.stack([0.0 * a, a, -a])))
    if s.kind == "normal":
        return ppl.sample(s.address, dist.Normal(a, 0.7))
    if s.kind == "vector":
        vector = ppl.sample(s.address, dist.MultivariateNormal(jnp.stack([a, 1.0 - a]), jnp.asarray(COVARIANCE)))
        return vector[0] - 0.5 * vector[1]
    if s.kind == "observe":
        ppl.observe(s.address, dist.Normal(a, 0.9), 0.3)
    elif s.kind == "factor":
        ppl.factor(s.address, -jnp.square(a))
    else:
        a = ppl.deterministic(s.address, 2.0 * a)
    return a


def _block(b: Block, env: list[Any]) -> Any:
    a, body, centres = b.affine(env), b.bodies[0], jnp.asarray(CENTRES)
    whole = lambda part: lambda env: in_jax(part, env)  # noqa: E731
    match b.kind:
        case "jit":
            return jax.jit(whole(body))(env)
        case "checkpoint":
            return jax.checkpoint(whole(body))(env)
        case "nested":
            return ppl.sample(b.address, ppl.model(lambda a: in_jax(body, [*env, a]))(a))
        case "lanes":
            return jax.vmap(lambda c: in_jax(body, [*env, a, c]))(centres[:2, 0]).sum() / 2
        case "same lanes":
            return jax.vmap(lambda a: in_jax(body, [*env, a]), in_axes=None, axis_size=3)(a).sum() / 2
        case "columns":
            return jax.vmap(lambda c: in_jax(body, [*env, a, c[0] * c[2]]), in_axes=1)(centres).sum() / 2
        case "scan" | "reverse":
            xs = centres[: LENGTH[b.kind], 1]
            step = lambda carry, c: (in_jax(body, [*env, c, carry]), None)  # noqa: E731
            return lax.scan(step, a, xs, reverse=b.kind == "reverse")[0]
        case "fori":
            return lax.fori_loop(0, 2, lambda t, carry: in_jax(body, [*env, centres[t, 0], carry]), a)
        case "while":
            step = lambda carry: carry * 0.5 + in_jax(body, [*env, carry])  # noqa: E731
            return ppl.bounded_while(lambda carry: carry < 0.5123, step, a - 0.5, max_steps=3)
        case "cond":
            return lax.cond(env[-1] + 0.2 * a > 0.4123, whole(b.bodies[0]), whole(b.bodies[1]), [*env, a])
        case "switch":
            index = jnp.floor(2.0 * env[-1] + 0.2 * a + 0.1234).astype(int)
            return ppl.switch(index, [whole(part) for part in b.bodies], [*env, a])
    raise ValueError(b.kind)


# --- in Python ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the interpreter is: the scope of nested models, the step of each loop and the number of each lane."""

    scope: str = ""
    times: tuple[int, ...] = ()
    lanes: tuple[int, ...] = ()


def in_python(body: Any, env: list[Any], seen: Seen, place: Place = Place()) -> Any:  # noqa: B008
    made: list[Any] = []
    for statement in body:
        run = _python_site if isinstance(statement, Site) else _python_block
        made.append(run(statement, [*env, *made], seen, place))
    return np.tanh(sum(made))


def log_normal(deviation: Any, covariance: Any) -> Any:
    """Return the log density of a centred normal, of one number or a vector."""
    deviation, covariance = np.atleast_1d(deviation), np.atleast_2d(covariance)
    square = deviation @ np.linalg.solve(covariance, deviation)
    return -0.5 * (square + np.log(np.linalg.det(2 * np.pi * covariance)))


def _python_site(s: Site, env: list[Any], seen: Seen, place: Place) -> Any:
    a, path, index = s.affine(env), place.scope + s.address, place.times + place.lanes
    if s.kind == "flip":
        return float(seen.flip(path, special.expit(a), *index))
    if s.kind == "flips":
        return 0.5 * sum(seen.flip(path, special.expit(p), *index, j) for j, p in enumerate((a, 0.5 - a)))
    if s.kind == "pick":
        return 0.5 * seen.pick(path, special.softmax([0.0, a, -a]), *index)
    if s.kind == "normal":
        return seen.read(path, lambda v: log_normal(v - a, 0.49), *index)
    if s.kind == "vector":
        v = seen.read(path, lambda v: log_normal(v - np.array([a, 1.0 - a]), COVARIANCE), *index)
        return v[0] - 0.5 * v[1]
    if s.kind == "record":
        seen.recorded[path, index] = 2.0 * a
        return 2.0 * a
    seen.observe(log_normal(0.3 - a, 0.81) if s.kind == "observe" else -a * a)
    return a


def _python_block(b: Block, env: list[Any], seen: Seen, place: Place) -> Any:
    a, body = b.affine(env), b.bodies[0]

    def run(more: list[Any], time: Any = None, lane: Any = None) -> Any:
        times = place.times if time is None else (*place.times, time)
        lanes = place.lanes if lane is None else (*place.lanes, lane)
        return in_python(body, [*env, *more], seen, Place(place.scope, times, lanes))

    if b.kind in ("jit", "checkpoint"):
        return run([])
    if b.kind == "nested":
        return in_python(body, [*env, a], seen, dataclasses.replace(place, scope=f"{place.scope}{b.address}/"))
    if b.kind == "lanes":
        return sum(run([a, CENTRES[i, 0]], lane=i) for i in range(2)) / 2
    if b.kind == "same lanes":
        return sum(run([a], lane=i) for i in range(3)) / 2
    if b.kind == "columns":
        return sum(run([a, CENTRES[0, i] * CENTRES[2, i]], lane=i) for i in range(2)) / 2
    if b.kind in ("scan", "reverse", "fori"):
        steps = list(range(LENGTH[b.kind]))
        for t in reversed(steps) if b.kind == "reverse" else steps:
            a = run([CENTRES[t, 0 if b.kind == "fori" else 1], a], time=t)
        return a
    if b.kind == "while":
        a = a - 0.5
        for t in range(3):
            if a >= 0.5123:
                break
            a = a * 0.5 + run([a], time=t)
        return a
    if b.kind == "cond":
        taken = 0 if env[-1] + 0.2 * a > 0.4123 else 1
    else:
        taken = min(2, max(0, int(np.floor(2.0 * env[-1] + 0.2 * a + 0.1234))))
    return in_python(b.bodies[taken], [*env, a], seen, place)
