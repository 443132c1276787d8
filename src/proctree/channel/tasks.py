"""The event loop of asyncio that async handlers run in, where the host program names none."""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections import deque
from collections.abc import Callable

from proctree.process import fds

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The process's; its thread is started by the first call."""
    global _loop
    with _lock:
        if _loop is None:
            # poll and not epoll: in a process that the host forks, the end of the interpreter
            # would take our registrations out of the epoll that it shares with us (epoll(7)).
            made = asyncio.SelectorEventLoop(selectors.PollSelector())
            threading.Thread(
                target=_run, args=(made,), name="proctree-handlers", daemon=True
            ).start()
            _loop = made
        return _loop


class Tasks:
    """Starts tasks in a loop from another thread: those that come together at one go.

    Args:
        given: the loop; default is the process's.
    """

    def __init__(self, given: asyncio.AbstractEventLoop | None = None) -> None:
        self._given = given
        self._jobs: deque[tuple[Callable[[], None], Callable[[Exception], None]]] = deque()
        self._posted = False

    def submit(self, job: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Calls `job` in the loop; or `failed`, if it is closed."""
        self._jobs.append((job, failed))
        try:
            to = self._given or loop()
            if self._posted and not to.is_closed():
                return
            self._posted = True
            to.call_soon_threadsafe(self._run_jobs)
        except RuntimeError as error:
            # Also those that were there when it was closed: it has forgotten that it was to be
            # called.
            self._posted = False
            while self._jobs:
                self._jobs.popleft()[1](error)

    def is_running(self) -> bool:
        """Whether the caller runs in the loop."""
        running = asyncio._get_running_loop()
        return running is not None and running is (self._given or _loop)

    def _run_jobs(self) -> None:
        self._posted = False  # before the first is taken: what comes from now on posts again
        while True:
            try:
                job, _ = self._jobs.popleft()
            except IndexError:
                return
            job()


def _run(made: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(made)
    made.run_forever()


def _forget() -> None:
    """In a forked child the thread is gone."""
    global _loop, _lock
    _loop = None
    _lock = threading.Lock()


fds.in_forked_child(_forget)
