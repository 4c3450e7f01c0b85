"""Finite models in every kind of control flow, each with a reference written by hand in plain Python.

A model is JAX; its reference is a Python program with `for` and `if` that reads the choices of one assignment in turn.
All models take one array `x` of three numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import special, stats

from expectax import dist, ppl

X = np.array([[0.2, 0.5, 0.3], [0.6, 0.15, 0.25]])  # two arguments: probabilities of three states, or of three coins
BIAS = np.array([0.25, 0.6, 0.45, 0.7])


class Seen:
    """Reads given choices one by one, and writes down what each was worth: an element that is not read is absent."""

    def __init__(self, choices: dict[str, np.ndarray], elements: dict[str, tuple[int, ...]] | None = None):
        self.choices = choices
        elements = elements or {path: np.shape(value) for path, value in choices.items()}  # without axes of events
        self.log = {path: np.zeros(shape) for path, shape in elements.items()}
        self.present = {path: np.zeros(shape, bool) for path, shape in elements.items()}
        self.fixed = 0.0  # log density of what the program observes
        self.recorded: dict[tuple[str, tuple[int, ...]], Any] = {}  # what the program records, by path and index

    def read(self, path: str, log_density: Callable[[Any], Any], *index: int) -> Any:
        assert not self.present[path][index], f"the reference reads {path}{index} twice"
        value = self.choices[path][index]
        self.log[path][index], self.present[path][index] = log_density(value), True
        return value

    def pick(self, path: str, probs: Any, *index: int) -> int:
        return int(self.read(path, lambda value: np.log(probs[int(value)]), *index))

    def flip(self, path: str, p: Any, *index: int) -> int:
        return self.pick(path, [1 - p, p], *index)

    def observe(self, log_density: Any) -> None:
        self.fixed += log_density


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model, its reference `(seen, x) -> retval`, and path -> (number of values, shape) in the order of choices."""

    model: ppl.Model
    reference: Callable[[Seen, Any], Any]
    sites: dict[str, tuple[int, tuple[int, ...]]]


STRUCTURES: dict[str, Structure] = {}


def structure(name: str, reference: Any, **sites: Any) -> Any:
    """Register the decorated function; sites are `address=(number of values, *shape)`, `__` for `/`."""

    def register(function: Any) -> Any:
        paths = {path.replace("__", "/"): (count, tuple(shape)) for path, (count, *shape) in sites.items()}
        STRUCTURES[name] = Structure(ppl.model(function), reference, paths)
        return function

    return register


def flip(address: str, p: Any) -> Any:
    return ppl.sample(address, dist.Bernoulli(p))


def pick(address: str, probs: Any) -> Any:
    return ppl.sample(address, dist.Categorical(probs=jnp.asarray(probs)))


def bias(i: Any) -> Any:
    return jnp.asarray(BIAS)[i]


def squash(x: Any) -> Any:
    return jax.nn.sigmoid(0.7 * x - 0.4)


def squashed(x: Any) -> Any:
    return special.expit(0.7 * x - 0.4)


# --- straight lines -------------------------------------------------------------------------------------------------


def top_reference(see, x):
    a = see.pick("a", x)
    b = see.flip("b", BIAS[a])
    see.observe(stats.norm.logpdf(0.4, a + b, 0.7))
    return a + 2 * b


@structure("top level", top_reference, a=(3,), b=(2,))
def top(x):
    a = pick("a", x)
    b = flip("b", bias(a))
    ppl.observe("y", dist.Normal(1.0 * a + b, 0.7), 0.4)
    return a + 2 * b


@structure("jit", top_reference, a=(3,), b=(2,))
def in_jit(x):
    return jax.jit(lambda p: jax.jit(top)(p))(x)


def child_reference(see, name, p, shift):
    return 1 + see.flip(f"{name}/b", BIAS[shift]) if see.flip(f"{name}/a", p) else 0


def two_subs_reference(see, x):
    first = child_reference(see, "sub", x[0], 0)
    return child_reference(see, "again", x[1], first) + 10 * see.flip("d", squashed(first))


@ppl.model
def child(p, shift):
    a = flip("a", p)
    return ppl.cond(a == 1, lambda: 1 + flip("b", bias(shift)), lambda: 0)


@structure("nested model", two_subs_reference, sub__a=(2,), sub__b=(2,), again__a=(2,), again__b=(2,), d=(2,))
def two_subs(x):
    first = ppl.sample("sub", child(x[0], 0))
    return ppl.sample("again", child(x[1], first)) + 10 * flip("d", squash(first))


def derivative_reference(see, x):
    g = see.flip("g", x[0])
    a = see.flip("a", x[1], 0), see.flip("a", x[2], 1)
    return 2 * g + sum(a) if g else 0


@structure("custom_jvp", derivative_reference, g=(2,), a=(2, 2))
def with_derivative(x):
    rule = jax.custom_jvp(lambda p: flip("a", p).sum())
    rule.defjvp(lambda primals, tangents: (primals[0].sum(), tangents[0].sum()))
    g = flip("g", x[0])
    a = rule(x[1:])
    return jnp.where(g == 1, 2 * g + a, 0)


# --- loops ----------------------------------------------------------------------------------------------------------


def chain_reference(see, x):
    z = 1
    for t in range(3):
        z = see.flip("z", x[t] if z else 0.35, t)
    see.observe(stats.norm.logpdf(0.4, z, 0.7))
    return z


def link(z, p):
    return flip("z", jnp.where(z == 1, p, 0.35))


@structure("scan", chain_reference, z=(2, 3))
def in_scan(x):
    z, _ = lax.scan(lambda z, p: (link(z, p), None), 1, x)
    ppl.observe("y", dist.Normal(1.0 * z, 0.7), 0.4)
    return z


@structure("checkpoint", chain_reference, z=(2, 3))
def in_checkpoint(x):
    z, _ = lax.scan(jax.checkpoint(lambda z, p: (link(z, p), None)), 1, x, unroll=2)
    jax.checkpoint(lambda: ppl.observe("y", dist.Normal(1.0 * z, 0.7), 0.4))()
    return z


@structure("fori_loop", chain_reference, z=(2, 3))
def in_fori_loop(x):
    z = lax.fori_loop(0, 3, lambda i, z: link(z, x[i]), 1)
    ppl.observe("y", dist.Normal(1.0 * z, 0.7), 0.4)
    return z


def backwards_reference(see, x):
    total = 0
    for t in reversed(range(3)):
        if see.flip("a", x[t], t):
            total += 1 + see.flip("b", squashed(total), t)
    return total


@structure("reverse scan of cond", backwards_reference, a=(2, 3), b=(2, 3))
def backwards(x):
    def step(total, p):
        a = flip("a", p)
        return total + lax.cond(a == 1, lambda: 1 + flip("b", squash(total)), lambda: 0), None

    return lax.scan(step, 0, x, reverse=True)[0]


def map_reference(see, x):
    return np.array([3 * see.flip("a", x[t], t) + see.pick("b", x, t) for t in range(2)])


@structure("lax.map", map_reference, a=(2, 2), b=(3, 2))
def in_map(x):
    return lax.map(lambda p: 3 * flip("a", p) + pick("b", x), x[:2])


def geometric_reference(see, x):
    tails, heads = 0, 0
    while not heads and tails < 3:
        heads = see.flip("heads", x[tails], tails)
        tails += 1 - heads
    return tails + 10 * see.flip("d", squashed(tails))


def toss(x):
    def body(state):
        tails, _ = state
        heads = flip("heads", x[tails])
        return tails + 1 - heads, heads

    return body


@structure("bounded_while", geometric_reference, heads=(2, 3), d=(2,))
def geometric(x):
    tails, _ = ppl.bounded_while(lambda s: s[1] == 0, toss(x), (0, 0), max_steps=3)
    return tails + 10 * flip("d", squash(tails))


# --- lanes ----------------------------------------------------------------------------------------------------------


def lanes_reference(see, x):
    return np.array([2 * (z := see.flip("z", x[i], i)) + see.flip("c", BIAS[i + z], i) for i in range(3)])


@structure("vmap", lanes_reference, z=(2, 3), c=(2, 3))
def lanes(x):
    def lane(p, i):
        z = flip("z", p)
        return 2 * z + flip("c", bias(i + z))

    return jax.vmap(lane)(x, jnp.arange(3))


def columns_reference(see, x):
    table = np.array([x[:2], x[1:] / 2])
    out = np.zeros((2, 2), int)
    for i in range(2):
        z = [see.flip("z", table[j, i], i, j) for j in range(2)]
        d = see.flip("d", BIAS[sum(z)], i)
        out[:, i] = np.array(z) + 2 * d
    return out


@structure("vmap of axis 1", columns_reference, z=(2, 2, 2), d=(2, 2))
def columns(x):
    def lane(column):
        z = flip("z", column)  # a batch of its own, after the lanes
        return z + 2 * flip("d", bias(z.sum()))

    return jax.vmap(lane, in_axes=1, out_axes=1)(jnp.stack([x[:2], x[1:] / 2]))


def unmapped_reference(see, x):
    return np.array([see.flip("a", x[0], i) + 2 * see.pick("b", x, i) for i in range(2)])


@structure("vmap of nothing", unmapped_reference, a=(2, 2), b=(3, 2))
def unmapped(x):
    return jax.vmap(lambda p: flip("a", p[0]) + 2 * pick("b", p), in_axes=None, axis_size=2)(x)


def order_reference(see, x):
    total = 0
    for i in range(2):
        z = [1, 0]
        for t in range(2):
            z = [see.flip("z", BIAS[2 * z[j] + t] * x[i], t, i, j) for j in range(2)]
        total += (1 + i) * sum(z)
    return total


@structure("vmap of scan of vmap", order_reference, z=(2, 2, 2, 2))
def order(x):
    """The choice has axes time, outer lane, inner lane."""

    def lane(p, weight):
        def step(z, t):
            return jax.vmap(lambda z: flip("z", bias(2 * z + t) * p))(z), None

        return weight * lax.scan(step, jnp.array([1, 0]), jnp.arange(2))[0].sum()

    return jax.vmap(lane)(x[:2], jnp.arange(1, 3)).sum()


# --- evidence in branches -------------------------------------------------------------------------------------------


def evidence_reference(see, x):
    out = []
    for i in range(2):
        if see.flip("a", x[i], i):
            b = see.flip("b", BIAS[i], i)
            see.observe(stats.norm.logpdf(0.3, b, 0.8))
            out.append(b)
        else:
            see.observe(-0.9 * (i + 1))
            out.append(7)
    return np.array(out)


@structure("observe and factor in vmap of cond", evidence_reference, a=(2, 2), b=(2, 2))
def evidence(x):
    def lane(p, i):
        def left():
            b = flip("b", bias(i))
            ppl.observe("y", dist.Normal(1.0 * b, 0.8), 0.3)
            return b

        def right():
            ppl.factor("penalty", -0.9 * (i + 1))
            return 7

        return lax.cond(flip("a", p) == 1, left, right)

    return jax.vmap(lane)(x[:2], jnp.arange(2))


def evidence_of_one_reference(see, x):
    if see.flip("a", x[0]):
        b = see.flip("b", x[1])
        see.observe(stats.norm.logpdf(0.3, b, 0.8))
        return b
    see.observe(-0.9)
    return 7


@structure("observe and factor in cond", evidence_of_one_reference, a=(2,), b=(2,))
def evidence_of_one(x):
    def left():
        b = flip("b", x[1])
        ppl.observe("y", dist.Normal(1.0 * b, 0.8), 0.3)
        return b

    def right():
        ppl.factor("penalty", -0.9)
        return 7

    return lax.cond(flip("a", x[0]) == 1, left, right)
