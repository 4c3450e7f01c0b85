"""Interleaved warm medians: the candidates take turns, so that a busy machine slows them alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def interleaved(candidates: dict[str, Callable[[int], Any]], repeats: int = 15) -> dict[str, dict[str, float]]:
    """Call each candidate with 0, 1, 2, ...; return seconds of the first call and the median of the warm ones."""
    first = {}
    for name, function in candidates.items():
        start = time.perf_counter()
        jax.block_until_ready(function(0))
        first[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(1, repeats + 1):
        for name, function in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(function(repeat))
            times[name].append(time.perf_counter() - start)
    return {name: {"first": first[name], "median": statistics.median(times[name])} for name in candidates}


class CompileCounter:
    """Counts XLA compilations from its making on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event.endswith("backend_compile_duration")


class Row(NamedTuple):
    """One measurement; `limit` is on `ours / rival`, or on `ours` where there is no rival."""

    name: str
    ours: float
    rival: float | None
    unit: str
    limit: float
    first_ours: float | None = None
    first_rival: float | None = None

    @property
    def ratio(self) -> float:
        """What the limit is on."""
        return self.ours if self.rival is None else self.ours / self.rival

    @property
    def holds(self) -> bool:
        """Whether the limit holds."""
        return self.ratio <= self.limit


def normal(x: Any, mean: Any, sd: Any) -> Any:
    """Log density of a normal, as one writes it by hand."""
    return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd) - 0.5 * jnp.log(2 * jnp.pi)


def ratio_row(name: str, found: dict[str, dict[str, float]], who: str, limit: float) -> Row:
    """Return the row of a candidate beside the hand-written one."""
    ours, hand = found[who], found["hand"]
    return Row(name, 1e3 * ours["median"], 1e3 * hand["median"], "ms", limit, 1e3 * ours["first"], 1e3 * hand["first"])
