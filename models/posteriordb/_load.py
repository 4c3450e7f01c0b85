"""Names of the posteriors, and what `load` returns."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from expectax.ppl import AddressError, Posterior, ShapeError
from expectax.ppl._errors import nearest

from . import (
    _blr,
    _eight_schools,
    _garch,
    _gaussian_process,
    _hidden_markov,
    _kidiq,
    _logearn,
    _lotka_volterra,
    _mesquite,
    _mixture,
    _nes,
    _wells,
)
from ._records import Points, Reference, points, read, references
from ._stan import Entry, constrain, size

_ENTRIES: dict[str, Entry] = {
    "earnings-logearn_height": _logearn.ENTRY,
    "eight_schools-eight_schools_noncentered": _eight_schools.ENTRY,
    "garch-garch11": _garch.ENTRY,
    "gp_pois_regr-gp_regr": _gaussian_process.ENTRY,
    "hmm_example-hmm_example": _hidden_markov.ENTRY,
    "hudson_lynx_hare-lotka_volterra": _lotka_volterra.ENTRY,
    "kidiq-kidscore_momiq": _kidiq.ENTRY,
    "low_dim_gauss_mix-low_dim_gauss_mix": _mixture.ENTRY,
    "mesquite-logmesquite_logvash": _mesquite.ENTRY,
    "nes1980-nes": _nes.ENTRY,
    "sblrc-blr": _blr.ENTRY,
    "wells_data-wells_dist": _wells.ENTRY,
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StanPosterior:
    """A posterior of posteriordb as an expectax program, beside what Stan says about it. Made by `load`.

    Example: see `load`.

    Attributes:
        name: posteriordb's name, data and model joined by a hyphen.
        posterior: the model bound to its data and given its observations.
        reference: moments by scalar quantity, named as in posteriordb (`"beta[1]"`, counted from one).
        points: Stan's log density and gradient at four points.
    """

    name: str
    posterior: Posterior
    reference: dict[str, Reference]
    points: Points
    _entry: Entry

    def latents(self, unconstrained: Float[Array, " d"]) -> dict[str, Any]:
        """Map a vector of Stan's unconstrained space to the latents of `posterior`.

        Args:
            unconstrained: Stan's unconstrained parameters, in the order of its `parameters` block.

        Returns:
            Nested dict of constrained latents.

        Raises:
            ShapeError: it is not a vector of the right length.

        Example: see `load`.
        """
        return self._entry.latents(self._constrain(unconstrained)[0])

    def log_density(self, unconstrained: Float[Array, " d"]) -> Float[Array, ""]:
        r"""Return $\log p(z(u), y) + \log|\det J(u)|$ in Stan's unconstrained space, $J$ being the Jacobian of its map.

        Stan drops constants, so its log density differs from this one by a number that does not depend on `u`.

        Args:
            unconstrained: as in `latents`; any real numbers.

        Raises:
            ShapeError: it is not a vector of the right length.

        Example: see `load`.
        """
        values, log_jacobian = self._constrain(unconstrained)
        return self.posterior.log_density(self._entry.latents(values)) + log_jacobian

    def parameters(self, latents: dict[str, Any]) -> dict[str, Array]:
        """Return the quantities of `reference`, computed from latents or from draws of them.

        Args:
            latents: nested dict of latents, with any leading axes in front (chains and draws, say).

        Returns:
            For each key of `reference` an array of those leading axes.

        Raises:
            AddressError: a latent is missing.

        Example: see `load`.
        """
        for path in self.posterior.latent_shapes:
            if path not in latents:
                raise AddressError(f"parameters of {self.name!r}: no value for {path!r}.{nearest(path, latents)}")
        quantities = self._entry.quantities({path: jnp.asarray(value) for path, value in latents.items()})
        return {key: _component(quantities, key) for key in self.reference}

    def __repr__(self) -> str:
        """Show the name."""
        return f"<posteriordb {self.name!r}, {size(self._entry.parameters)} unconstrained dimensions>"

    def _constrain(self, unconstrained: Any) -> tuple[dict[str, Any], Float[Array, ""]]:
        expected = (size(self._entry.parameters),)
        if np.shape(unconstrained) != expected:
            raise ShapeError(
                f"{self.name!r} has unconstrained vectors of shape {expected}, got {np.shape(unconstrained)}. "
                "For many vectors use jax.vmap."
            )
        return constrain(self._entry.parameters, jnp.asarray(unconstrained, float))


def names() -> tuple[str, ...]:
    """Return the names of the posteriors, sorted.

    Returns:
        Names that `load` takes.

    Example:
        >>> from expectax.models import posteriordb
        >>> len(posteriordb.names()), posteriordb.names()[2]
        (12, 'garch-garch11')
    """
    return tuple(_ENTRIES)


def load(name: str) -> StanPosterior:
    """Read a posterior with its data, reference statistics and Stan's densities.

    Args:
        name: one of `names()`.

    Returns:
        A `StanPosterior`. Its arrays have JAX's default precision at the time of the call; the records are float64.

    Raises:
        AddressError: there is no posterior of that name; the nearest spelling is named. (It is a `KeyError`.)

    Example:
        >>> import numpy as np
        >>> from expectax.models import posteriordb
        >>> garch = posteriordb.load("garch-garch11")
        >>> garch.reference["mu"].mean
        5.0500179
        >>> latents = garch.latents(garch.points.unconstrained[0])
        >>> sorted(latents), garch.parameters(latents)["mu"].shape
        (['alpha0', 'alpha1', 'beta1', 'mu'], ())
        >>> ours = [float(garch.log_density(u)) for u in garch.points.unconstrained[:2]]
        >>> bool(np.isclose(np.diff(ours), np.diff(garch.points.log_density[:2]), atol=1e-3))
        True
    """
    if name not in _ENTRIES:
        raise AddressError(f"posteriordb has no posterior {name!r} here.{nearest(str(name), _ENTRIES)}")
    entry, record = _ENTRIES[name], read(name)
    return StanPosterior(name, entry.condition(record["data"]), references(record), points(record), entry)


def _component(quantities: dict[str, Array], key: str) -> Array:
    """Return `"beta[2]"`: the second component, along the last axis, of the quantity `beta`."""
    name, index = re.fullmatch(r"(\w+?)(?:\[(\d+)\])?", key).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return quantities[name] if index is None else quantities[name][..., int(index) - 1]
