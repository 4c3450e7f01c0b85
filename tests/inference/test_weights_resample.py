"""Log weights against numpy, and resampling: exact expected counts, no particle without weight, laws by chi-square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from expectax import inference
from helpers import bonferroni, two_stage, two_stage_z

METHODS = ("systematic", "stratified", "multinomial")
KEY = jax.random.key(20260802)

# --- weights ----------------------------------------------------------------------------------------------------------

log_weights = st.sampled_from([1, 2, 7]).flatmap(
    lambda n: st.lists(st.floats(-700, 700) | st.just(-np.inf), min_size=n, max_size=n).map(np.array)
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(log_weights)
def test_weights_agree_with_numpy(w):
    n, total = len(w), special.logsumexp(w)
    weights = np.exp(w - total) if np.isfinite(total) else np.full(n, 1 / n)
    with jax.enable_x64(True):
        got = [
            f(jnp.asarray(w))
            for f in (inference.log_mean_exp, inference.normalized_weights, inference.effective_sample_size)
        ]
    np.testing.assert_allclose(got[0], total - np.log(n), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[1], weights, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(got[2], 1 / (weights**2).sum(), rtol=1e-12)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(log_weights, st.floats(-1e4, 1e4))
def test_a_shift_of_the_log_weights_shifts_only_their_mean(w, shift):
    with jax.enable_x64(True):
        w = jnp.asarray(w)
        np.testing.assert_allclose(
            inference.log_mean_exp(w + shift), inference.log_mean_exp(w) + shift, rtol=1e-12, atol=1e-9
        )
        for f in (inference.normalized_weights, inference.effective_sample_size):
            np.testing.assert_allclose(f(w + shift), f(w), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_weight_at_all(x64, dtype):
    w = jnp.full(4, -jnp.inf, dtype)
    assert float(inference.log_mean_exp(w)) == -np.inf
    np.testing.assert_array_equal(inference.normalized_weights(w), np.full(4, 0.25))
    assert float(inference.effective_sample_size(w)) == 4.0


# --- resampling: exact expectations -----------------------------------------------------------------------------------

WEIGHTS = {  # all of one length, so that one compilation serves them
    "plain": [0.1, 0.25, 0.05, 0.2, 0.15, 0.05, 0.2],
    "zeros at both ends": [0.0, 0.0, 0.3, 0.0, 0.6, 0.1, 0.0],
    "one": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    "breakpoints on the grid": [0.25, 0.0, 0.25, 0.0, 0.0, 0.0, 0.5],
    "uneven": [1e-9, 0.5, 0.499, 1e-3, 0.0, 1e-12, 0.0],
}


def counts_at(monkeypatch, uniforms, weights, num, method):
    """Return the counts for each given value of the uniforms (one number, or one per level)."""
    now = []
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.asarray(now[-1], dtype).reshape(shape))

    def one(u):
        now.append(u)
        return jnp.bincount(inference.ancestors(KEY, jnp.log(weights), num, method), length=len(weights))

    return np.asarray(jax.vmap(one)(jnp.asarray(uniforms)))


def systematic_intervals(weights, num):
    """Return the lengths (perhaps 0) and middles of the intervals of the uniform on which the counts are constant."""
    breaks = np.sort(np.concatenate([[0.0, 1.0], num * np.cumsum(weights) % 1.0]))
    return np.diff(breaks), (breaks[:-1] + breaks[1:]) / 2


@pytest.mark.parametrize("num", [1, 4, 13])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_systematic_counts_are_unbiased_and_within_one(x64, monkeypatch, weights, num):
    weights = np.array(weights) / np.sum(weights)
    lengths, middles = systematic_intervals(weights, num)
    counts = counts_at(monkeypatch, middles, weights, num, "systematic")
    wide = lengths > 1e-10  # narrower ones are rounding of the breakpoints themselves
    assert (counts.sum(1) == num).all() and (counts[:, weights == 0] == 0).all()
    assert (np.abs(counts - num * weights)[wide] < 1 + 1e-9).all()
    np.testing.assert_allclose(lengths @ counts, num * weights, atol=2e-10)


@pytest.mark.parametrize("num", [1, 4, 13])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_stratified_counts_are_unbiased(x64, monkeypatch, weights, num):
    """Level i depends on uniform i alone: with all uniforms equal the counts have the systematic counts' mean."""
    weights = np.array(weights) / np.sum(weights)
    lengths, middles = systematic_intervals(weights, num)
    uniforms = np.repeat(middles[:, None], num, axis=1)
    np.testing.assert_allclose(
        lengths @ counts_at(monkeypatch, uniforms, weights, num, "stratified"), num * weights, atol=2e-10
    )


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_extreme_uniforms_choose_no_particle_without_weight(x64, monkeypatch, weights, u):
    weights = np.array(weights) / np.sum(weights)
    for method, uniforms in (("systematic", [u]), ("stratified", np.full((1, 6), u))):
        counts = counts_at(monkeypatch, uniforms, weights, 6, method)
        assert counts.sum() == 6 and (counts[:, weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("total", ["below", "above"])
def test_rounding_of_the_cumulated_sum(x64, monkeypatch, dtype, total):
    """Weights whose cumulated sum misses 1 by rounding: all levels still fall on particles with weight, in order."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = rng.gamma(1.0, size=1000).astype(dtype)
        weights[-100:] = 0
        last = float(jnp.cumsum(inference.normalized_weights(jnp.log(weights)))[-1])
        if last < 1 if total == "below" else last > 1:
            break
    else:
        pytest.fail("no such weights found")
    top = np.nextafter(np.asarray(1, dtype), np.asarray(0, dtype))
    counts = counts_at(monkeypatch, np.array([0, 0.5, top], dtype), weights, 1000, "systematic")
    assert (counts.sum(1) == 1000).all() and (counts[:, -100:] == 0).all()


# --- resampling: laws -------------------------------------------------------------------------------------------------


def index_laws(weights, num, method):
    """Return the law of each index, shape (num, weights): where a level of its stratum, or order statistic, falls."""
    edges, grid = np.cumsum(weights), np.arange(num + 1) / num
    if method == "multinomial":
        below = stats.beta(np.arange(1, num + 1)[:, None], num - np.arange(num)[:, None]).cdf(edges)
    else:
        below = np.clip(num * (edges - grid[:-1, None]), 0, 1)
    return np.diff(below, axis=1, prepend=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_law_of_each_index(x64, method):
    weights, num = np.array([0.0, 0.1, 0.35, 0.0, 0.3, 0.25, 0.0]), 4
    laws = index_laws(weights, num, method)
    np.testing.assert_allclose(laws.sum(0), num * weights, atol=1e-12)
    draw = jax.jit(jax.vmap(lambda key: inference.ancestors(key, jnp.log(weights), num, method)))

    def p_value(key, n):
        indices = np.asarray(draw(jax.random.split(key, n)))
        assert (np.diff(indices) >= 0).all()
        p = []
        for j, law in enumerate(laws):
            seen, possible = np.bincount(indices[:, j], minlength=7), law > 1e-12
            assert (seen[~possible] == 0).all()
            if possible.sum() > 1:
                p.append(stats.chisquare(seen[possible], n * law[possible] / law[possible].sum()).pvalue)
        return bonferroni(p)

    two_stage(p_value, KEY, 4000)


@pytest.mark.parametrize("method", ["stratified", "multinomial"])
def test_the_variance_of_the_counts(x64, method):
    """Binomial for multinomial resampling; a sum over independent strata for stratified."""
    weights, num = np.array([0.15, 0.55, 0.3]), 4
    laws = index_laws(weights, num, method)
    variance = num * weights * (1 - weights) if method == "multinomial" else (laws * (1 - laws)).sum(0)

    def sampler(key, n):
        draw = jax.jit(jax.vmap(lambda key: inference.ancestors(key, jnp.log(weights), num, method)))
        counts = (draw(jax.random.split(key, n))[..., None] == jnp.arange(3)).sum(1)
        return (counts - num * weights) ** 2

    two_stage_z(sampler, variance, KEY, 20_000)


@pytest.mark.parametrize("method", METHODS)
def test_a_million_float32_weights(method):
    n = 1_000_000
    w = jax.random.normal(KEY, (n,)) * 2
    indices = np.asarray(inference.ancestors(jax.random.fold_in(KEY, 1), w, method=method))
    assert indices.shape == (n,) and indices.min() >= 0 and indices.max() < n
    weights = special.softmax(np.asarray(w, np.float64))
    counts = np.bincount(indices, minlength=n)
    if method == "systematic":
        assert np.abs(counts - n * weights).max() < 1 + 0.1  # 0.1: float32 sums of a million
    values = np.linspace(-1, 1, n)  # a function of the place: a drift of the cumulated sum would show
    exact, spread = weights @ values, np.sqrt(weights @ values**2 - (weights @ values) ** 2)
    assert abs(values[indices].mean() - exact) < 5 * spread / np.sqrt(n)


@pytest.mark.parametrize("method", METHODS)
def test_no_weightless_particle_among_a_million(method):
    n = 1_000_000
    w = jnp.where(jax.random.bernoulli(KEY, 0.5, (n,)), jax.random.normal(KEY, (n,)), -jnp.inf)
    indices = np.asarray(inference.ancestors(jax.random.fold_in(KEY, 1), w, method=method))
    assert (np.diff(indices) >= 0).all()
    assert np.isfinite(np.asarray(w)[indices]).all()


def test_errors():
    w = jnp.zeros(3)
    with pytest.raises(ValueError, match="'ssp' or 'killing', got 'best'"):
        inference.ancestors(KEY, w, method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="typed key"):
        inference.ancestors(jax.random.PRNGKey(0), w)


# --- resampling: the laws that are enumerated -------------------------------------------------------------------------

ALL = ("systematic", "stratified", "multinomial", "residual", "ssp", "killing")
CONDITIONAL = ("multinomial", "systematic", "stratified", "residual", "killing")


positive_or_not = st.lists(st.just(-np.inf) | st.floats(-8, 4), min_size=3, max_size=3)
several_weights = st.lists(positive_or_not.filter(lambda w: np.isfinite(w).any()), min_size=8, max_size=8)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(several_weights)
@pytest.mark.parametrize("method", ALL)
def test_the_law_is_unbiased_whatever_the_weights(method, rows):
    """Probabilities sum to one and E[counts] = M W exactly; counts of systematic and SSP are within one of M W."""
    with jax.enable_x64(True):
        for num in (3,) if method == "killing" else (1, 4):
            first = inference.Ancestors(jnp.zeros(3), num, method)
            support = first.enumerate_support()
            log_prob = _log_prob(method, num)
            for w in rows:
                weights = np.exp(np.array(w) - special.logsumexp(w))
                probabilities = np.exp(np.asarray(log_prob(jnp.asarray(w), support)))
                counts = (np.asarray(support)[..., None] == np.arange(3)).sum(1)
                np.testing.assert_allclose(probabilities.sum(), 1.0, atol=1e-12)
                np.testing.assert_allclose(probabilities @ counts, num * weights, atol=1e-12)
                assert (counts[probabilities > 0][:, weights == 0] == 0).all()
                if method in ("systematic", "ssp"):
                    assert (np.abs(counts - num * weights)[probabilities > 1e-10] < 1 + 1e-9).all()


@functools.cache
def _log_prob(method, num):
    return jax.jit(lambda w, support: inference.Ancestors(w, num, method).log_prob(support))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 2**31), log_weights.filter(lambda w: np.isfinite(w).any()))
@pytest.mark.parametrize("method", ALL)
def test_draws_keep_to_their_bounds(method, seed, w):
    """N = 1, one-hot, zero and -inf weights: no particle without weight, counts within their bounds."""
    with jax.enable_x64(True):
        draw = _draw(method, len(w))
        index = np.asarray(draw(jax.random.key(seed), jnp.asarray(w)))
    weights, n = special.softmax(w), len(w)
    counts = np.bincount(index, minlength=n)
    assert counts.sum() == n and (counts[~np.isfinite(w)] == 0).all()
    if method in ("systematic", "ssp"):
        assert (np.abs(counts - n * weights) < 1 + 1e-9).all()
    if method == "residual":
        assert (counts >= np.floor(n * weights - 1e-9)).all()
    if method == "killing":
        best = np.argmax(w)
        assert index[best] == best


@functools.cache
def _draw(method, _):
    return jax.jit(lambda key, w: inference.ancestors(key, w, method=method))


CASES = ([0.1, 0.35, 0.3, 0.25], [0.0, 0.6, 0.4, 0.0], [0.25, 0.25, 0.5, 0.0], [0.05, 0.0, 0.05, 0.9])


def check_by_chi_square(law, draws_of):
    """Compare draws with the enumerated law, vector by vector."""
    support = np.asarray(law.enumerate_support())
    probabilities = np.exp(np.asarray(law.log_prob(support)))
    np.testing.assert_allclose(probabilities.sum(), 1.0, atol=1e-12)
    code = lambda rows: rows @ 4 ** np.arange(rows.shape[1])  # noqa: E731

    def p_value(key, n):
        drawn = np.asarray(draws_of(jax.random.split(key, n)))
        seen = np.bincount(code(drawn), minlength=4 ** drawn.shape[1])[code(support)]
        possible = probabilities > 1e-12
        assert seen[possible].sum() == n
        if possible.sum() == 1:
            return 1.0
        return stats.chisquare(seen[possible], n * probabilities[possible] / probabilities[possible].sum()).pvalue

    two_stage(p_value, KEY, 10_000)


@pytest.mark.parametrize("method", ALL)
def test_draws_have_the_enumerated_law(x64, method):
    for weights in CASES:
        law = inference.Ancestors(jnp.log(jnp.array(weights)), method=method)
        check_by_chi_square(law, jax.jit(jax.vmap(law.sample)))


@pytest.mark.parametrize("method", CONDITIONAL)
def test_conditional_draws_have_the_enumerated_law(x64, method):
    """And the law is the plain one, given that a uniformly chosen copy is the reference."""
    for weights in CASES:
        plain = inference.Ancestors(jnp.log(jnp.array(weights)), method=method)
        draw = jax.jit(
            jax.vmap(
                lambda key, i, w=weights: inference.ConditionalAncestors(jnp.log(jnp.array(w)), i, method).sample(key),
                in_axes=(0, None),
            )
        )
        for reference in np.flatnonzero(weights):
            law = inference.ConditionalAncestors(jnp.log(jnp.array(weights)), reference, method)
            check_by_chi_square(law, lambda keys, i=reference, d=draw: d(keys, i))
            support = np.asarray(law.enumerate_support())
            own = support[np.arange(len(support)), support[:, -1]] == reference
            expected = np.exp(np.asarray(plain.log_prob(support[:, :-1]))) * own / (4 * weights[reference])
            np.testing.assert_allclose(np.exp(np.asarray(law.log_prob(support))), expected, atol=1e-13)


def test_long_vectors_take_the_other_sums(x64):
    """Above 4096 the running sums are associative scans: the counts stay within one of M W, and match the short form."""
    n = 6000
    w = jnp.where(jax.random.bernoulli(KEY, 0.7, (n,)), jax.random.normal(KEY, (n,)), -jnp.inf)
    weights = special.softmax(np.asarray(w))
    for method in ("systematic", "ssp", "residual", "stratified"):
        counts = np.bincount(np.asarray(inference.ancestors(KEY, w, method=method)), minlength=n)
        assert counts.sum() == n and (counts[weights == 0] == 0).all()
        assert (np.abs(counts - n * weights) < (1 + 1e-6 if method in ("systematic", "ssp") else 12)).all()


def test_killing_needs_as_many_ancestors_as_particles():
    with pytest.raises(ValueError, match="as many ancestors as there are particles, 3, not 4"):
        inference.ancestors(KEY, jnp.zeros(3), 4, "killing")
