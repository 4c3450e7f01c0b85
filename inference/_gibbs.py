r"""Gibbs sampling of finite choices: exact draws from their conditionals, all values scored in one vmap."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Selection, sample
from expectax.ppl._joint_values import element_supports, joint_values, number_of
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._selection import chosen_by, select

from ._accept import check_exact_density
from ._kernel import Adaptation, Info, State
from ._target import Target

_WRITTEN_OUT = 4
"""Up to how many elements the sweep is written out instead of made a loop."""


class Gibbs(eqx.Module):
    """A Gibbs kernel; made by `gibbs`. Example: see `gibbs`."""

    selection: Selection = eqx.field(static=True)
    jointly: bool = eqx.field(static=True)
    name: str = eqx.field(static=True, default="gibbs")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density."""
        check_exact_density(target, self.name)
        self._elements(target)
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Draw the selected elements, one after the other or all at once."""
        del parameters
        elements = self._elements(target)
        if self.jointly:
            return self._together(target, state, elements)
        supports, count = element_supports(target.posterior), 0
        for path, indices in elements.items():
            state = _sweep(target, state, path, supports[path], indices)
            count += len(indices) * supports[path].shape[0]
        return state, Info(jnp.ones(()), num_steps=count, energy=-state.log_density)

    def _together(self, target: Target, state: State, elements: dict[str, Any]) -> tuple[State, Info]:
        rest = nested((p, v) for p, v in leaves_of(state.position) if p not in elements)
        remedy = "Use gibbs without jointly=True, which draws one element at a time."
        posterior = target.posterior.holding(rest)
        values = joint_values(posterior, "gibbs(jointly=True)", conditional=True, remedy=remedy)
        candidates = lambda own: merged(state.position, own)  # noqa: E731
        after = _drawn(target, jax.vmap(candidates)(values))
        count = jax.tree.leaves(values)[0].shape[0]
        return after, Info(jnp.ones(()), num_steps=count, energy=-after.log_density)

    def _elements(self, target: Target) -> dict[str, Any]:
        """Return the flat indices of the selected elements of each site; refuse a site without a finite support."""
        entries = dict(leaves_of(target.posterior.latent_sites()))
        wanted = chosen_by(self.selection, nested(entries.items()), "gibbs")
        supports, elements = element_supports(target.posterior), {}
        for path, entry in entries.items():
            if wanted[path] is False:
                continue
            if supports[path].shape[0] == 0:
                raise ControlFlowError(
                    f"gibbs: {path!r} at {entry.site.where} has no finite, known support, so that its conditional cannot be "
                    "summed. Select other sites, as in inference.cycle(inference.gibbs('label'), inference.on(~ex.select("
                    "'label'), inference.nuts()))."
                )
            partial = wanted[path] is not True
            if partial and (self.jointly or entry.missing is not None):
                raise ControlFlowError(
                    f"gibbs: {path!r} at {entry.site.where} is selected by index, which works neither with jointly=True nor "
                    "for a partly observed site. Select it as a whole."
                )
            elements[path] = np.flatnonzero(wanted[path]) if partial else np.arange(number_of(entry))
        return elements

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune nothing."""
        del target, state
        return Adaptation.none()


def _sweep(target: Target, state: State, path: str, support: Any, indices: np.ndarray) -> State:
    """Draw elements of one site from their full conditionals, in turn: later ones see what earlier ones became."""

    def draw(state: State, index: Any) -> tuple[State, None]:
        value = dict(leaves_of(state.position))[path]

        def with_element(one: Any) -> Choices:
            rows = jnp.reshape(value, (-1, *support.shape[1:])).at[index].set(one.astype(value.dtype))
            return merged(state.position, nested([(path, jnp.reshape(rows, value.shape))]))

        return _drawn(target, jax.vmap(with_element)(support)), None

    if len(indices) <= _WRITTEN_OUT:
        for index in indices:
            state, _ = draw(state, index)
        return state
    return lax.scan(draw, state, jnp.asarray(indices))[0]


def _drawn(target: Target, candidates: Choices) -> State:
    """Draw one of the candidates, stacked along a first axis, by their densities."""
    log_densities = jax.vmap(target.log_density)(candidates)
    possible = jnp.where(jnp.isnan(log_densities), -jnp.inf, log_densities)
    number = sample("value", dist.Categorical(logits=possible))
    return State(jax.tree.map(lambda x: x[number], candidates), possible[number])


def gibbs(*addresses: str | Selection, jointly: bool = False) -> Gibbs:
    r"""Gibbs sampling of choices with finite supports, exactly.

    Each selected element $i$ in turn is drawn from its full conditional, for which the target is evaluated at each of its
    $K$ values in one `vmap`:

    $$P(z_i = k \mid z_{-i}, y) = \frac{\gamma(z_{-i}, k)}{\sum_{l=1}^K \gamma(z_{-i}, l)}.$$

    A sweep over $n$ elements costs $n K$ densities. The kernel draws no key, so that `exact` enumerates it.

    Args:
        *addresses: the sites, or one selection; all latents, if there are none.
        jointly: draw all selected elements at once from their joint conditional: better where they hang together, at
            the cost of all joint values (at most `2**14`).

    Returns:
        A `Kernel` for `mcmc` and for the combinators.

    Raises:
        AddressError: an address is unknown.
        ControlFlowError: a selected site has no finite, known support, or its joint values are too many.
        DistributionError: the target's density is only estimated.

    Source: Geman and Geman 1984.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     rain = ex.sample("rain", dist.Bernoulli(0.2))
        ...     sprinkler = ex.sample("sprinkler", dist.Bernoulli(0.4))
        ...     ex.sample("wet", dist.Bernoulli(jnp.where(rain + sprinkler > 0, 0.9, 0.01)))
        >>> posterior = model().given({"wet": 1})
        >>> chains = inference.mcmc(posterior, inference.gibbs(), key=jax.random.key(0), num_warmup=10, num_samples=2000)
        >>> bool(abs(chains.mean()["rain"] - 0.3797) < 0.05)
        True
    """
    if len(addresses) == 1 and isinstance(addresses[0], Selection):
        return Gibbs(addresses[0], jointly)
    return Gibbs(select(*addresses) if addresses else ~select(), jointly)  # type: ignore[arg-type]
