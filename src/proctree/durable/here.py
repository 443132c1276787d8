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
            time_namespace=proof.time_namespace(),
            host=socket.gethostname(),
        )


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
