"""A cgroup of one's own, for the benchmark that compares with cgroup.kill."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path


class Unavailable(Exception):
    """There is no cgroup to be had here; it says why."""


class Leaf:
    """A cgroup without children."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def procs(self) -> str:
        return str(self._path / "cgroup.procs")

    def kill(self) -> None:
        """Kills everything in it and returns when nothing is."""
        (self._path / "cgroup.kill").write_text("1")
        self._wait_empty()

    def _wait_empty(self) -> None:
        events = os.open(self._path / "cgroup.events", os.O_RDONLY)
        try:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while b"populated 0" not in os.pread(events, 256, 0):
                # The kernel may hold its notification back for 10 ms, so we look by ourselves too.
                poller.poll(1)
        finally:
            os.close(events)


def _mount() -> Path:
    """Where the cgroup2 hierarchy is mounted: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            fields, kind = line.split(" - ")
            if kind.split()[0] == "cgroup2":
                return Path(fields.split()[4])
    raise Unavailable("cgroup2 is not mounted")


def _own() -> str:
    """Our own cgroup in that hierarchy, relative to its mount: cgroups(7)."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            number, _, path = line.rstrip("\n").split(":", 2)
            if number == "0":
                return path.lstrip("/")
    raise Unavailable("this process is in no cgroup of cgroup2")


@contextlib.contextmanager
def leaf() -> Iterator[Leaf]:
    """Makes one below our own, and removes it at the end.

    Raises:
        Unavailable: it cannot be made.
    """
    path = _mount() / _own() / f"proctree-benchmarks-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        raise Unavailable(f"no cgroup can be made ({error.strerror})") from None
    try:
        if not (path / "cgroup.kill").exists():
            raise Unavailable("this kernel has no cgroup.kill")
        yield Leaf(path)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        Leaf(path).kill()
    for _ in range(100):
        with contextlib.suppress(OSError):  # EBUSY: the last of it is still going away
            path.rmdir()
            return
        time.sleep(0.02)
    path.rmdir()
