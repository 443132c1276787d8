"""Requests a second of the channel of Airflow's task SDK, to be run in a venv with Airflow.

Called as channel_shapes.py says, with these shapes:

- send:THREADS    CommsDecoder.send, from so many threads
- asend:TASKS     CommsDecoder.asend, from so many tasks
- trigger:TASKS   TriggerCommsDecoder.asend, from so many tasks
"""

from __future__ import annotations

import asyncio
from typing import Any

import airflow_peer as peer
from channel_shapes import Shape, TurnMaker, from_tasks, from_threads, run


def _check(answer: object, key: str) -> None:
    if not peer.is_answer(answer, key):
        raise AssertionError(f"the answer to {key} was {answer}")


def send(threads: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with peer.echo(*delay) as connection:
        comms = peer.task_comms(connection)

        def ask(key: str) -> None:
            _check(comms.send(peer.GetVariable(key=key)), key)

        return from_threads(threads, turn, ask)


async def _tasks(comms: Any, tasks: int, turn: TurnMaker) -> dict[str, Any]:
    async def ask(key: str) -> None:
        _check(await comms.asend(peer.GetVariable(key=key)), key)

    return await from_tasks(tasks, turn, ask)


def asend(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    with peer.echo(*delay) as connection:
        return asyncio.run(_tasks(peer.task_comms(connection), tasks, turn))


def trigger(tasks: int, delay: list[str], turn: TurnMaker) -> dict[str, Any]:
    async def measure() -> dict[str, Any]:
        async with peer.trigger_comms(connection) as comms:
            return await _tasks(comms, tasks, turn)

    with peer.echo("--first", "StartTriggerer", *delay) as connection:
        return asyncio.run(measure())


SHAPES: dict[str, Shape] = {
    "send": send,
    "asend": asend,
    "trigger": trigger,
}


if __name__ == "__main__":
    run(SHAPES, peer.VERSION, peer.RESULTS)
