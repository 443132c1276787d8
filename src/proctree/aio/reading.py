"""What a tree writes, for `async for`.

The loop's thread puts what it reads into a `PullSink`; the task that iterates takes it from there,
in blocks, and cuts them into lines itself. So a wake-up and a turn of the event loop cost once a
block, and what is not taken makes the tree wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import anyio.lowlevel

from proctree.aio.waking import Bell
from proctree.output import LineCutter, PullSink
from proctree.sinks import Lines

if TYPE_CHECKING:
    from proctree.eventloops import EventLoop

BLOCK = 64 * 1024
"""Bytes that are taken at once, if there are so many."""


class Source:
    """One output stream of a tree."""

    def __init__(self, name: str, refused: Callable[[EventLoop], None]) -> None:
        self._name = name
        self._bell = Bell(refused)
        self.sink = PullSink(self._bell.ring)
        self._unread = b""
        self._held = False
        self._waiting = False

    def hold(self) -> None:
        """The caller is the only one who reads, until it releases.

        Raises:
            RuntimeError: somebody is.
        """
        if self._held:
            raise RuntimeError(
                f"{self._name} is being read already: one lines() or chunks() at a time; the next "
                "one may begin when that is closed (aclose()), at its end, or gone"
            )
        self._held = True

    def release(self, unread: bytes) -> None:
        """By who holds it. What it has taken and not handed out is the next one's."""
        self._unread = unread + self._unread
        self._held = False

    def require_idle(self) -> None:
        """
        Raises:
            RuntimeError: another task waits in `block`.
        """
        if self._waiting:
            raise RuntimeError(f"{self._name}: two tasks iterate over one lines() or chunks()")

    async def block(self) -> bytes:
        """The next bytes; none: the end."""
        self._waiting = True
        try:
            if self._unread or self.sink.ready:
                # Before anything is taken: a cancellation loses nothing.
                await anyio.lowlevel.checkpoint()
            else:
                await self._bell.wait_until(lambda: self.sink.ready)
        finally:
            self._waiting = False
        unread, self._unread = self._unread, b""
        return unread or self.sink.take(BLOCK)


class LineReader:
    """The lines of a stream, without their newlines: `async for`.

    Between the lines of a block there is no checkpoint; a cancellation comes with the next block.
    """

    __slots__ = ("_block", "_cutter", "_done", "_holding", "_left", "_lines", "_options", "_source")

    def __init__(self, source: Source, encoding: str, max_length: int) -> None:
        self._holding = self._done = False
        # For its checks; nobody calls the callback.
        self._options = Lines(str, encoding, max_length)
        self._source = source
        self._cutter: LineCutter
        self._block = b""
        self._lines: list[str] = []
        self._left: Iterator[str] = iter(())

    def __aiter__(self) -> LineReader:
        return self

    async def __anext__(self) -> str:
        for line in self._left:
            return line
        return await self._next()

    async def _next(self) -> str:
        while not self._done:
            self._hold()
            try:
                block = await self._source.block()
            except BaseException:
                # The exception may live long, and with it what its traceback refers to: us.
                self._release()
                raise
            self._block = self._cutter.rest + block
            self._lines = self._cutter.feed(block) if block else self._cutter.finish()
            self._left = iter(self._lines)
            for line in self._left:
                return line
            if not block:
                await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """What was not handed out is for the next who reads."""
        self._done = True
        self._release()

    def _hold(self) -> None:
        self._source.require_idle()
        if not self._holding:
            self._source.hold()
            self._holding = True
            self._cutter = LineCutter(self._options.max_length, self._options.encoding)
            self._block = b""
            self._lines = []

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            self._source.release(self._unread())
            self._left = iter(())

    def _unread(self) -> bytes:
        """Behind the lines that were handed out."""
        given = len(self._lines) - sum(1 for _ in self._left)
        block, longest, at = self._block, self._options.max_length, 0
        for _ in range(given):
            newline = block.find(b"\n", at)
            end = len(block) if newline < 0 else newline
            # A line that is too long comes in pieces, as `LineCutter` says.
            at = at + longest if end - at > longest else end + 1
        return block[at:]

    def __del__(self) -> None:
        # `break` leaves no other trace.
        self._release()


class ChunkReader:
    """The bytes of a stream in pieces, as they come: `async for`."""

    __slots__ = ("_done", "_holding", "_source")

    def __init__(self, source: Source) -> None:
        self._source = source
        self._holding = self._done = False

    def __aiter__(self) -> ChunkReader:
        return self

    async def __anext__(self) -> bytes:
        if self._done:
            raise StopAsyncIteration
        self._source.require_idle()
        if not self._holding:
            self._source.hold()
            self._holding = True
        try:
            block = await self._source.block()
        except BaseException:
            self._release()
            raise
        if block:
            return block
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """The next one may read."""
        self._done = True
        self._release()

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            self._source.release(b"")

    def __del__(self) -> None:
        self._release()
