"""How much of a sender is read: pure."""

from __future__ import annotations


class Budget:
    """A token bucket: so many a second, and no more than `burst` of them at once.

    Args:
        rate: a second.
        burst: how many may be saved up.
        now: the time, in seconds of any clock.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def spend(self, now: float) -> bool:
        """Whether there is one, which is gone then."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
