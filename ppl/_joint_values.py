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


def joint_values(target: Posterior, what: str) -> Choices:
    """Return all joint values of the latents, along a new first axis."""
    latents = dict(leaves_of(target.latent_sites()))
    supports, count = _supports(target, latents), 1
    for path, entry in latents.items():
        if entry.conditional or supports[path].shape[0] == 0:
            raise ControlFlowError(
                f"{what}: {path!r} at {entry.site.where} "
                + ("stands in a branch or has a mask" if entry.conditional else "has no finite, known support")
                + ", so that its values cannot be enumerated. Use vi.sir, or keep it."
            )
        count *= supports[path].shape[0] ** math.prod(entry.elements)
        if count > _MOST_TOGETHER:
            raise ControlFlowError(
                f"{what}: all joint values of the latents are enumerated, and those up to {path!r} at "
                f"{entry.site.where} are more than {_MOST_TOGETHER}. Use vi.sir, or a model's own guide."
            )
    sizes = [supports[path].shape[0] for path, entry in latents.items() for _ in range(math.prod(entry.elements))]
    table = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    found, column = [], 0
    for path, entry in latents.items():
        number = math.prod(entry.elements)
        own = supports[path][table[:, column : column + number]]
        found.append((path, jnp.reshape(own, (len(table), *entry.shape)).astype(entry.dtype)))
        column += number
    return nested(found)


def _supports(target: Posterior, latents: dict[str, Any]) -> dict[str, Any]:
    """Return the values that one element of each latent can take, with no row where they are not known."""
    zeros = nested((path, jnp.zeros(entry.shape, entry.dtype)) for path, entry in latents.items())
    given = merged(zeros, target.observations)
    records = dict(leaves_of(stage(target.program).run(_listing, given=given).choices))
    return {path: records[path][(0,) * len(entry.times)] for path, entry in latents.items()}


def _list(site: Any, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    del source, mask
    values = None if site.fixed else single_support(site, leaves)
    return Visit(given, jnp.zeros(0) if values is None else jnp.asarray(values), 0.0, 0.0)


_listing = Visitor(_list, kind="list")
