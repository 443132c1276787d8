"""A Python function as the main process of a tree: forked, with its warden put around it.

Used in a fork of the supervisor, for a callable, and in a fork of a template, for a function by
name. Everything here is a value that a template can be sent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from typing import TYPE_CHECKING, NoReturn

from proctree import protocol
from proctree.command import Command
from proctree.process import child, fds
from proctree.process.child import StepFailed, step_number
from proctree.protocol import STEPS, Type

if TYPE_CHECKING:
    from proctree.process.child import Descriptors
    from proctree.process.namespaces import Namespaces
    from proctree.process.prctl import Prctl

_READY = struct.Struct("=ii")
"""What the init says: errno and step, or zeros (struct failure of the helper)."""


class Birth:
    """What has to be there for the function to be born into. Here: nothing."""

    cgroup: bytes | None = None
    parent_visible = True
    """Whether the main process can see who its parent is."""

    def prepare(self) -> None:
        """Before the fork: what cannot be looked up safely behind it."""

    def make(self, path: str) -> None:
        """In the child that is to be the warden, before it forks the function.

        Args:
            path: of the warden's program.

        Raises:
            OSError, StepFailed: it cannot be made.
        """

    def abandon(self) -> None:
        """Undoes what there is of `make`, after the function has ended."""

    def arguments(self) -> list[bytes]:
        """What the warden has to know of it."""
        return []

    def descriptors(self) -> tuple[int, ...]:
        """Those that `make` made, which are the warden's and not the function's."""
        return ()


class CgroupBirth(Birth):
    """A leaf of the cgroup hierarchy."""

    def __init__(self, leaf: str) -> None:
        self.cgroup = os.fsencode(leaf)

    def make(self, path: str) -> None:
        assert self.cgroup is not None
        os.mkdir(self.cgroup)

    def abandon(self) -> None:
        assert self.cgroup is not None
        with contextlib.suppress(OSError):
            os.rmdir(self.cgroup)


class PidnsBirth(Birth):
    """A PID namespace. Its init must be the first process in it, so it is there before the
    function."""

    parent_visible = False
    _namespaces: Namespaces
    _init = 0
    _link = -1
    _proc = -1

    def prepare(self) -> None:
        from proctree.process import namespaces

        self._namespaces = namespaces.Namespaces()

    def make(self, path: str) -> None:
        # The numbers that the warden needs are those of the /proc that is there now.
        self._proc = fds.above_stdio(os.open("/proc", os.O_PATH | os.O_DIRECTORY))
        self._namespaces.enter()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                # Here and not by the program: exec takes the privileges in our user namespace away
                # from everybody but its root (user_namespaces(7), "Effect on capabilities").
                self._mount_proc(theirs)
                link = fds.above_stdio(theirs.detach())
                os.set_inheritable(link, True)
                theirs = socket.socket(fileno=link)
                arguments = [b"proctree-init", b"control=%d" % link, b"beinit=1"]
                os.execv(path, arguments)
            except OSError as failed:
                theirs.send(_READY.pack(failed.errno or 0, step_number("exec")))
            finally:
                os._exit(127)
        theirs.close()
        answer = ours.recv(_READY.size)
        error, step = _READY.unpack(answer) if len(answer) == _READY.size else (32, 21)
        if error:
            os.waitpid(pid, 0)
            raise StepFailed(STEPS.get(step, "init"), error)
        self._link = fds.above_stdio(ours.detach())
        self._init = pid

    def _mount_proc(self, link: socket.socket) -> None:
        try:
            self._namespaces.mount_proc()
        except StepFailed as failed:
            link.send(_READY.pack(failed.error, step_number(failed.step)))
            os._exit(127)

    def abandon(self) -> None:
        """The namespace ends with its init, which would notice later that we are gone."""
        if self._init > 0:
            os.kill(self._init, signal.SIGKILL)
            os.waitpid(self._init, 0)

    def descriptors(self) -> tuple[int, ...]:
        return self._link, self._proc

    def arguments(self) -> list[bytes]:
        for fd in self.descriptors():
            os.set_inheritable(fd, True)
        return [
            b"init=%d" % self._link,
            b"initpid=%d" % self._init,
            b"proc=%d" % self._proc,
        ]


def become_warden(
    birth: Birth,
    path: str,
    arguments: list[bytes],
    command: Command,
    stdio: Descriptors,
    control: int,
    calls: Prctl,
    unwanted: tuple[int, ...] = (),
) -> NoReturn:
    """In a forked child, with all signals blocked: forks the function, then execs the warden over
    this process.

    The subreaper flag is set before the function's process exists, so that nothing it starts can
    get away, and survives exec, as children do. The function is not called before its warden says
    so: until then there is nobody who could end what it starts.

    Args:
        path: of the warden's program; `arguments` are for it.
        control: the warden's end of the socket to its supervisor.
        unwanted: more descriptors that are the warden's and not the function's.
    """
    pid, report, step = 0, b"", "fork"
    try:
        child.lead_group(command)
        calls.set_child_subreaper(True)
        birth.make(path)
        reader, writer = fds.pipe()
        # The function does not begin before its warden lets it.
        hold, release = fds.pipe()
        parent = os.getpid() if birth.parent_visible else None
        pid = os.fork()
        if pid == 0:
            child.run_forked(
                command,
                stdio,
                calls,
                parent,
                writer,
                (control, reader, release, *unwanted, *birth.descriptors()),
                hold=hold,
                cgroup=birth.cgroup,
            )
        os.close(writer)
        # It prepares itself while we become the warden, which reads of it what became of that.
        for fd in (control, reader, release, *unwanted):
            os.set_inheritable(fd, True)
        adopt = [b"adopt=%d" % pid, b"report=%d" % reader, b"gate=%d" % release]
        arguments = [*arguments, *birth.arguments(), *adopt]
        step = "exec"
        os.execve(path, arguments, command.env)
    except child.StepFailed as failed:
        report = child.REPORT.pack(failed.error, child.step_number(failed.step))
    except OSError as error:
        report = child.REPORT.pack(error.errno or 0, child.step_number(step))
    finally:
        try:
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            birth.abandon()
        finally:
            report_failure(control, report)
            os._exit(1)


def report_failure(control: int, report: bytes) -> None:
    """Says what the warden would have said.

    Args:
        report: as `child.REPORT` has it; empty: nothing.
    """
    if not report:
        return
    # A socket that is closed with START unread in it is reset, and the report goes with it
    # (unix_release_sock() of the kernel).
    with contextlib.suppress(OSError):
        os.read(control, protocol.MAX_MESSAGE)
    number, step = child.REPORT.unpack(report)
    message = protocol.FAILURE.pack(protocol.VERSION, Type.EXEC_FAILED, 0, 0, number, step)
    with contextlib.suppress(OSError):
        os.write(control, message)
