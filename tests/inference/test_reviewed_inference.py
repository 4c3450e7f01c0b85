"""What a review of the whole found: latents in branches, replicas in particles, extension, dead filters, one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import expectax as ex
from expectax import dist, inference
from helpers import count_compiles

KEY = jax.random.key(6)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


# --- latents in branches ------------------------------------------------------------------------------------------------


@ex.model
def finite_branches():
    c = ex.sample("c", dist.Bernoulli(0.4))
    z = lax.cond(c == 1, lambda: 1.0 * ex.sample("u", dist.Categorical(probs=jnp.array([0.1, 0.1, 0.8]))), lambda: 0.0)
    ex.sample("y", dist.Normal(z, 1.0))


IN_BRANCHES = {
    "spawn": lambda target: inference.spawn(target, 2),
    "rejuvenate": lambda target: inference.rejuvenate(inference.spawn(target, 1), inference.gibbs("c")),
    "cycle": lambda target: inference.rejuvenate(
        inference.spawn(target, 1), inference.cycle(inference.gibbs("c"), inference.on("u", inference.gibbs()))
    ),
    "tempered": lambda target: (
        inference.tempered(
            target, inference.gibbs("c"), num_particles=1, temperatures=[0.4, 1.0], num_moves=1
        ).particles
    ),
    "annealed": lambda target: (
        inference.annealed_importance(target, inference.gibbs("c"), num_particles=1, temperatures=[0.4, 1.0]).particles
    ),
}


@pytest.mark.parametrize("name", IN_BRANCHES)
def test_particles_with_latents_in_branches(name):
    """Catches: what a particle holds for a latent that is not made taken for a draw."""
    inference.assert_valid(IN_BRANCHES[name], finite_branches().given({"y": 1.5}))


@ex.model
def branches():
    c = ex.sample("c", dist.Bernoulli(0.4))
    z = lax.cond(c == 1, lambda: ex.sample("u", dist.Normal(2.0, 1.0)), lambda: ex.sample("v", dist.HalfNormal(0.5)))
    ex.sample("y", dist.Normal(z, 1.0))


def exact_share() -> float:
    """Return P(c = 1 | y = 1), by quadrature of the half normal."""
    x = np.linspace(0, 6, 200_001)
    half = (
        2
        * np.exp(-0.5 * (x / 0.5) ** 2)
        / (0.5 * np.sqrt(2 * np.pi))
        * np.exp(-0.5 * (1 - x) ** 2)
        / np.sqrt(2 * np.pi)
    )
    one = 0.4 * np.exp(-0.25) / np.sqrt(4 * np.pi)
    return one / (one + 0.6 * np.trapezoid(half, x))


@pytest.mark.parametrize("kernel", [inference.slice(), inference.random_walk()], ids=["slice", "walk"])
def test_a_jump_between_branches_and_kernels_on_the_unconstrained_scale(kernel):
    """Catches: a composition that loses what stands for a latent that is not made (P(c) was off by 0.2)."""
    whole = inference.cycle(inference.gibbs("c"), inference.on(["u", "v"], kernel))
    posterior = branches().given({"y": 1.0})
    chains = inference.mcmc(posterior, whole, key=KEY, num_warmup=300, num_samples=4000)
    row = chains.summary()["c"]
    assert abs(row.mean - exact_share()) < 5 * row.mcse_mean and row.mcse_mean < 0.02


# --- what keeps more than the latents -----------------------------------------------------------------------------------


@ex.model
def pair():
    a = ex.sample("a", dist.Bernoulli(0.3))
    b = ex.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
    ex.sample("y", dist.Normal(1.0 * a + b, 1.0))


def test_replicas_do_not_move_particles():
    replicas = inference.replica_exchange(inference.gibbs(), [1.0, 0.2])
    posterior = pair().given({"y": 0.7})
    with pytest.raises(ex.ppl.ControlFlowError, match="keeps more than the latents"):
        inference.keyed(lambda: inference.rejuvenate(inference.spawn(posterior, 2), replicas))(KEY)
    with pytest.raises(ex.ppl.ControlFlowError, match="keeps more than the latents"):
        inference.tempered(posterior, replicas, key=KEY, num_particles=4, temperatures=[0.5, 1.0])


# --- extension ----------------------------------------------------------------------------------------------------------


@ex.model
def one():
    a = ex.sample("a", dist.Bernoulli(0.4))
    ex.observe("early", dist.Normal(1.0 * a, 1.0), 0.5)


@ex.model
def redrawn(z):
    ex.sample("a", dist.Bernoulli(0.5))
    ex.sample("b", dist.Bernoulli(0.5))


@ex.model
def of_data(z):
    ex.sample("b", dist.Bernoulli(0.5))
    ex.sample("y", dist.Normal(0.0, 1.0))


def test_an_extension_draws_the_new_latents_and_nothing_else():
    def extended(posterior, proposal=None):
        run = lambda: inference.extend(inference.spawn(one().given({}), 2), posterior, proposal=proposal)
        return inference.keyed(run)(KEY)

    with pytest.raises(ex.ppl.AddressError, match="'a' is a latent of the population, but none of the new"):
        extended(pair().given({"y": 0.7, "a": 1}))
    with pytest.raises(ex.ppl.AddressError, match="draws 'a', which is an old latent"):
        extended(pair().given({"y": 0.7}), redrawn)
    with pytest.raises(ex.ppl.AddressError, match="draws 'y', which is no latent"):
        extended(pair().given({"y": 0.7}), of_data)


# --- filters ------------------------------------------------------------------------------------------------------------


@ex.model
def walk(length, narrow=False):
    def step(x, _):
        x = ex.sample("x", dist.Normal(0.8 * x, 0.5))
        return x, ex.sample("y", dist.Uniform(x - 0.5, x + 0.5) if narrow else dist.Normal(x, 0.7))

    lax.scan(step, 0.0, None, length=length)


@ex.model
def of_roots(length):
    def step(x, _):
        x = ex.sample("x", dist.Normal(x, 1.0))
        return x, ex.sample("y", dist.Normal(jnp.sqrt(x), 1.0))

    lax.scan(step, 0.0, None, length=length)


def test_a_dead_filter_says_so():
    posterior = walk(3, True).given({"y": jnp.array([0.0, 50.0, 0.0])})
    with pytest.raises(ex.ppl.NonFiniteError, match="all particles have weight 0 at step 1") as caught:
        inference.particle_filter(posterior, key=KEY, num_particles=50)
    assert isinstance(caught.value.result, inference.Filtered)
    with pytest.raises(ex.ppl.NonFiniteError, match="a weight is nan at step 0"):
        inference.particle_filter(of_roots(2).given({"y": jnp.zeros(2)}), key=KEY, num_particles=50)


def test_one_step_and_none():
    posterior = walk(1).given({"y": jnp.array([0.3])})
    chains = inference.mcmc(posterior, inference.particle_gibbs(20), key=KEY, num_warmup=2, num_samples=2000)
    gain = 0.25 / (0.25 + 0.49)  # a Kalman update of N(0, 0.25)
    row = chains.summary()["x[0]"]
    assert abs(row.mean - gain * 0.3) < 5 * row.mcse_mean
    filtered = inference.particle_filter(posterior, key=KEY, num_particles=50)
    assert inference.smooth(posterior, filtered, key=KEY, num_trajectories=3).choices["x"].shape == (3, 1)
    assert walk(0).simulate(KEY).choices["x"].shape == (0,)


@ex.model
def with_zeros(length):
    moves, colours = (
        jnp.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.2, 0.0, 0.8]]),
        jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]),
    )

    def step(z, _):
        z = ex.sample("z", dist.Categorical(probs=moves[z]))
        ex.sample("y", dist.Categorical(probs=colours[z]))
        return z, None

    lax.scan(step, 0, None, length=length)


@pytest.mark.parametrize("method", ["ffbs", "mcmc"])
def test_smoothing_where_all_may_die(method):
    posterior = with_zeros(3).given({"y": jnp.array([0, 1, 1])})
    run = lambda target: inference.smoothing(target, inference.filtering(target, 2), 1, method=method, num_moves=1)
    inference.assert_valid(run, posterior)


def test_a_fixed_lag_goes_forward_only():
    @ex.model
    def backwards():
        def step(x, _):
            x = ex.sample("x", dist.Normal(x, 1.0))
            return x, ex.sample("y", dist.Normal(x, 1.0))

        lax.scan(step, 0.0, None, length=2, reverse=True)

    filtered = inference.particle_filter(backwards().given({"y": jnp.zeros(2)}), key=KEY, num_particles=10)
    with pytest.raises(ex.ppl.ControlFlowError, match="goes backwards"):
        inference.fixed_lag_mean(filtered, 1)


# --- how it is called ---------------------------------------------------------------------------------------------------


def test_a_program_is_no_posterior():
    for call in (
        lambda: inference.importance(pair(), key=KEY, num_particles=3),  # pyright: ignore[reportArgumentType]
        lambda: inference.mcmc(pair(), inference.gibbs(), key=KEY),  # pyright: ignore[reportArgumentType]
        lambda: inference.particle_filter(walk(2), key=KEY, num_particles=3),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match=r"condition it first, program\.given"):
            call()
    posterior = pair().given({"y": 0.7})
    with pytest.raises(TypeError, match="needs a kernel such as"):
        inference.keyed(lambda: inference.rejuvenate(inference.spawn(posterior, 2), inference.nuts))(KEY)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ex.ppl.ShapeError, match="auxiliary must return one log weight"):
        flow = walk(2).given({"y": jnp.zeros(2)})
        inference.particle_filter(flow, key=KEY, num_particles=3, auxiliary=lambda now: jnp.zeros(2))


def test_a_guide_with_new_parameters_compiles_nothing():
    @ex.model
    def guide(params, now):
        ex.sample("x", dist.Normal(params * now.carry, 0.6))

    posterior = walk(2).given({"y": jnp.array([0.3, 0.1])})

    def both(value):
        proposal = jax.tree_util.Partial(guide, jnp.asarray(value))
        return inference.particle_filter(posterior, key=KEY, num_particles=7, proposal=proposal).log_evidence

    both(0.7)
    with count_compiles() as compiles:
        both(0.6)
    assert not compiles
