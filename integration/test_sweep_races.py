"""Who forks and ends while somebody looks for the members of a tree."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proctree.command import TREE_VARIABLE
from proctree.process import sweep

TREE_ID = f"01234567{os.getpid():08x}"


def test_a_parent_that_ends_between_the_list_and_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the middle process of a double fork does. Its child is in no list that was made before."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    parent = subprocess.Popen(
        ["sh", "-c", f"read _ <{fifo}; sleep 1000 & exit 0"],
        env={**os.environ, TREE_VARIABLE: TREE_ID},
        start_new_session=True,
    )
    all_pids = sweep.all_pids
    lists = 0

    def listed_too_early() -> Iterator[int]:
        nonlocal lists
        lists += 1
        pids = list(all_pids())
        if lists == 1:
            assert parent.pid in pids
            fifo.write_text("go\n")
            os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        return iter(pids)

    monkeypatch.setattr(sweep, "all_pids", listed_too_early)
    found = sweep.find(sweep.Search(None, -1, None, 0, TREE_ID))
    for pidfd, _ in found:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    parent.wait()
    # Before it has become `sleep` it is a copy of the shell.
    assert [stat.ppid for _, stat in found] == [os.getpid()]
