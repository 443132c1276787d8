"""Output that goes through us to where it would have gone without us."""

from __future__ import annotations

from proctree.process import fds


def to_stdout(data: bytes) -> None:
    """On a child's own thread: a standard output that takes no more makes that child wait."""
    fds.write_all(1, data)


def to_stderr(data: bytes) -> None:
    """As `to_stdout`."""
    fds.write_all(2, data)
