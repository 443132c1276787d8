"""Moments in which something happens to the warden while something else is under way."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from integration.conftest import DEADLINE, eventually, is_alive
from integration.test_warden_faults import warden_of
from proctree import KillPolicy, ProctreeError, Reason, Stage, State, WatchedSubprocess, loop
from proctree.containment.warden import WARDEN_VARIABLE
from proctree.process import proof


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", "it is stopped")


def state_of(pid: int) -> str | None:
    stat = proof.read_stat(pid)
    return None if stat is None else stat.state


def until_said() -> None:
    """Returns when everything that was asked for has been sent: the loop takes jobs in order."""
    done = threading.Event()
    loop.get().post(done.set)
    assert done.wait(DEADLINE)


# What one side says while the other side ends: a unix socket answers that with an error
# (ECONNRESET), ahead of everything that was said before and has not been read yet.


def test_a_command_that_the_warden_leaves_unread_does_not_lose_it(tmp_path: Path) -> None:
    """Its last messages, with the exit status and the proof, are there all the same."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handle = WatchedSubprocess.start(["sh", "-c", f"read _ <{fifo}; exit 5"], containment="warden")
    warden, main = warden_of(handle), handle.pid
    assert main is not None
    stop(warden)
    fifo.write_text("go\n")
    eventually(lambda: state_of(main) == "Z", "the main process has ended")
    handle.thaw()
    until_said()
    # It sees first that its last child has ended, and is through.
    os.kill(warden, signal.SIGCONT)
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 5)
    assert outcome.usage.max_rss > 0


def test_an_answer_that_the_supervisor_leaves_unread_does_not_end_what_is_left(
    tmp_path: Path,
) -> None:
    """RELEASE is there all the same: leftovers that may stay do stay."""
    fifo, copy = tmp_path / "fifo", tmp_path / "copy"
    os.mkfifo(fifo)
    os.mkfifo(copy)
    script = f"cat {copy} & read _ <{fifo}; exit 0"
    handle = WatchedSubprocess.start(
        ["sh", "-c", script], containment="warden", leftovers="leave", stdin=-3
    )
    warden, main = warden_of(handle), handle.pid
    assert main is not None
    writer = os.open(copy, os.O_WRONLY)  # opens when cat has opened it
    stop(warden)
    fifo.write_text("go\n")
    eventually(lambda: state_of(main) == "Z", "the main process has ended")
    handle.signal(signal.SIGCONT, "main")
    until_said()
    standing, go_on = threading.Event(), threading.Event()
    loop.get().post(lambda: standing.set() or go_on.wait(DEADLINE))
    assert standing.wait(DEADLINE)
    os.kill(warden, signal.SIGCONT)
    eventually(
        lambda: state_of(main) is None and state_of(warden) == "S",
        "it has told the end of the main process, and then answered",
    )
    stop(warden)  # so that it reads RELEASE when the other end has been closed
    go_on.set()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    (left,) = outcome.leftovers
    os.kill(warden, signal.SIGCONT)
    eventually(lambda: state_of(warden) is None, "the warden is through")
    assert is_alive(left.pid)
    os.close(writer)
    eventually(lambda: not is_alive(left.pid), "it ends by itself")


def test_killed_while_the_warden_does_not_start_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`launch` must not return as if the main process ran."""
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 1000\n")
    mute.chmod(0o755)
    monkeypatch.setenv(WARDEN_VARIABLE, str(mute))
    handle = WatchedSubprocess(["true"], containment="warden")
    killed: list[Exception] = []

    def launch() -> None:
        try:
            handle.launch()
        except ProctreeError as error:
            killed.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    eventually(lambda: handle.state is State.STARTING, "it is starting")
    handle.kill(KillPolicy((Stage(signal.SIGKILL, 0.1),)), reason="changed our mind")
    thread.join(DEADLINE)
    assert "killed before it had started" in str(killed)
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode, outcome.pid) == (Reason.KILLED, None, None)
