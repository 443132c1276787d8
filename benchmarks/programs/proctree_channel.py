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
from typing import Any

from channel_shapes import WARM_UP, Shape, Turn, TurnMaker, echo, raw, run

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


def _ask(channel: Channel, turn: Turn) -> None:
    for key in turn.requests():
        _check(channel.request(GetVariable(key)), key)


def request(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:
        errors: list[BaseException] = []

        def work(measured: Turn) -> None:
            try:
                _ask(channel, measured)
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


def flooded(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:
        over = threading.Event()

        def flood(number: int) -> None:
            while not over.is_set():
                _check(channel.request(GetVariable(f"flood-{number}")), f"flood-{number}")

        others = [threading.Thread(target=flood, args=[number]) for number in range(threads)]
        for other in others:
            other.start()
        try:
            for seconds in (WARM_UP, None):
                measured = turn(seconds)
                _ask(channel, measured)
            return measured.result()
        finally:
            over.set()
            for other in others:
                other.join()


async def _tasks(channel: Channel, tasks: int, turn: TurnMaker) -> dict[str, Any]:
    async def work(measured: Turn) -> None:
        for key in measured.requests():
            _check(await channel.arequest(GetVariable(key)), key)

    for seconds in (WARM_UP, None):
        measured = turn(seconds)
        await asyncio.gather(*[work(measured) for _ in range(tasks)])
    return measured.result()


def arequest(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with echo(*delay) as connection, Channel(connection, types=[VariableResult]) as channel:
        return asyncio.run(_tasks(channel, tasks, turn))


SHAPES: dict[str, Shape] = {
    "raw": raw,
    "request": request,
    "arequest": arequest,
    "flooded": flooded,
}


if __name__ == "__main__":
    run(SHAPES, __version__, sys.stdout)
