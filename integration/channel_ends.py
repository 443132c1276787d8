"""Trees for test_channel_ends.py: `python -m integration.channel_ends NAME`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import trio

from integration.channel_parts import (
    HANGS_SECONDS,
    Ask,
    AskHeld,
    AskInline,
    AskTask,
    AskThread,
    Release,
    connect,
    is_right,
    join_all,
    leftovers,
    new_key,
    watchdog,
)
from proctree.channel import Channel, ChannelClosed, ForkedChannel

WAITING = 8
"""Of each kind."""


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def ask_right(channel: Channel, ask: Ask) -> None:
    told = channel.request(ask)
    assert is_right(told, ask), f"{ask}: {told}"


async def aask_right(channel: Channel, ask: Ask) -> None:
    told = await channel.arequest(ask)
    assert is_right(told, ask), f"{ask}: {told}"


def until(condition: Callable[[], object], what: str) -> None:
    due = time.monotonic() + HANGS_SECONDS
    while not condition():
        assert time.monotonic() < due, f"never: {what}"
        time.sleep(0.001)


class Waiting:
    """Requests that nobody answers, on threads, on loops of asyncio and trio."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.ends: list[str] = []
        functions = [self._ask] * WAITING + [self._in_asyncio, self._in_trio]
        self._threads = [threading.Thread(target=f, daemon=True) for f in functions]
        for thread in self._threads:
            thread.start()
        until(lambda: len(channel._pending) == 3 * WAITING, "all of them wait")

    def _ask(self) -> None:
        try:
            self._channel.request(AskHeld(new_key()))
        except Exception as error:
            self.ends.append(type(error).__name__)

    async def _aask(self) -> None:
        try:
            await self._channel.arequest(AskHeld(new_key()))
        except Exception as error:
            self.ends.append(type(error).__name__)

    def _in_asyncio(self) -> None:
        async def main() -> None:
            await asyncio.gather(*(self._aask() for _ in range(WAITING)))

        asyncio.run(main())

    def _in_trio(self) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(WAITING):
                    nursery.start_soon(self._aask)

        trio.run(main)

    def check(self) -> None:
        """All are told, and who asks from now on is told at once."""
        join_all(self._threads)
        assert self.ends == ["ChannelClosed"] * 3 * WAITING, self.ends
        for _ in range(2):
            with contextlib.suppress(ChannelClosed):
                self._channel.request(AskHeld(new_key()))
                raise AssertionError("a request over a closed channel")
            with contextlib.suppress(ChannelClosed):
                asyncio.run(self._channel.arequest(AskHeld(new_key())))
                raise AssertionError("a request over a closed channel")
        left = leftovers(self._channel)
        assert not left, left


def closed() -> None:
    """By another thread, while the main thread waits, and a handler that interrupts it does."""
    channel = connect()
    waiting = Waiting(channel)
    in_handler: list[str] = []

    def handler(_signo: int, _frame: FrameType | None) -> None:
        try:
            channel.request(AskHeld(new_key()))
        except ChannelClosed:
            in_handler.append("ChannelClosed")

    signal.signal(signal.SIGUSR1, handler)

    def close() -> None:
        until(lambda: len(channel._pending) == 3 * WAITING + 1, "the main thread waits")
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: len(channel._pending) == 3 * WAITING + 2, "its handler waits")
        channel.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    with contextlib.suppress(ChannelClosed):
        channel.request(AskHeld(new_key()))
        raise AssertionError("an answer that nobody gave")
    join_all([closing])
    assert in_handler == ["ChannelClosed"]
    waiting.check()


def closed_in_handler() -> None:
    """By a handler, while the main thread waits below it."""
    channel = connect()
    waiting = Waiting(channel)
    signal.signal(signal.SIGUSR1, lambda *_: channel.close())

    def interrupt() -> None:
        until(lambda: len(channel._pending) == 3 * WAITING + 1, "the main thread waits")
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=interrupt, daemon=True).start()
    with contextlib.suppress(ChannelClosed):
        channel.request(AskHeld(new_key()))
        raise AssertionError("an answer that nobody gave")
    waiting.check()


def forked() -> None:
    """A fork that uses our channel is told so at once; its own works; ours goes on."""
    channel = connect()
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            ask_right(channel, AskThread(new_key()))

    beside = [threading.Thread(target=go_on, daemon=True) for _ in range(WAITING)]
    for thread in beside:
        thread.start()
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                in_fork(channel)  # the watchdog of the parent watches us, too
                status = 0
            finally:
                os._exit(status)
        for _ in range(20):
            ask_right(channel, AskTask(new_key()))
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    join_all(beside)
    ask_right(channel, AskInline(new_key()))
    assert not leftovers(channel)
    channel.close()


def in_fork(channel: Channel) -> None:
    for function in (
        lambda: channel.request(AskInline("fork")),
        lambda: asyncio.run(channel.arequest(AskInline("fork"))),
        lambda: channel.listen(print),
    ):
        try:
            function()
        except ForkedChannel:
            continue
        raise AssertionError("the parent's channel in a fork")
    with connect() as own:
        for _ in range(20):
            ask_right(own, AskThread(new_key()))
    channel.close()  # not the parent's


def cancelled() -> None:
    """Requests that are cancelled and answered later, and thousands who ask then."""
    channel = connect()

    async def main() -> None:
        for _ in range(3):
            keys = [new_key() for _ in range(50)]
            tasks = [asyncio.create_task(channel.arequest(AskHeld(key))) for key in keys]
            async with asyncio.timeout(HANGS_SECONDS):
                while len(channel._pending) < len(keys):
                    await asyncio.sleep(0)
                await aask_right(channel, AskInline(new_key()))  # all of them were sent
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
                # Their answers come among those of the others.
                late = [aask_right(channel, Release(key, wait=False)) for key in keys]
                others = [aask_right(channel, AskTask(new_key())) for _ in range(1000)]
                await asyncio.gather(*late, *others)

    asyncio.run(main())
    assert not leftovers(channel)
    channel.close()


def memory() -> int:
    """Resident bytes at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


THREADS, TASKS, BODY = 24, 2000, 1 << 20
BOUND = 300 << 20
"""Of two gigabytes that want to be sent."""


def bounded() -> None:
    """The supervisor does not read: callers wait before they encode. It reads, and all get through.

    It stands until we say that it is full.
    """
    channel = connect()
    ask_right(channel, AskInline(new_key()))
    body = b"x" * BODY
    answered: list[str] = []

    def ask() -> None:
        ask_right(channel, AskInline(new_key(), data=body))
        answered.append("thread")

    async def aask() -> None:
        await aask_right(channel, AskInline(new_key(), data=body))
        answered.append("task")

    async def main() -> None:
        tasks = [asyncio.create_task(aask()) for _ in range(TASKS)]
        async with asyncio.timeout(2 * HANGS_SECONDS):
            await asyncio.gather(*tasks)

    before = memory()
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(THREADS)]
    loop = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    # What is sent behind this is not read before it is answered.
    stand = threading.Thread(target=lambda: channel.request({"type": "Stand"}), daemon=True)
    stand.start()
    until(lambda: channel._pending and not channel.wire.out, "the supervisor stands")
    for thread in (*threads, loop):
        thread.start()
    until(lambda: len(channel._want_room) >= THREADS + TASKS - 100, "nearly all wait for room")
    # Requests that are due are forgotten, too.
    for _ in range(100):
        with contextlib.suppress(TimeoutError):
            channel.request(AskInline(new_key()), 0.001)
            raise AssertionError("an answer of one who does not read")
    assert len(channel._want_room) <= THREADS + TASKS, "those that were due are kept"
    grown = memory() - before
    assert grown < BOUND, f"{grown >> 20} MiB more"
    say("full")
    join_all([stand, *threads, loop])
    assert len(answered) == THREADS + TASKS
    assert memory() - before < BOUND, f"{(memory() - before) >> 20} MiB more"
    assert not leftovers(channel)
    channel.close()


def room() -> None:
    """A loop's request that waits for room gets it as soon as it is there, though no answer comes:
    what holds up the one before may be that it is not asked."""
    channel = connect()

    async def main() -> None:
        async with asyncio.timeout(HANGS_SECONDS):
            key = new_key()
            long = asyncio.create_task(aask_right(channel, AskHeld(key, data=b"x" * (48 << 20))))
            while len(channel.wire.out) < 64:
                await asyncio.sleep(0)
            await aask_right(channel, Release(key, wait=False))
            await long

    asyncio.run(main())
    channel.close()


def orphaned() -> None:
    """The supervisor goes while all of them wait."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = connect()
    waiting = Waiting(channel)
    say("waiting")
    waiting.check()
    with open(sys.argv[2], "w", encoding="ascii") as file:
        file.write("told")


def waiting() -> None:
    """To be killed."""
    channel = connect()
    Waiting(channel)
    say("waiting")
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            ask_right(channel, AskThread(new_key()))

    for _ in range(WAITING):
        threading.Thread(target=go_on, daemon=True).start()
    go_on()


if __name__ == "__main__":
    with watchdog(3 * HANGS_SECONDS):
        globals()[sys.argv[1]]()
