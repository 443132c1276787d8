"""many: two thousand trees in one supervisor, in a process of its own (programs/many_trees.py).

The processes of a tree are its warden and a program that does nothing.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.native import program
from benchmarks.table import Row, below, skipped, times_as_long
from benchmarks.timing import Effort

TREES = 2000
DESCRIPTORS = 6 * TREES
"""Four for each tree, one with which the benchmark sees its end, and some to spare."""

CPU = 0.01
END_SECONDS = 10.0
MEMORY = 20_000
DEADLINE = 900.0

_PROGRAM = Path(__file__).parent / "programs" / "many_trees.py"


class _Way(NamedTuple):
    name: str
    arguments: tuple[str, ...]
    end: str


WAYS = (
    _Way("with output", ("--tail", "4096"), "stop() to all ended"),
    _Way("without", ("--tail", "0", "--now"), "stop_now() to all ended"),
)


def _supervised(way: _Way, steady: float) -> dict[str, float]:
    command = [sys.executable, str(_PROGRAM), program("resting"), "--trees", str(TREES)]
    done = subprocess.run(
        [*command, "--steady", str(steady), *way.arguments],
        stdout=subprocess.PIPE,
        timeout=DEADLINE,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _bare() -> float:
    """Seconds for as many processes that nobody supervises."""
    processes: list[subprocess.Popen[bytes]] = []
    before = time.perf_counter()
    try:
        for _ in range(TREES):
            processes.append(subprocess.Popen([program("resting")]))
        return time.perf_counter() - before
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(effort: Effort) -> Iterator[Row]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        yield skipped("many", f"{DESCRIPTORS} descriptors are needed, the hard limit is {hard}")
        return
    steady = 10.0 if effort.quick else 60.0
    bare = _bare()
    for way in WAYS:
        result = _supervised(way, steady)
        what = f"{TREES}, {way.name}"
        yield times_as_long(f"{what}: ready", result["start"], "Popen", bare, None)
        yield Row(
            f"{what}: CPU in {steady:g} s",
            f"{result['cpu']:.4%}",
            target=f"< {CPU:.0%}",
            met=result["cpu"] < CPU,
        )
        yield Row(
            f"{what}: memory each",
            f"{result['memory'] / 1000:.1f} kB",
            target=f"< {MEMORY / 1000:g} kB",
            met=result["memory"] < MEMORY,
        )
        yield below(f"{TREES}, {way.end}", result["end"], END_SECONDS)
