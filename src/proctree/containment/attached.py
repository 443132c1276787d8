"""A tree that somebody else started, and that we have come to: see reaching.py."""

from __future__ import annotations

from proctree import registry
from proctree.command import Command
from proctree.containment.base import Descriptors
from proctree.containment.reaching import Link
from proctree.containment.warden import WardenContained
from proctree.policy import KillPolicy
from proctree.process import cgroups
from proctree.process.sweep import end_cgroup
from proctree.protocol import Message
from proctree.records import Member

END_SECONDS = 2.0


class AttachedContained(WardenContained):
    """Its warden is not our child: it is gone when its pidfd says so, and somebody else reaps it.

    Args:
        name: the backend that holds it.
        cgroup: its leaf, or None.
    """

    def __init__(self, tree_id: str, link: Link, name: str, cgroup: str | None) -> None:
        super().__init__(tree_id)
        self.name = name
        self.cgroup = cgroup
        self._link = link
        folder = registry.directory()
        if folder is not None:
            self._entry = registry.path_of(folder, tree_id)

    @property
    def _keeps(self) -> bool:
        return True

    def spawn(self, command: Command, stdio: Descriptors, policy: KillPolicy) -> None:
        self._command = command
        self._control = self._link.control
        self._warden, self._pidfd = self._link.warden, self._link.pidfd
        self.owns = self._link.owned

    def _main(self, message: Message) -> tuple[int | None, int]:
        return self._link.main, self._link.main_start

    def give_back(self) -> bool:
        """Closes the connection if nothing was launched that could, and returns whether it is
        closed."""
        if self._warden >= 0:
            return False
        if self._link.control.fileno() >= 0:
            self._link.close()
        return True

    def _reap(self) -> bool:
        if not self._reaped:
            if not self._has_ended():
                return False
            self._let_go_of_warden()
        return True

    def close(self) -> None:
        super().close()
        # It is not ours to reap, and others may let it run for long.
        if not self._reaped and self._pidfd >= 0:
            self._let_go_of_warden()

    def has_member(self, pid: int) -> bool:
        inside = self.cgroup is not None and cgroups.holds(self.cgroup, pid)
        return inside or super().has_member(pid)

    def _end_at_once(self) -> tuple[Member, ...]:
        if self.name == "pidns":
            self._kill_warden()
        if self.cgroup is None:
            return ()
        _ended, survivors = end_cgroup(self.cgroup, END_SECONDS)
        return survivors
