"""The event loop of asyncio that async handlers run in, where the host program names none."""

from __future__ import annotations

import asyncio
import selectors
import threading

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


def _run(made: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(made)
    made.run_forever()


def _forget() -> None:
    """In a forked child the thread is gone."""
    global _loop, _lock
    _loop = None
    _lock = threading.Lock()


fds.in_forked_child(_forget)
