"""isolation: how late others hear of an exit while one child misbehaves.

Beside the disturbance short-lived children (programs/ending.c) run one after the other; each notes
the moment of its exit in shared memory. What is measured is the time from there to the call of a
subscriber for `MainExited`, and for `ChildEnded`, when the tree is proved to be empty and has been
cleared away.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import proctree
from benchmarks.native import program, scratch
from benchmarks.table import Row, milliseconds
from benchmarks.timing import Effort
from proctree.supervisor import ChildEnded, ChildSpec, Heartbeat, HttpBeat, Supervisor
from proctree.transitions import MainExited

CHILDREN = 300
DELAY_MS = 40
"""How long a child lives: it has been started, and the supervisor is done with that."""

APART = 0.015
"""Seconds from one start to the next; about three live at the same time."""

BLOCKED_SECONDS = 5.0
LIMIT = 0.020
DEADLINE = 60.0

Disturbance = Callable[[], AbstractContextManager[list[ChildSpec]]]
"""Makes the children that misbehave, and gives back what they need."""


def _nothing() -> AbstractContextManager[list[ChildSpec]]:
    return contextlib.nullcontext([])


@contextmanager
def _short_lines() -> Iterator[list[ChildSpec]]:
    yield [ChildSpec("yes", ["yes"], stdout=proctree.Lines(_drop))]


@contextmanager
def _long_lines() -> Iterator[list[ChildSpec]]:
    yield [ChildSpec("lines", [program("flooding")], stdout=proctree.Lines(_drop))]


def _drop(_line: str) -> None:
    """What a callback does at least."""


@contextmanager
def _blocked() -> Iterator[list[ChildSpec]]:
    over = threading.Event()

    def block(_line: str) -> None:
        over.wait(BLOCKED_SECONDS)

    try:
        yield [ChildSpec("blocked", ["yes"], stdout=proctree.Lines(block))]
    finally:
        over.set()


@contextmanager
def _hung_function() -> Iterator[list[ChildSpec]]:
    over = threading.Event()

    def hang(_beat: object) -> None:
        over.wait(DEADLINE)

    heartbeat = Heartbeat(hang, interval=0.2, timeout=0.2, failures=10_000)
    try:
        yield [ChildSpec("hung", [program("resting")], heartbeat=heartbeat)]
    finally:
        over.set()


@contextmanager
def _hung_server() -> Iterator[list[ChildSpec]]:
    """It accepts, by its backlog, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        heartbeat = Heartbeat(HttpBeat(url), interval=0.2, timeout=0.2, failures=10_000)
        yield [ChildSpec("unanswered", [program("resting")], heartbeat=heartbeat)]


@contextmanager
def _notifications() -> Iterator[list[ChildSpec]]:
    yield [ChildSpec("notifying", [program("flooding")], notify=True)]


DISTURBANCES: dict[str, Disturbance] = {
    "yes": _short_lines,
    "a flood of lines": _long_lines,
    f"callback blocks {BLOCKED_SECONDS:g} s": _blocked,
    "heartbeat hangs": _hung_function,
    "no answer to heartbeat": _hung_server,
    "NOTIFY_SOCKET flooded": _notifications,
}


@contextmanager
def _all() -> Iterator[list[ChildSpec]]:
    with ExitStack() as stack:
        yield [spec for made in DISTURBANCES.values() for spec in stack.enter_context(made())]


class _Exits:
    """The moments of the exits, and when they were heard of."""

    def __init__(self, count: int) -> None:
        self._path = scratch() / "moments"
        self._path.write_bytes(bytes(count * 8))
        with open(self._path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), count * 8)
        self._heard: dict[type, dict[str, float]] = {MainExited: {}, ChildEnded: {}}
        self._count = count
        self.complete = threading.Event()

    def hear(self, event: Any) -> None:
        """The subscriber."""
        now = time.monotonic()
        ended = type(event) is ChildEnded
        name = event.child if ended else event.name
        if name.startswith("short-"):
            heard = self._heard[type(event)]
            heard[name] = now
            if ended and len(heard) == self._count:
                self.complete.set()

    def spec(self, number: int) -> ChildSpec:
        argv = [program("ending"), str(self._path), str(DELAY_MS), str(number)]
        return ChildSpec(f"short-{number}", argv, restart="never")

    def latencies(self, kind: type) -> list[float]:
        heard = self._heard[kind]
        moments = struct.unpack(f"{self._count}q", self._memory)
        return [heard[f"short-{number}"] - at / 1e9 for number, at in enumerate(moments)]


@contextmanager
def _silently() -> Iterator[None]:
    """That heartbeats are missed and sockets are flooded is what is wanted here."""
    logger = logging.getLogger("proctree")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run(disturbance: Disturbance, count: int) -> _Exits:
    exits = _Exits(count)
    with (
        _silently(),
        disturbance() as specs,
        Supervisor(specs, restarts=None, auto_shutdown="never") as boss,
    ):
        time.sleep(0.3)  # so that the flood has filled what there is to fill
        with proctree.subscribe(exits.hear, MainExited, ChildEnded):
            for number in range(count):
                boss.add(exits.spec(number), wait=False)
                time.sleep(APART)
            if not exits.complete.wait(DEADLINE):
                raise TimeoutError("not every child was heard of")
        boss.stop_now()
    return exits


def _percentile(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def measure(effort: Effort) -> Iterator[Row]:
    count = 100 if effort.quick else CHILDREN
    ways: dict[str, Disturbance] = {"quiet": _nothing, **DISTURBANCES, "all of these": _all}
    for what, disturbance in ways.items():
        exits = _run(disturbance, count)
        for kind in (MainExited, ChildEnded):
            latencies = exits.latencies(kind)
            worst = _percentile(latencies)
            yield Row(
                f"{kind.__name__}: {what}",
                milliseconds(worst),
                f"99 %; median {milliseconds(statistics.median(latencies))}",
                target=f"< {milliseconds(LIMIT)}",
                met=worst < LIMIT,
            )
