"""Particle Gibbs leaves the posterior invariant, by enumeration: each rule, each conditional resampler, models of all forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from expectax import dist, inference, ppl
from expectax.inference._future import carry_is_chosen
from expectax.inference._sequence import Sequence
from expectax.inference._valid import matches
from expectax.ppl._joint_values import joint_values
from filter_models import MODELS, Y, coin, guided, look

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")
METHODS = ("multinomial", "systematic", "stratified", "residual", "killing")
RULES: dict[str, dict[str, Any]] = {
    "genealogy": {"ancestor_sampling": False},
    "ancestor": {},
    "backward": {"backward_sampling": True},
}


@ppl.model
def noise():
    """The carry is not among the choices: a walk written in its noise."""

    def step(x, _):
        x = 0.5 * x + coin("e", 0.4)
        look("y", x)
        return x, None

    lax.scan(step, 0.0, None, length=3)


@ppl.model
def remembering():
    """A carry that remembers more than the last choice."""

    def step(state, _):
        z, mean = state
        z = coin("z", 0.2 + 0.3 * z + 0.3 * mean)
        look("y", z)
        return (z, 0.5 * (mean + z)), None

    lax.scan(step, (0.0, jnp.zeros(())), None, length=3)


def check_invariant(posterior: Any, kernel: Any) -> Any:
    """Prove that a start from the posterior stays there; return how probable it is that the latents move."""
    target = inference.Target(posterior)
    values = joint_values(posterior, "the test")
    density = np.exp(np.asarray(jax.jit(jax.vmap(posterior.log_density))(values)))
    density = density / density.sum()

    def moved():
        start = ppl.sample("start", dist.Categorical(probs=jnp.asarray(density)))
        latents = jax.tree.map(lambda v: v[start], values)
        state, info = kernel.step(target, kernel.init(target, latents), ())
        one = jax.tree.map(lambda v: jnp.asarray(v)[None], state.position)
        found = matches(values, one)[:, 0].astype(float)
        return found, found[start], info.acceptance_rate

    found, stayed, rate = inference.exact(moved).expectation()
    np.testing.assert_allclose(found, density, atol=1e-10)
    assert 0 < rate < 1
    return 1 - stayed


FEW = [("multinomial", rule) for rule in RULES] + [(method, "ancestor") for method in METHODS[1:]]
REST = [(method, rule) for method in METHODS[1:] for rule in ("genealogy", "backward")]
GRID = [*FEW, *(pytest.param(*pair, marks=pytest.mark.by_hand) for pair in REST)]


@pytest.mark.parametrize(("method", "rule"), GRID)
def test_every_rule_and_resampler(rule, method):
    assert check_invariant(MODELS["chain"](), inference.particle_gibbs(2, method=method, **RULES[rule])) > 0.1


@pytest.mark.by_hand
@pytest.mark.parametrize("method", METHODS)
def test_three_particles(method):
    """With two particles some errors in the reference's place cancel."""
    assert check_invariant(MODELS["backwards"](), inference.particle_gibbs(3, method=method)) > 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", [pytest.param("several", marks=pytest.mark.by_hand), "backwards", "latents_before", "nested", "lanes"]
)
def test_models_of_every_form(name, rule):
    check_invariant(MODELS[name](), inference.particle_gibbs(2, **RULES[rule]))


@pytest.mark.parametrize("rule", RULES)
def test_guided(rule):
    check_invariant(MODELS["chain"](), inference.particle_gibbs(2, proposal=guided, **RULES[rule]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("model", "address"), [(noise, "e"), (remembering, "z")])
def test_a_carry_that_the_choices_do_not_determine(model, address, rule):
    """Ancestor weights then need the whole future: with the next step alone these two fail."""
    posterior = model().given({"y": Y})
    assert not carry_is_chosen(Sequence.of(posterior.program, "the test"))
    check_invariant(posterior, inference.particle_gibbs(2, **RULES[rule]))


def test_where_the_choices_determine_the_carry():
    """Read off the equations; a nested model is looked into, a record of the old carry is not taken for a choice."""
    chosen = {name: carry_is_chosen(Sequence.of(MODELS[name]().program, "the test")) for name in MODELS}
    assert chosen == {
        "chain": True, "several": False, "backwards": True, "latents_before": True, "sites_after": True, "nested": True,
        "lanes": True,
    }  # fmt: skip

    @ppl.model
    def recorded():
        def step(z, _):
            coin("z", 0.5)
            return ppl.deterministic("old", 0.5 * z), None

        lax.scan(step, 1.0, None, length=2)

    assert not carry_is_chosen(Sequence.of(recorded(), "the test"))


def test_rules_move_early_times_more():
    """Ancestor and backward sampling renew the start of the path, which the genealogy of few particles does not."""
    posterior = MODELS["chain"]()
    share = {rule: check_invariant(posterior, inference.particle_gibbs(2, **RULES[rule])) for rule in RULES}
    assert min(share["ancestor"], share["backward"]) > share["genealogy"] + 0.01


def test_refusals():
    with pytest.raises(ValueError, match="no conditional form.*'killing'"):
        inference.particle_gibbs(2, method="ssp")
    with pytest.raises(ValueError, match="method must be one of"):
        inference.particle_gibbs(2, method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_particles >= 2"):
        inference.particle_gibbs(1)

    def step(posterior, correction=None):
        target, kernel = inference.Target(posterior, correction), inference.particle_gibbs(2)
        latents = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), posterior.latent_shapes)
        return inference.keyed(lambda: kernel.step(target, kernel.init(target, latents), ()))(jax.random.key(0))

    with pytest.raises(ppl.ControlFlowError, match="after its scan"):
        step(MODELS["sites_after"]())
    with pytest.raises(ppl.ControlFlowError, match="tempered"):
        step(MODELS["chain"](), lambda z: 0.0)
    with pytest.raises(ppl.ShapeError, match="'y' are given in part"):
        step(MODELS["chain"]().program.given({"y": ppl.masked(np.array([0.3, np.nan, 0.1]))}))
