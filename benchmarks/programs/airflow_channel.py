"""Requests a second of the channel of Airflow's task SDK, to be run in a venv with Airflow.

Called as channel_shapes.py says, with these shapes:

- send:THREADS    CommsDecoder.send, from so many threads
- asend:TASKS     CommsDecoder.asend, from so many tasks
- trigger:TASKS   TriggerCommsDecoder.asend, from so many tasks
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import airflow_peer as peer
from channel_shapes import WARM_UP, Shape, Turn, TurnMaker, run


def _check(answer: object, key: str) -> None:
    if not peer.is_answer(answer, key):
        raise AssertionError(f"the answer to {key} was {answer}")


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
