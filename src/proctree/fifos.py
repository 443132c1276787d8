"""FIFOs that become standard streams.

open(2) of one waits until somebody has its other end open (fifo(7)), and that is what a user wants:
opened with O_NONBLOCK, it would be at its end for a tree that reads before its writer has come. So
it is waited for, but on a thread of its own and not on the loop, and not longer than the tree is
wanted.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from typing import Any

from proctree import worker
from proctree.process import fds


def is_fifo(path: Any) -> bool:
    """Whether there is one; whatever else is the matter is for open(2) to say."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


class Fifo:
    """One that is being opened.

    Args:
        path: where it is.
        flags: O_RDONLY or O_WRONLY.
    """

    def __init__(self, path: Any, flags: int) -> None:
        self._path = path
        self._flags = flags | os.O_CLOEXEC
        self._lock = threading.Lock()
        self._fd = -1
        self._error: OSError | None = None
        self._done = False
        self._abandoned = False
        self._both = -1

    def open(self, then: Callable[[], None]) -> None:
        """Does not block; `then` is called, on another thread, when it is open or cannot be.

        Raises:
            RuntimeError: there is no thread for it.
        """
        worker.run(lambda: self._open(then))

    def _open(self, then: Callable[[], None]) -> None:
        error, fd = None, -1
        try:
            fd = os.open(self._path, self._flags)
            with fds.making():
                fd = fds.own(fds.above_stdio(fd))
        except OSError as caught:
            error = caught
        with self._lock:
            self._fd, self._error, self._done = fd, error, True
            if self._abandoned:
                self._close()
        then()

    def take(self) -> int:
        """The descriptor, which is the caller's. Once, after `then`.

        Raises:
            OSError: it could not be opened.
        """
        if self._error is not None:
            raise self._error
        fd, self._fd = self._fd, -1
        fds.disown(fd)
        return fd

    def abandon(self) -> None:
        """Nobody wants it any more. Twice is allowed."""
        with self._lock:
            if self._abandoned:
                return
            self._abandoned = True
            if self._done:
                self._close()
                return
            # Both ends never wait (fifo(7)), and let the thread go, whether it waits there already
            # or is about to. Who may not open both waits until somebody comes.
            with contextlib.suppress(OSError), fds.making():
                flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
                self._both = fds.own(fds.above_stdio(os.open(self._path, flags)))

    def _close(self) -> None:
        for fd in (self._fd, self._both):
            if fd >= 0:
                fds.close(fd)
        self._fd = self._both = -1
