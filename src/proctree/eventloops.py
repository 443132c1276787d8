"""The event loops of asyncio (uvloop's too) and trio, as a thread sees them that has something to
say to one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trio

    EventLoop = asyncio.AbstractEventLoop | trio.lowlevel.TrioToken


def running() -> EventLoop:
    """The one that runs the caller.

    Raises:
        RuntimeError: none does.
    """
    # Only who has imported trio can run in it. It is asked first: as a guest it runs in a loop of
    # asyncio's.
    if "trio" in sys.modules:
        import trio

        if trio.lowlevel.in_trio_task():
            return trio.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


def is_running(loop: EventLoop) -> bool:
    """Whether it is this one that runs the caller."""
    try:
        return running() is loop
    except RuntimeError:
        return False


def call_soon(loop: EventLoop, function: Callable[[], object]) -> bool:
    """Has the event loop call it, from any thread and from signal handlers. False: it has ended,
    and nothing of it is left that could care."""
    if isinstance(loop, asyncio.AbstractEventLoop):
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not loop.is_closed():
                raise
            return False
        return True
    import trio

    try:
        loop.run_sync_soon(function)
    except trio.RunFinishedError:
        return False
    return True
