"""Evidence on random programs: what `generate` weighs, and what `marginalize_discrete` sums, against enumeration.

The law: with $q$ the density of what `generate` draws, $\\sum_u q(u) e^{w(u)}$ over all draws is the marginal likelihood
of the constraints. It follows from $w = \\log p - \\log q$ for every draw and $\\sum_u q(u) = 1$; both are checked.
"""

import dataclasses
import functools
import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from scipy import special, stats

from control_flow_models import Seen
from expectax import dist, ppl
from random_programs import Block, example, in_python, model_of, programs, random_choices, table

X = np.array([0.6, -0.9])
KEYS = 48  # draws of each program
NUM_VALUES = {"flip": 2, "flips": 2, "pick": 3}
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
quiet = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def finite(body: Any) -> Any:
    """Return a body with finite choices alone."""
    kinds = {"normal": "flip", "vector": "pick"}

    def one(s: Any) -> Any:
        if isinstance(s, Block):
            return dataclasses.replace(s, bodies=tuple(map(finite, s.bodies)))
        return dataclasses.replace(s, kind=kinds.get(s.kind, s.kind))

    return tuple(map(one, body))


def interpreted(body: Any, choices: dict[str, np.ndarray]) -> Seen:
    seen = Seen(choices, {path: shape for path, (_, shape) in table(body).items()})
    in_python(body, [X[0], X[1]], seen)
    return seen


def total(seen: Seen, wanted: dict[str, np.ndarray]) -> float:
    return float(sum(np.sum(np.where(wanted[path], log, 0.0)) for path, log in seen.log.items()))


def by_path(tree: Any, scope: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for address, value in tree.items():
        inner = isinstance(value, dict)
        found |= by_path(value, f"{scope}{address}/") if inner else {scope + address: np.asarray(value)}
    return found


def random_flags(sites: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return which elements are given: of each address all, none or some."""
    fill = [lambda n: np.ones(n, bool), lambda n: np.zeros(n, bool), lambda n: np.asarray(rng.random(n) < 0.5)]
    return {path: fill[rng.integers(3)](shape) for path, (_, shape) in sites.items()}


def assignments(sites: Any, start: dict[str, np.ndarray], free: dict[str, np.ndarray]) -> Any:
    """Yield all choices that differ from `start` where `free` is set alone."""
    places = [(path, tuple(index)) for path, flags in free.items() for index in np.argwhere(flags)]
    for values in itertools.product(*(range(NUM_VALUES[sites[path][0]]) for path, _ in places)):
        choices = {path: np.array(value) for path, value in start.items()}
        for (path, index), value in zip(places, values, strict=True):
            choices[path][index] = value
        yield choices


def num_states(sites: Any, free: dict[str, np.ndarray]) -> int:
    return int(np.prod([float(NUM_VALUES[sites[path][0]]) ** flags.sum() for path, flags in free.items()]))


def check_weights(body: Any, seed: int) -> None:
    """Check the law for random constraints on a program of finite choices."""
    body, rng = finite(body), np.random.default_rng(seed)
    sites = table(body)
    flags = random_flags(sites, rng)
    for path in rng.permutation(list(sites)):  # give more until what is left can be enumerated
        if num_states(sites, {p: ~f for p, f in flags.items()}) <= 1000:
            break
        flags[path] = np.ones_like(flags[path])
    free = {path: ~f for path, f in flags.items()}
    given_values = random_choices(sites, rng)
    constraints = {}
    for path, value in given_values.items():
        if flags[path].any():
            constraints[path] = jnp.asarray(value) if flags[path].all() else ppl.masked(jnp.asarray(value), flags[path])
    keys = jax.random.split(jax.random.key(seed), KEYS)
    program = model_of(body)(jnp.asarray(X))
    traces, weights = jax.jit(lambda keys: lax.map(lambda key: program.generate(key, constraints), keys))(keys)
    drawn = by_path(traces.choices)

    weight_of: dict[Any, float] = {}
    for i, weight in enumerate(np.asarray(weights)):
        choices = {path: value[i] for path, value in drawn.items()}
        seen = interpreted(body, choices)
        log_p = total(seen, dict.fromkeys(sites, np.array(True))) + seen.fixed
        close(weight, log_p - total(seen, free))
        close(traces.log_density[i], log_p)
        for path, value in choices.items():
            here = flags[path] & seen.present[path]
            np.testing.assert_array_equal(value[here], given_values[path][here])
        weight_of[outcome(choices, seen)] = float(weight)

    proposal, evidence, from_weights = 0.0, 0.0, 0.0
    for choices in assignments(sites, {p: np.where(flags[p], v, 0) for p, v in given_values.items()}, free):
        seen = interpreted(body, choices)
        if any(np.any(choices[path][free[path] & ~seen.present[path]]) for path in sites):
            continue  # the same run as with 0 at what is not made
        q = np.exp(total(seen, free))
        p = np.exp(total(seen, dict.fromkeys(sites, np.array(True))) + seen.fixed)
        proposal, evidence = proposal + q, evidence + p
        from_weights += q * np.exp(weight_of.get(outcome(choices, seen), np.log(p / q)))
    close([proposal, from_weights / evidence], [1.0, 1.0])


def outcome(choices: dict[str, np.ndarray], seen: Seen) -> Any:
    return tuple(
        (path, tuple(np.where(seen.present[path], v, 0).ravel().astype(int))) for path, v in sorted(choices.items())
    )


@pytest.mark.timeout(600)
@quiet(max_examples=8)
@given(programs())
def test_weights_are_those_of_the_evidence(program):
    check_weights(*program)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@quiet(max_examples=60)
@given(programs())
def test_weights_are_those_of_the_evidence_on_many_programs(program):
    check_weights(*program)


# --- marginalize_discrete on the same programs ------------------------------------------------------------------------


def summed_by_hand(body: Any, sites: Any, choices: dict[str, np.ndarray], hidden: Any) -> float:
    """Return the log density of the other choices, by adding up all values of the hidden ones."""
    free = {path: np.full(shape, path in hidden) for path, (_, shape) in sites.items()}
    terms = []
    for values in assignments(sites, {p: np.where(p in hidden, 0, v) for p, v in choices.items()}, free):
        seen = interpreted(body, values)
        if not any(np.any(values[path][free[path] & ~seen.present[path]]) for path in hidden):
            terms.append(total(seen, dict.fromkeys(sites, np.array(True))) + seen.fixed)
    return float(special.logsumexp(terms))


def check_sums(body: Any, seed: int) -> int:
    """Sum out all finite choices, and each alone; return how many of these sums the program allowed."""
    sites, rng, done = table(body), np.random.default_rng(seed), 0
    summable = [path for path, (kind, _) in sites.items() if kind in NUM_VALUES]
    choices = random_choices(sites, rng)
    for hidden in [summable, *([path] for path in summable)]:
        free = {path: np.ones(sites[path][1], bool) for path in hidden}
        if not hidden or num_states(sites, free) > 1000:
            continue
        rest = {path: jnp.asarray(value) for path, value in choices.items() if path not in hidden}
        try:
            program = ppl.marginalize_discrete(model_of(body)(jnp.asarray(X)), hidden)
            found = jax.jit(lambda rest, program=program: program.assess(rest)[0])(rest)
        except ppl.ControlFlowError as error:
            assert "marginalize_discrete" in str(error) or "several elements" in str(error), error
            continue
        close(found, summed_by_hand(body, sites, choices, hidden))
        done += 1
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sums_of_random_programs():
    rng = random.Random(1)
    assert sum(check_sums(*example(rng.getrandbits(32))) for _ in range(10)) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sums_of_many_random_programs():
    rng = random.Random(2)
    assert sum(check_sums(*example(rng.getrandbits(32))) for _ in range(60)) >= 60


# --- random mixtures and chains in lanes -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Finite choices in lanes: each but the first is drawn from a table by an earlier one; a normal sees all of them.

    `steps`: the choices stand in a scan, the first one drawn by its last self. `axis`: where the probabilities carry
    their lanes. `nested`: a vmap of two lanes around.
    """

    lanes: int
    counts: tuple[int, ...]
    parents: tuple[int, ...]
    axis: int
    nested: bool
    steps: int
    seed: int

    def numbers(self) -> Any:
        """Return per lane the first one's rows (one by its last self), the tables, and the centres."""
        rng, first = np.random.default_rng(self.seed), self.counts[0]
        outer = (2,) if self.nested else ()
        rows = rng.dirichlet(np.ones(first), size=(*outer, self.lanes, first))
        tables = [
            rng.dirichlet(np.ones(k), size=self.counts[p]) for k, p in zip(self.counts[1:], self.parents, strict=True)
        ]
        return rows, tables, [rng.normal(size=k) for k in self.counts]

    def model(self) -> ppl.Model:
        rows, tables, centres = self.numbers()

        def step(rows: Any, before: Any) -> Any:
            chosen = [ppl.sample("k0", dist.Categorical(probs=rows[before]))]
            for n, (parent, rule) in enumerate(zip(self.parents, tables, strict=True)):
                chosen.append(ppl.sample(f"k{n + 1}", dist.Categorical(probs=jnp.asarray(rule)[chosen[parent]])))
            mean = sum(jnp.asarray(c)[k] for c, k in zip(centres, chosen, strict=True))
            ppl.sample("y", dist.Normal(mean, 1.0))
            return chosen[0]

        def lane(rows: Any) -> None:
            if self.steps:
                lax.scan(lambda before, _: (step(rows, before), None), 0, length=self.steps)
            else:
                step(rows, 0)

        def run() -> None:
            mapped = jax.vmap(lane, in_axes=self.axis)
            lanes = np.moveaxis(rows, -3, self.axis + rows.ndim - 3 if self.axis >= 0 else self.axis)
            (jax.vmap(mapped) if self.nested else mapped)(jnp.asarray(lanes))

        return ppl.model(run)

    def by_hand(self, y: np.ndarray) -> float:
        rows, tables, centres = self.numbers()
        time = y if self.steps else y[None]
        flat, ys = rows.reshape(-1, *rows.shape[-2:]), time.reshape(len(time), -1)
        return sum(self._lane(flat[lane], tables, centres, ys[:, lane]) for lane in range(len(flat)))

    def _lane(self, rows: Any, tables: Any, centres: Any, y: Any) -> float:
        total, each = [], list(itertools.product(*map(range, self.counts)))
        for path in itertools.product(each, repeat=len(y)):
            weight, before = 1.0, 0
            for chosen, value in zip(path, y, strict=True):
                weight *= rows[before][chosen[0]]
                for n, (parent, rule) in enumerate(zip(self.parents, tables, strict=True)):
                    weight *= rule[chosen[parent]][chosen[n + 1]]
                weight *= stats.norm.pdf(value, sum(c[k] for c, k in zip(centres, chosen, strict=True)))
                before = chosen[0]
            total.append(weight)
        return float(np.log(sum(total)))


def mixtures() -> st.SearchStrategy[Mixture]:
    def one(seed: int) -> Mixture:
        rng = random.Random(seed)
        counts = tuple(rng.choice([2, 3]) for _ in range(rng.choice([1, 2, 3])))
        parents = tuple(rng.randrange(n) for n in range(1, len(counts)))
        steps = rng.choice([0, 0, 2]) if len(counts) < 3 else 0
        return Mixture(
            rng.choice([1, 2, 3, 4]), counts, parents, rng.choice([0, 1, 2, -1]), rng.random() < 0.3, steps, seed
        )

    return st.integers(0, 2**32 - 1).map(one)


@pytest.mark.timeout(600)
@pytest.mark.slow
@quiet(max_examples=20)
@given(mixtures())
def test_sums_of_random_mixtures(mixture):
    program = ppl.marginalize_discrete(mixture.model()())
    (y,) = program.sites().values()
    y = np.random.default_rng(mixture.seed).normal(size=y.shape)
    close(jax.jit(program.assess)({"y": jnp.asarray(y)})[0], mixture.by_hand(y))
