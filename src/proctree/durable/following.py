"""The standard streams of a durable tree: it writes files, and we follow them.

The tree has no pipe to us that could break or fill up: it goes on whatever becomes of us. Whoever
supervises it delivers what is new in the files, from where the last reader stopped, and writes down
in the `cursor` how far it has come. Everything is delivered at least once and in order; after a
reader was killed, the next one repeats at most the piece that it was busy with. Lines come whole:
for them the cursor stays behind the last line that was complete.

What is captured is read from the beginning every time, and moves no cursor.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable
from typing import Any

from proctree import events
from proctree.durable.cursor import STREAMS, Cursor
from proctree.durable.reading import GrowingFile
from proctree.errors import errno_name
from proctree.loop import Loop
from proctree.output import (
    CallbackErrors,
    CallbackSink,
    CaptureSink,
    LineCutter,
    chunk_delivery,
    line_delivery,
)
from proctree.process import fds
from proctree.stdio import (
    ALIASES,
    Captured,
    ChildEnds,
    Stdio,
    StreamOwner,
    capture_limit,
    line_callback,
    tapped,
    to_input,
)
from proctree.streams import CALLBACK_CHUNK
from proctree.terminal import Terminal
from proctree.worker import Worker

FILES: dict[str, str] = {"stdout": "out.log", "stderr": "err.log"}
"""In the directory of the attempt."""

Taps = list[Callable[[str, bytes], None]]


# -- what was asked for


def _to_log(value: Any) -> Any:
    """One stream: None, INHERIT, CAPTURE, or what sinks.py offers."""
    if value is None:
        return None
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        value = ALIASES.get(value, value)
    if value in (Stdio.INHERIT, Stdio.CAPTURE):
        return value
    from proctree.sinks import Capture, Chunks, Lines, Log

    if isinstance(value, (Capture, Chunks, Lines, Log)):
        return value
    if isinstance(value, Stdio):
        raise ValueError(f"logs: not {value}; None is for the files alone")
    if callable(value):
        raise TypeError(f"logs: a callback is given as Lines({value!r}) or Chunks({value!r})")
    raise TypeError(f"logs: None, INHERIT, CAPTURE, Lines, Chunks or Log, not {value!r}")


def to_logs(logs: Any, merged: bool = False) -> dict[str, Any]:
    """What becomes of each stream, by its name; without those that nobody wants.

    Args:
        logs: one for both streams, or a pair (stdout, stderr). Each is None (it is in the file and
            nowhere else), INHERIT (copied to our own), CAPTURE, `Capture`, `Lines`, `Chunks`
            or `Log`.
        merged: stderr goes where stdout goes.

    Raises:
        TypeError, ValueError: naming `logs`.
    """
    if not isinstance(logs, (tuple, list)):
        wanted = _to_log(logs)
        pair = (wanted, None if merged else wanted)
    elif len(logs) != 2:
        raise ValueError(f"logs: a pair is (stdout, stderr), not {len(logs)} values")
    else:
        pair = (_to_log(logs[0]), _to_log(logs[1]))
        if merged and pair[1] is not None:
            raise ValueError("logs: stderr goes to stdout's file, so that it has none of its own")
    return {name: each for name, each in zip(STREAMS, pair, strict=True) if each is not None}


def to_stdin(value: Any) -> Any:
    """Raises TypeError, ValueError: naming `stdin`."""
    value = to_input(value)
    if value is Stdio.INHERIT:
        raise ValueError(
            "stdin: a durable tree outlives us, and so has none of ours: give DEVNULL, bytes, a "
            "path, or a descriptor"
        )
    return value


# -- delivering, on the worker


class _Delivery:
    """Hands one stream to the user's code, and moves the cursor behind it."""

    def __init__(
        self, name: str, wanted: Any, tree: StreamOwner, cursor: Cursor, taps: Taps
    ) -> None:
        from proctree.sinks import Chunks

        self._name = name
        self._cursor = cursor
        self._position = cursor.offsets[name]
        self._cutter: LineCutter | None = None
        self._finish: Callable[[], None] | None = None
        errors = tree.callback_errors
        if wanted is Stdio.INHERIT:
            copy = functools.partial(fds.write_all, STREAMS.index(name) + 1)
            deliver, _ = chunk_delivery(copy, name, errors)
        elif isinstance(wanted, Chunks):
            deliver, _ = chunk_delivery(wanted.callback, name, errors)
        else:
            callback, self._cutter = line_callback(wanted, name, tree)
            breathe = tree.worker.breathe
            deliver, self._finish = line_delivery(callback, self._cutter, name, errors, breathe)
        self._deliver = tapped(taps, name, deliver)

    @property
    def finish(self) -> Callable[[], None] | None:
        """What is to be done at the end; None: nothing."""
        return None if self._finish is None else self.finish_line

    def __call__(self, data: bytes) -> None:
        self._deliver(data)
        self._position += len(data)
        self._move()

    def _move(self) -> None:
        rest = 0 if self._cutter is None else len(self._cutter.rest)
        self._cursor.move(self._name, self._position - rest)

    def finish_line(self) -> None:
        """Nothing more comes of the last line."""
        if self._finish is not None:
            self._finish()
        self._move()

    def restart(self) -> None:
        """The file begins again."""
        self.finish_line()
        self._position = 0
        self._move()


# -- the streams


def _is_captured(wanted: Any) -> bool:
    return capture_limit(wanted) is not None


def _moving(wanted: dict[str, Any]) -> list[str]:
    """The streams whose delivery moves the cursor."""
    return [name for name, each in wanted.items() if not _is_captured(each)]


def _open_log(place: str, name: str) -> int | None:
    """The file of a stream, owned; None, and said in the log, if it cannot be read. With the
    descriptor lock held."""
    path = os.path.join(place, FILES[name])
    try:
        # The tree may have put anything in its place: opening a FIFO must not block.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if _is_regular(fd):
            return fds.own(fds.above_stdio(fd))
        os.close(fd)
    except OSError as error:
        if error.errno == errno.ENOENT and name == "stderr":
            return None  # it went where stdout goes
        _unreadable(path, error)
        return None
    events.warning("durable.unreadable_output", path=path, errno="not a regular file")
    return None


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise


def _unreadable(path: str, error: OSError) -> None:
    events.warning("durable.unreadable_output", path=path, errno=errno_name(error.errno or 0))


class Followed:
    """The streams of one durable tree; what `stdio.Streams` is to others.

    Args:
        stdin: `DEVNULL`, bytes, a path, or a descriptor. Not used without `writes`.
        logs: as `to_logs`.
        place: the directory of the attempt.
        writes: whether a child is to be made that writes the files: they are opened for it. False
            for a tree that somebody else has started.
        merged: stderr goes where stdout goes, to out.log.
        cursor: whether the cursor is moved. Only the owner of a run does that; `take_cursor` makes
            us one later.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is open then.
    """

    has_terminal = False

    def __init__(
        self,
        stdin: Any,
        logs: Any,
        place: str,
        *,
        writes: bool,
        merged: bool = False,
        cursor: bool = True,
    ) -> None:
        self._stdin = to_stdin(stdin) if writes else None
        self._wanted = to_logs(logs, merged)
        self._place = place
        self._child_writes = writes
        self._merged = merged
        self._moves_cursor = cursor
        self.append = True
        """As for other streams; these files are never written anew."""
        self.taps: Taps = []
        self._child_ends = ChildEnds()
        self._files: dict[str, GrowingFile] = {}
        self._missing = 0
        self._sinks: dict[str, CaptureSink | CallbackSink] = {}
        self._cursor: Cursor | None = None
        self._tree: StreamOwner
        self._attached = False
        self._drained = False

    @property
    def outputs(self) -> int:
        """How many streams will report their end."""
        return len(self._wanted)

    @property
    def terminal(self) -> Terminal | None:
        """There is none."""
        return None

    def open_fifos(self, then: Callable[[], None]) -> int:
        """As `ChildEnds.open_fifos`."""
        return self._child_ends.open_fifos([(self._stdin, os.O_RDONLY)], then)

    # -- with the descriptor lock held

    def open(self) -> tuple[int | None, int | None, int | None]:
        """Opens everything for the child; returns what its 0, 1 and 2 are to be.

        Raises:
            OSError: a file cannot be opened; it names the file.
        """
        if not self._child_writes:
            return None, None, None
        stdin, stdout = self._open_input(), self._open_output("stdout")
        return stdin, stdout, stdout if self._merged else self._open_output("stderr")

    def _open_input(self) -> int:
        value = self._stdin
        if isinstance(value, bytes):
            # In memory and not through a pipe: nobody has to be there to feed it.
            fd = self._child_ends.add(fds.memory(value))
            os.lseek(fd, 0, os.SEEK_SET)
            return fd
        if isinstance(value, int):
            return self._child_ends.movable(value, 0)
        path = os.devnull if value is Stdio.DEVNULL else value
        return self._child_ends.open_file(path, os.O_RDONLY)

    def _open_output(self, name: str) -> int:
        path = os.path.join(self._place, FILES[name])
        return self._child_ends.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def close_child_ends(self) -> None:
        self._child_ends.close()

    # -- on the loop

    def attach(self, loop: Loop, tree: StreamOwner) -> None:
        """Opens the files for reading, with the descriptor lock held; nothing is read before
        `start`.

        Raises:
            Exception: what the host's logger raised when it was looked up.
        """
        self._tree = tree
        self._attached = True
        cursor = self._cursor = Cursor(self._place, _moving(self._wanted), self._moves_cursor)
        for name, wanted in self._wanted.items():
            fd = _open_log(self._place, name)
            if fd is None:
                self._missing += 1
                continue
            try:
                self._follow(loop, name, wanted, fd, cursor)
            except BaseException:
                fds.close(fd)
                raise

    def _follow(self, loop: Loop, name: str, wanted: Any, fd: int, cursor: Cursor) -> None:
        path, ended = os.path.join(self._place, FILES[name]), self._tree.stream_ended
        limit = capture_limit(wanted)
        if limit is not None:
            capture = self._sinks[name] = CaptureSink(limit)
            self._files[name] = GrowingFile(loop, path, fd, 0, capture, lambda: None, ended)
            return
        delivery = _Delivery(name, wanted, self._tree, cursor, self.taps)
        sink = self._sinks[name] = CallbackSink(
            self._tree.worker, delivery, delivery.finish, lambda: self._files[name].resume()
        )
        restarted = lambda: sink.then(delivery.restart)  # noqa: E731
        offset = cursor.offsets[name]
        self._files[name] = GrowingFile(loop, path, fd, offset, sink, restarted, ended)

    def start(self) -> None:
        for file in tuple(self._files.values()):
            file.start()

    def take_cursor(self) -> None:
        """We own the run now: what is delivered from now on moves the cursor. On the loop."""
        self._moves_cursor = True
        if self._cursor is not None:
            self._tree.worker.post(self._cursor.take_over)

    def leave_cursor(self) -> None:
        """Another one owns the run now, and moves it. On the loop."""
        self._moves_cursor = False
        if self._cursor is not None:
            self._tree.worker.post(self._cursor.leave)

    def drain(self) -> None:
        if self._drained:
            return
        self._drained = True
        for file in tuple(self._files.values()):
            file.drain()
        for _ in range(self._missing):
            self._tree.stream_ended()

    def close_input(self) -> None:
        """Nobody feeds it."""

    def close(self) -> None:
        self.close_child_ends()
        for file in self._files.values():
            file.close()
        if self._cursor is not None:
            # On the worker, which may be about to move it; and behind everything that moves it.
            self._tree.worker.post(self._cursor.close)
            self._cursor = None

    def captured(self) -> tuple[Captured, Captured]:
        """(stdout, stderr), each its bytes or None, and what was cut out of them."""
        return self._captured("stdout"), self._captured("stderr")

    def _captured(self, name: str) -> Captured:
        sink = self._sinks.get(name)
        return sink.result() if isinstance(sink, CaptureSink) else (None, None)


# -- a tree that has ended


class _Ended:
    """The owner of the streams of a tree that is no more."""

    def __init__(self, tree_id: str, pid: int | None, errors: CallbackErrors) -> None:
        self.tree_id = tree_id
        self.pid = pid
        self.callback_errors = errors
        self.worker = Worker()

    def stream_ended(self) -> None:
        """Nobody waits for it."""


def deliver(
    place: str,
    logs: Any,
    *,
    tree_id: str,
    pid: int | None = None,
    merged: bool = False,
    cursor: bool = True,
    errors: CallbackErrors | None = None,
) -> tuple[Captured, Captured]:
    """Delivers what no reader has delivered yet of a tree that has ended; blocks until that is
    done. The callbacks are called on this thread.

    Args:
        place: the directory of the attempt.
        logs, merged: as `to_logs`.
        tree_id, pid: of the tree that was, for the log.
        cursor: whether the cursor is moved.
        errors: counts what callbacks raise; it is in the log in any case.

    Returns:
        What was captured of stdout and stderr.

    Raises:
        TypeError, ValueError: naming the argument; nothing was delivered.
    """
    wanted = to_logs(logs, merged)
    tree = _Ended(tree_id, pid, CallbackErrors(tree_id) if errors is None else errors)
    position = Cursor(place, _moving(wanted), cursor)
    captured: dict[str, Captured] = {}
    try:
        for name, each in wanted.items():
            captured[name] = _deliver_one(place, name, each, tree, position)
    finally:
        position.close()
    nothing: Captured = (None, None)
    return captured.get("stdout", nothing), captured.get("stderr", nothing)


def _deliver_one(place: str, name: str, wanted: Any, tree: _Ended, cursor: Cursor) -> Captured:
    limit = capture_limit(wanted)
    sink = None if limit is None else CaptureSink(limit)
    delivery = None if sink is not None else _Delivery(name, wanted, tree, cursor, [])
    with fds.making():
        fd = _open_log(place, name)
    if fd is not None:
        try:
            if sink is not None:
                _read_all(fd, 0, lambda data: sink.feed(memoryview(data)))
            elif delivery is not None:
                _deliver_rest(place, fd, name, delivery, cursor, tree)
        except OSError as error:
            _unreadable(os.path.join(place, FILES[name]), error)
        finally:
            fds.close(fd)
    return (None, None) if sink is None else sink.result()


def _deliver_rest(
    place: str, fd: int, name: str, delivery: _Delivery, cursor: Cursor, tree: _Ended
) -> None:
    offset = cursor.offsets[name]
    size = os.fstat(fd).st_size
    if size < offset:
        path = os.path.join(place, FILES[name])
        events.warning("durable.truncated", path=path, offset=offset, size=size)
        delivery.restart()
        offset = 0

    def deliver_one(data: bytes) -> None:
        delivery(data)
        tree.worker.breathe()

    _read_all(fd, offset, deliver_one)
    delivery.finish_line()


def _read_all(fd: int, offset: int, take: Callable[[bytes], object]) -> None:
    while data := os.pread(fd, CALLBACK_CHUNK, offset):
        offset += len(data)
        take(data)
