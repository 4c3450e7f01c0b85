"""Objectives that resemble those of `unsound_cases` and are continuous in their draws."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from unsound_cases import TABLE, elbo, normal, normal_y

import expectax as ex
from expectax import dist, vi

SOUND: list[Any] = []


def sound(case: Any) -> Any:
    SOUND.append(case)
    return case


@sound
def relu(p, how):
    return jax.nn.relu(normal(p, how)) + jnp.maximum(normal_y(p, how), 0.3)


@sound
def relu_by_where(p, how):
    x = normal(p, how)
    return jnp.where(x > 0.3, x, 0.3)


@sound
def relu_by_mask(p, how):
    x = normal(p, how)
    return (x > 0.3) * (x - 0.3) + (x > 0.7) * x - 0.7 * (x > 0.7)


@sound
def relu_by_cond(p, how):
    x = normal(p, how)
    return lax.cond(x > 0.3, lambda: x, lambda: 0.3)


@sound
def relu_by_cond_in_lanes(p, how):
    return jnp.sum(jax.vmap(lambda x: lax.cond(x > 0.0, lambda: 2.0 * x, lambda: 0.0))(normal(p, how, (3,))))


@sound
def relu_net(p, how):
    hidden = jnp.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]]) @ normal(p, how, (3,)) + 0.1
    hidden = jnp.where(hidden > 0.0, hidden, 0.01 * hidden)
    return jnp.sum(jax.nn.elu(hidden) * jax.nn.gelu(hidden))


@sound
def hinge(p, how):
    margin = 1.0 - normal(p, how, (2,))
    return jnp.sum(jnp.where(margin > 0.0, margin, 0.0))


@sound
def huber(p, how):
    x = normal(p, how)
    return jnp.where(jnp.abs(x) < 1.5, 0.5 * x**2, 1.5 * (jnp.abs(x) - 0.75))


@sound
def huber_with_a_parameter(p, how):
    x, delta = normal(p, how), jnp.exp(lax.stop_gradient(p))
    return jnp.where(jnp.abs(x) <= delta, 0.5 * x**2, delta * jnp.abs(x) - 0.5 * delta**2)


@sound
def clipping(p, how):
    return jnp.clip(normal(p, how), -1.0, 0.5) ** 2


@sound
def clipping_by_where(p, how):
    x = normal(p, how)
    return jnp.where(x < -1.0, -1.0, jnp.where(x > 0.5, 0.5, x))


@sound
def triangle_wave(p, how):
    x = normal(p, how)
    return jnp.abs(x - jnp.round(x))


@sound
def periodic(p, how):
    return jnp.cos(jnp.mod(normal(p, how), 2.0 * jnp.pi))


@sound
def sorted_cost(p, how):
    return jnp.sort(normal(p, how, (3,))) @ TABLE[:3]


@sound
def max_pool(p, how):
    x = normal(p, how, (4,))
    return jnp.sum(jnp.max(x.reshape(2, 2), axis=1)) + jnp.median(x) + lax.top_k(x, 2)[0][1]


@sound
def maximum_of_neighbours(p, how):
    x = normal(p, how, (3,))
    return jnp.sum(jnp.where(x[1:] > x[:-1], x[1:], x[:-1]))


@sound
def softmax_and_its_kin(p, how):
    x = normal(p, how, (3,))
    return (
        jax.nn.logsumexp(x) + jnp.logaddexp(x[0], 0.3) + jax.nn.softplus(x[1]) + jax.nn.softmax(x)[2] + jnp.sinc(x[0])
    )


@sound
def special_functions(p, how):
    x = normal(p, how)
    return jax.scipy.special.log_ndtr(x) + jax.scipy.special.ndtri(jax.nn.sigmoid(x)) + jnp.sqrt(x**2 + 0.1)


@sound
def entropy_of_a_draw(p, how):
    x = jax.nn.sigmoid(normal(p, how))
    return jax.scipy.special.xlogy(x, x) + jnp.where(x < 1.0, (1.0 - x) * jnp.log1p(-x), 0.0)


@sound
def a_condition_that_always_holds(p, how):
    x = ex.sample("x", dist.LogNormal(p, 0.5), gradient=how)
    return jnp.where(x > 0.0, jnp.log(x), 7.0)


@sound
def guarded_division(p, how):
    x = normal(p, how)
    return jnp.where(x == 0.0, 1.0, jnp.sin(x) / jnp.where(x == 0.0, 1.0, x))


@sound
def interpolation(p, how):
    return jnp.interp(normal(p, how), jnp.array([-1.0, 0.0, 2.0]), jnp.array([1.0, 0.0, 3.0]))


@sound
def scan_with_a_kink(p, how):
    def step(level, x):
        return jnp.where(x > level, x, level), None

    return lax.scan(step, 0.0, normal(p, how, (3,)))[0]


@sound
def sites_in_a_reflected_walk(p, how):
    def step(state, _):
        x = ex.sample("x", dist.Normal(p + 0.5 * state, 1.0), gradient=how)
        return jnp.where(x < 0.0, -x, x), None

    return lax.scan(step, 0.0, None, length=3)[0]


@sound
def discrete_given_continuous(p, how):
    x = normal(p, how)
    b = ex.sample("b", dist.Bernoulli(jax.nn.sigmoid(x)), gradient=vi.Enum())
    return jnp.where(b == 1, 2.0, x)


@sound
def score_function_draw_in_a_step(p, how):
    x = normal(p, how)
    z = ex.sample("z", dist.Normal(x, 1.0), gradient=vi.Reinforce(None))
    return jnp.where(z > 0.3, 1.0, 0.0) + x


@sound
def comparison_that_is_not_used(p, how):
    x = normal(p, how)
    _ = jnp.floor(x) * 3.0
    return x + 0.5 * lax.stop_gradient(jnp.where(lax.stop_gradient(p) > 0.0, 1.0, 0.0))


@sound
def half_normal_prior(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.HalfNormal(1.0))
        ex.sample("y", dist.Gamma(2.0, x))

    return elbo(model(), how, site=lambda p: dist.LogNormal(p, 0.5))(p)


@sound
def positive_by_hand(p, how):
    @ex.model
    def model():
        ex.sample("x", dist.Gamma(2.0, 1.0))

    return vi.log_density(model(), {"x": jnp.exp(normal(p, how))})


@sound
def unit_interval_prior(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Beta(2.0, 2.0))
        ex.sample("y", dist.Normal(x, 1.0))

    def site(p):
        return dist.TransformedDistribution(dist.Normal(p, 1.0), dist.transforms.SigmoidTransform())

    return elbo(model(), how, site=site)(p)


@sound
def simplex_prior(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Dirichlet(jnp.ones(3)))
        ex.sample("y", dist.Normal(x[0], 1.0))

    def site(p):
        base = dist.Normal(p * jnp.arange(2.0), 1.0).to_event(1)
        return dist.TransformedDistribution(base, dist.transforms.StickBreakingTransform())

    return elbo(model(), how, site=site)(p)


@sound
def correlation_prior(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.LKJCholesky(3, 1.5))
        ex.sample("y", dist.Normal(x[1, 0], 1.0))

    def site(p):
        base = dist.Normal(p * jnp.arange(3.0), 0.5).to_event(1)
        return dist.TransformedDistribution(base, dist.transforms.CorrCholeskyTransform())

    return elbo(model(), how, site=site)(p)


@sound
def kinked_likelihood(p, how):
    @ex.model
    def model():
        x = ex.sample("x", dist.Normal(0.0, 1.0))
        ex.sample("y", dist.AsymmetricLaplace(x, 1.0, 0.7))

    return elbo(model(), how)(p)


@sound
def dropout(p, how):
    mask = ex.sample("x", dist.Uniform(0.0, 1.0), gradient=how) < 0.5
    return mask * jnp.sin(p) + p * jax.random.bernoulli(jax.random.key(0))


@sound
def kink_at_a_parameter(p, how):
    x = ex.sample("x", dist.Normal(0.0, 1.0), gradient=how)
    return jnp.where(x > p, x, p) ** 2


@sound
def window_of_fixed_noise(p, how):
    x = ex.sample("x", dist.Normal(0.0, 1.0), gradient=how)
    z = ex.sample("z", dist.Normal(jnp.where(x > 0.3, 2.0 * p, 0.0), 1.0), gradient=how)
    return z**2


@sound
def largest_of_fixed_noise(p, how):
    x = ex.sample("x", dist.Normal(jnp.zeros(3), 1.0), gradient=how)
    return TABLE[jnp.argmax(x)] * p


@sound
def guards_that_change_nothing(p, how):
    x = normal(p, how)
    x = jnp.where(jnp.isfinite(x), x, 0.0)
    return jnp.where(jnp.isnan(jnp.exp(x)), 0.0, jnp.where(jnp.isfinite(jnp.exp(x)), jnp.exp(0.3 * x), 0.0))


@sound
def quotients_with_one_limit(p, how):
    x = normal(p, how)
    return x**2 / x + jnp.sin(x) / x + (jnp.exp(0.1 * x) - 1.0) / x + x / (1.0 + jnp.abs(x)) + x / jnp.abs(x) * x


@sound
def an_angle_away_from_its_cut(p, how):
    return jnp.arctan2(normal(p, how), 1.0 + normal_y(p, how) ** 2)
