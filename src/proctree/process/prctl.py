"""prctl(2): through python-prctl where it is installed, through libc otherwise.

Both ways make the same system call. python-prctl needs libcap's headers to build, so it is the
extra `proctree-supervisor[prctl]` and never required.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38


class Prctl(Protocol):
    """The calls that proctree makes. Each raises `OSError` when the kernel refuses."""

    def set_pdeathsig(self, signo: int) -> None:
        """PR_SET_PDEATHSIG: `signo` when the parent *thread* ends; 0 switches it off."""

    def get_pdeathsig(self) -> int:
        """PR_GET_PDEATHSIG."""
        ...

    def set_no_new_privs(self) -> None:
        """PR_SET_NO_NEW_PRIVS: no exec of ours or of what we start gains privileges."""

    def set_child_subreaper(self, on: bool) -> None:
        """PR_SET_CHILD_SUBREAPER: orphaned descendants become our children."""

    def get_child_subreaper(self) -> bool:
        """PR_GET_CHILD_SUBREAPER."""
        ...


class LibcPrctl:
    """Through ctypes."""

    def __init__(self) -> None:
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self._prctl.restype = ctypes.c_int

    def _call(self, option: int, argument: object) -> None:
        if self._prctl(option, argument, 0, 0, 0) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({option}): {os.strerror(number)}")

    def _get(self, option: int) -> int:
        value = ctypes.c_int(0)
        self._call(option, ctypes.byref(value))
        return value.value

    def set_pdeathsig(self, signo: int) -> None:
        self._call(PR_SET_PDEATHSIG, ctypes.c_ulong(signo))

    def get_pdeathsig(self) -> int:
        return self._get(PR_GET_PDEATHSIG)

    def set_no_new_privs(self) -> None:
        self._call(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))

    def set_child_subreaper(self, on: bool) -> None:
        self._call(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(on))

    def get_child_subreaper(self) -> bool:
        return bool(self._get(PR_GET_CHILD_SUBREAPER))


class PackagePrctl:
    """Through python-prctl."""

    def __init__(self) -> None:
        import prctl

        self._module: Any = prctl
        if not hasattr(prctl, "set_child_subreaper"):
            raise ImportError("the module prctl that is installed is not python-prctl")

    def set_pdeathsig(self, signo: int) -> None:
        self._module.set_pdeathsig(signo)

    def get_pdeathsig(self) -> int:
        return int(self._module.get_pdeathsig())

    def set_no_new_privs(self) -> None:
        self._module.set_no_new_privs(1)

    def set_child_subreaper(self, on: bool) -> None:
        self._module.set_child_subreaper(int(on))

    def get_child_subreaper(self) -> bool:
        return bool(self._module.get_child_subreaper())


def load() -> Prctl:
    """The way that is there. Call it before a fork: importing in the child is not safe."""
    try:
        return PackagePrctl()
    except ImportError:
        return LibcPrctl()
