"""Looking for an answer without a sleep in between, where that has paid.

To be woken takes some 30 us on both sides, more than many an answer. Who has nothing else to do may
as well look at the socket until the answer is there, for about as long as that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

SECONDS = 60e-6
"""How long it is looked for."""

MOST_FAILURES = 10
"""So that where answers take longer it costs a caller a thousandth of that."""


class Asked(Protocol):
    """A request under way. `answer` is not None when it has one."""

    @property
    def answer(self) -> object: ...


class Closely:
    """Of those that wait in the same way.

    Args:
        advance: receives what can be without waiting, and delivers.
    """

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance
        self._plain = 0
        self._failures = 0

    def look(self, asked: Asked) -> bool:
        """Returns whether the answer came. Each time that it did not is followed by twice as many
        requests that are not looked for."""
        if self._plain:
            self._plain -= 1
            return False
        end = time.perf_counter() + SECONDS
        while True:  # once at least, however long we were kept from it
            self._advance()
            if asked.answer is not None:
                self._failures = 0
                return True
            if time.perf_counter() >= end:
                break
        self._failures = min(self._failures + 1, MOST_FAILURES)
        self._plain = 1 << self._failures
        return False
