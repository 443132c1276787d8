"""The warden, and the tree in a PID namespace of its own: the kernel ends it with its init, even
when supervisor and warden are killed in the same instant. See src/warden/namespace.c.

What it costs: the tree sees other process numbers and a /proc of its own, what it mounts stays with
it, and without CAP_SYS_ADMIN it lives in a user namespace, where set-uid programs gain nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proctree.command import Command
from proctree.containment.base import Wanted
from proctree.containment.warden import WardenContained
from proctree.process import namespaces
from proctree.records import Member

if TYPE_CHECKING:
    from proctree.containment.forking import Birth


class PidnsContained(WardenContained):
    name = "pidns"

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
        if not command.is_forked:
            arguments.append(b"pidns=1")
        return arguments

    def _birth(self) -> Birth:
        from proctree.containment.forking import PidnsBirth

        return PidnsBirth()

    def _end_at_once(self) -> tuple[Member, ...]:
        """The init goes with the warden, and everything with the init. A warden that is stopped has
        to go first: it keeps its dead children, and the kernel lets no init end before everybody in
        its namespace has been reaped."""
        self._kill_warden()
        return ()
