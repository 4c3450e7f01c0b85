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
from ._choices import Choices, check_addresses, check_values, leaves_of, nested
from ._errors import SupportError
from ._evaluate import Entry, evaluate
from ._program import Program, Trace, finish
from ._staging import Staged, check_key, scalar, stage
from ._visitors import Observed, assessing, constraining, generating, recording, unconstraining


@functools.partial(jax.tree_util.register_dataclass, data_fields=["program", "observations"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    r"""A program conditioned on observations: $\gamma(z) = p(z, y)$, a density over the latents up to $p(y)$.

    Made by `program.given(observations)`. Latents are a nested dict of the addresses that are not observed.

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

    def log_density(self, latents: Choices) -> Float[Array, ""]:
        r"""Return the log joint density $\log p(z, y)$ at the latents.

        Args:
            latents: nested dict with a value for every latent.

        Raises:
            AddressError, ShapeError, SupportError: the latents do not fit the program.
        """
        staged = stage(self.program)
        given = self._complete(staged, latents, "log_density")
        return scalar(evaluate(staged.jaxpr, staged.arguments, assessing, given=given).log_density)

    def site_log_densities(self, latents: Choices) -> Choices:
        """Return the log density of every site, latent and observed, one number per scan step and lane.

        Args:
            latents: nested dict with a value for every latent.
        """
        staged = stage(self.program)
        given = self._complete(staged, latents, "site_log_densities")
        return evaluate(staged.jaxpr, staged.arguments, recording, given=given).choices

    def generate(self, key: PRNGKeyArray) -> tuple[Trace, Float[Array, ""]]:
        """Draw the latents from the prior; see `Program.generate` for the weight."""
        check_key(key)
        staged = stage(self.program)
        outcome = evaluate(staged.jaxpr, staged.arguments, generating, key, self.observations)
        return finish(self.program, staged, outcome), scalar(outcome.log_weight)

    def latents(self, choices: Choices) -> Choices:
        """Return the part of full choices that is not observed."""
        observed = dict(leaves_of(self.observations))
        return nested((path, value) for path, value in leaves_of(choices) if path not in observed)

    @property
    def latent_shapes(self) -> Choices:
        """Nested dict of `jax.ShapeDtypeStruct`, one per latent."""
        return jax.tree.map(
            lambda e: jax.ShapeDtypeStruct(e.shape, e.dtype),
            self.latent_sites(),
            is_leaf=lambda x: isinstance(x, Entry),
        )

    def latent_sites(self) -> Choices:
        """Return the nested dict of the latents' site entries."""
        return self.latents(stage(self.program).sites)

    def constrain(self, unconstrained: Choices) -> Choices:
        """Map unconstrained latents (all reals) into their supports.

        Args:
            unconstrained: nested dict, shaped as `unconstrain` returns it.

        Returns:
            The latents.
        """
        return self.latents(self._constrained(unconstrained).choices)

    def unconstrain(self, latents: Choices) -> Choices:
        """Map latents out of their supports onto the reals: the inverse of `constrain`.

        Raises:
            SupportError: a latent is discrete, or outside its support.
        """
        staged = self._continuous()
        given = self._complete(staged, latents, "unconstrain", observed=True)
        return self.latents(evaluate(staged.jaxpr, staged.arguments, unconstraining, given=given).choices)

    def unconstrained_log_density(self, unconstrained: Choices) -> Float[Array, ""]:
        r"""Return $\log p(z(u), y) + \log|\det \partial z / \partial u|$.

        Args:
            unconstrained: nested dict, shaped as `unconstrain` returns it.
        """
        outcome = self._constrained(unconstrained)
        return scalar(outcome.log_density) + outcome.log_weight

    @property
    def unconstrained_shapes(self) -> Choices:
        """Nested dict of `jax.ShapeDtypeStruct` of the unconstrained latents."""
        return jax.eval_shape(self.unconstrain, self.latent_shapes)

    def __repr__(self) -> str:
        """Show the program and the shapes of the observations."""
        return f"<posterior of {self.program!r} given {eqx.tree_pformat(self.observations)}>"

    def _constrained(self, unconstrained: Choices) -> Any:
        staged = self._continuous()
        check_addresses(
            self.latents(staged.sites), unconstrained, "unconstrained latents", _jax.caller(), complete=True
        )
        given = _with_observed(unconstrained, self.observations)
        return evaluate(staged.jaxpr, staged.arguments, constraining, given=given)

    def _continuous(self) -> Staged:
        staged = stage(self.program)
        for _, entry in leaves_of(self.latents(staged.sites)):
            if not jnp.issubdtype(entry.dtype, jnp.inexact):
                raise SupportError(
                    f"site {entry.site.address!r} at {entry.site.where} is discrete and has no unconstrained space. "
                    "Observe it, sum it out of the model, or use importance sampling or VI."
                )
        return staged

    def _complete(self, staged: Staged, latents: Choices, what: str, observed: bool = False) -> Choices:
        where = _jax.caller()
        checked = check_values(self.latents(staged.sites), latents, what, where, complete=True)
        return _with_observed(checked, self.observations) if observed else _merged(checked, self.observations)


def _merged(a: Choices, b: Choices) -> Choices:
    return nested([*leaves_of(a), *leaves_of(b)])


def _with_observed(latents: Choices, observations: Choices) -> Choices:
    return _merged(latents, jax.tree.map(Observed, observations))
