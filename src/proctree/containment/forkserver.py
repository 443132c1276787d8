"""What runs in a template: it imports what its functions need, and then forks when it is asked to.

One thread, and none of the user's code after the imports: what a function is called with is
unpickled in its own process. What goes over the socket to the supervisor are single messages
(SOCK_SEQPACKET), each of them `HEADER` and what its kind adds.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import enum
import errno
import fcntl
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from functools import partial
from typing import NamedTuple, NoReturn

from proctree import attributes as _attributes  # noqa: F401 - here, and not in every fork
from proctree.command import TREE_VARIABLE, Command
from proctree.containment.forking import Birth, become_warden, report_failure
from proctree.process import child, fds, fresh, prctl
from proctree.process import namespaces as _namespaces  # noqa: F401 - as above

HEADER = struct.Struct("=BII")
"""Kind, serial, and one number: how many descriptors come with it, or pid, or errno, or threads."""

TRACER_PAUSE_MS = 1000

_ALL = signal.valid_signals()

TEXT_MOST = 4096
"""Bytes of an explanation."""

DESCRIPTORS_MOST = 253
"""SCM_MAX_FD of the kernel: unix(7)."""


class Kind(enum.IntEnum):
    FORK = 1
    """To the template, with the descriptors of an `Order`."""
    READY = 2
    """It has imported everything; the number of its threads."""
    FAILED = 3
    """It has not; a text."""
    BORN = 4
    """The number of the process that was forked for a serial, with a pidfd of it."""
    UNBORN = 5
    """None was, because of an errno."""
    REAPED = 6
    """It has ended and been reaped."""


class Order(NamedTuple):
    """The first descriptor that comes with FORK is a file with this, pickled. The others are named
    by their position behind it.

    Attributes:
        command: with the function as its `payload`.
        birth, warden, arguments: as in `Request`.
        stdio: None: the supervisor itself has none.
        passed: with the numbers that they are to have.
    """

    command: Command
    birth: Birth
    warden: str
    arguments: list[bytes]
    stdio: tuple[int | None, int | None, int | None]
    passed: tuple[tuple[int, int], ...]


CONTROL, WATCH, CWD, OTHERS = 0, 1, 2, 3
"""Positions: the warden's socket, a pidfd of the supervisor, the supervisor's working directory."""


def serve(number: int, preload: tuple[str, ...]) -> NoReturn:
    """The whole life of a template.

    Args:
        number: of the socket to the supervisor; its end is ours.
        preload: the modules to import.
    """
    os.set_inheritable(number, False)
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The supervisor has none either. Nothing else is to get its number.
            os.open(os.devnull, os.O_RDWR)
    server = _Server(socket.socket(fileno=fds.own(number)))
    for module in preload:
        try:
            importlib.import_module(module)
        except BaseException as error:
            text = f"{module!r} cannot be imported: {type(error).__name__}: {error}"
            encoded = text.encode("utf-8", "backslashreplace")[:TEXT_MOST]
            server.sock.send(HEADER.pack(Kind.FAILED, 0, 0) + encoded)
            raise
    # What is there now stays: a collection in a child would write to every page of it, and so
    # have them copied.
    gc.collect()
    gc.freeze()
    server.say(Kind.READY, 0, len(os.listdir("/proc/self/task")))
    server.run()


class _Server:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._calls = prctl.load()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._children: dict[int, int] = {}
        """pidfd -> serial."""
        self._held: set[int] = set()
        """Pidfds of those that have ended and cannot be reaped yet."""

    def say(self, kind: Kind, serial: int, number: int) -> None:
        self.sock.send(HEADER.pack(kind, serial, number))

    def run(self) -> NoReturn:
        number = self.sock.fileno()
        while True:
            # Nothing tells when a tracer (ptrace(2)) lets go of one that has ended.
            ready = self._poll.poll(TRACER_PAUSE_MS if self._held else None)
            for fd in tuple(self._held):
                self._reap(fd)
            for fd, _ in ready:
                if fd != number:
                    self._reap(fd)
                elif not self._answer():
                    # Closed, or the supervisor is gone. No work of ours is left, so no module's
                    # atexit has to hold us up; what modules have started is ended by our warden.
                    os._exit(0)

    def _reap(self, pidfd: int) -> None:
        if pidfd not in self._held:
            self._poll.unregister(pidfd)
        # A module may have had SIGCHLD ignored, or wait for everybody's children: then it is gone.
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
                self._held.add(pidfd)
                return
        self._held.discard(pidfd)
        fds.close(pidfd)
        self.say(Kind.REAPED, self._children.pop(pidfd), 0)

    def _answer(self) -> bool:
        room = socket.CMSG_SPACE(DESCRIPTORS_MOST * array.array("i").itemsize)
        data, ancillary, _, _ = self.sock.recvmsg(HEADER.size, room, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        _, serial, count = HEADER.unpack(data)
        numbers = array.array("i")
        for _, _, piece in ancillary:
            numbers.frombytes(piece[: len(piece) - len(piece) % numbers.itemsize])
        received = numbers.tolist()
        try:
            if len(received) != count:
                self.say(Kind.UNBORN, serial, errno.EMFILE)  # which recvmsg(2) does not say
                return True
            # Here and not behind the fork, where every page that this touches would be copied.
            order: Order = pickle.loads(fresh.read(received.pop(0)))  # noqa: S301 - our supervisor's
            self._fork(serial, order, received)
        except OSError as error:
            self.say(Kind.UNBORN, serial, error.errno or 0)
        except Exception:
            traceback.print_exc()
            self.say(Kind.UNBORN, serial, errno.EINVAL)
        finally:
            for fd in received:
                os.close(fd)
        return True

    def _fork(self, serial: int, order: Order, received: list[int]) -> None:
        # Nothing may interrupt the children before they have put their signals in order.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
        pid = -1
        try:
            pid = os.fork()
            if pid == 0:
                self.sock.detach()
                _become(order, received, self._calls)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if pid > 0:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is its own
                os.waitpid(pid, 0)
            self.say(Kind.UNBORN, serial, error.errno or 0)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._children[fds.own(pidfd)] = serial
        self._poll.register(pidfd, select.POLLIN)
        socket.send_fds(self.sock, [HEADER.pack(Kind.BORN, serial, pid)], [pidfd])


# -- in the fork


def _become(order: Order, received: list[int], calls: prctl.Prctl) -> NoReturn:
    control = received[CONTROL]
    try:
        taken = {number for _, number in order.passed}
        at = [_out_of_the_way(fd, taken) for fd in received]
        control = at[CONTROL]
        _place(order, at)
        # Before anybody can hear that there is a tree.
        _mark(order.command)
        order.birth.prepare()
    except OSError as error:
        report_failure(
            control, child.REPORT.pack(error.errno or 0, child.step_number("descriptors"))
        )
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    command = order.command
    command = command._replace(function=partial(fresh.invoke, command.payload or b""))
    there = [None if p is None else n for n, p in enumerate(order.stdio)]
    arguments = [*order.arguments, b"control=%d" % control, b"watch=%d" % at[WATCH]]
    become_warden(
        order.birth,
        order.warden,
        arguments,
        command,
        (there[0], there[1], there[2]),
        control,
        calls,
        unwanted=(at[WATCH],),
    )


def _out_of_the_way(fd: int, taken: set[int]) -> int:
    """The same file at a number that nobody asked for."""
    lowest, now = 3, fd
    while now in taken or now <= 2:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
        if now != fd:
            os.close(now)
        lowest, now = moved + 1, moved
    if now != fd:
        os.close(fd)
    return now


def _place(order: Order, at: list[int]) -> None:
    """Everything at its number, and nothing of it elsewhere: a copy would keep a pipe open."""
    os.fchdir(at[CWD])
    for target, position in enumerate(order.stdio):
        if position is None:
            os.close(target)
        else:
            os.dup2(at[position], target)
    for position, number in order.passed:
        os.dup2(at[position], number)
    for fd in set(at[CWD:]):
        os.close(fd)


def _mark(command: Command) -> None:
    """What others read in /proc/PID/environ is the template's, whose sweep would take us for its
    own: written over with the mark of our tree. The interpreter has copies of what it uses; see
    proc_pid_environ(5)."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    begin, end = int(fields[47]), int(fields[48])
    value = command.env[TREE_VARIABLE.encode()]
    text = TREE_VARIABLE.encode() + b"=" + value + b"\0"
    if len(text) <= end - begin:
        ctypes.memset(begin, 0, end - begin)
        ctypes.memmove(begin, text, len(text))
