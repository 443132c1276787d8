"""Trees in event loops: asyncio (uvloop too) and trio, by anyio.

    from proctree import aio

    async with aio.open_process(["make", "test"]) as proc:
        async for line in proc.lines():
            ...
        outcome = await proc.wait()

    outcome = await aio.run(["make", "test"], check=True)

    async with aio.TreeGroup() as group:
        await group.start(["./server"])
        await group.start(["./worker"])

However a block is left, by its end, an exception or a cancellation: its trees have ended then, and
that is proved.
"""

from __future__ import annotations

try:
    import anyio as _anyio  # noqa: F401
except ImportError as error:
    raise ImportError(
        "proctree.aio needs anyio: pip install 'proctree-supervisor[aio]'", name="anyio"
    ) from error

from proctree.aio.group import TreeGroup
from proctree.aio.process import PIPE, Process, open_process, run
from proctree.aio.subscribed import events
from proctree.aio.supervision import supervise

__all__ = ["PIPE", "Process", "TreeGroup", "events", "open_process", "run", "supervise"]
