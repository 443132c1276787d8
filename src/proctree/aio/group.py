"""Several trees that begin and end with a block."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import anyio
import anyio.abc

from proctree.aio.process import Process, open_process
from proctree.command import Target
from proctree.errors import TreeFailed


class TreeGroup:
    """Trees that have all ended when the block is left: `async with`.

    The end of the block waits for them. An exception, a cancellation and, with `check`, a tree that
    fails end all of them at the same time; that is waited for, and then the exceptions are raised
    as an ExceptionGroup, as by the task group of anyio that this is made of.

    Args:
        check: for every tree that does not say otherwise. Default False.
    """

    def __init__(self, *, check: bool = False) -> None:
        self._check = check
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> TreeGroup:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._tasks.__aexit__(kind, value, traceback)

    async def start(self, target: Target, *, check: bool | None = None, **options: Any) -> Process:
        """Starts a tree and returns when its main process runs. While it starts, a cancellation
        ends it.

        Args:
            target: as of `WatchedSubprocess`.
            check: True: the group fails with `TreeFailed` unless the main process exits with status
                0 by itself. Default: as of the group.
            options: as of `open_process`.

        Raises:
            TypeError, ValueError, ContainmentUnavailable, OSError: as `open_process`, and the other
                trees go on.
        """
        wanted = self._check if check is None else check
        process: Process = await self._tasks.start(self._hold, target, wanted, options)
        return process

    async def _hold(
        self,
        target: Target,
        check: bool,
        options: dict[str, Any],
        *,
        task_status: anyio.abc.TaskStatus[Process],
    ) -> None:
        async with open_process(target, **options) as process:
            task_status.started(process)
            outcome = await process.wait()
        if check and not outcome.ok:
            raise TreeFailed(outcome)
