"""What /proc says about the processes of the demo.

Read here without proctree's help, so that what the demo proves does not rest on the library that
it shows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MARKER = "PROCTREE_DEMO"
"""Environment variable that every process of a scene inherits."""


class Process(NamedTuple):
    """One process: its number and start time name it, a reused number has another start time."""

    pid: int
    start_time: int
    ppid: int
    state: str
    name: str

    @property
    def dead(self) -> bool:
        """A zombie is dead: it only waits for its parent, pid 1 perhaps, to take its status."""
        return self.state in "ZX"


def read(pid: int) -> Process | None:
    """proc(5), /proc/PID/stat; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    opened, closed = data.find(b"("), data.rfind(b")")
    fields = data[closed + 2 :].split()
    name = data[opened + 1 : closed].decode("utf-8", "replace")
    return Process(pid, int(fields[19]), int(fields[1]), fields[0].decode(), name)


def every() -> Iterator[Process]:
    """Every process of this machine, under whichever parent it is."""
    for entry in os.listdir("/proc"):
        process = read(int(entry)) if entry.isdigit() else None
        if process is not None:
            yield process


def _marked(pid: int, marker: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARKER}={marker}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def living(marker: str, known: Iterable[Process] = ()) -> list[Process]:
    """The living processes that bear the marker in their environment, or are among `known`."""
    names = {(process.pid, process.start_time) for process in known}
    return [
        process
        for process in every()
        if not process.dead
        and ((process.pid, process.start_time) in names or _marked(process.pid, marker))
    ]


def label(pid: int) -> str:
    """The command line, with paths shortened to their last parts."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return "?"
    if words[0] == "bash":
        return "bash"
    return " ".join("/".join(word.split("/")[-3:]) for word in words)


def draw(members: Iterable[Process]) -> Iterator[str]:
    """The members as a tree, each below its parent; parents that are no members come first."""
    members = sorted(members)
    pids = {process.pid for process in members}

    def branch(ppid: int, indent: str) -> Iterator[str]:
        children = [process for process in members if process.ppid == ppid]
        for process in children:
            last = process is children[-1]
            yield f"{indent}{'└─' if last else '├─'} {process.pid}  {label(process.pid)}"
            yield from branch(process.pid, indent + ("   " if last else "│  "))

    for parent in dict.fromkeys(p.ppid for p in members if p.ppid not in pids):
        owner = read(parent)
        yield f"{parent}  {'supervisor' if parent == os.getpid() else owner and owner.name}"
        yield from branch(parent, "")


def end(processes: Iterable[Process], seconds: float) -> None:
    """SIGKILL to processes that the demo has started, and waits until they are gone.

    A pidfd is opened first and the start time is read behind it, so that a number which has become
    somebody else's is never signalled.
    """
    poller = select.poll()
    pidfds = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(process.pid)
            now = read(process.pid)
            if now is None or now.start_time != process.start_time:
                os.close(pidfd)
                continue
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poller.register(pidfd, select.POLLIN)
            pidfds.add(pidfd)
    deadline = time.monotonic() + seconds
    while pidfds and (left := deadline - time.monotonic()) > 0:
        for pidfd, _ in poller.poll(left * 1000):
            poller.unregister(pidfd)
            os.close(pidfd)
            pidfds.discard(pidfd)
