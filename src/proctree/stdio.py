"""The three standard streams of a tree: from what the user asked for to descriptors.

`plan` checks the arguments and opens nothing. `Streams.open` makes the pipes and opens the files,
with the descriptor lock held, and `attach` puts our ends on the loop.
"""

from __future__ import annotations

import enum
import io
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from proctree.fifos import Fifo, is_fifo
from proctree.loop import Loop
from proctree.output import (
    DEFAULT_CAPTURE,
    CallbackErrors,
    CallbackSink,
    CaptureSink,
    LineCutter,
    PullSink,
    Sink,
    chunk_delivery,
    line_delivery,
)
from proctree.process import fds
from proctree.records import Cut
from proctree.streams import InputStream, OutputStream, widen
from proctree.terminal import Terminal, WindowSize, to_window
from proctree.terminal import make as make_terminal
from proctree.worker import Worker


class StreamOwner(Protocol):
    """The tree whose streams they are."""

    tree_id: str
    worker: Worker
    callback_errors: CallbackErrors

    @property
    def pid(self) -> int | None:
        """The main process, or None before it has started."""
        ...

    def stream_ended(self) -> None:
        """One stream has ended and all of it was delivered; on the loop."""


Captured = tuple[bytes | None, Cut | None]


class Stdio(enum.Enum):
    """The simple places for a standard stream.

    `INHERIT`: the supervisor's own. `DEVNULL`: nothing. `CAPTURE`: into the outcome, with the
    default limit (`Capture()`). `STDOUT`: for stderr, wherever stdout goes.
    """

    INHERIT = "inherit"
    DEVNULL = "devnull"
    CAPTURE = "capture"
    STDOUT = "stdout"


# subprocess's constants mean here what they mean there; the module itself is slow to import.
_PIPE, _STDOUT, _DEVNULL = -1, -2, -3
ALIASES = {
    _PIPE: Stdio.CAPTURE,
    _STDOUT: Stdio.STDOUT,
    _DEVNULL: Stdio.DEVNULL,
    "inherit": Stdio.INHERIT,
    "devnull": Stdio.DEVNULL,
    "capture": Stdio.CAPTURE,
    "stdout": Stdio.STDOUT,
}


def to_common(value: Any, argument: str) -> Any:
    """What input and output streams have in common: None, constants, descriptors, files, paths."""
    if value is None:
        return Stdio.INHERIT
    if isinstance(value, (int, str)) and not isinstance(value, bool) and value in ALIASES:
        return ALIASES[value]
    if isinstance(value, bool):
        raise TypeError(f"{argument}: not {value!r}")
    if isinstance(value, int):
        _check_open(value, argument)
        return value
    if isinstance(value, os.PathLike):
        return value
    fileno = getattr(value, "fileno", None)
    if fileno is not None:
        try:
            number = fileno()
        except (OSError, ValueError, io.UnsupportedOperation) as error:
            raise ValueError(f"{argument}: {value!r} has no descriptor: {error}") from None
        _check_open(number, argument)
        return number
    return value


def _check_open(fd: int, argument: str) -> None:
    if fd < 0:
        raise ValueError(f"{argument}: {fd} is not a descriptor")
    try:
        os.fstat(fd)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{argument}: descriptor {fd} is not open: {error}") from None


def _output(value: Any, argument: str) -> Any:
    value = to_common(value, argument)
    if value is Stdio.STDOUT and argument != "stderr":
        raise ValueError(f"{argument}: STDOUT is for stderr")
    if isinstance(value, (Stdio, int, os.PathLike, PullSink)):
        return value
    from proctree.sinks import Capture, Chunks, Lines, Log

    if isinstance(value, (Capture, Chunks, Lines, Log)):
        return value
    if callable(value):
        raise TypeError(f"{argument}: a callback is given as Lines({value!r}) or Chunks({value!r})")
    raise TypeError(f"{argument}: cannot write to {value!r}")


def to_input(value: Any) -> Any:
    """What standard input is to be.

    Raises:
        TypeError, ValueError: naming `stdin`.
    """
    value = to_common(value, "stdin")
    if value in (Stdio.CAPTURE, Stdio.STDOUT):
        raise ValueError(f"stdin: {value} is for output; give bytes, a file, or DEVNULL")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (Stdio, int, os.PathLike, bytes)):
        return value
    raise TypeError(f"stdin: cannot read from {value!r}")


class ChildEnds:
    """What is open for the child alone, until it has it."""

    def __init__(self) -> None:
        self._open: list[int] = []
        self._fifos: dict[Any, Fifo] = {}

    def add(self, fd: int) -> int:
        self._open.append(fd)
        return fd

    def open_fifos(self, wanted: Iterable[tuple[Any, int]], then: Callable[[], None]) -> int:
        """Has those opened that are FIFOs; `then` is called for each of them, on another thread.

        Args:
            wanted: what `open_file` will be asked for: paths, and how they are opened; what is no
                path is left out.

        Returns:
            How many.

        Raises:
            RuntimeError: there is no thread for one.
        """
        for path, flags in wanted:
            if isinstance(path, os.PathLike) and is_fifo(path):
                self._fifos[path, flags] = Fifo(path, flags)
        for fifo in tuple(self._fifos.values()):
            fifo.open(then)
        return len(self._fifos)

    def open_file(self, path: Any, flags: int, mode: int = 0o666) -> int:
        """Raises OSError, which names the file."""
        fifo = self._fifos.pop((path, flags & os.O_ACCMODE), None)
        if fifo is not None:
            return self.add(fifo.take())
        return self.add(fds.above_stdio(os.open(path, flags | os.O_CLOEXEC, mode)))

    def movable(self, fd: int, target: int) -> int:
        """A standard stream of ours that becomes another one of the child's is copied first, so
        that the order in which they are put in place does not matter."""
        if fd > 2 or fd == target:
            return fd
        return self.add(fds.above_stdio(os.dup(fd)))

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())
        while self._fifos:
            self._fifos.popitem()[1].abandon()


def line_callback(
    wanted: Any, name: str, tree: StreamOwner
) -> tuple[Callable[[str], object], LineCutter]:
    """What `Lines` or `Log` has called with each line, and what cuts them."""
    from proctree.sinks import Lines, log_callback

    if isinstance(wanted, Lines):
        return wanted.callback, LineCutter(wanted.max_length, wanted.encoding)
    callback = log_callback(wanted, name, tree.tree_id, lambda: tree.pid)
    return callback, LineCutter(wanted.max_length)


def tapped(
    taps: list[Callable[[str, bytes], None]], name: str, deliver: Callable[[bytes], None]
) -> Callable[[bytes], None]:
    """`deliver`, and before it each of the taps."""
    if not taps:
        return deliver

    def deliver_tapped(data: bytes) -> None:
        for tap in taps:
            tap(name, data)
        deliver(data)

    return deliver_tapped


def capture_limit(wanted: Any) -> int | None:
    """Bytes to keep; None if it is not to be captured."""
    return DEFAULT_CAPTURE if wanted is Stdio.CAPTURE else getattr(wanted, "limit", None)


def _is_piped(value: Any) -> bool:
    """Whether we read it: everything but what the tree writes to directly."""
    return value is Stdio.CAPTURE or not isinstance(value, (Stdio, int, os.PathLike))


class Streams:
    """The streams of one tree.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is open then.
    """

    def __init__(self, stdin: Any, stdout: Any, stderr: Any, pty: Any = None) -> None:
        self._stdin = to_input(stdin)
        self._stdout = _output(stdout, "stdout")
        self._stderr = _output(stderr, "stderr")
        self._window = to_window(pty)
        if self._window is not None:
            self._check_terminal()
        self.append = False
        self.taps: list[Callable[[str, bytes], None]] = []
        self.terminal: Terminal | None = None
        self._terminal_fd: int | None = None
        self._child_ends = ChildEnds()
        self._input_fd: int | None = None
        self._output_fds: dict[str, int] = {}
        self._input: InputStream | None = None
        self._streams: dict[str, OutputStream] = {}
        self._captures: dict[str, CaptureSink] = {}

    def _check_terminal(self) -> None:
        if self._stdin is not Stdio.INHERIT and not isinstance(self._stdin, bytes):
            raise ValueError("stdin: with a pty it is the terminal; give bytes to type, or nothing")
        if not _is_piped(self._stdout):
            raise ValueError(
                "stdout: with a pty, say what becomes of the terminal's output: CAPTURE, Lines, "
                "Chunks or Log"
            )
        if self._stderr not in (Stdio.INHERIT, Stdio.STDOUT):
            raise ValueError("stderr: with a pty it is the terminal, like stdout")
        self._stderr = Stdio.STDOUT

    @property
    def has_terminal(self) -> bool:
        return self._window is not None

    @property
    def outputs(self) -> int:
        """How many output streams will report their end."""
        return _is_piped(self._stdout) + _is_piped(self._stderr)

    def open_fifos(self, then: Callable[[], None]) -> int:
        """As `ChildEnds.open_fifos`."""
        wanted = ((self._stdin, os.O_RDONLY), (self._stdout, os.O_WRONLY))
        return self._child_ends.open_fifos((*wanted, (self._stderr, os.O_WRONLY)), then)

    # -- in the starting thread, with the descriptor lock held

    def open(self) -> tuple[int | None, int | None, int | None]:
        """Opens everything; returns what the child's 0, 1 and 2 are to be.

        Raises:
            OSError: a file cannot be opened; it names the file.
        """
        if self._window is not None:
            return self._open_terminal(self._window)
        stdin = self._open_input()
        stdout = self._open_output("stdout", self._stdout)
        if self._stderr is Stdio.STDOUT:
            return stdin, stdout, stdout if stdout is not None else 1
        return stdin, stdout, self._open_output("stderr", self._stderr)

    def _open_terminal(self, size: WindowSize) -> tuple[int, int, int]:
        ours, theirs = make_terminal(size)
        self._output_fds["stdout"] = fds.own(ours)
        self._child_ends.add(theirs)
        self._terminal_fd = fds.own(fds.above_stdio(os.dup(ours)))
        return theirs, theirs, theirs

    def _open_input(self) -> int | None:
        value = self._stdin
        if value is Stdio.INHERIT:
            return None
        if isinstance(value, bytes):
            reader, writer = fds.pipe()
            self._input_fd = fds.own(writer)
            return self._child_ends.add(reader)
        if isinstance(value, int):
            return self._child_ends.movable(value, 0)
        path = os.devnull if value is Stdio.DEVNULL else value
        return self._child_ends.open_file(path, os.O_RDONLY)

    def _open_output(self, name: str, value: Any) -> int | None:
        if value is Stdio.INHERIT:
            return None
        if isinstance(value, int):
            return self._child_ends.movable(value, 1 if name == "stdout" else 2)
        if value is Stdio.DEVNULL:
            return self._child_ends.open_file(os.devnull, os.O_WRONLY)
        if isinstance(value, os.PathLike):
            mode = os.O_APPEND if self.append else os.O_TRUNC
            return self._child_ends.open_file(value, os.O_WRONLY | os.O_CREAT | mode)
        reader, writer = fds.pipe()
        widen(reader)
        self._output_fds[name] = fds.own(reader)
        return self._child_ends.add(writer)

    def close_child_ends(self) -> None:
        self._child_ends.close()

    # -- on the loop

    def attach(self, loop: Loop, tree: StreamOwner) -> None:
        """Wraps our ends; nothing is read before `start`.

        Raises:
            Exception: what the host's logger raised when it was looked up.
        """
        if self._input_fd is not None:
            self._input = InputStream(loop, self._input_fd, self._stdin)
        if self._terminal_fd is not None:
            self.terminal, self._terminal_fd = Terminal(loop, self._terminal_fd), None
        for name, fd in self._output_fds.items():
            sink = self._sink(name, tree)
            self._streams[name] = OutputStream(loop, fd, sink, tree.stream_ended)

    def start(self) -> None:
        if self._input is not None:
            self._input.start()
        if self.terminal is not None and isinstance(self._stdin, bytes):
            self.terminal.type_all(self._stdin)
        for stream in self._streams.values():
            stream.start()

    def _sink(self, name: str, tree: StreamOwner) -> Sink:
        wanted = self._stdout if name == "stdout" else self._stderr
        if isinstance(wanted, PullSink):
            wanted.attach(lambda: self._resume(name))
            return wanted
        limit = capture_limit(wanted)
        if limit is not None:
            self._captures[name] = CaptureSink(limit)
            return self._captures[name]
        deliver, finish = self._delivery(name, wanted, tree)
        deliver = tapped(self.taps, name, deliver)
        # The stream is made after its sink, so that the sink looks it up when it needs it.
        return CallbackSink(tree.worker, deliver, finish, lambda: self._resume(name))

    def _resume(self, name: str) -> None:
        stream = self._streams.get(name)
        if stream is not None:  # None: closed meanwhile
            stream.resume()

    def _delivery(
        self, name: str, wanted: Any, tree: StreamOwner
    ) -> tuple[Callable[[bytes], None], Callable[[], None] | None]:
        from proctree.sinks import Chunks

        errors = tree.callback_errors
        if isinstance(wanted, Chunks):
            return chunk_delivery(wanted.callback, name, errors)
        callback, cutter = line_callback(wanted, name, tree)
        return line_delivery(callback, cutter, name, errors, tree.worker.breathe)

    def drain(self) -> None:
        for stream in self._streams.values():
            stream.drain()

    def close_input(self) -> None:
        if self._input is not None:
            self._input.close()

    def close(self) -> None:
        self.close_child_ends()
        self.close_input()
        for stream in self._streams.values():
            stream.close()
        for name, fd in self._output_fds.items():
            if name not in self._streams:
                fds.close(fd)
        self._output_fds.clear()
        self._streams.clear()
        if self._input is None and self._input_fd is not None:
            fds.close(self._input_fd)
        self._input, self._input_fd = None, None
        if self.terminal is not None:
            self.terminal.close()
        if self._terminal_fd is not None:
            fds.close(self._terminal_fd)
            self._terminal_fd = None

    def captured(self) -> tuple[Captured, Captured]:
        """(stdout, stderr), each its bytes or None, and what was cut out of them."""
        return self._captured("stdout"), self._captured("stderr")

    def _captured(self, name: str) -> Captured:
        sink = self._captures.get(name)
        return (None, None) if sink is None else sink.result()
