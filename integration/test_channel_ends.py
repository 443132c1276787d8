"""The channel when something ends, or does not read: who waits is told, who comes later too, and
nobody gets what was for one who is gone."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.channel_parts import HANGS_SECONDS, ROOT, run_tree, serve
from integration.conftest import QUICK, Lines, eventually, living, start_supervisor
from proctree import Reason, WatchedSubprocess


@pytest.mark.parametrize("name", ["closed", "closed_in_handler", "forked", "cancelled", "room"])
def test_in_the_tree(name: str) -> None:
    """See channel_ends.py."""
    run_tree("channel_ends", name)


def test_a_supervisor_that_does_not_read_costs_the_tree_no_memory() -> None:
    server, go_on = serve(), threading.Event()

    def stand(_request: Any, _caller: object) -> None:
        go_on.wait(4 * HANGS_SECONDS)

    server.handle("Stand", stand, inline=True)
    lines = Lines()

    def hear(line: str) -> None:
        lines(line)
        if line == "full":
            go_on.set()

    try:
        outcome = proctree.run(
            [sys.executable, "-m", "integration.channel_ends", "bounded"],
            channel=server,
            cwd=ROOT,
            stdout=proctree.Lines(hear),
            timeout=4 * HANGS_SECONDS,
        )
    finally:
        go_on.set()
    assert outcome.returncode == 0
    assert lines.lines == ["full"]


ORPHAN = """
import signal, sys, proctree
from integration.channel_parts import ROOT, serve

proctree.WatchedSubprocess.start(
    [sys.executable, "-m", "integration.channel_ends", "orphaned", sys.argv[1]],
    channel=serve(),
    cwd=ROOT,
    kill=proctree.KillPolicy(stages=(proctree.Stage(15, 60.0), proctree.Stage(9, 10.0))),
)
signal.pause()
"""


def test_the_supervisor_is_killed(tmp_path: Path) -> None:
    """The tree, which has a long grace, is told at once by its channel."""
    told = tmp_path / "told"
    supervisor = start_supervisor(ORPHAN, str(told))
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == "waiting\n"
    supervisor.kill()
    supervisor.stdin.close()
    supervisor.stdout.close()
    supervisor.wait()
    eventually(lambda: told.exists() and told.read_text() == "told", "the tree is told")
    eventually(lambda: not living(), "everything is gone")
    proctree.sweep()


def test_the_tree_is_killed() -> None:
    """In the midst of requests, of which some are never answered. Others are served on."""
    server, lines = serve(), Lines()
    argv = [sys.executable, "-m", "integration.channel_ends", "waiting"]
    handle = WatchedSubprocess.start(
        argv, channel=server, cwd=ROOT, stdout=proctree.Lines(lines), kill=QUICK
    )
    lines.wait_for()
    handle.signal(signal.SIGKILL)
    outcome = handle.wait(HANGS_SECONDS)
    assert outcome is not None
    assert outcome.returncode == -signal.SIGKILL
    assert outcome.reason is Reason.SIGNALED
    assert not living()
    run_tree("channel_ends", "cancelled", server=server)
