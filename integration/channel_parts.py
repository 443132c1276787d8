"""What the tests of the channel under load have in common: a server that answers out of order, and
answers that say whose they are."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import proctree
from proctree.channel import Answer, Caller, Channel, Message, Server

ROOT = Path(__file__).parent.parent
HANGS_SECONDS = 60.0
"""Whatever has not ended by then never will."""


class Ask(Message):
    """Attributes:
    key: nobody else has it, and it comes back.
    size: bytes of the answer.
    fds: how many descriptors come with the answer: each is a file with the key in it.
    pause: seconds until the answer.
    data: makes the request long.
    """

    key: str
    size: int = 0
    fds: int = 0
    pause: float = 0.0
    data: bytes = b""


class AskInline(Ask):
    """Answered on the server's own thread, in order."""


class AskThread(Ask):
    """Answered by a thread."""


class AskTask(Ask):
    """Answered by a task."""


class AskHeld(Ask):
    """Answered when somebody asks for it by `Release`."""


class Release(Ask):
    """Its `key` is that of the one to be released. With `wait` its own answer comes behind that
    one's."""

    wait: bool = True


class AskNoting(Ask):
    """Its key comes as a notification first."""


class Told(Message):
    key: str
    body: bytes = b""


class Noted(Message):
    key: str


class Held:
    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.gone = asyncio.Event()


def pattern(key: str, size: int) -> bytes:
    """Bytes that belong to this key."""
    return (key.encode() * (size // len(key) + 1))[:size]


def is_right(told: Any, ask: Ask) -> bool:
    return type(told) is Told and told.key == ask.key and told.body == pattern(ask.key, ask.size)


def take_key(fd: int) -> str:
    """Reads a descriptor that came with an answer, and closes it."""
    try:
        return os.pread(fd, 1000, 0).decode()
    finally:
        os.close(fd)


def _tell(ask: Ask) -> Any:
    told = Told(ask.key, pattern(ask.key, ask.size))
    if not ask.fds:
        return told
    files = [os.memfd_create("answer", os.MFD_CLOEXEC) for _ in range(ask.fds)]
    for file in files:
        os.write(file, ask.key.encode())
    return Answer(told, files)


def serve(**options: Any) -> Server:
    """A server for all these messages."""
    server = Server(**options)
    held: dict[str, Held] = {}

    def inline(ask: AskInline, _caller: Caller) -> Any:
        return _tell(ask)

    @server.handler
    def in_thread(ask: AskThread, _caller: Caller) -> Any:
        time.sleep(ask.pause)
        return _tell(ask)

    @server.handler
    async def in_task(ask: AskTask, _caller: Caller) -> Any:
        await asyncio.sleep(ask.pause)
        return _tell(ask)

    @server.handler
    async def hold(ask: AskHeld, _caller: Caller) -> Any:
        await held.setdefault(ask.key, Held()).go.wait()
        # Whoever releases is answered behind this one.
        asyncio.get_running_loop().call_later(0, held[ask.key].gone.set)
        return _tell(ask)

    @server.handler
    async def release(ask: Release, _caller: Caller) -> Any:
        one = held.setdefault(ask.key, Held())
        one.go.set()
        if ask.wait:
            await one.gone.wait()
        return _tell(ask)

    def note(ask: AskNoting, caller: Caller) -> Any:
        caller.notify(Noted(ask.key))
        return _tell(ask)

    server.handle(AskInline, inline, inline=True)
    server.handle(AskNoting, note, inline=True)
    return server


def run_tree(module: str, *arguments: str, server: Server | None = None) -> bytes:
    """Runs a module of this package as a tree with a channel; returns what it printed.

    What it says about a failure goes to our standard error output, as do the stacks of its threads
    when it hangs.
    """
    outcome = proctree.run(
        [sys.executable, "-m", f"integration.{module}", *arguments],
        channel=serve() if server is None else server,
        cwd=ROOT,
        stdout=proctree.CAPTURE,
        timeout=10 * HANGS_SECONDS,
    )
    printed = outcome.stdout or b""
    assert outcome.returncode == 0, f"{outcome.describe()}\n{printed.decode()}"
    return printed


# -- in the tree

_numbers = itertools.count()


def new_key() -> str:
    return f"{os.getpid()}.{next(_numbers)}."


@contextlib.contextmanager
def watchdog(seconds: float = HANGS_SECONDS) -> Any:
    """Whoever is still in here then has hung: the stacks of all threads are told, and it ends."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def connect(**options: Any) -> Channel:
    return Channel.connect(types=[Told, Noted], **options)


def leftovers(channel: Channel) -> list[str]:
    """What a channel keeps though nobody asks any more."""
    found = []
    if channel._pending:
        found.append(f"pending: {channel._pending}")
    if channel._want_room:
        found.append(f"waiting for room: {channel._want_room}")
    if channel._threads.leader is not None:
        found.append(f"leader: {channel._threads.leader}")
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def join_all(threads: Sequence[threading.Thread]) -> None:
    """All of them end, or it is told where they stand."""
    due = time.monotonic() + HANGS_SECONDS
    for thread in threads:
        thread.join(max(0.0, due - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        faulthandler.dump_traceback(all_threads=True)
        raise AssertionError(f"hung: {stuck}")
