"""Functions that other interpreters import: see test_functions.py."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from proctree.channel import Channel, Message

SLEEPER = ["sh", "-c", "trap '' TERM; sleep 1000 & wait; wait"]


class Adder:
    """Something with a method, and something to be pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    @staticmethod
    def add(*numbers: int) -> None:
        say(sum(numbers))


def say(*values: object) -> None:
    """In one piece."""
    os.write(1, (" ".join(map(str, values)) + "\n").encode())


def arguments(*args: Any, **kwargs: Any) -> None:
    say(args, kwargs)


def lengths(*args: bytes) -> None:
    say([len(arg) for arg in args])


def number_of(adder: Adder) -> None:
    say(adder.number)


def fail() -> None:
    raise ValueError("as it should")


def leave(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def surroundings() -> None:
    say(os.getcwd())
    say(os.environ.get("ONLY_HERE"), sorted(os.environ))
    with open("/proc/self/environ", "rb") as file:
        mark = file.read().split(b"\0")
    own = f"PROCTREE_TREE={os.environ['PROCTREE_TREE']}".encode()
    say(own in mark, sys.path[0], sys.argv[-1])


def given() -> None:
    umask = os.umask(0)
    say(os.nice(0), oct(umask), resource.getrlimit(resource.RLIMIT_NOFILE))


def terminal() -> None:
    say([os.isatty(fd) for fd in range(3)], os.tcgetpgrp(0) == os.getpgrp())


def write_numbers(numbers: list[int]) -> None:
    """To each descriptor its own number; and which descriptors there are."""
    for number in numbers:
        os.write(number, str(number).encode())
    say(sorted(int(name) for name in os.listdir("/proc/self/fd")))


class Double(Message):
    number: int


def ask(number: int) -> None:
    with Channel.connect() as channel:
        say(channel.request(Double(number), timeout=20))


def scatter(lifeline: int) -> None:
    """Ends at once, and leaves processes that hold the lifeline and have left our session."""
    for _ in range(2):
        subprocess.Popen(["setsid", *SLEEPER], pass_fds=[lifeline])
    say("scattered")


def rest() -> None:
    say("resting", os.getpid())
    while True:
        signal.pause()


def outlast(pid: int) -> None:
    """Takes its time when it is asked to end: until another process has ended, and longer."""
    from proctree.process import proof

    asked, told = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.signal(signal.SIGUSR1, lambda *_: told.set())
    say("ready", os.getpid())
    asked.wait()
    while (stat := proof.read_stat(pid)) is not None and not stat.dead:
        threading.Event().wait(0.01)
    say("outlasted")
    told.wait()
    say("done")


def nested() -> None:
    import proctree

    say(proctree.run(["sh", "-c", "exit 5"]).returncode)


def preloaded() -> None:
    from integration import preload_process

    say(preload_process.helper.pid, preload_process.parent == os.getpid())
