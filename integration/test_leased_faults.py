"""Keys in a database, when something goes wrong that nobody was killed for: a database that is down
at one step, or does not answer, a key that is forgotten, a copied directory, other clocks.

Two machines are two local directories here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import DEADLINE, in_thread
from integration.sql_holder import request
from proctree import KillPolicy, Stage, durable
from proctree.durable import FileStore, Run, UnknownKey
from proctree.durable.leased import RunElsewhere
from proctree.durable.recording import Exit
from proctree.durable.sql import SqlStore

LONG = 600.0
"""A lease that does not run out in a test."""
SHORT = 3.0
QUICK = KillPolicy((Stage(15, 0.2), Stage(9, 0.5)))
SLEEPER = ["sleep", "1000"]


class Machine:
    """What one machine has of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.url = f"sqlite:///{folder}/records"
        self.local = FileStore(folder / name)

    def store(self, lease: float = LONG) -> SqlStore:
        return SqlStore(self.url, lease=lease, local=self.local)

    def close(self) -> None:
        for listed in durable.list(self.local):
            if listed.claimed:
                durable.cancel(listed.key, store=self.local)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, "here")
    yield machine
    machine.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, "there")
    yield machine
    machine.close()


class Gate:
    """A command that ends when it is let go."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.command = ["sh", "-c", f"read x < {path}"]

    def let_go(self) -> None:
        self.path.write_text("go\n")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def end(run: Run) -> None:
    run.kill(KillPolicy.now())
    assert run.wait(DEADLINE) is not None


# -- forgotten while it is waited for


def test_a_run_of_the_same_number_under_a_forgotten_key_is_not_taken_for_it(
    here: Machine, there: Machine, gate: Gate
) -> None:
    run = durable.start("key", gate.command, store=here.store())
    elsewhere = durable.start("key", gate.command, store=there.store())
    assert isinstance(elsewhere, RunElsewhere)
    gate.let_go()
    assert run.wait(DEADLINE) is not None
    durable.forget("key", store=here.store())
    assert durable.run("key", ["false"], store=here.store()).returncode == 1
    with pytest.raises(UnknownKey, match="attempt 1 is not recorded any more"):
        elsewhere.wait(DEADLINE)


def test_what_is_forgotten_while_it_is_waited_for_is_not_started_again(
    here: Machine, there: Machine, gate: Gate
) -> None:
    run = durable.start("key", gate.command, store=here.store())
    elsewhere = durable.start("key", gate.command, store=there.store())
    gate.let_go()
    assert run.wait(DEADLINE) is not None
    durable.forget("key", store=here.store())
    with pytest.raises(UnknownKey):
        elsewhere.wait(DEADLINE)
    assert durable.list(there.store()) == []


def test_who_waits_for_a_lost_attempt_need_not_wait_for_the_next_one(
    there: Machine,
) -> None:
    """Its machine has come to the next one meanwhile, and that may take long."""
    claim = there.store().claim("key")
    assert claim is not None
    claim.begin(request("key", "tree", "0" * 16))
    run = durable.attach("key", store=there.store())
    assert isinstance(run, RunElsewhere)
    claim.begin(request("key", "tree", "1" * 16))
    outcome = in_thread(run.wait).get(timeout=DEADLINE)
    assert run.lost
    assert outcome.detail == "another attempt has been made since"
    claim.finish(claim.attempts()[-1], Exit(0))
    claim.release()


# -- local directories that are not what they seem to be


def test_a_directory_that_was_copied_from_another_machine_does_not_say_what_ended_there(
    here: Machine, there: Machine, gate: Gate
) -> None:
    """The copy's lock is free, and the tree lives: where it was started."""
    run = durable.start("key", gate.command, store=here.store())
    from_another_boot(here)
    shutil.copytree(here.local.path, there.local.path, ignore=shutil.ignore_patterns("control"))
    elsewhere = durable.start("key", gate.command, store=there.store())
    assert isinstance(elsewhere, RunElsewhere)
    assert len(here.store().attempts("key")) == 1
    gate.let_go()
    assert run.wait(DEADLINE) is not None
    outcome = elsewhere.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0


def from_another_boot(machine: Machine) -> None:
    """What is recorded of the last attempt, as if another machine had written it."""
    (attempt,) = machine.local.attempts("key")
    assert attempt.request is not None
    changed = attempt.request._replace(boot=str(uuid.uuid4())).encode()
    Path(attempt.place, "request").write_bytes(changed)
    with contextlib.closing(sqlite3.connect(machine.url.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE proctree_attempts SET request = ?", [changed.decode()])
        connection.commit()
