"""lines: calls a second of a callback for lines of 60 bytes.

The callback is a Python function that counts. The peers call the same function: a loop over the
pipe of a `Popen` in text mode (ours gets `str` too), and processkit's line callback, with as little
kept of the output as it offers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import processkit

import proctree
from benchmarks.native import program
from benchmarks.table import Row
from benchmarks.timing import Contender, Effort, medians, timed

LINE = 60
BLOCK = 64 * 1024
TARGET = 1_000_000
SLOW_PART = 20
"""The part of the lines that is used beside processkit, for which all would take too long."""

OURS = "proctree.Lines"
POPEN = "for line in Popen.stdout"
PROCESSKIT = "processkit on_stdout_line"

Callback = Callable[[str], None]


def _ours(argv: list[str], callback: Callback) -> None:
    proctree.run(argv, stdout=proctree.Lines(callback))


def _popen(argv: list[str], callback: Callback) -> None:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            callback(line)


def _processkit(argv: list[str], callback: Callback) -> None:
    command = processkit.Command(argv[0], argv[1:]).on_stdout_line(callback)
    command.output_limit(max_lines=1, on_overflow="drop_oldest").output()


def _counted(run: Callable[[list[str], Callback], None], blocks: int) -> Contender:
    """Times `run`, which has to call back once for each line."""
    lines = blocks * BLOCK // LINE

    def once() -> None:
        count = 0

        def callback(_line: str) -> None:
            nonlocal count
            count += 1

        run([program("writer"), str(blocks), str(LINE)], callback)
        assert count == lines, f"{count} of {lines} lines"

    return timed(once)


def measure(effort: Effort) -> Iterator[Row]:
    # A multiple of LINE blocks is a whole number of lines.
    blocks = LINE * SLOW_PART * (1 if effort.quick else 2)
    peers = ((POPEN, _popen, blocks), (PROCESSKIT, _processkit, blocks // SLOW_PART))
    what = f"line callbacks, {LINE}-byte lines"
    for peer, run, number in peers:
        lines = number * BLOCK // LINE
        contenders = {OURS: _counted(_ours, number), peer: _counted(run, number)}
        results = medians(contenders, effort.rounds(7))
        ours, theirs = lines / results[OURS], lines / results[peer]
        if peer == POPEN:
            yield Row(what, rate(ours), target=f">= {rate(TARGET)}", met=ours >= TARGET)
        yield Row(what, rate(ours), f"{peer}: {rate(theirs)}", f"{ours / theirs:.2f} x")


def rate(rate: float) -> str:
    return f"{rate / 1e6:.2f} M/s"
