"""A table of the gradient estimator of an objective: what each site uses, and why."""

from __future__ import annotations

import dataclasses
import html
import math
from typing import Any

import equinox as eqx
import jax

from expectax.ppl import AddressError, _jax
from expectax.ppl._errors import nearest
from expectax.ppl._staging import as_data

from ._alternatives import replaced_singly
from ._layout import Choice, Layout
from ._objective import Objective
from ._resolve import Enumerated
from ._strategy import Enum, Reinforce, Reparam, biased

_COLUMNS = ("address", "distribution", "elements", "strategy", "runs", "unbiased", "orders", "why")


@dataclasses.dataclass(frozen=True)
class Estimators:
    """The result of `estimators`. Example: see `estimators`.

    Attributes:
        rows: one dict per site: `address`, `distribution`, `elements` (steps, lanes, batch), `strategy`, `runs` (how
            often the rest of the program runs because of it), `unbiased`, `orders` of derivatives, `why`.
    """

    rows: tuple[dict[str, Any], ...]

    def __getitem__(self, address: str) -> dict[str, Any]:
        """Return the row of an address."""
        known = {row["address"]: row for row in self.rows}
        if address not in known:
            raise AddressError(f"estimators at {_jax.caller()}: there is no site {address!r}.{nearest(address, known)}")
        return known[address]

    def __repr__(self) -> str:
        """Show the table as text."""
        lines = [_COLUMNS, *([str(row[c]) for c in _COLUMNS] for row in self.rows)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(_COLUMNS))]
        return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        cells = [[html.escape(str(row[c])) for c in _COLUMNS] for row in self.rows]
        head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
        return (
            f"<table><tr>{head}</tr>" + "".join(f"<tr><td>{'</td><td>'.join(r)}</td></tr>" for r in cells) + "</table>"
        )


def estimators(objective: Objective, params: Any) -> Estimators:
    """Say how the gradient of an objective is estimated, site by site.

    Args:
        objective: the objective.
        params: its parameters (only shapes and dtypes matter).

    Returns:
        An `Estimators` table, which prints itself.

    Raises:
        StrategyError: a site's strategy does not fit it.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def count(p):
        ...     return jnp.sum(jax.vmap(lambda i: ex.sample("b", dist.Bernoulli(p)))(jnp.arange(100)) * 2.0)
        >>> row = vi.estimators(count, 0.3)["b"]
        >>> row["strategy"], row["runs"]
        ('Enum() by lanes', 2)
    """
    layouts: list[Layout] = []

    def staged(params: Any) -> Any:
        layouts.append(objective.staged(params).layout)
        return 0

    eqx.filter_eval_shape(staged, as_data(params))
    return Estimators(tuple(_row(layouts[0], choice) for choice in layouts[0].choices))


def _row(layout: Layout, choice: Choice) -> dict[str, Any]:
    strategy = choice.strategy
    first_only = choice.mode == "locally" or num_alternatives(choice) > 0
    return {
        "address": choice.site.address,
        "distribution": type(choice.site.distribution([None] * choice.site.structure.num_leaves)).__name__,
        "elements": choice.element_shape,
        "strategy": _name(choice),
        "runs": _runs(layout, choice),
        "unbiased": not biased(strategy),
        "orders": "first" if first_only else "all",
        "why": choice.why,
    }


def num_alternatives(choice: Choice) -> int:
    """Return with how many other values a strategy has the rest of the program run."""
    site, strategy = choice.site, choice.strategy
    if isinstance(strategy, (Reparam, Reinforce, Enum)):
        return 0
    value = jax.ShapeDtypeStruct(site.shape, site.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def couple(value: Any, key: Any, leaves: Any) -> Any:
        draw = strategy.couple(site.distribution(leaves), value, key)
        return list(draw.alternatives), draw.relaxation

    alternatives, relaxation = jax.eval_shape(couple, value, key, list(choice.types))
    return len(alternatives) + (0 if relaxation is None else 2)


def _name(choice: Choice) -> str:
    if isinstance(choice.strategy, Enum):
        return "Enum() " + {"lanes": "by lanes", "jointly": "jointly", "locally": "locally"}[choice.mode or "jointly"]
    return repr(choice.strategy)


def _runs(layout: Layout, choice: Choice) -> int:
    elements = math.prod(choice.element_shape)
    singly = math.prod(choice.element_shape[n] for n in replaced_singly(layout, choice))
    if isinstance(choice.strategy, Enumerated):
        ways = {"jointly": choice.strategy.size**elements, "lanes": choice.strategy.size}
        return ways.get(choice.mode or "", 1 + choice.strategy.size * singly)
    return 1 + singly * num_alternatives(choice)
