r"""What a Markov kernel is: a value with three methods, each a keyless program.

A kernel that leaves a target invariant says how its state is made from latents (`init`), how it moves (`step`), and how
its parameters are tuned in a warm-up (`adaptation`). What is tuned is frozen by type: `step` takes parameters and cannot
change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from expectax.ppl._nested import Choices

from ._target import Target


class State(NamedTuple):
    """Where a chain stands.

    Example: see `Kernel`.

    Attributes:
        position: in the kernel's own space: an unconstrained vector, or the latents themselves.
        log_density: of the position, in that space.
        cache: what the next step can use, such as the gradient.
    """

    position: Any
    log_density: Any
    cache: Any = ()


class Info(NamedTuple):
    """What a transition tells.

    Example: see `Kernel`.

    Attributes:
        acceptance_rate: the probability of acceptance, or its mean over the transition.
        is_divergent: whether the integration left the level set of the energy.
        num_steps: evaluations of the density, or of its gradient where the kernel has one.
        energy: minus the log density, with the momentum's part if there is one.
        parts: the `(state, info)` of each kernel of a composition.
    """

    acceptance_rate: Any
    is_divergent: Any = False
    num_steps: Any = 1
    energy: Any = jnp.nan
    parts: Any = ()


class Stage(NamedTuple):
    """Where a warm-up stands: `slow` windows learn the shape of the target, at a `window_end` it is put to use.

    Example: see `Adaptation`.
    """

    slow: Any
    window_end: Any


class Adaptation(NamedTuple):
    """How a kernel's parameters are tuned; made by `Kernel.adaptation`, driven by `mcmc`.

    Example:
        >>> from expectax.inference import Adaptation
        >>> Adaptation.none({"scale": 1.0}).final(None)
        {'scale': 1.0}

    Attributes:
        start: the first state of the adaptation, a pytree of arrays.
        update: `update(own, stage, state, info)` returns the next one.
        parameters: `parameters(own)` for the next step of the warm-up.
        final: `final(own)` for sampling.
        unadapted: the parameters of a chain without a warm-up.
    """

    start: Any
    update: Callable[[Any, Stage, State, Info], Any]
    parameters: Callable[[Any], Any]
    final: Callable[[Any], Any]
    unadapted: Any

    @classmethod
    def none(cls, parameters: Any = ()) -> Adaptation:
        """Return the adaptation of a kernel that has nothing to tune."""
        return cls((), lambda own, *_: own, lambda _: parameters, lambda _: parameters, parameters)


@runtime_checkable
class Kernel(Protocol):
    r"""A Markov kernel that leaves a target invariant: $\int \gamma(z) K(z, z')\, dz = \gamma(z')$.

    `init`, `step` and `latents` are keyless programs: their random choices are `expectax.sample` sites, so that
    `inference.exact` can enumerate them; what needs a key draws one with `inference.random_key()`.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> class Flip:
        ...     '''Metropolis for one coin: propose the other side.'''
        ...     name = "flip"
        ...     def init(self, target, latents):
        ...         return inference.State(latents, target.log_density(latents))
        ...     def step(self, target, state, parameters):
        ...         proposed = self.init(target, {"coin": 1 - state.position["coin"]})
        ...         accept = jnp.exp(jnp.minimum(proposed.log_density - state.log_density, 0.0))
        ...         yes = ex.sample("accept", dist.Bernoulli(accept)) == 1
        ...         return jax.tree.map(lambda a, b: jnp.where(yes, a, b), proposed, state), inference.Info(accept)
        ...     def latents(self, target, position):
        ...         return position
        ...     def adaptation(self, target, state):
        ...         return inference.Adaptation.none()
        >>> isinstance(Flip(), inference.Kernel)
        True
    """

    @property
    def name(self) -> str:
        """How messages and progress bars call it."""
        ...

    def init(self, target: Target, latents: Choices) -> State:
        """Return the state at some latents."""
        ...

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move once."""
        ...

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of a position."""
        ...

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Say how the parameters are tuned."""
        ...


def stationary_state(kernel: Kernel, target: Target, latents: Choices) -> State:
    """Return a state in a kernel's stationary law, whose latents are given as a draw of the target.

    Of most kernels that is `init`; one that keeps more than the latents has a method `stationary` of its own.
    """
    return getattr(kernel, "stationary", kernel.init)(target, latents)


def check_kernel_value(kernel: Any, what: str) -> Kernel:
    """Refuse what is no kernel."""
    if isinstance(kernel, type) or not isinstance(kernel, Kernel):
        raise TypeError(
            f"{what} needs a kernel such as inference.nuts(), with the methods init, step, latents and adaptation, got "
            f"{kernel!r}."
        )
    return kernel
