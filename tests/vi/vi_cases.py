r"""Small programs whose expectation is a finite sum, to test estimators by enumerating the algorithm's own choices.

Each case is written twice: in the objective language, and as a joint density and a cost of plain numbers `o`, so that
the truth is $\sum_o p_\theta(o)\, f_\theta(o)$. A program takes its choices through `site(address, distribution, o)`,
so that one program serves every strategy; for strategies that draw, the draw is replaced by the given outcome `o`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from forced import NODES, WEIGHTS, pathwise
from jax import lax

import expectax as ex
from expectax import dist, vi

THETA = np.array([0.3, 1.7])  # t = (a probability, a weight of costs)


# --- the registry ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """`program(theta, site, o)`, `reference(theta, o) -> (density, cost)`; each entry of `o` takes 0..values-1."""

    name: str
    shape: tuple[int, ...]
    reference: Callable[..., Any]
    program: Callable[..., Any]
    values: Any = 2
    enum: bool = True


CASES: list[Case] = []


def case(shape: Any, reference: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def add(program: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(program.__name__, shape, reference, program, **options))
        return program

    return add


Bernoulli, Categorical = dist.Bernoulli, dist.Categorical
sigmoid, softmax = jax.nn.sigmoid, jax.nn.softmax


def bern(p, b):
    """The probability of all of `b`."""
    return jnp.prod(jnp.where(b == 1, p, 1.0 - p))


# --- one site -------------------------------------------------------------------------------------------------------


@case((1,), lambda t, o: (bern(t[0], o), jnp.where(o[0] == 1, 2.0, -t[0]) * t[1]))
def flip(t, site, o):
    return jnp.where(site("b", Bernoulli(t[0]), o[0]) == 1, 2.0, -t[0]) * t[1]


def table_cost(t, z):
    return jnp.take(np.array([1.0, 4.0, -9.0]), z) * t[0] + jnp.sin(z * t[1])


LOGITS = np.array([1.0, -0.3, 0.2])


@case((1,), lambda t, o: (softmax(LOGITS * t[1])[o[0]], table_cost(t, o[0])), values=3)
def categorical_logits(t, site, o):
    return table_cost(t, site("z", Categorical(logits=LOGITS * t[1]), o[0]))


def three(t):
    return jnp.stack([t[0], t[0] ** 2, 1.0 - t[0] - t[0] ** 2])


@case((1,), lambda t, o: (three(t)[o[0]], table_cost(t, o[0])), values=3)
def categorical_probs(t, site, o):
    return table_cost(t, site("z", Categorical(probs=three(t)), o[0]))


def binomial_density(t, k):
    return jnp.take(np.array([1.0, 2.0, 1.0]), k) * t[0] ** k * (1 - t[0]) ** (2 - k)


@case((1,), lambda t, o: (binomial_density(t, o[0]), jnp.exp(t[1] * o[0])), values=3)
def binomial(t, site, o):
    return jnp.exp(t[1] * site("z", dist.Binomial(2, t[0]), o[0]))


# --- several sites --------------------------------------------------------------------------------------------------


@case((3,), lambda t, o: (bern(t[0], o), o[0] * t[1] + jnp.exp(o[1]) - t[0] * o[2] / 3 + jnp.cos(o[0] + t[1] * o[2])))
def additive_terms(t, site, o):
    a, b, c = (site(name, Bernoulli(t[0]), o[i]) for i, name in enumerate("abc"))
    return a * t[1] + jnp.exp(b) - t[0] * c / 3 + jnp.cos(a + t[1] * c)


@case((2,), lambda t, o: (bern(t[0], o), t[1] * (o[0] + o[1]) + (t[1] * (o[0] + o[1])) ** 2 + 2.0 * (o[0] - o[1])))
def shared_terms(t, site, o):
    a, b = site("a", Bernoulli(t[0]), o[0]), site("b", Bernoulli(t[0]), o[1])
    v = t[1] * (a + b)
    return v + v**2 + 2.0 * (a.astype(int) - b)


@case((2,), lambda t, o: (bern(t[0], o[0]) * bern(jnp.where(o[0] == 1, t[0], 0.6), o[1]), 3.0 * o[0] + t[1] * o[1]))
def chain(t, site, o):
    b = site("b", Bernoulli(t[0]), o[0])
    c = site("c", Bernoulli(jnp.where(b == 1, t[0], 0.6)), o[1])
    return 3.0 * b + t[1] * c


def branches(t, o):
    return jnp.where(o[0] == 1, jnp.exp(t[1] * o[1]), t[0] * o[1]) + jnp.maximum(o[0] - t[0] * o[1], 0.0)


@case((2,), lambda t, o: (bern(t[0], o), branches(t, o)))
def jax_in_the_cost(t, site, o):
    draw = jax.jit(lambda name, o: site(name, Bernoulli(t[0]), o), static_argnums=0)
    a, b = draw("a", o[0]), jax.checkpoint(draw, static_argnums=0)("b", o[1])
    chosen = lax.cond(a == 1, lambda b: jnp.exp(t[1] * b), lambda b: t[0] * b, b)
    return chosen + jax.nn.relu(a - t[0] * b)


@ex.model
def inner(t, site, o):
    return site("b", Bernoulli(t[0]), o)


@ex.model
def guide(t, site, o):
    b = ex.sample("sub", inner(t, site, o[0]))
    site("c", Bernoulli(sigmoid(t[1] * b)), o[1])


def log_ratio(t, o):
    q = bern(t[0], o[0]) * bern(sigmoid(t[1] * o[0]), o[1])
    return q, jnp.log(bern(0.7, o)) + o[0] * o[1] * t[1] - jnp.log(q)


@case((2,), log_ratio)
def nested_guide(t, site, o):
    z, log_q = vi.simulate(guide(t, site, o))
    b, c = z["sub"]["b"], z["c"]
    return jnp.log(bern(0.7, jnp.stack([b, c]))) + b * c * t[1] - log_q


# --- lanes and batches ----------------------------------------------------------------------------------------------

SHIFT = np.array([-1.0, 0.5, 2.0])


def lanes_cost(t, z):
    total = jnp.sum(z) ** 2 * t[1] + jnp.sum(jnp.exp(t[0] * SHIFT * z)) + jnp.cumsum(z)[1] * t[0]
    return total + jax.nn.logsumexp(t[1] * z) + jnp.sum(jnp.sort(SHIFT * z)[:2]) + jnp.argmax(z * SHIFT) * t[1]


@case((3,), lambda t, o: (bern(sigmoid(SHIFT * t[0]), o), lanes_cost(t, o)))
def lanes(t, site, o):
    return lanes_cost(t, jax.vmap(lambda m, o: site("z", Bernoulli(sigmoid(m * t[0])), o))(SHIFT, o))


def pairs(t, o):
    p = jnp.where(o[0] == 1, t[0], sigmoid(t[1]))
    return bern(0.4, o[0]) * bern(p, o[1]), pairs_cost(t, o[0], o[1])


def pairs_cost(t, z, y):
    return jnp.sum(np.array([1.0, -2.0]) * y) + jnp.sum(jnp.exp(t[0] * z * y))


@case((2, 2), pairs)
def lanes_feed_lanes(t, site, o):
    z = jax.vmap(lambda o: site("z", Bernoulli(0.4), o))(o[0])
    y = jax.vmap(lambda z, o: site("y", Bernoulli(jnp.where(z == 1, t[0], sigmoid(t[1]))), o))(z, o[1])
    return pairs_cost(t, z, y)


@case((2, 2), pairs)
def batch_feeds_batch(t, site, o):
    z = site("z", Bernoulli(jnp.full(2, 0.4)), o[0])
    y = site("y", Bernoulli(jnp.where(z == 1, t[0], sigmoid(t[1]))).to_event(1), o[1])
    return pairs_cost(t, z, y)


@case((2, 2), lambda t, o: pairs(t, jnp.stack([o[0][::-1], o[1]])))
def lanes_feed_lanes_crosswise(t, site, o):
    z = jax.vmap(lambda o: site("z", Bernoulli(0.4), o))(o[0])[::-1]
    y = jax.vmap(lambda z, o: site("y", Bernoulli(jnp.where(z == 1, t[0], sigmoid(t[1]))), o))(z, o[1])
    return pairs_cost(t, z, y)


GRID, WEIGHT = np.array([[0.2, -1.0], [1.5, 0.7]]), np.array([[1.0, -2.0], [0.5, 3.0]])


def grid_cost(t, z):
    rows = jnp.sum(jnp.exp(t[0] * z.sum(1))) + jnp.sum(jnp.einsum("ij,ij->i", z, WEIGHT) ** 2)
    return rows + t[1] * jnp.sum(jnp.tanh(z @ WEIGHT)) + jnp.sum(jnp.reshape(z.T * WEIGHT, (4,)) * t[1])


@case((2, 2), lambda t, o: (bern(sigmoid(GRID.T * t[1]), o), grid_cost(t, o)))
def lanes_in_lanes(t, site, o):
    row = jax.vmap(lambda m, o: site("z", Bernoulli(sigmoid(m * t[1])), o))
    return grid_cost(t, jax.vmap(row, in_axes=(1, 0))(GRID, o))


@case((2, 2), lambda t, o: (bern(sigmoid(GRID * t[1]), o), grid_cost(t, o)))
def batch_in_lanes(t, site, o):
    row = jax.vmap(lambda m, o: site("z", Bernoulli(sigmoid(m * t[1])), o), in_axes=(1, 0), out_axes=1)
    return grid_cost(t, row(GRID.T, o).T)


# --- scans ----------------------------------------------------------------------------------------------------------


def walk(t, o):
    """$b_t \\sim \\text{Bern}(\\sigma(w s_{t-1} - p))$, $s_t = s_{t-1} + p(2b_t - 1)$: density, costs by step, s_T."""
    s, density, ys = 0.0, 1.0, []
    for b in o:
        density *= bern(sigmoid(t[1] * s - t[0]), b)
        s = s + (2.0 * b - 1.0) * t[0]
        ys.append(jnp.exp(s))
    return density, jnp.stack(ys), s


def walk_step(t, site):
    def step(s, o):
        b = site("b", Bernoulli(sigmoid(t[1] * s - t[0])), o)
        s = s + (2.0 * b - 1.0) * t[0]
        return s, jnp.exp(s)

    return step


def walk_cost(t, ys, s):
    return jnp.sum(ys * jnp.arange(1.0, 1.0 + len(ys))) + t[1] * s**2 + ys[1] ** 2


def walk_reference(t, o):
    density, ys, s = walk(t, o)
    return density, walk_cost(t, ys, s)


def two_walks(t, o):
    (p, a), (q, b) = walk_reference(t, o[0]), walk_reference(t, o[1])
    return p * q, a * b - t[1] * b


@case((3,), walk_reference)
def scan(t, site, o):
    s, ys = lax.scan(walk_step(t, site), 0.0, o)
    return walk_cost(t, ys, s)


@case((3,), lambda t, o: walk_reference(t, o[::-1]))
def scan_reverse(t, site, o):
    s, ys = lax.scan(walk_step(t, site), 0.0, o, reverse=True)
    return walk_cost(t, ys[::-1], s)


@case((2, 2), two_walks)
def scan_in_lanes(t, site, o):
    a, b = jax.vmap(lambda o: walk_cost(t, *lax.scan(walk_step(t, site), 0.0, o)[::-1]))(o)
    return a * b - t[1] * b


@case((2, 2), two_walks)
def lanes_in_scan(t, site, o):
    s, ys = lax.scan(jax.vmap(walk_step(t, site)), jnp.zeros(2), jnp.swapaxes(o, 0, 1))
    a, b = walk_cost(t, ys[:, 0], s[0]), walk_cost(t, ys[:, 1], s[1])
    return a * b - t[1] * b


@case((2, 2), two_walks, enum=False)
def scan_in_map(t, site, o):
    a, b = lax.map(lambda o: walk_cost(t, *lax.scan(walk_step(t, site), 0.0, o)[::-1]), o)
    return a * b - t[1] * b


def followed(t, o):
    density, ys, s = walk(t, o[0])
    return density * bern(sigmoid(ys * t[0]), o[1]), jnp.sum(t[1] * o[1] * ys) + jnp.sum(SHIFT[:2] * o[1]) + s


@case((2, 2), followed, enum=False)
def scan_feeds_lanes(t, site, o):
    s, ys = lax.scan(walk_step(t, site), 0.0, o[0])
    z = jax.vmap(lambda y, o: site("z", Bernoulli(sigmoid(y * t[0])), o))(ys, o[1])
    return jnp.sum(t[1] * z * ys) + jnp.sum(SHIFT[:2] * z) + s


@case((2, 2), followed)
def scan_feeds_scan(t, site, o):
    s, ys = lax.scan(walk_step(t, site), 0.0, o[0])
    z = lax.map(lambda x: site("z", Bernoulli(sigmoid(x[0] * t[0])), x[1]), (ys, o[1]))
    return jnp.sum(t[1] * z * ys) + jnp.sum(SHIFT[:2] * z) + s


# --- strategies mixed -----------------------------------------------------------------------------------------------


def after_flip(t, b):
    return jnp.where(b == 1, t[0], sigmoid(t[1]))


def summed_after(t, b):
    """Sum over c ~ Bern(after_flip(b)) and d ~ Bern(sigmoid(w c - b))."""
    total = 3.0 * b
    for c, d in itertools.product((0, 1), (0, 1)):
        total += bern(after_flip(t, b), c) * bern(sigmoid(t[1] * c - b), d) * (jnp.exp(t[0] + b) * c + 5.0 * d)
    return total


@case((1,), lambda t, o: (bern(t[0], o[0]), summed_after(t, o[0])))
def then_enum(t, site, o):
    b = site("b", Bernoulli(t[0]), o[0])
    c = ex.sample("c", Bernoulli(after_flip(t, b)), gradient=vi.Enum())
    d = ex.sample("d", Bernoulli(sigmoid(t[1] * c - b)), gradient=vi.Enum())
    return 3.0 * b + jnp.exp(t[0] + b) * c + 5.0 * d


def enum_then_reference(t, o):
    """The site in the middle is drawn once for each b, as o[b]."""
    total = 0.0
    for b, d in itertools.product((0, 1), (0, 1)):
        total += bern(t[0], b) * bern(sigmoid(o[b] - t[0]), d) * (jnp.exp(b + t[1] * o[b]) * d + b * d)
    return bern(after_flip(t, np.arange(2)), o), total


@case((2,), enum_then_reference)
def enum_then(t, site, o):
    b = ex.sample("b", Bernoulli(t[0]), gradient=vi.Enum())
    c = site("c", Bernoulli(after_flip(t, b)), jnp.asarray(o)[b])
    d = ex.sample("d", Bernoulli(sigmoid(c - t[0])), gradient=vi.Enum())
    return jnp.exp(b + t[1] * c) * d + b * d


# --- normal sites: `o` numbers the nodes of a quadrature, exact for the polynomials below -----------------------------

Normal = dist.Normal


def weight(o):
    return jnp.prod(jnp.take(WEIGHTS, o))


def at(loc, scale, o):
    return loc + scale * jnp.take(NODES, o)


@case((2,), lambda t, o: (weight(o), jnp.sum(at(t[0], t[1], o)) ** 2), values=4, enum=False)
def normal_lanes(t, site, o):
    return jnp.sum(jax.vmap(lambda o: site("x", Normal(t[0], t[1]), o))(o)) ** 2


def ar_reference(t, o):
    first = at(t[0], t[1], o[0])
    second = at(t[0] * first, t[1], o[1])
    return weight(o), t[1] * first + second**2


@case((2,), ar_reference, values=4, enum=False)
def normal_scan(t, site, o):
    def step(s, o):
        s = site("x", Normal(t[0] * s, t[1]), o)
        return s, s

    first, second = lax.scan(step, 1.0, o)[1]
    return t[1] * first + second**2


@case((1,), lambda t, o: (weight(o), jnp.exp(at(t[0], t[1], o[0])) * t[1]), values=4, enum=False)
def reparam(t, site, o):
    return jnp.exp(pathwise("x", Normal(t[0], t[1]), o[0])) * t[1]


def reparam_then_reference(t, o):
    x = at(t[0], t[1], o[0])
    return jnp.take(WEIGHTS, o[0]) * bern(sigmoid(x), o[1]), jnp.exp(o[1] - x) + t[1] * o[1]


@case((2,), reparam_then_reference, values=(4, 2), enum=False)
def reparam_then(t, site, o):
    x = pathwise("x", Normal(t[0], t[1]), o[0])
    b = site("b", Bernoulli(sigmoid(x)), o[1])
    return jnp.exp(b - x) + t[1] * b


@case(
    (2,),
    lambda t, o: (bern(t[0], o[0]) * jnp.take(WEIGHTS, o[1]), jnp.cos(at(o[0], t[1], o[1])) + o[0]),
    values=(2, 4),
    enum=False,
)
def then_reparam(t, site, o):
    b = site("b", Bernoulli(t[0]), o[0])
    return jnp.cos(pathwise("x", Normal(b, t[1]), o[1])) + b


@case((2,), lambda t, o: (weight(o), jnp.sum(jnp.exp(jnp.cumsum(at(t[0], t[1], o))))), values=4, enum=False)
def reparam_in_scan(t, site, o):
    def step(s, o):
        s = s + pathwise("x", Normal(t[0], t[1]), o)
        return s, jnp.exp(s)

    return jnp.sum(lax.scan(step, 0.0, o)[1])
