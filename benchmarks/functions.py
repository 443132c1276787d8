"""functions: from the call that starts a Python function until its first line runs.

Ours: a callable, which is forked from the supervisor; a function in a fresh interpreter; and one
from a template. The peers are multiprocessing's start methods `spawn` and `forkserver`, the latter
with the module preloaded as our template has it. Nothing of the end of the process is measured.

A tree has a warden of its own, which is one more fork and one more exec than forkserver has, and
what runs is known to be supervised before it begins. So it may take twice as long, and no longer
when the supervisor has grown: the module runs once more as a program of its own that holds 2 GB.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import proctree
from benchmarks.start import BALLAST, _available
from benchmarks.table import Row, milliseconds, skipped, times_as_long
from benchmarks.timing import Contender, Effort, medians
from proctree import Function, Template

TEMPLATE = "template"
FRESH = "fresh interpreter"
CALLABLE = "callable"
FORKSERVER = "mp forkserver"
SPAWN = "mp spawn"

NAME = "benchmarks.programs.running:run"
GROWTH = 1.2
BESIDE_FORKSERVER = 2.0


def _ours(target: Callable[[int], object], writer: int) -> Callable[[], object]:
    handle = proctree.WatchedSubprocess.start(
        target(writer),  # type: ignore[arg-type]
        pass_fds=[writer],
        containment="warden",
    )
    return handle.wait


def _peer(method: str, _writer: int, name: str) -> Callable[[], object]:
    from benchmarks.programs import running

    context = multiprocessing.get_context(method)
    process = context.Process(target=running.run_named, args=(name,))
    process.start()
    return process.join


def _contender(start: Callable[[int, str], Callable[[], object]], folder: str) -> Contender:
    """By a FIFO, which multiprocessing's peers can open, for it passes no descriptors."""
    path = os.path.join(folder, f"running-{os.getpid()}")

    def measure() -> float:
        if not os.path.exists(path):
            os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(path, os.O_WRONLY)
        os.set_blocking(reader, True)
        try:
            before = time.perf_counter()
            wait = start(writer, path)
            os.read(reader, 1)
            took = time.perf_counter() - before
            wait()
        finally:
            os.close(reader)
            os.close(writer)
        return took

    return measure


def _measure(rounds: int, folder: str) -> dict[str, float]:
    from benchmarks.programs import running

    multiprocessing.get_context("forkserver").set_forkserver_preload([running.__name__])
    with Template([running.__name__]) as template:
        targets: dict[str, Callable[[int], object]] = {
            TEMPLATE: lambda fd: Function(NAME, (fd,), template=template),
            FRESH: lambda fd: Function(NAME, (fd,)),
            CALLABLE: lambda fd: partial(running.run, fd),
        }
        starts: dict[str, Callable[[int, str], Callable[[], object]]] = {
            name: partial(lambda target, writer, _path: _ours(target, writer), target)
            for name, target in targets.items()
        }
        for name, method in ((FORKSERVER, "forkserver"), (SPAWN, "spawn")):
            starts[name] = partial(_peer, method)
        contenders = {name: _contender(start, folder) for name, start in starts.items()}
        try:
            return medians(contenders, rounds, warm_up=2)
        finally:
            os.unlink(os.path.join(folder, f"running-{os.getpid()}"))


def _in_a_process(ballast: int, rounds: int) -> dict[str, float]:
    # Not with -m: multiprocessing would import that module in every process that it starts, and
    # what it costs is not what is compared here.
    code = f"from benchmarks.functions import main; main({ballast}, {rounds})"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True)
    results: dict[str, float] = json.loads(done.stdout)
    return results


def measure(effort: Effort) -> Iterator[Row]:
    """Small supervisors and large ones."""
    what = "start of a function{}"
    rounds = effort.rounds(60)
    small = _in_a_process(0, rounds)
    ours = small[TEMPLATE]
    limits = {FORKSERVER: BESIDE_FORKSERVER, SPAWN: 1.0, FRESH: None, CALLABLE: None}
    for peer, limit in limits.items():
        yield times_as_long(what.format(", from a template"), ours, peer, small[peer], limit)
    yield times_as_long(what.format(", fresh"), small[FRESH], SPAWN, small[SPAWN], 1.2)
    available = _available()
    if available < BALLAST * 1.3:
        yield skipped(what.format(", 2 GB"), f"{available // 1024**2} MiB of memory available")
        return
    large = _in_a_process(BALLAST, effort.rounds(20))
    for name in (TEMPLATE, FRESH, CALLABLE):
        limit = None if name == CALLABLE else GROWTH
        row = times_as_long(
            f"the same, 2 GB resident, {name}", large[name], "small", small[name], limit
        )
        yield row
    yield Row("the same, 2 GB resident, " + FORKSERVER, milliseconds(large[FORKSERVER]))


def main(ballast: int, rounds: int) -> None:
    import tempfile

    memory = None
    if ballast:
        memory = mmap.mmap(-1, ballast, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Small pages, as Python's own heap has them: it does not ask for huge ones.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, ballast, mmap.PAGESIZE):
            memory[offset] = 1
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_measure(rounds, folder)))
