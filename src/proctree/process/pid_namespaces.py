"""What a number of another PID namespace is in ours: pid_namespaces(7)."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

from proctree.process import proof

_NS_GET_TGID_FROM_PIDNS = 0x8004B707
"""ioctl_nsfs(2), since Linux 6.11."""

_UNKNOWN = (errno.ENOTTY, errno.EINVAL)
"""What older kernels answer."""


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _innermost(pid: int) -> int | None:
    """Its number in its own namespace: NSpid, proc_pid_status(5)."""
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    return None


def _search(inode: int, number: int) -> int | None:
    for pid in _pids():
        try:
            if os.stat(f"/proc/{pid}/ns/pid").st_ino == inode and _innermost(pid) == number:
                return pid
        except OSError as error:
            proof.pass_shortage(error)
    return None


def to_ours(number: int, teller: int) -> int | None:
    """Our number for the process that `teller` (our number) calls `number`; None when there is
    none. Without the help of a newer kernel every process is looked at.

    Raises:
        OSError: it may not be known in which namespace the teller is, or it has been reaped.
    """
    fd = os.open(f"/proc/{teller}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        inode = os.fstat(fd).st_ino
        if inode == os.stat("/proc/self/ns/pid").st_ino:
            return number
        try:
            # The value is the answer, and not what it points to.
            return int(fcntl.ioctl(fd, _NS_GET_TGID_FROM_PIDNS, number)) or None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                return None
        return _search(inode, number)
    finally:
        os.close(fd)
