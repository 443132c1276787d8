"""Requests a second of the channel of Airflow's task SDK, to be run in a venv with Airflow.

    airflow_channel.py [--seconds S | --requests N] [--delay SECONDS] SHAPE...

Every SHAPE is measured against a channel_echo.py of its own:

- raw:BYTES       no channel at all: so many bytes to and fro
- send:THREADS    CommsDecoder.send, from so many threads
- asend:TASKS     CommsDecoder.asend, from so many tasks
- trigger:TASKS   TriggerCommsDecoder.asend, from so many tasks

One line of JSON is printed for each as soon as it is known:
`{"shape", "version", "delay", "requests", "seconds", "rate", "p50", "p99"}`, the rate a second, the
percentiles in seconds. With no SHAPE they are read from standard input, one a line, so that whoever
measures can take turns. Every answer is checked to be that of its request.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import airflow_peer as peer

WARM_UP = 0.3


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


def _check(answer: object, key: str) -> None:
    if not peer.is_answer(answer, key):
        raise AssertionError(f"the answer to {key} was {answer}")


def raw(size: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    message = b"x" * size
    with peer.echo("--raw", str(size), *delay) as connection:
        for seconds in (WARM_UP, None):
            measured = turn(seconds)
            for _ in measured.requests():
                connection.sendall(message)
                assert len(connection.recv(size, socket.MSG_WAITALL)) == size
        return measured.result()


def send(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with peer.echo(*delay) as connection:
        comms = peer.task_comms(connection)
        errors: list[BaseException] = []

        def work(measured: Turn) -> None:
            try:
                for key in measured.requests():
                    _check(comms.send(peer.GetVariable(key=key)), key)
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


async def _tasks(comms: Any, tasks: int, turn: TurnMaker) -> dict[str, Any]:
    async def work(measured: Turn) -> None:
        for key in measured.requests():
            _check(await comms.asend(peer.GetVariable(key=key)), key)

    for seconds in (WARM_UP, None):
        measured = turn(seconds)
        await asyncio.gather(*[work(measured) for _ in range(tasks)])
    return measured.result()


def asend(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with peer.echo(*delay) as connection:
        return asyncio.run(_tasks(peer.task_comms(connection), tasks, turn))


def trigger(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with peer.trigger_comms(connection) as comms:
            return await _tasks(comms, tasks, turn)

    with peer.echo("--first", "StartTriggerer", *delay) as connection:
        return asyncio.run(run())


SHAPES: dict[str, Callable[[int, list[str], TurnMaker], dict[str, Any]]] = {
    "raw": raw,
    "send": send,
    "asend": asend,
    "trigger": trigger,
}


def _lines(fd: int) -> Iterator[str]:
    with os.fdopen(fd) as file:
        yield from filter(None, map(str.strip, file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--requests", type=int, help="so many, but no longer than the seconds")
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE")
    arguments = parser.parse_args()
    delay = ["--delay", str(arguments.delay)] if arguments.delay else []

    def turn(seconds: float | None) -> Turn:
        if seconds is None:
            return Turn(arguments.seconds, arguments.requests)
        return Turn(seconds, None)

    # The triggerer's decoder takes standard input for its own.
    shapes: Iterable[str] = arguments.shapes or _lines(os.dup(0))
    for shape in shapes:
        name, number = shape.split(":")
        result = SHAPES[name](int(number), delay, turn)
        version = peer.VERSION
        peer.show({"shape": shape, "version": version, "delay": arguments.delay, **result})


if __name__ == "__main__":
    main()
