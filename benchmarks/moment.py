"""The moment at which a process exits, noted by the process itself: programs/ending.c."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

from benchmarks.native import program, scratch
from benchmarks.timing import Contender

DELAY_MS = 10

Ended = tuple[float, float]
"""When the waiting began, and when it was over; by time.monotonic()."""


class Moment:
    """The memory in which the process notes when it exits."""

    def __init__(self) -> None:
        self._path = scratch() / "moment"
        self._path.write_bytes(bytes(mmap.PAGESIZE))
        with open(self._path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    @property
    def argv(self) -> list[str]:
        return [program("ending"), str(self._path), str(DELAY_MS)]

    def after(self, wait: Callable[[], Ended]) -> Contender:
        """Times a way to wait. A turn in which the process was gone before the waiting began says
        nothing about waiting, and is taken again."""

        def measure() -> float:
            while True:
                began, known = wait()
                exited: float = struct.unpack_from("q", self._memory)[0] / 1e9
                if exited > began:
                    return known - exited

        return measure
