"""A tree whose main thread is interrupted at each single bytecode that a request goes through.

    python -m integration.channel_injector SHAPE MODE [STRIDE]

See interrupting.py. What is traced is everything below proctree/channel; N is counted up, request
by request, until requests are through before it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proctree.channel.client
from integration.channel_parts import (
    HANGS_SECONDS,
    Ask,
    AskHeld,
    AskInline,
    AskNoting,
    AskThread,
    Noted,
    Release,
    connect,
    is_right,
    leftovers,
    new_key,
    open_files,
    run_tree,
    take_key,
    watchdog,
)
from integration.interrupting import SIGNAL, Interrupt, Tracer
from proctree.channel import Channel

FOLDER = str(Path(proctree.channel.client.__file__).parent)
FILES = {str(path) for path in Path(FOLDER).glob("*.py")} | {contextlib.__file__}
BEYOND = 3
"""Requests in a row that were through before the N-th opcode: how many it takes varies a little."""

LARGE = 150_000
"""Bytes: some pieces, and some receives."""

THREAD_SECONDS = 0.003
"""How long a stopped thread waits for another: that one may have to wait for a lock of ours."""


HANDLER = "from a handler"
RAISED: dict[str, Callable[[], BaseException]] = {
    "raise": Interrupt,
    # What the channel itself catches from system calls, iterators and locks.
    "raise-timeout": lambda: TimeoutError(HANDLER),
    "raise-blocking": lambda: BlockingIOError(11, HANDLER),
    "raise-reset": lambda: ConnectionResetError(104, HANDLER),
    "raise-index": lambda: IndexError(HANDLER),
    "raise-runtime": lambda: RuntimeError(HANDLER),
    "raise-key": lambda: KeyError(HANDLER),
}
KINDS = {type(make()) for make in RAISED.values()}


def check(right: object, what: str) -> None:
    if not right:
        raise AssertionError(what)


def until(condition: Callable[[], object], what: str) -> None:
    due = time.monotonic() + HANGS_SECONDS
    while not condition():
        check(time.monotonic() < due, f"never: {what}")
        time.sleep(0)


class Outer:
    """The requests that are interrupted."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.told: list[object] = []
        """What came out elsewhere."""

    def begin(self) -> None:
        """Before it is traced."""

    def ask(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Afterwards, whatever came of it."""

    def close(self) -> None:
        """The last one is through."""


class Plain(Outer):
    def make(self) -> Ask:
        return AskInline(new_key())

    def ask(self) -> None:
        ask = self.make()
        check(is_right(self.channel.request(ask), ask), f"{ask}: somebody else's answer")


class Polled(Plain):
    def ask(self) -> None:
        ask = AskThread(new_key(), pause=0.0005)
        check(is_right(self.channel.request(ask, 30.0), ask), f"{ask}: somebody else's answer")


class Large(Plain):
    """More pieces than the socket takes, and as many receives for the answer."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 40_000)
        self._data = b"x" * LARGE

    def make(self) -> Ask:
        return AskInline(new_key(), size=LARGE, data=self._data)


class Due(Plain):
    """It is not answered in time, but later."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._key = ""

    def ask(self) -> None:
        ask = AskHeld(new_key())
        self._key = ask.key
        try:
            self.channel.request(ask, 0.001)
        except TimeoutError as error:
            if str(error) == HANDLER:
                raise
        else:
            check(False, f"{ask}: an answer that nobody gave")

    def end(self) -> None:
        self.channel.request(Release(self._key, wait=False))


class Fds(Plain):
    def ask(self) -> None:
        ask = AskInline(new_key(), fds=2)
        told, fds = self.channel.request_fds(ask)
        keys = [take_key(fd) for fd in fds]
        check(is_right(told, ask), f"{ask}: somebody else's answer")
        check(keys == [ask.key] * 2, f"{ask}: somebody else's descriptors {keys}")


class Noting(Plain):
    """Each notification comes once, in order."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._asked: list[str] = []
        self._heard: list[str] = []
        self._changed = threading.Condition()
        channel.listen(self._hear)

    def _hear(self, noted: Noted) -> None:
        with self._changed:
            self._heard.append(noted.key)
            self._changed.notify()

    def ask(self) -> None:
        ask = AskNoting(new_key())
        self._asked.append(ask.key)
        check(is_right(self.channel.request(ask), ask), f"{ask}: somebody else's answer")

    def end(self) -> None:
        # A request that was given up may have been sent, or not.
        ask = AskNoting(new_key())
        self._asked.append(ask.key)
        check(is_right(self.channel.request(ask), ask), f"{ask}: somebody else's answer")
        with self._changed:
            check(
                self._changed.wait_for(lambda: ask.key in self._heard[-1:], HANGS_SECONDS),
                f"never heard: {ask.key}, but {self._heard[-3:]}",
            )
            asked = [key for key in self._asked if key in self._heard]
            check(asked == self._heard, f"heard {self._heard}, asked {self._asked}")
            self._heard.clear()
            self._asked.clear()


class Beside(Outer):
    """Another thread waits, too, and is answered first."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.own = connect()
        self.key = ""
        self.started = False
        self._go = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if not self.key:
                return
            try:
                self.other(AskHeld(self.key, size=100, fds=2))
            except BaseException as error:
                self._problem = error
            self._done.release()

    def other(self, ask: Ask) -> None:
        self.check_both(ask, *self.channel.request_fds(ask))

    def check_both(self, ask: Ask, told: Any, fds: list[int]) -> None:
        keys = [take_key(fd) for fd in fds]
        check(is_right(told, ask), f"{ask}: somebody else's answer")
        check(keys == [ask.key] * 2, f"{ask}: somebody else's descriptors {keys}")

    def start_other(self) -> None:
        if self.started:
            return
        self.started = True
        before = len(self.channel._pending)
        self._go.release()
        until(lambda: len(self.channel._pending) > before, "the other one begins")

    def begin(self) -> None:
        self.key = new_key()
        self.started = False

    def ask(self) -> None:
        ask = Release(self.key)
        check(is_right(self.channel.request(ask), ask), f"{ask}: somebody else's answer")

    def end(self) -> None:
        self.start_other()
        # Should the request not have got so far. It is another channel's: what comes over this one
        # would have somebody look at what has come before.
        self.own.request(Release(self.key, wait=False))
        check(self._done.acquire(timeout=HANGS_SECONDS), "the other one hangs")
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        self.key = ""
        self._go.release()
        self._thread.join()
        self.own.close()


class BesideLeader(Beside):
    """It waits for both, and the main thread is its follower."""

    def begin(self) -> None:
        super().begin()
        self.start_other()
        until(lambda: self.channel._threads.leader is not None, "it leads")


class BesideFollower(Beside):
    """The main thread waits for both."""

    def __init__(self, channel: Channel) -> None:
        self._late = False
        super().__init__(channel)

    def begin(self) -> None:
        super().begin()
        self._late = False
        self.started = True
        self._go.release()

    def other(self, ask: Ask) -> None:
        until(lambda: self._late or self.channel._threads.leader is not None, "somebody leads")
        super().other(ask)

    def end(self) -> None:
        self._late = True
        super().end()


class BesideLoop(Beside):
    """A loop that does not look by itself while the main thread asks, though its answer is there:
    it comes to the main thread."""

    def __init__(self, channel: Channel) -> None:
        self._stand = threading.Event()
        self._loop = asyncio.SelectorEventLoop()
        super().__init__(channel)

    def other(self, ask: Ask) -> None:
        self._loop.run_until_complete(self._other(ask))

    async def _other(self, ask: Ask) -> None:
        asked = asyncio.create_task(self.channel.arequest_fds(ask))
        await asyncio.sleep(0)
        self._stand.wait()
        self.check_both(ask, *await asked)

    def begin(self) -> None:
        super().begin()
        self._stand.clear()
        self.start_other()
        self.own.request(Release(self.key))

    def ask(self) -> None:
        ask = AskInline(new_key())
        check(is_right(self.channel.request(ask), ask), f"{ask}: somebody else's answer")

    def end(self) -> None:
        self._stand.set()
        super().end()

    def close(self) -> None:
        super().close()
        self._loop.close()


class Task(Outer):
    """Tasks of the main thread's own loop, all at once."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(self._failed)

    def _failed(self, _loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        check(type(error) in KINDS, f"{context}")
        self.told.append(error)

    def ask(self) -> None:
        self._loop.run_until_complete(self._ask_all())

    async def _ask_all(self) -> None:
        asks: list[Ask] = [AskInline(new_key()), AskThread(new_key()), AskInline(new_key())]
        told = await asyncio.gather(*(self.channel.arequest(ask) for ask in asks))
        check(all(map(is_right, told, asks)), f"{asks}: somebody else's answer")

    def end(self) -> None:
        """What an exception out of the loop has left in there."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, *KINDS):
                self._loop.run_until_complete(task)

    def close(self) -> None:
        self._loop.close()


SHAPES: dict[str, type[Outer]] = {
    "plain": Plain,
    "polled": Polled,
    "large": Large,
    "due": Due,
    "fds": Fds,
    "noting": Noting,
    "beside-leader": BesideLeader,
    "beside-follower": BesideFollower,
    "beside-loop": BesideLoop,
    "tasks": Task,
}


class Round:
    """The requests of one shape, interrupted at one opcode after the other."""

    def __init__(self, channel: Channel, outer: Outer, mode: str) -> None:
        self._channel = channel
        self._outer = outer
        self._mode = mode
        self._random = random.Random(mode)
        self._nested = 0
        self._twice = False
        self._owed = False
        self._raised: BaseException | None = None
        self.results: Counter[str] = Counter()
        signal.signal(SIGNAL, self._on_signal)
        sys.unraisablehook = self._on_unraisable
        self._unraisable = 0
        self._wanted = threading.Semaphore(0)
        self._served = threading.Semaphore(0)
        self._problem: BaseException | None = None
        threading.Thread(target=self._ask_beside, daemon=True).start()

    def _on_signal(self, _signo: int, _frame: object) -> None:
        self._nested += 1
        if self._mode in RAISED:
            self._raised = RAISED[self._mode]()
            raise self._raised
        if self._twice:
            # In the middle of what this handler asks comes the next one.
            self._twice = False
            with Tracer(self._random.randrange(1000), FILES):
                self._ask_nested()
            return
        self._ask_nested()

    def _on_unraisable(self, told: Any) -> None:
        """Of what a handler raises in a finalizer nobody can be told: Python's rule."""
        if told.exc_value is self._raised:
            self._unraisable += 1
        else:
            sys.__unraisablehook__(told)
            self._problem = told.exc_value

    def _ask_nested(self) -> None:
        """Descriptors too: their numbers are used again at once."""
        for fds in (0, 2, 2):
            ask = AskInline(new_key(), fds=fds, size=40)
            told, passed = self._channel.request_fds(ask)
            keys = [take_key(fd) for fd in passed]
            check(is_right(told, ask), f"{ask}: somebody else's answer, in the handler")
            check(keys == [ask.key] * fds, f"{ask}: descriptors {keys}, in the handler")

    def _nested_directly(self) -> None:
        self._nested += 1
        self._ask_nested()

    def _ask_beside(self) -> None:
        while self._wanted.acquire():
            try:
                self._ask_nested()
            except BaseException as error:
                self._problem = error
            self._served.release()

    def _let_other_run(self) -> None:
        """Another thread asks while this one stands still, until it would need our lock."""
        self._nested += 1
        self._wanted.release()
        if not self._served.acquire(timeout=THREAD_SECONDS):
            self.results["waited-for"] += 1
            self._owed = True

    def once(self, at: int) -> bool:
        """Returns whether it came to the N-th opcode."""
        direct = {"nested": self._nested_directly, "thread": self._let_other_run}.get(self._mode)
        self._twice = self._mode == "signal-twice"
        tracer = Tracer(at, FILES, direct)
        self._owed = False
        self._raised = None
        self._unraisable = 0
        files = open_files()
        self._outer.begin()
        out: BaseException | None = None
        try:
            try:
                with tracer:
                    self._outer.ask()
            except BaseException as error:
                out = error
            if self._owed:
                check(self._served.acquire(timeout=HANGS_SECONDS), "the other thread hangs")
            if out is not self._raised and not self._is_about(out):
                raise out or AssertionError(f"what the handler raised is lost: {self._raised!r}")
            self.results["raised" if self._raised is not None else "answered"] += 1
            self._outer.end()
            self._check_after()
            out = self._raised = None
            self._check_files(files, tracer.where.rpartition(" ")[2])
        except BaseException as error:
            error.add_note(f"interrupted at opcode {at}: {tracer.where}")
            raise
        return tracer.reached

    def _is_about(self, out: BaseException | None) -> bool:
        """Whether it could not come out by itself."""
        return out is None and (self._unraisable > 0 or self._raised in self._outer.told)

    def _check_after(self) -> None:
        if self._problem is not None:
            raise self._problem
        left = leftovers(self._channel)
        check(not left, f"left behind: {left}")
        ask = AskInline(new_key())
        check(is_right(self._channel.request(ask), ask), f"{ask}: somebody else's answer, later")

    def _check_files(self, before: int, function: str) -> None:
        """What is on its way from us to the caller when a handler raises is nobody's."""
        due = time.monotonic() + HANGS_SECONDS / 2
        while (left := open_files() - before) > 0:
            if self._mode in RAISED and function in (
                "take",
                "_take",
                "request_fds",
                "close",
                "__del__",
            ):
                self.results["lost-descriptors"] += left
                return
            check(time.monotonic() < due, f"{left} descriptors left open")
            gc.collect()

    def all(self, stride: int) -> None:
        at = through = 0
        while through < BEYOND:
            with watchdog():
                through = 0 if self.once(at) else through + 1
            at += stride
        self.results["opcodes"] = at - BEYOND * stride
        self.results["handlers"] = self._nested


def main(shape: str, mode: str, stride: int) -> None:
    with connect() as channel:
        outer = SHAPES[shape](channel)
        for _ in range(3):  # what is imported, or made once
            outer.begin()
            outer.ask()
            outer.end()
        rounds = Round(channel, outer, mode)
        try:
            rounds.all(stride)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # its threads may stand anywhere
        outer.close()
    print(shape, mode, *(f"{name}={count}" for name, count in sorted(rounds.results.items())))


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        sys.stdout.buffer.write(run_tree("channel_injector", *sys.argv[2:]))
    else:
        main(sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["1"])[0]))
