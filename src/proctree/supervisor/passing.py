"""Output that goes through us to where it would have gone without us."""

from __future__ import annotations

import os
import select


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # O_NONBLOCK belongs to the open file: whoever else has it may have set that, as an ssh
            # that shares our terminal does. The child that would have waited waits.
            room = select.poll()
            room.register(fd, select.POLLOUT)
            room.poll()


def to_stdout(data: bytes) -> None:
    """On a child's own thread: a standard output that takes no more makes that child wait."""
    _write(1, data)


def to_stderr(data: bytes) -> None:
    """As `to_stdout`."""
    _write(2, data)
