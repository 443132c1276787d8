"""What becomes of requests over the channel of Airflow's task SDK; runs in a venv with Airflow.

    airflow_record.py [--requests N] [--deadline SECONDS] [SHAPE...]

Each shape is a way to use a decoder that its users have come to use it in: from the threads of
triggers, from event loops of their own, with cancellations and timeouts, after a fork, after the
end. It has a process and a channel_echo.py of its own, and every answer says whose it is. One line
of JSON is printed for each:

- shape, version, seconds
- requests: how many were made, of `planned`
- right, wrong: how many got their own answer, and somebody else's
- cancelled: how many ended because the shape itself cancelled them or let them time out
- errors: how many ended with which error
- hung: how many had not ended when nothing had happened for a while, or when time was up
- last_right, first_bad: when the last right answer came, and the first wrong one or error, in
  seconds after the first request
- peak_bytes: the memory that it took
- more, for some shapes

Shapes that begin with `trigger` use TriggerCommsDecoder, and unless they say otherwise eight
triggers make requests that way while the main loop makes some itself, as a triggerer does. Those
that begin with `task` use CommsDecoder.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import airflow_peer as peer
import greenback
from airflow.sdk.execution_time.comms import _ResponseFrame
from airflow.sdk.execution_time.timeout import TimeoutPosix
from asgiref.sync import sync_to_async

TRIGGERS = 8
DELAY = ["--delay", "0.001"]
TICK = 0.02
QUIET = 100
"""When nothing has happened for so many ticks the rest is hung. They are counted, because no thread
runs while a decoder that took something else for a length gets itself that much memory."""

MEMORY = 2 * 1024**3
"""What a shape may have. A decoder that took something else for a length wants more: without this
it would wait for ever, with gigabytes."""

Send = Callable[[Any], Any]
Asend = Callable[[Any], Awaitable[Any]]


class Tally:
    """The requests of a shape, and what became of them. For all threads."""

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.name = "request"
        self.random = random.Random(1)
        self.more: dict[str, Any] = {}
        self.events = 0
        self.ended = threading.Event()
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._left = planned
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._times: dict[str, float] = {}

    def more_to_do(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def request(self) -> str:
        """A request is made; returns its key."""
        with self._lock:
            if not self._counts["requests"]:
                self._began = time.monotonic()
            self.events += 1
            self._counts["requests"] += 1
            return f"{self.name}-{self._counts['requests']}"

    def answered(self, key: str, answer: object) -> None:
        right = peer.is_answer(answer, key)
        self._ended("right" if right else "wrong", "last_right" if right else "first_bad")

    def failed(self, error: BaseException) -> None:
        lines = str(error).splitlines() or [""]
        text = re.sub(r"0x[0-9a-f]+|\d+", "N", lines[0])[:90]
        with self._lock:
            self._errors[f"{type(error).__name__}: {text}"] += 1
        self._ended("errors", "first_bad")

    def cancelled(self) -> None:
        self._ended("cancelled")

    def add(self, other: dict[str, Any]) -> None:
        """What another process has to say."""
        with self._lock:
            for name in ("requests", "right", "wrong", "cancelled"):
                self._counts[name] += other[name]
            self._errors.update(other["errors"])
            self._counts["errors"] += sum(other["errors"].values())

    def result(self) -> dict[str, Any]:
        with self._lock:
            counts = self._counts
            ended = counts["right"] + counts["wrong"] + counts["cancelled"] + counts["errors"]
            return {
                "seconds": round(time.monotonic() - self._began, 3),
                "planned": self.planned,
                "requests": counts["requests"],
                "right": counts["right"],
                "wrong": counts["wrong"],
                "cancelled": counts["cancelled"],
                "errors": dict(self._errors.most_common()),
                "hung": counts["requests"] - ended,
                "last_right": self._times.get("last_right"),
                "first_bad": self._times.get("first_bad"),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                **self.more,
            }

    def _ended(self, count: str, moment: str = "") -> None:
        with self._lock:
            self.events += 1
            self._counts[count] += 1
            if moment and not (moment.startswith("first") and moment in self._times):
                self._times[moment] = round(time.monotonic() - self._began, 4)


class Quiet:
    """Counts the ticks in which nothing has happened."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events = -1
        self._ticks = 0

    def for_ticks(self, number: int) -> bool:
        """To be called once every tick."""
        self._ticks = self._ticks + 1 if self._events == self._tally.events else 0
        self._events = self._tally.events
        return self._ticks >= number


# How one request is made.


def ask(tally: Tally, send: Send) -> None:
    key = tally.request()
    try:
        answer = send(peer.GetVariable(key=key))
    except BaseException as error:
        tally.failed(error)
    else:
        tally.answered(key, answer)


async def aask(tally: Tally, asend: Asend) -> None:
    key = tally.request()
    try:
        answer = await asend(peer.GetVariable(key=key))
    except BaseException as error:
        tally.failed(error)
    else:
        tally.answered(key, answer)


async def ask_and_cancel(tally: Tally, asend: Asend, after: float, turns: int = 1) -> None:
    """Cancels the request when it has not ended after so many turns of the loop and seconds."""
    key = tally.request()
    task = asyncio.ensure_future(asend(peer.GetVariable(key=key)))
    for _ in range(turns):
        await asyncio.sleep(0)
    if after:
        await asyncio.wait([task], timeout=after)
    by_us = not task.done() and task.cancel()
    await asyncio.wait([task])
    if task.cancelled() and by_us:
        tally.cancelled()
    elif task.cancelled():
        tally.failed(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        tally.failed(error)
    else:
        tally.answered(key, task.result())


def opened(*arguments: str) -> socket.socket:
    """A channel that stays open until the process ends, for what may still be reading then."""
    channel = peer.echo(*arguments)
    _opened.append(channel)
    return channel.__enter__()


_opened: list[AbstractContextManager[socket.socket]] = []


# Triggers.


@asynccontextmanager
async def triggerer(tally: Tally) -> AsyncIterator[peer.TriggerCommsDecoder]:
    """A decoder, and a main loop that makes requests itself until the block ends."""
    with peer.echo("--first", "StartTriggerer", *DELAY) as connection:
        async with peer.trigger_comms(connection) as comms:
            main = asyncio.create_task(_main_loop(tally, comms))
            yield comms
            await main


async def _main_loop(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    while tally.more_to_do():
        await aask(tally, comms.asend)
        await asyncio.sleep(0.001)


Once = Callable[[Tally, peer.TriggerCommsDecoder], Awaitable[None]]


async def triggers(tally: Tally, once: Once, portal: bool) -> None:
    async def run() -> None:
        if portal:
            await greenback.ensure_portal()
        while tally.more_to_do():
            await once(tally, comms)
            await asyncio.sleep(0)

    async with triggerer(tally) as comms:
        await asyncio.gather(*[run() for _ in range(TRIGGERS)])


async def once_asend(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await aask(tally, comms.asend)


async def once_sync_to_async(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await aask(tally, sync_to_async(comms.send))


async def once_in_any_thread(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await aask(tally, sync_to_async(comms.send, thread_sensitive=False))


async def once_to_thread(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await asyncio.to_thread(ask, tally, comms.send)


async def once_after_thread(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await asyncio.to_thread(time.sleep, 0.002)
    await aask(tally, comms.asend)


async def once_send(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    ask(tally, comms.send)


async def once_cancelling(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await ask_and_cancel(tally, comms.asend, some_time(tally))


async def once_sync_to_async_cancelling(tally: Tally, comms: peer.TriggerCommsDecoder) -> None:
    await ask_and_cancel(tally, sync_to_async(comms.send), some_time(tally))


def some_time(tally: Tally) -> float:
    """When to cancel: mostly never, and else at any moment of a request's life."""
    if tally.random.random() < 0.8:
        return 60
    return 0.0001 * 2 ** tally.random.uniform(0, 8)


def of_triggers(once: Once, portal: bool = False) -> Callable[[Tally], Awaitable[None]]:
    return lambda tally: triggers(tally, once, portal)


async def trigger_loops(tally: Tally) -> None:
    async def run() -> None:
        while tally.more_to_do():
            await aask(tally, comms.asend)

    async with triggerer(tally) as comms:
        await asyncio.gather(
            *[asyncio.to_thread(lambda: asyncio.run(run())) for _ in range(TRIGGERS)]
        )


async def trigger_cancel_once(tally: Tally) -> None:
    """One request is cancelled while it is in flight."""
    tally.planned = 302
    with peer.echo("--first", "StartTriggerer", "--delay", "0.005") as connection:
        async with peer.trigger_comms(connection) as comms:
            await aask(tally, comms.asend)
            await ask_and_cancel(tally, comms.asend, 0.002)
            for _ in range(300):
                await aask(tally, comms.asend)


async def trigger_end(tally: Tally) -> None:
    """The other end closes while some requests are in flight, and some are made afterwards."""
    tally.planned = 2 * TRIGGERS
    with peer.echo("--first", "StartTriggerer", "--delay", "5") as connection:
        async with peer.trigger_comms(connection) as comms:
            before = [asyncio.create_task(aask(tally, comms.asend)) for _ in range(TRIGGERS)]
            await asyncio.sleep(0.2)
            connection.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.2)
            tally.more["in_flight_hung"] = tally.result()["hung"]
            await asyncio.gather(*before, *[aask(tally, comms.asend) for _ in range(TRIGGERS)])


async def trigger_flood(tally: Tally) -> None:
    """The other end does not read at all. The requests can only hang; what is queued meanwhile?"""
    tally.planned, size = 10_000, 10_000
    ours, theirs = socket.socketpair()
    theirs.sendall(_ResponseFrame(id=0, body={"type": "StartTriggerer"}).as_bytes())
    async with peer.trigger_comms(ours) as comms:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        async def run() -> None:
            tally.request()
            await comms.asend(peer.GetVariable(key="x" * size))

        tasks = [asyncio.create_task(run()) for _ in range(tally.planned)]
        await asyncio.wait(tasks, timeout=1)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        tally.more["queued_bytes"] = comms._async_writer.transport.get_write_buffer_size()
        tally.more["grown_bytes"] = grown * 1024
        await asyncio.wait(tasks)


# Tasks.


async def task_asend(tally: Tally) -> None:
    async def run() -> None:
        while tally.more_to_do():
            await aask(tally, comms.asend)

    with peer.echo(*DELAY) as connection:
        comms = peer.task_comms(connection)
        await asyncio.gather(*[run() for _ in range(TRIGGERS)])


async def task_cancel_once(tally: Tally) -> None:
    """One request is cancelled, in each of many channels, at one moment or another. `channels` has
    how many went on well, and in how many later requests hung, failed or got another's answer."""
    moments = [(turns, 0.0) for turns in (1, 2, 3, 4, 6, 8, 12, 16)] + [(1, 0.001)] * 4
    later, rounds = 20, 2
    tally.more["channels"] = channels = Counter[str]()
    tally.planned = len(moments) * rounds * (later + 2)
    for turns, seconds in moments * rounds:
        comms = peer.task_comms(opened("--delay", "0.003"))
        # The threads of the executor may never be free again.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))

        async def run(
            comms: peer.CommsDecoder = comms, turns: int = turns, seconds: float = seconds
        ) -> None:
            await aask(tally, comms.asend)
            await ask_and_cancel(tally, comms.asend, seconds, turns)
            for _ in range(later):
                await aask(tally, comms.asend)

        before = tally.result()
        await asyncio.wait([asyncio.create_task(run())], timeout=0.3)
        after = tally.result()
        kinds = ("errors", "wrong", "hung")
        channels[next((kind for kind in kinds if after[kind] != before[kind]), "well")] += 1


async def task_cancel(tally: Tally) -> None:
    async def run() -> None:
        while tally.more_to_do():
            await ask_and_cancel(tally, comms.asend, some_time(tally))

    with peer.echo(*DELAY) as connection:
        comms = peer.task_comms(connection)
        await asyncio.gather(*[run() for _ in range(TRIGGERS)])


async def task_send_in_loop(tally: Tally) -> None:
    """Tasks use asend, and one of them calls something that uses send."""

    async def run(send: bool) -> None:
        while tally.more_to_do():
            if send:
                await asyncio.sleep(0.001)
                ask(tally, comms.send)
            else:
                await aask(tally, comms.asend)

    with peer.echo(*DELAY) as connection:
        comms = peer.task_comms(connection)
        await asyncio.gather(*[run(number == 0) for number in range(TRIGGERS)])


def task_send(tally: Tally) -> None:
    def run() -> None:
        while tally.more_to_do():
            ask(tally, comms.send)

    with peer.echo(*DELAY) as connection:
        comms = peer.task_comms(connection)
        threads = [threading.Thread(target=run, daemon=True) for _ in range(TRIGGERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def task_timeout(tally: Tally) -> None:
    """One of the first requests is still unanswered when the task times out, by the means that the
    SDK has for that; the task goes on."""
    with peer.echo("--delay", "0.01") as first:
        comms = peer.task_comms(first)
        ask(tally, comms.send)
        key = tally.request()
        try:
            with TimeoutPosix(0.005):
                answer = comms.send(peer.GetVariable(key=key))
        except BaseException as error:
            tally.more["timed_out"] = type(error).__name__
            tally.cancelled()
        else:
            tally.answered(key, answer)
        tally.planned = 302
        for _ in range(300):
            ask(tally, comms.send)


def task_fork(tally: Tally) -> None:
    """The process forks, and both go on with the decoder that they have."""

    def run() -> None:
        while tally.more_to_do():
            ask(tally, comms.send)

    comms = peer.task_comms(opened(*DELAY))
    ask(tally, comms.send)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        child = Tally(tally.planned)
        child.name = "child"
        tally = child

        def report() -> None:
            os.write(writing, json.dumps(child.result()).encode())

        watch(child, 10, report, run)
    os.close(writing)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    quiet = Quiet(tally)
    while thread.is_alive() and not quiet.for_ticks(QUIET // 2):
        thread.join(TICK)
    tally.planned *= 2
    tally.events += 1
    with os.fdopen(reading) as pipe:
        tally.add(json.load(pipe))


SHAPES: dict[str, Callable[[Tally], Any]] = {
    "trigger-asend": of_triggers(once_asend),
    "trigger-sync_to_async": of_triggers(once_sync_to_async),
    "trigger-sync_to_async-any-thread": of_triggers(once_in_any_thread),
    "trigger-to_thread": of_triggers(once_to_thread),
    "trigger-own-loops": trigger_loops,
    "trigger-portal-after-thread": of_triggers(once_after_thread, portal=True),
    "trigger-portal-sync_to_async": of_triggers(once_sync_to_async, portal=True),
    "trigger-portal-to_thread": of_triggers(once_to_thread, portal=True),
    "trigger-portal-send": of_triggers(once_send, portal=True),
    "trigger-cancel-in-flight": trigger_cancel_once,
    "trigger-cancel": of_triggers(once_cancelling),
    "trigger-portal-sync_to_async-cancel": of_triggers(once_sync_to_async_cancelling, portal=True),
    "trigger-end": trigger_end,
    "trigger-flood": trigger_flood,
    "task-send": task_send,
    "task-asend": task_asend,
    "task-send-in-loop": task_send_in_loop,
    "task-cancel-once": task_cancel_once,
    "task-cancel": task_cancel,
    "task-timeout": task_timeout,
    "task-fork": task_fork,
}


def watch(
    tally: Tally, deadline: float, report: Callable[[], None], run: Callable[[], None]
) -> None:
    """Runs, and reports when that has ended, or has hung, or time is up. Ends the process."""

    def wait() -> None:
        end = time.monotonic() + deadline
        quiet = Quiet(tally)
        while not tally.ended.wait(TICK):
            if time.monotonic() > end or quiet.for_ticks(QUIET):
                break
        try:
            report()
        finally:
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    try:
        run()
    except BaseException as error:
        tally.more["ended_by"] = f"{type(error).__name__}: {error}"
    tally.ended.set()
    while True:
        signal.pause()


def record(name: str, requests: int, deadline: float) -> None:
    """One shape. Ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tally = Tally(requests)
    shape = SHAPES[name]

    def run() -> None:
        if inspect.isawaitable(result := shape(tally)):

            async def wait() -> None:
                await result
                tally.ended.set()
                # What is hung is not to be cancelled by the end of the loop.
                await asyncio.Event().wait()

            asyncio.run(wait())

    watch(
        tally,
        deadline,
        lambda: peer.show({"shape": name, "version": peer.VERSION, **tally.result()}),
        run,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000, help="for each shape")
    parser.add_argument("--deadline", type=float, default=15, help="for each shape, in seconds")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    arguments = parser.parse_args()
    for name in arguments.shapes or SHAPES:
        child = os.fork()
        if child == 0:
            record(name, arguments.requests, arguments.deadline)
        end = time.monotonic() + arguments.deadline + 5
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                peer.show({"shape": name, "version": peer.VERSION, "killed": True})
                break
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
