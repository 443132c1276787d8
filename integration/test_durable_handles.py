"""Handles of durable runs: what they cost, whose outcome they answer, and what an interrupt does to
them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import DEADLINE
from proctree import KillPolicy, durable
from proctree.durable import FileStore, Run

SLEEPER = ["sleep", "1000"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    made = FileStore(tmp_path / "store")
    yield made
    for listed in durable.list(made):
        if listed.claimed:
            durable.cancel(listed.key, store=made)


def end(run: Run) -> None:
    run.kill(KillPolicy.now())
    assert run.wait(DEADLINE) is not None


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_who_has_let_go_of_a_run_keeps_nothing_of_it(store: FileStore) -> None:
    run = durable.start("key", SLEEPER, store=store)

    def come_and_go() -> None:
        watcher = durable.attach("key", store=store)
        watcher.detach()
        assert watcher.wait(DEADLINE) is not None

    come_and_go()
    before = descriptors()
    for _ in range(20):
        come_and_go()
    assert descriptors() <= before + 2  # of what other threads are busy with
    end(run)
