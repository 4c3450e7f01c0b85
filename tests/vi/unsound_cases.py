"""Objectives that jump in a reparametrised draw; those that resemble them and do not are in `sound_cases`.

Each is a function of the parameter `p` and of the strategy of its site `x`. The line that makes an unsound one jump
ends in `# jump`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import expectax as ex
from expectax import dist, vi

UNSOUND: list[Any] = []
INFINITE = {
    "uniform_window",
    "window_about_a_sum",
    "truncated_data",
    "moving_lower_bound",
    "outside_the_support",
    "narrow_prior",
}
"""Their bias is infinite or hidden in minus infinity, and is not estimated."""


def unsound(case: Any) -> Any:
    UNSOUND.append(case)
    return case


def normal(p, how, shape=()):
    return ex.sample("x", dist.Normal(p * jnp.ones(shape), 1.0), gradient=how)


TABLE = jnp.array([0.0, 3.0, 1.0, 5.0, 2.0])


# --- they jump --------------------------------------------------------------------------------------------------------


@unsound
def indicator(p, how):
    return jnp.where(normal(p, how) < 0.3, 1.0, 0.0)  # jump


@unsound
def indicator_as_float(p, how):
    return (normal(p, how) < 0.3).astype(float)  # jump


@unsound
def step_loss(p, how):
    x = normal(p, how)
    return x**2 + 2.0 * jnp.heaviside(x - 0.5, 0.5)  # jump


@unsound
def quantised_cost(p, how):
    return jnp.floor(3.0 * normal(p, how)) ** 2  # jump


@unsound
def rounded_cost(p, how):
    return jnp.round(normal(p, how), 1) + jnp.round(2.0 * normal_y(p, how))  # jump


def normal_y(p, how):
    return ex.sample("y", dist.Normal(p, 1.0), gradient=how)


@unsound
def ceiling(p, how):
    x = normal(p, how)
    return x * jnp.ceil(x)  # jump


@unsound
def sign_loss(p, how):
    return jnp.sum(jnp.sign(normal(p, how, (3,))) * TABLE[:3])  # jump


@unsound
def decision_threshold(p, how):
    x = normal(p, how)
    treat = jax.nn.sigmoid(x) > 0.6  # jump
    return jnp.where(treat, 1.0 - 0.1 * x, 0.5 * x)


@unsound
def sawtooth(p, how):
    x = normal(p, how)
    return jnp.mod(x, 1.0) * x  # jump


@unsound
def argmax_decoder(p, how):
    return TABLE[jnp.argmax(jnp.stack([1.0, 2.0, 0.5]) * normal(p, how, (3,)))]  # jump


@unsound
def ranks(p, how):
    x = normal(p, how, (3,))
    return jnp.argsort(x * jnp.arange(1.0, 4.0)) @ TABLE[:3] * 1.0 + x[0]  # jump


@unsound
def ranks_of_scipy(p, how):
    x = normal(p, how, (3,)) * jnp.arange(1.0, 4.0)
    return jax.scipy.stats.rankdata(x) @ TABLE[:3]  # jump


@unsound
def sorted_by_another(p, how):
    key, value = normal(p, how, (3,)), jnp.array([1.0, 5.0, -2.0])
    return lax.sort((key * jnp.arange(1.0, 4.0), value), num_keys=1)[1][0]  # jump


@unsound
def best_indices(p, how):
    return jnp.sum(TABLE[lax.top_k(normal(p, how, (3,)) * jnp.arange(1.0, 4.0), 2)[1]])  # jump


@unsound
def rounded_index(p, how):
    return TABLE[jnp.clip(jnp.round(normal(p, how)).astype(int), 0, 4)]  # jump


@unsound
def truncated_index(p, how):
    return TABLE[jnp.clip(normal(p, how), 0.0, 4.0).astype(int)]  # jump


@unsound
def searched_index(p, how):
    return TABLE[jnp.searchsorted(jnp.array([-1.0, 0.0, 1.0]), normal(p, how))]  # jump


@unsound
def branch(p, how):
    x = normal(p, how)
    return lax.cond(x > 0.2, lambda x: x + 1.0, lambda x: x, x)  # jump


@unsound
def switch(p, how):
    x = normal(p, how)
    which = (x > 0.0).astype(int) + (x > 1.0)  # jump
    return lax.switch(which, [lambda x: x, lambda x: 3.0, lambda x: -x], x)


@unsound
def branch_with_a_site(p, how):
    x = normal(p, how)
    return lax.cond(
        x > 0.2,  # jump
        lambda: ex.sample("a", dist.Normal(2.0, 1.0)),
        lambda: ex.sample("b", dist.Normal(-1.0, 1.0)),
    )


@unsound
def loop_count(p, how):
    x = normal(p, how)
    return lax.while_loop(lambda k: k < x, lambda k: k + 1.0, 0.0)  # jump


@unsound
def scanned_counter(p, how):
    def step(count, x):
        return count + jnp.where(x > 0.1 * count, 1.0, 0.0), None  # jump

    return lax.scan(step, 0.0, normal(p, how, (3,)))[0]


@unsound
def sites_in_a_scan(p, how):
    def step(state, _):
        x = ex.sample("x", dist.Normal(p + 0.1 * state, 1.0), gradient=how)
        return jnp.where(x > 0.0, state + 1.0, state - 0.5 * x), x  # jump

    return lax.scan(step, 0.0, None, length=3)[0]


@unsound
def under_vmap(p, how):
    x = jax.vmap(lambda _: normal(p, how))(jnp.arange(4))
    return jnp.mean(jax.vmap(lambda x, y: jnp.where(x > y, y, 0.0))(x, jnp.ones(4)))  # jump


@unsound
def under_jit(p, how):
    @jax.jit
    def cost(x):
        return jnp.where(x**2 > 1.0, 1.0, x)  # jump

    return jax.jit(lambda x: cost(x) + x)(normal(p, how))


@unsound
def in_nested_models(p, how):
    @ex.model
    def inner():
        x = normal(p, how)
        return jnp.where(x > 0.3, 2.0, 0.0)  # jump

    @ex.model
    def outer():
        ex.sample("z", dist.Normal(ex.sample("sub", inner()), 1.0))

    return vi.simulate(outer())[0]["z"]


@unsound
def parameter_of_another_site(p, how):
    x = normal(p, how)
    b = ex.sample("b", dist.Bernoulli(jnp.where(x > 0.3, 0.9, 0.1)))  # jump
    return 2.0 * b


@unsound
def parameter_that_is_rounded(p, how):
    x = normal(p, how)
    z = ex.sample("z", dist.Normal(jnp.round(x), 1.0))  # jump
    return z**2


@unsound
def huber_with_a_gap(p, how):
    x = normal(p, how)
    return jnp.where(jnp.abs(x) < 1.0, 0.5 * x**2, jnp.abs(x))  # jump


@unsound
def clipped_wrongly(p, how):
    x = normal(p, how)
    return jnp.where(x > 1.0, 0.5, x)  # jump


@unsound
def window(p, how):
    x = normal(p, how)
    return x + 0.1 * jnp.where((x > 0.0) & (x < 5.0), 3.0, 0.0)  # jump


@unsound
def mask_of_a_count(p, how):
    return 1.0 * jnp.sum(normal(p, how, (3,)) > 0.5)  # jump


@unsound
def any_of_them(p, how):
    return jnp.where(jnp.any(normal(p, how, (3,)) > 0.5), 1.0, 0.0)  # jump


@unsound
def one_hot(p, how):
    x = normal(p, how, (3,)) * jnp.arange(1.0, 4.0)
    return jax.nn.one_hot(jnp.argmax(x), 3) @ TABLE[:3]  # jump


@unsound
def neighbours_that_are_compared(p, how):
    x = normal(p, how, (3,)) * jnp.array([0.0, 1.0, 3.0])
    return jnp.sum(jnp.where(x[1:] > x[:-1], x[1:] + 1.0, 0.0))  # jump


@unsound
def two_jumps_one_of_which_heals(p, how):
    x = normal(p, how)
    return TABLE[jnp.clip(jnp.round(x).astype(int), 0, 4)] * jnp.where(x > 7.0, x, 7.0)  # jump


@unsound
def a_step_of_its_own_rule(p, how):
    @jax.custom_jvp
    def hard(x):
        return jnp.where(x > 0.0, 1.0, 0.0)  # jump

    hard.defjvp(lambda primals, tangents: (hard(*primals), tangents[0]))
    return hard(normal(p, how))


def elbo(model, how, y=None, site=None):
    site = site or (lambda p: dist.Normal(p, 1.0))

    @ex.model
    def guide(p):
        ex.sample("x", site(p), gradient=how)

    return lambda p: vi.elbo(model.given({"y": 0.2} if y is None else y), guide)(p)


@unsound
def uniform_window(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.Uniform(x - 0.5, x + 0.5))  # jump

    return elbo(model(), how)(p)


@unsound
def window_about_a_sum(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Normal(jnp.zeros(3), 1.0))
        centre = jnp.ones((2, 3)) @ x
        ex.sample("y", dist.Uniform(centre - 0.5, centre + 0.5))  # jump

    return elbo(model(), how, {"y": jnp.zeros(2)}, lambda p: dist.Normal(p * jnp.ones(3), 1.0))(p)


@unsound
def truncated_data(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.TruncatedNormal(0.0, 1.0, low=x))  # jump

    return elbo(model(), how)(p)


@unsound
def moving_lower_bound(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Exponential(1.0))
        ex.sample("y", dist.Pareto(jnp.exp(0.1 * x), 1.0))  # jump

    return elbo(model(), how, {"y": 1.2}, lambda p: dist.LogNormal(p, 1.0))(p)


@unsound
def outside_the_support(p, how):
    @ex.model
    def model():
        ex.sample("x", dist.HalfNormal(1.0))  # jump

    return vi.log_density(model(), {"x": normal(p, how)})


@unsound
def narrow_prior(p, how):
    @ex.model
    def model():
        ex.sample("u", dist.Uniform(0.0, 1.0))  # jump

    return jnp.exp(vi.log_density(model(), {"u": jnp.exp(normal(p, how))}))


@unsound
def whether_it_is_finite(p, how):
    return jnp.isfinite(1.0 / jnp.maximum(normal(p, how), 0.0)) * 1.0  # jump


@unsound
def whether_it_is_infinite(p, how):
    return jnp.isinf(1.0 / jnp.maximum(normal(p, how), 0.0)) * 1.0  # jump


@unsound
def whether_it_is_a_number(p, how):
    return jnp.where(jnp.isnan(jnp.sqrt(normal(p, how))), 0.0, 1.0)  # jump


@unsound
def a_quotient_with_two_limits(p, how):
    x = normal(p, how)
    return jnp.abs(x) / x  # jump


@unsound
def a_hinge_over_its_argument(p, how):
    x = normal(p, how)
    return jax.nn.relu(x) / x  # jump


@unsound
def a_root_of_a_square_over_its_argument(p, how):
    x = normal(p, how)
    return jnp.sqrt(x**2) / x  # jump


@unsound
def the_cut_of_an_angle(p, how):
    return jnp.arctan2(normal(p, how), -1.0)  # jump


def noise_against_a_parameter(p, how):
    """It jumps whatever the strategy: the parameter moves the step, not the draw."""
    x = ex.sample("x", dist.Uniform(-1.0, 1.0), gradient=how)
    return jnp.where(x < p, 3.0, x)  # jump
