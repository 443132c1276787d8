"""What the supervisors whose system calls fail have in common: how they are told what to do, what
they say of an error, and what they find left behind in themselves. They are run as files, and
import this from beside them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection
from typing import Any

import psutil

from proctree import registry
from proctree.process import proof


def listen(events: list[str]) -> None:
    """Appends what proctree logs: by the standard library, as structlog is not set up."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            events.append(text)

    logger = logging.getLogger("proctree")
    logger.addHandler(Handler())
    logger.propagate = False


def say(message: dict[str, Any], fd: int = 1) -> None:
    """By writev(2), which proctree does not call: it is not among those that fail."""
    left = json.dumps(message).encode() + b"\n"
    while left:
        left = left[os.writev(fd, [left]) :]


def hear(fd: int = 0) -> dict[str, Any]:
    """A line; the end of the file ends the process."""
    line = b""
    piece = bytearray(1)
    while not line.endswith(b"\n"):
        if os.readv(fd, [piece]) == 0:
            raise SystemExit
        line += piece
    return json.loads(line)


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
