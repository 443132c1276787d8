"""A PID namespace around a callable: what namespace.c does for a command, in the child that is
forked for it. Everything that has to be looked up is looked up before the fork.
"""

from __future__ import annotations

import ctypes
import os

from proctree.process.child import StepFailed

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC = 16384
_MS_SLAVE = 1 << 19
_EPERM = 1
_CAP_SYS_ADMIN = 21


def trouble() -> str | None:
    """Why no PID namespace can be made here, or None. What only trying can tell is told by the
    start."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
        if int(effective, 16) >> _CAP_SYS_ADMIN & 1:
            return None
    except OSError as error:
        return f"/proc/self/status is not readable ({error.strerror})"
    for path in (
        "/proc/sys/user/max_user_namespaces",
        "/proc/sys/kernel/unprivileged_userns_clone",
    ):
        try:
            with open(path, encoding="ascii") as file:
                if int(file.read()) == 0:
                    return f"CAP_SYS_ADMIN is missing, and {path} is 0"
        except OSError:
            continue  # a kernel without this switch
    return None


class Namespaces:
    """The calls, ready for use in a forked child."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._unshare = libc.unshare
        self._mount = libc.mount
        self._mount.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
        ]

    def _as_user(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        if self._unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS) < 0:
            raise StepFailed("namespace", ctypes.get_errno())
        for name, text in (
            ("uid_map", f"{uid} {uid} 1"),
            ("setgroups", "deny"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(fd, text.encode())
            os.close(fd)

    def enter(self) -> None:
        """The children of this process are in a new PID namespace, and it in a new mount namespace.

        Raises:
            StepFailed, OSError: they cannot be made.
        """
        if self._unshare(CLONE_NEWPID | CLONE_NEWNS) < 0:
            number = ctypes.get_errno()
            if number != _EPERM:
                raise StepFailed("namespace", number)
            self._as_user()
        if self._mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) < 0:
            raise StepFailed("mount", ctypes.get_errno())

    def mount_proc(self) -> None:
        """In the first process of the namespace: a /proc that shows it.

        Raises:
            StepFailed: it cannot be mounted (where parts of /proc are hidden from us, as in many
                containers, the kernel does not let a user namespace uncover them).
        """
        if self._mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None) < 0:
            raise StepFailed("mount", ctypes.get_errno())
