"""The output of a durable tree: files that it writes, and readers that come and go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, Lines
from proctree import command, containment, loop, records
from proctree.durable import following
from proctree.durable.following import Followed
from proctree.policy import Leftovers
from proctree.tree import Tree


class Run:
    """A tree whose output goes to files, as a durable run makes it."""

    def __init__(
        self, argv: list[str], place: Path, logs: Any, stdin: Any = proctree.DEVNULL, **options: Any
    ) -> None:
        tree_id = os.urandom(8).hex()
        checked = command.check(
            argv,
            cwd=None,
            env=None,
            name=None,
            pass_fds=(),
            tree_id=tree_id,
            attributes=None,
            terminal=False,
            new_session=True,
        )
        self.streams = Followed(stdin, logs, str(place), writes=True, **options)
        wanted = containment.base.Wanted()
        contained = containment.choose("auto", wanted)(tree_id, wanted)
        self.tree = Tree(
            tree_id, checked, contained, self.streams, QUICK, Leftovers.KILL, None, 0.5
        )

    def start(self) -> Run:
        self.tree.launch(loop.get())
        self.tree.started.wait()
        assert self.tree.start_error is None, self.tree.start_error
        return self

    def wait(self) -> records.Ending:
        assert self.tree.closed.wait(DEADLINE)
        assert self.tree.ending is not None
        return self.tree.ending

    def kill(self) -> None:
        self.tree.kill(loop.get(), records.Reason.KILLED, "test", None)
        self.tree.closed.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(argv: list[str], logs: Any, **options: Any) -> Run:
        runs.append(Run(argv, tmp_path, logs, **options))
        return runs[-1].start()

    yield start
    for run in runs:
        run.kill()


def test_lines_of_both_streams_and_the_files(start: Callable[..., Run], tmp_path: Path) -> None:
    out, err = Lines(), Lines()
    logs = (proctree.Lines(out), proctree.Lines(err))
    ending = start(["sh", "-c", "echo one; echo two >&2; printf three"], logs).wait()
    assert ending.returncode == 0
    assert (out.lines, err.lines) == (["one", "three"], ["two"])
    assert (tmp_path / "out.log").read_bytes() == b"one\nthree"
    assert (tmp_path / "err.log").read_bytes() == b"two\n"
    again = Lines()
    assert (
        following.deliver(str(tmp_path), proctree.Lines(again), tree_id="x") == ((None, None),) * 2
    )
    assert again.lines == []
    captured = following.deliver(str(tmp_path), proctree.CAPTURE, tree_id="x")
    assert captured == ((b"one\nthree", None), (b"two\n", None))
