"""Kernels at continuous and mixed targets: the exact rank test, on right kernels and on wrong ones.

Right ones are tested in two stages with a false-alarm rate of 1e-6; wrong ones must fall below 1e-6 at the first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wrong_kernels as wrong
from scipy import stats

from expectax import dist, inference, ppl
from helpers import two_stage

KEY = jax.random.key(20261125)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


# --- targets ----------------------------------------------------------------------------------------------------------


@ppl.model
def regression():
    """A support that is unbounded, and one that is not, so that a Jacobian counts; a skew posterior."""
    mu = ppl.sample("mu", dist.Normal(0.5, 1.0))
    tau = ppl.sample("tau", dist.Gamma(3.0, 2.0))
    ppl.sample("y", dist.Normal(jnp.array([1.0, 2.0]) * mu, tau))


@ppl.model
def smooth():
    """A target of about one scale everywhere, on which long steps go wrong by a little instead of far away."""
    mu = ppl.sample("mu", dist.Normal(0.5, 1.0))
    tau = ppl.sample("tau", dist.Gamma(5.0, 2.0))
    ppl.sample("y", dist.Normal(mu + jnp.log(tau), 1.5))


@ppl.model
def gaussian():
    """Latents with Gaussian priors of every form, with means that are not 0."""
    mu = ppl.sample("mu", dist.Normal(0.5, 1.0))
    f = ppl.sample("f", dist.MultivariateNormal(jnp.array([1.0, -1.0]), jnp.array([[1.0, 0.6], [0.6, 2.0]])))
    g = jax.vmap(lambda m: ppl.sample("g", dist.Normal(m, 0.5)))(jnp.arange(2.0))
    h = ppl.sample("h", dist.Normal(jnp.array([0.0, 3.0]), 1.5).to_event(1))
    ppl.sample("y", dist.Normal(mu + f[0] * g[0] + f[1] + g[1] + jnp.abs(h).sum(), 0.7))


@ppl.model
def mixed():
    """A label that decides on the scale of a number, and its mean."""
    label = ppl.sample("label", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
    x = ppl.sample("x", dist.Normal(1.0 * label, jnp.array([0.3, 1.0, 2.0])[label]))
    ppl.sample("y", dist.Normal(x, 1.0))


@ppl.model
def one_or_two():
    """One mean for both data or one each: the second number is padding where there is one mean."""
    both = ppl.sample("both", dist.Bernoulli(0.4))
    first = ppl.sample("first", dist.Normal(0.0, 2.0))
    second = ppl.sample("second", dist.Normal(0.0, 2.0))
    ppl.sample("y", dist.Normal(jnp.stack([first, jnp.where(both == 1, second, first)]), 0.8))


# --- proposals --------------------------------------------------------------------------------------------------------


@ppl.model
def next_tau(z):
    ppl.sample("tau", dist.LogNormal(jnp.log(z["tau"]) + 0.1, 0.8))


@ppl.model
def factor(z):
    ppl.sample("by", dist.LogNormal(0.2 * jnp.sign(z["mu"]), 0.7))


def stretch(z, u):
    return {"mu": z["mu"] / u["by"], "tau": z["tau"] * u["by"] ** 2}, {"by": 1 / u["by"]}


@ppl.model
def split_noise(z):
    ppl.sample("gap", dist.Normal(0.0, 1.0))


def split_or_merge(z, u):
    """Split the mean into two, or merge two: (m, padding, gap) <-> (m + gap, m - gap, padding), of Jacobian 2."""
    m, padding, gap = z["first"], z["second"], u["gap"]
    one = z["both"] == 0
    first = jnp.where(one, m + gap, (m + padding) / 2)
    second = jnp.where(one, m - gap, gap)
    rest = jnp.where(one, padding, (m - padding) / 2)
    return {"both": 1 - z["both"], "first": first, "second": second}, {"gap": rest}


# --- kernels ----------------------------------------------------------------------------------------------------------


def tuned(step_size: float, *inverse_mass: float) -> dict[str, Any]:
    return {"step_size": jnp.asarray(step_size), "inverse_mass_matrix": jnp.array(inverse_mass)}


def stacked(*parameters: Any) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parameters)


I = inference  # noqa: E741
NUTS_ON_X = I.on("x", I.nuts(max_tree_depth=3))
KERNELS = {  # (kernel, parameters, program, reversible), at an acceptance of 0.3 to 0.9
    "hmc": (I.hmc(num_integration_steps=3), tuned(0.6, 1.0, 0.5), smooth, True),
    "nuts": (I.nuts(max_tree_depth=3), tuned(0.7, 1.0, 0.5), smooth, True),
    "mala": (I.mala(), tuned(0.25, 3.0, 0.25), smooth, True),
    "barker": (I.barker(), tuned(1.2, 3.0, 0.25), smooth, True),
    "random walk": (I.random_walk(), tuned(0.8, 1.0, 0.3), regression, True),
    "slice": (I.slice(max_expansions=3), {"width": jnp.array([0.6, 1.0])}, regression, True),
    "elliptical slice": (I.elliptical_slice(), (), gaussian, True),
    "elliptical slice on one": (I.elliptical_slice("mu"), (), regression, True),
    "mh": (I.mh(next_tau), (), regression, True),
    "involutive": (I.involutive(factor, stretch), (), regression, True),
    "reversible jump": (I.involutive(split_noise, split_or_merge), (), one_or_two, True),
    "mixture": (I.mixture(NUTS_ON_X, I.gibbs("label")), (tuned(0.6, 1.0), ()), mixed, True),
    "cycle": (I.cycle(NUTS_ON_X, I.gibbs("label")), (tuned(0.6, 1.0), ()), mixed, False),
    "repeat": (I.repeat(I.random_walk(), 2), tuned(0.8, 1.0, 0.3), regression, True),
    "replica exchange": (
        I.replica_exchange(I.random_walk(), [1.0, 0.0]),
        stacked(tuned(0.8, 1.0, 0.3), tuned(1.2, 1.0, 0.5)),
        regression,
        False,
    ),
}


SLOW = ("nuts", "mixture", "repeat", "elliptical slice on one")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.by_hand) if n in SLOW else n for n in KERNELS])
def test_kernels_leave_posteriors_invariant(name):
    kernel, parameters, program, reversible = KERNELS[name]

    def p_value(key, n):
        check = inference.check_kernel(
            kernel, program(), "y", key=key, parameters=parameters, num_chains=n, reversible=reversible
        )
        slices = "slice" in name
        assert slices or 0.25 < check.acceptance_rate < 0.95, check
        assert not slices or check.acceptance_rate > 0.99, check
        return check.p_value

    two_stage(p_value, KEY, 8000 if name in ("hmc", "mala", "barker", "random walk") else 2000)


WRONG = {
    "HMC without kinetic energy": (wrong.hamiltonian(0.35, kinetic=0.0), smooth),
    "HMC with half the kinetic energy": (wrong.hamiltonian(0.35, kinetic=0.5), smooth),
    "HMC with a momentum too long": (wrong.hamiltonian(0.35, momentum=1.3), smooth),
    "HMC without the last half step": (wrong.hamiltonian(0.6, last_half=False), smooth),
    "MALA without its correction": (wrong.langevin(0.25, corrected=False), regression),
    "MALA that accepts all": (wrong.langevin(0.15, accepts=False), regression),
    "state-dependent step without its correction": (
        wrong.random_walk(lambda x: jnp.exp(jnp.tanh(x[0])), corrected=False),
        regression,
    ),
    "no Jacobian of the space": (wrong.in_the_wrong_space(0.8), regression),
    "no Hastings term": (wrong.without_hastings(next_tau), regression),
    "always accept": (wrong.always_accept(next_tau), regression),
    "no Jacobian of the involution": (wrong.involutive_without_jacobian(factor, stretch), regression),
    "no Jacobian of the jump": (wrong.involutive_without_jacobian(split_noise, split_or_merge), one_or_two),
    "Gibbs without the prior": (wrong.gibbs_without_the_likelihood("label", 3), mixed),
    "mode instead of draw": (wrong.mode_instead_of_draw("label", 3), mixed),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(name):
    kernel, program = WRONG[name]
    check = inference.check_kernel(kernel, program(), "y", key=KEY)
    assert check.p_value < 1e-6, check


@pytest.mark.by_hand
def test_our_own_leapfrog_is_right_when_nothing_is_wrong():
    """So that the wrong ones above are caught for what is wrong with them."""
    scaled = wrong.random_walk(lambda x: jnp.exp(jnp.tanh(x[0])), corrected=True)
    for kernel, program in (
        (wrong.hamiltonian(0.35), smooth()),
        (wrong.langevin(0.25), regression()),
        (scaled, regression()),
    ):
        run = functools.partial(inference.check_kernel, kernel, program, "y")
        two_stage(lambda key, n, run=run: run(key=key, num_chains=n).p_value, KEY, 2000)


def test_the_two_sample_form_catches_too():
    for name in ("always accept", "MALA that accepts all", "no Jacobian of the space"):
        kernel, program = WRONG[name]
        check = inference.check_kernel(kernel, program(), "y", key=KEY, reversible=False)
        assert check.p_value < 1e-6, (name, check)


def test_p_values_are_uniform_under_the_null():
    """Of an exact kernel (fresh prior draws), also where most values are tied: no test is too bold or too shy."""
    coin = ppl.model(lambda: ppl.sample("z", dist.Categorical(probs=jnp.array([0.7, 0.2, 0.1]))))()
    own = lambda z, y: {"z": z["z"]}  # noqa: E731
    checks = [
        inference.check_kernel(inference.gibbs(), coin, (), key=key, num_chains=500, statistics=own)
        for key in jax.random.split(KEY, 40)
    ]
    found = [c.p_values["z"] for c in checks]
    assert stats.kstest(found, "uniform").pvalue > 1e-6 and np.std(found) > 0.2
    assert abs(checks[0].acceptance_rate - 1.0) < 1e-5 and set(checks[0].p_values) == {"z", "log joint"}
    assert checks[0].p_value == min(1.0, 2 * min(checks[0].p_values.values()))


def test_a_kernel_that_goes_to_nan_is_caught():
    lost = wrong.Flat(lambda key, flat, x: (x / 0.0 * 0.0, 1.0))
    for reversible in (True, False):
        check = inference.check_kernel(lost, smooth(), "y", key=KEY, num_chains=100, reversible=reversible)
        assert check.p_value == 0.0


def test_a_statistic_that_is_nan_is_refused():
    for reversible in (True, False):
        with pytest.raises(ppl.NonFiniteError, match="'root' is nan"):
            inference.check_kernel(
                inference.random_walk(),
                smooth(),
                "y",
                key=KEY,
                num_chains=100,
                statistics=lambda z, y: {"root": jnp.sqrt(z["mu"])},
                reversible=reversible,
            )
