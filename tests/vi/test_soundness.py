"""What jumps in a reparametrised draw is refused, at its line; what resembles it and does not is right and accepted."""

import dataclasses
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unsound_cases
from numpyro.distributions import biject_to
from scipy import stats
from sound_cases import SOUND
from unsound_cases import INFINITE, UNSOUND

import expectax as ex
from expectax import dist, vi
from expectax.models import posteriordb
from expectax.ppl import AddressError, ControlFlowError, SoundnessError, SupportError
from expectax.ppl._nested import leaves_of
from helpers import two_stage_z

KEY = jax.random.key(20261101)
P = jnp.asarray(0.4)
REINFORCE = vi.Reinforce(baseline=None)
DRAWS = 20_000


def objective(case: Any, how: Any, allow: Any = ()) -> Any:
    return dataclasses.replace(vi.objective(lambda p: case(p, how)), allow=frozenset(allow))


def stage(objective: Any) -> None:
    objective.staged(P)


def gradients(objective: Any) -> Any:
    run = jax.jit(jax.vmap(lambda key: jax.grad(objective.surrogate)(P, key)))
    return lambda key, n: run(jax.random.split(key, n))


def names(cases: Any) -> list[str]:
    return [case.__name__ for case in cases]


@pytest.mark.parametrize("case", UNSOUND, ids=names(UNSOUND))
def test_jumps_are_refused(case):
    """The message names the site, and the line of the operation (of the density, where a support jumps)."""
    lines, start = inspect.getsourcelines(case)
    (number,) = [start + n for n, text in enumerate(lines) if text.rstrip().endswith("# jump")]
    with pytest.raises(SoundnessError, match="'(sub/)?x'") as caught:
        stage(objective(case, vi.Reparam()))
    message = str(caught.value)
    assert f"unsound_cases.py:{number}" in message
    assert "vi.Reinforce()" in message and "allowing(" in message


def addresses(case: Any) -> set[str]:
    """The sites that the refusal says may be allowed, one refusal after the other."""
    found: set[str] = set()
    while True:
        try:
            stage(objective(case, vi.Reparam(), found))
        except SoundnessError as error:
            new = set(re.findall(r"'([^']+)'", str(error).rsplit("allowing(", 1)[1]))
            assert new - found
            found |= new
        else:
            return found


@pytest.mark.parametrize("case", UNSOUND, ids=names(UNSOUND))
def test_the_score_function_may_jump(case):
    """The same objectives with `Reinforce` are accepted, and with `allow`."""
    stage(objective(case, REINFORCE))
    assert addresses(case) <= {"x", "y", "sub/x"}


BIASED = [case for case in UNSOUND if case.__name__ not in INFINITE]


@pytest.mark.slow
@pytest.mark.parametrize("case", BIASED, ids=names(BIASED))
def test_what_is_refused_is_biased(case):
    """Allowed, its pathwise gradient differs from the score-function one: a refusal of what is right would fail here."""
    pathwise = np.asarray(gradients(objective(case, vi.Reparam(), addresses(case)))(KEY, DRAWS), float)
    score = np.asarray(gradients(objective(case, REINFORCE))(jax.random.fold_in(KEY, 1), DRAWS), float)
    error = np.sqrt(pathwise.var() / DRAWS + score.var() / DRAWS)
    assert abs(pathwise.mean() - score.mean()) > 5.0 * error


@pytest.mark.slow
@pytest.mark.parametrize("case", SOUND, ids=names(SOUND))
def test_what_is_accepted_is_right(case):
    """Its pathwise gradient has the mean of the score-function gradient, which needs no continuity."""
    pathwise, score = gradients(objective(case, vi.Reparam())), gradients(objective(case, REINFORCE))

    def difference(key: Any, n: int) -> Any:
        return np.asarray(pathwise(key, n)) - np.asarray(score(jax.random.fold_in(key, 1), n))

    two_stage_z(difference, np.zeros(()), KEY, DRAWS)


def test_indicator_of_a_normal_has_the_right_derivative():
    """d/dm P(x < 0.3) = -phi(0.3 - m): the pathwise estimate would be 0."""
    truth = -stats.norm.pdf(0.3 - float(P))
    two_stage_z(gradients(objective(unsound_cases.indicator, REINFORCE)), np.asarray(truth), KEY, 50_000)


@pytest.mark.parametrize("how", [vi.Reparam(), REINFORCE])
def test_a_step_that_the_parameter_moves_is_refused_whatever_the_strategy(how):
    """d/dp E = (3 - p) / 2, of which neither strategy sees anything; but a kink there is right."""
    case = unsound_cases.noise_against_a_parameter
    lines, start = inspect.getsourcelines(case)
    with pytest.raises(SoundnessError, match=f"'x'.*unsound_cases.py:{start + len(lines) - 1}"):
        stage(objective(case, how))
    found = np.asarray(gradients(objective(case, how, {"x"}))(KEY, 1000))
    assert abs(found.mean() - (3.0 - float(P)) / 2.0) > 1.0


def test_stop_gradient_ends_the_dependence():
    """A straight-through estimator is biased by the user's own statement."""

    @vi.objective
    def straight_through(p):
        x = ex.sample("x", dist.Normal(p, 1.0))
        return (x + jax.lax.stop_gradient(jnp.round(x) - x)) ** 2

    stage(straight_through)


# --- allow ------------------------------------------------------------------------------------------------------------


def test_allow_names_sites():
    case = unsound_cases.indicator
    stage(objective(case, vi.Reparam(), {"x"}))
    with pytest.raises(AddressError, match="'xx'.*Did you mean 'x'"):
        stage(objective(case, vi.Reparam(), {"xx"}))
    two = objective(unsound_cases.rounded_cost, vi.Reparam(), {"y"})
    with pytest.raises(SoundnessError, match="'x'"):
        stage(two)
    stage(objective(unsound_cases.rounded_cost, vi.Reparam(), {"x", "y"}))


# --- refused elsewhere, before ----------------------------------------------------------------------------------------


def sampler_in_a_while_loop(p):
    return jax.lax.while_loop(lambda x: x < 1.0, lambda x: x + ex.sample("x", dist.Normal(p, 1.0)), 0.0)


def sampler_in_a_derivative(p):
    return jax.grad(lambda m: ex.sample("x", dist.Normal(m, 1.0)))(p)


@pytest.mark.parametrize("cost", [sampler_in_a_while_loop, sampler_in_a_derivative])
def test_samplers_in_unknown_places_are_refused(cost):
    with pytest.raises(ControlFlowError, match="'x'"):
        stage(vi.objective(cost))


@pytest.mark.parametrize(
    ("address", "guide", "error"),
    [
        ("x", dist.Normal(0.0, 1.0), SupportError),
        ("x", dist.Uniform(-1.0, 1.0), SupportError),
        ("z", dist.LogNormal(0.0, 1.0), AddressError),
    ],
)
def test_guides_that_do_not_fit_are_refused(address, guide, error):
    @ex.model
    def model():
        ex.sample("x", dist.HalfNormal(1.0))

    with pytest.raises(error, match=repr(address)):
        stage(vi.elbo(model().given({}), ex.model(lambda p: ex.sample(address, guide))))


# --- no false alarms --------------------------------------------------------------------------------------------------


@ex.model
def mean_field(posterior, p):
    """A reparametrised draw for every latent; a bound that moves, moves here too."""
    chosen: dict[str, Any] = {}
    for path, entry in leaves_of(posterior.latent_sites()):
        support = entry.site.support
        if support is None:  # garch's beta1, below 1 - alpha1
            support = dist.constraints.interval(0.0, 1.0 - chosen["alpha1"])
        transform = biject_to(support)
        base = dist.Normal(p * jnp.ones(transform.inverse_shape(entry.shape)), 0.3)
        base = base.to_event(support.event_dim)
        chosen[path] = ex.sample(path, dist.TransformedDistribution(base, transform))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", posteriordb.names())
def test_posteriors_with_mean_field_guides_are_accepted(name, particles):
    posterior = posteriordb.load(name).posterior

    def particle(p):  # not `vi.elbo`: numpyro does not know the support of this guide for an ordered positive vector
        z, log_q = vi.simulate(mean_field(posterior, p))
        return vi.log_density(posterior, z) - log_q

    def bound(p):
        return jax.nn.logsumexp(jax.vmap(lambda _: particle(p))(jnp.arange(particles)))

    stage(vi.objective(particle if particles == 1 else bound))
