r"""Kernels made of kernels: one after the other, one of several at random, one many times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import _jax, sample
from expectax.ppl._nested import Choices

from ._accept import check_exact_density
from ._kernel import Adaptation, Info, Kernel, Stage, State, check_kernel_value
from ._on import adaptation_of, check_memoryless, moved_by
from ._target import Target


class Cycle(eqx.Module):
    """Kernels one after the other; made by `cycle`. Example: see `cycle`."""

    kernels: tuple[Kernel, ...]

    @property
    def name(self) -> str:
        """Show the parts."""
        return f"cycle({', '.join(kernel.name for kernel in self.kernels)})"

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density."""
        check_exact_density(target, "cycle")
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move by each kernel in turn."""
        latents, parts = state.position, []
        for kernel, own in zip(self.kernels, parameters, strict=True):
            latents, after, info = moved_by(kernel, target, latents, own)
            parts.append((after, info))
        return _whole(target, latents, parts)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune each part on its own."""
        return _together([adaptation_of(kernel, target, state.position) for kernel in self.kernels])


class Mixture(eqx.Module):
    """One of several kernels at random; made by `mixture`. Example: see `mixture`."""

    kernels: tuple[Kernel, ...]
    weights: tuple[float, ...] = eqx.field(static=True)

    @property
    def name(self) -> str:
        """Show the parts."""
        return f"mixture({', '.join(kernel.name for kernel in self.kernels)})"

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density."""
        check_exact_density(target, "mixture")
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Choose a kernel and move by it.

        All are run, and one is kept: what a `lax.switch` over chains comes to.
        """
        number = sample("kernel", dist.Categorical(probs=jnp.asarray(self.weights)))
        runs = [moved_by(k, target, state.position, own) for k, own in zip(self.kernels, parameters, strict=True)]
        latents = jax.tree.map(lambda *cases: jnp.stack(cases)[number], *(moved for moved, _, _ in runs))
        whole, info = _whole(target, latents, [(after, info) for _, after, info in runs])
        each = lambda name: jnp.stack([jnp.asarray(getattr(i, name)) for _, _, i in runs])  # noqa: E731
        info = info._replace(acceptance_rate=each("acceptance_rate")[number], is_divergent=each("is_divergent")[number])
        return whole, info._replace(parts=(number, info.parts))

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune each part by those steps that it made."""
        parts = [adaptation_of(kernel, target, state.position) for kernel in self.kernels]
        together = _together(parts)

        def update(own: Any, stage: Stage, state: State, info: Info) -> Any:
            del state
            number, infos = info.parts
            return tuple(
                _if_chosen(part, tuning, stage, infos[n], number == n)
                for n, (part, tuning) in enumerate(zip(parts, own, strict=True))
            )

        start = tuple((own, jnp.zeros((), bool)) for own in together.start)
        parameters, final = (
            lambda own, f=f: f(tuple(tuning for tuning, _ in own)) for f in (together.parameters, together.final)
        )
        return Adaptation(start, update, parameters, final, together.unadapted)


class Repeat(eqx.Module):
    """A kernel many times; made by `repeat`. Example: see `repeat`."""

    kernel: Kernel
    count: int = eqx.field(static=True)

    @property
    def name(self) -> str:
        """Show the part."""
        return f"repeat({self.kernel.name}, {self.count})"

    @property
    def extended(self) -> bool:
        """Whether the state holds more than the latents."""
        return getattr(self.kernel, "extended", False)

    def init(self, target: Target, latents: Choices) -> State:
        """Return the kernel's own state."""
        return self.kernel.init(target, latents)

    def stationary(self, target: Target, latents: Choices) -> State:
        """Return the kernel's own stationary state."""
        return getattr(self.kernel, "stationary", self.kernel.init)(target, latents)

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move some times."""

        def once(state: State, _: Any) -> tuple[State, Any]:
            after, info = self.kernel.step(target, state, parameters)
            after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, state)
            return after, (after, jax.tree.map(jnp.asarray, info))

        state, (states, infos) = lax.scan(once, state, length=self.count)
        last = jax.tree.map(lambda x: x[-1], infos)
        return state, last._replace(
            acceptance_rate=jnp.mean(infos.acceptance_rate, axis=0),
            is_divergent=jnp.any(infos.is_divergent, axis=0),
            num_steps=jnp.sum(infos.num_steps, axis=0),
            parts=((states, infos),),
        )

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        return self.kernel.latents(target, position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune the kernel by all of its steps; a window ends with the last of them."""
        own = self.kernel.adaptation(target, state)

        def update(tuning: Any, stage: Stage, state: State, info: Info) -> Any:
            del state
            ends = (jnp.arange(self.count) == self.count - 1) & stage.window_end

            def one(tuning: Any, inputs: Any) -> Any:
                (state, info), end = inputs
                return own.update(tuning, Stage(stage.slow, end), state, info), None

            return lax.scan(one, tuning, (info.parts[0], ends))[0]

        return own._replace(update=update)


def _whole(target: Target, latents: Choices, parts: list[tuple[State, Info]]) -> tuple[State, Info]:
    """Return the state at the latents, and what all parts told."""
    state = State(latents, target.log_density(latents))
    rates = jnp.stack([jnp.mean(info.acceptance_rate) for _, info in parts])
    divergent = jnp.stack([jnp.any(jnp.asarray(info.is_divergent)) for _, info in parts])
    steps = jnp.stack([jnp.sum(jnp.asarray(info.num_steps)) for _, info in parts])
    return state, Info(rates.mean(), divergent.any(), steps.sum(), -state.log_density, tuple(parts))


def _together(parts: Sequence[Adaptation]) -> Adaptation:
    """Return the adaptation of several kernels, each by its own `(state, info)`."""

    def update(own: Any, stage: Stage, state: State, info: Info) -> Any:
        del state
        return tuple(a.update(o, stage, *part) for a, o, part in zip(parts, own, info.parts, strict=True))

    def each(name: str) -> Any:
        return lambda own: tuple(getattr(a, name)(o) for a, o in zip(parts, own, strict=True))

    start, unadapted = (tuple(getattr(a, name) for a in parts) for name in ("start", "unadapted"))
    return Adaptation(start, update, each("parameters"), each("final"), unadapted)


def _if_chosen(part: Adaptation, own: Any, stage: Stage, told: tuple[State, Info], chosen: Any) -> Any:
    """Update a part that moved; the end of a window waits until it does."""
    tuning, pending = own
    end = pending | stage.window_end
    after = part.update(tuning, Stage(stage.slow, end), *told)
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), after, tuning), end & ~chosen


def _parts(kernels: tuple[Any, ...], what: str) -> tuple[Kernel, ...]:
    if not kernels:
        raise ValueError(f"{what} needs at least one kernel.")
    return tuple(check_memoryless(kernel, what) for kernel in kernels)


def cycle(*kernels: Kernel) -> Cycle:
    r"""Move by each kernel in turn: $K_1 K_2 \cdots K_n$, which is in general not reversible.

    Each part is tuned on its own in the warm-up, by its own acceptance.

    Args:
        *kernels: kernels whose state is made of the latents alone, often of `on`.

    Returns:
        A `Kernel`, whose state holds all latents; `Chains.parameters` is a tuple with one entry a part.

    Raises:
        ControlFlowError: a kernel keeps more than the latents from step to step (`replica_exchange`).
        DistributionError: the target's density is only estimated.
        TypeError, ValueError: one is no kernel, or there are none.

    Source: Tierney 1994.

    Example: see `on`.
        >>> from expectax import inference
        >>> inference.cycle(inference.gibbs("label"), inference.on("x", inference.nuts())).name
        "cycle(gibbs, on(select('x'), nuts))"
    """
    return Cycle(_parts(kernels, "cycle"))


def mixture(*kernels: Kernel, weights: Sequence[float] | None = None) -> Mixture:
    r"""Move by one kernel, chosen at random: $\sum_k w_k K_k$, reversible if all parts are.

    The weights are constants. Were they functions of where the chain stands, the mixture would not leave the target
    invariant; that takes an auxiliary choice and `involutive`.

    Args:
        *kernels: kernels whose state is made of the latents alone.
        weights: $w_k \ge 0$, as numbers, which are divided by their sum; all alike if None.

    Returns:
        A `Kernel`. All parts are run at each step, and one is kept.

    Raises:
        ControlFlowError: a kernel keeps more than the latents from step to step (`replica_exchange`).
        TypeError: a weight is no number, such as a function of the state.
        ValueError: the weights do not fit.

    Source: Tierney 1994.

    Example:
        >>> from expectax import inference
        >>> kernel = inference.mixture(inference.random_walk(), inference.nuts(), weights=[0.9, 0.1])
        >>> kernel.weights
        (0.9, 0.1)
    """
    kernels = _parts(kernels, "mixture")
    given = [1.0] * len(kernels) if weights is None else weights
    if callable(given) or any(callable(w) or _jax.is_traced(w) for w in given):
        raise TypeError(
            "mixture: the weights must be constant numbers. A mixture whose weights depend on the state does not leave the "
            "target invariant; write the choice as an auxiliary one of inference.involutive."
        )
    numbers = [float(w) for w in given]
    if len(numbers) != len(kernels) or not all(math.isfinite(w) and w >= 0 for w in numbers) or sum(numbers) <= 0:
        raise ValueError(f"mixture: need {len(kernels)} weights >= 0 with a positive sum, got {numbers}.")
    return Mixture(kernels, tuple(w / sum(numbers) for w in numbers))


def repeat(kernel: Kernel, count: int) -> Repeat:
    r"""Move by a kernel several times: $K^n$.

    Args:
        kernel: any kernel.
        count: $n \ge 1$.

    Returns:
        A `Kernel`, tuned by all of its steps.

    Raises:
        TypeError, ValueError: `kernel` is none, or `count` is out of range.

    Example:
        >>> from expectax import inference
        >>> inference.repeat(inference.random_walk(), 10).name
        'repeat(random_walk, 10)'
    """
    check_kernel_value(kernel, "repeat")
    if count < 1:
        raise ValueError(f"repeat: need count >= 1, got {count}.")
    return Repeat(kernel, int(count))
