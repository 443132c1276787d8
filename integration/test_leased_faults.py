"""Keys in a database, when something goes wrong that nobody was killed for: a database that is down
at one step, or does not answer, a key that is forgotten, a copied directory, other clocks.

Two machines are two local directories here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from integration.conftest import DEADLINE, eventually, in_thread
from integration.sql_holder import request
from proctree import KillPolicy, Reason, Stage, durable
from proctree.durable import (
    FileStore,
    NotRunning,
    Run,
    StoreUnusable,
    UnknownKey,
    leased,
    reconnecting,
)
from proctree.durable.leased import RunElsewhere
from proctree.durable.recording import Exit
from proctree.durable.sql import SqlStore

LONG = 600.0
"""A lease that does not run out in a test."""
SHORT = 1.5
KEPT = 15.0
"""One that is renewed: beside somebody's fork bomb that may come seconds late."""
QUICK = KillPolicy((Stage(15, 0.1), Stage(9, 0.2)))
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


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long lease what runs elsewhere is looked at every few seconds."""
    monkeypatch.setattr(leased, "LOOK_SECONDS", 0.2)


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


class Faults:
    """A database that does before each statement what it is told."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._engine = sa.create_engine(machine.url, poolclass=sa.NullPool)
        self.before: Callable[[str], object] = lambda statement: None
        sa.event.listen(self._engine, "before_cursor_execute", self._before)

    def _before(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        self.before(statement)

    def store(self, lease: float = LONG) -> SqlStore:
        return SqlStore(self._engine, lease=lease, local=self._machine.local)


def down(statement: str) -> None:
    raise sa.exc.OperationalError(statement, None, ConnectionError("it is down"))


@pytest.fixture
def faults(here: Machine) -> Faults:
    return Faults(here)


class Gate:
    """A command that ends when it is let go."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.command = ["sh", "-c", f"read x < {path}"]
        # For reading too: a tree that its lease has ended does not keep anybody waiting.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def let_go(self) -> None:
        self._file.write(b"go\n")

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()


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
    execute(machine, "UPDATE proctree_attempts SET request = ?", changed.decode())


def execute(machine: Machine, statement: str, *values: str) -> None:
    with contextlib.closing(sqlite3.connect(machine.url.removeprefix("sqlite:///"))) as connection:
        connection.execute(statement, values)
        connection.commit()


# -- a database that is slow, does not answer, or is down


def test_who_leaves_the_block_has_recorded_the_end(faults: Faults, there: Machine) -> None:
    faults.before = lambda statement: time.sleep(0.1)
    with durable.start("key", SLEEPER, store=faults.store()):
        pass
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None
    assert not there.store().claimed("key")


def test_a_database_that_does_not_answer_is_not_waited_for_longer_than_the_lease(
    faults: Faults, gate: Gate
) -> None:
    answer = threading.Event()
    run = durable.start("key", gate.command, store=faults.store(SHORT), kill=QUICK)
    faults.before = lambda statement: answer.wait()
    gate.let_go()
    try:
        outcome = in_thread(run.wait).get(timeout=DEADLINE)
    finally:
        answer.set()
    # What its warden has recorded counts here, whether it was in time or ended by its lease.
    assert outcome.reason in (Reason.EXITED, Reason.SUPERVISOR_LOST)


def test_what_ended_while_the_database_was_down_is_recorded_when_it_is_back(
    faults: Faults, there: Machine, gate: Gate
) -> None:
    run = durable.start("key", gate.command, store=faults.store())
    tried = threading.Event()

    def fail(statement: str) -> None:
        tried.set()
        down(statement)

    faults.before = fail
    gate.let_go()
    waiting = in_thread(run.wait)
    assert tried.wait(DEADLINE)
    faults.before = lambda statement: None
    assert waiting.get(timeout=DEADLINE).returncode == 0
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None


def test_who_cannot_read_the_records_does_not_stay_attached(
    here: Machine, faults: Faults, gate: Gate
) -> None:
    first = durable.start("key", gate.command, store=here.store())
    faults.before = down
    with pytest.raises(StoreUnusable, match="it is down"):
        durable.start("key", gate.command, store=faults.store())
    second = durable.start("key", gate.command, store=here.store())
    first.detach()
    eventually(lambda: second.owned, "nobody came before it")
    gate.let_go()
    assert second.wait(DEADLINE) is not None


def test_what_has_ended_here_and_is_not_recorded_there_needs_no_cancellation(
    here: Machine, faults: Faults, gate: Gate
) -> None:
    """Its holder lives, and cannot record it: that is not waited for."""
    run = durable.start("key", gate.command, store=faults.store())
    faults.before = down
    gate.let_go()
    waiting = in_thread(run.wait)
    eventually(lambda: not here.local.claimed("key"), "it has ended")
    cancelling = in_thread(lambda: durable.cancel("key", store=here.store()))
    try:
        assert cancelling.get(timeout=DEADLINE) is None
    finally:
        faults.before = lambda statement: None
        assert waiting.get(timeout=DEADLINE).returncode == 0


def test_a_database_that_fails_behind_a_renewal_is_no_defect(
    faults: Faults, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails is the look for a cancellation."""
    run = durable.start("key", gate.command, store=faults.store(KEPT), kill=QUICK)
    failed = threading.Event()

    def fail_once(statement: str) -> None:
        renews = threading.current_thread().name == "proctree-lease"
        if renews and "FROM proctree_attempts" in statement and not failed.is_set():
            failed.set()
            down(statement)

    faults.before = fail_once
    assert failed.wait(DEADLINE)
    gate.let_go()
    assert run.wait(DEADLINE) is not None
    assert "durable.not_renewed" in caplog.text
    assert "durable.callback_failed" not in caplog.text


def test_a_result_that_cannot_be_read_here_is_said_to_be_unrecorded(
    faults: Faults, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    run = durable.start("key", gate.command, store=faults.store(), kill=QUICK)

    def tear(statement: str) -> None:
        if "FROM proctree_attempts" in statement:
            Path(run.place, "exit").write_text("torn")

    faults.before = tear
    gate.let_go()
    assert run.wait(DEADLINE) is not None
    assert f"{run.place}: exit: cut off" in caplog.text


def test_an_owner_whose_database_fails_while_it_takes_the_key_over_tries_again(
    here: Machine, faults: Faults, gate: Gate
) -> None:
    """Neither is the tree left to die, nor is the key held by something that nobody knows of."""
    first = durable.start("key", gate.command, store=here.store(KEPT), kill=QUICK)
    second = durable.start("key", gate.command, store=faults.store(KEPT), kill=QUICK)
    taken: list[str] = []

    def fail_once(statement: str) -> None:
        if "SET token" in statement:
            taken.append(statement)
        elif len(taken) == 1 and "FROM proctree_attempts" in statement:
            taken.append(statement)
            down(statement)

    faults.before = fail_once
    first.detach()
    eventually(lambda: len(taken) > 2, "it has taken the key again")
    assert second.wait(KEPT * 1.1) is None
    gate.let_go()
    outcome = second.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0
    (attempt,) = here.store().attempts("key")
    assert attempt.exit is not None
    assert not here.store().claimed("key")


def test_a_key_whose_attempts_were_removed_by_hand_is_not_held_for_ever(
    here: Machine, there: Machine, gate: Gate
) -> None:
    run = durable.start("key", gate.command, store=here.store(8.0), kill=QUICK)
    execute(here, "DELETE FROM proctree_attempts")
    gate.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0
    store = there.store()
    eventually(lambda: (claim := store.claim("key")) is not None and not claim.release(), "free")


# -- time


def test_patience_is_about_the_lock_and_not_about_another_machine(
    here: Machine, there: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has waited for a lease elsewhere is not out of patience with its neighbours here."""
    monkeypatch.setattr(reconnecting, "PATIENCE", 1.5)
    claim = there.store().claim("key")
    assert claim is not None
    done = in_thread(lambda: durable.run("key", ["true"], store=here.store()))
    time.sleep(2.0)  # longer than that
    mine = None
    while mine is None:
        mine = here.local.claim("key")
    time.sleep(0.1)  # it finds the lock held
    mine.release()
    claim.release()
    assert done.get(timeout=DEADLINE).returncode == 0


SHIFT = ["unshare", "-T", "--boottime", "1000000", "--monotonic", "1000000"]

COMES = """
import sys
from proctree import durable
from proctree.durable import FileStore, StillRunning
from proctree.durable.sql import SqlStore

url, folder, *command = sys.argv[1:]
store = SqlStore(url, lease=600, local=FileStore(folder))
try:
    durable.start("key", command, store=store)
except StillRunning as error:
    print(error)
"""

UNSHARES = """
import ctypes, sys
from proctree import ContainmentUnavailable, durable
from proctree.durable import FileStore
from proctree.durable.sql import SqlStore

CLONE_NEWTIME = 0x80
if ctypes.CDLL(None).unshare(CLONE_NEWTIME) < 0:
    sys.exit("unshare")
url, folder, *command = sys.argv[1:]
try:
    durable.start("key", command, store=SqlStore(url, lease=600, local=FileStore(folder)))
except ContainmentUnavailable as error:
    print(error)
"""


def python(script: str, machine: Machine, *command: str, prefix: Sequence[str] = ()) -> str:
    """What a process of its own says."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script, machine.url, machine.local.path, *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def time_namespaces() -> None:
    done = subprocess.run([*SHIFT, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no time namespaces: {done.stderr.strip()}")


@pytest.mark.usefixtures("time_namespaces")
def test_who_has_other_clocks_than_a_tree_does_not_keep_it(here: Machine, gate: Gate) -> None:
    """It would say until when it may run by a clock that the warden does not have."""
    run = durable.start("key", gate.command, store=here.store())
    said = python(COMES, here, *gate.command, prefix=SHIFT)
    assert "it runs in another time namespace" in said
    assert run.owned
    gate.let_go()
    assert run.wait(DEADLINE) is not None


@pytest.mark.usefixtures("time_namespaces")
def test_whose_children_have_other_clocks_starts_nothing(here: Machine) -> None:
    assert "left its time namespace" in python(UNSHARES, here, *SLEEPER)
    assert durable.list(here.local) == []


# -- what is found


KILLED = """
import os, signal, sys
from proctree import durable
from proctree.durable import FileStore
from proctree.durable.sql import SqlStore

url, folder, *command = sys.argv[1:]
durable.start("key", command, store=SqlStore(url, lease=600, local=FileStore(folder)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_ended_here_and_was_not_recorded_there_is_attached_to(
    here: Machine, gate: Gate
) -> None:
    killed = [sys.executable, "-c", KILLED, here.url, here.local.path, *gate.command]
    assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    gate.let_go()
    eventually(lambda: not here.local.claimed("key"), "it has ended")
    run = durable.attach("key", store=here.store())
    assert run.outcome is not None
    assert run.outcome.returncode == 0


CLAIMS = """
import os, signal, sys
from proctree.durable.sql import SqlStore

url, _folder = sys.argv[1:]
assert SqlStore(url, lease=600).claim("key") is not None
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_died_before_there_was_an_attempt_held_nothing(here: Machine, there: Machine) -> None:
    """The attempt before it has ended, on another machine: no lease is waited out."""
    assert durable.run("key", ["false"], store=there.store()).returncode == 1
    killed = [sys.executable, "-c", CLAIMS, here.url, here.local.path]
    assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    done = in_thread(lambda: durable.run("key", ["true"], store=here.store(), same_target=False))
    assert done.get(timeout=DEADLINE).returncode == 0


def test_a_job_is_no_tree_to_attach_to_or_to_cancel(there: Machine) -> None:
    claim = there.store().claim("key")
    assert claim is not None
    claim.begin(request("key", "job", "0" * 16))
    with pytest.raises(NotRunning, match="is of job"):
        durable.attach("key", store=there.store())
    with pytest.raises(NotRunning, match="is of job"):
        durable.cancel("key", store=there.store())
    claim.release()
