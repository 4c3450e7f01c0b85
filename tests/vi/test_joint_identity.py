"""The public check of a user's algorithm: right ones pass, wrong ones do not; its false alarms are rarer than it says."""

from typing import Any

import jax
import numpy as np
import pytest

import expectax as ex
from expectax import dist, vi

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(61)


@ex.model
def chain():
    u = ex.sample("u", dist.Normal(0.0, 1.0))
    ex.sample("x", dist.Normal(u, 1.0))


@ex.model
def reference():
    ex.sample("x", dist.Normal(0.0, 2.0))


@ex.model
def posterior_reference():
    ex.sample("u", dist.Normal(0.0, 1.2))


@ex.model
def wide():
    ex.sample("u", dist.Normal(0.0, 2.0))


class Forgetful:
    """The weight of a particle is the joint density: its proposal is forgotten (a peer's defect)."""

    def run(self, target: Any) -> vi.Run:
        z, _ = vi.simulate(wide())
        log_p = vi.log_density(target, z)
        return vi.Run(z, log_p, log_p)

    def conditional(self, target: Any, latents: Any, log_density: Any) -> Any:
        return log_density


class Fresh:
    """The conditional run does not hold the given latents."""

    def run(self, target: Any) -> vi.Run:
        return vi.sir(2, wide()).run(target)

    def conditional(self, target: Any, latents: Any, log_density: Any) -> Any:
        return vi.sir(2, wide()).run(target).log_evidence


RIGHT = {
    "sir1": vi.sir(1),
    "sir3_heavy": vi.sir(3, wide()),
    "smc": vi.smc(4, vi.random_walk(1.0)),
    "langevin": vi.smc(3, vi.langevin(0.7), temperatures=4),
    "mcmc": vi.mcmc(vi.langevin(0.7), 5),
}


@pytest.mark.parametrize("name", [n if n.startswith("sir") else pytest.param(n, marks=pytest.mark.slow) for n in RIGHT])
def test_right_algorithms_pass(name):
    program = vi.marginal(chain(), "x", RIGHT[name])
    assert vi.check_joint_identity(program, reference(), KEY).p_value > 1e-3
    if name != "sir1":
        target = vi.normalize(chain().given({"x": 1.0}), RIGHT[name])
        assert vi.check_joint_identity(target, posterior_reference(), KEY).p_value > 1e-3


@pytest.mark.parametrize("algorithm", [Forgetful(), Fresh()], ids=["forgetful", "fresh"])
def test_wrong_algorithms_are_found(algorithm):
    check = vi.check_joint_identity(vi.marginal(chain(), "x", algorithm), reference(), KEY)
    assert check.p_value < 1e-6
    assert abs(check.z_scores[check.worst]) > 6


@pytest.mark.slow
def test_false_alarms_are_rare():
    """Forty right checks: the smallest p-value of 40 is below 1e-4 with a probability of 0.4 per cent at most."""
    program = vi.marginal(chain(), "x", vi.sir(2))
    checks = [vi.check_joint_identity(program, reference(), key, 2000) for key in jax.random.split(KEY, 40)]
    assert min(check.p_value for check in checks) > 1e-4
    assert np.std([z for check in checks for z in check.z_scores.values()]) < 1.15


def test_what_does_not_fit_is_refused():
    program = vi.marginal(chain(), "x", vi.sir(2))
    with pytest.raises(ex.ppl.AddressError, match="'u'"):
        vi.check_joint_identity(program, wide(), KEY)
    with pytest.raises(ValueError, match="num_samples"):
        vi.check_joint_identity(program, reference(), KEY, 10)
