"""What is asked of a pseudo-terminal: bad input by name, sizes, and what goes with it."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest

import proctree
from proctree import CAPTURE, DEVNULL, STDOUT, Chunks, WatchedSubprocess
from proctree.terminal import WindowSize, make, to_window

BAD_SIZES: list[tuple[Any, type[Exception], str]] = [
    ((0, 80), ValueError, "^pty: rows must be 1 to 65535, not 0"),
    ((24, 0), ValueError, "^pty: columns must be 1 to 65535, not 0"),
    ((-1, 80), ValueError, "^pty: rows .*-1"),
    ((24, 65536), ValueError, "^pty: columns .*65536"),
    ((24.0, 80), TypeError, r"^pty: rows .*24\.0"),
    ((24, "80"), TypeError, "^pty: columns .*'80'"),
    ((True, 80), TypeError, "^pty: rows .*True"),
    ((None, None), TypeError, "^pty: rows .*None"),
    ((24,), TypeError, r"^pty: True, or \(rows, columns\), not \(24,\)"),
    ((24, 80, 1), TypeError, "^pty: True, or"),
    ((), TypeError, "^pty: True, or"),
    (1, TypeError, "^pty: True, or"),
    (0, TypeError, "^pty: True, or"),
    ("24x80", TypeError, "^pty: True, or"),
    ({24, 80}, TypeError, "^pty: True, or"),
]


@pytest.mark.parametrize(("size", "error", "text"), BAD_SIZES, ids=str)
def test_a_bad_size_is_refused(size: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        WatchedSubprocess(["true"], pty=size, stdout=CAPTURE)


READ_BY_NOBODY = "^stdout: with a pty, say what becomes of the terminal's output"

BAD_COMPANY: list[tuple[dict[str, Any], str]] = [
    ({}, READ_BY_NOBODY),
    ({"stdout": DEVNULL}, READ_BY_NOBODY),
    ({"stdout": 1}, READ_BY_NOBODY),
    ({"stdout": pathlib.Path("/nowhere/at/all")}, READ_BY_NOBODY),
    ({"stdout": CAPTURE, "stdin": DEVNULL}, "^stdin: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "stdin": 0}, "^stdin: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "stdin": pathlib.Path("/dev/null")}, "^stdin: with a pty"),
    ({"stdout": CAPTURE, "stderr": CAPTURE}, "^stderr: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "stderr": DEVNULL}, "^stderr: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "stderr": 2}, "^stderr: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "stderr": Chunks(print)}, "^stderr: with a pty it is the terminal"),
    ({"stdout": CAPTURE, "new_session": False}, "^new_session: a pty is the terminal of a session"),
]


@pytest.mark.parametrize(("options", "text"), BAD_COMPANY, ids=lambda value: str(value)[:60])
def test_what_a_terminal_leaves_no_room_for(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        WatchedSubprocess(["true"], pty=True, **options)


@pytest.mark.parametrize("pty", [False, None])
def test_none_is_none(pty: Any) -> None:
    handle = WatchedSubprocess(["true"], pty=pty, stdin=DEVNULL, stderr=CAPTURE)
    assert handle.terminal is None
    handle.kill()
    handle.wait()


def test_stderr_may_be_said_to_be_the_terminal() -> None:
    outcome = proctree.run(["sh", "-c", "echo x >&2"], pty=True, stdout=CAPTURE, stderr=STDOUT)
    assert (outcome.stdout, outcome.stderr) == (b"x\r\n", None)


def test_a_tree_that_never_runs_opens_no_terminal() -> None:
    handle = WatchedSubprocess(["true"], pty=(1, 1), stdout=CAPTURE)
    assert handle.terminal is None
    handle.kill()
    assert handle.wait() is not None
    assert handle.terminal is None


def test_sizes() -> None:
    assert to_window((1, 65535)) == WindowSize(rows=1, columns=65535)
    assert to_window([50, 132]) == (50, 132)
    assert to_window(None) is None


def test_without_a_terminal_of_ours_it_is_the_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """For True it is the size of our own, where there is one."""
    monkeypatch.delenv("COLUMNS", raising=False)
    reader, writer = os.pipe()
    saved = os.dup(1)
    try:
        os.dup2(writer, 1)
        assert to_window(True) == (24, 80)
        ours, theirs = make(WindowSize(33, 44))
        os.dup2(theirs, 1)
        os.close(theirs)
        assert to_window(True) == (33, 44)
        os.close(ours)
    finally:
        os.dup2(saved, 1)
        for fd in (saved, reader, writer):
            os.close(fd)


def test_both_ends_are_above_the_standard_streams_and_not_inherited() -> None:
    saved = os.dup(0)
    os.close(0)  # the lowest free number is what a new descriptor gets
    try:
        ends = make(WindowSize(2, 3))
        assert all(end > 2 and not os.get_inheritable(end) for end in ends)
        assert os.get_terminal_size(ends[1]) == (3, 2)
        for end in ends:
            os.close(end)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.mark.parametrize(
    ("rows", "columns", "error"),
    [(0, 80, ValueError), (24, 70000, ValueError), (1.5, 2, TypeError)],
)
def test_a_bad_size_for_a_running_one(rows: Any, columns: Any, error: type[Exception]) -> None:
    with WatchedSubprocess.start(["sleep", "1000"], pty=True, stdout=CAPTURE) as handle:
        assert handle.terminal is not None
        with pytest.raises(error, match=r"^pty: "):
            handle.terminal.resize(rows, columns)
