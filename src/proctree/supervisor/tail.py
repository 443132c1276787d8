"""What a child said last: kept for the one who has to find out why it ended."""

from __future__ import annotations

LINES = 20
"""How many lines are shown."""


class Tail:
    """The last bytes of a child's output, both streams as they came.

    Fed on the child's worker, read from anywhere: each change is one assignment.
    """

    __slots__ = ("_data", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = b""

    def feed(self, data: bytes) -> None:
        """More output."""
        if self._limit:
            kept = data if len(data) >= self._limit else self._data + data
            self._data = bytes(kept[-self._limit :])

    def lines(self, most: int = LINES) -> tuple[str, ...]:
        """The last lines, at most `most`; the first of them may be cut."""
        text = self._data.decode("utf-8", "replace")
        return tuple(text.splitlines()[-most:])
