"""What `chains.diagnose()` says of chains with one problem each, made by hand, and of a funnel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, inference, ppl
from expectax.inference._chains import Last
from expectax.inference._diagnose import divergent_region
from expectax.inference._run import Way

KEY = jax.random.key(20261127)
RNG = np.random.default_rng(20261127)
SHAPE = (4, 1000)
pytestmark = pytest.mark.usefixtures("quick_compiles")


@ppl.model
def unused():
    ppl.sample("x", dist.Normal(0.0, 1.0))


def chains(choices: Any = None, kernel: Any = None, thinning: int = 1, **statistics: Any) -> inference.Chains:
    """Return chains without a problem, but for what is given."""
    given: dict[str, Any] = {
        "divergent": np.zeros(SHAPE, bool),
        "acceptance_rate": np.full(SHAPE, 0.8),
        "num_integration_steps": np.full(SHAPE, 7),
        "energy": RNG.normal(size=SHAPE),
        "log_density": RNG.normal(size=SHAPE),
    }
    keys = jax.random.split(KEY, 4)
    state = inference.State(jnp.zeros((4, 1)), jnp.zeros(4))
    run = unused().given({}), kernel or inference.nuts(max_tree_depth=5), {}
    last = Last.of(run, Way(thinning), keys, state)
    choices = {"x": RNG.normal(size=(*SHAPE, 2)), "k": RNG.integers(0, 2, SHAPE)} if choices is None else choices
    return inference.Chains(choices, given | statistics, (), {}, last)


def autoregressive(slope: float) -> np.ndarray:
    x = RNG.normal(size=SHAPE)
    for t in range(1, SHAPE[1]):
        x[:, t] = slope * x[:, t - 1] + (1 - slope**2) ** 0.5 * x[:, t]
    return x


def slow_scale() -> np.ndarray:
    """Draws whose signs are independent and whose scale is a slow chain: the centre mixes and the tails do not."""
    return RNG.normal(size=SHAPE) * np.exp(2 * autoregressive(0.995))


def test_no_problem():
    found = chains().diagnose()
    assert found == [] and str(found) == repr(found) == "no problem found"


def test_chains_that_disagree():
    draws = RNG.normal(size=(*SHAPE, 3))
    draws[2, :, 1] += 1.0
    found = chains({"theta": draws}).diagnose()
    assert len(found) > 1 and str(found).count("\n") == len(found) - 1
    assert "R-hat is above 1.01 for 1 of 3 numbers, worst theta[1] (1." in found[0]
    assert "bulk effective sample size is below 400" in found[1]


@pytest.mark.parametrize(("kind", "draws"), [("bulk", autoregressive(0.97)), ("tail", slow_scale())])
def test_few_effective_draws(kind, draws):
    found = chains({"a": draws, "b": RNG.normal(size=SHAPE)}).diagnose()
    (problem,) = (p for p in found if kind in p)
    assert f"the {kind} effective sample size is below 400 (100 a chain) for 1 of 2 numbers, worst a (" in problem
    assert kind == "bulk" or not any("bulk" in p for p in found)


def test_few_draws_and_numbers_that_never_move():
    three = chains({"x": RNG.normal(size=(4, 3))}, **{n: v[:, :3] for n, v in chains().statistics.items()})
    assert "only 3 draws a chain" in three.diagnose()[0]
    found = chains({"x": RNG.normal(size=SHAPE), "still": np.ones(SHAPE)}).diagnose()
    assert len(found) == 1 and "number still never moved" in found[0]


def test_stuck_chains():
    acceptance = np.full(SHAPE, 0.8)
    acceptance[[1, 3]] = 1e-5
    found = chains(acceptance_rate=acceptance).diagnose()
    assert len(found) == 1 and found[0].startswith("chains 1, 3 hardly moved (mean acceptance 1.0e-05)")
    acceptance[1] = np.nan
    assert chains(acceptance_rate=acceptance).diagnose()[0].startswith("chains 1, 3 hardly moved")


def test_trees_that_are_cut_off():
    steps = np.full(SHAPE, 15)
    steps[0, :7] = 31  # 2**5 - 1
    found = chains(num_integration_steps=steps).diagnose()
    assert len(found) == 1 and found[0].startswith("7 of 4000 trees reached max_tree_depth=5")
    for kernel, thinning in ((inference.nuts(max_tree_depth=5), 3), (inference.hmc(num_integration_steps=31), 1)):
        assert chains(num_integration_steps=steps, kernel=kernel, thinning=thinning).diagnose() == []


def test_slow_energy():
    """Of a first-order autoregression the fraction is 2 (1 - slope): 0.2 here."""
    energy = RNG.normal(size=SHAPE)
    energy[2] = autoregressive(0.9)[2]
    found = chains(energy=energy).diagnose()
    assert len(found) == 1 and "below 0.3 in chain 2 (least 0." in found[0]
    assert chains(energy=np.full(SHAPE, np.nan), kernel=inference.pseudo_marginal()).diagnose() == []


def test_divergences_are_named_with_where_they_start():
    """The transition after a draw with a small tau diverges, ten times of a hundred elsewhere."""
    tau, theta = np.exp(3 * RNG.normal(size=SHAPE)), RNG.normal(size=(*SHAPE, 30))
    divergent = np.zeros(SHAPE, bool)
    divergent[:, 1:] = tau[:, :-1] < np.exp(-6.5)
    many = chains({"tau": tau, "theta": theta}, divergent=divergent)
    (name, difference), *others = divergent_region(many)
    assert (name, others) == ("tau", []) and difference < -2
    (sentence,) = many.diagnose()
    assert sentence.startswith(f"{divergent.sum()} of 4000 transitions diverged")
    assert "divergences gather at small tau: raise" in sentence

    divergent[:, 1:] = theta[:, :-1, 4] > 2.2
    assert "divergences gather at large theta[4]:" in str(
        chains({"tau": tau, "theta": theta}, divergent=divergent).diagnose()
    )

    for share in (0.001, 0.05, 1.0):  # anywhere, few or many or all
        anywhere = RNG.random(SHAPE) < share
        found = chains({"tau": tau, "theta": theta}, divergent=anywhere).diagnose()
        assert len(found) == 1 and "gather" not in found[0]


@ppl.model
def schools(sigma):
    """Eight schools (Rubin 1981), centred: the effects' scale tau is hard to make small."""
    mu = ppl.sample("mu", dist.Normal(0.0, 5.0))
    tau = ppl.sample("tau", dist.HalfCauchy(5.0))
    theta = ppl.sample("theta", dist.Normal(mu, tau).expand([8]))
    ppl.sample("y", dist.Normal(theta, sigma))


@pytest.mark.filterwarnings("ignore:mcmc.*diverged")
def test_the_neck_of_a_funnel():
    sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18], np.float32)
    posterior = schools(sigma).given({"y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12], np.float32)})
    found = inference.mcmc(posterior, inference.hmc(), key=KEY, num_warmup=500, num_samples=1000).diagnose()
    assert any("divergences gather at small tau" in problem for problem in found), str(found)


def test_draws_that_are_not_kept():
    """What the statistics tell is told all the same."""
    x = unused().given({})
    run = inference.mcmc(x, inference.hmc(), key=KEY, num_warmup=100, num_samples=200, keep_draws=False)
    assert run.diagnose() == []
    divergent = np.asarray(run.statistics["divergent"]).copy()
    divergent[0, 5] = True
    changed = inference.Chains({}, dict(run.statistics, divergent=divergent), run.parameters, {}, run.last)
    assert changed.diagnose()[0].startswith("1 of 800 transitions diverged")


def test_many_runs_at_once_are_refused():
    with pytest.raises(ValueError, match="one run of mcmc"):
        inference.diagnose(inference.Chains({}, {"divergent": jnp.zeros((2, 4, 100), bool)}))
