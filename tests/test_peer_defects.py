"""Defects that were measured in other probabilistic languages, each as a test of this one with an exact answer.

G1 (what is offered) and G2 (bugs) mark what was measured on GenJAX 1.0.x; U2, with a number, what users of JAX's
languages report. See also `test_peer_defects_in_use`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import expectax as ex
from expectax import dist, inference, ppl, vi
from peer_models import EFFECT, ERROR, PRIOR, Y, flip, outer, pair, schools, slab, walk

KEY = jax.random.key(2026)
pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
normal = stats.norm.logpdf

# --- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [0, 1])
def test_update_of_a_flipped_cond_weighs_both_branches(z):
    """G2: the weight of a flip was 0.0, each branch being compared with its own old trace."""
    trace, _ = flip().generate(KEY, {"z": z, "y": Y})
    new, weight, discard = trace.update(KEY, {"z": 1 - z})
    joint = np.log(PRIOR) + normal(Y, [0.0, 2.0], 1.0)
    close(weight, joint[1 - z] - joint[z])
    close(new.log_density, joint[1 - z])
    assert discard == {"z": z}


def test_metropolis_hastings_on_a_cond_has_the_posterior():
    """G2: MH by `regenerate` on this model returned P(z | y) = 0.297, the prior, with acceptance 1; exact 0.658."""
    kernel = np.zeros((2, 2))
    for z in (0, 1):
        trace, _ = flip().generate(KEY, {"z": z, "y": Y})
        moved, log_weight = jax.vmap(lambda k, t=trace: t.regenerate(k, "z"))(jax.random.split(KEY, 32))
        close(np.asarray(log_weight)[moved["z"] == z], 0.0)
        (accept,) = np.unique(np.minimum(1.0, np.exp(log_weight))[moved["z"] != z])
        kernel[z] = PRIOR[1 - z] * accept
        kernel[z, z] = 1.0 - kernel[z, 1 - z]
    stationary = np.linalg.matrix_power(kernel, 1000)[0]
    exact = PRIOR * np.exp(normal(Y, [0.0, 2.0], 1.0))
    close(stationary, exact / exact.sum())
    assert round(stationary[1], 3) == 0.658


def test_a_choice_of_one_branch_comes_and_goes():
    """G2: `Cond.update` and `regenerate` scored a branch that had not been run."""
    trace, _ = slab().generate(KEY, {"z": 1, "x": 0.5, "y": Y})
    gone, weight, discard = trace.update(KEY, {"z": 0})
    close(gone.log_density, np.log(0.7) + normal(Y))
    close(weight, gone.log_density - trace.log_density)
    assert not gone.present["x"] and discard["z"] == 1 and discard["x"].mask and discard["x"].value == 0.5
    back, opposite, _ = gone.update(KEY, discard)
    close([opposite, back.log_density], [-weight, trace.log_density])
    drawn, weight, _ = gone.update(KEY, {"z": 1})  # x is drawn, and not weighed
    close(weight, np.log(0.3 / 0.7) + normal(Y, drawn["x"]) - normal(Y))


def test_the_density_of_a_cond_over_lanes_is_one_number():
    """G2: `Cond.vmap` selected per lane among sums over the batch: [8.8, 12.0, 8.8, 12.0] for a scalar."""
    on, x = np.array([1, 0, 1, 0]), np.array([0.1, 0.2, 0.3, 0.4])

    def lane(on: Any) -> Any:
        return lax.cond(
            on == 1, lambda: ex.sample("x", dist.Normal(2.0, 1.0)), lambda: ex.sample("x", dist.Normal(0.0, 3.0))
        )

    density, _ = ex.model(jax.vmap(lane))(jnp.array(on)).assess({"x": x})
    assert density.shape == ()
    close(density, np.where(on, normal(x, 2.0), normal(x, 0.0, 3.0)).sum())


@pytest.mark.parametrize("predicate", [True, np.bool_(True), jnp.array(True)])
def test_a_cond_takes_any_predicate_and_returns_any_tree(predicate):
    """G1: `Cond` refused tuples as return values, and conditions that were no jax arrays."""
    program = ex.model(
        lambda: ex.cond(
            predicate, lambda: (ex.sample("x", dist.Normal(0.0, 1.0)), {"a": 1.0}), lambda: (0.0, {"a": 0.0})
        )
    )()
    density, (x, rest) = program.assess({"x": 0.5})
    close([density, x, rest["a"]], [normal(0.5), 0.5, 1.0])


def test_a_value_recorded_in_a_branch_is_kept():
    """G1: `save` inside `lax.cond` was silently lost."""
    program = ex.model(lambda p: lax.cond(p > 0, lambda: ex.deterministic("d", 2.0 * p), lambda: p))
    trace = program(1.5).simulate(KEY)
    assert trace.deterministic["d"] == 3.0 and trace.present["d"]
    assert not program(-1.5).simulate(KEY).present["d"]


def test_a_switch_of_three_branches_in_an_objective():
    """G2 (ADEV): a `lax.switch` of three branches was a TypeError."""

    @vi.objective
    def cost(p):
        k = ex.sample("k", dist.Categorical(jnp.array([p, p, 1.0 - 2.0 * p])))
        return ex.switch(k, [lambda: 1.0, lambda: 10.0, lambda: 100.0])

    close(vi.value_and_grad(cost)(0.3, key=KEY), (43.3, -189.0))


def test_functions_with_their_own_derivative_in_an_objective():
    """G2 (ADEV): `relu` and `logaddexp` (custom_jvp) raised inside an expectation."""

    @vi.objective
    def cost(p):
        return jax.nn.relu(jnp.logaddexp(3.0 * ex.sample("b", dist.Bernoulli(p)), 0.0))

    high, low = np.logaddexp(3.0, 0.0), np.log(2.0)
    close(vi.value_and_grad(cost)(0.3, key=KEY), (0.3 * high + 0.7 * low, high - low))


# --- scans and edits --------------------------------------------------------------------------------------------------


def test_regenerate_of_a_scan():
    """G2: `Scan.regenerate` raised a TypeError, so there was no MH on any model with a Scan."""
    x = np.array([0.1, 0.4, -0.2, 0.3])
    trace, _ = walk().generate(KEY, {"a": 0.5, "x": x})
    moved, weight = trace.regenerate(KEY, ex.select(("x", 1)))
    new = np.asarray(moved["x"])
    assert new[1] != x[1] and (new[[0, 2, 3]] == x[[0, 2, 3]]).all()
    close(weight, normal(x[2], new[1]) - normal(x[2], x[1]))
    moved, weight = trace.regenerate(KEY, "a")  # the scan is not touched
    close(weight, normal(x[0], moved["a"]) - normal(x[0], 0.5))
    close(trace.project("x"), normal(x, [0.5, *x[:3]]).sum())


def test_single_lanes_are_constrained():
    """G1: there were no constraints by index; here the weight is the density of the given elements alone."""
    program = ex.model(jax.vmap(lambda m: ex.sample("x", dist.Normal(m, 1.0))))(jnp.arange(3.0))
    trace, weight = program.generate(KEY, {"x": ex.at(1, 5.0)})
    assert trace["x"][1] == 5.0
    close(weight, normal(5.0, 1.0))
    cloud = inference.importance(
        program.given({"x": ex.masked(np.array([1.0, np.nan, 3.0]))}), key=KEY, num_particles=2
    )
    close(cloud.log_evidence, normal(1.0, 0.0) + normal(3.0, 2.0))


def test_single_steps_of_a_scan_are_constrained():
    """G1: constraints of a Scan had to cover all steps; there were none by index (`["y", 3]`)."""
    trace, weight = walk().generate(KEY, {"x": ex.at(2, 5.0)})
    assert trace["x"][2] == 5.0
    close(weight, normal(5.0, trace["x"][1]))


@pytest.mark.parametrize("density", ["log_density", "unconstrained_log_density", "generate"])
def test_data_missing_in_a_scan(density):
    """G1: as before; with the missing steps as latents."""
    posterior = walk().given({"x": ex.masked(np.array([1.0, np.nan, 2.0, 3.0]))})
    if density == "generate":
        trace, weight = posterior.generate(KEY)
        a, x, given = trace["a"], np.asarray(trace["x"]), [0, 2, 3]
        close(weight, normal(x, [a, *x[:3]])[given].sum())
        return
    exact = normal([0.5, 1.0, 1.5, 2.0, 3.0], [0.0, 0.5, 1.0, 1.5, 2.0]).sum()
    close(getattr(posterior, density)({"a": 0.5, "x": jnp.array([1.5])}), exact)


def test_the_trace_of_a_vmap_is_updated_as_a_whole():
    """G2: `update` and `mh` on a bare Vmap trace ran the inner function: a weight of shape (3,)."""
    means, x = np.array([0.0, 1.0, 2.0]), np.array([0.5, 0.5, 0.5])
    program = ex.model(jax.vmap(lambda m: ex.sample("x", dist.Normal(m, 1.0))))(jnp.array(means))
    trace, _ = program.generate(KEY, {"x": x})
    _, weight, discard = trace.update(KEY, {"x": ex.at(2, 3.0)})
    assert weight.shape == () and discard["x"].mask.tolist() == [False, False, True]
    close(weight, normal(3.0, 2.0) - normal(0.5, 2.0))
    _, weight = trace.regenerate(KEY, "x")
    close(weight, 0.0)


def test_update_discards_what_changed_alone():
    """G1: `discard` held all old choices."""
    trace, _ = outer().generate(KEY, {"a": {"b": 0.5, "c": 1.5}, "d": 2.5})
    _, weight, discard = trace.update(KEY, {"a": {"c": 0.0}})
    assert discard == {"a": {"c": 1.5}}
    close(weight, normal(0.0, 3.0, 4.0) - normal(1.5, 3.0, 4.0))


def test_the_complement_of_a_nested_choice_keeps_its_neighbours():
    """G2: `~sel(("a", "b"))` dropped `a.c`; G1: the documented `&` was a TypeError."""
    trace, _ = outer().generate(KEY, {"a": {"b": 0.5, "c": 1.5}, "d": 2.5})
    b, c, d = normal(0.5, 1.0, 2.0), normal(1.5, 3.0, 4.0), normal(2.5)
    close(trace.project(~ex.select("a/b")), c + d)
    close(trace.project(ex.select("a") & ~ex.select("a/b")), c)
    close(trace.project(ex.select("a/b") | ex.select("d")), b + d)
    close(trace.project(ex.select("a") - ex.select("a/c")), b)
    close([trace["a/b"], trace["a/c"]], [0.5, 1.5])  # G1: no access by path


# --- misspelt and missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda p, t: p.generate(KEY, {"dd": 0.0}),
        lambda p, t: p.given({"dd": 0.0}),
        lambda p, t: p.assess({"a": {"b": 0.0, "c": 0.0}, "d": 0.0, "dd": 0.0}),
        lambda p, t: p.assess({"a": {"b": 0.0, "c": 0.0}}),
        lambda p, t: t.update(KEY, {"dd": 0.0}),
        lambda p, t: t.regenerate(KEY, ex.select("dd")),
        lambda p, t: t.project(~ex.select("dd")),
        lambda p, t: ex.condition(p, {"dd": 0.0}),
        lambda p, t: ex.predictive(p, {"dd": jnp.zeros(3)}, key=KEY),
    ],
)
def test_misspelt_and_missing_addresses_are_errors(use):
    """G2, U2.3: typos in constraints and selections had weight 0.0; a missing address was a bare `KeyError: 'y'`."""
    program = outer()
    trace = program.simulate(KEY)
    with pytest.raises(ppl.AddressError, match=r"'d.*test_peer_defects\.py|test_peer_defects\.py.*'d"):
        use(program, trace)


def test_an_object_that_is_not_used_as_a_choice_is_no_number():
    """G2: a forgotten `@ "x"` left a Thunk; a distribution or a program that is not sampled is an error where used."""
    for forgotten in (lambda: dist.Normal(0.0, 1.0) + 1.0, lambda: pair() + 1.0):
        with pytest.raises(TypeError):
            ex.model(forgotten)().simulate(KEY)


def test_a_negative_scale_is_not_lost():
    """G1: no validation: a scale of -1 became nan silently. Where the scale is data, `debug` names the site."""
    with pytest.raises(ValueError, match="scale"):
        ex.model(lambda: ex.sample("x", dist.Normal(0.0, -1.0)))().simulate(KEY)
    finding = ex.debug(ex.model(lambda s: ex.sample("x", dist.Normal(0.0, s)))(-1.0), key=KEY)
    assert finding is not None and finding.address == "x" and finding.parameters["scale"] == -1.0


# --- lanes --------------------------------------------------------------------------------------------------------------


def test_in_axes_of_one():
    """G2: `in_axes=1` returned (3, 5) for (5, 3), silently."""
    means, x = np.arange(1.0, 16.0).reshape(3, 5), np.linspace(-1.0, 20.0, 15).reshape(5, 3)
    for law in (lambda m: dist.Normal(m, 1e-3), lambda m: dist.Gamma(1e8 * m, 1e8)):  # one noise for all, and a key
        lanes = jax.vmap(lambda m, law=law: ex.sample("x", law(m)), in_axes=1)
        drawn = ex.model(lanes)(jnp.array(means)).simulate(KEY)["x"]
        np.testing.assert_allclose(drawn, means.T, atol=0.01)
    program = ex.model(jax.vmap(lambda m: ex.sample("x", dist.Normal(m, 1.0)), in_axes=1))(jnp.array(means))
    close(program.assess({"x": x})[0], normal(x, means.T).sum())
    observed = jax.vmap(lambda m, x: ex.observe("x", dist.Normal(m, 1.0), x), in_axes=1)
    close(ex.model(observed)(jnp.array(means), jnp.array(x.T)).assess({})[0], normal(x, means.T).sum())


@pytest.mark.parametrize("n", [3, 4])
def test_a_batched_mean_with_a_shared_vector_scale(n):
    """G2: an error for n != k; for n == k silently the diagonal, of shape (3,)."""
    means, scale = np.arange(float(n)), np.array([1.0, 2.0, 3.0])
    program = ex.model(jax.vmap(lambda m: ex.sample("x", dist.Normal(m, jnp.array(scale)))))(jnp.array(means))
    x = np.linspace(-1.0, 2.0, 3 * n).reshape(n, 3)
    assert program.simulate(KEY)["x"].shape == (n, 3)
    close(program.assess({"x": x})[0], normal(x, means[:, None], scale).sum())


@pytest.mark.parametrize("n", [3, 5])
def test_a_repeated_site_under_vmap_is_not_transposed(n):
    """G2: `sample_shape` and `repeat(k)` under a vmap: (5, 3) for (3, 5); for k == n lanes took each other's means."""
    means = 1000.0 * np.arange(n)
    x = np.linspace(0.0, 1.0, 5 * n).reshape(n, 5)
    for repeat in (
        lambda m: ex.sample("x", dist.Normal(m, 1.0).expand([5])),
        lambda m: jax.vmap(lambda _: ex.sample("x", dist.Normal(m, 1.0)))(jnp.zeros(5)),
        lambda m: jax.vmap(lambda: ex.sample("x", dist.Normal(m, 1.0)), axis_size=5)(),
    ):
        program = ex.model(jax.vmap(repeat))(jnp.array(means))
        drawn = np.asarray(program.simulate(KEY)["x"])
        assert drawn.shape == (n, 5) and np.abs(drawn - means[:, None]).max() < 10.0
        assert np.unique(drawn).size == drawn.size
        close(program.assess({"x": x})[0], normal(x, means[:, None]).sum())


@pytest.mark.parametrize("particles", [8, 5])
def test_eight_schools_with_eight_particles(particles):
    """G2: `inference.init` of eight schools with 1000 particles raised; with exactly 8 the lanes were transposed."""
    posterior = schools(jnp.array(ERROR)).given({"y": EFFECT})
    cloud = inference.importance(posterior, key=KEY, num_particles=particles)
    theta = np.asarray(cloud.choices["theta"])
    assert theta.shape == (particles, 8)
    close(cloud.log_weights, normal(EFFECT, theta, ERROR).sum(axis=1))


def test_a_batch_of_traces_keeps_one_density_per_trace():
    """G2: `get_score()` of a particle-batched trace was summed over the particles."""
    traces = jax.vmap(schools(jnp.array(ERROR)).simulate)(jax.random.split(KEY, 5))
    assert traces.log_density.shape == (5,)
    densities = [
        schools(jnp.array(ERROR)).assess(jax.tree.map(lambda v, n=n: v[n], traces.choices))[0] for n in range(5)
    ]
    close(traces.log_density, densities)


def test_a_vector_of_a_scalar_distribution_has_one_density():
    """G2: `normal(vec, 1.)` gave `assess` a vector log p, and the trace its sum."""
    program = ex.model(lambda: ex.sample("x", dist.Normal(jnp.arange(3.0), 1.0)))()
    density, _ = program.assess({"x": jnp.zeros(3)})
    assert density.shape == ()
    close(density, normal(np.arange(3.0)).sum())


def test_a_function_drawn_with_two_shapes_draws_anew():
    """G2: a sampler staged for () and reused for (4,) gave four identical draws."""
    draw = lambda address, shape: ex.sample(address, dist.Normal(jnp.zeros(shape), 1.0))  # noqa: E731
    trace = ex.model(lambda: (draw("a", ()), draw("b", (4,)), draw("c", (4,))))().simulate(KEY)
    values = np.concatenate([np.ravel(v) for v in trace.choices.values()])
    assert trace["b"].shape == (4,) and np.unique(values).size == 9


def test_a_model_takes_keywords_and_maps_them():
    """G1: `.vmap` broke `generate` and `assess` with its default `in_axes`, and refused keyword arguments."""
    program = ex.model(lambda *, mean: jax.vmap(lambda m: ex.sample("x", dist.Normal(m, 1.0)))(mean))(
        mean=jnp.arange(3.0)
    )
    trace, weight = program.generate(KEY, {"x": jnp.zeros(3)})
    close([weight, trace.log_density, program.assess({"x": jnp.zeros(3)})[0]], [normal(np.arange(3.0)).sum()] * 3)
