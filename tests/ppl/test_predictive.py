"""Prediction, pointwise log-likelihood and missing data: exact wherever draws or data leave nothing to chance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

import expectax as ex
from expectax import dist, inference
from expectax.ppl._nested import leaves_of
from helpers import count_compiles, enumerate_choices, two_stage_z

KEY = jax.random.key(20260813)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


# --- a model that a draw of p, 0 or 1, leaves no choice -----------------------------------------------------------------

FLIPS = np.array([0.0, 1.0, 0.0])


@ex.model
def copy(p):
    return ex.sample("k", dist.Bernoulli(p))


@ex.model
def certain(y):
    p = ex.sample("p", dist.Beta(1.0, 1.0))
    ex.deterministic("twice", 2 * p)
    k = ex.sample("sub", copy(p))

    def step(z, _):
        z = 1 - ex.sample("z", dist.Bernoulli(1.0 * z))
        ex.deterministic("next", z)
        return z, z

    lax.scan(step, k, None, length=3)
    lanes = jax.vmap(lambda f: ex.sample("lane", dist.Bernoulli(jnp.abs(p - f))))(jnp.asarray(FLIPS))
    c = lax.cond(k == 1, lambda: 3.0 + ex.sample("c", dist.Bernoulli(p)), lambda: 1.0)
    ex.deterministic("c_or_one", c)
    ex.observe("y", dist.Bernoulli(p), y)
    ex.sample("heads", dist.Bernoulli(p).expand([2]))
    return lanes


DRAWS = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])  # two chains


def foreseen(p: Any) -> dict[str, np.ndarray]:
    """Return what follows from each p."""
    z = np.stack([p, 1 - p, p], -1)
    lane = np.abs(p[..., None] - FLIPS)
    found = {"sub/k": p, "z": z, "next": 1 - z, "lane": lane, "twice": 2 * p, "y": p}
    return found | {"c_or_one": 1 + 3 * p, "heads": np.stack([p, p], -1)}


FORGET = {  # the data are all 1, against half of the draws
    "observed in the model": lambda: certain(1),
    "given": lambda: certain(1).given({"heads": jnp.ones(2, int), "z": jnp.array([1, 0, 1])}),
    "conditioned": lambda: ex.condition(certain(1), {"heads": jnp.ones(2, int), "sub": {"k": 1}}),
    "given in time": lambda: ex.condition(certain(1), {"z": jnp.array([1, 0, 1])}).given(
        {"lane": jnp.array([1, 0, 1])}
    ),
    "scaled and renamed": lambda: ex.rename(ex.scale(ex.condition(certain(1), {"heads": jnp.ones(2, int)}), 2.0), {}),
}


@pytest.mark.parametrize("how", FORGET)
def test_prediction_forgets_the_data(how):
    """Also leading axes, nested models, time, lanes, a branch, and recorded values, which are computed again."""
    draws = {"p": jnp.asarray(DRAWS), "twice": jnp.full((2, 3), 77.0)}
    found = dict(leaves_of(ex.predictive(FORGET[how](), draws, key=KEY)))
    expected = foreseen(DRAWS)
    assert set(found) == set(expected) | {"c"}
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    np.testing.assert_array_equal(found["c"][DRAWS == 1], 1)


def test_prediction_keeps_what_is_substituted_or_done():
    for transform in (ex.substitute, ex.do):
        fixed = transform(certain(1), {"sub": {"k": 1}, "heads": jnp.array([1, 0])})
        found = dict(leaves_of(ex.predictive(fixed, {"p": jnp.asarray(DRAWS)}, key=KEY)))
        np.testing.assert_array_equal(found["z"], np.broadcast_to([1, 0, 1], (2, 3, 3)))
        done = transform is ex.do
        assert ("heads" in found, "sub/k" in found) == (done, done)


def test_draws_that_are_observed_or_missing_are_drawn_anew():
    posterior = certain(1).given({"heads": ex.masked(jnp.array([1, 0]), np.array([True, False]))})
    draws = {"p": jnp.asarray(DRAWS), "heads": jnp.zeros((2, 3, 1), int)}  # as mcmc returns them
    np.testing.assert_array_equal(ex.predictive(posterior, draws, key=KEY)["heads"], foreseen(DRAWS)["heads"])


@ex.model
def noisy(y, sigma):
    m = ex.sample("m", dist.Normal(0.0, 1.0))
    s = ex.sample("s", dist.LogNormal(0.0, 0.5))
    x = lax.scan(lambda c, _: (ex.sample("x", dist.Normal(c, s)),) * 2, m, None, length=3)[1]
    ex.observe("y", dist.Normal(x, sigma), y)
    ex.sample("v", dist.MultivariateNormal(m * jnp.ones((4, 2)), jnp.eye(2)))
    ex.factor("w", 0.3 * m)


Y3, V4 = np.array([0.3, -0.5, 1.0]), np.arange(8.0).reshape(4, 2) / 4


@pytest.mark.parametrize("size", [1, 4, 99])
def test_chunks_change_nothing(size):
    """Ten draws in chunks that divide them or not: the same keys, so the same numbers."""
    program = noisy(jnp.asarray(Y3), 0.7)
    draws = {"m": jnp.linspace(-1, 1, 10).reshape(2, 5), "s": jnp.linspace(0.5, 1.5, 10).reshape(2, 5)}
    runs = [lambda n: ex.predictive(program, draws, key=KEY, batch_size=n)]
    runs += [lambda n: ex.predictive(program, key=KEY, num_samples=10, batch_size=n)]
    latents = draws | {"x": jnp.arange(30.0).reshape(2, 5, 3) / 10}
    runs += [lambda n: ex.log_likelihood(program.given({"v": V4}), latents, batch_size=n)]
    for run in runs:
        whole, chunked = run(None), run(size)
        assert jax.tree.structure(whole) == jax.tree.structure(chunked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), whole, chunked)
        for value in jax.tree.leaves(whole) if run is not runs[2] else ():
            assert len(np.unique(value)) == value.size  # no two draws share noise


def test_prior_prediction_has_the_prior_law():
    predict = lambda key, n: ex.predictive(noisy(jnp.asarray(Y3), 0.7), key=key, num_samples=n)  # noqa: E731

    def moments(key: Any, n: int) -> Any:
        found = predict(key, n)
        return jnp.stack([found["m"], found["m"] ** 2, found["y"][:, 0] * found["m"], found["v"][:, 3, 1] ** 2], 1)

    two_stage_z(moments, np.array([0.0, 1.0, 1.0, 2.0]), KEY, 5000)


def test_prediction_refuses():
    program = noisy(jnp.asarray(Y3), 0.7)
    one = jnp.zeros(5)
    for error, match, arguments in (
        (ValueError, "either draws or num_samples", {}),
        (ValueError, "either draws or num_samples", {"draws": {"m": one}, "num_samples": 3}),
        (ex.ppl.AddressError, "'mm'", {"draws": {"mm": one}}),
        (ex.ppl.ShapeError, "leading axes", {"draws": {"m": one, "s": jnp.zeros((5, 2))}}),
        (ex.ppl.ShapeError, "leading axes", {"draws": {"m": jnp.zeros(())}}),
        (ex.ppl.ShapeError, "leading axes", {"draws": {"x": jnp.zeros(3)}}),
        (ex.ppl.ShapeError, "no draws", {"draws": {}}),
    ):
        with pytest.raises(error, match=match):
            ex.predictive(program, key=KEY, **arguments)
    with pytest.raises(ex.ppl.ShapeError, match="leading axes"):
        ex.log_likelihood(program, {"m": one, "s": jnp.ones(4), "x": jnp.zeros((5, 3)), "v": jnp.zeros((5, 4, 2))})
    with pytest.raises(ex.ppl.AddressError, match="'s'"):
        ex.log_likelihood(program, {"m": one, "x": jnp.zeros((5, 3)), "v": jnp.zeros((5, 4, 2))})


# --- pointwise log-likelihood -------------------------------------------------------------------------------------------------


def latents_of(program_latents: dict[str, Any], *lead: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {p: np.exp(rng.normal(size=(*lead, *shape))) for p, shape in program_latents.items()}


def test_pointwise_log_likelihood():
    """Of data given, conditioned on and observed; of time, and of events; missing and masked elements have none."""
    v = V4.copy()
    v[2] = np.nan
    draws = latents_of({"m": (), "s": (), "x": (3,)}, 2, 5)
    posterior = noisy(jnp.asarray(Y3), 0.7).given({"v": ex.masked(v, np.array([1, 1, 0, 1], bool))})
    found = ex.log_likelihood(posterior, draws | {"v": np.zeros((2, 5, 1, 2))})
    close(found["y"], stats.norm.logpdf(Y3, draws["x"], 0.7))
    expected = stats.norm.logpdf(V4, draws["m"][..., None, None], 1.0).sum(-1) * [1, 1, 0, 1]
    close(found["v"], expected)
    x = np.array([0.5, 1.0, 0.0])
    keep = np.array([True, False, True])
    program = ex.mask(ex.condition(noisy(jnp.asarray(Y3), 0.7), {"x": x, "v": V4}), keep, "y")
    found = ex.log_likelihood(program, {"m": draws["m"], "s": draws["s"]})
    close(found["y"], np.broadcast_to(stats.norm.logpdf(Y3, x, 0.7) * keep, (2, 5, 3)))
    before = np.stack([draws["m"], np.full((2, 5), 0.5), np.full((2, 5), 1.0)], -1)
    close(found["x"], stats.norm.logpdf(x, before, draws["s"][..., None]))


def test_factors_and_substituted_values_are_no_data():
    program = ex.substitute(noisy(jnp.asarray(Y3), 0.7), {"x": Y3, "v": V4})
    assert set(ex.log_likelihood(program, {"m": jnp.zeros(4), "s": jnp.ones(4)})) == {"y"}


# --- compile once --------------------------------------------------------------------------------------------------------------


def test_new_data_and_draws_compile_nothing():
    def run(i: int) -> None:
        program = noisy(jnp.asarray(Y3 + i), 0.7 + i)
        draws = {"m": jnp.arange(6.0) + i, "s": jnp.ones(6) + i}
        posterior = program.given({"v": ex.masked(V4 + i, np.arange(4) < 2)})
        ex.predictive(posterior, draws, key=jax.random.key(i), batch_size=4)
        ex.predictive(program, key=jax.random.key(i), num_samples=7)
        ex.log_likelihood(posterior, draws | {"x": jnp.zeros((6, 3)) + i, "v": jnp.zeros((6, 2, 2)) + i})
        inference.importance(posterior, key=jax.random.key(i), num_particles=9)

    run(0)
    with count_compiles() as compiles:
        run(1)
    assert not compiles


# --- missing data ----------------------------------------------------------------------------------------------------------------


@ex.model
def incomplete():
    """Positive data in lanes, vectors over time, and numbers under another's bound."""
    m = ex.sample("m", dist.Normal(0.0, 1.0))
    s = ex.sample("s", dist.LogNormal(0.0, 0.5))
    jax.vmap(lambda i: ex.sample("y", dist.Gamma(2.0, jnp.exp(m) + i).expand([2])))(jnp.arange(3.0))
    step = lambda c, _: (ex.sample("v", dist.MultivariateNormal(c, s * jnp.eye(2))), None)  # noqa: E731
    lax.scan(step, m * jnp.ones(2), None, length=4)
    ex.sample("u", dist.Uniform(jnp.zeros(3), 1.0 + s))


NAN = np.nan
DATA = {
    "y": np.array([[0.5, NAN], [1.5, 0.2], [NAN, NAN]]),
    "v": np.array([[0.1, 0.2], [NAN, NAN], [NAN, NAN], [1.0, -1.0]]),
    "u": np.array([NAN, 0.4, 0.9]),
}
LATENTS = {"m": 0.3, "s": 1.2, "y": [0.7, 2.0, 0.1], "v": [[0.5, 0.6], [-0.2, 0.3]], "u": [0.25]}


def observed() -> dict[str, Any]:
    given = {path: ex.masked(value) for path, value in DATA.items() if path != "v"}
    return given | {"v": ex.masked(DATA["v"], ~np.isnan(DATA["v"][:, 0]))}


def by_hand(z: Any) -> float:
    y, v, u = (np.copy(DATA[p]) for p in ("y", "v", "u"))
    y[np.isnan(y)], u[np.isnan(u)] = z["y"], z["u"]
    v[1:3] = z["v"]
    before = np.concatenate([np.full((1, 2), z["m"]), v[:-1]])
    prior = stats.norm.logpdf(z["m"]) + stats.lognorm.logpdf(z["s"], 0.5)
    rate = np.exp(z["m"]) + np.arange(3.0)[:, None]
    data = stats.gamma.logpdf(y, 2, scale=1 / rate).sum() + stats.norm.logpdf(v, before, np.sqrt(z["s"])).sum()
    return prior + data + stats.uniform.logpdf(u, 0, 1 + z["s"]).sum()


def test_missing_data_are_latents():
    posterior = incomplete().given(observed())
    shapes = {p: s.shape for p, s in leaves_of(posterior.latent_shapes)}
    assert shapes == {p: np.shape(v) for p, v in LATENTS.items()}
    z = jax.tree.map(jnp.asarray, {p: np.asarray(v) for p, v in LATENTS.items()})
    close(posterior.log_density(z), by_hand(LATENTS))
    trace = posterior.trace(z)
    close(trace["y"], [[0.5, 0.7], [1.5, 0.2], [2.0, 0.1]])
    close(trace["v"], [[0.1, 0.2], [0.5, 0.6], [-0.2, 0.3], [1.0, -1.0]])
    jax.tree.map(close, posterior.latents(trace.choices), z)
    close(jax.jit(lambda z: posterior.log_density(z))(z), by_hand(LATENTS))


def test_missing_data_in_unconstrained_space():
    """A round trip, the Jacobian by hand, and a gradient as finite differences give it."""
    posterior = incomplete().given(observed())
    z = {p: jnp.asarray(v) for p, v in LATENTS.items()}
    u = posterior.unconstrain(z)
    bound = special.logit(np.array(LATENTS["u"]) / 2.2)
    for path, value in (LATENTS | {"s": np.log(1.2), "y": np.log(LATENTS["y"]), "u": bound}).items():
        close(u[path], value)
    jax.tree.map(close, posterior.constrain(u), z)

    def reference(u: Any) -> float:
        s = np.exp(u["s"])
        z = {"m": u["m"], "s": s, "y": np.exp(u["y"]), "v": u["v"], "u": special.expit(u["u"]) * (1 + s)}
        inside = special.expit(u["u"])
        return by_hand(z) + u["s"] + np.sum(u["y"]) + np.sum(np.log(inside * (1 - inside) * (1 + s)))

    close(posterior.unconstrained_log_density(u), reference(u))
    gradient = jax.jit(jax.grad(posterior.unconstrained_log_density))(u)
    for path in u:
        for index in np.ndindex(np.shape(u[path])):
            ends = [reference(u | {path: np.asarray(u[path].at[index].add(h))}) for h in (1e-5, -1e-5)]
            np.testing.assert_allclose(gradient[path][index], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-7)


def test_a_mask_full_or_empty_is_data_or_nothing():
    whole, none = {"y": np.ones((3, 2))}, np.zeros((3, 2), bool)
    z = {p: jnp.asarray(v) for p, v in LATENTS.items()} | {"v": jnp.zeros((4, 2)), "u": jnp.full(3, 0.1)}
    full = incomplete().given({"y": ex.masked(whole["y"])})
    assert "y" not in full.latent_shapes
    rest = {p: v for p, v in z.items() if p != "y"}
    close(full.log_density(rest), incomplete().given(whole).log_density(rest))
    empty = incomplete().given({"y": ex.masked(whole["y"], none)})
    assert empty.latent_shapes["y"].shape == (6,)
    y = jnp.arange(1.0, 7.0)
    close(empty.log_density(rest | {"y": y}), incomplete().assess(rest | {"y": y.reshape(3, 2)})[0])


def test_a_discrete_missing_value_has_no_unconstrained_space():
    posterior = certain(1).given({"p": 0.5, "heads": ex.masked(jnp.ones(2, int), np.array([True, False]))})
    with pytest.raises(ex.ppl.SupportError, match="discrete"):
        posterior.unconstrain({})


# --- evidence of masked data -------------------------------------------------------------------------------------------------------


@ex.model
def labels(y_noise):
    k = ex.sample("k", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
    step = lambda b, _: (ex.sample("b", dist.Bernoulli(jnp.array([0.2, 0.7])[b])),) * 2  # noqa: E731
    b = lax.scan(step, jnp.asarray(k > 0, int), None, length=3)[1]
    jax.vmap(lambda i: ex.sample("y", dist.Bernoulli(jax.nn.sigmoid(y_noise * (k + b.sum() + i)))))(jnp.arange(2))


def test_evidence_of_masked_data():
    """Exactly: the density summed over every assignment, and E[exp w] over the values that occur."""
    given = {
        "b": ex.masked(jnp.array([1, 0, 0]), np.array([True, False, True])),
        "y": ex.masked(jnp.array([1, 1]), np.array([False, True])),
    }
    posterior = labels(0.4).given(given)
    program = labels(0.4)
    full = {"k": 3, "b": 2, "y": 2}
    shapes = program.given({}).latent_shapes
    every = enumerate_choices(shapes, full)
    joint = np.exp(jax.jit(jax.vmap(lambda c: program.assess(c)[0]))(every))
    agrees = (every["b"][:, 0] == 1) & (every["b"][:, 2] == 0) & (every["y"][:, 1] == 1)
    evidence = joint[agrees].sum()
    latents = enumerate_choices(posterior.latent_shapes, full)
    assert {p: v.shape for p, v in latents.items()} == {"k": (12,), "b": (12, 1), "y": (12, 1)}
    close(np.exp(jax.jit(jax.vmap(posterior.log_density))(latents)).sum(), evidence)

    cloud = inference.importance(posterior, key=KEY, num_particles=4096)
    rows = np.concatenate([np.asarray(cloud.choices[p]).reshape(4096, -1) for p in ("k", "b", "y")], 1)
    distinct, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    weights = np.asarray(cloud.log_weights)
    assert len(distinct) == 12
    close(weights, weights[first][inverse.ravel()])  # the weight is a function of the latents
    chosen = jax.tree.map(lambda v: v[first], cloud.choices)
    density = np.exp(jax.vmap(posterior.log_density)(chosen))
    close(np.sum(density / np.exp(weights[first])), 1.0)  # q(z) = p(z, y) / exp(w) is a law
    close(density.sum(), evidence)
    two_stage_z(
        lambda key, n: jnp.exp(inference.importance(posterior, key=key, num_particles=n).log_weights),
        evidence,
        KEY,
        4096,
    )


def test_the_exact_posterior_as_a_proposal_weighs_all_alike():
    """Missing elements of a Gaussian model, drawn from their posterior: every weight is the evidence."""
    pair = ex.model(lambda: ex.sample("y", dist.Normal(jnp.full(2, ex.sample("m", dist.Normal(0.0, 1.0))), 1.0)))
    posterior = pair().given({"y": ex.masked(np.array([0.8, np.nan]))})

    @ex.model
    def guide():
        m = ex.sample("m", dist.Normal(0.4, np.sqrt(0.5)))
        ex.sample("y", dist.Normal(jnp.full(1, m), 1.0))

    cloud = inference.importance(posterior, guide(), key=KEY, num_particles=5)
    close(cloud.log_weights, np.full(5, stats.norm.logpdf(0.8, 0, np.sqrt(2))))
