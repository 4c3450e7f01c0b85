"""Compile once: new keys and data of the same shape compile nothing; changed Python state compiles again."""

import collections
import dataclasses
import functools
import pathlib
import time
import types
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, ppl
from expectax.ppl._compile import Fingerprint, compiled
from helpers import count_compiles

KEYS = jax.random.split(jax.random.key(20260805), 4)
TINY = 1e-6


@compiled
def draw(program, key):
    """Return the choice at "x"."""
    return program.simulate(key)["x"]


@compiled
def weight(posterior, key):
    return posterior.generate(key)[1]


def at(centre: Any) -> Any:
    """Draw as good as `centre` itself, so that a value tells which state was read."""
    return ppl.sample("x", dist.Normal(centre, TINY))


# --- nothing new to compile -------------------------------------------------------------------------------------------


def test_the_counter_counts():
    x, other_x, y = jnp.arange(3.0), jnp.ones(3), jnp.arange(4.0)
    function = jax.jit(lambda x: jnp.sin(x) * 2)
    with count_compiles() as first:
        function(x)
    with count_compiles() as again:
        function(other_x)
    with count_compiles() as other_shape:
        function(y)
    assert (len(first), len(again), len(other_shape)) == (1, 0, 1)


@ppl.model
def shifted(shift, scale=1.0):
    ppl.sample("x", dist.Normal(shift, scale))
    ppl.sample("y", dist.Normal(shift, 1.0))


def test_new_keys_and_data_compile_nothing():
    shifts, ys = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    keys, shifts, ys = list(KEYS), list(shifts), list(ys)
    expected = [shifted(a).given({"y": y}).generate(k)[1] for a, y, k in zip(shifts, ys, keys, strict=False)]
    weight(shifted(shifts[0]).given({"y": ys[0]}), keys[0])
    with count_compiles() as compiles:
        got = [weight(shifted(a).given({"y": y}), k) for a, y, k in zip(shifts, ys, keys, strict=False)]
    assert not compiles
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_python_floats_are_data():
    programs = [shifted(float(a), scale=TINY * b) for a, b in ((1, 1), (2, 3))]
    draw(programs[0], KEYS[0])
    with count_compiles() as compiles:
        got = draw(programs[1], KEYS[0])
    assert not compiles
    np.testing.assert_allclose(got, 2.0, atol=1e-4)


def test_integers_and_strings_are_program():
    power = ppl.model(lambda n, kind: at(float(n) if kind == "plain" else 10.0 * n))
    assert [round(float(draw(power(n, kind), KEYS[0])), 3) for n, kind in ((2, "plain"), (3, "plain"), (3, "ten"))] == [
        2,
        3,
        30,
    ]
    with count_compiles() as compiles:
        draw(power(3, "plain"), KEYS[1])
    assert not compiles


def test_another_shape_compiles():
    draw(shifted(jnp.zeros(2)), KEYS[0])
    with count_compiles() as compiles:
        assert draw(shifted(jnp.zeros(5)), KEYS[0]).shape == (5,)
    assert compiles


def test_models_made_by_one_function_do_not_share_a_program():
    make = lambda centre: ppl.model(lambda: at(centre))  # noqa: E731
    assert [round(float(draw(make(c)(), KEYS[0])), 3) for c in (1.0, 2.0, 1.0)] == [1, 2, 1]


# --- changed Python state ------------------------------------------------------------------------------------------------

NUMBER, LIST, ARRAY, JAX_ARRAY = 1.0, [1.0], np.array([1.0]), jnp.asarray(1.0)
CONFIG, SET = types.SimpleNamespace(a=1.0), {1.0}
MODULE: Any = types.ModuleType("settings")
INNER: Any = types.ModuleType("settings.inner")
MODULE.a, MODULE.inner, INNER.a = 1.0, INNER, 1.0
DEQUE, PATH = collections.deque([1.0]), pathlib.Path("data")
LIKE_JAX = types.ModuleType("jax_models")  # a user's module whose name begins like a library's
exec("a = 1.0\ndef centre(): return a", LIKE_JAX.__dict__)
centre_elsewhere = LIKE_JAX.centre


def set_global(name: str, value: Any) -> Callable[[], None]:
    return lambda: globals().__setitem__(name, value)


def helper():
    return NUMBER


DEFAULT = [1.0]


def with_default(centre=DEFAULT):
    return at(centre[0])


def closure():
    centre = 1.0

    def change():
        nonlocal centre
        centre = 2.0

    return lambda: at(centre), change


@dataclasses.dataclass
class Settings:
    a: float = 1.0

    default: ClassVar[float] = 1.0

    def global_number(self):
        return NUMBER

    def site(self):
        return at(self.a)

    def __call__(self):
        return at(self.a)


SETTINGS = [Settings() for _ in range(3)]
submodel = ppl.model(lambda: at(NUMBER))

# name: (model's function, what changes its centre from 1 to 2)
SEEN = {
    "global number": (lambda: at(NUMBER), set_global("NUMBER", 2.0)),
    "global of a helper": (lambda: at(helper()), set_global("NUMBER", 2.0)),
    "global of a helper in a lambda": (
        lambda: jax.vmap(lambda _: at(helper()))(jnp.zeros(1))[0],
        set_global("NUMBER", 2.0),
    ),
    "global of a nested model": (lambda: at(ppl.sample("sub", submodel())), set_global("NUMBER", 2.0)),
    "global list": (lambda: at(LIST[0]), lambda: LIST.__setitem__(0, 2.0)),
    "global numpy array, in place": (lambda: at(ARRAY[0]), lambda: ARRAY.__setitem__(0, 2.0)),
    "global jax array": (lambda: at(JAX_ARRAY), set_global("JAX_ARRAY", jnp.asarray(2.0))),
    "default argument": (with_default, lambda: DEFAULT.__setitem__(0, 2.0)),
    "closure": closure(),
    "partial": (functools.partial(lambda shift: at(shift + NUMBER), 0.0), set_global("NUMBER", 2.0)),
    "bound method": (SETTINGS[0].site, lambda: setattr(SETTINGS[0], "a", 2.0)),
    "callable object": (SETTINGS[1], lambda: setattr(SETTINGS[1], "a", 2.0)),
    "attribute of an object": (lambda: at(SETTINGS[2].a), lambda: setattr(SETTINGS[2], "a", 2.0)),
    "attribute of a namespace": (lambda: at(CONFIG.a), lambda: setattr(CONFIG, "a", 2.0)),
    "attribute of a module": (lambda: at(MODULE.a), lambda: setattr(MODULE, "a", 2.0)),
    "global in a module named like a library": (lambda: at(centre_elsewhere()), lambda: setattr(LIKE_JAX, "a", 2.0)),
    "set": (lambda: at(max(SET)), lambda: SET.add(2.0)),
    "attribute of a class": (lambda: at(Settings.default), lambda: setattr(Settings, "default", 2.0)),
    "global of a method": (lambda: at(SETTINGS[0].global_number()), set_global("NUMBER", 2.0)),
    "deque": (lambda: at(DEQUE[0]), lambda: DEQUE.__setitem__(0, 2.0)),
    "attribute of a module in a module": (lambda: at(MODULE.inner.a), lambda: setattr(MODULE.inner, "a", 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_changed_state_compiles_again(name, monkeypatch):
    function, change = SEEN[name]
    monkeypatch.setitem(globals(), "NUMBER", 1.0)
    model = ppl.model(function)
    old, again = draw(model(), KEYS[0]), draw(model(), KEYS[1])
    change()
    with count_compiles() as compiles:
        new = draw(model(), KEYS[2])
    with count_compiles() as none:
        newer = draw(model(), KEYS[3])
    np.testing.assert_allclose([old, again], 1.0, atol=1e-4)
    np.testing.assert_allclose([new, newer], 2.0, atol=1e-4)
    assert compiles and not none


def test_any_object_may_be_read():
    np.testing.assert_allclose(draw(ppl.model(lambda: at(float(len(PATH.name))))(), KEYS[0]), 4.0, atol=1e-4)


def test_the_fingerprint_takes_linear_time():
    """f_i calls f_{i-1} and g_{i-1}, and g_i both too: 2^i ways to f_0."""
    lines = [f"def {f}{i}(): return f{i - 1}() + g{i - 1}()" for i in range(1, 15) for f in "fg"]
    space: dict[str, Any] = {"__name__": "users"}
    exec("\n".join(["def f0(): return 1.0", "def g0(): return 1.0", *lines]), space)
    start = time.perf_counter()
    Fingerprint(space["f14"])
    assert time.perf_counter() - start < 0.1
