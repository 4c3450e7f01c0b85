"""The structures of `control_flow_models` with branches, and branches in lanes, loops and nested models."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from control_flow_models import BIAS, STRUCTURES, bias, child, flip, pick, squash, squashed, structure, toss
from expectax import ppl

__all__ = ["STRUCTURES"]


def cond_reference(see, x):
    if see.flip("a", x[0]):
        b = see.flip("b", x[1])
        out = b + see.flip("s", BIAS[b])
    else:
        c = see.pick("c", x)
        out = c - see.flip("s", BIAS[1 + c])
    return out + 10 * see.flip("d", squashed(out))


@structure("cond", cond_reference, a=(2,), b=(2,), s=(2,), c=(3,), d=(2,))
def in_cond(x):
    def left(p):
        b = flip("b", p)
        return b + flip("s", bias(b))

    def right(_):
        c = pick("c", x)
        return c - flip("s", bias(1 + c))

    out = lax.cond(flip("a", x[0]) == 1, left, right, x[1])
    return out + 10 * flip("d", squash(out))


def switch_reference(see, x):
    k = see.pick("k", x)
    if k == 0:
        out = see.flip("u", 0.4)
    elif k == 1:
        v = see.pick("v", x[::-1])
        out = v + see.flip("u", BIAS[v])
    else:
        out = 5
    return out + 10 * see.flip("w", squashed(out - 1))


@structure("switch", switch_reference, k=(3,), u=(2,), v=(3,), w=(2,))
def in_switch(x):
    def second():
        v = pick("v", x[::-1])
        return v + flip("u", bias(v))

    out = ppl.switch(pick("k", x), [lambda: flip("u", 0.4), second, lambda: 5])
    return out + 10 * flip("w", squash(out - 1))


def clamped_reference(see, x):
    k = see.pick("k", x)  # the index 2 k - 1 is -1, 1 or 3
    return k + (see.flip("v", x[1]) if k == 1 else see.flip("u", x[k]))


@structure("switch out of range", clamped_reference, k=(3,), u=(2,), v=(2,))
def clamped(x):
    k = pick("k", x)
    return k + lax.switch(2 * k - 1, [lambda: flip("u", x[0]), lambda: flip("v", x[1]), lambda: flip("u", x[2])])


def cond_of_scan_reference(see, x):
    if see.flip("g", x[1]):
        z = 0
        for t in range(2):
            z = see.flip("z", BIAS[2 * z + t], t)
        out = z
    else:
        out = 2 + see.pick("w", x)
    return out + 10 * see.flip("d", squashed(out))


@structure("cond of scan", cond_of_scan_reference, g=(2,), z=(2, 2), w=(3,), d=(2,))
def cond_of_scan(x):
    def left():
        return lax.scan(lambda z, t: (flip("z", bias(2 * z + t)), None), 0, jnp.arange(2))[0]

    out = ppl.cond(flip("g", x[1]) == 1, left, lambda: 2 + pick("w", x))
    return out + 10 * flip("d", squash(out))


def scan_of_cond_reference(see, x):
    total = 0
    for t in range(2):
        if see.flip("a", x[t] * squashed(total), t):
            total += 1 + see.flip("b", squashed(total), t)
        else:
            total -= see.pick("c", x, t)
    return total


@structure("jit in cond in scan", scan_of_cond_reference, a=(2, 2), b=(2, 2), c=(3, 2))
def scan_of_cond(x):
    def step(total, p):
        left = jax.jit(lambda total: total + 1 + flip("b", squash(total)))
        a = flip("a", p * squash(total))
        return lax.cond(a == 1, left, jax.jit(lambda total: total - pick("c", x)), total), None

    return lax.scan(step, 0, x[:2])[0]


# --- branches in lanes ----------------------------------------------------------------------------------------------


def lanes_of_cond_reference(see, x):
    out = []
    for i in range(2):
        a = see.flip("a", x[i], i)
        out.append(1 + see.flip("b", BIAS[i], i) if a else -see.pick("c", x, i))
    return np.array(out) + 10 * see.flip("d", squashed(sum(out)))


@structure("vmap of cond", lanes_of_cond_reference, a=(2, 2), b=(2, 2), c=(3, 2), d=(2,))
def lanes_of_cond(x):
    def lane(p, i):
        return lax.cond(flip("a", p) == 1, lambda: 1 + flip("b", bias(i)), lambda: -pick("c", x))

    out = jax.vmap(lane)(x[:2], jnp.arange(2))
    return out + 10 * flip("d", squash(out.sum()))


def shared_reference(see, x):
    out = []
    for i in range(2):
        a = see.flip("a", x[i], i)
        s = [see.flip("s", BIAS[2 * a + j], i, j) for j in range(2)]  # a batch of two
        out.append(a + sum(s))
    return np.array(out)


@structure("vmap of cond, one address", shared_reference, a=(2, 2), s=(2, 2, 2))
def shared(x):
    def lane(p):
        a = flip("a", p)
        return a + ppl.cond(a == 1, lambda: flip("s", bias(slice(2, 4))), lambda: flip("s", bias(slice(0, 2)))).sum()

    return jax.vmap(lane)(x[:2])


def lanes_of_loop_reference(see, x):
    out = []
    for i in range(2):
        if see.flip("g", x[i], i):
            z = i
            for t in range(2):
                z = see.flip("z", BIAS[2 * z + t], t, i)
            out.append(z)
        else:
            out.append(3 + see.flip("w", x[2], i))
    return np.array(out)


@structure("vmap of cond of scan", lanes_of_loop_reference, g=(2, 2), z=(2, 2, 2), w=(2, 2))
def lanes_of_loop(x):
    rule = jax.custom_jvp(lambda p: 3 + flip("w", p))
    rule.defjvp(lambda primals, tangents: (3 + primals[0], tangents[0]))

    def lane(p, i):
        left = lambda: lax.scan(lambda z, t: (flip("z", bias(2 * z + t)), None), i, jnp.arange(2))[0]  # noqa: E731
        return lax.cond(flip("g", p) == 1, left, lambda: rule(x[2]))

    return jax.vmap(lane)(x[:2], jnp.arange(2))


def lanes_of_clamped_reference(see, x):
    out = []
    for i in range(2):
        k = see.flip("k", x[i], i) + 2 * see.flip("more", BIAS[i], i)  # the index 2 k - 2 is -2, 0, 2 or 4
        out.append(k + (see.flip("u", x[2], i) if k < 2 else 3 + see.flip("v", x[0], i)))
    return np.array(out)


@structure("vmap of switch out of range, jit", lanes_of_clamped_reference, more=(2, 2), k=(2, 2), u=(2, 2), v=(2, 2))
def lanes_of_clamped(x):
    def lane(p, i):
        k = flip("k", p) + 2 * flip("more", bias(i))
        first, last = (lambda: flip("u", x[2])), (lambda: 3 + flip("v", x[0]))
        return k + lax.switch(2 * k - 2, [jax.jit(first), lambda: 7, jax.jit(last)])

    return jax.vmap(lane)(x[:2], jnp.arange(2))


def one_predicate_reference(see, x):
    g = see.flip("g", x[2])
    return np.array([see.flip("b", x[i], i) if g else 2 + see.flip("c", BIAS[i], i) for i in range(2)])


@structure("vmap of cond, one predicate", one_predicate_reference, g=(2,), b=(2, 2), c=(2, 2))
def one_predicate(x):
    g = flip("g", x[2])
    lane = lambda p, i: lax.cond(g == 1, lambda: flip("b", p), lambda: 2 + flip("c", bias(i)))  # noqa: E731
    return jax.vmap(lane)(x[:2], jnp.arange(2))


def outer_predicate_reference(see, x):
    out = 0
    for i in range(2):
        a = see.flip("a", x[i], i)
        for j in range(2):
            out += see.flip("b", BIAS[i + j], i, j) if a else j * 3
    return out


@structure("vmap of vmap of cond, outer predicate", outer_predicate_reference, a=(2, 2), b=(2, 2, 2))
def outer_predicate(x):
    def lane(p, i):
        a = flip("a", p)
        inner = lambda j: lax.cond(a == 1, lambda: flip("b", bias(i + j)), lambda: j * 3)  # noqa: E731
        return jax.vmap(inner)(jnp.arange(2)).sum()

    return jax.vmap(lane)(x[:2], jnp.arange(2)).sum()


def lanes_of_while_reference(see, x):
    total = 0
    for i in range(2):
        tails, heads = i, 0
        for t in range(2):
            if heads:
                break
            heads = see.flip("heads", x[tails], t, i)
            tails += 1 - heads
        total += tails
    return total + 10 * see.flip("d", squashed(total))


@structure("vmap of bounded_while", lanes_of_while_reference, heads=(2, 2, 2), d=(2,))
def lanes_of_while(x):
    lane = lambda i: ppl.bounded_while(lambda s: s[1] == 0, toss(x), (i, 0), max_steps=2)[0]  # noqa: E731
    total = jax.vmap(lane)(jnp.arange(2)).sum()
    return total + 10 * flip("d", squash(total))


def lanes_of_scan_reference(see, x):
    out = []
    for i in range(2):
        total = i
        for t in range(2):
            if see.flip("a", x[t], t, i):
                total += 1 + see.flip("b", squashed(total), t, i)
        out.append(total)
    return np.array(out)


@structure("vmap of scan of cond", lanes_of_scan_reference, a=(2, 2, 2), b=(2, 2, 2))
def lanes_of_scan(x):
    def step(total, p):
        a = flip("a", p)
        return total + lax.cond(a == 1, lambda: 1 + flip("b", squash(total)), lambda: 0), None

    return jax.vmap(lambda total: lax.scan(step, total, x[:2])[0])(jnp.arange(2))


def scan_of_lanes_reference(see, x):
    total = 0
    for t in range(2):
        before = total
        for i in range(2):
            index = i + see.flip("k", x[t], t, i)
            if index == 1:
                total += see.flip("u", squashed(before), t, i)
            if index == 2:
                total += 1 - see.flip("u", BIAS[t], t, i)
    return total


@structure("scan of vmap of switch", scan_of_lanes_reference, k=(2, 2, 2), u=(2, 2, 2))
def scan_of_lanes(x):
    def step(total, inputs):
        p, t = inputs

        def lane(i):
            branches = [lambda: 0, lambda: flip("u", squash(total)), lambda: 1 - flip("u", bias(t))]
            return ppl.switch(i + flip("k", p), branches)

        return total + jax.vmap(lane)(jnp.arange(2)).sum(), None

    return lax.scan(step, 0, (x[:2], jnp.arange(2)))[0]


def deep_reference(see, x):
    out = []
    for i in range(2):
        if see.flip("a", x[i], i):
            b = see.flip("b", BIAS[i], i)
            out.append(1 + see.flip("c", x[2], i) if b else 0)
        else:
            out.append(5 + see.flip("c", BIAS[3 - i], i))
    return np.array(out)


@structure("cond in cond in vmap", deep_reference, a=(2, 2), b=(2, 2), c=(2, 2))
def deep(x):
    def lane(p, i):
        def left():
            return lax.cond(flip("b", bias(i)) == 1, lambda: 1 + flip("c", x[2]), lambda: 0)

        return lax.cond(flip("a", p) == 1, left, lambda: 5 + flip("c", bias(3 - i)))

    return jax.vmap(lane)(x[:2], jnp.arange(2))


def nested_lanes_reference(see, x):
    out = 0
    if see.flip("g", x[2]):
        for i in range(2):
            if see.flip("sub/a", x[i], i):
                out += 1 + see.flip("sub/b", BIAS[i], i)
    return out + 10 * see.flip("d", squashed(out))


@structure("nested model in vmap in cond", nested_lanes_reference, g=(2,), sub__a=(2, 2), sub__b=(2, 2), d=(2,))
def nested_lanes(x):
    def left():
        return jax.vmap(lambda p, i: ppl.sample("sub", child(p, i)))(x[:2], jnp.arange(2)).sum()

    out = lax.cond(flip("g", x[2]) == 1, left, lambda: 0)
    return out + 10 * flip("d", squash(out))


def two_children_reference(see, x):
    out = []
    for i in range(2):
        if see.flip("g", x[i], i):
            a = see.flip("sub/a", BIAS[i], i)
            out.append(1 + see.flip("sub/b", BIAS[0], i) if a else 0)
        else:
            out.append(3 + see.flip("sub/a", x[2], i) + see.flip("sub/e", 0.3, i))
    return np.array(out)


@ppl.model
def other_child(p):
    return 3 + flip("a", p) + flip("e", 0.3)


@structure(
    "vmap of cond of nested models",
    two_children_reference,
    g=(2, 2),
    sub__a=(2, 2),
    sub__b=(2, 2),
    sub__e=(2, 2),
)
def two_children(x):
    def lane(p, i):
        left = lambda: ppl.sample("sub", child(bias(i), 0))  # noqa: E731
        return lax.cond(flip("g", p) == 1, left, lambda: ppl.sample("sub", other_child(x[2])))

    return jax.vmap(lane)(x[:2], jnp.arange(2))
