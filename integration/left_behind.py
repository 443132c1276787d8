"""What a process finds left behind in itself, and what it says of an error: for the supervisors
whose system calls fail. They are run as files, and import this from beside them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from typing import Any

import psutil

from proctree import registry
from proctree.process import proof


def failure(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "errno": getattr(error, "errno", None),
        "text": str(error),
        "notes": getattr(error, "__notes__", []),
        "is_os_error": isinstance(error, OSError),
    }


def descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children(known: Collection[int] = ()) -> list[str]:
    """Zombies too: a process that nobody reaps is a leak."""
    found = []
    for process in psutil.Process().children():
        stat = proof.read_stat(process.pid)
        if stat is not None and stat.pid not in known:
            found.append(f"{stat.pid} {stat.name} {stat.state}")
    return found


def entries() -> list[str]:
    """Of the registry, which is ours alone here."""
    return os.listdir(folder) if os.path.isdir(folder := registry.default_directory()) else []
