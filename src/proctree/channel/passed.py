"""Descriptors on their way to whoever asked for them."""

from __future__ import annotations

import contextlib
import os


class PassedFds:
    """Descriptors that came with an answer: they are closed unless somebody takes them."""

    __slots__ = ("_fds",)

    def __init__(self, fds: tuple[int, ...] | None = None) -> None:
        self._fds: dict[str, list[int]] = {}
        if fds is not None:
            self.hold(fds)

    def hold(self, fds: tuple[int, ...]) -> None:
        """The first time only, whoever took them since: a frame may come twice (wire.py)."""
        self._fds.setdefault("", list(fds))

    def take(self) -> list[int]:
        """They are the caller's from now on. The second time there are none."""
        held = self._fds.setdefault("", [])
        fds = held[:]
        held.clear()
        return fds

    def close(self) -> None:
        for fd in self.take():
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fds"):  # a signal handler may have raised before it had any
            self.close()
