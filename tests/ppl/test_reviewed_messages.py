"""Messages that a hostile reader found wrong, each with its smallest case: they name the user's line and the remedy."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import expectax as ex
from expectax import dist
from expectax.ppl import AddressError, ControlFlowError, ShapeError

KEY = jax.random.key(4)
UNIT = dist.Normal(0.0, 1.0)
FILE = r"test_reviewed_messages\.py:\d+"


def flip(address, p=0.5):
    return ex.sample(address, dist.Bernoulli(p))


def seen(k):
    return ex.sample("y", dist.Normal(1.0 * k, 1.0))


# --- places ------------------------------------------------------------------------------------------------------------


def second_order():
    def step(carry, _):
        new = flip("k", 0.3 + 0.2 * carry[0] + 0.1 * carry[1])
        seen(new)
        return (new, carry[0]), None

    lax.scan(step, (0, 0), length=4)


def bounded():
    def body(state):
        z = flip("z")
        seen(z)
        return state[0] + 1, z

    ex.bounded_while(lambda state: state[1] == 0, body, (0, 0), max_steps=3)


def skipped():
    def step(z, t):
        z = lax.cond(t % 2 == 0, lambda: flip("z", 0.2 + 0.3 * z), lambda: z)
        seen(z)
        return z, None

    lax.scan(step, 0, jnp.arange(4))


def lanes_as_inputs():
    k = jax.vmap(lambda _: flip("k"))(jnp.arange(3))
    lax.scan(lambda c, k: (c, seen(k)), 0, k)


def outputs_in_lanes():
    _, k = lax.scan(lambda c, _: (c, flip("k")), 0, length=3)
    jax.vmap(seen)(k)


@pytest.mark.parametrize("function", [second_order, bounded, skipped, lanes_as_inputs, outputs_in_lanes])
def test_what_cannot_be_summed_out_names_the_users_line(function):
    program = ex.marginalize_discrete(ex.model(function)())
    lines = function.__code__.co_firstlineno, max(line for *_, line in function.__code__.co_lines() if line)
    with pytest.raises(ControlFlowError, match=FILE) as caught:
        program.simulate(KEY)
    message = str(caught.value)
    assert "/ppl/_" not in message
    line = int(message.split("test_reviewed_messages.py:")[1].split()[0].rstrip(":"))
    assert lines[0] <= line <= lines[1] or line == seen.__code__.co_firstlineno + 1


@ex.model
def centred():
    mu = ex.sample("mu", UNIT)
    tau = ex.sample("tau", dist.HalfNormal(1.0))
    z = flip("z")
    x = ex.sample("x", dist.Normal(mu, tau))
    ex.sample("y", dist.Normal(x + z, 1.0))


def test_a_marginal_program_has_no_densities_by_site():
    program = ex.marginalize_discrete(centred())
    posterior = program.given({"y": 1.0})
    latents = {"mu": 0.0, "tau": 1.0, "x": 0.0}
    draws = {name: jnp.ones(2) for name in latents}
    for run in (
        lambda: ex.debug(program, key=KEY),
        lambda: ex.log_likelihood(posterior, draws),
        lambda: posterior.site_log_densities(latents),
        lambda: ex.reparameterize(posterior, "auto", key=KEY),
    ):
        with pytest.raises(ControlFlowError, match=rf"{FILE}.*'z' are summed out.*Use the program itself"):
            run()


def test_pmap_has_a_place():
    program = ex.model(lambda: jax.pmap(lambda x: ex.sample("x", dist.Normal(x, 1.0)))(jnp.zeros(1)))()
    with pytest.raises(ControlFlowError, match=rf"site 'x' at .*{FILE} stands inside"):
        program.simulate(KEY)


# --- what to do --------------------------------------------------------------------------------------------------------


@ex.model
def three():
    mu = ex.sample("mu", UNIT)
    tau = ex.sample("tau", dist.HalfNormal(1.0))
    ex.sample("b", dist.Normal(jnp.full(3, mu), tau))


def mapped(count):
    return ex.model(
        lambda: lax.map(lambda x: ex.sample("x", dist.Normal(x, 1.0)), jnp.arange(1.0 * count), batch_size=2)
    )()


def clash():
    events = dist.Normal(jnp.zeros(3), 1.0)
    ex.cond(flip("z") == 1, lambda: ex.sample("y", events.to_event(1)), lambda: ex.sample("y", events))


CASES = {
    "a traced index": (
        lambda: jax.jit(lambda i: three().simulate(KEY).regenerate(KEY, ex.select(("b", i)))[1])(1),
        ShapeError,
        f"{FILE}.*'b'.*fixed",
    ),
    "event against batch": (lambda: ex.model(clash)().sites(), ShapeError, r"event shape \(\).*event shape \(3,\)"),
    "rename": (lambda: ex.rename(three(), {"mu": "tau"}), AddressError, f"rename at .*{FILE}.*'tau' is taken"),
    "rename two": (
        lambda: ex.rename(three(), {"mu": "c", "tau": "c"}),
        AddressError,
        f"rename at .*{FILE}.*'c' is taken",
    ),
    "given twice": (
        lambda: three().given({"mu": 1.0}).given({"mu": 2.0}),
        AddressError,
        f"{FILE}.*'mu' is observed already",
    ),
    "scale": (lambda: ex.scale(three(), "b"), TypeError, f"scale at .*{FILE}: the argument factor"),
    "no draws at once": (
        lambda: ex.predictive(three(), key=KEY, num_samples=3, batch_size=0),
        ValueError,
        f"{FILE}: batch_size is a positive whole number, got 0",
    ),
    "no function": (lambda: ex.model(3), TypeError, f"{FILE}: expected a function"),  # pyright: ignore
    "lax.map with a remainder": (lambda: mapped(5).sites(), AddressError, "'x' is used twice.*lax.map.*divisor"),
    "a loop": (lambda: ex.model(lambda: [flip("x") for _ in range(2)])().sites(), AddressError, "a loop"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    run, error, match = CASES[name]
    with pytest.raises(error, match=match):
        run()


def test_what_is_right_stays_right():
    assert set(ex.rename(three(), {"mu": "tau", "tau": "mu"}).sites()) == {"mu", "tau", "b"}
    assert mapped(6).sites()["x"].shape == (3, 2)
    both = three().given({"mu": 1.0, "b": jnp.zeros(3)})
    later = three().given({"mu": 1.0}).given({"b": jnp.zeros(3)})
    assert later.log_density({"tau": 2.0}) == both.log_density({"tau": 2.0})
