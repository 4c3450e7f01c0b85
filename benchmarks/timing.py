"""Interleaved warm medians: the candidates take turns, so that a busy machine slows them alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


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
