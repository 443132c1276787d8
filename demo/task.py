"""The task of the demo: a program that does everything a supervisor fears.

It is run by the Python of a virtual environment, and only uses the standard library. It starts a
second process that leaves: in a session of its own, forked twice so that it loses its parent, deaf
to SIGTERM, and holding standard output open.
"""

from __future__ import annotations

import os
import signal
import sys

FUSE_SECONDS = 60
"""SIGALRM ends both processes then, should the demo itself be killed before it can."""


def report(what: str) -> None:
    """Tells the supervisor, through the pipe that it has passed on."""
    os.write(int(os.environ["DEMO_REPORT_FD"]), f"{what}\n".encode())


def daemon() -> None:
    """The process that leaves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(FUSE_SECONDS)
    report("daemon")
    signal.pause()


def task() -> None:
    """Starts the other one and then works for a long time."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, __file__, "daemon"])
        os._exit(0)
    os.wait()
    signal.alarm(FUSE_SECONDS)
    report("task")
    signal.pause()


if __name__ == "__main__":
    daemon() if sys.argv[1:] == ["daemon"] else task()
