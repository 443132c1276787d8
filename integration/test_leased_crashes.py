"""The supervisor of a key that is held in a database is killed at any system call, and the next one
goes on, on the same machine or on another one.

By default a sample is tried; with the environment variable PROCTREE_CRASH_POINTS=all it is every
system call boundary on the same machine, and a larger sample on another one, where each costs a
lease.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration import crash_points, leased_parts
from integration.crash_points import LEAST, Zygote, each, failures, spread

SAMPLES = {"start": 16, "run": 20, "finish": 16, "reconnect": 12}
"""How many points are tried by default."""

ELSEWHERE = 40 if os.environ.get("PROCTREE_CRASH_POINTS") == "all" else 3
"""The same for a retry on another machine."""


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = crash_points.build(str(tmp_path_factory.mktemp("tracer")))
    if reason := crash_points.unavailable(path):
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Zygote]]:
    with crash_points.zygotes(leased_parts, tmp_path_factory.mktemp("zygotes")) as made:
        yield made


Crash = Callable[..., dict[str, object]]


def try_points(
    zygotes: list[Zygote], crash: Crash, scenario: str, places: tuple[str, str], points: list[int]
) -> None:
    tried = each(zygotes, crash, [(*places, scenario, nth) for nth in points])
    assert not failures(tried), f"{scenario}:\n{failures(tried)}"
    killed = sum(got["killed"] for _, got in tried)
    print(f"{scenario}: {killed} of {len(points)} points")
    assert killed >= LEAST * len(points), f"only {killed} of {len(points)} were reached"


def count_calls(zygotes: list[Zygote], crash: Crash, scenario: str, places: tuple[str, str]) -> int:
    """How many there are differs from run to run: the threads meet differently."""
    whole = each(zygotes, crash, [(*places, scenario, 0)] * 2)
    assert not failures(whole), failures(whole)
    return int(min(got["calls"] for _, got in whole))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", leased_parts.SCENARIOS)
def test_supervisor_killed_and_the_retry_is_on_the_same_machine(
    zygotes: list[Zygote], tracer: str, tmp_path: Path, scenario: str
) -> None:
    """The result, one side effect, all output, nothing left, in the database what is recorded
    here, and no lease is waited out: whatever the moment was."""
    places = (tracer, str(tmp_path))
    count = count_calls(zygotes, leased_parts.crash, scenario, places)
    points = spread(count, SAMPLES[scenario])
    try_points(zygotes, leased_parts.crash, scenario, places, points)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", leased_parts.SCENARIOS)
def test_supervisor_killed_and_the_retry_is_on_another_machine(
    zygotes: list[Zygote], tracer: str, tmp_path: Path, scenario: str
) -> None:
    """It is done, and never by two at once: what was left here is dead when its lease is over."""
    places = (tracer, str(tmp_path))
    count = count_calls(zygotes, leased_parts.crash_elsewhere, scenario, places)
    points = sorted({1 + index * (count - 1) // (ELSEWHERE - 1) for index in range(ELSEWHERE)})
    try_points(zygotes, leased_parts.crash_elsewhere, scenario, places, points)
