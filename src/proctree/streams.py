"""Pipes between a tree and its supervisor, on the loop.

Reading stops at the end of file, or, once the tree is proved empty, when everything that it can
have written has been read: a process outside the tree that still holds the pipe open then costs
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import termios
from collections.abc import Callable

from proctree.loop import LOOK_SECONDS, READ, WRITE, Loop
from proctree.output import CallbackSink, CaptureSink, PullSink, Sink
from proctree.process import fds

CALLBACK_CHUNK = 64 * 1024
CAPTURES_PER_TURN = 8
CALLBACKS_PER_TURN = 2
"""How often one stream is read before the loop looks after the others. After each reading the loop
wants the interpreter's lock again, for which whoever gets the callbacks may make it wait."""

F_SETPIPE_SZ = 1031
PIPE_SIZE = 1024 * 1024
"""Bytes asked for. With the default 64 KiB, writer and reader run in turns and not side by side.
fcntl(2): an unprivileged user gets what /proc/sys/fs/pipe-user-pages-soft leaves."""


TERMINAL_SIZE = 1024 * 1024
"""Bytes; more than the kernel keeps of what was written to a pseudo-terminal
(TTYB_DEFAULT_MEM_LIMIT)."""


def widen(fd: int) -> None:
    """Makes a pipe hold more, where the kernel lets us."""
    with contextlib.suppress(OSError):  # EPERM: it works with its present size, only slower
        fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)


class OutputStream:
    """One pipe that the tree writes to.

    Args:
        fd: our end; it is closed at the end.
        ended: called on the loop once, when the stream has ended and everything was delivered.
    """

    def __init__(self, loop: Loop, fd: int, sink: Sink, ended: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._sink = sink
        self._ended = ended
        self._left: int | None = None
        self._terminal = os.isatty(fd)
        self._registered = False
        self._finished = False
        os.set_blocking(fd, False)

    def start(self) -> None:
        self._registered = True
        self._loop.register(self._fd, READ, self._readable)

    def _readable(self, _mask: int) -> None:
        capture = isinstance(self._sink, CaptureSink)
        for _ in range(CAPTURES_PER_TURN if capture else CALLBACKS_PER_TURN):
            if self._left == 0:
                self._finish()
                return
            try:
                more = self._read_once()
            except BlockingIOError:
                if self._left is not None:
                    self._finish()
                return
            except OSError as error:
                # EIO of a terminal whose other end is closed (ioctl_tty(2)) is its end; want of
                # memory is not.
                if error.errno == errno.ENOMEM:
                    self._read_later()
                else:
                    self._finish()
                return
            if not more:
                return
        if self._left == 0:
            # Who else holds the pipe may never write to it: epoll would not call again.
            self._finish()

    def _read_once(self) -> bool:
        """False when there is nothing to do until somebody calls again."""
        sink = self._sink
        if isinstance(sink, CaptureSink):
            size = os.readv(self._fd, [self._window()])
            more = size > 0 and sink.feed(self._loop.buffer[:size])
        else:
            limit = CALLBACK_CHUNK if self._left is None else min(CALLBACK_CHUNK, self._left)
            data = os.read(self._fd, limit)
            size = len(data)
            more = size > 0 and sink.feed(data)
        if size == 0:
            self._finish()
            return False
        if self._left is not None:
            self._left -= size
        if not more:
            self._pause()
        return more

    def _window(self) -> memoryview:
        buffer = self._loop.buffer
        return buffer if self._left is None else buffer[: self._left]

    def _read_later(self) -> None:
        self._pause()
        self._loop.call_later(LOOK_SECONDS, self._resume)

    def _pause(self) -> None:
        # Unregistered and not just masked: epoll reports a hang-up whether asked for or not.
        if self._registered:
            self._registered = False
            self._loop.unregister(self._fd)

    def resume(self) -> None:
        """From any thread: the sink takes more."""
        self._loop.post(self._resume)

    def _resume(self) -> None:
        if not self._registered and not self._finished:
            self.start()
            if self._left is not None:
                self._readable(READ)  # nothing more may come that epoll would tell

    def drain(self) -> None:
        """The tree is empty: what the pipe holds now is all that it ever wrote."""
        if self._finished or self._left is not None:
            return
        if self._terminal:
            # Much of it is still on its way through the kernel, where FIONREAD does not look, but
            # read(2) does (n_tty_read(), tty_buffer_flush_work() of the kernel).
            self._left = TERMINAL_SIZE
        else:
            waiting = bytearray(4)
            fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
            (self._left,) = struct.unpack("i", waiting)
        if isinstance(self._sink, PullSink):
            self._sink.widen()
            self._resume()
        if self._registered:
            self._readable(READ)

    def _finish(self) -> None:
        self._pause()
        self._finished = True
        fds.close(self._fd)
        if isinstance(self._sink, CallbackSink) and not self._sink.at_end:
            self._sink.end(lambda: self._loop.post(self._ended))
            return
        if isinstance(self._sink, PullSink):
            self._sink.end()
        self._ended()

    def close(self) -> None:
        """Gives the stream up, whatever is still in it."""
        if isinstance(self._sink, CallbackSink):
            self._sink.drop()
        elif isinstance(self._sink, PullSink):
            self._sink.end()
        if not self._finished:
            self._pause()
            self._finished = True
            fds.close(self._fd)


class InputStream:
    """Bytes for the tree's standard input; closed when all are written."""

    def __init__(self, loop: Loop, fd: int, data: bytes) -> None:
        self._loop = loop
        self._fd = fd
        self._left = memoryview(data)
        self._open = True
        os.set_blocking(fd, False)

    def start(self) -> None:
        self._loop.register(self._fd, WRITE, self._writable)

    def _writable(self, _mask: int) -> None:
        try:
            while self._left:
                written = os.write(self._fd, self._left[:CALLBACK_CHUNK])
                self._left = self._left[written:]
        except BlockingIOError:
            return
        except OSError as error:
            # EPIPE: the program does not want the rest, which is its right (as for subprocess).
            if error.errno != errno.EPIPE:
                raise
        self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.unregister(self._fd)
            fds.close(self._fd)
