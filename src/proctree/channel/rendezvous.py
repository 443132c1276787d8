"""How a process of the tree gets a connection: by asking at a descriptor that it inherited.

The tree holds one end of a SOCK_SEQPACKET pair. Whoever connects sends a nonce there and gets it
back with one end of a stream socket that nobody else has. Two processes that were both handed the
descriptor thus never share a stream, in which the one would get what is for the other; messages
here are whole or not there, so one that dies in between leaves nothing half-read; and an answer
whose asker is gone is told by its nonce.

PROCTREE_CHANNEL is the descriptor's number and the inode of the socket: a number alone may be
another file's by the time that somebody looks at the variable.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator

import msgspec

from proctree.channel.errors import ChannelClosed, ChannelUnavailable
from proctree.channel.passed import from_ancillary, room_for
from proctree.command import CHANNEL_VARIABLE as VARIABLE
from proctree.errors import errno_name

NONCE = 16
MOST = 4096
"""Bytes of an answer at most."""

LOOK_SECONDS = 0.1
"""How often somebody who waits looks at the time, and whether a signal handler has its answer."""

CLAIM_SECONDS = 0.005
"""How long to stand back while another process connects, which takes about a millisecond."""

_RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

_lock = threading.RLock()


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """The answer: a descriptor comes with it unless there is an error."""

    nonce: bytes
    error: str = ""


def describe(fd: int) -> str:
    """The value of the variable for a tree that gets `fd` under its number."""
    return f"{fd}:{os.fstat(fd).st_ino}"


def handle() -> int:
    """The inherited descriptor, for `pass_fds`: who gets it, and our environment, can connect.

    Raises:
        ChannelUnavailable: this process was not handed a channel.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        raise ChannelUnavailable(
            f"no channel: {VARIABLE} is not set. Was this process started by a supervisor with "
            "channel=...?"
        )
    number, _, inode = value.partition(":")
    try:
        fd, expected = int(number), int(inode)
        status = os.fstat(fd)
    except (ValueError, OverflowError, OSError) as error:
        raise _not_handed(value, str(error)) from None
    if not stat.S_ISSOCK(status.st_mode) or status.st_ino != expected:
        raise _not_handed(value, f"descriptor {fd} is another file")
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.fcntl(fd, fcntl.F_GETFD) | fcntl.FD_CLOEXEC)
    return fd


def _not_handed(value: str, why: str) -> ChannelUnavailable:
    return ChannelUnavailable(
        f"no channel: {VARIABLE} is {value!r}, but {why}. Whoever started this process has to hand "
        "it on with pass_fds=[proctree.channel.handle()]"
    )


_asked: dict[bytes, tuple[Welcome, list[int]] | None] = {}
"""What this process waits for, and what came for it: a signal handler that connects in the middle
of a connecting may be the one that receives the answer to it."""


def connect(due: float | None) -> socket.socket:
    """Asks for a connection.

    Args:
        due: time.monotonic() by which it has to be there, or None.

    Raises:
        ChannelUnavailable, ChannelClosed, TimeoutError: see `Channel.connect`.
    """
    fd = handle()
    nonce = os.urandom(NONCE)
    _asked[nonce] = None
    # Of a connecting that a signal handler of ours interrupted: it has the claim already.
    inside = _lock._is_owned()  # type: ignore[attr-defined]
    try:
        with _lock, contextlib.nullcontext() if inside else _claimed(fd, due):
            welcome, received = _exchange(fd, nonce, due)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        raise ChannelClosed(
            f"the supervisor is gone ({errno_name(error.errno or 0)} at connecting)"
        ) from None
    finally:
        _asked.pop(nonce, None)
    if welcome.error or len(received) != 1:
        _close(received)
        raise ChannelClosed(
            f"the supervisor refused the connection: {welcome.error or 'no socket'}"
        )
    return socket.socket(fileno=received[0])


@contextlib.contextmanager
def _claimed(fd: int, due: float | None) -> Iterator[None]:
    """No other process of the tree receives meanwhile: it would be our answer that it got. The lock
    is the process's and ends with it (fcntl(2), advisory record locking); there is none that waits
    for a limited time."""
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # POSIX lets a system choose
            _require_time(due)
            time.sleep(CLAIM_SECONDS)
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)


def _exchange(fd: int, nonce: bytes, due: float | None) -> tuple[Welcome, list[int]]:
    # Not a copy: the claim is gone as soon as any descriptor of the file is closed.
    sock = socket.socket(fileno=fd)
    try:
        _wait(fd, select.POLLOUT, due)
        while not _send(sock, nonce):
            _wait(fd, select.POLLOUT, due)
        while (reply := _asked[nonce]) is None:
            _wait(fd, select.POLLIN, due)
            _receive(sock)
        return reply
    finally:
        sock.detach()


def _send(sock: socket.socket, nonce: bytes) -> bool:
    """Returns whether there was room: others ask too, and the supervisor may be stopped."""
    try:
        sock.send(nonce, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return False
    return True


def _receive(sock: socket.socket) -> None:
    try:
        data, ancillary, _, _ = sock.recvmsg(MOST, room_for(1), _RECEIVE_FLAGS)
    except BlockingIOError:
        return
    received = list(from_ancillary(ancillary))
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    welcome = msgspec.msgpack.decode(data, type=Welcome)
    if welcome.nonce in _asked:
        _asked[welcome.nonce] = (welcome, received)
    else:
        _close(received)  # of one who went away before it was answered


def _wait(fd: int, mask: int, due: float | None) -> None:
    """Until `fd` is ready, or a moment has passed."""
    _require_time(due)
    poller = select.poll()
    poller.register(fd, mask)
    poller.poll(LOOK_SECONDS * 1000)


def _require_time(due: float | None) -> None:
    if due is not None and due <= time.monotonic():
        raise TimeoutError("the supervisor did not answer the connection in time")


def _close(received: list[int]) -> None:
    for fd in received:
        os.close(fd)
