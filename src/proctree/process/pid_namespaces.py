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


def _inside(inode: int) -> Iterator[int]:
    """Those in this very namespace, as far as they can be seen from here."""
    for pid in _pids():
        try:
            if os.stat(f"/proc/{pid}/ns/pid").st_ino == inode:
                yield pid
        except OSError as error:
            proof.pass_shortage(error)


def search(inode: int, number: int) -> int | None:
    """Our number for the process that is called `number` in this namespace; None when there is
    none, or it cannot be seen from here.

    Raises:
        OSError: descriptors or memory are short, so that it cannot be said.
    """
    for pid in _inside(inode):
        try:
            if _innermost(pid) == number:
                return pid
        except OSError as error:
            proof.pass_shortage(error)
    return None


_INITIAL = 0xEFFFFFFC
"""The inode of the first PID namespace of all (PROC_PID_INIT_INO of the kernel): everything is
below it."""


def is_seen(inode: int) -> bool:
    """Whether whoever lives in this namespace is certainly to be seen from ours: it is ours, or one
    below it. One that nobody lives in any more can be told from one beside ours by nothing, but
    from the first namespace, where there is none beside it.

    Raises:
        OSError: as `search`.
    """
    own = os.stat("/proc/self/ns/pid").st_ino
    return own in (inode, _INITIAL) or any(_inside(inode))


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
        return search(inode, number)
    finally:
        os.close(fd)
