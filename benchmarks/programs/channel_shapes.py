"""What the programs that measure a channel have in common: taking turns, and the other end.

    PROGRAM [--seconds S | --requests N] [--delay SECONDS] SHAPE:NUMBER...

Every shape is measured against a channel_echo.py of its own. One line of JSON is printed for each
as soon as it is known: `{"shape", "version", "delay", "requests", "seconds", "rate", "p50",
"p99"}`, the rate a second, the percentiles in seconds. With no shape they are read from standard
input, one a line, so that whoever measures can take turns. Every answer is checked to be that of
its request.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

WARM_UP = 0.3

CPUS = sorted(os.sched_getaffinity(0))
"""The two sides have one each, the first and the last: on the same one a turn takes a fifth of the
time, and where the scheduler puts them is a matter of luck."""


class Turn:
    """When to stop, and how long each request took."""

    def __init__(self, seconds: float, requests: int | None) -> None:
        self._numbers: Iterator[int] = (
            itertools.count() if requests is None else iter(range(requests))
        )
        self._began = time.perf_counter()
        self._end = self._began + seconds
        self._latencies: list[float] = []

    def requests(self) -> Iterator[str]:
        """The keys of one thread or task. What passes from one to the next is a request's time."""
        for number in self._numbers:
            before = time.perf_counter()
            if before > self._end:
                return
            yield f"key-{number}"
            self._latencies.append(time.perf_counter() - before)

    def result(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        count = len(self._latencies)
        percentiles = statistics.quantiles(self._latencies, n=100) if count > 1 else [0.0] * 99
        return {
            "requests": count,
            "seconds": seconds,
            "rate": count / seconds,
            "p50": percentiles[49],
            "p99": percentiles[98],
        }


TurnMaker = Callable[[float | None], Turn]
"""Makes a turn: the warm-up, with its seconds, or the real one."""


Shape = Callable[[int, list[str], TurnMaker], dict[str, Any]]
"""Measures one shape: its number, the arguments for the echo, and the turns."""


@contextmanager
def echo(*arguments: str) -> Iterator[socket.socket]:
    """A channel_echo.py with these arguments, and our end of its channel."""
    ours, theirs = socket.socketpair()
    program = str(Path(__file__).with_name("channel_echo.py"))
    command = [sys.executable, program, "--fd", str(theirs.fileno()), *arguments]
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    os.sched_setaffinity(process.pid, {CPUS[-1]})
    try:
        with ours:
            yield ours
            with suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
    finally:
        process.terminate()
        process.wait()


def raw(size: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    message = b"x" * size
    with echo("--raw", str(size), *delay) as connection:
        for seconds in (WARM_UP, None):
            measured = turn(seconds)
            for _ in measured.requests():
                connection.sendall(message)
                assert len(connection.recv(size, socket.MSG_WAITALL)) == size
        return measured.result()


def from_threads(threads: int, turn: TurnMaker, ask: Callable[[str], None]) -> dict[str, Any]:
    """`ask`, with the key of each request, from so many threads."""
    errors: list[BaseException] = []

    def work(measured: Turn) -> None:
        try:
            for key in measured.requests():
                ask(key)
        except BaseException as error:
            errors.append(error)

    for seconds in (WARM_UP, None):
        measured = turn(seconds)
        workers = [threading.Thread(target=work, args=[measured]) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
    return measured.result()


async def from_tasks(
    tasks: int, turn: TurnMaker, ask: Callable[[str], Awaitable[None]]
) -> dict[str, Any]:
    """The same from so many tasks."""

    async def work(measured: Turn) -> None:
        for key in measured.requests():
            await ask(key)

    for seconds in (WARM_UP, None):
        measured = turn(seconds)
        await asyncio.gather(*[work(measured) for _ in range(tasks)])
    return measured.result()


def _lines(fd: int) -> Iterator[str]:
    with os.fdopen(fd) as file:
        yield from filter(None, map(str.strip, file))


def run(shapes: Mapping[str, Shape], version: str, results: TextIO) -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--requests", type=int, help="so many, but no longer than the seconds")
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE:NUMBER")
    arguments = parser.parse_args()
    delay = ["--delay", str(arguments.delay)] if arguments.delay else []

    def turn(seconds: float | None) -> Turn:
        if seconds is None:
            return Turn(arguments.seconds, arguments.requests)
        return Turn(seconds, None)

    # A triggerer's decoder takes standard input for its own.
    os.sched_setaffinity(0, {CPUS[0]})
    wanted: Iterable[str] = arguments.shapes or _lines(os.dup(0))
    for shape in wanted:
        name, number = shape.split(":")
        result = shapes[name](int(number), delay, turn)
        line = {"shape": shape, "version": version, "delay": arguments.delay, **result}
        results.write(json.dumps(line) + "\n")
        results.flush()
