"""Chains spread over devices: each device runs its own chains, and waits for no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def devices_of(devices: Sequence[Any] | Mesh | None, num_chains: int) -> tuple[Any, ...] | None:
    """Return the devices to run on, the chains of which divide evenly; None for JAX's default."""
    if devices is None:
        return None
    each = tuple(devices.devices.flat) if isinstance(devices, Mesh) else tuple(devices)
    if not each or num_chains % len(each):
        raise ValueError(
            f"mcmc: the chains are dealt evenly to the devices, got {num_chains} chains for {len(each)} devices. Set "
            f"num_chains to a multiple of {max(len(each), 1)}."
        )
    return each


def over_chains(function: Callable[..., Any], devices: tuple[Any, ...] | None) -> Callable[..., Any]:
    """Map a function over chains, the leading axis of its arguments; over devices, each maps over a share of them.

    A loop that runs until the last chain is done (a no-U-turn tree) ends on each device with that device's chains.
    """
    vectorized = jax.vmap(function)
    if devices is None:
        return vectorized
    mesh = Mesh(np.array(devices), ("chains",))
    share = PartitionSpec("chains")
    return jax.shard_map(vectorized, mesh=mesh, in_specs=share, out_specs=share, check_vma=False)
