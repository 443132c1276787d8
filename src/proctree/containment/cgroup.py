"""The warden, and the tree in a cgroup of its own: the kernel ends it in one step, whatever it
forks meanwhile, whoever its processes have become.

The leaf is made by the warden, so that it is there only while somebody is who removes it, and lies
below our own cgroup, so that the limits we live under hold for the tree as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from proctree.command import Command
from proctree.containment.base import WANT_NOTHING, Wanted
from proctree.containment.warden import WardenContained
from proctree.errors import ContainmentUnavailable
from proctree.process import cgroups
from proctree.process.cgroups import Home
from proctree.process.sweep import end_cgroup
from proctree.records import Member

if TYPE_CHECKING:
    from proctree.containment.forking import Birth

END_SECONDS = 2.0
"""What is left of a sweep's time (`lifecycle.SWEEP_TIMEOUT`) goes to what bears only marks."""

_homes: dict[str | None, Home] = {}
"""Our own cgroup as the kernel calls it -> where it is; one entry, since a manager may move us."""


def _home() -> Home:
    own = cgroups.own_path()
    home = _homes.get(own)
    if home is None:
        home = cgroups.find_home(own)
        reason = cgroups.trouble(home)
        if reason is not None:
            raise ContainmentUnavailable(reason)
        _homes.clear()
        _homes[own] = home
    return home


def _controllers(wanted: Wanted) -> set[str]:
    files = {} if wanted.limits is None else wanted.limits.files()
    return {cgroups.CONTROLLERS[name] for name in files}


class CgroupContained(WardenContained):
    name = "cgroup"

    def __init__(self, tree_id: str, wanted: Wanted = WANT_NOTHING) -> None:
        super().__init__(tree_id, wanted)
        needed = _controllers(wanted)
        above = cgroups.home_for(_home(), needed) if needed else _home().path
        self._leaf = f"{above.rstrip('/')}/{cgroups.LEAF_PREFIX}{tree_id}"
        self.cgroup = self._leaf

    @classmethod
    def unavailable(cls) -> str | None:
        reason = super().unavailable()
        if reason is None:
            try:
                _home()
            except ContainmentUnavailable as error:
                reason = str(error)
        return reason

    @classmethod
    def unfit(cls, wanted: Wanted) -> str | None:
        return None

    @classmethod
    def unasked(cls) -> str | None:
        home = _home()
        if cgroups.delegated(home):
            return None
        return f"{home.path} is not delegated to us by the manager of this machine"

    def _arguments(self, command: Command, control: int) -> list[bytes]:
        arguments = super()._arguments(command, control)
        arguments.append(b"cgroup=" + os.fsencode(self._leaf))
        if self.wanted.limits is not None:
            for file, value in self.wanted.limits.files().items():
                arguments.append(f"limit={file},{value}".encode())
        return arguments

    def _birth(self) -> Birth:
        from proctree.containment.forking import CgroupBirth

        return CgroupBirth(self._leaf)

    def has_member(self, pid: int) -> bool:
        """By descent, and if not, by its cgroup: somebody may have put it there from outside."""
        return super().has_member(pid) or cgroups.holds(self._leaf, pid)

    def _end_at_once(self) -> tuple[Member, ...]:
        """Exactly what was in the tree, whatever marks it has lost."""
        _ended, survivors = end_cgroup(self._leaf, END_SECONDS)
        return survivors

    def _evacuate(self) -> bool:
        """A kernel that freezes the leaf has stopped nobody by a signal."""
        return cgroups.evacuate(self._leaf, END_SECONDS)
