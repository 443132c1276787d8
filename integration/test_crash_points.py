"""The tracer behind test_durable_crashes.py: it kills where it says, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import crash_points
from integration.crash_points import Zygote


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = crash_points.build(str(tmp_path_factory.mktemp("tracer")))
    if reason := crash_points.unavailable(path):
        pytest.skip(reason)
    return path


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote(__name__)
    yield made
    made.close()


def write_two(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with crash_points.window():
        os.write(fd, b"1")
        os.write(fd, b"2")
    os.write(fd, b"3")


def crash_writing(tracer: str, path: str, nth: int) -> list[object]:
    """What was written, and how that ended."""
    done = crash_points.traced(tracer, nth, write_two, path)
    crash_points.settle()
    return [Path(path).read_text(), done.ended.status, [call.number for call in done.calls]]


def test_the_call_is_not_executed_any_more(tracer: str, zygote: Zygote, tmp_path: Path) -> None:
    numbers = {name: number for number, name in crash_points.names().items()}
    write = numbers["write"]
    for nth, text, status in ((0, "123", 0), (1, "", -9), (2, "1", -9), (3, "123", 0)):
        got = zygote.call(crash_writing, tracer, str(tmp_path / str(nth)), nth)
        assert got == [text, status, [write] * (min(nth, 2) or 2)]


def with_children(path: str) -> int:
    """Children by every way there is; each counts for as much as it calls, and that is a lot."""
    busy = ["sh", "-c", "while [ $((i += 1)) -lt 300 ]; do : < /dev/null; done; : > $0"]
    with crash_points.window():
        subprocess.run([*busy, f"{path}.vfork"], check=True)
        # Rules out vfork(2).
        subprocess.run([*busy, f"{path}.fork"], check=True, preexec_fn=os.getpid)
        pid = os.posix_spawnp("sh", [*busy, f"{path}.spawn"], os.environ)
        os.waitpid(pid, 0)
    return 7


def crash_with_children(tracer: str, path: str) -> list[object]:
    done = crash_points.traced(tracer, 0, with_children, path)
    crash_points.settle()
    return [done.ended.value(), len(done.calls)]


def test_children_are_not_traced(tracer: str, zygote: Zygote, tmp_path: Path) -> None:
    value, calls = zygote.call(crash_with_children, tracer, str(tmp_path / "child"))
    assert value == 7
    assert calls < 300, "a child's calls were counted"
    assert sorted(os.listdir(tmp_path)) == ["child.fork", "child.spawn", "child.vfork"]


def in_threads(path: str) -> None:
    with crash_points.window():
        thread = threading.Thread(target=lambda: os.stat("/"))
        thread.start()
        thread.join()
        Path(path).touch()


def crash_threads(tracer: str, path: str) -> list[list[object]]:
    """For each call which thread made it, and whether the end came there."""
    count = len(crash_points.traced(tracer, 0, in_threads, path).calls)
    os.unlink(path)
    tried = [crash_points.traced(tracer, nth + 1, in_threads, path) for nth in range(count // 2)]
    crash_points.settle()
    return [[done.calls[-1].thread, done.ended.status, os.path.exists(path)] for done in tried]


def test_threads_are_traced_and_all_are_killed(tracer: str, zygote: Zygote, tmp_path: Path) -> None:
    tried = zygote.call(crash_threads, tracer, str(tmp_path / "file"))
    assert {thread for thread, _, _ in tried} == {0, 1}
    assert {status for _, status, _ in tried} == {-signal.SIGKILL}
    assert not any(exists for _, _, exists in tried)


def leave_one() -> None:
    subprocess.Popen(["sleep", "600"])


def notice_what_is_left() -> str:
    crash_points.forked(leave_one)
    crash_points.DEADLINE = 0.2
    try:
        crash_points.settle()
    except crash_points.Trouble as trouble:
        return str(trouble)
    return ""


def test_what_is_left_is_noticed(zygote: Zygote) -> None:
    assert "sleep 600" in zygote.call(notice_what_is_left)
