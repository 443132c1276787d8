"""Who delivers an answer wakes who waits for it, and waits for nobody meanwhile."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from tests.channel_ends import DEADLINE, Ends, eventually, warm

from proctree.channel import Caller, Channel, ChannelClosed, Server
from proctree.channel.loops import TaskWaiter

__all__ = ["warm"]

pytestmark = pytest.mark.usefixtures("warm")


class Gates:
    """Requests that are answered when that is wanted."""

    def __init__(self) -> None:
        self._gates = {key: threading.Event() for key in ("loop", "thread", "at once")}
        self._gates["at once"].set()

    def open(self, key: str) -> None:
        self._gates[key].set()

    def handle(self, request: dict[str, str], _caller: Caller) -> str:
        assert self._gates[request["key"]].wait(DEADLINE)
        return request["key"]


@pytest.fixture
def gates() -> Gates:
    return Gates()


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch, gates: Gates) -> Iterator[Channel]:
    server = Server()
    server.handle("Wait", gates.handle)
    with Ends(server) as ends:
        inode = ends.variable.partition(b":")[2].decode()
        monkeypatch.setenv("PROCTREE_CHANNEL", f"{ends.door.fileno()}:{inode}")
        os.set_inheritable(ends.door.fileno(), True)
        with Channel.connect() as channel:
            yield channel


def wait(key: str) -> dict[str, str]:
    return {"type": "Wait", "key": key}


def in_thread(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


class Loop:
    """Of trio, in a thread; its task waits for an answer that it cannot read by itself."""

    def __init__(self, channel: Channel) -> None:
        self.token: trio.lowlevel.TrioToken | None = None
        self.answer: Any = None
        self.busy, self.go_on = threading.Event(), threading.Event()
        self._channel = channel
        self.thread = in_thread(lambda: trio.run(self._main))

    async def _main(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask)
            while not self._channel._pending:
                await trio.sleep(0)
            self.busy.set()
            self.go_on.wait(DEADLINE)

    async def _ask(self) -> None:
        try:
            self.answer = await self._channel.arequest(wait("loop"))
        except ChannelClosed as error:
            self.answer = error


def test_a_signal_handler_that_asks_keeps_no_loop_of_trio_from_being_woken(
    channel: Channel, gates: Gates
) -> None:
    """A token has a lock, and what a handler interrupts may hold it: the loop's own thread, or one
    that has something to say to it."""
    loop = Loop(channel)
    assert loop.busy.wait(DEADLINE)
    (waiter,) = channel._pending.values()
    assert isinstance(waiter, TaskWaiter)
    reader = in_thread(lambda: channel.request(wait("thread")))
    eventually(lambda: channel._threads.leader is not None, "it reads")
    assert loop.token is not None
    answers = []
    with loop.token._reentry_queue.lock:
        gates.open("loop")
        eventually(lambda: waiter.answer is not None, "the reader delivers it")
        asking = in_thread(lambda: answers.append(channel.request(wait("at once"))))
        asking.join(DEADLINE)
    assert answers == ["at once"]
    loop.go_on.set()
    gates.open("thread")
    for thread in (loop.thread, reader, asking):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert loop.answer == "loop"


def test_a_loop_of_trio_is_woken_by_whoever_reads(channel: Channel, gates: Gates) -> None:
    """Many times over, so that it watches, is idle, and watches again."""

    async def main() -> None:
        for _ in range(50):
            assert await trio.to_thread.run_sync(ask) == "at once"
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(channel.arequest, wait("at once"))
                    nursery.start_soon(trio.to_thread.run_sync, ask)

    def ask() -> Any:
        return channel.request(wait("at once"))

    trio.run(main)


def test_what_trio_waits_for_ends_with_the_channel(channel: Channel) -> None:
    """Closed by another thread, while its loop is busy."""
    loop = Loop(channel)
    assert loop.busy.wait(DEADLINE)
    channel.close()
    loop.go_on.set()
    loop.thread.join(DEADLINE)
    assert isinstance(loop.answer, ChannelClosed)


def test_asyncio_beside_trio(channel: Channel) -> None:
    async def asks() -> None:
        for _ in range(100):
            assert await channel.arequest(wait("at once")) == "at once"

    threads = [in_thread(lambda: asyncio.run(asks())), in_thread(lambda: trio.run(asks))]
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
