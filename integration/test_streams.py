"""Real output: at pipe speed, bounded, and never lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import proctree
from integration.conftest import DEADLINE, QUICK, Lines, eventually
from integration.test_endings import end
from proctree import Capture, Chunks, Cut, Log, WatchedSubprocess

MIB = 1024 * 1024


def test_capture_is_complete(containment: str) -> None:
    script = "import os; [os.write(1, bytes([i % 256]) * 65536) for i in range(160)]"
    outcome = proctree.run(
        [sys.executable, "-S", "-c", script], stdout=proctree.CAPTURE, containment=containment
    )
    assert outcome.stdout == b"".join(bytes([i % 256]) * 65536 for i in range(160))
    assert outcome.stdout_cut is None


def test_capture_is_bounded_and_says_what_is_missing() -> None:
    outcome = proctree.run(
        ["sh", "-c", "printf begin; head -c 10000000 /dev/zero; printf end"],
        stdout=Capture(limit=1000),
    )
    assert outcome.stdout == b"begin" + bytes(495) + bytes(497) + b"end"
    assert outcome.stdout_cut == Cut(offset=500, length=10_000_008 - 1000)


def test_both_streams_apart_and_together() -> None:
    script = ["sh", "-c", "echo out; echo err >&2"]
    apart = proctree.run(script, stdout=proctree.CAPTURE, stderr=proctree.CAPTURE)
    assert (apart.stdout, apart.stderr) == (b"out\n", b"err\n")
    together = proctree.run(script, stdout=proctree.CAPTURE, stderr=proctree.STDOUT)
    assert (together.stdout, together.stderr) == (b"out\nerr\n", None)


def test_to_files(tmp_path: Path) -> None:
    with open(tmp_path / "err", "wb") as err:
        proctree.run(["sh", "-c", "echo out; echo err >&2"], stdout=tmp_path / "out", stderr=err)
    assert (tmp_path / "out").read_text() == "out\n"
    assert (tmp_path / "err").read_text() == "err\n"


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        proctree.run(["true"], stdout=tmp_path / "nowhere" / "out")


def test_stdin(tmp_path: Path, containment: str) -> None:
    data = os.urandom(2 * MIB)
    (tmp_path / "in").write_bytes(data)
    for stdin in (data, tmp_path / "in"):
        outcome = proctree.run(
            ["cat"], stdin=stdin, stdout=proctree.CAPTURE, containment=containment
        )
        assert outcome.stdout == data
    nothing = proctree.run(["cat"], stdin=proctree.DEVNULL, stdout=proctree.CAPTURE)
    assert nothing.stdout == b""


def test_a_program_that_does_not_read_its_stdin() -> None:
    assert proctree.run(["true"], stdin=b"x" * MIB).ok


def test_every_line_in_order(containment: str) -> None:
    lines = Lines()
    proctree.run(["seq", "200000"], stdout=proctree.Lines(lines), containment=containment)
    assert lines.lines == [str(n) for n in range(1, 200001)]


def test_invalid_utf8_and_a_last_line_without_newline() -> None:
    lines = Lines()
    proctree.run(["printf", "a\\377b\\n\\303\\251\\nrest"], stdout=proctree.Lines(lines))
    assert lines.lines == ["a\ufffdb", "é", "rest"]


def test_an_endless_line_does_not_grow_memory() -> None:
    """64 MiB without a newline, in pieces of 64 KiB."""
    seen = {"pieces": 0, "bytes": 0, "longest": 0}

    def on_line(line: str) -> None:
        seen["pieces"] += 1
        seen["bytes"] += len(line)
        seen["longest"] = max(seen["longest"], len(line))

    sink = proctree.Lines(on_line, max_length=65536)
    proctree.run(["sh", "-c", "tr '\\0' x </dev/zero | head -c 67108864"], stdout=sink)
    assert seen == {"pieces": 1024, "bytes": 67108864, "longest": 65536}


def test_a_slow_reader_slows_the_child(containment: str) -> None:
    """Nothing is lost and nothing piles up: the writer waits."""
    go = threading.Event()
    got: list[int] = []

    def slow(data: bytes) -> None:
        go.wait(DEADLINE)
        got.append(len(data))

    script = "import os\nfor i in range(64): os.write(1, b'x' * 65536)"
    handle = WatchedSubprocess.start(
        [sys.executable, "-S", "-c", script], stdout=Chunks(slow), containment=containment
    )
    pid = handle.pid

    def blocked() -> bool:
        try:
            return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
        except OSError:
            return False

    eventually(blocked, "the writer waits for its reader")
    assert handle.outcome is None
    go.set()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert sum(got) == 64 * 65536


def test_a_callback_that_blocks_for_ever_costs_the_drain_time_after_a_kill() -> None:
    never = threading.Event()
    try:
        handle = WatchedSubprocess.start(
            ["sh", "-c", "echo x; exec sleep 1000"],
            stdout=Chunks(lambda _data: never.wait()),
            kill=QUICK,
        )
        outcome = end(handle)
        assert outcome.returncode == -15
    finally:
        never.set()


def test_a_callback_that_blocks_does_not_hold_up_other_trees() -> None:
    never = threading.Event()
    try:
        stuck = WatchedSubprocess.start(
            ["sh", "-c", "echo x; exec sleep 1000"],
            stdout=Chunks(lambda _data: never.wait()),
            kill=QUICK,
        )
        for _ in range(20):
            assert proctree.run(["echo", "fine"], stdout=proctree.CAPTURE).stdout == b"fine\n"
        end(stuck)
    finally:
        never.set()


def test_a_callback_that_raises_is_counted_and_loses_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good: list[str] = []

    def picky(line: str) -> None:
        if line == "2":
            raise ValueError("not 2")
        good.append(line)

    outcome = proctree.run(["seq", "4"], stdout=proctree.Lines(picky))
    assert good == ["1", "3", "4"]
    assert outcome.callback_errors == 1
    assert outcome.ok
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "not 2" in caplog.text


@pytest.fixture
def structlog_unused() -> Iterator[None]:
    """Afterwards: a program that uses it gets our events by it."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("structlog_unused")
def test_to_structlog() -> None:
    with structlog.testing.capture_logs() as logged:
        handle = WatchedSubprocess.start(
            ["sh", "-c", "echo hello; echo trouble >&2"],
            stdout=Log(),
            stderr=Log(level="warning", event="complaint"),
        )
        handle.wait(timeout=DEADLINE)
    common = {"pid": handle.pid, "tree_id": handle.tree_id}
    wanted = [
        {"event": "process.output", "log_level": "info", "line": "hello", "stream": "stdout"},
        {"event": "complaint", "log_level": "warning", "line": "trouble", "stream": "stderr"},
    ]
    for event in wanted:
        assert {**event, **common} in logged


def test_a_finished_tree_waits_for_a_callback_that_takes_its_time() -> None:
    """No deadline as long as nobody wanted it to end: a slow callback loses nothing."""
    turn = threading.Semaphore(0)
    got: list[str] = []

    def slow(line: str) -> None:
        turn.acquire(timeout=DEADLINE)
        got.append(line)

    handle = WatchedSubprocess.start(["seq", "3"], stdout=proctree.Lines(slow), drain_timeout=0.0)
    pid = handle.pid
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the tree has ended")
    assert handle.outcome is None
    for _ in range(3):
        turn.release()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert got == ["1", "2", "3"]
