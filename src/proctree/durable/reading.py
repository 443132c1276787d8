"""One file that a tree writes to, read while it grows, on the loop.

Much as a pipe is read (`streams.OutputStream`), but a file never says that it has ended: that is
known when the tree is proved empty and everything that the file holds then has been read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from proctree import events
from proctree.durable import watching
from proctree.errors import errno_name
from proctree.loop import LOOK_SECONDS, Loop
from proctree.output import CallbackSink, CaptureSink
from proctree.process import fds
from proctree.streams import CALLBACK_CHUNK, CALLBACKS_PER_TURN, CAPTURES_PER_TURN


class GrowingFile:
    """The reader of one file. Everything on the loop's thread, except `resume`.

    Args:
        path: for the log.
        fd: the file, owned; it is closed at the end.
        offset: where to begin.
        sink: what gets the bytes.
        restarted: called when the file was truncated, before it is read from the beginning again.
        ended: called once, when the file has ended and everything was delivered.
    """

    def __init__(
        self,
        loop: Loop,
        path: str,
        fd: int,
        offset: int,
        sink: CaptureSink | CallbackSink,
        restarted: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._path = path
        self._fd = fd
        self._offset = offset
        self._sink = sink
        self._restarted = restarted
        self._ended = ended
        self._end: int | None = None
        self._waiting = False
        """For the sink, for our next turn, or for memory: somebody will call `_go_on`."""
        self._finished = False
        self._watched = watching.Watched(fd, self._look)

    def start(self) -> None:
        """Watched first and then read: nothing that is written in between is missed."""
        if not self._finished:
            watching.of(self._loop).add(self._watched)
            self._look()

    def _look(self) -> None:
        if not self._waiting and not self._finished:
            self._read()

    def _go_on(self) -> None:
        self._waiting = False
        self._look()

    def resume(self) -> None:
        """From any thread: the sink takes more."""
        self._loop.post(self._go_on)

    def _read(self) -> None:
        capture = isinstance(self._sink, CaptureSink)
        for _ in range(CAPTURES_PER_TURN if capture else CALLBACKS_PER_TURN):
            if self._offset == self._end:
                self._finish()
                return
            try:
                size, more = self._read_once()
                truncated = size == 0 and self._truncated(os.fstat(self._fd).st_size)
            except OSError as error:
                self._waiting = True
                self._failed(error, self._go_on)
                return
            if truncated:
                continue
            if size == 0:
                if self._end is not None:
                    self._finish()
                return
            if not more:
                self._waiting = True
                return
        # A file that grows as fast as it is read must not keep the loop from others.
        self._waiting = True
        self._loop.post(self._go_on)

    def _read_once(self) -> tuple[int, bool]:
        """How much that was, and whether the sink takes more now."""
        sink, left = self._sink, None if self._end is None else self._end - self._offset
        if isinstance(sink, CaptureSink):
            buffer = self._loop.buffer[:left]
            size = os.preadv(self._fd, [buffer], self._offset)
            more = size > 0 and sink.feed(buffer[:size])
        else:
            limit = CALLBACK_CHUNK if left is None else min(CALLBACK_CHUNK, left)
            data = os.pread(self._fd, limit, self._offset)
            size = len(data)
            more = size > 0 and sink.feed(data)
        self._offset += size
        return size, more

    def _truncated(self, size: int) -> bool:
        """At the end of a file of this size: whether it is to be read from its beginning.

        A file that was truncated and has grown beyond where we were cannot be told from one that
        has only grown: there what is between is missed.
        """
        if size >= self._offset:
            return False
        events.warning("durable.truncated", path=self._path, offset=self._offset, size=size)
        self._offset = 0
        if self._end is not None:
            self._end = size
        self._restarted()
        return True

    def _failed(self, error: OSError, again: Callable[[], None]) -> None:
        if error.errno == errno.ENOMEM:
            self._loop.call_later(LOOK_SECONDS, again)
            return
        why = errno_name(error.errno or 0)
        events.warning("durable.unreadable_output", path=self._path, errno=why)
        self._finish()

    def drain(self) -> None:
        """The tree is empty: what the file holds now is all that it ever wrote."""
        if self._finished or self._end is not None:
            return
        try:
            size = os.fstat(self._fd).st_size
        except OSError as error:
            self._failed(error, self.drain)
            return
        self._end = size
        self._truncated(size)
        self._look()

    def _finish(self) -> None:
        self._release()
        if isinstance(self._sink, CallbackSink) and not self._sink.at_end:
            self._sink.end(lambda: self._loop.post(self._ended))
        else:
            self._ended()

    def _release(self) -> None:
        self._finished = True
        watching.of(self._loop).remove(self._watched)
        fds.close(self._fd)

    def close(self) -> None:
        """Gives the file up, whatever is still in it."""
        if isinstance(self._sink, CallbackSink):
            self._sink.drop()
        if not self._finished:
            self._release()
