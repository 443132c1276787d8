"""aio: trees in an event loop, beside what asyncio has.

Lines of 60 bytes a second, through `async for` here and by `StreamReader.readline` there, and from
the exit of the main process until a task that waits for it knows. In the same kind of event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import uvloop

from benchmarks.lines import BLOCK, LINE, TARGET, rate
from benchmarks.moment import Ended, Moment
from benchmarks.native import program
from benchmarks.table import Row, times_as_long
from benchmarks.timing import Contender, Effort, medians, timed
from proctree import aio

OURS = "proctree.aio"
ASYNCIO = "asyncio"
TRIO = "trio"
UVLOOP = "uvloop"

Main = Callable[..., Coroutine[Any, Any, Any]]


async def _ours(argv: list[str]) -> int:
    count = 0
    async with aio.open_process(argv) as process:
        async for _ in process.lines():
            count += 1
    return count


async def _theirs(argv: list[str]) -> int:
    count = 0
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    while await process.stdout.readline():
        count += 1
    await process.wait()
    return count


def _counted(run: Callable[[Main, list[str]], int], main: Main, blocks: int) -> Contender:
    argv = [program("writer"), str(blocks), str(LINE)]

    def once() -> None:
        count = run(main, argv)
        assert count == blocks * BLOCK // LINE, count

    return timed(once)


def _lines(effort: Effort) -> Iterator[Row]:
    blocks = LINE * (4 if effort.quick else 8)
    number = blocks * BLOCK // LINE
    what = f"lines by async for, {LINE}-byte lines"
    in_asyncio = lambda main, argv: asyncio.run(main(argv))  # noqa: E731
    in_uvloop = lambda main, argv: uvloop.run(main(argv))  # noqa: E731
    for name, run in ((ASYNCIO, in_asyncio), (UVLOOP, in_uvloop)):
        contenders = {OURS: _counted(run, _ours, blocks), name: _counted(run, _theirs, blocks)}
        results = medians(contenders, effort.rounds(7))
        ours, theirs = number / results[OURS], number / results[name]
        if name == ASYNCIO:
            yield Row(what, rate(ours), target=f">= {rate(TARGET)}", met=ours >= TARGET)
        peer = f"{name} readline: {rate(theirs)}"
        yield Row(what, rate(ours), peer, f"{ours / theirs:.2f} x")
    in_trio = lambda main, argv: anyio.run(main, argv, backend="trio")  # noqa: E731
    results = medians({TRIO: _counted(in_trio, _ours, blocks)}, effort.rounds(7))
    yield Row(f"{what}, in trio", rate(number / results[TRIO]))


def _exit(effort: Effort) -> Iterator[Row]:
    moment = Moment()

    async def ours() -> Ended:
        async with aio.open_process(moment.argv, stdout=None) as process:
            began = time.monotonic()
            await process.wait()
            return began, time.monotonic()

    async def theirs() -> Ended:
        process = await asyncio.create_subprocess_exec(*moment.argv)
        began = time.monotonic()
        await process.wait()
        return began, time.monotonic()

    with asyncio.Runner() as runner:
        contenders = {
            OURS: moment.after(lambda: runner.run(ours())),
            ASYNCIO: moment.after(lambda: runner.run(theirs())),
        }
        results = medians(contenders, effort.rounds(200), warm_up=3)
    what = "exit to await wait() returning"
    yield times_as_long(what, results[OURS], ASYNCIO, results[ASYNCIO], None)


def measure(effort: Effort) -> Iterator[Row]:
    yield from _lines(effort)
    yield from _exit(effort)
