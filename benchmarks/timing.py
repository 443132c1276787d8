"""Measuring in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

Contender = Callable[[], float]
"""Does the thing once and returns the seconds that it took, by its own clock."""


class Effort(NamedTuple):
    """How much work to put into it: `--quick` asks for less."""

    quick: bool = False

    def rounds(self, number: int) -> int:
        return max(3, number // 5) if self.quick else number


def timed(function: Callable[[], object]) -> Contender:
    """A contender that is timed from outside."""

    def measure() -> float:
        before = time.perf_counter()
        function()
        return time.perf_counter() - before

    return measure


def medians(contenders: Mapping[str, Contender], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """The median seconds of each contender over `rounds` rounds in which each has one turn."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, contender in contenders.items():
            seconds = contender()
            if number >= warm_up:
                results[name].append(seconds)
    return {name: statistics.median(values) for name, values in results.items()}
