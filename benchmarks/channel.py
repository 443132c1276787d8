"""channel: requests a second, beside Airflow's task SDK and beside bare bytes.

Everybody asks the same cheap server in a process of its own (programs/channel_echo.py) for the same
typed messages, and the contenders take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import airflow_venvs
from benchmarks.table import Row, as_much, milliseconds, skipped
from benchmarks.timing import Effort

PROGRAMS = Path(__file__).parent / "programs"
MESSAGE = 40
"""Bytes to and fro, for the bare ones: about as many as a request has."""
SECONDS = 0.3
"""Of one turn. How long it takes to wake the other side changes by the minute, so there are many
short turns."""
DELAY = 0.002

RAW = f"raw:{MESSAGE}"
PAIRS: tuple[tuple[str, str, str, str, float], ...] = (
    ("sync, 1 thread", "request:1", RAW, "bare bytes", 0.8),
    ("sync, 1 thread", "request:1", "send:1", "CommsDecoder.send", 1.3),
    ("sync, 16 threads", "request:16", "send:16", "CommsDecoder.send", 3.0),
    ("asyncio, 1 task", "arequest:1", "trigger:1", "TriggerCommsDecoder.asend", 1.2),
    ("asyncio, 100 tasks", "arequest:100", "trigger:100", "TriggerCommsDecoder.asend", 1.5),
)
"""What, ours, the peer, what that is, and how many times as many requests a second are promised."""

LEAST_DELAYED = 6500.0
"""Requests a second of 16 threads from a server that takes 2 ms for each; the limit is 8000."""
DELAYED_RATIO = 1.2
LONGEST = 0.005
"""Seconds that one of a hundred requests may take while 16 threads flood the channel."""


class Contender:
    """A program that measures shapes, one at a time, when it is told to."""

    def __init__(self, stack: ExitStack, python: str, program: str, *arguments: str) -> None:
        command = [python, str(PROGRAMS / program), "--seconds", str(SECONDS), *arguments]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    def measure(self, shape: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(shape + "\n")
        stdin.flush()
        result: dict[str, Any] = json.loads(stdout.readline())
        return result


def _medians(turns: list[tuple[Contender, str]], rounds: int, key: str = "rate") -> list[float]:
    results: list[list[float]] = [[] for _ in turns]
    for _ in range(rounds):
        for values, (contender, shape) in zip(results, turns, strict=True):
            values.append(contender.measure(shape)[key])
    return [statistics.median(values) for values in results]


def _rate(rate: float) -> str:
    return f"{rate / 1e3:.1f} k/s"


def measure(effort: Effort) -> Iterator[Row]:
    try:
        python = airflow_venvs.python(airflow_venvs.CURRENT)
    except subprocess.CalledProcessError as error:
        yield skipped("channel", f"Airflow cannot be installed: {error}")
        return
    rounds = effort.rounds(15)
    with ExitStack() as stack:
        ours = Contender(stack, sys.executable, "proctree_channel.py")
        peer = Contender(stack, python, "airflow_channel.py")
        for what, shape, other, name, least in PAIRS:
            beside = ours if other == RAW else peer
            mine, theirs = _medians([(ours, shape), (beside, other)], rounds)
            yield as_much(f"requests, {what}", mine, name, theirs, least, _rate)
        yield from _measure_delayed(stack, python, rounds)
        (longest,) = _medians([(ours, "flooded:16")], rounds, "p99")
        yield Row(
            "p99 of a request, 16 threads flood",
            milliseconds(longest),
            target=f"<= {milliseconds(LONGEST)}",
            met=longest <= LONGEST,
        )


def _measure_delayed(stack: ExitStack, python: str, rounds: int) -> Iterator[Row]:
    delay = ("--delay", str(DELAY))
    ours = Contender(stack, sys.executable, "proctree_channel.py", *delay)
    peer = Contender(stack, python, "airflow_channel.py", *delay)
    mine, theirs = _medians([(ours, "request:16"), (peer, "send:16")], rounds)
    yield Row(
        "requests, 16 threads, 2 ms each",
        _rate(mine),
        f"CommsDecoder.send: {_rate(theirs)}",
        f"{mine / theirs:.2f} x",
        f">= {_rate(LEAST_DELAYED)}",
        mine >= LEAST_DELAYED,
    )
    mine, theirs = _medians([(ours, "arequest:100"), (peer, "trigger:100")], rounds)
    what = "requests, 100 tasks, 2 ms each"
    yield as_much(what, mine, "TriggerCommsDecoder.asend", theirs, DELAYED_RATIO, _rate)
