"""One tree in an event loop.

The life of a tree is the loop's own (tree.py), here as everywhere. This module asks for its
beginning and its end, and waits. What it adds is who waits: a task that may be cancelled at any of
its awaits, whose event loop may be closed, and that must not leave its block before the tree is
proved to have ended.
"""

from __future__ import annotations

import contextlib
import enum
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import anyio.to_thread

from proctree import eventloops
from proctree import loop as _loop
from proctree import tree as _tree
from proctree.aio.reading import ChunkReader, LineReader, Source
from proctree.aio.waking import Bell, unbroken, wait_out
from proctree.command import Target
from proctree.errors import ProctreeError, TreeFailed
from proctree.lifecycle import State
from proctree.output import DEFAULT_LINE
from proctree.policy import KillPolicy
from proctree.transitions import TreeEnded, TreeStarted
from proctree.watched import WatchedSubprocess

if TYPE_CHECKING:
    from proctree.eventloops import EventLoop
    from proctree.outcome import Outcome
    from proctree.process.snapshot import ProcessInfo
    from proctree.terminal import Terminal


class _Pipe(enum.Enum):
    PIPE = "pipe"


PIPE: Final = _Pipe.PIPE
"""For stdout and stderr: `Process.lines` and `Process.chunks` read it."""


class _Home:
    """The event loop that a tree belongs to."""

    def __init__(self) -> None:
        self.loop = eventloops.running()
        self.handle: WatchedSubprocess | None = None

    def refused(self, loop: EventLoop) -> None:
        """It has ended while a task of it waited for the tree: nobody will leave the block."""
        if loop is self.loop and self.handle is not None:
            self.handle.kill(reason="its event loop has ended")


class Process:
    """A tree that an event loop started: what `open_process` and `TreeGroup.start` give.

    What does not say otherwise never blocks, and may be called from any thread.
    """

    def __init__(self, target: Target, options: dict[str, Any]) -> None:
        self._home = _Home()
        self._bell = Bell(self._home.refused)
        self._sources = {
            name: Source(name, self._home.refused)
            for name in ("stdout", "stderr")
            if options.get(name) is PIPE
        }
        sinks = {name: source.sink for name, source in self._sources.items()}
        self._handle = self._home.handle = WatchedSubprocess(target, **{**options, **sinks})
        self._tree = self._handle._tree
        self._tree.observers.append(partial(_ring, self._bell))

    # -- what is known

    @property
    def tree_id(self) -> str:
        """16 hexadecimal digits; also a part of PROCTREE_TREE in the tree's environment."""
        return self._handle.tree_id

    @property
    def pid(self) -> int | None:
        """The main process. It leads its session and group."""
        return self._handle.pid

    @property
    def name(self) -> str:
        return self._handle.name

    @property
    def state(self) -> State:
        """Where the tree is in its life."""
        return self._handle.state

    @property
    def containment(self) -> str:
        """The backend that holds the tree: `"pidns"`, `"cgroup"`, `"warden"` or `"group"`."""
        return self._handle.containment

    @property
    def terminal(self) -> Terminal | None:
        """Our end of the tree's pseudo-terminal: None without `pty`."""
        return self._handle.terminal

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None as long as it has not."""
        return self._handle.outcome

    async def processes(self) -> list[ProcessInfo]:
        """As `WatchedSubprocess.processes`; looked up in a thread."""
        return await anyio.to_thread.run_sync(self._handle.processes)

    # -- what can be done

    def kill(self, policy: KillPolicy | None = None, reason: str = "") -> None:
        """As `WatchedSubprocess.kill`: asks for the end of the tree; `wait` waits for it."""
        self._handle.kill(policy, reason)

    def signal(self, sig: int, scope: str = "group") -> None:
        """As `WatchedSubprocess.signal`."""
        self._handle.signal(sig, scope)

    def freeze(self) -> None:
        """As `WatchedSubprocess.freeze`."""
        self._handle.freeze()

    def thaw(self) -> None:
        """As `WatchedSubprocess.thaw`."""
        self._handle.thaw()

    def notify(self, body: Any) -> None:
        """As `WatchedSubprocess.notify`."""
        self._handle.notify(body)

    async def wait(self) -> Outcome:
        """Waits for the end of the tree, in any event loop. To cancel the wait does nothing to the
        tree.

        A tree that writes more into a `PIPE` than pipe and buffer hold (1.5 MiB) does not end
        before somebody has read the rest, or it is killed.

        Raises:
            ProctreeError: called in a forked child.
        """
        _tree.require_owner(self._tree)
        if self._has_ended():
            await anyio.lowlevel.checkpoint()
        else:
            await self._bell.wait_until(self._has_ended)
        outcome = self._tree.outcome
        assert outcome is not None
        return outcome

    def lines(
        self, stream: str = "stdout", *, encoding: str = "utf-8", max_length: int = DEFAULT_LINE
    ) -> LineReader:
        """The lines of a stream that is a `PIPE`, without their newlines: `async for`. The
        iteration ends at the end of the stream, and not before all of it has been handed out, also
        when the tree has ended long ago.

        One reader at a time. One that is left early (by `break`, an exception, a cancellation)
        loses nothing: the next `lines` or `chunks` goes on behind the last line that was handed
        out. Iterate in the event loop's thread.

        Args:
            stream: `"stdout"` (default) or `"stderr"`.
            encoding: default UTF-8. What is not valid becomes U+FFFD; it never raises.
            max_length: bytes; a longer line comes in pieces of this size. Default 1 MiB.

        Raises:
            ValueError: no such stream, or it is not a PIPE; or as `Lines` raises it.
            TypeError, LookupError: as `Lines` raises them.
            RuntimeError: on iteration, while another reader reads the stream.
        """
        return LineReader(self._source(stream), encoding, max_length)

    def chunks(self, stream: str = "stdout") -> ChunkReader:
        """The bytes of a stream that is a `PIPE`, in pieces as they come. Otherwise as `lines`."""
        return ChunkReader(self._source(stream))

    def _source(self, stream: str) -> Source:
        if stream not in ("stdout", "stderr"):
            raise ValueError(f'stream: "stdout" or "stderr", not {stream!r}')
        source = self._sources.get(stream)
        if source is None:
            raise ValueError(
                f"stream: {stream} of tree {self.tree_id} cannot be read here: it was not given as "
                f"{stream}=aio.PIPE"
            )
        return source

    # -- beginning and end

    def _has_begun(self) -> bool:
        return self.state not in (State.NEW, State.STARTING)

    def _has_ended(self) -> bool:
        return self._tree.ending is not None

    async def _start(self) -> None:
        try:
            self._tree.launch(_loop.get())
            await self._bell.wait_until(self._has_begun)
        except BaseException as exception:
            self._handle.kill(reason="cancelled while it was starting")
            if not isinstance(exception, GeneratorExit):
                await self._wait_out(exception)
            raise
        error = self._handle._start_error()
        if error is not None:
            # What there was of it is being cleared away.
            await self._wait_out(None)
            raise error

    async def _end(self, exception: BaseException | None) -> None:
        """However the block is left."""
        if self._has_ended():
            return
        thrown_away = isinstance(exception, GeneratorExit) and not eventloops.is_running(
            self._home.loop
        )
        if thrown_away:
            # With its event loop: nobody would ever wake us.
            self._handle.kill(reason="its task was thrown away")
            return
        cancelled = isinstance(exception, anyio.get_cancelled_exc_class())
        self._handle.kill(reason="cancelled" if cancelled else "left the async with block")
        await self._wait_out(exception)

    async def _wait_out(self, exception: BaseException | None) -> None:
        at_once = partial(self._handle.kill, KillPolicy.now())
        await wait_out(self._bell, self._has_ended, at_once, exception)

    def __del__(self) -> None:
        # Nobody has left the block, and nobody can: a task that was thrown away, an exit stack that
        # was never closed. AttributeError: it never came to be.
        with contextlib.suppress(AttributeError, ProctreeError):
            if self._tree.asked and not self._has_ended():
                self._handle.kill(reason="nobody refers to it any more")

    def __repr__(self) -> str:
        known = f"{self.name!r} tree {self.tree_id} pid {self.pid}"
        return f"<aio.Process {known} {self.state.value}>"


def _ring(bell: Bell, event: object) -> None:
    """For `Tree.observers`."""
    if isinstance(event, (TreeStarted, TreeEnded)):
        bell.ring()


class _Opening:
    """What `open_process` returns."""

    def __init__(self, target: Target, options: dict[str, Any]) -> None:
        self._target = target
        self._options = options
        self._process: Process | None = None

    # Not coroutine functions themselves: then there would be a frame around the one that is
    # protected where a KeyboardInterrupt could come.

    def __aenter__(self) -> Any:
        return unbroken(_enter)(self)

    def __aexit__(
        self,
        _type: type[BaseException] | None,
        value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> Any:
        return unbroken(_leave)(self, value)


async def _enter(opening: _Opening) -> Process:
    if opening._process is not None:
        raise RuntimeError("this open_process() was entered before: each starts one tree")
    process = opening._process = Process(opening._target, opening._options)
    # Before it comes to the coroutine that waits, too: trio marks the code.
    unbroken(_Opening.__aexit__)
    await process._start()
    return process


async def _leave(opening: _Opening, value: BaseException | None) -> None:
    assert opening._process is not None
    await opening._process._end(value)


def open_process(target: Target, **options: Any) -> AbstractAsyncContextManager[Process]:
    """Starts a tree, and ends it when the block is left: `async with`.

    However the block is left, its tree has ended then, and that is proved: a cancellation, a time
    limit and an exception end the tree, and go on when it has ended. A second one, and a second
    Ctrl-C, do not skip that; they have the tree end at once.

    Args:
        target: as of `WatchedSubprocess`.
        options: as of `WatchedSubprocess`, and for `stdout` and `stderr` also `PIPE`, which is the
            default for `stdout`.

    Raises:
        TypeError, ValueError, ContainmentUnavailable, OSError: on entering, as
            `WatchedSubprocess.start`. Nothing is left behind.
    """
    return _Opening(target, {"stdout": PIPE, **options})


async def run(target: Target, *, check: bool = False, **options: Any) -> Outcome:
    """Runs a command, or a callable, and returns when its whole tree has ended. A cancellation
    ends the tree first, and then goes on.

    Takes what `WatchedSubprocess` takes.

    Args:
        check: raise `TreeFailed` unless the main process exited with status 0 by itself.

    Raises:
        TypeError, ValueError, ContainmentUnavailable, OSError: as `open_process`.
        TreeFailed: with `check`.
    """
    async with _Opening(target, options) as process:
        outcome: Outcome = await process.wait()
    if check and not outcome.ok:
        raise TreeFailed(outcome)
    return outcome
