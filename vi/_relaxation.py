r"""Control variates by relaxation (REBAR, Tucker et al. 2017; RELAX, Grathwohl et al. 2018).

For a choice $b = H(z)$, with $z$ the free relaxation and $\tilde z$ the one bound to $b$, each term $t$ that depends on it
gains $\eta\,(t(z) - t(\tilde z))$ in its gradient, and $\eta\,t(\tilde z)$ is the baseline of its score. Both cancel in
expectation, since $z$ and $\tilde z$ have one law.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from expectax.ppl import StrategyError
from expectax.ppl._flow import of

from ._alternatives import dependent, once, rerun
from ._layout import Choice, Layout
from ._run import Given, Record, Runner


def relaxed_terms(
    runner: Runner, choice: Choice, base: Any, sources: Any, records: dict[int, Record], weight: Any
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return what each dependent term gains, and, without the weight of an open branch, the baseline of its score."""
    check(runner.layout, choice)
    relaxation, terms = records[choice.number].relaxation, dependent(runner.layout, choice)
    everywhere = jnp.ones(choice.element_shape, bool)

    def run(values: Any) -> list[Any]:
        return rerun(runner, choice, Given(values, everywhere), base, sources, records)[0]

    weights = [weight(v, records) for v in terms]  # no enumerated choice depends on a relaxed one

    free, bound = run(relaxation.free), run(relaxation.bound)
    scale = jnp.max(relaxation.scale, initial=0.0)  # one number, which each lane has repeated
    first_only = once(choice)
    gains = {v: first_only(scale * w * (z - c)) for v, w, z, c in zip(terms, weights, free, bound, strict=True)}
    return gains, {v: scale * c for v, c in zip(terms, bound, strict=True)}


def check(layout: Layout, choice: Choice) -> None:
    """Refuse what would be biased: a relaxed choice in a loop, or one that another drawn choice depends on."""
    if choice.loops:
        raise StrategyError(f"{choice.place}: {choice.strategy!r} cannot stand in a loop. Use vi.Reinforce().")
    for eqn in layout.jaxpr.eqns:
        for number in layout.numbers(eqn):
            other = layout.choices[number]
            if other is not choice and any(choice.number in of(layout.depends, v) for v in eqn.invars):
                raise StrategyError(
                    f"{choice.place}: {other.place} depends on it, and would be drawn for a relaxed value, which biases "
                    f"{choice.strategy!r}. Use vi.Reinforce()."
                )
