"""Kernels in `mcmc`: means against exact answers, warm-ups that reach their acceptance, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from expectax import dist, inference, ppl
from helpers import count_compiles, two_stage_z

KEY = jax.random.key(20261126)
pytestmark = [pytest.mark.usefixtures("quick_compiles"), pytest.mark.slow]


# --- a mixture, end to end --------------------------------------------------------------------------------------------

DATA = np.array([-1.3, -0.4, 0.2, 1.9, 2.4], np.float32)


@ppl.model
def mixture():
    """Two clusters with means that are unknown, and one weight; the labels are left in."""
    weight = ppl.sample("weight", dist.Beta(2.0, 3.0))
    means = ppl.sample("means", dist.Normal(jnp.array([-1.0, 2.0]), 1.0))

    def point(_):
        label = ppl.sample("label", dist.Bernoulli(weight))
        ppl.sample("y", dist.Normal(means[label], 0.8))

    jax.vmap(point)(jnp.arange(len(DATA)))


def exact_mixture() -> dict[str, Any]:
    """Sum over all labels, each with its conjugate posterior."""
    total: dict[str, Any] = {"weight": 0.0, "means": 0.0, "label": 0.0}
    normal, prior, labels = 0.0, np.array([-1.0, 2.0]), np.array(list(np.ndindex(*(2,) * len(DATA))))
    for z in labels:
        log_weight = special.betaln(2 + z.sum(), 3 + (1 - z).sum()) - special.betaln(2, 3)
        means = np.zeros(2)
        for k in range(2):
            y = DATA[z == k].astype(float)
            spread = 0.64 * np.eye(len(y)) + np.ones((len(y), len(y)))
            if len(y):
                log_weight += stats.multivariate_normal(np.full(len(y), prior[k]), spread).logpdf(y)
            means[k] = (prior[k] + y.sum() / 0.64) / (1 + len(y) / 0.64)
        weight = np.exp(log_weight)
        own = {"weight": (2 + z.sum()) / (5 + len(DATA)), "means": means, "label": z}
        total = {name: total[name] + weight * own[name] for name in total}
        normal += weight
    return {name: value / normal for name, value in total.items()}


COMPOSED = {
    "cycle": lambda: inference.cycle(inference.gibbs("label"), inference.on(["weight", "means"], inference.nuts())),
    "elliptical": lambda: inference.cycle(
        inference.gibbs("label"), inference.elliptical_slice("means"), inference.on("weight", inference.slice())
    ),
    "mixture": lambda: inference.repeat(
        inference.mixture(
            inference.gibbs("label", jointly=True),
            inference.on(["weight", "means"], inference.mala()),
            weights=[0.3, 0.7],
        ),
        5,
    ),
}


SLOW = pytest.mark.by_hand


@pytest.mark.parametrize("name", ["cycle", *(pytest.param(n, marks=SLOW) for n in COMPOSED if n != "cycle")])
def test_a_mixture_end_to_end(name):
    """|z| > 5 twice, the second time with a fresh key and four times the draws; and nothing compiles twice."""
    exact, kernel = exact_mixture(), COMPOSED[name]()
    values = {path: np.ravel(v) for path, v in exact.items()}
    names = {f"{p}[{i}]" if v.size > 1 else p: v[i] for p, v in values.items() for i in range(v.size)}
    for key, num_samples in zip(jax.random.split(KEY), (1000, 4000), strict=True):
        run = {"num_warmup": 300, "num_samples": num_samples}
        chains = inference.mcmc(mixture().given({"y": DATA}), kernel, key=key, **run)
        rows = inference.summarize(jax.tree.map(lambda x: np.asarray(x, float), chains.choices))
        assert set(rows) == set(names) and all(row.ess_bulk > 200 for row in rows.values())
        if all(abs(rows[n].mean - value) <= 5 * rows[n].mcse_mean for n, value in names.items()):
            break
    else:
        pytest.fail(str([(n, rows[n].mean, value) for n, value in names.items()]))
    other, key = mixture().given({"y": DATA + 1}), jax.random.key(1)
    with count_compiles() as compiles:
        inference.mcmc(other, kernel, key=key, **run)
    assert compiles == []
    if name == "cycle":
        nothing, own = chains.parameters
        assert nothing == () and own["step_size"].shape == (4,) and own["inverse_mass_matrix"].shape == (4, 3)
        assert (np.asarray(own["inverse_mass_matrix"]) != 1).all() and len(np.unique(own["step_size"])) == 4


@ppl.model
def scales():
    """Numbers on three scales, one of them bounded."""
    x = ppl.sample("x", dist.Normal(jnp.zeros(3), jnp.array([0.02, 1.0, 30.0])))
    ppl.sample("y", dist.Normal(x.sum(), 40.0))
    ppl.sample("rate", dist.Gamma(4.0, 100.0))


TUNED = {
    "mala": (inference.mala(), 0.574),
    "barker": (inference.barker(), 0.4),
    "random_walk": (inference.random_walk(), 0.234),
    "random_walk, dense": (inference.random_walk(dense_mass=True), 0.234),
    "repeat": (inference.repeat(inference.mala(target_acceptance=0.7), 3), 0.7),
    "mixture": (inference.mixture(inference.mala(), inference.mala()), 0.574),
    "on": (inference.on(~ppl.select("rate"), inference.random_walk(target_acceptance=0.3)), 0.3),
}


@pytest.mark.parametrize("name", [n if n in ("mala", "repeat") else pytest.param(n, marks=SLOW) for n in TUNED])
def test_the_warm_up_reaches_its_acceptance(name):
    """With the scales of the target: without them the rate would be reached by steps that are 1000 times too short."""
    kernel, rate = TUNED[name]
    chains = inference.mcmc(scales().given({"y": 3.0}), kernel, key=KEY, num_warmup=1000, num_samples=500)
    assert abs(float(chains.statistics["acceptance_rate"].mean()) - rate) < 0.15
    wide = np.asarray(chains.choices["x"])[..., 2]
    assert 15 < wide.std() < 40, wide.std()


def test_slices_learn_their_widths():
    chains = inference.mcmc(scales().given({"y": 3.0}), inference.slice(), key=KEY, num_warmup=300, num_samples=200)
    width = np.asarray(chains.parameters["width"]).mean(0)
    rate, *x = width  # in the order of the addresses
    np.testing.assert_allclose(x, 2 * np.array([0.02, 1.0, 30 * 0.8]), rtol=0.4)
    np.testing.assert_allclose(rate, 2 * np.sqrt(special.polygamma(1, 4.0)), rtol=0.4)


def test_replicas_visit_both_modes_and_tune_apart():
    """The mode at 6 has 70 percent; a chain alone stays in one mode."""

    @ppl.model
    def modes():
        x = ppl.sample("x", dist.Normal(0.0, 10.0))
        ppl.factor("two", jnp.logaddexp(jnp.log(0.3) - 0.5 * (x + 6) ** 2, jnp.log(0.7) - 0.5 * (x - 6) ** 2))

    posterior, start = modes().given({}), {"x": -6.0}
    run = {"key": KEY, "num_warmup": 300, "num_samples": 2000, "initial": start}
    alone = inference.mcmc(posterior, inference.mala(), **run)
    share = (np.asarray(alone.choices["x"]) > 0).mean(1)
    assert ((share < 0.01) | (share > 0.99)).all()
    kernel = inference.replica_exchange(inference.mala(), [1.0, 0.3, 0.1, 0.02])
    chains = inference.mcmc(posterior, kernel, **run)
    row = inference.summarize({"up": (np.asarray(chains.choices["x"]) > 0).astype(float)})["up"]
    assert abs(row.mean - 0.7) < 5 * row.mcse_mean and row.ess_bulk > 200
    steps = np.asarray(chains.parameters["step_size"])
    assert steps.shape == (4, 4) and (steps.mean(0)[1:] > steps.mean(0)[:-1]).all()


# --- stochastic gradients ---------------------------------------------------------------------------------------------

NUMBER, BATCH = 20, 4
MANY = np.linspace(-1.0, 2.0, NUMBER).astype(np.float32)


@ppl.model
def mean_of(number):
    mean = ppl.sample("mean", dist.Normal(0.0, 1.0))
    ppl.sample("y", dist.Normal(mean, 2.0).expand([number]))


def minibatch(key):
    batch = jax.random.choice(key, jnp.asarray(MANY), (BATCH,), replace=False)
    return ppl.with_data_subsample(mean_of(BATCH), "y", total=NUMBER).given({"y": batch})


def stationary(kernel: Any, step: float) -> tuple[float, float]:
    """Return the variance of a linear recursion: that of `sgld`, or of `sghmc` with its steps."""
    precision = 1 + NUMBER / 4
    noise = (NUMBER / 4) ** 2 * MANY.astype(float).var(ddof=1) / BATCH * (1 - BATCH / NUMBER)
    if kernel.name == "sgld":
        return precision, (2 * step + step**2 * noise) / (1 - (1 - step * precision) ** 2)
    matrix = np.array([[1.0, step], [-step * precision, 1 - step * kernel.friction]])
    power, cov, drift = np.eye(2), np.zeros((2, 2)), np.zeros(2)
    for _ in range(kernel.num_integration_steps):
        cov = matrix @ cov @ matrix.T + np.diag([0.0, 2 * kernel.friction * step])
        drift = matrix @ drift + np.array([0.0, step])  # one minibatch for all of the steps
        power = matrix @ power
    fresh = power[0, 1] ** 2 + cov[0, 0] + drift[0] ** 2 * noise
    return precision, fresh / (1 - power[0, 0] ** 2)


@pytest.mark.parametrize(
    "kernel",
    [
        inference.sgld(minibatch, step_size=0.06),
        inference.sghmc(minibatch, step_size=0.15, num_integration_steps=4, friction=1.5),
    ],
    ids=["sgld", "sghmc"],
)
def test_stochastic_gradients_have_the_variance_of_their_step_size(kernel):
    """Which is not the posterior's; a wrong scale of the batch, noise or step would change it."""
    precision, variance = stationary(kernel, kernel.step_size)
    posterior = mean_of(NUMBER).given({"y": MANY})
    exact = MANY.astype(float).sum() / 4 / precision

    def moments(key, n):
        chains = inference.mcmc(posterior, kernel, key=key, num_warmup=60, num_samples=1, num_chains=n)
        x = chains.choices["mean"][:, 0] - exact
        return jnp.stack([x, x**2], axis=-1)

    assert abs(variance * precision - 1) > 0.2  # the bias that is documented
    two_stage_z(moments, np.array([0.0, variance]), KEY, 4000)


def test_a_decreasing_step_size_counts_its_steps():
    seen = inference.sgld(minibatch, step_size=lambda n: jnp.where(n < 3, 0.05, 0.0))
    posterior = mean_of(NUMBER).given({"y": MANY})
    chains = inference.mcmc(posterior, seen, key=KEY, num_warmup=0, num_samples=6, num_chains=1)
    assert (np.diff(np.asarray(chains.choices["mean"])[0]) != 0).tolist() == [True, True, False, False, False]
