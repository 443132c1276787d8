"""Descriptors on their way to whoever asked for them.

Not by `socket.send_fds` and `socket.recv_fds`: up to Python 3.12 those take flags and drop them, so
that the one waits where it must not, and what the other receives outlives an exec.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from typing import Any

MOST_FDS = 32
"""Descriptors that may come with one frame."""

SO_PASSRIGHTS = 83
"""asm-generic/socket.h; on other machines it may be something else, and then it is refused."""

INT = array.array("i").itemsize

Ancillary = list[tuple[int, int, bytes]]


def to_ancillary(fds: tuple[int, ...]) -> list[tuple[int, int, array.array[int]]]:
    """For sendmsg(2): SCM_RIGHTS of unix(7)."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def room_for(count: int) -> int:
    """Bytes of ancillary data that so many descriptors need."""
    return socket.CMSG_SPACE(count * INT)


def from_ancillary(ancillary: Ancillary) -> tuple[int, ...]:
    """From recvmsg(2)."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % INT])
    return tuple(fds)


def take_none(sock: socket.socket) -> None:
    """Nobody can send descriptors to this end: he gets EPERM (SO_PASSRIGHTS, since Linux 6.16).

    To receive and drop one is to close it, and the last close of a TCP socket with SO_LINGER whose
    peer does not read takes as long as its sender likes (socket(7)): our loop would wait for it.
    Where the kernel is older that is a thing a tree can do to the channels of its supervisor.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


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


class Kept:
    """Descriptors of an answer, until it is sent."""

    def __init__(self, passed: Any) -> None:
        # First of all: whatever is wrong with the others, these are to be closed.
        self._owned = PassedFds(tuple(fd for fd in passed if type(fd) is int))
        if len(passed) > MOST_FDS:
            raise ValueError(f"fds: {MOST_FDS} at most go with an answer, not {len(passed)}")
        self._objects = [fd for fd in passed if type(fd) is not int]
        self.numbers = tuple(fd if type(fd) is int else fd.fileno() for fd in passed)
        for number in self.numbers:
            os.fstat(number)  # with one that is not open the connection would end
