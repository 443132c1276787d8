"""Wakes a thread that polls, from any thread and from signal handlers."""

from __future__ import annotations

import os
import threading

from proctree.channel.wire import unless_handled
from proctree.process import fds


class Bell:
    """An eventfd(2) that is not written to when its number is somebody else's already.

    Attributes:
        fd: to be polled for input.
    """

    def __init__(self) -> None:
        self.fd = fds.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._lock = threading.RLock()
        self._open: dict[int, None] = {self.fd: None}

    def ring(self) -> None:
        with self._lock:
            if self._open:
                os.eventfd_write(self.fd, 1)

    def silence(self) -> None:
        """Until it rings again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError as error:
            unless_handled(error)

    def close(self) -> None:
        """A second time it does nothing."""
        with self._lock:
            if self._open:
                # In this order: closed twice it would be somebody else's the second time.
                self._open.clear()
                fds.close(self.fd)
