"""Everything that happens to trees, for `async for`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import anyio.lowlevel

from proctree.aio.waking import Bell
from proctree.subscriptions import EventQueue


class events:  # noqa: N801
    """What `proctree.subscribe` tells, from the beginning of the block on: `async with`, and in it
    `async for`, or `await anext(...)` for one.

    When more than 10,000 events wait to be taken, those that come then are thrown away, and the
    next one that is not is preceded by an `EventsMissed`, which says how many.

    Args:
        kinds: the classes of events that are wanted, as `TreeEnded`. Default: all.

    Raises:
        TypeError: a kind is no class of events.
    """

    def __init__(self, *kinds: type) -> None:
        self._open = False
        # Nobody who waits, nobody to refuse: an event loop that has ended takes no events.
        self._bell = Bell(lambda _loop: None)
        self._queue = EventQueue(kinds, self._bell.ring)

    async def __aenter__(self) -> events:
        self._queue.open()
        self._open = True
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._open = False
        self._queue.close()
        self._bell.ring()

    def __aiter__(self) -> events:
        return self

    async def __anext__(self) -> Any:
        """The next event. The iteration ends when the block has been left."""
        if self._queue.ready:
            # Before it is taken: a cancellation loses none.
            await anyio.lowlevel.checkpoint()
        while self._open:
            if self._queue.ready:
                return self._queue.take()
            await self._bell.wait_until(lambda: self._queue.ready or not self._open)
        raise StopAsyncIteration

    def __del__(self) -> None:
        # A task that was thrown away, or that never left the block.
        if self._open:
            self._queue.close()
