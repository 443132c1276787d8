"""Reaching the warden of a tree that somebody else started: over the socket in its run's directory.

Who answers there is known for certain: listen(2) is the warden's call, and so SO_PEERCRED
(unix(7)) names the warden, a pidfd of that number is opened, and what the warden answers to a
question asked behind that proves that it has not been reaped meanwhile.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import NamedTuple

from proctree import protocol
from proctree.containment.meeting import connect
from proctree.errors import errno_name
from proctree.process import fds
from proctree.protocol import ProtocolError, Type

NOBODY_THERE = (
    ConnectionRefusedError,
    ConnectionResetError,
    FileNotFoundError,
    BrokenPipeError,
)
"""What `reach` raises when nobody listens: the tree is not yet started, or has ended."""

_UCRED = struct.Struct("=iII")


class Link(NamedTuple):
    """A connection to a warden, and who that is.

    Attributes:
        control: the socket; non-blocking. STARTED, and EXITED if it has, come next.
        warden, pidfd: the warden.
        owned: whether we are the owner now.
        ends: whether what its main process leaves behind is to be ended.
        ending: 0, or 1 + `recording.Cause` when the warden is ending the tree by itself.
    """

    control: socket.socket
    warden: int
    pidfd: int
    owned: bool
    ends: bool
    ending: int

    def close(self) -> None:
        """Gives both descriptors back."""
        fds.close(self.pidfd)
        fds.close(self.control.detach())


def reach(place: str, *, own: bool, timeout: float) -> Link:
    """Connects, and attaches. Blocks.

    Args:
        place: the directory of the attempt.
        own: whether we want to be the owner, if there is none or when there is none any more.
        timeout: seconds.

    Raises:
        NOBODY_THERE: as it says.
        TimeoutError: who listens does not answer.
        OSError: something else; `errno.EUSERS`: as many are attached as can be.
    """
    deadline = time.monotonic() + timeout
    control = connect(place, timeout)
    pidfd = -1
    try:
        warden = _peer(control)
        pidfd = _open(warden)
        control.send(protocol.encode_attach(own=own))
        flags, ending = _answer(control, deadline)
    except BaseException:
        fds.close(control.detach())
        if pidfd >= 0:
            fds.close(pidfd)
        raise
    owned, ends = bool(flags & protocol.ATTACHED_OWNER), bool(flags & protocol.ATTACHED_ENDS)
    return Link(control, warden, pidfd, owned, ends, ending)


def _peer(control: socket.socket) -> int:
    pid, uid, _gid = _UCRED.unpack(
        control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    if uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"process {pid} of uid {uid} listens there, not ours")
    if pid <= 0:
        raise OSError(errno.ESRCH, "its warden lives in another PID namespace")
    return int(pid)


def _open(warden: int) -> int:
    try:
        with fds.making():
            return fds.own(os.pidfd_open(warden))
    except OSError as error:
        # It has ended since we connected; EINVAL: its number is a thread's by now (pidfd_open(2)).
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise ConnectionResetError(errno.ECONNRESET, "the warden has just ended") from None
        raise


def _answer(control: socket.socket, deadline: float) -> tuple[int, int]:
    poller = select.poll()
    poller.register(control, select.POLLIN)
    left = deadline - time.monotonic()
    if not poller.poll(max(0.0, left) * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "the warden does not answer")
    data = control.recv(protocol.MAX_MESSAGE)
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, "the warden has just ended")
    try:
        message = protocol.decode(data)
    except ProtocolError as error:
        raise OSError(errno.EPROTO, f"the warden sent garbage: {error}") from None
    if message.type is Type.FAULT:
        number, _step = message.values
        raise OSError(number, f"the warden refused ({errno_name(number)})")
    if message.type is not Type.ATTACHED:
        raise OSError(errno.EPROTO, f"the warden sent {message.type.name} first")
    _owner, ending = message.values
    return message.flags, ending
