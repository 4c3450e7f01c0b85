"""Laws of traces on random programs, against an interpreter in plain Python; see `random_programs`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from control_flow_models import Seen
from expectax import ppl
from random_programs import in_python, model_of, programs, random_choices, table

X = np.array([0.6, -0.9])
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
quiet = functools.partial(  # each example compiles a program, so shrinking a failure takes minutes: programs are small
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *scopes, last = path.split("/")
        functools.reduce(lambda inner, scope: inner.setdefault(scope, {}), scopes, tree)[last] = value
    return tree


def flattened(tree: Any, scope: str = "") -> dict[str, Any]:
    found = {}
    for address, value in tree.items():
        found |= flattened(value, f"{scope}{address}/") if isinstance(value, dict) else {scope + address: value}
    return found


class Reference:
    """What the interpreter says of some choices."""

    def __init__(self, body: Any, choices: dict[str, Any], x: Any):
        sites = table(body)
        seen = Seen(choices, {path: shape for path, (_, shape) in sites.items()})
        self.retval = in_python(body, [x[0], x[1]], seen)
        self.log, self.present, self.fixed, self.recorded = seen.log, seen.present, seen.fixed, seen.recorded
        self.log_p = self.total({path: True for path in sites}) + self.fixed

    def total(self, wanted: dict[str, Any]) -> float:
        """Return the sum of the log densities of the wanted elements; those of the absent ones are 0."""
        return float(sum(np.sum(np.where(wanted[path], log, 0.0)) for path, log in self.log.items()))


def check_trace(body: Any, trace: Any, x: Any = X) -> Reference:
    """Compare a trace with the interpreter at its choices."""
    reference = Reference(body, flattened(trace.choices), x)
    close(trace.log_density, reference.log_p)
    close(trace.retval, reference.retval)
    present = flattened(trace.present)
    for path, flags in reference.present.items():
        np.testing.assert_array_equal(present.get(path, np.ones(flags.shape, bool)), flags)
    for (path, index), value in reference.recorded.items():
        close(flattened(trace.deterministic)[path][index], value)
    return reference


def check_same(body: Any, a: Any, b: Any) -> None:
    """Two traces made the same choices."""
    present = Reference(body, flattened(a.choices), X).present
    for path, value in flattened(a.choices).items():
        here = present[path]
        np.testing.assert_allclose(value[here], flattened(b.choices)[path][here], rtol=1e-12, atol=1e-14)


def run(body: Any, some: dict[str, np.ndarray]) -> Any:
    """Return one compiled function that runs every operation."""
    model, all_sites = model_of(body), ppl.select(*some)
    selection = ppl.select(*some.items())

    def everything(arguments):
        key, first, second, mask = arguments
        x = jnp.asarray(X)
        program, keys = model(x), jax.random.split(key, 7)
        out = {"assessed": program.assess(first)}
        out["simulated"] = trace = program.simulate(keys[0])
        out["nothing"] = program.generate(keys[0], {})[1]
        out["generated"] = made, _ = program.generate(keys[1], first)
        there, weight, discard = made.update(keys[2], second, x + 0.3)
        out["there"], out["back"] = (there, weight), there.update(keys[3], discard, x)[:2]
        there, weight, discard = trace.update(keys[4], jax.tree.map(ppl.masked, second, mask))
        out["partly there"], out["partly back"] = (there, weight), there.update(keys[3], discard)[:2]
        out["all anew"], out["some anew"] = trace.regenerate(keys[5], all_sites), trace.regenerate(keys[6], selection)
        out["projected"] = trace.project(selection), trace.project(~selection)
        return out

    return jax.jit(lambda stacked: jax.lax.map(everything, stacked))  # one by one, as branches over lanes are others


ROUNDS = 6  # of choices and keys for one compilation


def check(body: Any, seed: int) -> None:
    """Run every operation from several random choices, and check each run."""
    sites, rng = table(body), np.random.default_rng(seed)
    some = random_masks(sites, rng)
    rounds = [(random_choices(sites, rng), random_choices(sites, rng), random_masks(sites, rng)) for _ in range(ROUNDS)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rounds)
    keys = jax.random.split(jax.random.key(seed), ROUNDS)
    out = jax.tree.map(np.asarray, run(body, some)((keys, *map(nested, stacked))))
    for i, choices in enumerate(rounds):
        check_round(body, sites, some, *choices, jax.tree.map(lambda leaf, i=i: leaf[i], out))


def random_masks(sites: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {path: np.asarray(rng.random(shape) < 0.5) for path, (_, shape) in sites.items()}


def check_round(body: Any, sites: Any, some: Any, first: Any, second: Any, mask: Any, out: Any) -> None:
    # densities
    at_first = Reference(body, first, X)
    close(out["assessed"][0], at_first.log_p)
    close(out["assessed"][1], at_first.retval)
    close(out["generated"][1], check_trace(body, out["generated"][0]).log_p)
    old = check_trace(body, out["simulated"])
    close(out["nothing"], old.fixed)

    # update to other choices and another argument, all given
    there, weight = out["there"]
    new = check_trace(body, there, X + 0.3)
    close(weight, new.log_p - at_first.log_p)
    _check_kept(there, second, new.present)
    back, opposite = out["back"]
    close(weight + opposite, 0.0)
    check_same(body, back, out["generated"][0])

    # update of some elements: what was absent before is drawn
    there, weight = out["partly there"]
    new = check_trace(body, there)
    drawn = {path: ~mask[path] & ~old.present[path] for path in sites}
    close(weight, new.log_p - old.log_p - new.total(drawn))
    _check_kept(there, second, {path: mask[path] & new.present[path] for path in sites})
    kept = {path: ~mask[path] & old.present[path] & new.present[path] for path in sites}
    _check_kept(there, flattened(out["simulated"].choices), kept)
    back, opposite = out["partly back"]
    close(opposite, old.log_p - new.log_p)
    check_same(body, back, out["simulated"])

    # regenerate and project
    anew, weight = out["all anew"]
    close(weight, check_trace(body, anew).fixed - old.fixed)
    anew, weight = out["some anew"]
    new = check_trace(body, anew)
    forth = new.total({path: some[path] | ~old.present[path] for path in sites})
    aback = old.total({path: some[path] | ~new.present[path] for path in sites})
    close(weight, new.log_p - forth - (old.log_p - aback))
    kept = {path: ~some[path] & old.present[path] & new.present[path] for path in sites}
    _check_kept(anew, flattened(out["simulated"].choices), kept)
    close(out["projected"][0], old.total(some))
    close(sum(out["projected"]), old.log_p - old.fixed)


def _check_kept(trace: Any, values: dict[str, Any], where: dict[str, Any]) -> None:
    for path, value in flattened(trace.choices).items():
        here = where[path]  # XLA may compute one draw twice, with roundings of its own
        np.testing.assert_allclose(value[here], values[path][here], rtol=1e-12, atol=1e-14)


@pytest.mark.timeout(900)  # two minutes of one core
@quiet(max_examples=6)
@given(programs())
def test_laws(program):
    check(*program)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@quiet(max_examples=30)
@given(programs())
def test_laws_on_many_programs(program):
    check(*program)


@pytest.mark.slow
@quiet(max_examples=2)
@given(programs())
def test_jit_and_vmap_draw_alike(pair):
    """`jit(simulate)` draws what `simulate` draws, and `vmap` over keys what a loop does."""
    body, seed = pair
    program = model_of(body)(jnp.asarray(X))
    keys = jax.random.split(jax.random.key(seed), 3)
    single = jax.jit(lambda key: program.simulate(key))
    loop = [single(key) for key in keys]
    _alike(program.simulate(keys[0]), loop[0])
    lanes = jax.jit(jax.vmap(program.simulate))(keys)
    for i in range(3):
        _alike(jax.tree.map(lambda leaf, i=i: leaf[i], lanes), loop[i])


def _alike(a: Any, b: Any) -> None:
    """Equal draws, but of what was not chosen: that has no meaning."""
    close(a.log_density, b.log_density)
    close(a.retval, b.retval)
    assert jax.tree.structure(a.choices) == jax.tree.structure(b.choices)
    present, other = flattened(a.present), flattened(b.choices)
    for path, value in flattened(a.choices).items():
        here = np.asarray(present.get(path, True))
        close(np.asarray(value)[here], np.asarray(other[path])[here])
