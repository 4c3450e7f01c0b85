"""Defects that a reviewer found, each with its smallest case."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import expectax as ex
from expectax import dist, inference, vi

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(7)


@ex.model
def coin():
    p = ex.sample("p", dist.Uniform(0.0, 1.0))
    ex.sample("y", dist.Bernoulli(p))


@ex.model
def beta_guide(a):
    ex.sample("p", dist.Beta(jnp.exp(a), 1.0))


def test_a_uniform_latent_meets_a_guide():
    posterior = coin().given({"y": 1})
    cloud = inference.importance(posterior, beta_guide(0.0), key=KEY, num_particles=20_000)
    assert abs(cloud.log_evidence - np.log(0.5)) < 6 * cloud.log_evidence_standard_error
    fit = vi.fit(vi.elbo(posterior, beta_guide), 0.0, optax.adam(0.05), key=KEY, num_steps=300, num_samples=16)
    assert abs(fit.params - np.log(2.0)) < 0.1  # the posterior is Beta(2, 1), the bound's only maximum


def test_known_bounds_are_compared():
    narrow = ex.model(lambda: ex.sample("p", dist.Uniform(0.0, 0.5)))
    wide = ex.model(lambda a: ex.sample("p", dist.Uniform(0.0, 2.0)))
    with pytest.raises(ex.ppl.SupportError, match="does not cover"):
        inference.importance(coin().given({"y": 1}), narrow(), key=KEY, num_particles=10)
    with pytest.raises(ex.ppl.SupportError, match="is not inside"):
        vi.estimate(vi.elbo(coin().given({"y": 1}), wide), 0.0, KEY)
    with pytest.raises(ex.ppl.SupportError, match="takes values in"):
        coin().given({"p": 1.5})


def test_an_impossible_parent_gives_minus_infinity_not_nan():
    @ex.model
    def child():
        ex.sample("y", dist.Normal(0.0, ex.sample("s", dist.HalfNormal(1.0))))

    log_density = jax.jit(child().given({"y": 0.5}).log_density)
    assert log_density({"s": -1.0}) == -jnp.inf
    assert jnp.isfinite(jax.grad(log_density)({"s": jnp.asarray(-1.0)})["s"])


def test_reinforce_refuses_a_support_that_moves():
    @vi.objective
    def cost(t):
        return ex.sample("x", dist.Uniform(0.0, t), gradient=vi.Reinforce()) ** 2

    with pytest.raises(ex.ppl.StrategyError, match="'x' at .*test_reviewed.*depends on its parameters"):
        vi.value_and_grad(cost)(2.0, KEY)


def test_fit_takes_equinox_modules_and_keeps_the_rest():
    @vi.objective
    def cost(p):
        return -jnp.sum((ex.sample("z", dist.Normal(p["net"](jnp.ones(1)), 1.0)) - 2.0 * jnp.ones(p["n"])) ** 2)

    params = {"net": eqx.nn.MLP(1, 1, 4, 1, key=KEY), "n": 1, "name": "z"}
    fit = vi.fit(cost, params, optax.adam(0.05), key=KEY, num_steps=400, num_samples=8)
    assert fit.params["n"] == 1 and fit.params["name"] == "z"
    assert abs(fit.params["net"](jnp.ones(1))[0] - 2.0) < 0.3


def test_fit_refuses_parameters_that_are_no_floats():
    with pytest.raises(TypeError, match="no parameter is a float"):
        vi.fit(vi.objective(lambda p: 1.0 * p), 0, optax.adam(0.1), key=KEY, num_steps=5)


def test_messages():
    with pytest.raises(AttributeError, match=r"not bound to its arguments yet: write model\(...\).given"):
        coin.given({"y": 1})
    with pytest.raises(TypeError, match="must be a bound model"):
        inference.importance(coin().given({"y": 1}), beta_guide, key=KEY, num_particles=10)  # pyright: ignore
    with pytest.raises(TypeError, match="jax.random.key"):
        coin().simulate(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="whole num_particles"):
        inference.importance(coin().given({"y": 1}), key=KEY, num_particles=10.5)  # pyright: ignore
    with pytest.raises(TypeError, match="lacks a return"):
        vi.value_and_grad(vi.objective(lambda p: None))(1.0, KEY)
    with pytest.raises(ex.ppl.ShapeError, match="'y'.*ragged"):
        coin().given({"y": [[1.0], [1.0, 2.0]]})
    with pytest.raises(ex.ppl.AddressError, match="a loop"):
        ex.model(lambda: [ex.sample("x", dist.Normal(0.0, 1.0)) for _ in range(2)])().simulate(KEY)


def test_a_model_made_anew_is_not_taken_for_one_with_other_values(monkeypatch):
    """In a user's own jit, too: the program that JAX keeps was traced with the values of then."""

    def make():
        return ex.model(lambda: ex.sample("x", dist.Normal(0.0, SPREAD)))()

    density = jax.jit(lambda program: program.assess({"x": 0.0})[0])
    for spread in (1.0, 2.0, 1.0):
        monkeypatch.setitem(globals(), "SPREAD", spread)
        np.testing.assert_allclose(density(make()), dist.Normal(0.0, spread).log_prob(0.0), rtol=1e-6)


SPREAD = 1.0


@pytest.mark.parametrize("size", [2, 3])
def test_a_sampler_that_puts_its_sample_axes_last(size):
    """numpyro's TruncatedPolyaGamma draws (2, 3) for three samples of shape (2,): lanes came last, unseen if equal."""

    @ex.model
    def lanes():
        jax.vmap(lambda _: ex.sample("x", Last(jnp.arange(1.0 * size))))(jnp.arange(3))

    np.testing.assert_array_equal(lanes().simulate(KEY)["x"], np.tile(np.arange(size), (3, 1)))


class Last(dist.Distribution):
    """Draws its location, the sample axes behind."""

    pytree_data_fields = ("loc",)
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(batch_shape=loc.shape, event_shape=())

    def sample(self, key, sample_shape=()):
        del key
        return jnp.broadcast_to(
            self.loc.reshape(self.loc.shape + (1,) * len(sample_shape)), self.loc.shape + sample_shape
        )

    def log_prob(self, value):
        return jnp.zeros(jnp.shape(value))


def test_a_saved_trace_has_the_modes_of_other_files(tmp_path):
    coin().simulate(KEY).save(tmp_path / "trace")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "trace").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "trace"]
