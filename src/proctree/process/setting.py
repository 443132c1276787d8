"""Two settings of this process that the standard library does not have as the kernel does."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct

_IOPRIO_WHO_PROCESS = 1

# No libc wraps it (ioprio_set(2), NOTES); the numbers are those of the kernel's tables.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}

_libc = ctypes.CDLL(None, use_errno=True)


def set_ionice(value: int) -> None:
    """ioprio_set(2) for this process.

    Raises:
        OSError: the kernel refuses; ENOSYS on a machine whose number for the call we do not know.
    """
    number = _IOPRIO_SET.get(platform.machine(), -1)
    if _libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, value) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def set_rlimit(number: int, soft: int, hard: int) -> None:
    """setrlimit(2) for this process; 2**64 - 1 is no limit.

    Raises:
        OSError: the kernel refuses (EPERM for a hard limit above the present one).
    """
    # `resource` takes signed numbers. What is above them is beyond anything that could be counted,
    # but not the same as no limit: getrlimit(2) is to say what was asked for.
    limits = (struct.pack("=Q", value) for value in (soft, hard))
    soft, hard = (struct.unpack("=q", value)[0] for value in limits)
    try:
        resource.setrlimit(number, (soft, hard))
    except ValueError:
        # How `resource` says EPERM, and EINVAL.
        raise PermissionError(1, os.strerror(1)) from None
