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
from proctree.process import fds, pid_namespaces, proof
from proctree.protocol import Message, ProtocolError, Type

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
        main: the main process, with our number; None where that cannot be told any more.
        main_start: its start time by our clock, in clock ticks, if `main` is known.
        owned: whether we are the owner now.
        ends: whether what its main process leaves behind is to be ended.
        ending: 0, or 1 + `recording.Cause` when the warden is ending the tree by itself.
    """

    control: socket.socket
    warden: int
    pidfd: int
    main: int | None
    main_start: int
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
        main, main_start = _main(control, warden, deadline)
    except BaseException:
        fds.close(control.detach())
        if pidfd >= 0:
            fds.close(pidfd)
        raise
    owned, ends = bool(flags & protocol.ATTACHED_OWNER), bool(flags & protocol.ATTACHED_ENDS)
    return Link(control, warden, pidfd, main, main_start, owned, ends, ending)


def _peer(control: socket.socket) -> int:
    pid, uid, _gid = _UCRED.unpack(
        control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    if uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"process {pid} of uid {uid} listens there, not ours")
    if pid <= 0:
        raise OSError(
            errno.ESRCH,
            "its warden lives in another PID namespace, which cannot be seen from this one: reach "
            "it from there, or from where that is seen (the host)",
        )
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


def _await(control: socket.socket, deadline: float, flags: int = 0) -> Message:
    poller = select.poll()
    poller.register(control, select.POLLIN)
    left = deadline - time.monotonic()
    if not poller.poll(max(0.0, left) * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "the warden does not answer")
    data = control.recv(protocol.MAX_MESSAGE, flags)
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, "the warden has just ended")
    try:
        return protocol.decode(data)
    except ProtocolError as error:
        raise OSError(errno.EPROTO, f"the warden sent garbage: {error}") from None


def _answer(control: socket.socket, deadline: float) -> tuple[int, int]:
    message = _await(control, deadline)
    if message.type is Type.FAULT:
        number, _step = message.values
        raise OSError(number, f"the warden refused ({errno_name(number)})")
    _require(message, Type.ATTACHED)
    _owner, ending = message.values
    return message.flags, ending


def _require(message: Message, wanted: Type) -> None:
    if message.type is not wanted:
        raise OSError(errno.EPROTO, f"the warden sent {message.type.name}, and not {wanted.name}")


def _main(control: socket.socket, warden: int, deadline: float) -> tuple[int | None, int]:
    """What STARTED, which stays to be read, says of the main process: by its warden's numbers and
    its warden's clock, and in our namespaces that number may be another process's."""
    message = _await(control, deadline, socket.MSG_PEEK)
    _require(message, Type.STARTED)
    number, _, start_time = message.values
    try:
        proof.check_proc()
        stat = proof.read_stat(number)
        if stat is not None and (stat.ppid, stat.start_time) == (warden, start_time):
            return number, start_time
        if all(_shares(warden, kind) for kind in ("pid", "time")):
            return number, start_time
        ours = pid_namespaces.to_ours(number, warden)
        stat = None if ours is None else proof.read_stat(ours)
    except OSError as error:
        proof.pass_shortage(error)
        return None, 0
    # It is its warden's child until that has reaped it.
    if stat is None or stat.ppid != warden:
        return None, 0
    return stat.pid, stat.start_time


def _shares(warden: int, kind: str) -> bool:
    """Whether it has our namespace of this kind. That of somebody in a user namespace above ours
    may not be looked at (namespaces(7)), and then it is not known."""
    own = f"/proc/self/ns/{kind}"
    if not os.path.exists(own):
        return True  # time: before Linux 5.6
    try:
        return os.path.samefile(own, f"/proc/{warden}/ns/{kind}")
    except OSError as error:
        proof.pass_shortage(error)
        return False
