"""Every operation on traces, in every kind of control flow, against enumeration in plain Python: exact to 1e-10.

`Table` holds the reference's answer for every assignment of a model's choices: the log density of each element and
whether it was made. What an operation should return is then a sum over rows of that table.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from control_flow_branches import STRUCTURES
from control_flow_models import Seen, X
from expectax import ppl

KEY = jax.random.key(20261124)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
# the structures that are three deep are slow
every_structure = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.count(" of ") > 1 else n for n in STRUCTURES]
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)

# --- the reference ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """What the reference says of each assignment (row) and element (column) at one argument."""

    rows: np.ndarray  # (R, E) the values
    log: np.ndarray  # (R, E) log densities, 0 where absent
    present: np.ndarray  # (R, E)
    fixed: np.ndarray  # (R,) log density of what the model observes
    retval: np.ndarray  # (R, ...)

    @property
    def log_p(self) -> np.ndarray:
        return self.log.sum(1) + self.fixed


@functools.cache
def table(name: str, argument: int = 0) -> Table:
    case = STRUCTURES[name]
    rows = np.array(list(itertools.product(*map(range, counts(name)))))
    seen = [Seen(dict(zip(case.sites, split(name, row), strict=True))) for row in rows]
    retval = [case.reference(see, X[argument]) for see in seen]
    return Table(
        rows,
        *(np.array([np.concatenate([v.ravel() for v in part.values()]) for part in parts])
          for parts in ([see.log for see in seen], [see.present for see in seen])),
        np.array([see.fixed for see in seen]),
        np.array(retval),
    )  # fmt: skip


def counts(name: str) -> list[int]:
    """Return the number of values of each element."""
    return [count for count, shape in STRUCTURES[name].sites.values() for _ in range(int(np.prod(shape)))]


def split(name: str, flat: Any) -> list[Any]:
    """Return `(..., E)` as one array `(..., *shape)` per path."""
    shapes = [shape for _, shape in STRUCTURES[name].sites.values()]
    parts = np.split(np.asarray(flat), np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1], axis=-1)
    return [part.reshape((*part.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]


def nested(name: str, flat: Any) -> dict[str, Any]:
    """Return `(..., E)` as a nested dict of choices."""
    tree: dict[str, Any] = {}
    for path, part in zip(STRUCTURES[name].sites, split(name, flat), strict=True):
        *scopes, last = path.split("/")
        functools.reduce(lambda inner, scope: inner.setdefault(scope, {}), scopes, tree)[last] = part
    return tree


def at_path(tree: Any, path: str) -> Any:
    return functools.reduce(lambda inner, scope: inner[scope], path.split("/"), tree)


def flat(name: str, choices: Any) -> np.ndarray:
    """Return batched choices as `(N, E)`."""
    leaves = [np.asarray(at_path(choices, path)) for path in STRUCTURES[name].sites]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def number(name: str, values: np.ndarray) -> np.ndarray:
    """Return the rows of the table that hold these values `(N, E)`."""
    return np.ravel_multi_index(tuple(values.T), counts(name))


@functools.cache
def same(name: str, argument: int = 0) -> np.ndarray:
    """Return for each row the row of the same trace with 0 where nothing was chosen."""
    t = table(name, argument)
    return number(name, np.where(t.present, t.rows, 0))


def columns(name: str, path: str, index: Any = ...) -> np.ndarray:
    """Return which elements are those of a path, or some of them."""
    parts = split(name, np.zeros(len(counts(name)), bool))
    parts[list(STRUCTURES[name].sites).index(path)][index] = True
    return np.concatenate([part.ravel() for part in parts])


def single(name: str) -> tuple[str, tuple[int, ...]]:
    """Return an element by path and index: the last one of the first path that has several."""
    sites = STRUCTURES[name].sites
    path = next((path for path, (_, shape) in sites.items() if shape), next(iter(sites)))
    return path, tuple(n - 1 for n in sites[path][1])


def check_trace(name: str, trace: Any, argument: int = 0) -> np.ndarray:
    """Compare batched traces with the table: densities, presence and returned values; return their rows."""
    t, r = table(name, argument), number(name, flat(name, trace.choices))
    close(trace.log_density, t.log_p[r])
    close(trace.retval, t.retval[r])
    for path in STRUCTURES[name].sites:
        made = t.present[:, columns(name, path)]
        if made.all():  # not in a branch, or in all of them
            with pytest.raises(KeyError):
                at_path(trace.present, path)
        else:
            flags = np.asarray(at_path(trace.present, path))
            np.testing.assert_array_equal(flags.reshape(len(r), -1), made[r])
    return r


def check_frequencies(name: str, r: np.ndarray, q: np.ndarray) -> None:
    """Chi-squared test that traces (rows) have the probabilities `q` (per row); the key is pinned: alarm at 1e-6."""
    distinct = np.unique(same(name))
    expected, observed = len(r) * q[distinct], np.bincount(same(name)[r], minlength=len(q))[distinct]
    assert (expected[observed > 0] > 0).all()
    often = expected > 8
    pairs = [*zip(observed[often], expected[often], strict=True), (observed[~often].sum(), expected[~often].sum())]
    statistic = sum((o - e) ** 2 / e for o, e in pairs if e > 0)
    assert stats.chi2.sf(statistic, max(1, len(pairs) - 1)) > 1e-6


@functools.cache
def traces(name: str) -> Any:
    """Return the traces of all rows at the first argument, and their weights."""
    program = STRUCTURES[name].model
    generate = jax.jit(jax.vmap(lambda z, x: program(x).generate(KEY, z), in_axes=(0, None)))
    return generate(nested(name, table(name).rows), X[0])


def chosen(tree: Any, r: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[r], tree)


# --- assess, simulate, generate -----------------------------------------------------------------------------------------


@every_structure
def test_assess(name):
    """On every assignment and both arguments; what stands in the place of an absent choice does not count."""
    program, t = STRUCTURES[name].model, table(name)
    garbage = np.where(t.present, t.rows, 99)
    assess = jax.jit(jax.vmap(jax.vmap(lambda z, x: program(x).assess(z), in_axes=(0, None)), in_axes=(None, 0)))
    density, retval = assess(nested(name, np.concatenate([t.rows, garbage])), X)
    for argument in range(2):
        t = table(name, argument)
        close(density[argument], np.tile(t.log_p, 2))
        close(retval[argument], np.concatenate([t.retval, t.retval]))
        distinct = np.unique(same(name, argument))
        close(np.exp(density[argument] - np.tile(t.fixed, 2))[distinct].sum(), 1.0)


@every_structure
def test_simulate(name):
    """Densities, presence and returned values of each draw, and the law of the draws."""
    simulate = jax.jit(jax.vmap(lambda key, x: STRUCTURES[name].model(x).simulate(key), in_axes=(0, None)))
    r = check_trace(name, simulate(jax.random.split(KEY, 8000), X[0]))
    check_frequencies(name, r, np.exp(table(name).log.sum(1)))


@every_structure
def test_generate_with_everything(name):
    trace, weight = traces(name)
    r = check_trace(name, trace)
    np.testing.assert_array_equal(same(name)[r], same(name))
    close(weight, table(name).log_p)


@every_structure
def test_generate_with_masks(name):
    """Any part of any assignment may be given; the weight is the density of what is given and made."""
    program, t = STRUCTURES[name].model, table(name)

    @jax.jit
    @jax.vmap
    def generate(key, values, mask):
        given = jax.tree.map(ppl.masked, values, mask)
        return program(jnp.asarray(X[0])).generate(key, given)

    rng = np.random.default_rng(1)
    values, mask = t.rows[rng.integers(len(t.rows), size=400)], rng.random((400, t.rows.shape[1])) < 0.5
    trace, weight = generate(jax.random.split(KEY, 400), nested(name, values), nested(name, mask))
    r = check_trace(name, trace)
    kept = mask & t.present[r]
    np.testing.assert_array_equal(t.rows[r][kept], values[kept])
    close(weight, (t.log[r] * kept).sum(1) + t.fixed[r])


@pytest.mark.parametrize("how", ["whole", "at"])
@every_structure
def test_generate_with_one_site_or_element(name, how):
    r"""The weight; the law $q$ of what is drawn; and $E[e^w] = \sum_z q(z) e^{w(z)}$ is the evidence."""
    program, t = STRUCTURES[name].model, table(name)
    path, index = single(name) if how == "at" else (list(STRUCTURES[name].sites)[-1], ...)
    own = columns(name, path, index)
    values = t.rows[-1]  # the largest value of each element

    @jax.jit
    def generate(keys, value):
        given = ppl.at(index, value) if how == "at" else value
        return jax.vmap(lambda key: program(jnp.asarray(X[0])).generate(key, nest(path, given)))(keys)

    trace, weight = generate(jax.random.split(KEY, 8000), at_path(nested(name, values), path)[index])
    r = check_trace(name, trace)
    kept = own & t.present
    np.testing.assert_array_equal(t.rows[r][kept[r]], np.broadcast_to(values, t.rows[r].shape)[kept[r]])
    close(weight, (t.log * kept).sum(1)[r] + t.fixed[r])
    consistent = (~kept | (t.rows == values)).all(1)
    q = np.where(consistent, np.exp((t.log * ~own).sum(1)), 0.0)
    check_frequencies(name, r, q)
    distinct, first = np.unique(same(name)[r], return_index=True)
    drawn = np.exp(np.asarray(trace.log_density - weight)[first])
    close(drawn, q[distinct])
    everything = np.unique(same(name)[consistent])
    if len(distinct) == len(everything):  # every trace was drawn: the expectation is exact
        close(drawn.sum(), 1.0)
        close(drawn @ np.exp(np.asarray(weight)[first]), np.exp(t.log_p[everything]).sum())
    assert drawn.sum() > 0.99


def nest(path: str, value: Any) -> Any:
    return functools.reduce(lambda inner, scope: {scope: inner}, reversed(path.split("/")), value)


# --- update ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["everything", "masks"])
@every_structure
def test_update(name, how):
    """To any part of any assignment and to another argument, and back."""
    old, new = table(name), table(name, 1)

    @jax.jit
    @jax.vmap
    def there_and_back(key, trace, values, mask):
        given = values if how == "everything" else jax.tree.map(ppl.masked, values, mask)
        there, weight, discard = trace.update(key, given, jnp.asarray(X[1]))
        back, opposite, _ = there.update(key, discard, jnp.asarray(X[0]))
        return there, weight, back, opposite, discard

    rng = np.random.default_rng(2)
    start, end = rng.integers(len(old.rows), size=(2, 400))
    mask = (rng.random((400, old.rows.shape[1])) < 0.5) | (how == "everything")
    arguments = chosen(traces(name)[0], start), nested(name, new.rows[end]), nested(name, mask)
    there, weight, back, opposite, discard = there_and_back(jax.random.split(KEY, 400), *arguments)
    check_update(name, start, new.rows[end], mask, there, weight, 1)
    after = new.present[number(name, flat(name, there.choices))]
    check_discard(name, discard, start, old.present[start] & (mask | ~after))
    np.testing.assert_array_equal(same(name)[check_trace(name, back)], same(name)[start])
    close(opposite, back.log_density - there.log_density)
    if how == "everything":
        close(weight + opposite, 0.0)


@every_structure
def test_update_of_one_site(name):
    """The first site, on which most depends, as a whole: branches flip, and what they need is drawn."""
    t = table(name)
    path = next(iter(STRUCTURES[name].sites))

    @jax.jit
    @jax.vmap
    def there_and_back(key, trace, value):
        there, weight, discard = trace.update(key, nest(path, value))
        back, opposite, _ = there.update(key, discard)
        return there, weight, back, opposite

    rng = np.random.default_rng(3)
    start, end = rng.integers(len(t.rows), size=(2, 400))
    values = at_path(nested(name, t.rows[end]), path)
    there, weight, back, opposite = there_and_back(jax.random.split(KEY, 400), chosen(traces(name)[0], start), values)
    mask = np.broadcast_to(columns(name, path), t.rows[end].shape)
    flips = check_update(name, start, t.rows[end], mask, there, weight, 0)
    assert flips or t.present[:, ~mask[0]].all()
    np.testing.assert_array_equal(same(name)[check_trace(name, back)], same(name)[start])
    close(opposite, back.log_density - there.log_density)


def check_update(name: str, start: Any, values: Any, mask: Any, there: Any, weight: Any, argument: int) -> bool:
    """Compare an update of the traces `start` to the masked values; tell whether any choice came into being."""
    old, new = table(name), table(name, argument)
    r = check_trace(name, there, argument)
    before, after = old.present[start], new.present[r]
    given, drawn = mask & after, ~mask & ~before & after
    kept = ~mask & before & after
    np.testing.assert_array_equal(new.rows[r][given], values[given])
    np.testing.assert_array_equal(new.rows[r][kept], old.rows[start][kept])
    close(weight, new.log_p[r] - old.log_p[start] - (new.log[r] * drawn).sum(1))
    return bool(drawn.any())


def check_discard(name: str, discard: Any, start: Any, gone: np.ndarray) -> None:
    """The discarded values are the old ones that were replaced or dropped, and no others."""
    for path in STRUCTURES[name].sites:
        here = columns(name, path)
        try:
            found = at_path(discard, path)
        except KeyError:
            assert not gone[:, here].any()
            continue
        value, mask = (
            (found.value, found.mask) if isinstance(found, ppl.Masked) else (found, np.ones(found.shape, bool))
        )
        np.testing.assert_array_equal(np.reshape(mask, (len(start), -1)), gone[:, here])
        old = table(name).rows[start][:, here]
        np.testing.assert_array_equal(np.reshape(value, old.shape)[gone[:, here]], old[gone[:, here]])


# --- regenerate and project -------------------------------------------------------------------------------------------------


def selections(name: str) -> dict[str, tuple[ppl.Selection, np.ndarray]]:
    """Return selections, and which elements they mean."""
    sites = STRUCTURES[name].sites
    first, last, (path, index) = next(iter(sites)), list(sites)[-1], single(name)
    one, own = ppl.select((path, index)), columns(name, path, index)
    return {
        "a site": (ppl.select(first), columns(name, first)),
        "an element": (one, own),
        "a site or an element": (ppl.select(last) | one, columns(name, last) | own),
        "a site but an element": (ppl.select(path) - one, columns(name, path) & ~own),
        "all but an element": (~one, ~own),
    }


@every_structure
def test_regenerate(name):
    """The weight is that of Metropolis-Hastings with the prior along the run, which leaves log_density in place."""
    t, states = table(name), np.unique(same(name))
    scalar = not next(iter(STRUCTURES[name].sites.values()))[1]
    hows = ["an element", "all but an element", *(["a site"] if scalar else [])]  # few values: few moves
    wanted = {how: selections(name)[how] for how in hows}
    few = len(states) <= 60  # else the identity of matrices, which needs every state and move, is too much work
    start = np.repeat(states if few else states[:: len(states) // 60], 400)

    @jax.jit
    @jax.vmap
    def move(key, trace):
        return {how: trace.regenerate(key, selection) for how, (selection, _) in wanted.items()}

    moves = move(jax.random.split(KEY, len(start)), chosen(traces(name)[0], start))
    stationary = []
    for how, (new, weight) in moves.items():
        r = check_trace(name, new)
        before, after, selected = t.present[start], t.present[r], wanted[how][1]
        drawn, undrawn = after & (selected | ~before), before & (selected | ~after)
        kept = before & after & ~selected
        np.testing.assert_array_equal(t.rows[r][kept], t.rows[start][kept])
        q = (t.log[r] * drawn).sum(1)
        close(weight, t.log_p[r] - q - (t.log_p[start] - (t.log[start] * undrawn).sum(1)))
        stationary.append(few and _keeps_the_posterior(states, start, same(name)[r], q, weight, t.log_p[states]))
    assert any(stationary) or not few


def _keeps_the_posterior(states: Any, start: Any, end: Any, q: Any, weight: Any, log_p: Any) -> bool:
    """Check that accepted moves keep the posterior, if each possible move was made; tell whether they were."""
    kernel, proposed = np.zeros((2, len(states), len(states)))
    i, j = np.searchsorted(states, start), np.searchsorted(states, end)
    proposed[i, j] = np.exp(q)
    kernel[i, j] = np.exp(q) * np.minimum(1.0, np.exp(weight))
    if not np.allclose(proposed.sum(1), 1.0, atol=1e-10):
        return False
    kernel += np.diag(1.0 - kernel.sum(1))
    posterior = np.exp(log_p - np.logaddexp.reduce(log_p))
    close(posterior @ kernel, posterior)
    return True


@every_structure
def test_project(name):
    """Any selection and its complement split the log density of the choices."""
    t = table(name)
    wanted = selections(name)
    both = lambda trace: {how: (trace.project(s), trace.project(~s)) for how, (s, _) in wanted.items()}  # noqa: E731
    for how, (inside, outside) in jax.jit(jax.vmap(both))(traces(name)[0]).items():
        selected = wanted[how][1]
        close(inside, (t.log * selected).sum(1))
        close(outside, (t.log * ~selected).sum(1))
