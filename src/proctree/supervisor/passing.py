"""Output that goes through us to where it would have gone without us."""

from __future__ import annotations

import os


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def to_stdout(data: bytes) -> None:
    """On a child's own thread: a standard output that takes no more makes that child wait."""
    _write(1, data)


def to_stderr(data: bytes) -> None:
    """As `to_stdout`."""
    _write(2, data)
