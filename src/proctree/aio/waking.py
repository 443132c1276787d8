"""Tasks that wait for something of which another thread tells."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from proctree import eventloops

if TYPE_CHECKING:
    from proctree.eventloops import EventLoop


class _Sleeper:
    __slots__ = ("__weakref__", "event", "loop")

    def __init__(self) -> None:
        self.loop = eventloops.running()
        self.event = anyio.Event()


class Bell:
    """Wakes the tasks that wait, in whichever event loops.

    It does not keep them alive. A task that waits when its loop is closed is never run again: who
    refers to it only by what it waits for must not keep it from being collected, since that is how
    its `finally` and `async with` come to run.

    Args:
        refused: called by `ring` with an event loop that has ended while a task of it waited.
    """

    def __init__(self, refused: Callable[[EventLoop], None]) -> None:
        self._refused = refused
        self._sleepers: deque[weakref.ref[_Sleeper]] = deque()

    def ring(self) -> None:
        """From any thread. Never blocks."""
        while True:
            try:
                sleeper = self._sleepers.popleft()()
            except IndexError:
                return
            if sleeper is not None and not eventloops.call_soon(sleeper.loop, sleeper.event.set):
                self._refused(sleeper.loop)

    async def wait_until(self, true: Callable[[], bool]) -> None:
        """Until `true`, which whoever makes it so has to ring after."""
        while not true():
            sleeper = _Sleeper()
            entry = weakref.ref(sleeper)
            self._sleepers.append(entry)
            try:
                # Looked at again: it may have been rung just before.
                if true():
                    return
                await sleeper.event.wait()
            finally:
                # IndexError: another thread changed the queue while it was searched, and then the
                # entry stays there until somebody rings.
                with contextlib.suppress(ValueError, IndexError):
                    self._sleepers.remove(entry)


async def wait_out(
    bell: Bell,
    has_ended: Callable[[], bool],
    at_once: Callable[[], None],
    exception: BaseException | None,
) -> None:
    """Waits for the end of what was asked to end, whatever else comes; what interrupted this is
    raised when it has ended.

    Args:
        at_once: called at the second interruption.
        exception: what is being raised meanwhile, which may be the first one.
    """
    interrupted = exception is not None and not isinstance(exception, Exception)
    first: BaseException | None = None
    while not has_ended():
        try:
            with anyio.CancelScope(shield=True):
                await bell.wait_until(has_ended)
        except (Exception, GeneratorExit):
            raise
        except BaseException as another:
            # What no anyio scope keeps off: Task.cancel() of asyncio, as by the first Ctrl-C and by
            # asyncio.timeout(), and the KeyboardInterrupt of trio.
            if interrupted:
                at_once()
            interrupted = True
            if first is None:
                first = another
    if first is not None:
        raise first


def unbroken(function: Any) -> Any:
    """The coroutine function as it is to be called in this event loop so that no KeyboardInterrupt
    comes between two of its bytecodes: trio raises one in whatever runs in the main thread. It
    comes where the function waits then. (In asyncio the first one is a cancellation.)"""
    try:
        loop = eventloops.running()
    except RuntimeError:
        return function  # a task is thrown away
    if isinstance(loop, asyncio.AbstractEventLoop):
        return function
    import trio

    return trio.lowlevel.enable_ki_protection(function)
