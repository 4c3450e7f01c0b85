r"""A kernel on some of the latents, the others held: it leaves the conditional, hence the whole, invariant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax

from expectax.ppl import ControlFlowError, Selection
from expectax.ppl._keyless import keyed
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._selection import chosen_by, select

from ._absent import refreshed
from ._accept import check_exact_density
from ._kernel import Adaptation, Info, Kernel, Stage, State, check_kernel_value
from ._target import Target


class On(eqx.Module):
    """A kernel on some of the latents; made by `on`. Example: see `on`."""

    selection: Selection = eqx.field(static=True)
    kernel: Kernel

    @property
    def name(self) -> str:
        """Show what moves what."""
        return f"on({self.selection!r}, {self.kernel.name})"

    def init(self, target: Target, latents: Choices) -> State:
        """Return all latents and their density."""
        check_exact_density(target, "on")
        self.apart(target, latents)
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move the selected latents given the others."""
        position = refreshed(target.posterior, state.position)
        own, rest = self.apart(target, position)
        moved, after, info = moved_by(self.kernel, target.given(rest), own, parameters)
        latents = merged(position, moved)
        whole = State(latents, target.log_density(latents))
        return whole, info._replace(energy=-whole.log_density, parts=((after, info),))

    def apart(self, target: Target, latents: Choices) -> tuple[Choices, Choices]:
        """Return the selected latents, and the others."""
        entries = target.posterior.latent_sites()
        wanted = chosen_by(self.selection, entries, "on")
        for path, entry in leaves_of(entries):
            if wanted[path] is not True and wanted[path] is not False:
                raise ControlFlowError(
                    f"on: {path!r} at {entry.site.where} is selected by index, but a kernel moves a site as a whole. Select "
                    "it as a whole, or use mh or gibbs."
                )
        own, rest = ([(p, v) for p, v in leaves_of(latents) if wanted[p] is take] for take in (True, False))
        if not own:
            raise ControlFlowError(
                f"on: {self.selection!r} selects no latent, so that {self.kernel.name} has none to move."
            )
        return nested(own), nested(rest)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune the kernel."""
        own, rest = self.apart(target, state.position)
        return inner_adaptation(adaptation_of(self.kernel, target.given(rest), own))


def on(selection: str | Selection | Iterable[Any], kernel: Kernel) -> On:
    r"""Let a kernel move only some of the latents.

    What it sees is the density of the selected latents $z_S$ given the others, $\gamma(z_S, z_{-S})$ with $z_{-S}$ held. A
    kernel that leaves every such conditional invariant leaves $\gamma$ invariant.

    Args:
        selection: an address, addresses, or a selection (`ex.select`) of whole sites.
        kernel: any kernel whose state is made of the latents alone.

    Returns:
        A `Kernel`, whose state holds all latents; to be used in `cycle` or `mixture` with others.

    Raises:
        AddressError: an address is unknown.
        ControlFlowError: a site is selected by index, or none at all, or the kernel keeps more than the latents.
        TypeError: `kernel` is none.

    Source: Tierney 1994.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     label = ex.sample("label", dist.Bernoulli(0.3))
        ...     ex.sample("x", dist.Normal(2.0 * label, 1.0))
        >>> kernel = inference.cycle(inference.gibbs("label"), inference.on("x", inference.hmc()))
        >>> chains = inference.mcmc(model().given({}), kernel, key=jax.random.key(0), num_warmup=200, num_samples=1000)
        >>> bool(abs(chains.mean()["x"] - 0.6) < 0.3)
        True
    """
    check_memoryless(kernel, "on")
    if isinstance(selection, Selection):
        return On(selection, kernel)
    return On(select(selection) if isinstance(selection, str) else select(*selection), kernel)


def moved_by(kernel: Kernel, target: Target, latents: Choices, parameters: Any) -> tuple[Choices, State, Info]:
    """Return where a kernel moves latents to, its state there and what it told."""
    latents = refreshed(target.posterior, latents)
    after, info = kernel.step(target, kernel.init(target, latents), parameters)
    return kernel.latents(target, after.position), after, info


def adaptation_of(kernel: Kernel, target: Target, latents: Choices) -> Adaptation:
    """Return a kernel's adaptation, which depends on the shapes of its state alone."""
    state = keyed(lambda latents: kernel.init(target, latents))(jax.random.key(0), latents)
    return kernel.adaptation(target, state)


def inner_adaptation(own: Adaptation) -> Adaptation:
    """Return the adaptation of a composition of one kernel, from what the kernel's own part tells."""

    def update(tuning: Any, stage: Stage, state: State, info: Info) -> Any:
        del state
        return own.update(tuning, stage, *info.parts[0])

    return own._replace(update=update)


def check_memoryless(kernel: Any, what: str) -> Kernel:
    """Refuse a kernel that keeps more than the latents from step to step: a composition would forget it."""
    check_kernel_value(kernel, what)
    if getattr(kernel, "extended", False):
        raise ControlFlowError(
            f"{what}: {kernel.name} keeps more than the latents from step to step, which a composition that makes its state "
            "anew would forget. Put the composition inside it, or use inference.repeat."
        )
    return kernel
