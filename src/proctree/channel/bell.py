"""Wakes a thread that polls, from any thread and from signal handlers."""

from __future__ import annotations

import os

from proctree.channel.wire import unless_handled
from proctree.process import fds


class _Counter:
    """An eventfd(2), closed with the last reference to it."""

    __slots__ = ("_pid", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fds.own(fd)
        self._pid = os.getpid()

    def __del__(self) -> None:
        # In a forked child it is closed, and its number may be that of another file.
        if self._pid == os.getpid():
            fds.close(self.fd)


class Bell:
    """An eventfd(2) that is not written to when its number is somebody else's already.

    No lock sees to that, but a reference: whoever rings keeps it open meanwhile. For who rings may
    be in the middle of delivering (wire.py), and keep all others from it; and a lock may be held by
    a thread that a signal handler has interrupted, whose handler waits for what is to be delivered.

    Attributes:
        fd: to be polled for input.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._counter: _Counter | None = _Counter(self.fd)

    def ring(self) -> None:
        counter = self._counter
        if counter is not None:
            os.eventfd_write(counter.fd, 1)

    def silence(self) -> None:
        """Until it rings again."""
        counter = self._counter
        try:
            if counter is not None:
                os.eventfd_read(counter.fd)
        except BlockingIOError as error:
            unless_handled(error)

    def close(self) -> None:
        """A second time it does nothing."""
        self._counter = None
