"""Many requests over one channel, from every kind of caller that there is, one after the other and
all at once.

    python -m integration.channel_load --requests 200000 [--shapes mixed,signals] [--seed 1]

The supervisor answers out of order: some inline, some on threads, some in tasks, after random
times. Each answer says whose it is, and each is checked. One line per shape; exit status 1: an
answer was somebody else's, or a request has not ended, or not as it should.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import asgiref.sync
import greenback
import trio

from integration.channel_parts import (
    HANGS_SECONDS,
    Ask,
    AskInline,
    AskTask,
    AskThread,
    connect,
    is_right,
    join_all,
    leftovers,
    new_key,
    open_files,
    run_tree,
    watchdog,
)
from proctree.channel import Channel

CALLERS = 8
"""Threads, or triggers, of one shape."""
TASKS = 64
"""Tasks of one loop."""
TICK_SECONDS = 0.0005
"""Between two signals."""
LONG = 70_000
"""Bytes of a long answer: a few receives."""


class Stopped(BaseException):
    """What a signal handler raises."""


ENDS = (Exception, asyncio.CancelledError, trio.Cancelled, Stopped)
RIGHT, WRONG, LOST = "right", "wrong", "lost"


class Shape:
    """Callers of one kind.

    Attributes:
        ends: what became of each request, by its key. No lock: signal handlers ask, too.
    """

    def __init__(self, channel: Channel, requests: int, seed: str) -> None:
        self.channel = channel
        self.requests = requests
        self.ends: dict[str, str] = {}
        self._seed = seed
        self._problems: list[BaseException] = []

    def random(self, caller: object) -> random.Random:
        return random.Random(f"{self._seed} {caller}")

    def run(self) -> None:
        raise NotImplementedError

    def make(self, rng: random.Random) -> Ask:
        size = LONG if rng.random() < 0.01 else rng.randrange(200)
        kind = rng.random()
        if kind < 0.6:
            return AskInline(new_key(), size=size)
        pause = rng.choice((0.0, 0.0, 0.0005, 0.002))
        return (AskThread if kind < 0.8 else AskTask)(new_key(), size=size, pause=pause)

    def ask(self, rng: random.Random, timeout: float | None = None) -> None:
        ask = self.make(rng)
        try:
            self.ends[ask.key] = LOST
            told = self.channel.request(ask, timeout)
            self.ends[ask.key] = RIGHT if is_right(told, ask) else WRONG
        except ENDS as error:
            self.ends[ask.key] = type(error).__name__
            raise

    async def aask(self, rng: random.Random, timeout: float | None = None) -> None:
        ask = self.make(rng)
        try:
            self.ends[ask.key] = LOST
            told = await self.channel.arequest(ask, timeout)
            self.ends[ask.key] = RIGHT if is_right(told, ask) else WRONG
        except ENDS as error:
            self.ends[ask.key] = type(error).__name__
            raise

    def share(self, callers: int) -> range:
        return range(max(1, self.requests // callers))

    def threads(self, *functions: Callable[[], object]) -> list[threading.Thread]:
        def guarded(function: Callable[[], object]) -> None:
            try:
                function()
            except BaseException as error:
                self._problems.append(error)

        made = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
        for thread in made:
            thread.start()
        return made

    def together(self, *functions: Callable[[], object]) -> None:
        join_all(self.threads(*functions))
        self.raise_problems()

    def raise_problems(self) -> None:
        if self._problems:
            raise self._problems[0]

    def ask_on_thread(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            self.ask(rng)

    def in_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """As asyncio.run; and what a callback raises, which the loop would only log, is raised."""
        raised: list[dict[str, Any]] = []

        async def watched() -> None:
            handler = lambda _loop, context: raised.append(context)  # noqa: E731
            asyncio.get_running_loop().set_exception_handler(handler)
            await coroutine

        asyncio.run(watched())
        if raised:
            raise AssertionError(raised[0]) from raised[0].get("exception")

    async def tasks(self, coroutines: list[Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(HANGS_SECONDS):
            await asyncio.gather(*coroutines)

    async def ask_in_task(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            await self.aask(rng)


class Threads(Shape):
    def run(self) -> None:
        share = self.share(CALLERS)
        self.together(*(lambda n=n: self.ask_on_thread(n, share) for n in range(CALLERS)))


class Switching(Threads):
    """The interpreter changes threads as often as it can."""

    def run(self) -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            super().run()
        finally:
            sys.setswitchinterval(before)


class Tasks(Shape):
    def run(self) -> None:
        share = self.share(TASKS)
        self.in_loop(self.tasks([self.ask_in_task(n, share) for n in range(TASKS)]))


class Loops(Shape):
    """Loops of their own in threads, made for each request, or for many."""

    def run(self) -> None:
        share = self.share(3 * CALLERS)
        functions: list[Callable[[], object]] = []
        for number in range(CALLERS):
            functions += [
                lambda n=number: self.in_loop(self.ask_in_task(f"loop {n}", share)),
                lambda n=number: self._convert(f"converted {n}", share),
                lambda n=number: self.ask_on_thread(f"thread {n}", share),
            ]
        self.together(*functions)

    def _convert(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            asgiref.sync.async_to_sync(self.aask)(rng)


class Triggers(Shape):
    """A main loop that asks for itself, and triggers whose synchronous code asks on threads."""

    def run(self) -> None:
        self.in_loop(self._main())

    async def _main(self) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CALLERS))
        share = self.share(3 * CALLERS)
        await self.tasks(
            [self.ask_in_task(f"own {n}", share) for n in range(CALLERS)]
            + [self._asgiref(f"asgiref {n}", share) for n in range(CALLERS)]
            + [self._to_thread(f"to_thread {n}", share) for n in range(CALLERS)]
        )

    async def _asgiref(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            await asgiref.sync.sync_to_async(self.ask, thread_sensitive=rng.random() < 0.1)(rng)

    async def _to_thread(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            await asyncio.to_thread(self.ask, rng)


class Portals(Shape):
    """Synchronous code in tasks that awaits through a portal; also while the same task's portal is
    in the middle of another request, and back again from threads."""

    def run(self) -> None:
        self.in_loop(self._main())

    async def _main(self) -> None:
        share = self.share(5 * CALLERS)
        await self.tasks([self._task(f"portal {n}", share) for n in range(CALLERS)])

    async def _task(self, caller: object, share: range) -> None:
        await greenback.ensure_portal()
        rng = self.random(caller)
        for _ in share:
            self._synchronous(rng)
            greenback.await_(self._both(rng))
            await asyncio.to_thread(self.ask, rng)
            self.ask(rng)

    def _synchronous(self, rng: random.Random) -> None:
        greenback.await_(self.aask(rng))

    async def _both(self, rng: random.Random) -> None:
        other = asyncio.create_task(self.aask(rng))
        self._synchronous(rng)
        await other


class Trio(Shape):
    """A loop of trio beside one of asyncio, with threads of its own."""

    def run(self) -> None:
        share = self.share(4 * CALLERS)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(2 * CALLERS):
                    nursery.start_soon(self.ask_in_task, f"trio {number}", share)
                for number in range(CALLERS):
                    nursery.start_soon(self._thread, f"trio thread {number}", share)

        async def beside() -> None:
            await self.tasks([self.ask_in_task(f"beside {n}", share) for n in range(CALLERS)])

        self.together(lambda: trio.run(main), lambda: self.in_loop(beside()))

    async def _thread(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            await trio.to_thread.run_sync(self.ask, rng)


class Cancelled(Shape):
    """Requests that are cancelled, or due, at random moments, before their answers or after; and
    then those who ask later."""

    EXPECTED = ("CancelledError", "TimeoutError", "Cancelled")

    def run(self) -> None:
        share = self.share(2 * CALLERS + 2 * TASKS)

        async def main() -> None:
            await self.tasks([self._cancel(f"cancelled {n}", share) for n in range(TASKS)])
            await self.tasks([self.ask_in_task(f"later {n}", share) for n in range(TASKS)])

        async def of_trio() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(CALLERS):
                    nursery.start_soon(self._cancel_in_trio, f"trio {number}", share)

        self.together(
            lambda: self.in_loop(main()),
            lambda: trio.run(of_trio),
            *(lambda n=n: self._time_out(f"due {n}", share) for n in range(CALLERS)),
        )

    async def _cancel(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            moment, kind = rng.random() * 0.004, rng.randrange(3)
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                if kind == 0:
                    await self.aask(rng, moment)
                elif kind == 1:
                    async with asyncio.timeout(moment):
                        await self.aask(rng)
                else:
                    task = asyncio.create_task(self.aask(rng))
                    await asyncio.sleep(moment)
                    task.cancel()
                    # What was cancelled before its first step has never asked.
                    await task

    async def _cancel_in_trio(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            with trio.move_on_after(rng.random() * 0.004):
                await self.aask(rng)

    def _time_out(self, caller: object, share: range) -> None:
        rng = self.random(caller)
        for _ in share:
            with contextlib.suppress(TimeoutError):
                self.ask(rng, rng.random() * 0.003)


class Signals(Shape):
    """The main thread asks, the handler that interrupts it asks, and so does a second one that
    interrupts the first; threads and a loop beside it."""

    raises = False
    EXPECTED: tuple[str, ...] = ()
    _armed = False

    def run(self) -> None:
        share = self.share(4)
        rng, main = self.random("handler"), self.random("main")
        beside = self.threads(
            lambda: self.ask_on_thread("one", share),
            lambda: self.ask_on_thread("two", share),
            lambda: self.in_loop(self.tasks([self.ask_in_task(n, share[::4]) for n in range(4)])),
        )
        before = {signo: signal.getsignal(signo) for signo in (signal.SIGALRM, signal.SIGPROF)}

        def interrupt(_signo: int, _frame: FrameType | None) -> None:
            if not self._armed:
                return
            if self.raises:
                raise Stopped
            # SIGALRM waits for its own handler to be through, so that they do not pile up.
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.ask(rng)
            signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS)

        for signo in before:
            signal.signal(signo, interrupt if signo == signal.SIGALRM else self._second(rng))
        for _ in share:
            self._interrupted(main, TICK_SECONDS * main.random())
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for signo, handler in before.items():
            signal.signal(signo, handler)
        join_all(beside)
        self.raise_problems()

    def _interrupted(self, rng: random.Random, seconds: float) -> None:
        # Nothing but what is inside `try` can be interrupted while it is armed: the interpreter
        # looks for signals behind calls, and where it jumps back.
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_PROF, 4 * TICK_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            self.ask(rng)
            self._armed = False
        except Stopped:
            self._armed = False

    def _second(self, rng: random.Random) -> Callable[[int, FrameType | None], None]:
        def interrupt(_signo: int, _frame: FrameType | None) -> None:
            self.ask(rng)

        return interrupt


class Raising(Signals):
    """As time limits do it, at any moment of the main thread's request."""

    raises = True
    EXPECTED = ("Stopped",)


class SignalsInLoop(Shape):
    """The main thread's loop is interrupted by a handler that asks."""

    _armed = False

    def run(self) -> None:
        rng = self.random("handler")
        share = self.share(2 * CALLERS)

        def interrupt(_signo: int, _frame: FrameType | None) -> None:
            # It may come to this only when the timer has been stopped already.
            if self._armed:
                self.ask(rng)
                signal.setitimer(signal.ITIMER_REAL, 4 * TICK_SECONDS)

        self._armed = True
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 4 * TICK_SECONDS)
        try:
            self.in_loop(self.tasks([self.ask_in_task(n, share) for n in range(2 * CALLERS)]))
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Mixed(Shape):
    """All that need not be in the main thread, at once, and with them a main loop with signals."""

    EXPECTED = Cancelled.EXPECTED
    KINDS = (Threads, Tasks, Loops, Triggers, Portals, Trio, Cancelled)

    def run(self) -> None:
        share = self.requests // (len(self.KINDS) + 1)
        parts = [kind(self.channel, share, f"{self._seed} mixed") for kind in self.KINDS]
        main = SignalsInLoop(self.channel, share, f"{self._seed} mixed")
        beside = self.threads(*(part.run for part in parts))
        main.run()
        join_all(beside)
        self.raise_problems()
        for part in (main, *parts):
            self.ends |= part.ends


SHAPES: dict[str, type[Shape]] = {
    "threads": Threads,
    "switching": Switching,
    "tasks": Tasks,
    "loops": Loops,
    "triggers": Triggers,
    "portals": Portals,
    "trio": Trio,
    "cancelled": Cancelled,
    "signals": Signals,
    "raising": Raising,
    "signals-in-loop": SignalsInLoop,
    "mixed": Mixed,
}


def run_shape(name: str, shape: Shape) -> bool:
    """Prints its line; returns whether everything was as it should be."""
    began = time.monotonic()
    with watchdog(HANGS_SECONDS + shape.requests / 100):
        shape.run()
    seconds = time.monotonic() - began
    ends = Counter(shape.ends.values())
    right, wrong, lost = (ends.pop(name, 0) for name in (RIGHT, WRONG, LOST))
    expected = getattr(shape, "EXPECTED", ())
    left = leftovers(shape.channel)
    errors = ", ".join(f"{count} {kind}" for kind, count in sorted(ends.items())) or "none"
    sys.stdout.write(
        f"{name}: {len(shape.ends)} requests, {right} right, {wrong} wrong, errors: {errors}, "
        f"{lost} hung or lost, {len(shape.ends) / seconds:.0f} requests/s\n"
        + "".join(f"  left behind: {what}\n" for what in left)
    )
    sys.stdout.flush()
    return not (wrong or lost or left or set(ends) - set(expected)) and right > 0


def in_tree(names: list[str], requests: int, seed: str) -> bool:
    with connect() as channel:
        channel.request(AskInline(new_key()))
        files = open_files()
        share = requests // len(names)
        done = [run_shape(name, SHAPES[name](channel, share, f"{seed} {name}")) for name in names]
        more = open_files() - files
        if more > 0:
            sys.stdout.write(f"{more} descriptors left open\n")
        return all(done) and more <= 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="integration.channel_load", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000, help="of all shapes together")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seed", default="1")
    parser.add_argument("--tree", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tree:
        return 0 if in_tree(options.shapes.split(","), options.requests, options.seed) else 1
    arguments = [f"--{name}={getattr(options, name)}" for name in ("requests", "shapes", "seed")]
    printed = run_tree("channel_load", "--tree", *arguments)
    sys.stdout.write(printed.decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
