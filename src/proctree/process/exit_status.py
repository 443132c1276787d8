"""The exit status of a process that is not our child, or that somebody else has reaped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

from proctree.process import proof

# ioctl_pidfd(2): the exit status of a process that somebody else has reaped, since Linux 6.15.
PIDFD_GET_INFO = 0xC0000000 | (64 << 16) | (0xFF << 8) | 11
PIDFD_INFO_EXIT = 1 << 3
_PIDFD_INFO = struct.Struct("=QQ11Ii")

_EXIT_CODE = 52 - 3
"""proc_pid_stat(5), exit_code, counted from the state on."""


def status_from_pidfd(pidfd: int) -> int | None:
    """The wait status of an ended process by its pidfd, whoever reaped it; None if not known."""
    request = bytearray(_PIDFD_INFO.pack(PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, request)
    except OSError:
        return None
    values = _PIDFD_INFO.unpack(request)
    return values[-1] if values[0] & PIDFD_INFO_EXIT else None


def _status_of_zombie(pid: int, pidfd: int) -> int | None:
    """As long as nobody has reaped it. The kernel says 0 to who may not trace the process, and so
    does every status of success: that it may be known is seen by what needs the same right."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            data = file.read()
        os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
    stat = proof.parse_stat(data)
    fields = data[data.rfind(b")") + 2 :].split()
    if stat is None or not stat.dead or len(fields) <= _EXIT_CODE:
        return None
    with contextlib.suppress(ValueError):
        return int(fields[_EXIT_CODE]) if proof.holds_number(pidfd) else None
    return None


def status_of(pid: int, pidfd: int) -> int | None:
    """The wait status of a process that has ended, ours or not, reaped or not; None if not known:
    it is not ours to know (ptrace(2), "Ptrace access mode checking"), or it was reaped and the
    kernel (before Linux 6.15) does not keep it."""
    status = _status_of_zombie(pid, pidfd)
    return status_from_pidfd(pidfd) if status is None else status
