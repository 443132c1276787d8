"""A supervisor is killed at any system call, and the next one goes on: the work is done once.

By default every system call boundary of a start and of a reconnection is tried, and a sample in the
other scenarios; with the environment variable PROCTREE_CRASH_POINTS=all it is every one in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from integration import crash_points, durable_parts
from integration.conftest import available
from integration.crash_points import Zygote

SAMPLES = {
    "start": 0,
    "reconnect": 0,
    "run": 30,
    "finish": 25,
    "reconnect while it finishes": 25,
    "reconnect after it finished": 25,
    "failing attempt, then retry": 30,
}
"""How many points are tried by default; 0: all."""

LEAST = 0.5
"""Of the points how many have to be reached: how often the threads of a supervisor meet, and so how
many calls they make, differs from run to run."""

BOTH_SAMPLE = 8
"""The same for the supervisor and its warden."""

ZYGOTES = 2
"""Each tries one point at a time."""


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = crash_points.build(str(tmp_path_factory.mktemp("tracer")))
    if reason := crash_points.unavailable(path):
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Zygote]]:
    made = []
    for _ in range(ZYGOTES):
        folder = tmp_path_factory.mktemp("runtime")
        made.append(Zygote(durable_parts.__name__, XDG_RUNTIME_DIR=str(folder)))
        made[-1].call(durable_parts.learn, str(folder))
    yield made
    for zygote in made:
        zygote.close()


def each(
    zygotes: list[Zygote], function: Callable[..., Any], points: list[tuple[Any, ...]]
) -> list[Any]:
    """`function` for each point, in as many zygotes as there are."""
    waiting = list(reversed(points))
    done: list[Any] = []

    def work(zygote: Zygote) -> None:
        while waiting:
            point = waiting.pop()
            try:
                done.append((point, zygote.call(function, *point)))
            except crash_points.Trouble as trouble:
                done.append((point, {"wrong": [str(trouble)], "calls": 0, "killed": True}))

    with ThreadPoolExecutor(len(zygotes)) as threads:
        list(threads.map(work, zygotes))
    return sorted(done, key=lambda point: point[0])


def spread(count: int, sample: int) -> list[int]:
    """That many numbers from 1 to `count`, the ends among them; 0: all."""
    if sample == 0 or sample >= count or os.environ.get("PROCTREE_CRASH_POINTS") == "all":
        return list(range(1, count + 1))
    return sorted({1 + index * (count - 1) // (sample - 1) for index in range(sample)})


def failures(tried: list[Any]) -> str:
    names = crash_points.names()
    return "\n".join(
        f"{point[2:]} ({names.get(got.get('number'), 'no call')} of {got['calls']}): {wrong}"
        for point, got in tried
        for wrong in got["wrong"]
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", durable_parts.SCENARIOS)
def test_supervisor_killed_at_any_system_call(
    zygotes: list[Zygote],
    tracer: str,
    folder: str,
    scenario: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The result, one side effect, all output, nothing left: whatever the moment was."""
    whole = each(zygotes, durable_parts.crash, [(tracer, folder, scenario, 0)] * 2)
    assert not failures(whole)
    # How many calls there are differs a little from run to run: the threads meet differently.
    count = min(got["calls"] for _, got in whole)
    points = spread(count, SAMPLES[scenario])
    tried = each(zygotes, durable_parts.crash, [(tracer, folder, scenario, nth) for nth in points])
    record_property("points", len(tried))
    assert not failures(tried), f"{scenario}:\n{failures(tried)}"
    killed = sum(got["killed"] for _, got in tried)
    print(f"{scenario}: {killed} of {len(points)} points, of about {count}")
    assert killed >= LEAST * len(points), f"only {killed} of {len(points)} were reached"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("containment", ["warden", "cgroup", "pidns"])
@pytest.mark.parametrize("scenario", ["start", "finish"])
def test_supervisor_and_warden_killed_together(
    zygotes: list[Zygote], tracer: str, folder: str, containment: str, scenario: str
) -> None:
    """Nobody knows how it ended, and so there is another attempt: not before the last process of
    the first one is gone, one that ignores SIGTERM in a session of its own included."""
    available(containment)

    def crash(points: list[int]) -> list[Any]:
        arguments = [(tracer, folder, containment, scenario, nth) for nth in points]
        return each(zygotes, durable_parts.crash_both, arguments)

    whole = crash([0])
    assert not failures(whole)
    points = spread(whole[0][1]["calls"], BOTH_SAMPLE)
    tried = crash(points)
    assert not failures(tried), f"{scenario}, {containment}:\n{failures(tried)}"
    killed = [got for _, got in tried if got["killed"]]
    print(f"{scenario}, {containment}: {len(killed)} of {len(points)} points")
    assert any(got["attempts"] > 1 for got in killed), "no attempt was ever lost"
