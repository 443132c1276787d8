"""The receiving end of sd_notify(3), for one start of one tree.

Whoever can reach the socket can send something: what counts is who it was. The kernel says that
with each message (SCM_CREDENTIALS, unix(7)), by a number, and since Linux 6.5 by a pidfd as well
(SO_PASSPIDFD), which is the sender's whatever has become of its number. Without that the pidfd is
opened here; a number that changed hands before that is believed if it is now that of a member.

A sender that has been reaped cannot be placed any more, and what it said is refused. That is why
systemd-notify(1) and `proctree.notify.barrier` wait: sd_notify_barrier(3).

Descriptors are not taken: the kernel drops those for which a receiver has no room. But the last
copy of a file is closed by whoever drops it, and that may last as long as its sender likes: a
connection with SO_LINGER (socket(7)) waits for a peer that does not read. So each message is looked
at first (MSG_PEEK), and one that brings descriptors is received on a worker's thread, for which the
messages behind it wait, and nobody else. A sender that waits at a barrier sees its descriptor
closed then, and so after all that came before it was handled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import NamedTuple

import attrs

from proctree import events
from proctree.errors import errno_name, step
from proctree.loop import READ, Loop, Timer
from proctree.process import fds, proof
from proctree.supervisor import notify_directory
from proctree.supervisor.flood import Budget
from proctree.supervisor.main_pid import MainPid
from proctree.supervisor.notification import DATAGRAM_MAX, Notification, parse
from proctree.worker import Worker

TURN = 4
"""Messages of one tree that are read before others have their turn."""

RATE = 1000.0
"""Messages a second; a tree that sends more is read later."""

BURST = 200.0
"""How many it may have saved up."""

PAUSE = 0.1
"""Seconds for which a tree that sends too much is not read."""

AGAIN_SECONDS = 0.02
"""After which a sender is looked at again for whom there were no descriptors or memory."""

_SO_PASSPIDFD = 76
_SCM_PIDFD = 4
_OTHER_NUMBERS = ("sparc", "parisc")
"""Where these are something else: asm/socket.h."""

_UCRED = struct.Struct("=iII")
_INT = struct.Struct("=i")
_CREDENTIALS = socket.CMSG_SPACE(_UCRED.size)
_WITH_PIDFD = _CREDENTIALS + socket.CMSG_SPACE(_INT.size)
_SHORTAGES = (-errno.EMFILE, -errno.ENFILE, -errno.ENOMEM)


class _Message(NamedTuple):
    """`pidfd`: of the sender; -1: it has to be opened; None: it was reaped before we read."""

    data: bytes
    sender: int
    pidfd: int | None


class NotifySocket:
    """Receives from its making on, until `close`.

    Args:
        loop: on whose thread everything is called.
        tree_id, name: of the tree, for events.
        is_member: whether a process belongs to the tree (`Contained.has_member`); its number is
            certainly its own meanwhile.
        received: called with each message of a member, MAINPID in our numbers, and None when it
            was refused.
        main_gone: called with the wait status, or with None if it cannot be known, when the process
            that the tree named by MAINPID has ended. Default: MAINPID is ignored.
        reachable: the tree runs as another user: every user can send, and what members send is
            received.

    Attributes:
        path: of the socket.
        refused: how many messages were of nobody in the tree, or of somebody who had ended.

    Raises:
        OSError: the socket or its directory cannot be made.
    """

    def __init__(
        self,
        loop: Loop,
        tree_id: str,
        name: str,
        is_member: Callable[[int], bool],
        received: Callable[[Notification], None],
        *,
        main_gone: Callable[[int | None], None] | None = None,
        reachable: bool = False,
    ) -> None:
        self.refused = 0
        self._loop = loop
        self._log = events.Sparing(tree_id=tree_id, name=name)
        self._is_member = is_member
        self._received = received
        self._main = None
        if main_gone is not None:
            self._main = MainPid(loop, self._log, is_member, main_gone)
        self._waiting: _Message | None = None
        self._timer: Timer | None = None
        self._closed = False
        self._worker = Worker()
        self._budget = Budget(RATE, BURST, monotonic())
        with fds.making(), step("notify socket"):
            self.path = notify_directory.get(reachable=reachable).next_path()
            self._sock = _open(self.path, reachable)
            self._fd = fds.own(self._sock.fileno())
        self._by_pidfd = _passes_pidfds(self._sock)
        _all.add(self)
        try:
            self._watch()
        except BaseException:
            self._give_back()
            raise

    def environment(self, watchdog: float | None = None) -> dict[str, str]:
        """The variables of the tree.

        Args:
            watchdog: the interval of its watchdog in seconds; None or 0: none. (WATCHDOG_PID is not
                set: nobody knows the number yet, and sd_watchdog_enabled(3) does without.)
        """
        variables = {"NOTIFY_SOCKET": self.path}
        if watchdog:
            variables["WATCHDOG_USEC"] = str(max(1, round(watchdog * 1e6)))
        return variables

    def close(self) -> None:
        """On the loop's thread. Nothing is called any more."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._main is not None:
            self._main.close()
        if self._waiting is not None:
            self._done(self._waiting)
        self._loop.unregister(self._fd)
        self._give_back()

    def _give_back(self) -> None:
        """What was not received is dropped by whoever closes the socket: see the module."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._worker.post(lambda: fds.close(self._sock.detach()))

    def forget(self) -> None:
        """In a forked child, where the descriptor is closed already."""
        self._sock.detach()

    # -- reading

    def _watch(self) -> None:
        self._loop.register(self._fd, READ, self._readable)

    def _readable(self, _mask: int) -> None:
        for _ in range(TURN):
            seen = self._peek()
            if seen is None:
                return
            message, brings = seen
            if brings:
                self._loop.unregister(self._fd)
                self._worker.post(partial(self._drop, message))
                return
            if self._by_pidfd:
                message = message._replace(pidfd=self._receive_pidfd())
            else:
                self._sock.recvmsg(0, 0, socket.MSG_DONTWAIT)
            if not self._go_through(message):
                return

    def _peek(self) -> tuple[_Message, bool] | None:
        """The next message, and whether there are descriptors with it; it stays where it is."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                DATAGRAM_MAX + 1, _CREDENTIALS, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        sender = 0
        for _level, kind, value in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                sender = _UCRED.unpack(value)[0]
        return _Message(data, sender, -1), bool(flags & socket.MSG_CTRUNC)

    def _drop(self, message: _Message) -> None:
        """On a worker's thread: receives what was seen, and drops what comes with it."""
        with contextlib.suppress(OSError):
            self._sock.recvmsg(0, 0, socket.MSG_DONTWAIT)
        self._loop.post(partial(self._dropped, message))

    def _dropped(self, message: _Message) -> None:
        if not self._closed and self._go_through(message):
            self._watch()

    def _go_through(self, message: _Message) -> bool:
        """Whether more may be read now."""
        room = self._budget.spend(monotonic())
        if not self._take(message) or self._closed:
            return False
        if not room:
            self._log.warning("notify.flood", rate=RATE)
            self._rest(PAUSE)
        return room

    def _receive_pidfd(self) -> int | None:
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
        with fds.making():
            _, ancillary, _, _ = self._sock.recvmsg(
                0, _WITH_PIDFD, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
            pidfd: int | None = -1
            for _level, kind, value in ancillary:
                if kind == _SCM_PIDFD:
                    (pidfd,) = _INT.unpack(value)
            if pidfd is not None and pidfd >= 0:
                fds.own(pidfd)
            elif pidfd not in (-1, *_SHORTAGES):
                pidfd = None
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 0)
        return pidfd

    def _rest(self, seconds: float) -> None:
        """The kernel keeps what comes, and makes senders wait when that is much."""
        self._loop.unregister(self._fd)
        self._timer = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        if self._waiting is not None:
            message, self._waiting = self._waiting, None
            if not self._take(message):
                return
        if not self._closed:
            self._watch()

    # -- handling

    def _take(self, message: _Message) -> bool:
        """False if it has to wait."""
        notification = parse(message.data)
        waits = False
        try:
            if not notification.barrier:
                self._handle(notification, message)
        except _Short as short:
            name = errno_name(short.args[0])
            self._log.warning("notify.delayed", errno=name)
            waits = True
        finally:
            if not waits:
                self._done(message)
        if waits:
            self._waiting = message
            self._rest(AGAIN_SECONDS)
        return not waits

    def _done(self, message: _Message) -> None:
        if message.pidfd is not None and message.pidfd >= 0:
            fds.close(message.pidfd)

    def _handle(self, notification: Notification, message: _Message) -> None:
        try:
            with _held(message) as pidfd:
                if not self._is_known(message.sender, pidfd):
                    return
                notification = self._with_main_pid(notification, message.sender)
        except OSError as error:
            raise _Short(error.errno or 0) from None
        for refused in notification.refused:
            self._log.warning("notify.malformed", assignment=refused.name, why=refused.why)
        self._received(notification)

    def _is_known(self, sender: int, pidfd: int | None) -> bool:
        member = pidfd is not None and self._is_member(sender)
        if pidfd is None or not proof.holds_number(pidfd):
            why = "it ended before it could be looked at: it should wait, sd_notify_barrier(3)"
            event = "notify.sender_gone"
        elif not member:
            why, event = "it is no process of this tree", "notify.stranger"
        else:
            return True
        self.refused += 1
        self._log.warning(event, sender=sender, why=why)
        return False

    def _with_main_pid(self, notification: Notification, sender: int) -> Notification:
        if notification.main_pid is None:
            return notification
        pid = None if self._main is None else self._main.tell(notification.main_pid, sender)
        return attrs.evolve(notification, main_pid=pid)


class _Short(Exception):
    """There were no descriptors or no memory to look at the sender; errno."""


@contextlib.contextmanager
def _held(message: _Message) -> Iterator[int | None]:
    """A pidfd of the sender; None when it has been reaped."""
    if message.pidfd is None or message.pidfd >= 0 or message.sender <= 0:
        yield message.pidfd if message.sender > 0 else None
        return
    with fds.making():
        pidfd = proof.open_pidfd(message.sender)
        if pidfd is not None:
            fds.own(pidfd)
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            fds.close(pidfd)


def _open(path: str, reachable: bool) -> socket.socket:
    sock = fds.lifted(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    try:
        # Before anybody can send: the kernel notes the sender when a message is sent.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(path)
        # Sending to it takes the right to write: unix(7), "Pathname socket ownership and
        # permissions".
        os.chmod(path, 0o666 if reachable else 0o600)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return sock


def _passes_pidfds(sock: socket.socket) -> bool:
    if os.uname().machine.startswith(_OTHER_NUMBERS):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 0)
    except OSError:
        return False
    return True


_all: weakref.WeakSet[NotifySocket] = weakref.WeakSet()


def _forget() -> None:
    for notify_socket in tuple(_all):
        notify_socket.forget()
    _all.clear()


fds.in_forked_child(_forget)
