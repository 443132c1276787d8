"""A supervisor is killed at any system call, and the next one goes on: the work is done once.

By default every system call boundary of a start and of a reconnection is tried, and a sample in the
other scenarios; with the environment variable PROCTREE_CRASH_POINTS=all it is every one in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration import crash_points, durable_parts
from integration.conftest import available
from integration.crash_points import LEAST, Zygote, each, failures, spread

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

BOTH_SAMPLE = 8
"""The same for the supervisor and its warden."""


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
    with crash_points.zygotes(durable_parts, tmp_path_factory.mktemp("zygotes")) as made:
        yield made


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
