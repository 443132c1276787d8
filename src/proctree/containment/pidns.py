"""The warden, and the tree in a PID namespace of its own: the kernel ends it with its init, even
when supervisor and warden are killed in the same instant. See src/warden/namespace.c.

What it costs: the tree sees other process numbers and a /proc of its own, what it mounts stays with
it, and without CAP_SYS_ADMIN it lives in a user namespace, where set-uid programs gain nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import struct

from proctree.command import Command
from proctree.containment.base import Wanted
from proctree.containment.warden import WardenContained, warden_path
from proctree.process import namespaces
from proctree.process.child import StepFailed, step_number
from proctree.protocol import STEPS
from proctree.records import Member

_READY = struct.Struct("=ii")
"""What the init says: errno and step, or zeros (struct failure of the helper)."""


class PidnsContained(WardenContained):
    name = "pidns"
    parent_visible = False
    _init = 0

    @classmethod
    def unavailable(cls) -> str | None:
        return super().unavailable() or namespaces.trouble()

    @classmethod
    def unfit(cls, wanted: Wanted) -> str | None:
        if wanted.leave:
            return "leftovers='leave' is impossible: the kernel ends them with the namespace"
        if not wanted.new_session:
            return "a foreground job cannot be in another PID namespace than its terminal's shell"
        return super().unfit(wanted)

    def _arguments(self, command: Command, control: int) -> list[bytes]:
        arguments = super()._arguments(command, control)
        if command.function is None:
            arguments.append(b"pidns=1")
        else:
            self._namespaces = namespaces.Namespaces()
        return arguments

    def _prepare_callable(self) -> None:
        """In the forked child that is to be the warden: the init must be the first process of the
        namespace, so it is there before the callable."""
        # The numbers that the warden needs are those of the /proc that is there now.
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        self._namespaces.enter()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                # Here and not by the program: exec takes the privileges in our user namespace away
                # from everybody but its root (user_namespaces(7), "Effect on capabilities").
                self._mount_proc(theirs)
                theirs.set_inheritable(True)
                arguments = [b"proctree-init", b"control=%d" % theirs.fileno(), b"beinit=1"]
                os.execv(warden_path(), arguments)
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
        self._link = ours.detach()
        self._init = pid

    def _mount_proc(self, link: socket.socket) -> None:
        try:
            self._namespaces.mount_proc()
        except StepFailed as failed:
            link.send(_READY.pack(failed.error, step_number(failed.step)))
            os._exit(127)

    def _abandon_callable(self) -> None:
        """The namespace ends with its init, which would notice later that we are gone."""
        if self._init > 0:
            os.kill(self._init, signal.SIGKILL)
            os.waitpid(self._init, 0)

    def _callable_arguments(self) -> list[bytes]:
        for fd in (self._link, self._proc):
            os.set_inheritable(fd, True)
        return [
            b"init=%d" % self._link,
            b"initpid=%d" % self._init,
            b"proc=%d" % self._proc,
        ]

    def _end_at_once(self) -> tuple[Member, ...]:
        """The init goes with the warden, and everything with the init. A warden that is stopped has
        to go first: it keeps its dead children, and the kernel lets no init end before everybody in
        its namespace has been reaped."""
        self._kill_warden()
        return ()
