"""The checklist of the paper's system, F1 to F10 and F35 to F39, by name; F6 to F10 stand in `test_marginal`, F40 in
`test_more_objectives_gaussian`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import expectax as ex
from expectax import dist, models, vi
from expectax.ppl import AddressError

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(20261128)


@ex.model
def pair():
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    ex.sample("b", dist.Normal(a, 2.0))


@ex.model
def same_twice():
    ex.sample("a", dist.Normal(0.0, 1.0))
    ex.sample("a", dist.Normal(0.0, 1.0))


def test_f1_a_choice_is_recorded_at_its_address_once():
    assert set(pair().simulate(KEY).choices) == {"a", "b"}
    with pytest.raises(AddressError, match="'a' is used twice"):
        same_twice().simulate(KEY)


def bounds_of(posterior: Any, guide: Any) -> dict[str, Any]:
    """Every shipped objective of a posterior and a guide whose value is a bound or a weighted density."""
    return {
        "elbo": vi.elbo(posterior, guide),
        "iwelbo": vi.iwelbo(posterior, guide, 3),
        "renyi": vi.renyi(posterior, guide, 3, alpha=0.5),
        "vimco": vi.vimco(posterior, guide, 3),
        "dreg": vi.dreg(posterior, guide, 3),
        "stl": vi.stl(posterior, guide),
        "thermodynamic": vi.thermodynamic(posterior, guide, 3, (0.0, 0.3, 1.0)),
        "wake_model": vi.wake_model(posterior, guide, 3),
        "iwhvi": vi.iwhvi(posterior, with_auxiliary, 2),
        "diwhvi": vi.diwhvi(posterior, with_auxiliary, 2, 2),
        "normalized": vi.elbo(posterior, lambda p: vi.normalize(posterior, vi.sir(3, guide(p)))),
    }


@ex.model
def guide(p):
    ex.sample("a", dist.Normal(p, 1.0))


@ex.model
def with_auxiliary(p):
    u = ex.sample("u", dist.Normal(p, 0.5))
    ex.sample("a", dist.Normal(u, 1.0))


def extended(how: str, amount: float) -> Any:
    @ex.model
    def longer():
        a = ex.sample("a", dist.Normal(0.0, 1.0))
        ex.sample("b", dist.Normal(a, 2.0))
        if how == "score":
            ex.factor("extra", jnp.asarray(amount))
        elif how == "observe":
            ex.observe("extra", dist.Normal(amount, 1.0), 0.0)

    return longer().given({"b": 1.0})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("how", "amount", "change"),
    [("score", -100.0, -100.0), pytest.param("observe", 3.0, None, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", sorted(bounds_of(extended("none", 0.0), guide)))
def test_f2_observe_and_score_change_every_objective_by_their_exact_amount(name, how, amount, change):
    """The peer's ELBO did not see a score at all."""
    change = float(stats.norm.logpdf(0.0, amount, 1.0)) if change is None else change
    plain, more = (bounds_of(extended(h, amount), guide)[name] for h in ("none", how))
    difference = more.surrogate(0.4, KEY) - plain.surrogate(0.4, KEY)
    assert abs(difference - change) < 1e-9


@pytest.mark.usefixtures("x64")
def test_f3_the_density_of_a_simulation_is_that_of_its_choices():
    @vi.objective
    def twice(p):
        choices, log_q = vi.simulate(guide(p))
        return log_q - vi.log_density(guide(p), choices)

    assert all(abs(twice.surrogate(0.3, key)) < 1e-12 for key in jax.random.split(KEY, 5))
    trace = pair().simulate(KEY)
    assert abs(pair().assess(trace.choices)[0] - trace.log_density) < 1e-12


@pytest.mark.usefixtures("x64")
def test_f4_a_nested_program_has_the_density_of_the_program():
    @ex.model
    def outer():
        ex.sample("inner", pair())

    @ex.model
    def written_out():
        pair.function()

    choices = {"a": 0.3, "b": -1.0}
    assert abs(outer().assess({"inner": choices})[0] - pair().assess(choices)[0]) < 1e-12
    assert abs(written_out().assess(choices)[0] - pair().assess(choices)[0]) < 1e-12


@pytest.mark.usefixtures("x64")
def test_f5_the_weight_of_some_constraints_is_their_density():
    trace, log_weight = pair().generate(KEY, {"b": 1.0})
    assert abs(log_weight - stats.norm.logpdf(1.0, float(trace["a"]), 2.0)) < 1e-12
    assert pair().generate(KEY, {})[1] == 0.0


# --- the cone ---------------------------------------------------------------------------------------------------

EVIDENCE = -5.3232


def trained(objective: Any, start: Any, num_steps: int = 5000, rate: float = 1e-3) -> Any:
    fit = vi.fit(objective, start, optax.sgd(rate), key=KEY, num_steps=num_steps, num_samples=64)
    return vi.estimate(objective, fit.params, jax.random.key(1), 20_000)


NAIVE, RING = lambda far: models.cone_start(3.0 if far else 0.0), lambda far: models.ring_start()
POSTERIOR = models.cone_posterior


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective", "start", "value"),
    [
        ("F35", lambda p: vi.elbo(p, models.cone_guide), NAIVE, -8.08),
        ("F36", lambda p: vi.iwelbo(p, models.cone_guide, 5), NAIVE, -7.53),
        ("F37", lambda p: vi.hvi(p, models.ring_guide), RING, -9.74),
        ("F38", lambda p: vi.iwhvi(p, models.ring_guide, 5), RING, -8.17),
        ("F39", lambda p: vi.diwhvi(p, models.ring_guide, 5, 5), RING, -7.32),
    ],
    ids=["F35 elbo", "F36 iwelbo", "F37 hvi", "F38 iwhvi", "F39 diwhvi"],
)
def test_the_cones_values(name, objective, start, value):
    """Plain gradient ascent as in the paper, batch 64; all of them are lower bounds."""
    estimate = trained(objective(POSTERIOR()), start(name == "F36"))
    assert abs(estimate.mean - value) < 0.05
    assert estimate.mean < EVIDENCE


@pytest.mark.slow
def test_many_particles_come_near_the_evidence():
    estimate = trained(vi.diwhvi(POSTERIOR(), models.ring_guide, 50, 50), RING(False), 500, 1e-2)
    assert -6.0 < estimate.mean < EVIDENCE


def test_f36_the_bound_grows_with_the_particles():
    """At fixed parameters; each difference is many standard errors."""
    values = [
        np.asarray(vi.estimate(vi.diwhvi(POSTERIOR(), models.ring_guide, n, 5), RING(False), KEY, 4000))
        for n in (1, 3, 10, 30)
    ]
    means, errors = np.stack([v[0] for v in values]), np.stack([v[1] for v in values])
    assert np.all(np.diff(means) > 5 * np.hypot(errors[1:], errors[:-1]))
    assert means[-1] < EVIDENCE
