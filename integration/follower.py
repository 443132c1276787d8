"""A process that follows the output of a tree which somebody else runs, until its standard input
ends: python -m integration.follower PLACE RESULTS

Each line of the tree's standard output becomes one of the file RESULTS, by one write(2).
"""

from __future__ import annotations

import os
import sys

from proctree import loop
from proctree.durable.following import Followed
from proctree.output import CallbackErrors
from proctree.process import fds
from proctree.sinks import Lines
from proctree.worker import Worker


class Owner:
    """What the streams want of their tree."""

    def __init__(self) -> None:
        self.tree_id = "0" * 16
        self.pid: int | None = None
        self.worker = Worker()
        self.callback_errors = CallbackErrors(self.tree_id)

    def stream_ended(self) -> None:
        """It is not ours: we do not know when it ends."""


def main(place: str, results: str) -> None:
    fd = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    logs = (Lines(lambda line: os.write(fd, f"{line}\n".encode())), None)
    followed = Followed(None, logs, place, writes=False)

    def begin() -> None:
        with fds.making():
            followed.attach(loop.get(), Owner())
        followed.start()

    loop.get().post(begin)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
