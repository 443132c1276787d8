"""How a stream's bytes are kept, cut into lines and handed to the user's code. No I/O here.

Whatever the sink, memory is bounded: a capture has a limit, a line has a greatest length, and a
callback that is slow stops the reading, which fills the pipe and slows the writer. Nothing is lost
on the way and nothing piles up.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable

from proctree import events
from proctree.records import Cut
from proctree.worker import Worker

DEFAULT_CAPTURE = 64 * 1024 * 1024
DEFAULT_LINE = 1024 * 1024
PENDING_MAX = 512 * 1024
"""Bytes that may wait for a callback before reading stops."""

PENDING_PIECES_MAX = 1024
"""How many pieces they may be: a byte at a time costs more memory than its byte."""


REST_MAX = 2 * 1024 * 1024
"""Bytes that are read of a tree that has ended, whoever takes them: more than our pipes hold. A
tree that has made its pipe larger has the rest of it wait."""

CUT_AT_ONCE = 16 * 1024
"""Bytes: of lines of one letter that is the work of some hundred microseconds, in which no other
thread gets a turn."""

LINES_AT_ONCE = 256
"""How many callbacks there are until it is seen how long they took."""


class LineCutter:
    """Cuts a stream into lines, many at a time.

    `feed` joins what is complete with the newlines still inside and splits it once: the work a line
    is done in C. A multi-byte character can not be torn, since no byte of one is a newline; only a
    line that is cut for its length may show U+FFFD at the cut.
    """

    __slots__ = ("_encoding", "_max", "_rest")

    def __init__(self, max_length: int = DEFAULT_LINE, encoding: str = "utf-8") -> None:
        self._max = max_length
        self._encoding = encoding
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """Of a line that is not complete yet."""
        return self._rest

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete with `data`."""
        cut = data.rfind(b"\n")
        if cut < 0:
            self._rest += data
            return self._pieces()
        block = self._rest + data[:cut] if self._rest else data[:cut]
        self._rest = data[cut + 1 :]
        if len(block) <= self._max:
            lines = block.decode(self._encoding, "replace").split("\n")
            return lines + self._pieces() if len(self._rest) > self._max else lines
        lines = [piece for line in block.split(b"\n") for piece in self._cut(line)]
        return lines + self._pieces() if len(self._rest) > self._max else lines

    def finish(self) -> list[str]:
        """What was left without a newline at the end."""
        rest, self._rest = self._rest, b""
        return self._cut(rest) if rest else []

    def _cut(self, line: bytes) -> list[str]:
        size = self._max
        starts = range(0, max(len(line), 1), size)
        return [line[at : at + size].decode(self._encoding, "replace") for at in starts]

    def _pieces(self) -> list[str]:
        # A line of exactly the greatest length may still end here: only what is behind is cut off.
        whole = (len(self._rest) - 1) // self._max * self._max
        if whole <= 0:
            return []
        pieces, self._rest = self._cut(self._rest[:whole]), self._rest[whole:]
        return pieces


class CaptureSink:
    """Keeps the head and the tail of a stream."""

    __slots__ = ("_head", "_head_limit", "_length", "_limit", "_ring", "_tail_length")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head_limit = limit
        self._head = io.BytesIO()
        self._ring = memoryview(b"")
        self._tail_length = 0
        self._length = 0

    def feed(self, data: memoryview) -> bool:
        """Never wants reading to stop."""
        self._length += len(data)
        room = self._head_limit - self._head.tell()
        if room > 0:
            self._head.write(data[:room])
            data = data[room:]
        if len(data) > 0:
            if not self._ring:
                self._split()
            self._keep_tail(data)
        return True

    def _split(self) -> None:
        """It is longer than the limit: from here on the first half stays, and the rest of the head
        is the beginning of the tail, which is a ring: memory that is used again and again."""
        half = self._limit // 2
        self._head_limit = half
        self._ring = memoryview(bytearray(self._limit - half))
        self._keep_tail(self._head.getbuffer()[half:])
        self._head.truncate(half)

    def _keep_tail(self, data: memoryview) -> None:
        size = len(self._ring)
        data = data[-size:] if len(data) > size else data
        at = self._tail_length % size
        first = min(len(data), size - at)
        self._ring[at : at + first] = data[:first]
        self._ring[: len(data) - first] = data[first:]
        self._tail_length += len(data)

    def result(self) -> tuple[bytes, Cut | None]:
        """What was kept, and what is missing in it."""
        if not self._ring:
            return self._head.getvalue(), None
        at = self._tail_length % len(self._ring)
        head = self._head.getvalue()
        missing = self._length - len(head) - len(self._ring)
        cut = Cut(len(head), missing) if missing else None
        return b"".join((head, self._ring[at:], self._ring[:at])), cut


class _BoundedSink:
    """Counts what waits to be taken from a sink.

    Args:
        resume: called by who takes, when reading may go on.
    """

    def __init__(self, resume: Callable[[], None]) -> None:
        self._resume = resume
        # Two counters with one writer each: `-=` on a shared one would lose updates.
        self._fed = 0
        self._done = 0
        self._fed_pieces = 0
        self._done_pieces = 0
        self._bytes_max = PENDING_MAX
        self._paused = False

    def _count(self, data: bytes) -> None:
        self._fed += len(data)
        self._fed_pieces += 1

    def _may_go_on(self) -> bool:
        """After feeding: whether more may be fed."""
        # Said before the taker's progress is read: if it takes in between, either we see that here
        # or it sees this there. Both at once is a resume too many, which does no harm.
        self._paused = True
        if self._has_room(1):
            self._paused = False
        return not self._paused

    def _taken(self, size: int, pieces: int) -> None:
        self._done += size
        self._done_pieces += pieces
        if self._paused and self._has_room(2):
            self._resume()

    def _has_room(self, fraction: int) -> bool:
        """Whether less than a `fraction` of what may wait is waiting."""
        pieces = self._fed_pieces - self._done_pieces
        return (
            self._fed - self._done < self._bytes_max // fraction
            and pieces < PENDING_PIECES_MAX // fraction
        )


class CallbackSink(_BoundedSink):
    """Hands a stream to the user's code on the tree's worker.

    Args:
        deliver: gets the bytes; on the worker.
        finish: called after the last of them; on the worker. None: nothing is to be done then.
        resume: called from the worker when reading may go on.
    """

    def __init__(
        self,
        worker: Worker,
        deliver: Callable[[bytes], None],
        finish: Callable[[], None] | None,
        resume: Callable[[], None],
    ) -> None:
        super().__init__(resume)
        self._worker = worker
        self._deliver = deliver
        self._finish = finish
        self._dropped = False

    def feed(self, data: bytes) -> bool:
        """Returns False when reading has to stop until `resume`."""
        self._count(data)
        self._worker.post(lambda: self._run(data))
        return self._may_go_on()

    def _run(self, data: bytes) -> None:
        if not self._dropped:
            self._deliver(data)
        self._taken(len(data), 1)
        if self._done_pieces != self._fed_pieces:
            self._worker.breathe()

    @property
    def at_end(self) -> bool:
        """Whether all that was fed was delivered, and nothing is left to be done: then there is no
        need to wait for the worker."""
        return self._finish is None and self._fed_pieces == self._done_pieces

    def then(self, job: Callable[[], None]) -> None:
        """Runs `job` on the worker after everything that was fed, unless it is given up first."""

        def run() -> None:
            if not self._dropped:
                job()

        self._worker.post(run)

    def end(self, done: Callable[[], None]) -> None:
        """No more bytes; calls `done` on the worker after the last callback."""

        def last() -> None:
            if self._finish is not None and not self._dropped:
                self._finish()
            done()

        self._worker.post(last)

    def drop(self) -> None:
        """The tree is given up: what still waits is not delivered any more."""
        self._dropped = True


class PullSink(_BoundedSink):
    """Keeps a stream until somebody takes it, on whatever thread. The tree waits for that as long
    as it lives; its end does not: what it has written by then is kept here.

    Args:
        arrived: called on the loop when there is something to take, or the end. Must not block.
    """

    def __init__(self, arrived: Callable[[], None]) -> None:
        super().__init__(lambda: None)
        self._arrived = arrived
        self._pieces: deque[bytes] = deque()
        self._ended = False

    def attach(self, resume: Callable[[], None]) -> None:
        """Before the first `feed`."""
        self._resume = resume

    def feed(self, data: bytes) -> bool:
        """Returns False when reading has to stop until the resume of `attach`."""
        self._count(data)
        self._pieces.append(data)
        go_on = self._may_go_on()
        self._arrived()
        return go_on

    def widen(self) -> None:
        """The tree is empty: from now on what its pipe may hold is taken besides."""
        self._bytes_max = PENDING_MAX + REST_MAX

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._arrived()

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or the end."""
        return bool(self._pieces) or self._ended

    @property
    def waiting(self) -> int:
        """Bytes to take."""
        return self._fed - self._done

    def take(self, size: int) -> bytes:
        """What there is; no more than the piece that reaches `size` bytes. One thread at a time."""
        taken: list[bytes] = []
        length = 0
        while self._pieces and length < size:
            taken.append(self._pieces.popleft())
            length += len(taken[-1])
        if taken:
            self._taken(length, len(taken))
        return taken[0] if len(taken) == 1 else b"".join(taken)


Sink = CaptureSink | CallbackSink | PullSink


class CallbackErrors:
    """Counts what a tree's callbacks raise, and reports the first of each stream in full."""

    def __init__(self, tree_id: str) -> None:
        self.count = 0
        self._tree_id = tree_id
        self._reported: set[str] = set()

    def caught(self, stream: str, exception: Exception) -> None:
        self.count += 1
        # A callback that fails for every line of a flood must not become a flood in the log.
        if stream not in self._reported:
            self._reported.add(stream)
            events.error(
                "callback.failed",
                tree_id=self._tree_id,
                stream=stream,
                error=repr(exception),
                exc_info=True,
            )


def chunk_delivery(
    callback: Callable[[bytes], object], stream: str, errors: CallbackErrors
) -> tuple[Callable[[bytes], None], None]:
    """(deliver, finish) for `Chunks`."""

    def deliver(data: bytes) -> None:
        try:
            callback(data)
        except Exception as exception:
            errors.caught(stream, exception)

    return deliver, None


def line_delivery(
    callback: Callable[[str], object],
    cutter: LineCutter,
    stream: str,
    errors: CallbackErrors,
    breathe: Callable[[], None],
) -> tuple[Callable[[bytes], None], Callable[[], None]]:
    """(deliver, finish) for `Lines` and `Log`. A line whose callback raised is not repeated.

    Args:
        breathe: called between pieces of the work (`Worker.breathe`).
    """

    def call(lines: list[str]) -> None:
        for at in range(0, len(lines), LINES_AT_ONCE):
            if at:
                breathe()
            call_some(lines[at : at + LINES_AT_ONCE])

    def call_some(lines: list[str]) -> None:
        pending = iter(lines)
        while True:
            try:
                for line in pending:
                    callback(line)
                return
            except Exception as exception:
                errors.caught(stream, exception)

    def deliver(data: bytes) -> None:
        for at in range(0, len(data), CUT_AT_ONCE):
            if at:
                breathe()
            call(cutter.feed(data[at : at + CUT_AT_ONCE]))

    return deliver, lambda: call(cutter.finish())
