"""NUTS with its default settings against the long reference runs of twelve posteriors of posteriordb."""

import warnings

import jax
import numpy as np
import pytest

from expectax import inference
from expectax.models import posteriordb

KEY = jax.random.key(20261125)
pytestmark = pytest.mark.by_hand  # a quarter of a minute each, but Lotka and Volterra's equations, which take minutes


def worst_z(loaded: posteriordb.StanPosterior, chains: inference.Chains) -> tuple[float, str]:
    """Return the largest |z| of a mean or second moment, and whose it is; both runs' Monte Carlo errors count."""
    draws = {name: np.asarray(v, np.float64) for name, v in loaded.parameters(chains.choices).items()}
    means = inference.summarize(draws)
    squares = inference.summarize({name: v**2 for name, v in draws.items()})
    found = []
    for name, reference in loaded.reference.items():
        moments = [(means[name], reference.mean, reference.mcse_mean)]
        if reference.mcse_second_moment is not None:
            moments.append((squares[name], reference.second_moment, reference.mcse_second_moment))
        for power, (row, expected, error) in enumerate(moments, 1):
            assert row.r_hat < 1.03 and row.ess_bulk > 100, (name, row)
            found.append((abs(row.mean - expected) / float(np.hypot(row.mcse_mean, error)), f"E[{name}^{power}]"))
    return max(found)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", posteriordb.names())
def test_nuts_agrees_with_the_reference(name):
    """|z| > 5 twice, the second time with a fresh key and four times the draws.

    The least error that is seen is 5 Monte Carlo errors of 4,000 draws, about a tenth of a posterior sd.
    """
    loaded = posteriordb.load(name)
    for key, num_samples in zip(jax.random.split(KEY), (1000, 4000), strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "mcmc.*diverged")
            chains = inference.mcmc(loaded.posterior, inference.nuts(), key=key, num_samples=num_samples)
        z, which = worst_z(loaded, chains)
        if z <= 5:
            return
    pytest.fail(f"{name}: |z| = {z:.1f} for {which}")
