"""What somebody outside the tree has a hand in: a zombie that its tracer holds, a member in a
freezer, a member that was moved out of its cgroup."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import available, eventually, is_alive, living
from integration.fault_tools import Freezer, Helper, cgroup_mount, leaves_of, state_of, warden_of
from integration.test_endings import end, start
from proctree import KillPolicy, Reason, run, sweep


@pytest.fixture(params=["pidns", "cgroup", "warden"])
def with_warden(request: pytest.FixtureRequest) -> str:
    return available(str(request.param))


@pytest.fixture
def tracers(actors: str) -> Iterator[list[Helper]]:
    helpers: list[Helper] = []
    yield helpers
    for helper in helpers:
        helper.close()


def trace(actors: str, pid: int, tracers: list[Helper]) -> Helper:
    tracers.append(Helper([actors, "trace", str(pid)], b"tracing\n"))
    return tracers[-1]


def test_a_traced_warden_is_not_waited_for(
    actors: str, with_warden: str, tracers: list[Helper]
) -> None:
    """It says that the tree is empty and ends; only the tracer can take its zombie away."""
    handle, lines = start([actors, "pause"], with_warden)
    lines.wait_for()
    warden = warden_of(os.getpid())
    tracer = trace(actors, warden, tracers)
    outcome = end(handle)
    assert (outcome.reason, outcome.returncode) == (Reason.KILLED, -15)
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM]
    eventually(lambda: state_of(warden) == "Z", "the warden ends")
    # Its pidfd is readable and goes on being so: whoever waited for that would never rest.
    before = time.process_time()
    time.sleep(0.5)  # the span that is measured
    assert time.process_time() - before < 0.25
    assert run(["true"], containment=with_warden).ok
    tracer.close()
    eventually(lambda: not os.path.exists(f"/proc/{warden}"), "it is reaped")


def test_a_status_that_comes_by_way_of_a_tracer(
    actors: str, containment: str, tracers: list[Helper]
) -> None:
    """The main process has ended, its pidfd says so, and its status cannot be had yet."""
    reader, writer = os.pipe()
    handle, lines = start([actors, "exits"], containment, stdin=reader)
    os.close(reader)
    lines.wait_for()
    main = handle.pid or 0
    tracer = trace(actors, main, tracers)
    os.close(writer)
    eventually(lambda: state_of(main) == "Z", "the main process exits")
    assert handle.outcome is None
    assert run(["true"], containment=containment).ok
    tracer.close()
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 7)
    assert not living()


@pytest.mark.skipif(Freezer.unavailable() is not None, reason=str(Freezer.unavailable()))
def test_a_survivor_without_marks_is_reported_when_the_warden_is_gone(actors: str) -> None:
    """The cgroup knows of it, and nothing else does."""
    script = f"env -i {actors} daemonise; exec {actors} ignore"
    handle, lines = start(["sh", "-c", script], available("cgroup"))
    daemon = int(lines.wait_for(2)[0])
    freezer = Freezer(daemon)
    try:
        os.kill(warden_of(os.getpid()), signal.SIGKILL)
        outcome = handle.wait(timeout=60)
        assert outcome is not None
        assert outcome.reason is Reason.WARDEN_LOST
        (survivor,) = outcome.survivors
        assert (survivor.pid, survivor.state) == (daemon, "D")
        assert not is_alive(outcome.pid or 0)
        freezer.thaw()
        eventually(lambda: not living(), "it ends when it thaws")
        # It is on record, so that its cgroup is not forgotten.
        assert leaves_of(handle.tree_id)
        assert sweep() == []
        assert not leaves_of(handle.tree_id)
    finally:
        freezer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may move it anywhere")
@pytest.mark.parametrize("killing", [False, True], ids=["before", "while-killing"])
def test_a_member_that_was_moved_out_of_its_cgroup(actors: str, killing: bool) -> None:
    """It still descends from the warden."""
    script = f"setsid {actors} ignore & exec {actors} deaf"
    handle, lines = start(["sh", "-c", script], available("cgroup"))
    lines.wait_for(2)
    (child,) = (info.pid for info in handle.processes() if info.pid != handle.pid)
    mount = cgroup_mount("cgroup2")
    assert mount is not None
    assert handle.tree_id in Path(f"/proc/{child}/cgroup").read_text()
    if killing:
        handle.kill(KillPolicy.after(600.0))
        lines.wait_for(3)
    (mount / "cgroup.procs").write_text(str(child))
    assert handle.tree_id not in Path(f"/proc/{child}/cgroup").read_text()
    outcome = end(handle, KillPolicy.now())
    assert outcome.survivors == ()
    assert not living()
    assert not leaves_of(handle.tree_id)
