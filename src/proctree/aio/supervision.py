"""A supervisor in an event loop.

Its life is that of `proctree.supervisor`, on the loop's thread. What is added here is who waits.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import TracebackType
from typing import Any

import anyio.lowlevel
import anyio.to_thread

from proctree.aio.waking import Bell, unbroken, wait_out
from proctree.errors import ProctreeError
from proctree.supervisor import ChildInfo, ChildSpec, Supervisor


class supervise:  # noqa: N801
    """Starts a supervisor, and stops it when the block is left: `async with`.

    The block begins when all children are ready, and when it has been left nothing of them runs
    any more, however it was left. A second interruption has them end at once.

    Args:
        supervisor: one that was not started yet. Its methods may be used, too; those that wait
            would hold up the event loop.

    Raises:
        StartFailed: on entering, as `Supervisor.start`.
        IntensityExceeded: on leaving, when it had given up and nothing else is being raised.
        ProctreeError: on entering: it was started before.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        if not isinstance(supervisor, Supervisor):
            raise TypeError(f"supervisor: a proctree.supervisor.Supervisor, not {supervisor!r}")
        self._supervisor = supervisor
        self._running = supervisor._running
        # What it calls must not refer to us: the loop refers to the supervisor, and that to it.
        self._bell = Bell(partial(_refused, supervisor))

    # Not coroutine functions themselves: see `open_process`.

    def __aenter__(self) -> Any:
        return unbroken(_enter)(self)

    def __aexit__(
        self,
        _type: type[BaseException] | None,
        value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> Any:
        return unbroken(_leave)(self, value)

    @property
    def supervisor(self) -> Supervisor:
        return self._supervisor

    async def wait(self) -> None:
        """Waits until it has ended: by itself, by `stop`, or because it gave up.

        Raises:
            IntensityExceeded: it gave up.
        """
        await anyio.lowlevel.checkpoint()
        await self._bell.wait_until(self._running.closed.is_set)
        self._supervisor._raise_failure()

    def stop(self, reason: str = "asked to stop") -> None:
        """As `Supervisor.stop`: asks for the end; `wait`, or the end of the block, waits for it."""
        self._supervisor.stop(reason)

    async def add(self, spec: ChildSpec) -> None:
        """As `Supervisor.add`, in a thread. A cancellation is put off until the child is ready, or
        will not be."""
        await anyio.to_thread.run_sync(self._supervisor.add, spec)

    async def remove(self, name: str) -> None:
        """As `Supervisor.remove`, in a thread. A cancellation is put off until it has ended."""
        await anyio.to_thread.run_sync(self._supervisor.remove, name)

    async def children(self) -> tuple[ChildInfo, ...]:
        """As `Supervisor.children`, in a thread."""
        return await anyio.to_thread.run_sync(self._supervisor.children)

    async def _start(self) -> None:
        self._supervisor._take_token()
        self._running.observers.append(self._bell.ring)
        try:
            self._running.begin()
            await self._bell.wait_until(self._running.up.is_set)
        except BaseException as exception:
            await self._end(exception)
            raise
        if not self._running.started:
            await self._end(None)
            self._supervisor._raise_failure()
            self._supervisor._raise_stopped()

    async def _end(self, exception: BaseException | None) -> None:
        self._supervisor.stop("left the async with block")
        if isinstance(exception, GeneratorExit):
            # Its task is thrown away; with its event loop, nobody would ever wake us.
            return
        ended, at_once = self._running.closed.is_set, self._supervisor.stop_now
        await wait_out(self._bell, ended, at_once, exception)

    def __del__(self) -> None:
        # Nobody has left the block, and nobody can: a task that was thrown away.
        with contextlib.suppress(AttributeError, ProctreeError):
            if self._running.asked and not self._running.closed.is_set():
                self._supervisor.stop("nobody refers to its block any more")


def _refused(supervisor: Supervisor, _loop: object) -> None:
    """The event loop has ended while a task of it waited: nobody will leave the block."""
    supervisor.stop("its event loop has ended")


async def _enter(block: supervise) -> supervise:
    # Before it comes to the coroutine that waits, too: trio marks the code.
    unbroken(supervise.__aexit__)
    await block._start()
    return block


async def _leave(block: supervise, value: BaseException | None) -> None:
    await block._end(value)
    if value is None:
        block._supervisor._raise_failure()
