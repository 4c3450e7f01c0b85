"""A program with observations: the unnormalised target of every inference algorithm."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from . import _jax
from ._choices import check_addresses, check_values
from ._errors import AddressError, ShapeError, SupportError
from ._evaluate import Observed, Visitor
from ._masked import Masked, fill, pick
from ._nested import Choices, leaves_of, merged, nested
from ._program import Program
from ._staging import Staged, check_key, scalar, stage
from ._table import Entry
from ._trace import Trace, finish
from ._visitors import (
    Partial,
    assessing,
    assessing_inside,
    constraining,
    constraining_values,
    generating,
    recording,
    unconstraining,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["program", "observations"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    r"""A program conditioned on observations: $\gamma(z) = p(z, y)$, a density over the latents up to $p(y)$.

    Made by `program.given(observations)`. Latents are a nested dict of the addresses that are not observed; of a site
    with missing data (`masked`) the missing elements are latents, in one array of shape `(number, *event)`.

    Attributes:
        program: the bound program.
        observations: nested dict of the observed values.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def coin():
        ...     p = ex.sample("p", dist.Beta(1.0, 1.0))
        ...     ex.sample("heads", dist.Bernoulli(p))
        >>> posterior = coin().given({"heads": 1})
        >>> round(float(posterior.log_density({"p": 0.5})), 3)
        -0.693
    """

    program: Program
    observations: Choices

    def given(self, observations: Choices) -> Posterior:
        """Condition on more observations.

        Args:
            observations: nested dict of values of latents.

        Raises:
            AddressError: an address is unknown, or observed already.
            ShapeError, SupportError: a value does not fit its site.
        """
        more = self.program.given(observations).observations
        for path, _ in leaves_of(more):
            if path in self._observed:
                raise AddressError(
                    f"given at {_jax.caller()}: site {path!r} is observed already. Condition the program itself on the new "
                    "value: posterior.program.given({...})."
                )
        return Posterior(self.program, merged(self.observations, more))

    def log_density(self, latents: Choices, key: PRNGKeyArray | None = None) -> Float[Array, ""]:
        r"""Return the log joint density $\log p(z, y)$ at the latents.

        Args:
            latents: nested dict with a value for every latent.
            key: a typed key, for a density that is only estimated (`vi.marginal`); others need none.

        Raises:
            AddressError, ShapeError, SupportError: the latents do not fit the program.
            DistributionError: the density is only estimated, and there is no key.
        """
        if key is not None:
            check_key(key)
        return self._scored(latents, assessing, key)

    def log_density_inside(self, latents: Choices) -> Float[Array, ""]:
        """Return the log density inside an objective, whose estimator draws what an estimate needs."""
        return self._scored(latents, assessing_inside)

    def _scored(self, latents: Choices, visitor: Visitor, key: Any = None) -> Float[Array, ""]:
        staged = stage(self.program)
        given = self._complete(staged, latents, "log_density")
        return scalar(staged.run(visitor, key, given).log_density)

    def site_log_densities(self, latents: Choices) -> Choices:
        """Return the log density of every site, latent and observed, one number per scan step, lane and batch element.

        Args:
            latents: nested dict with a value for every latent.
        """
        staged = stage(self.program)
        given = self._complete(staged, latents, "site_log_densities")
        return staged.run(recording, given=given).choices

    def generate(self, key: PRNGKeyArray) -> tuple[Trace, Float[Array, ""]]:
        """Draw the latents from the prior; see `Program.generate` for the weight."""
        check_key(key)
        staged = stage(self.program)
        outcome = staged.run(generating, key, self.observations)
        return finish(self.program, staged, outcome), scalar(outcome.log_weight)

    def trace(self, latents: Choices) -> Trace:
        """Return the trace of the whole program at given latents, with the observations in it.

        Args:
            latents: nested dict with a value for every latent.

        Raises:
            AddressError, ShapeError, SupportError: the latents do not fit the program.
        """
        staged = stage(self.program)
        given = self._complete(staged, latents, "trace")
        return finish(self.program, staged, staged.run(assessing, given=given))

    def latents(self, choices: Choices) -> Choices:
        """Return the part of full choices that is not observed (axes of particles may stand in front)."""
        observed = dict(leaves_of(self.observations))
        found = []
        for path, value in leaves_of(choices):
            if path not in observed:
                found.append((path, value))
            elif _partial(observed[path], path):
                found.append((path, self._missing_part(value, observed[path])))
        return nested(found)

    def _missing_part(self, value: Any, given: Masked) -> Any:
        elements = jnp.ndim(given.mask)
        assert given.missing is not None
        return pick(value, given.missing, jnp.shape(given.value), elements)

    def holding(self, values: Choices) -> Posterior:
        """Return the posterior of the other latents, with some held at values that are known to fit."""
        sites, given = dict(leaves_of(self.program.sites())), dict(leaves_of(self.observations))
        for path, value in leaves_of(values):
            own = given.get(path)
            given[path] = value if own is None else fill(own, value, sites[path].shape, len(sites[path].elements))
        return Posterior(self.program, nested(given.items()))

    def present(self, latents: Choices) -> dict[str, Any]:
        """Return by path, for the choices in branches or with a mask, which of their elements are made."""
        staged = stage(self.program)
        given = self._complete(staged, latents, "present")
        return dict(leaves_of(staged.run(assessing_inside, None, given).present))

    @property
    def latent_shapes(self) -> Choices:
        """Nested dict of `jax.ShapeDtypeStruct`, one per latent."""
        return jax.tree.map(
            lambda entry: jax.ShapeDtypeStruct(entry.shape, entry.dtype),
            self.latent_sites(),
            is_leaf=lambda x: isinstance(x, Entry),
        )

    def latent_sites(self) -> Choices:
        """Return the nested dict of the latents' site entries."""
        return self._latent_table(stage(self.program))

    def _latent_table(self, staged: Staged) -> Choices:
        observed = dict(leaves_of(self.observations))
        found = []
        for path, entry in leaves_of(staged.sites):
            if path not in observed:
                found.append((path, entry))
            elif _partial(given := observed[path], path):
                found.append((path, entry._replace(missing=given.missing.shape[0])))
        return nested(found)

    def constrain(self, unconstrained: Choices) -> Choices:
        """Map unconstrained latents (all reals) into their supports.

        Args:
            unconstrained: nested dict, shaped as `unconstrain` returns it.

        Returns:
            The latents.
        """
        return self.latents(self._constrained(unconstrained, constraining_values).choices)

    def unconstrain(self, latents: Choices) -> Choices:
        """Map latents out of their supports onto the reals: the inverse of `constrain`.

        Raises:
            SupportError: a latent is discrete, or outside its support.
        """
        staged = self._continuous()
        given = self._complete(staged, latents, "unconstrain", observed=True)
        return self.latents(staged.run(unconstraining, given=given).choices)

    def unconstrained_log_density(self, unconstrained: Choices, key: PRNGKeyArray | None = None) -> Float[Array, ""]:
        r"""Return $\log p(z(u), y) + \log|\det \partial z / \partial u|$.

        A latent that is not made (in a branch, or masked) has a standard normal density in its place, so that the
        target stays proper; it leaves the others' posterior alone (a pseudo-prior, Carlin and Chib 1995).

        Args:
            unconstrained: nested dict, shaped as `unconstrain` returns it.
            key: a typed key, for a density that is only estimated (`vi.marginal`); others need none.
        """
        outcome = self._constrained(unconstrained, constraining, key)
        total = scalar(outcome.log_weight)
        present = dict(leaves_of(outcome.present))
        for path, u in leaves_of(unconstrained):
            if path in present:
                absent = jnp.reshape(~present[path], present[path].shape + (1,) * (jnp.ndim(u) - present[path].ndim))
                total = total + jnp.sum(jnp.where(absent, -0.5 * u**2 - 0.5 * jnp.log(2 * jnp.pi), 0.0))
        return total

    @property
    def unconstrained_shapes(self) -> Choices:
        """Nested dict of `jax.ShapeDtypeStruct` of the unconstrained latents."""
        return jax.eval_shape(self.unconstrain, self.latent_shapes)

    def __repr__(self) -> str:
        """Show the program and the shapes of the observations."""
        return f"<posterior of {self.program!r} given {eqx.tree_pformat(self.observations)}>"

    def _constrained(self, unconstrained: Choices, visitor: Visitor, key: Any = None) -> Any:
        staged = self._continuous()
        check_addresses(
            self._latent_table(staged), unconstrained, "unconstrained latents", _jax.caller(), True, staged.table
        )
        entries = dict(leaves_of(staged.sites))
        for path, u in leaves_of(unconstrained):
            if jnp.shape(u)[: len(entries[path].times)] != entries[path].times and path not in self._observed:
                raise ShapeError(
                    f"unconstrained latents at {_jax.caller()}: site {path!r} has shape {entries[path].shape} and so the "
                    f"time axes {entries[path].times} in front, got {jnp.shape(u)}. Time comes first, then lanes."
                )
        given: dict[str, Any] = {path: Observed(y) for path, y in leaves_of(self.observations)}
        for path, u in leaves_of(unconstrained):
            y = given.get(path)
            given[path] = u if y is None else _spread(u, y.value)
        return staged.run(visitor, key, nested(given.items()))

    @property
    def _observed(self) -> set[str]:
        return {path for path, _ in leaves_of(self.observations)}

    def _continuous(self) -> Staged:
        staged = stage(self.program)
        for _, entry in leaves_of(self._latent_table(staged)):
            if is_discrete(entry):
                raise SupportError(
                    f"site {entry.site.address!r} at {entry.site.where} is discrete and has no unconstrained space. "
                    "Observe it, sum it out (ex.marginalize_discrete), or use importance sampling or VI."
                )
        return staged

    def _complete(self, staged: Staged, latents: Choices, what: str, observed: bool = False) -> Choices:
        """Return latents and observations together; `observed` marks what does not change space."""
        checked = check_values(self._latent_table(staged), latents, what, _jax.caller(), True, staged.table)
        sites, given = dict(leaves_of(staged.sites)), {}
        for path, y in leaves_of(self.observations):
            given[path] = y
            if _partial(y, path):
                value = dict(leaves_of(checked))[path]
                given[path] = fill(y, value, sites[path].shape, len(sites[path].elements))
            elif isinstance(y, Masked):
                given[path] = y.value
            if observed and not _partial(y, path):
                given[path] = Observed(given[path])
        return merged(checked, nested(given.items()))


def check_posterior(value: Any, what: str) -> None:
    """Refuse what is no posterior, and say how to make one."""
    if not isinstance(value, Posterior):
        hint = ": condition it first, program.given({...}) ({} for no data)" if isinstance(value, Program) else ""
        raise TypeError(
            f"{what} at {_jax.caller()} takes a posterior, model(arguments).given(observations), got {value!r}{hint}."
        )


def is_discrete(entry: Entry) -> bool:
    """Tell whether a site takes separate values; a distribution of counts may still draw them as floats."""
    support = entry.site.support
    return not jnp.issubdtype(entry.dtype, jnp.inexact) or (support is not None and support.is_discrete)


def _partial(observation: Any, path: str = "") -> bool:
    """Tell whether some elements of an observation are missing."""
    if not isinstance(observation, Masked):
        return False
    if observation.missing is None:
        raise SupportError(
            f"given at {_jax.caller()}: which data of site {path!r} are missing must be known when the model is "
            "conditioned. Make the mask with numpy, outside jit."
        )
    return observation.missing.shape[0] > 0


def _spread(u: Any, y: Masked) -> Partial:
    """Return the unconstrained missing elements in their places."""
    elements = jnp.ndim(y.mask)
    whole = jnp.zeros((y.mask.size, *jnp.shape(u)[1:]), jnp.result_type(u)).at[y.missing].set(u)
    return Partial(jnp.reshape(whole, (*y.mask.shape, *jnp.shape(u)[1:])), y) if elements else Partial(whole[0], y)
