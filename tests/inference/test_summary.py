"""Summaries against ArviZ's own numbers, names, printing, and the export to ArviZ 0.x and 1.x."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expectax import dist, inference, ppl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

KEY = jax.random.key(20260807)


@ppl.model
def effects(x):
    mu = ppl.sample("mu", dist.Normal(0.0, 1.0))
    theta = jax.vmap(lambda _: ppl.sample("theta", dist.Normal(mu, 1.0)))(x)
    ppl.sample("y", dist.Normal(theta, x))


OBSERVED = np.array([0.3, -0.2, 1.0])


@pytest.fixture(scope="module")
def posterior():
    with jax.enable_x64(True):
        return effects(jnp.array([1.0, 2.0, 0.5])).given({"y": OBSERVED})


@pytest.fixture(scope="module")
def chains(posterior):
    with jax.enable_x64(True):
        return inference.mcmc(posterior, inference.hmc(), key=KEY, num_warmup=200, num_samples=250)


def variable(group: Any, name: str) -> np.ndarray:
    """Return a variable of a Dataset or of a DataTree's posterior group."""
    return np.asarray(group["posterior"][name] if "posterior" in getattr(group, "children", {}) else group[name])


def test_diagnostics_are_arviz_own(chains, posterior):
    summary, data = chains.summary(), chains.to_arviz(posterior)
    theirs = {
        "r_hat": az.rhat(data),
        "ess_bulk": az.ess(data, method="bulk"),
        "ess_tail": az.ess(data, method="tail", prob=(0.05, 0.95)),
        "mcse_mean": az.mcse(data, method="mean"),
    }
    assert list(summary) == ["mu", "theta[0]", "theta[1]", "theta[2]"]
    for column, group in theirs.items():
        got = [getattr(summary[f"theta[{i}]"], column) for i in range(3)] + [getattr(summary["mu"], column)]
        np.testing.assert_allclose(got, [*variable(group, "theta"), variable(group, "mu")], rtol=1e-10)
    draws = np.asarray(chains.choices["theta"], np.float64)[..., 2]
    np.testing.assert_allclose(summary["theta[2]"].mean, draws.mean(), rtol=1e-12)
    np.testing.assert_allclose(summary["theta[2]"].sd, draws.std(ddof=1), rtol=1e-12)


def test_diagnostics_see_bad_chains():
    """Independent draws have R-hat 1 and full size; chains apart, or that crawl, do not."""
    rng = np.random.default_rng(0)
    good = rng.normal(size=(4, 1000))
    apart, crawling = good + np.arange(4)[:, None], np.cumsum(good, 1)
    summary = inference.summarize({"good": good, "apart": apart, "crawling": crawling})
    assert abs(summary["good"].r_hat - 1) < 0.01 and 3000 < summary["good"].ess_bulk < 5000
    np.testing.assert_allclose(summary["good"].mcse_mean, 1 / np.sqrt(4000), rtol=0.2)
    assert summary["apart"].r_hat > 1.3 and summary["crawling"].ess_bulk < 40


def test_names_and_table():
    rng = np.random.default_rng(1)
    choices = {"a": {"b": rng.normal(size=(2, 50, 2, 2))}, "long_name": 100 + rng.normal(size=(2, 50))}
    summary = inference.summarize(choices)
    assert list(summary) == ["a/b[0,0]", "a/b[0,1]", "a/b[1,0]", "a/b[1,1]", "long_name"]
    head, *lines = str(summary).splitlines()
    assert head.split() == ["mean", "sd", "mcse", "ess_bulk", "ess_tail", "r_hat"]
    assert len(lines) == 5 and len({len(line) for line in [head, *lines]}) == 1
    assert lines[-1].startswith("long_name") and float(lines[-1].split()[1]) == round(summary["long_name"].mean, 3)
    assert repr(summary) == str(summary)


def test_one_draw_is_no_error():
    row = inference.summarize({"x": np.ones((1, 1))})["x"]
    assert row.mean == 1.0 and np.isnan(row.sd)


def test_export_and_back(chains, posterior):
    data = chains.to_arviz(posterior)
    np.testing.assert_array_equal(data["posterior"]["theta"].values, chains.choices["theta"])
    assert data["posterior"]["theta"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(data["observed_data"]["y"].values, OBSERVED)
    names = {"divergent": "diverging", "num_integration_steps": "n_steps", "log_density": "lp"}
    for ours, values in chains.statistics.items():
        np.testing.assert_array_equal(data["sample_stats"][names.get(ours, ours)].values, values)
    assert "observed_data" not in list(getattr(chains.to_arviz(), "children", chains.to_arviz()))


def test_export_to_a_file_and_back(chains, posterior, tmp_path):
    pytest.importorskip("h5netcdf")
    path = str(tmp_path / "chains.nc")
    chains.to_arviz(posterior).to_netcdf(path, engine="h5netcdf")
    back = az.from_netcdf(path, engine="h5netcdf")
    np.testing.assert_array_equal(back["posterior"]["theta"].values, chains.choices["theta"])
    np.testing.assert_array_equal(back["observed_data"]["y"].values, OBSERVED)


def test_export_of_a_nested_model(tmp_path):
    outer = ppl.model(lambda: ppl.sample("inner", ppl.model(lambda: ppl.sample("x", dist.Normal(0.0, 1.0)))()))
    chains = inference.mcmc(outer().given({}), inference.hmc(), key=KEY, num_warmup=0, num_samples=4)
    group = chains.to_arviz()["posterior"]
    (name,) = group.data_vars
    np.testing.assert_array_equal(group[name].values, chains.choices["inner"]["x"])
    assert "/" not in str(name)  # neither a file nor ArviZ 1's DataTree can hold such a name
