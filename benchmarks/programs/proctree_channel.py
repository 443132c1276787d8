"""Requests a second of proctree's channel, and of none.

Called as channel_shapes.py says, with these shapes:

- raw:BYTES          no channel at all: so many bytes to and fro
- request:THREADS    Channel.request, from so many threads
- arequest:TASKS     Channel.arequest, from so many tasks
- flooded:THREADS    Channel.request, from one thread, while so many others flood the channel
"""

from __future__ import annotations

import asyncio
import sys
import threading
from functools import partial
from typing import Any

from channel_shapes import WARM_UP, Shape, TurnMaker, echo, from_tasks, from_threads, raw, run

from proctree import __version__
from proctree.channel import Channel, Message


class GetVariable(Message):
    key: str


class VariableResult(Message):
    key: str
    value: str | None


def _check(answer: object, key: str) -> None:
    if not isinstance(answer, VariableResult) or answer.key != key or answer.value != key:
        raise AssertionError(f"the answer to {key} was {answer}")


def _ask(channel: Channel, key: str) -> None:
    _check(channel.request(GetVariable(key)), key)


def request(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:
        return from_threads(threads, turn, partial(_ask, channel))


def flooded(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:
        over = threading.Event()

        def flood(number: int) -> None:
            while not over.is_set():
                _ask(channel, f"flood-{number}")

        others = [threading.Thread(target=flood, args=[number]) for number in range(threads)]
        for other in others:
            other.start()
        try:
            for seconds in (WARM_UP, None):
                measured = turn(seconds)
                for key in measured.requests():
                    _ask(channel, key)
            return measured.result()
        finally:
            over.set()
            for other in others:
                other.join()


def arequest(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:

        async def ask(key: str) -> None:
            _check(await channel.arequest(GetVariable(key)), key)

        return asyncio.run(from_tasks(tasks, turn, ask))


SHAPES: dict[str, Shape] = {
    "raw": raw,
    "request": request,
    "arequest": arequest,
    "flooded": flooded,
}


if __name__ == "__main__":
    run(SHAPES, __version__, sys.stdout)
