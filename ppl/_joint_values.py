"""All joint values of a target's finite latents."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._errors import ControlFlowError
from ._evaluate import Visit, Visitor
from ._finite import single_support
from ._nested import Choices, leaves_of, merged, nested
from ._posterior import Posterior
from ._staging import stage

_MOST_TOGETHER = 2**14
"""The most joint values that are enumerated."""


def joint_values(
    target: Posterior, what: str, *, conditional: bool = False, remedy: str = "Use vi.sir, or keep it."
) -> Choices:
    """Return all joint values of the latents, along a new first axis; `conditional` admits those in branches."""
    latents = dict(leaves_of(target.latent_sites()))
    supports, count = element_supports(target), 1
    for path, entry in latents.items():
        absent = entry.conditional and not conditional
        if absent or supports[path].shape[0] == 0:
            raise ControlFlowError(
                f"{what}: {path!r} at {entry.site.where} "
                + ("stands in a branch or has a mask" if absent else "has no finite, known support")
                + f", so that its values cannot be enumerated. {remedy}"
            )
        count *= supports[path].shape[0] ** number_of(entry)
        if count > _MOST_TOGETHER:
            raise ControlFlowError(
                f"{what}: all joint values of the latents are enumerated, and those up to {path!r} at "
                f"{entry.site.where} are more than {_MOST_TOGETHER}. {remedy}"
            )
    sizes = [supports[path].shape[0] for path, entry in latents.items() for _ in range(number_of(entry))]
    table = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    found, column = [], 0
    for path, entry in latents.items():
        number = number_of(entry)
        own = supports[path][table[:, column : column + number]]
        found.append((path, jnp.reshape(own, (len(table), *entry.shape)).astype(entry.dtype)))
        column += number
    return nested(found)


def number_of(entry: Any) -> int:
    """Return the number of a latent's elements."""
    return math.prod(entry.elements) if entry.missing is None else entry.missing


def element_supports(target: Posterior) -> dict[str, Any]:
    """Return the values that one element of each latent can take, with no row where they are not known."""
    latents = dict(leaves_of(target.latent_sites()))
    zeros = nested((path, jnp.zeros(entry.shape_of_all, entry.dtype)) for path, entry in latents.items())
    given = merged(target.observations, zeros)
    in_branches: dict[str, list[np.ndarray]] = {}
    records = dict(leaves_of(stage(target.program).run(_listing(in_branches), given=given).choices))
    supports = {path: records[path][(0,) * len(entry.elements)] for path, entry in latents.items()}
    for path in supports:
        first, *others = in_branches.get(path.split("/")[-1], [np.zeros(0)])
        if not all(np.array_equal(first, other) for other in others):  # two branches with one address, and not alike
            supports[path] = jnp.zeros(0)
    return supports


def _listing(in_branches: dict[str, list[np.ndarray]]) -> Visitor:
    """Return a visitor that records the support at every element, which branches can join."""

    def visit(site: Any, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
        del source
        values = None if site.fixed else single_support(site, leaves)
        values = np.zeros(0) if values is None else values
        if mask is not None:
            in_branches.setdefault(site.address, []).append(values)
        record = jnp.broadcast_to(values, site.element_shape + values.shape)
        return Visit(given, record, 0.0, 0.0)

    return Visitor(visit, everywhere=True, kind="list")
