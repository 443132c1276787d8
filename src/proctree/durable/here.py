"""This machine and this process, as records name them."""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

from proctree import registry
from proctree.durable.recording import Request
from proctree.process import proof


class Here(NamedTuple):
    """Who we are, for those that want a key."""

    holder: int
    holder_start: int
    boot: str
    pid_namespace: int
    time_namespace: int
    host: str

    @classmethod
    def now(cls) -> Here:
        """Raises OSError: descriptors or memory are short."""
        stat = proof.read_stat(os.getpid())
        boot, pid_namespace = registry.this_machine()
        return cls(
            holder=os.getpid(),
            holder_start=stat.start_time if stat is not None else 0,
            boot=boot,
            pid_namespace=pid_namespace,
            time_namespace=clock(),
            host=socket.gethostname(),
        )


def clock(namespace: str = "self/ns/time") -> int:
    """Which CLOCK_BOOTTIME a process has; 0: it cannot be told. Field 22 of /proc/PID/stat is
    shifted by the reader's offset as well: in another time namespace the same process has another
    start time (time_namespaces(7)).

    Args:
        namespace: a path below /proc.

    Raises:
        OSError: memory is short, so that it cannot be said.
    """
    try:
        return os.stat(f"/proc/{namespace}").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0  # before Linux 5.6; or it has just ended, or is hidden from us


def new_request(
    key: str,
    target: str,
    fingerprint: str,
    tree_id: str,
    kind: str,
    *,
    containment: str = "",
    cgroup: str = "",
) -> Request:
    """What we ask for now; see `Request` for the arguments."""
    boot, pid_namespace = registry.this_machine()
    return Request(
        key=key,
        target=target,
        fingerprint=fingerprint,
        tree_id=tree_id,
        kind=kind,
        boot=boot,
        pid_namespace=pid_namespace,
        host=socket.gethostname(),
        supervisor=os.getpid(),
        requested=time.time_ns(),
        containment=containment,
        cgroup=cgroup,
        user_namespace=registry.user_namespace(),
    )
