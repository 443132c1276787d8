"""A pseudo-terminal between a tree and its supervisor: pty(7).

The tree has it as its standard streams and as the controlling terminal of its session, so that
Ctrl-C, window sizes and job control are the business of the tree, as in a terminal window.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections import deque
from typing import Any, NamedTuple

from proctree.latch import Latch
from proctree.loop import WRITE, Loop
from proctree.process import fds

END_OF_INPUT = b"\x04"
"""VEOF, termios(3): at the beginning of a line it ends the input, in the middle it takes two."""

_LARGEST = 0xFFFF
_PIECE = 4096
_WINDOW = struct.Struct("HHHH")


class WindowSize(NamedTuple):
    """In characters: ioctl_tty(2), TIOCSWINSZ."""

    rows: int
    columns: int


def to_window(value: Any) -> WindowSize | None:
    """What `pty=` means: None for no terminal.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if value is False or value is None:
        return None
    if value is True:
        try:
            size = os.get_terminal_size()
        except (OSError, ValueError):  # no terminal of ours, or no standard output at all
            return WindowSize(24, 80)
        return WindowSize(size.lines, size.columns)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"pty: True, or (rows, columns), not {value!r}")
    return _checked(*value)


def _checked(rows: Any, columns: Any) -> WindowSize:
    for name, number in (("rows", rows), ("columns", columns)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"pty: {name} must be an integer, not {number!r}")
        if not 0 < number <= _LARGEST:
            raise ValueError(f"pty: {name} must be 1 to {_LARGEST}, not {number}")
    return WindowSize(rows, columns)


def _set_size(fd: int, size: WindowSize) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _WINDOW.pack(size.rows, size.columns, 0, 0))


def make(size: WindowSize) -> tuple[int, int]:
    """(our end, the tree's end), close-on-exec and above the standard streams."""
    ours, theirs = os.openpty()
    ours, theirs = fds.above_stdio(ours), fds.above_stdio(theirs)
    try:
        _set_size(theirs, size)
    except OSError:
        os.close(ours)
        os.close(theirs)
        raise
    return ours, theirs


class _Typed:
    """What somebody types: what is left of it, and whether they may go on."""

    def __init__(self, data: bytes) -> None:
        self.left = memoryview(bytes(data))
        self.done = Latch()


class Terminal:
    """Our end of a tree's terminal, for typing and for its size. From any thread.

    What the tree writes to it comes by `stdout`.
    """

    def __init__(self, loop: Loop, fd: int) -> None:
        """`fd` is closed with the tree."""
        self._loop = loop
        self._fd = fd
        self._waiting: deque[_Typed] = deque()
        self._registered = False
        self._open = True
        os.set_blocking(fd, False)

    def write(self, data: bytes) -> bool:
        """Types `data`, and returns when the terminal has taken it all: a tree that does not read
        holds the typist up, as it would a person. Returns False when it did not take all: the
        tree has ended, or nobody in it has the terminal open. As on every terminal, a line that is
        longer than 4095 bytes is cut as long as nobody has switched to another mode (termios(3),
        "Canonical and noncanonical mode").

        Not to be called in an output callback of the same tree: what it waits for may be that
        callback.
        """
        if not data:
            return self._open
        typed = _Typed(data)
        self._loop.post(lambda: self._begin(typed))
        typed.done.wait()
        return not typed.left

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of the window; the foreground group of the tree gets SIGWINCH.

        Raises:
            TypeError, ValueError: not a size.
        """
        size = _checked(rows, columns)
        self._loop.post(lambda: self._resize(size))

    # -- on the loop

    def _resize(self, size: WindowSize) -> None:
        if self._open:
            with contextlib.suppress(OSError):  # hung up
                _set_size(self._fd, size)

    def _begin(self, typed: _Typed) -> None:
        if not self._open:
            typed.done.set()
            return
        self._waiting.append(typed)
        if not self._registered:
            self._registered = True
            self._loop.register(self._fd, WRITE, self._writable)

    def type_all(self, data: bytes) -> None:
        """On the loop: types `data`, then ends the input."""
        ending = END_OF_INPUT if data.endswith(b"\n") or not data else END_OF_INPUT * 2
        self._begin(_Typed(data + ending))

    def _writable(self, _mask: int) -> None:
        try:
            while self._waiting:
                typed = self._waiting[0]
                typed.left = typed.left[os.write(self._fd, typed.left[:_PIECE]) :]
                if not typed.left:
                    self._waiting.popleft()
                    typed.done.set()
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody has the other end open
            self._give_up()
            return
        self._rest()

    def _rest(self) -> None:
        if self._registered:
            self._registered = False
            self._loop.unregister(self._fd)

    def _give_up(self) -> None:
        self._rest()
        while self._waiting:
            self._waiting.popleft().done.set()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._give_up()
            fds.close(self._fd)
