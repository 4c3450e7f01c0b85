"""The verbs and what is made of them, by enumeration of all their random choices: properly weighted to 1e-10."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finite import Flip, hidden, hidden_posterior, in_time
from jax import lax

import expectax as ex
from expectax import dist, inference

KEY = jax.random.key(12)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
METHODS = ("systematic", "stratified", "multinomial")


# --- in time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", in_time())
@pytest.mark.parametrize("method", METHODS)
def test_a_bootstrap_filter(method, model):
    """Catches: an ancestor's state or past not taken along, an increment of the evidence lost, time the wrong way."""
    inference.assert_valid(lambda target: inference.smc(target, 2, method=method), in_time()[model])


@pytest.mark.parametrize("threshold", [0.0, 0.75])
def test_a_filter_that_resamples_where_it_is_needed(threshold):
    """At 0.75 some runs resample and some do not. Catches: weights not kept, or kept and put in the offset too."""
    inference.assert_valid(lambda target: inference.smc(target, 2, threshold=threshold), hidden_posterior(3))
    inference.assert_valid(lambda target: inference.smc(target, 3, threshold=threshold), hidden_posterior(2))


@ex.model
def looking_ahead(now):
    """A step's bit, likely to be the one before."""
    ex.sample("z", dist.Bernoulli(jnp.where(now.carry == 1, 0.6, 0.25)))


def test_a_guided_filter():
    """Catches: the proposal's density forgotten, or the model's."""
    run = lambda target: inference.smc(target, 2, proposal=looking_ahead)  # noqa: E731
    inference.assert_valid(run, hidden_posterior(2))


@pytest.mark.parametrize("method", METHODS)
def test_the_verbs_and_the_filter_are_one_algorithm(method):
    """The exact laws of the evidence are the same. Catches: a loop of steps that is another algorithm, also a valid one."""
    posterior = hidden_posterior(2)

    def law(run):
        measure = inference.exact(run)
        values, index = np.unique(np.round(np.asarray(measure.values), 10), return_inverse=True)
        return values, np.bincount(index, np.asarray(measure.probabilities))

    verbs = law(lambda: inference.smc(posterior, 2, method=method, proposal=looking_ahead).log_evidence)
    scanned = law(
        lambda: (
            inference.filtering(
                posterior, 2, method=method, ess_threshold=1.0, proposal=looking_ahead, store="evidence"
            ).log_evidence
        )
    )
    np.testing.assert_allclose(verbs, scanned, atol=1e-10)


def test_resample_move():
    """Catches: the state after a move still that before it, a move of another target than the first t steps'."""
    inference.assert_valid(lambda target: inference.rmsmc(target, 2, Flip()), hidden_posterior(2))
    inference.assert_valid(lambda target: inference.rmsmc(target, 1, Flip(), num_moves=2), hidden_posterior(3))


@pytest.mark.parametrize("model", in_time())
def test_the_last_of_the_first_steps_is_the_whole(model):
    """Catches: a prefix that leaves out a site, an input, or an observation, or runs them in another order."""
    whole = in_time()[model]

    def run():
        cloud = inference.advance(inference.advance(inference.spawn(whole, 3, time=0)))
        z = jax.tree.map(lambda x: x[1], cloud.latents)
        return cloud.target.log_density_inside(z), whole.log_density_inside(z)

    own, all_of_it = inference.keyed(run)(KEY)
    np.testing.assert_allclose(own, all_of_it, rtol=1e-12)


def test_the_first_steps_are_those_of_a_shorter_model():
    whole, short = hidden_posterior(3), hidden_posterior(1)

    def run():
        cloud = inference.advance(inference.spawn(whole, 2, time=0))
        z = jax.tree.map(lambda x: x[0], cloud.latents)
        return cloud.target.log_density_inside(z), short.log_density_inside(z), z["z"].shape

    own, other, shape = inference.keyed(run)(KEY)
    np.testing.assert_allclose(own, other, rtol=1e-12)
    assert shape == (1,)


# --- whole posteriors ---------------------------------------------------------------------------------------------------


@ex.model
def pair(weight):
    a = ex.sample("a", dist.Bernoulli(0.3))
    b = ex.sample(
        "b", dist.Categorical(probs=jnp.where(a == 1, jnp.array([0.2, 0.3, 0.5]), jnp.array([0.6, 0.3, 0.1])))
    )
    ex.sample("y", dist.Normal(weight * (a + b), 1.0))


@ex.model
def flat():
    ex.sample("a", dist.Bernoulli(0.5))
    ex.sample("b", dist.Categorical(probs=jnp.array([0.3, 0.3, 0.4])))


@ex.model
def only_a():
    a = ex.sample("a", dist.Bernoulli(0.3))
    ex.observe("early", dist.Normal(1.0 * a, 1.0), 0.7)


@ex.model
def new_b(latents):
    ex.sample(
        "b",
        dist.Categorical(probs=jnp.where(latents["a"] == 1, jnp.array([0.1, 0.1, 0.8]), jnp.array([0.4, 0.4, 0.2]))),
    )


def pair_posterior(weight: float = 1.0) -> ex.Posterior:
    return pair(weight).given({"y": 1.4})


PIPELINES: dict[str, Any] = {
    "prior": lambda target: inference.spawn(target, 2),
    "proposal": lambda target: inference.spawn(target, 2, proposal=flat()),
    "resampled": lambda target: inference.resample(inference.spawn(target, 2)),
    "reweighted": lambda target: inference.reweight(
        inference.resample(inference.spawn(pair_posterior(0.2), 2)), target
    ),
    "extended": lambda target: inference.extend(inference.resample(inference.spawn(only_a().given({}), 2)), target),
    "extended by a proposal": lambda target: inference.extend(
        inference.spawn(only_a().given({}), 2), target, proposal=new_b
    ),
    "moved": lambda target: inference.rejuvenate(inference.resample(inference.spawn(target, 2)), Shift(), num_steps=1),
}


class Shift(Flip):
    """Metropolis on `b`: one value on, or one back."""

    def step(self, target: Any, state: Any, parameters: Any) -> Any:
        del parameters
        by = 1 + ex.sample("by", dist.Bernoulli(0.5))
        proposed = self.init(target, state.position | {"b": (state.position["b"] + by) % 3})
        accept = jnp.exp(jnp.minimum(proposed.log_density - state.log_density, 0.0))
        yes = ex.sample("accept", dist.Bernoulli(accept)) == 1
        return jax.tree.map(lambda a, b: jnp.where(yes, a, b), proposed, state), inference.Info(accept)


@pytest.mark.parametrize("name", PIPELINES)
def test_each_verb_keeps_the_law(name):
    """Catches: in `extend` and `reweight` the old density not divided out, the proposal's density forgotten."""
    inference.assert_valid(PIPELINES[name], pair_posterior())


WRONG: dict[str, Any] = {
    "no weights": lambda target: unweighted(inference.spawn(target, 2, proposal=flat())),
    "weights kept after resampling": lambda target: kept(inference.spawn(target, 2)),
    "one observation less": lambda target: inference.spawn(pair_posterior(0.9), 2),
    "resampled twice as likely": lambda target: tilted(inference.spawn(target, 2)),
}


def unweighted(cloud: Any) -> Any:
    return inference.Particles(cloud.latents, jnp.zeros_like(cloud.log_weights), cloud.log_evidence)


def kept(cloud: Any) -> Any:
    return inference.Particles(inference.resample(cloud).latents, cloud.log_weights, cloud.log_offset)


def tilted(cloud: Any) -> Any:
    index = ex.sample("ancestors", inference.Ancestors(2.0 * cloud.log_weights))
    latents = jax.tree.map(lambda x: x[index], cloud.latents)
    return inference.Particles(latents, jnp.zeros_like(cloud.log_weights), cloud.log_evidence)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name):
    with pytest.raises(AssertionError, match="not properly weighted"):
        inference.assert_valid(WRONG[name], pair_posterior())


# --- parameters ---------------------------------------------------------------------------------------------------------


@ex.model
def stays(p):
    ex.sample("stay", dist.Bernoulli(p))


def hidden_at(theta: Any) -> ex.Posterior:
    return hidden(0.6 + 0.3 * theta["stay"], 2).given({"y": jnp.array([0.3, 1.2])})


@ex.model
def without_the_start(stay, length):
    def step(z, _):
        z = ex.sample("z", dist.Bernoulli(jnp.where(z == 1, stay, 1.0 - stay)))
        return z, ex.sample("y", dist.Normal(1.0 * z, 1.0))

    lax.scan(step, jnp.asarray(1), None, length=length)


def short_at(theta: Any) -> ex.Posterior:
    return without_the_start(0.6 + 0.3 * theta["stay"], 2).given({"y": jnp.array([0.3, 1.2])})


def other_side(theta: Any) -> ex.Program:
    return stays(jnp.where(theta["stay"] == 1, 0.4, 0.7))


def evidence_of(model: Any, stay: int) -> float:
    """Enumerate the hidden bits."""
    target = model({"stay": jnp.asarray(stay)})
    values = inference._valid.joint_values(target, "test")
    return float(np.exp(np.asarray(jax.vmap(target.log_density)(values))).sum())


@pytest.mark.parametrize("outer, inner", [(2, 1), (1, 2)])
def test_smc_squared(outer, inner):
    """Catches: an inner filter that is not the parameter's own after resampling, or one of another length in PMMH."""
    prior = stays(0.35)

    def masses():
        cloud = inference.smc2(prior, short_at, outer, inner, other_side)
        weights = jnp.exp(cloud.log_weights + cloud.log_offset) / outer
        return jnp.stack([jnp.sum(jnp.where(cloud.latents["stay"] == stay, weights, 0.0)) for stay in (0, 1)])

    found = inference.exact(masses).expectation()
    expected = [p * evidence_of(short_at, stay) for stay, p in ((0, 0.65), (1, 0.35))]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_particle_marginal_metropolis_hastings():
    """Weighed by its first estimate, the chain's law is p(theta, y) after any step: the extended target is invariant.

    Catches: the estimate of the present parameters made anew, the prior or the proposal left out of the ratio.
    """
    prior, run = stays(0.35), lambda theta: inference.smc(short_at(theta), 2)

    def masses():
        theta = prior.rebind().choices
        own = run(theta)
        after, _ = inference._compositions.marginal_move(prior, other_side, run, (theta, own))
        weight = jnp.exp(own.log_evidence)
        return jnp.stack([jnp.where(after["stay"] == stay, weight, 0.0) for stay in (0, 1)])

    found = inference.exact(masses).expectation()
    expected = [p * evidence_of(short_at, stay) for stay, p in ((0, 0.65), (1, 0.35))]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_chain_of_parameters_comes_from_the_posterior():
    """The long-run mean of PMMH, within 5 standard errors by batch means."""
    run = inference.keyed(lambda: inference.pmmh(stays(0.35), hidden_at, 3, other_side, num_steps=4000)["stay"])
    chains = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 8)))[:, 100:]
    z = np.array([p * evidence_of(hidden_at, stay) for stay, p in ((0, 0.65), (1, 0.35))])
    means = chains.reshape(8 * 13, 300).mean(1)
    assert abs(means.mean() - z[1] / z.sum()) < 5 * means.std(ddof=1) / np.sqrt(len(means))


# --- refusals -----------------------------------------------------------------------------------------------------------


def run(function: Any) -> Any:
    return inference.keyed(function)(KEY)


def test_refusals():
    target, cloud = hidden_posterior(), lambda: inference.spawn(hidden_posterior(), 2, time=0)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="whole num_particles >= 1"):
            run(lambda bad=bad: inference.spawn(target, bad))
    with pytest.raises(ValueError, match="time=0 or None"):
        run(lambda: inference.spawn(target, 2, time=1))
    with pytest.raises(ValueError, match="needs a population in time"):
        run(lambda: inference.advance(inference.spawn(target, 2)))
    with pytest.raises(ValueError, match="all 2 steps of the scan have been done"):
        run(lambda: inference.advance(inference.advance(inference.advance(cloud()))))
    with pytest.raises(ValueError, match="of a whole posterior, not one in time"):
        run(lambda: inference.reweight(cloud(), target))
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\]"):
        run(lambda: inference.resample(cloud(), threshold=2.0))
    with pytest.raises(ex.ppl.ControlFlowError, match="exactly one lax.scan"):
        run(lambda: inference.spawn(pair_posterior(), 2, time=0))
    with pytest.raises(ex.ppl.AddressError, match="proposal has the sites stay, but the latents of a step are z"):
        run(lambda: inference.advance(cloud(), proposal=lambda now: stays(0.5)))
    with pytest.raises(ex.ppl.ShapeError, match="'y' are given in part"):
        part = hidden(0.8, 2).given({"y": ex.masked(jnp.array([0.3, jnp.nan]))})
        run(lambda: inference.spawn(part, 2, time=0))
    with pytest.raises(TypeError, match="must return Particles or a Population"):
        inference.assert_valid(lambda target: 1.0, pair_posterior())
