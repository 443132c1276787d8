"""circusd with one watcher, and a hook of it that notes when a process has been reaped.

Arguments: endpoint, endpoint of the publisher, check delay in seconds, FIFO, and the command. The
hook writes the times to the FIFO, one a line: CLOCK_MONOTONIC, nanoseconds. An empty line says that
commands are answered. Each `start` of the watcher is one run of the command.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import Any

from circus import get_arbiter


def main() -> None:
    endpoint, publisher, delay, fifo, *command = sys.argv[1:]
    told = os.open(fifo, os.O_WRONLY)

    def reaped(*_args: Any, **_options: Any) -> bool:
        os.write(told, b"%d\n" % time.monotonic_ns())
        return True

    watcher = {
        "name": "ending",
        "cmd": shlex.join(command),
        "autostart": False,
        "respawn": False,
        "warmup_delay": 0,
        "hooks": {"after_reap": (reaped, False)},
    }
    arbiter = get_arbiter(
        [watcher], controller=endpoint, pubsub_endpoint=publisher, check_delay=float(delay)
    )
    arbiter.start(cb=lambda _started: os.write(told, b"\n"))


main()
