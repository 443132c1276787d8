"""What the processes of a tree are doing: a view for people and dashboards, by psutil.

A view and no basis for action: what is signalled is found and proved elsewhere.
"""

from __future__ import annotations

import attrs
import psutil


@attrs.frozen
class ProcessInfo:
    """One process at one moment.

    Attributes:
        pid, ppid: its number and its parent's.
        name: the command name.
        cmdline: its arguments; empty for a zombie.
        state: psutil's word for it: "running", "sleeping", "stopped", "zombie"...
        cpu: seconds of CPU that it has used, user and system together.
        rss: resident memory in bytes.
        create_time: seconds since the epoch; with the pid it names the process.
    """

    pid: int
    ppid: int
    name: str
    cmdline: tuple[str, ...]
    state: str
    cpu: float
    rss: int
    create_time: float


def _info(process: psutil.Process) -> ProcessInfo | None:
    try:
        with process.oneshot():
            times = process.cpu_times()
            return ProcessInfo(
                pid=process.pid,
                ppid=process.ppid(),
                name=process.name(),
                cmdline=tuple(process.cmdline()),
                state=str(process.status()),
                cpu=times.user + times.system,
                rss=process.memory_info().rss,
                create_time=process.create_time(),
            )
    except psutil.ZombieProcess:
        return None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


INIT = "proctree-init"
"""The init of a tree's PID namespace: below the warden, and no member."""


def snapshot(root: int, main: int | None, tree_id: str) -> list[ProcessInfo]:
    """The living members below `root` (`root` itself only if it is the main process)."""
    try:
        processes = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    if root == main:
        processes = [psutil.Process(root), *processes]
    infos = [info for info in map(_info, processes) if info is not None]
    infos = [info for info in infos if info.name != INIT or info.ppid != root]
    return sorted(infos, key=lambda info: (info.pid != main, info.pid))
