"""Eight schools, non-centred: the model is `expectax.models.eight_schools`.

Source: posteriordb `eight_schools-eight_schools_noncentered` (BSD-3-Clause). Data: D. B. Rubin, "Estimation in parallel
randomized experiments", Journal of Educational Statistics 6 (1981), table 1.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from expectax.models._eight_schools import eight_schools
from expectax.ppl import Posterior

from ._stan import Entry, Parameter, Values, positive, real


def _condition(data: dict[str, Any]) -> Posterior:
    return eight_schools(jnp.array(data["sigma"], float)).given({"y": jnp.array(data["y"], float)})


def _latents(values: Values) -> Values:
    return {"mu": values["mu"], "tau": values["tau"], "z": values["theta_trans"]}


def _quantities(latents: Values) -> Values:
    mu, tau, z = latents["mu"], latents["tau"], latents["z"]
    return {"theta": mu[..., None] + tau[..., None] * z, "mu": mu, "tau": tau}


ENTRY = Entry(
    _condition,
    (Parameter("theta_trans", real, (8,)), Parameter("mu", real), Parameter("tau", positive)),
    _latents,
    _quantities,
)
