"""Every distribution of numpyro as a site, and distributions of users' own and of other libraries.

A case is a function of one parameter in (0, 1); the site must agree with numpyro's own object in shape, dtype and
density, alone, in lanes and in time steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import vi

KEY = jax.random.key(20260811)
PARAMETERS = np.array([0.3, 0.55, 0.8])
pytestmark = pytest.mark.usefixtures("quick_compiles")
NUMBERS = "an object with Python numbers among its leaves cannot be a site: UserDistribution makes them arrays"
Shifted = ex.distribution(  # a scalar event; its parameters are a dict and a number
    lambda key, p, shift: shift + p["scale"] * jax.random.normal(key),
    lambda x, p, shift: jax.scipy.stats.norm.logpdf(x, shift, p["scale"]),
)
OWN = {
    "vector": (lambda a: Exponentials(a), lambda x, a: stats.expon.logpdf(x, scale=1 / a).sum(), (2,)),
    "scalar": (lambda a: Shifted({"scale": a}, 1.5), lambda x, a: stats.norm.logpdf(x, 1.5, a), ()),
    "fixed": (lambda a: Shifted({"scale": 0.5}, a), lambda x, a: stats.norm.logpdf(x, a, 0.5), ()),
}


@pytest.mark.parametrize("name", OWN)
def test_own_distributions(name, x64):
    make, density, event = OWN[name]
    a = jnp.asarray(PARAMETERS)
    trace = one(make, a[0]).simulate(KEY)
    assert trace["x"].shape == event
    np.testing.assert_allclose(trace.log_density, density(trace["x"], a[0]), rtol=1e-10)
    for model in (lanes, steps):
        trace = model(make, a).simulate(KEY)
        assert trace["x"].shape == (3, *event) and len(np.unique(trace["x"])) == trace["x"].size
        expected = sum(density(np.asarray(trace["x"][i]), PARAMETERS[i]) for i in range(3))
        np.testing.assert_allclose([trace.log_density, model(make, a).assess(trace.choices)[0]], expected, rtol=1e-10)
        gradient = jax.grad(lambda a, t=trace, m=model: m(make, a).assess(t.choices)[0])(a)
        total = lambda b, t=trace: sum(density(np.asarray(t["x"][i]), b[i]) for i in range(3))  # noqa: E731
        numeric = [(total(PARAMETERS + s) - total(PARAMETERS - s)) / 2e-6 for s in 1e-6 * np.eye(3)]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


def test_own_support_is_checked_and_left(x64):
    program = one(OWN["vector"][0], jnp.float64(0.7))
    with pytest.raises(ex.ppl.SupportError, match="'x'.*index.*1"):
        program.assess({"x": jnp.array([1.0, -1.0])})
    assert jax.jit(lambda x: program.assess({"x": x})[0])(jnp.array([1.0, -1.0])) == -np.inf
    posterior, x = program.given({}), jnp.array([0.5, 2.0])
    u = posterior.unconstrain({"x": x})
    np.testing.assert_allclose(u["x"], np.log(x), atol=1e-12)
    expected = stats.expon.logpdf(x, scale=1 / 0.7).sum() + np.log(x).sum()
    np.testing.assert_allclose(posterior.unconstrained_log_density(u), expected, rtol=1e-10)


def test_own_log_density_must_be_a_scalar():
    wrong = ex.distribution(lambda key: jnp.zeros(2), lambda x: x)
    with pytest.raises(ex.ppl.DistributionError, match=r"\(2,\).*must return a scalar"):
        ex.model(lambda: ex.sample("x", wrong()))().simulate(KEY)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loc"], meta_fields=[])
@dataclasses.dataclass
class Plain:
    """A class with `sample` and `log_prob`, and nothing of numpyro."""

    loc: Any

    def sample(self, key: Any) -> Any:
        return self.loc + jax.random.normal(key, (2,))

    def log_prob(self, value: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(value, self.loc).sum()


class Module(eqx.Module):
    """The same as an equinox Module, with a Python number, a function and a flag among its fields."""

    loc: Any
    squash: Callable[[Any], Any]
    width: int
    flag: bool = eqx.field(static=True, default=True)

    def sample(self, key: Any) -> Any:
        return self.squash(self.loc) + jax.random.normal(key, (self.width,))

    def log_prob(self, value: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(value, self.squash(self.loc)).sum()


MODULE = pytest.param(lambda a: Module(a, jnp.tanh, 2), np.tanh)


@pytest.mark.parametrize("make, centre", [(Plain, lambda a: a), MODULE])
@pytest.mark.parametrize("model", [lanes, steps])
def test_objects_with_sample_and_log_prob(make, centre, model, x64):
    a = jnp.asarray(PARAMETERS)
    trace = model(make, a).simulate(KEY)
    assert trace["x"].shape == (3, 2) and len(np.unique(trace["x"])) == 6
    expected = stats.norm.logpdf(trace["x"], centre(PARAMETERS)[:, None]).sum()
    np.testing.assert_allclose([trace.log_density, model(make, a).assess(trace.choices)[0]], expected, rtol=1e-10)


def test_a_flow_is_a_site_and_a_guide(x64):
    flows = pytest.importorskip("flowjax.flows")
    base = pytest.importorskip("flowjax.distributions").Normal(jnp.zeros(2))
    flow = flows.masked_autoregressive_flow(KEY, base_dist=base, flow_layers=2, nn_width=4, nn_depth=1)
    arrays, rest = eqx.partition(flow, eqx.is_inexact_array)
    site = ex.model(lambda arrays: ex.sample("x", eqx.combine(arrays, rest)))
    in_steps = ex.model(lambda: lax.scan(lambda c, _: (c, ex.sample("x", flow)), None, None, length=3)[1])
    in_lanes = ex.model(lambda: jax.vmap(lambda _: ex.sample("x", flow))(jnp.arange(3)))
    for program in (site(arrays), ex.model(lambda flow: ex.sample("x", flow))(flow), in_steps(), in_lanes()):
        trace = program.simulate(KEY)
        density = jnp.sum(flow.log_prob(trace["x"]))
        np.testing.assert_allclose([trace.log_density, program.assess(trace.choices)[0]], density, rtol=1e-10)

    @vi.objective
    def bound(arrays):
        z, log_q = vi.simulate(site(arrays))
        return log_q - jnp.sum(eqx.combine(arrays, rest).log_prob(z["x"]))

    value, gradient = vi.value_and_grad(bound)(arrays, KEY)
    np.testing.assert_allclose(value, 0.0, atol=1e-10)  # log q is flowjax's own
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
