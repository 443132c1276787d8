"""Whoever writes the records of a run is killed at every call that it makes: then they are as they
were before a step or as they are after it, and the next one goes on from there."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration.dying import Calls, Child, Death, Unsynced
from proctree.durable import folders
from proctree.durable.directory import FileStore
from proctree.durable.errors import UnknownKey
from proctree.durable.recording import Exit, Request

KEY = "long " * 100
"""So long that its directory's name does not say it."""

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Thousands of fsync(2) are waited for here, of which a disk would make something."""

Say = Callable[[str], None]


def request(number: int = 1) -> Request:
    return Request(KEY, f"target {number}", "f", "0" * 16, "tree", "boot", 1, "host", 1, number)


def seen(store: FileStore) -> list[tuple[Any, ...]]:
    """What is recorded, without what differs from run to run."""
    return [
        (a.number, a.request and a.request.requested, a.handle, a.exit, bool(a.trouble))
        for a in store.attempts(KEY)
    ]


# -- what is done, step by step; `say` after each step that was promised to last


def nothing(store: FileStore) -> None:
    pass


def tree(store: FileStore, say: Say) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    prepared = claim.prepare(request(1))
    say("begun")
    claim.finish(prepared.attempt, Exit(256, pid=7))
    say("finished")
    claim.release()


def job(store: FileStore, say: Say) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    attempt = claim.begin(request(1))
    say("begun")
    claim.submitted(attempt, "handle")
    say("submitted")
    claim.finish(attempt, Exit(0))
    say("finished")


def two_attempts(store: FileStore) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    claim.finish(claim.begin(request(1)), Exit(0))
    claim.prepare(request(2)).close()
    claim.release()


def again(store: FileStore, say: Say) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    claim.finish(claim.attempts()[-1], Exit(9))
    say("finished")
    claim.begin(request(3))
    say("begun")


def unreadable(store: FileStore) -> None:
    two_attempts(store)
    for number, name in ((1, folders.EXIT), (2, folders.REQUEST)):
        Path(store.at(KEY).attempt(number), name).write_bytes(b"garbage")


def kept_aside(store: FileStore, say: Say) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    claim.attempts()
    claim.begin(request(3))
    say("begun")


def forgotten(store: FileStore, say: Say) -> None:
    store.forget(KEY)
    say("forgotten")


def beginning(store: FileStore) -> None:
    """As somebody leaves it who is killed while he begins."""
    two_attempts(store)
    Path(store.at(KEY).attempts, ".3.new").mkdir(0o700)
    Path(store.at(KEY).attempts, ".3.new", "request~").write_bytes(b"proctree req")


NONE: list[Any] = []
BEGUN = [(1, 1, None, None, False)]
TWO = [(1, 1, None, Exit(0), False), (2, 2, None, None, False)]
BAD = [(1, 1, None, None, True), (2, None, None, None, True)]
THIRD = (3, 3, None, None, False)


class Scenario(NamedTuple):
    """Attributes:
    before: what has been done already.
    act: what is interrupted.
    states: what may be seen, in this order.
    promised: how many of the states are left behind when so much was said.
    """

    before: Callable[[FileStore], None]
    act: Callable[[FileStore, Say], None]
    states: list[list[tuple[Any, ...]]]
    promised: list[int]


SCENARIOS = {
    "tree": Scenario(nothing, tree, [NONE, BEGUN, [(1, 1, None, Exit(256, pid=7), False)]], [1, 2]),
    "job": Scenario(
        nothing,
        job,
        [NONE, BEGUN, [(1, 1, "handle", None, False)], [(1, 1, "handle", Exit(0), False)]],
        [1, 2, 3],
    ),
    "again": Scenario(
        beginning,
        again,
        [
            TWO,
            [TWO[0], (2, 2, None, Exit(9), False)],
            [TWO[0], (2, 2, None, Exit(9), False), THIRD],
        ],
        [1, 2],
    ),
    "kept aside": Scenario(unreadable, kept_aside, [BAD, [*BAD, THIRD]], [1]),
    "forgotten": Scenario(two_attempts, forgotten, [TWO, NONE], [1]),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="proctree-durable-", dir=MEMORY))
    yield path
    shutil.rmtree(path)


def run(folder: Path, scenario: Scenario, death: Death) -> tuple[FileStore, int, list[str]]:
    """The store afterwards, the exit status, and what was said; last the names of the calls."""
    store = FileStore(folder / f"{death.nth}-{death.when}" / "store")
    scenario.before(store)

    def interrupted(say: Say) -> None:
        calls = Calls(death)
        scenario.act(store, say)
        names = list(calls.names)
        say(" ".join(names))

    status, said = Child(interrupted).end()
    return store, status, said


def go_on(store: FileStore, last: list[tuple[Any, ...]]) -> None:
    """Whoever comes next finds everything, and leaves no rubbish."""
    assert not store.claimed(KEY)
    assert store.keys() == ([KEY] if last else [])
    claim = store.claim(KEY)
    assert claim is not None
    assert [a.number for a in claim.attempts()] == [state[0] for state in last]
    assert seen(store) == last
    attempt = claim.begin(request(99))
    assert attempt.number == len(last) + 1
    claim.submitted(attempt, "again")
    claim.finish(attempt, Exit(0))
    assert seen(store) == [*last, (attempt.number, 99, "again", Exit(0), False)]
    assert not [n for n in os.listdir(store.at(KEY).attempts) if n.startswith(".")]
    assert sorted(os.listdir(attempt.place)) == ["exit", "handle", "request"]
    claim.release()
    store.forget(KEY)
    assert os.listdir(store.path) == []
    with pytest.raises(UnknownKey):
        store.forget(KEY)


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_call(name, folder):
    scenario = SCENARIOS[name]
    store, status, said = run(folder, scenario, Death(0))
    assert status == 0
    calls = said[-1].split()
    assert seen(store) == scenario.states[-1]
    go_on(store, scenario.states[-1])

    reached, met = 0, set()
    for nth, call in enumerate(calls, 1):
        whens = ("before", "in", "after") if call == "pwrite" else ("before", "after")
        for when in whens:
            store, status, said = run(folder, scenario, Death(nth, when))
            where = f"killed {when} call {nth}, {call}, of {len(calls)}"
            assert status == -signal.SIGKILL, where
            state = seen(store)
            assert state in scenario.states, where
            now = scenario.states.index(state)
            # Nothing is ever taken back, and what was promised is there.
            assert now >= max(reached, *([0, *scenario.promised][: len(said) + 1])), where
            reached = now
            met.add(now)
            go_on(store, state)
    assert met == set(range(len(scenario.states))), "the deaths were not everywhere"


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "tree"])
def test_what_is_promised_is_on_the_disk(name, folder):
    """The power fails right after it was said. Of a tree nothing is promised before it has ended,
    and then its warden syncs: test_durable.py."""
    scenario = SCENARIOS[name]
    store = FileStore(folder / "above" / "store")
    scenario.before(store)

    def traced(say: Say) -> None:
        unsynced = Unsynced()
        promises = 0

        def promised(what: str) -> None:
            nonlocal promises
            promises += 1
            assert unsynced.paths == [], f"{what}, and this is not on the disk"
            assert unsynced.named == [], f"{what}, and this got its name before it was"

        scenario.act(store, promised)
        say(str(promises))

    status, said = Child(traced).end()
    assert status == 0
    assert said == [str(len(scenario.promised))]
