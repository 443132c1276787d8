"""When beats are due, and what failures add up to. No I/O, no clock."""

from __future__ import annotations

import math
import zlib


class Schedule:
    """Times on a grid, so that what a beat takes, or a stall, shifts none of those to come."""

    def __init__(self, origin: float, interval: float) -> None:
        self._origin = origin
        self._interval = interval

    def next(self, now: float) -> float:
        """The first time after `now`: those that were missed are not made up for."""
        passed = math.floor((now - self._origin) / self._interval)
        due = self._origin + (passed + 1) * self._interval
        return due if due > now else due + self._interval


def spread(key: str) -> float:
    """From 0 up to 1, evenly over many keys, and the same for the same."""
    return zlib.crc32(key.encode()) / 2**32


class Failures:
    """How many there were in a row.

    Args:
        allowed: with so many the heartbeat has failed.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self.in_a_row = 0

    def succeeded(self) -> None:
        self.in_a_row = 0

    def failed(self, error: str) -> str | None:
        """Counts one; says what there is to say when it was the last."""
        self.in_a_row += 1
        if self.in_a_row < self._allowed:
            return None
        if self._allowed == 1:
            return f"a heartbeat failed: {error}"
        return f"{self.in_a_row} heartbeats in a row failed, the last one: {error}"
