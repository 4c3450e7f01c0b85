"""The result of `mcmc`: draws of several chains, what each transition told, and how to go on."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from expectax.ppl import Posterior
from expectax.ppl._compile import Fixed

from ._diagnose import Diagnosis, diagnose
from ._kernel import Kernel, State
from ._reducers import Reducer
from ._run import Way
from ._summary import Summary, summarize


class Last(eqx.Module):
    """Where a run stands: what it takes to go on.

    The posterior, the kernel and the reducers are kept as their arrays and the rest, so that a result can be returned
    through `jax.jit` and `jax.vmap`.
    """

    state: State
    keys: Array
    arrays: Any
    rest: Fixed = eqx.field(static=True)
    way: Way = eqx.field(static=True)
    key_impl: str = eqx.field(static=True)

    @classmethod
    def of(cls, run: tuple[Posterior, Kernel, dict[str, Reducer]], way: Way, keys: Any, state: State) -> Last:
        """Take a run apart."""
        arrays, rest = eqx.partition(run, eqx.is_array)
        return cls(state, jax.random.key_data(keys), arrays, Fixed(rest), way, str(jax.random.key_impl(keys)))

    @property
    def run(self) -> tuple[Posterior, Kernel, dict[str, Reducer]]:
        """The posterior, the kernel and the reducers."""
        return eqx.combine(self.arrays, self.rest.value)

    @property
    def chain_keys(self) -> PRNGKeyArray:
        """The key of each chain, of which a draw's key is made by the draw's number."""
        return jax.random.wrap_key_data(self.keys, impl=self.key_impl)


class Chains(eqx.Module):
    """Draws of several chains.

    Example: see `mcmc`.

    Attributes:
        choices: nested dict of latents, shape `(num_chains, num_samples, ...)`; empty with `keep_draws=False`.
        statistics: `divergent` (bool), `acceptance_rate`, `num_integration_steps` (evaluations of the density or its
            gradient), `energy`, `log_density` in the kernel's space; each `(num_chains, num_samples)`.
        parameters: what the warm-up has tuned, chains first: of `nuts` and `hmc` a `step_size` and an
            `inverse_mass_matrix`.
        reduced: the last carry of each of `mcmc`'s `reducers`, by its name, chains first.
        last: where the run stands, for `resume`.
    """

    choices: dict[str, Any]
    statistics: dict[str, Array]
    parameters: Any = ()
    reduced: dict[str, Any] = eqx.field(default_factory=dict)
    last: Last | None = None

    @property
    def step_size(self) -> Array:
        """The adapted step size of each chain, of a kernel that has one."""
        return self.parameters["step_size"]

    @property
    def inverse_mass_matrix(self) -> Array:
        """The adapted inverse mass matrix of each chain, of a kernel that has one."""
        return self.parameters["inverse_mass_matrix"]

    def resume(self, num_samples: int, *, key: PRNGKeyArray | None = None, progress: bool = False) -> Chains:
        """Go on where the chains stopped, with the tuned parameters and no further warm-up.

        Args:
            num_samples: further draws of each chain.
            key: a typed key for the further draws; by default the run's own, by which the result is, to the last bit,
                that of one longer run of `mcmc`.
            progress: show a progress bar; it does not change the draws.

        Returns:
            `Chains` of the draws so far and the further ones.

        Raises:
            ValueError: `num_samples` is below 1, or the chains were not made by `mcmc`, or by many runs under `jax.vmap`.

        As many draws as an earlier call has made compile nothing.

        Example:
            >>> import jax, expectax as ex
            >>> from expectax import dist, inference
            >>> @ex.model
            ... def model():
            ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
            ...     ex.sample("y", dist.Normal(z, 1.0))
            >>> options = dict(key=jax.random.key(0), num_warmup=100)
            >>> posterior = model().given({"y": 1.0})
            >>> short = inference.mcmc(posterior, inference.hmc(), num_samples=40, **options)
            >>> long = inference.mcmc(posterior, inference.hmc(), num_samples=100, **options)
            >>> bool((short.resume(60).choices["z"] == long.choices["z"]).all())
            True
        """
        from ._mcmc import resumed

        return resumed(self, num_samples, key, progress)

    def diagnose(self) -> Diagnosis:
        """Say what is wrong with these chains, in one sentence for each problem, with what to try. See `diagnose`."""
        return diagnose(self)

    def summary(self) -> Summary:
        """Return mean, sd, Monte Carlo error, split rank R-hat, bulk and tail ESS of every number."""
        return summarize(self._draws)

    def mean(self) -> Any:
        """Return the posterior mean of every latent."""
        return jax.tree.map(lambda v: jnp.mean(v, axis=(0, 1)), self._draws)

    def sd(self) -> Any:
        """Return the posterior standard deviation of every latent."""
        return jax.tree.map(lambda v: jnp.std(v, axis=(0, 1)), self._draws)

    def to_arviz(self, posterior: Posterior | None = None) -> Any:
        """Return the draws for ArviZ: an `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x).

        Args:
            posterior: if given, its observations are stored as `observed_data`.
        """
        from ._arviz import to_arviz

        return to_arviz(self, posterior)

    @property
    def _draws(self) -> dict[str, Any]:
        if self.last is not None and not self.last.way.keep_draws:
            raise ValueError(
                "these chains were run with keep_draws=False, so there are no draws to summarise. Read chains.reduced, "
                "or run with keep_draws=True."
            )
        return self.choices
