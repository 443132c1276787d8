"""Signalling exactly one process, or nobody.

A pid names a process only for as long as it has not been reaped. So a pidfd is opened first; then
it is proved that the process behind the number belongs to the tree; then the pidfd is signalled. If
the number changed hands in between, the proof speaks of a stranger and the signal of a dead
process: nobody gets it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from typing import NamedTuple

CLIMB_MAX = 256


class Stat(NamedTuple):
    """The fields of /proc/PID/stat (proc(5)) that say who a process is."""

    pid: int
    name: str
    state: str
    ppid: int
    pgrp: int
    session: int
    threads: int
    start_time: int

    @property
    def dead(self) -> bool:
        """A zombie leader with living threads is not dead: its process still runs."""
        return self.state in "Xx" or (self.state == "Z" and self.threads <= 1)


def parse_stat(data: bytes) -> Stat | None:
    """The command name may hold blanks, brackets and newlines: it ends at the last bracket."""
    opened, closed = data.find(b"("), data.rfind(b")")
    fields = data[closed + 2 :].split()
    if opened < 0 or closed < opened or len(fields) < 20:
        return None
    try:
        pid = int(data[:opened])
        ppid, pgrp, session = (int(field) for field in fields[1:4])
        threads, start_time = int(fields[17]), int(fields[19])
    except ValueError:
        return None
    name = data[opened + 1 : closed].decode("utf-8", "replace")
    return Stat(pid, name, fields[0].decode(), ppid, pgrp, session, threads, start_time)


_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})


def pass_shortage(error: OSError) -> None:
    """A want of descriptors or memory of ours says nothing about a process: one that lives must not
    look as if it were gone."""
    if error.errno in _SHORTAGES:
        raise error


def check_proc() -> None:
    """That /proc is about those whom our numbers name. In a PID namespace that did not get a /proc
    of its own, or with one of another's, the numbers there are those of other processes: whoever
    trusted them would signal strangers.

    Raises:
        OSError: ENXIO: it is not; or it cannot be read.
    """
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(errno.ENXIO, "/proc belongs to another PID namespace")


def time_namespace(of: str = "self/ns/time") -> int:
    """Which CLOCK_BOOTTIME a process has; 0: it cannot be told. Field 22 of /proc/PID/stat is
    shifted by the reader's offset as well: in another time namespace the same process has another
    start time (time_namespaces(7)).

    Args:
        of: a path below /proc; "self/ns/time_for_children" is of those that we start.

    Raises:
        OSError: memory is short, so that it cannot be said.
    """
    try:
        return os.stat(f"/proc/{of}").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0  # before Linux 5.6; or it has just ended, or is hidden from us


def read_stat(pid: int) -> Stat | None:
    """None when there is no such process (any more).

    Raises:
        OSError: descriptors or memory are short, so that it cannot be said.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return parse_stat(file.read())
    except OSError as error:
        pass_shortage(error)
        return None


def read_tracer(pid: int) -> int:
    """Who traces it (ptrace(2)), or 0."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"TracerPid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def read_environ(pid: int) -> bytes | None:
    """The environment that a process was started with; None when it may not be read.

    Raises:
        OSError: as `read_stat`.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError as error:
        pass_shortage(error)
        return None


def in_environ(environ: bytes, variable: bytes, component: bytes) -> bool:
    """Whether `variable` holds `component` among its parts between slashes."""
    for entry in environ.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == variable:
            return component in value.split(b"/")
    return False


def has_ended(pidfd: int, timeout: float = 0.0) -> bool:
    """Whether its process has, within so many seconds: then its pidfd is readable (pidfd_open(2)).

    Raises:
        OSError: ENOMEM: it cannot be said.
    """
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


def open_pidfd(pid: int) -> int | None:
    """None when there is no such process (any more).

    Raises:
        OSError: as `read_stat`.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        pass_shortage(error)
        return None


def holds_number(pidfd: int) -> bool:
    """Whether its process has not been reaped, so that the number is still its own."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def is_below(pid: int, root: int, depth: int = 0) -> bool:
    """Whether `pid` descends from `root`, whose number the caller keeps from being reused.

    "P is its parent" counts only when it names P while a pidfd of P says that P was not reaped.

    Raises:
        OSError: as `read_stat`.
    """
    stat = read_stat(pid)
    if stat is None or depth > CLIMB_MAX:
        return False
    if stat.ppid == root:
        return True
    if stat.ppid <= 1:
        return False
    parent = open_pidfd(stat.ppid)
    if parent is None:
        return False
    try:
        if not is_below(stat.ppid, root, depth + 1):
            return False
        again = read_stat(pid)
        return again is not None and again.ppid == stat.ppid and holds_number(parent)
    finally:
        os.close(parent)
