"""Descriptors on their way to whoever asked for them."""

from __future__ import annotations

import contextlib
import os


class PassedFds:
    """Descriptors that came with an answer: they are closed unless somebody takes them."""

    __slots__ = ("_fds",)

    def __init__(self, fds: tuple[int, ...]) -> None:
        self._fds = fds

    def take(self) -> list[int]:
        """They are the caller's from now on. The second time there are none."""
        fds, self._fds = self._fds, ()
        return list(fds)

    def close(self) -> None:
        for fd in self.take():
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()
