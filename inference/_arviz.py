"""Export to ArviZ, old (0.x, `InferenceData`) and new (1.x, `DataTree`)."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from expectax.ppl import Posterior
from expectax.ppl._nested import leaves_of

if TYPE_CHECKING:
    from ._mcmc import Chains

_NAMES = {"divergent": "diverging", "num_integration_steps": "n_steps", "log_density": "lp"}


def to_arviz(chains: Chains, posterior: Posterior | None = None) -> Any:
    """Return draws, sampler statistics (with ArviZ's names) and, if given, the observations."""
    groups = {
        "posterior": dict(_arrays(chains.choices)),
        "sample_stats": {_NAMES.get(n, n): np.asarray(v) for n, v in jax.device_get(chains.statistics).items()},
    }
    if posterior is not None:
        groups["observed_data"] = dict(_arrays(posterior.observations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own refactoring at import
        import arviz as az

        takes_groups = "posterior" not in inspect.signature(az.from_dict).parameters
        return az.from_dict(groups) if takes_groups else az.from_dict(**groups)


def _arrays(choices: dict[str, Any]) -> Any:
    # netCDF files and ArviZ 1 have no '/' in names
    return ((path.replace("/", "."), np.asarray(value)) for path, value in leaves_of(jax.device_get(choices)))
