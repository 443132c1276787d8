"""Trees whose keys are held in a database: what another machine may start, and when.

Two machines are two local directories here: nothing but the database is shared between them. What
depends on more (another boot, another clock) is in test_sql_store.py.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, Lines, eventually, in_thread, is_alive
from integration.databases import Server, postgresql
from integration.durable_runs import SAY_THE_END, SLEEPER, Job, Supervisor, disconnect
from proctree import CAPTURE, KillPolicy, Reason, Stage, durable, registry
from proctree.containment.warden import WARDEN_VARIABLE, warden_path
from proctree.durable import (
    DifferentTarget,
    FileStore,
    NotOwner,
    NotRunning,
    Run,
    UnknownKey,
    leased,
)
from proctree.durable.leased import LeasedRun, RunElsewhere
from proctree.durable.recording import Cause
from proctree.durable.sql import SqlStore, boottime
from proctree.process import proof

LONG = 600.0
"""A lease that does not run out in a test."""
SHORT = 3.0
"""One that does, and is for those alone who are to lose it: on a busy machine it runs out for a
living holder too."""
KEPT = 15.0
"""One that would, and is renewed: beside somebody's fork bomb that may come seconds late."""
QUICK = KillPolicy((Stage(15, 0.2), Stage(9, 0.5)))


class Machine:
    """What one machine has of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.local = FileStore(folder)

    def store(self, lease: float = LONG) -> SqlStore:
        return SqlStore(self.url, lease=lease, local=self.local)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long lease what runs elsewhere is looked at every few seconds."""
    monkeypatch.setattr(leased, "LOOK_SECONDS", 0.2)


@pytest.fixture
def here(url: str, tmp_path: Path) -> Iterator[Machine]:
    yield from _machine(url, tmp_path / "here")


@pytest.fixture
def there(url: str, tmp_path: Path) -> Iterator[Machine]:
    yield from _machine(url, tmp_path / "there")


def _machine(url: str, folder: Path) -> Iterator[Machine]:
    machine = Machine(url, folder)
    yield machine
    for listed in durable.list(machine.local):
        if listed.claimed:
            durable.cancel(listed.key, store=machine.local)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


Start = Callable[..., Supervisor]


@pytest.fixture
def supervise(here: Machine) -> Iterator[Start]:
    made: list[Supervisor] = []

    def start(command: list[str], lease: float = LONG) -> Supervisor:
        quick = [[15, 0.2], [9, 0.5]]
        supervisor = Supervisor(here.local, command, url=here.url, lease=lease, policy=quick)
        made.append(supervisor)
        supervisor.started().tell(SAY_THE_END)
        return supervisor

    yield start
    for supervisor in made:
        supervisor.close()


def test_what_has_finished_on_one_machine_is_not_started_on_another(
    here: Machine, there: Machine, job: Job
) -> None:
    with durable.start("key", job.command, store=here.store(), logs=CAPTURE) as run:
        assert isinstance(run, LeasedRun)
        job.let_go()
        first = run.wait(DEADLINE)
    assert first is not None
    assert first.stdout == b"one\ntwo\n"
    again = durable.start("key", job.command, store=there.store(), logs=CAPTURE)
    assert again.reconnected
    assert again.outcome is not None
    assert (again.outcome.returncode, again.outcome.pid) == (0, first.pid)
    assert again.outcome.stdout is None  # it is where it ran
    back = durable.run("key", job.command, store=here.store(), logs=CAPTURE)
    assert back.stdout == b"one\ntwo\n"
    assert job.ran == 1
    (listed,) = durable.list(there.store())
    assert not listed.claimed


def test_output_that_may_be_here_and_cannot_be_told_is_said_to_be_missing(
    here: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the run is recorded in the database, whatever has become of its record here."""
    command = ["echo", "one"]
    assert durable.run("key", command, store=here.store(), logs=CAPTURE).stdout == b"one\n"
    (attempt,) = here.local.attempts("key")
    Path(attempt.place, "request").write_text("nothing of ours")
    again = durable.run("key", command, store=here.store(), logs=CAPTURE)
    assert (again.returncode, again.stdout) == (0, None)
    said = [record.getMessage() for record in caplog.records]
    assert [each for each in said if "durable.unreadable_output" in each and "request: " in each]


def test_what_runs_on_another_machine_is_waited_for(
    here: Machine, there: Machine, job: Job
) -> None:
    run = durable.start("key", job.command, store=here.store())
    elsewhere = durable.start("key", job.command, store=there.store(SHORT), kill=QUICK)
    assert isinstance(elsewhere, RunElsewhere)
    assert (elsewhere.pid, elsewhere.owned, elsewhere.number) == (None, False, run.number)
    assert elsewhere.wait(0.1) is None
    with pytest.raises(NotOwner, match=r"durable\.cancel asks for its end"):
        elsewhere.kill()
    with pytest.raises(NotOwner):
        elsewhere.signal(signal.SIGTERM)
    with pytest.raises(DifferentTarget):
        durable.start("key", SLEEPER, store=there.store())
    assert durable.attach("key", store=there.store()).pid is None
    waiting = in_thread(elsewhere.wait)
    job.let_go()
    outcome = waiting.get(timeout=DEADLINE)
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert run.wait(DEADLINE) is not None
    assert job.ran == 1


def test_a_lost_machine_is_waited_out_and_its_tree_is_dead_by_then(
    here: Machine, there: Machine, job: Job, supervise: Start
) -> None:
    first = supervise(job.command, SHORT)
    first.kill()
    began = time.monotonic()
    done = in_thread(lambda: durable.run("key", job.command, store=there.store(), kill=QUICK))
    eventually(lambda: bool(there.local.attempts("key")), "it is started there")
    assert time.monotonic() - began > SHORT / 2
    (lost,) = here.local.attempts("key")
    assert lost.exit is not None
    assert lost.exit.cause is Cause.LEASE
    job.let_go()
    assert done.get(timeout=DEADLINE).returncode == 0
    assert job.ran == 1
    assert [attempt.exit is None for attempt in there.store().attempts("key")] == [True, False]


def test_a_supervisor_that_was_stopped_too_long_has_lost_its_tree(
    here: Machine, there: Machine, job: Job, supervise: Start
) -> None:
    """The warden does not wait for it, and what it finds out afterwards is not recorded."""
    first = supervise(job.command, SHORT)
    first.process.send_signal(signal.SIGSTOP)
    run = durable.start("key", job.command, store=there.store(), kill=QUICK)
    if isinstance(run, RunElsewhere):
        outcome = run.wait(DEADLINE)
        assert outcome is not None
        assert run.lost
        assert outcome.reason is Reason.SUPERVISOR_LOST
        run = durable.start("key", job.command, store=there.store(), kill=QUICK)
    assert not run.reconnected
    assert run.number == 2
    first.process.send_signal(signal.SIGCONT)
    assert first.hear_of("reason") == "supervisor-lost"
    job.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0
    assert job.ran == 1
    assert [attempt.exit is None for attempt in there.store().attempts("key")] == [True, False]


def test_a_retry_on_the_same_machine_reconnects_at_once_and_renews_the_lease(
    here: Machine, there: Machine, job: Job, supervise: Start
) -> None:
    first = supervise(job.command, KEPT)
    first.kill()
    run = durable.start("key", job.command, store=here.store(KEPT), kill=QUICK)
    assert run.reconnected
    assert run.pid == first.said["pid"]
    assert run.wait(KEPT * 1.1) is None
    assert is_alive(run.pid or 0)
    elsewhere = durable.start("key", job.command, store=there.store(KEPT), kill=QUICK)
    assert isinstance(elsewhere, RunElsewhere)
    job.let_go()
    for each in (run, elsewhere):
        outcome = each.wait(DEADLINE)
        assert outcome is not None
        assert outcome.returncode == 0
    assert job.ran == 1


def test_a_watcher_that_becomes_the_owner_renews_the_lease(
    here: Machine, job: Job, supervise: Start
) -> None:
    first = supervise(job.command, KEPT)
    run = durable.start("key", job.command, store=here.store(KEPT), kill=QUICK)
    assert not run.owned
    first.kill()
    eventually(lambda: run.owned, "it is ours")
    assert run.wait(KEPT * 1.1) is None
    job.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0
    (attempt,) = here.store().attempts("key")
    assert attempt.exit is not None


def test_what_ended_without_a_supervisor_is_recorded_by_the_next_one_here(
    here: Machine, there: Machine, job: Job, supervise: Start
) -> None:
    supervise(job.command).kill()
    job.let_go()
    eventually(lambda: not here.local.claimed("key"), "it has ended")
    assert there.store().attempts("key")[-1].exit is None
    outcome = durable.run("key", job.command, store=here.store())
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert there.store().attempts("key")[-1].exit is not None
    assert durable.run("key", job.command, store=there.store()).returncode == 0
    assert job.ran == 1


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "unrecorded"])
def test_what_a_warden_has_left_that_was_killed_behind_its_record_is_cleared_away(
    here: Machine, job: Job, supervise: Start, recorded: bool
) -> None:
    """Whether its end was recorded in the database as well or in its directory only."""
    if recorded:
        run = durable.start("key", job.command, store=here.store())
        job.let_go()
        assert run.wait(DEADLINE) is not None
    else:
        supervise(job.command).kill()
        job.let_go()
        eventually(lambda: not here.local.claimed("key"), "it has ended")
    (attempt,) = here.local.attempts("key")
    assert attempt.request is not None
    folder = registry.directory()
    assert folder is not None
    tree_id = attempt.request.tree_id
    entry = Path(registry.path_of(folder, tree_id))
    entry.write_text(registry.record(tree_id, "sh", "warden", None))
    again = durable.start("key", job.command, store=here.store())
    assert (again.reconnected, again.number, job.ran) == (True, 1, 1)
    assert not entry.exists()


def test_it_is_cancelled_from_another_machine(here: Machine, there: Machine) -> None:
    run = durable.start("key", SLEEPER, store=here.store(KEPT), kill=QUICK)
    outcome = durable.cancel("key", store=there.store(KEPT), timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "cancelled")
    assert run.wait(DEADLINE) is not None
    assert durable.cancel("key", store=there.store()) is None
    with pytest.raises(UnknownKey):
        durable.cancel("another", store=there.store())


def test_it_is_cancelled_here_when_nobody_supervises_it(
    here: Machine, there: Machine, supervise: Start
) -> None:
    supervise(SLEEPER).kill()
    outcome = durable.cancel("key", store=here.store(), timeout=DEADLINE)
    assert outcome is not None
    assert outcome.detail == "cancelled"
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.CANCELLED


def test_what_was_let_go_of_lives_for_its_lease_and_not_longer(
    here: Machine, there: Machine, job: Job
) -> None:
    run = durable.start("key", job.command, store=here.store(SHORT), kill=QUICK)
    run.detach()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.reason is Reason.DETACHED
    done = in_thread(lambda: durable.run("key", job.command, store=there.store(), kill=QUICK))
    eventually(lambda: bool(there.local.attempts("key")), "it is started there")
    assert not is_alive(run.pid or 0)
    (released,) = here.local.attempts("key")
    assert released.exit is not None
    assert released.exit.cause is Cause.LEASE
    job.let_go()
    assert done.get(timeout=DEADLINE).returncode == 0
    assert job.ran == 1


def test_who_is_too_late_to_start_something_starts_it_again_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its warden was told by when it may run, and the lease has been renewed since."""
    held = tmp_path / "held"
    held.touch()
    late = tmp_path / "late-warden"
    late.write_text(
        f'#!/bin/sh\nwhile [ -e {held} ]; do sleep 0.01; done\nexec {warden_path()} "$@"\n'
    )
    late.chmod(0o755)
    monkeypatch.setenv(WARDEN_VARIABLE, str(late))
    store = SqlStore(f"sqlite:///{tmp_path}/records", lease=1.0, local=tmp_path / "here")
    at_once = KillPolicy((Stage(9, 0.2),))
    done = in_thread(lambda: durable.run("key", ["true"], store=store, kill=at_once))
    eventually(lambda: bool(store.attempts("key")), "it is about to be started")
    due = boottime() + store.lease
    eventually(lambda: boottime() >= due, "nothing is left of that time")
    held.unlink()
    assert done.get(timeout=DEADLINE).ok
    first, *_, last = store.attempts("key")
    assert first.exit is not None
    assert (first.exit.cause, first.exit.error) == (Cause.NOT_STARTED, errno.ETIMEDOUT)
    assert last.exit is not None
    assert last.exit.returncode == 0


def test_what_cannot_be_started_is_recorded_and_the_key_is_free(
    here: Machine, there: Machine
) -> None:
    with pytest.raises(FileNotFoundError):
        durable.run("key", ["no-such-command"], store=here.store())
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.NOT_STARTED
    assert durable.run("key", ["true"], store=there.store(), same_target=False).ok


def test_attach_and_forget(here: Machine, there: Machine, job: Job) -> None:
    with pytest.raises(UnknownKey):
        durable.attach("key", store=here.store())
    run = durable.start("key", job.command, store=here.store())
    ours = durable.attach("key", store=here.store())
    assert ours.pid == run.pid
    job.let_go()
    assert run.wait(DEADLINE) is not None
    assert ours.wait(DEADLINE) is not None
    ended = durable.attach("key", store=there.store())
    assert ended.outcome is not None
    assert ended.outcome.returncode == 0
    durable.forget("key", store=here.store())
    assert durable.list(there.store()) == []
    assert durable.list(here.local) == []


def test_what_was_forgotten_from_another_machine_is_forgotten_here_too(
    here: Machine, there: Machine
) -> None:
    assert durable.run("key", ["true"], store=here.store()).ok
    durable.forget("key", store=there.store())
    assert [listed.key for listed in durable.list(here.local)] == ["key"]
    durable.forget("key", store=here.store())
    assert durable.list(here.local) == []
    with pytest.raises(UnknownKey, match="nothing is recorded"):
        durable.forget("key", store=here.store())


def holds(run: Run) -> bool:
    assert isinstance(run, LeasedRun)
    assert run._tender is not None
    return run._tender._holds()


def test_who_owns_the_tree_again_has_its_key_again(here: Machine, there: Machine, job: Job) -> None:
    """In between another supervisor was the owner, and had the key."""
    first = durable.start("key", job.command, store=here.store(KEPT), kill=QUICK)
    other = durable.start("key", job.command, store=here.store(KEPT), kill=QUICK)
    assert [first.owned, other.owned] == [True, False]
    disconnect(first)
    eventually(lambda: holds(other) and not holds(first), "the other one has taken over")
    other.detach()
    assert other.wait(DEADLINE) is not None
    eventually(lambda: first.owned and holds(first), "it has it again")
    job.let_go()
    assert first.wait(DEADLINE) is not None
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None
    assert (attempt.exit.returncode, attempt.exit.by_itself, job.ran) == (0, True, 1)


def test_a_tree_whose_lease_nobody_would_renew_is_ended_at_once(
    here: Machine, there: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "proctree-tender":
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(OSError, match="new thread"):
            durable.start("key", SLEEPER, store=here.store())
    assert not here.local.claimed("key")
    (attempt,) = there.store().attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.OWNER
    with durable.start("key", SLEEPER, store=there.store()) as run:
        assert run.number == 2


def test_a_lost_attempt_is_no_run_to_attach_to(
    here: Machine, there: Machine, supervise: Start
) -> None:
    first = supervise(SLEEPER)
    stat = proof.read_stat(first.said["pid"])
    assert stat is not None
    os.kill(stat.ppid, signal.SIGKILL)
    first.kill()
    eventually(lambda: not is_alive(first.said["pid"]), "it dies with its warden")
    with pytest.raises(NotRunning, match="it was lost"):
        durable.attach("key", store=here.store())
    proctree.sweep()


def test_of_many_on_two_machines_one_runs_at_a_time(
    here: Machine, there: Machine, job: Job
) -> None:
    waiting = [
        in_thread(lambda each=each: durable.run("key", job.command, store=each.store()))
        for each in [here, there] * 4
    ]
    job.let_go()
    outcomes = [each.get(timeout=DEADLINE) for each in waiting]
    assert [outcome.returncode for outcome in outcomes] == [0] * 8
    assert job.ran == 1


@pytest.fixture
def own_server() -> Iterator[Server]:
    with postgresql() as running:
        if running is None:
            pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
        yield running


def test_without_its_database_it_is_ended_when_the_lease_is_over(
    own_server: Server, tmp_path: Path
) -> None:
    lines = Lines()
    store = SqlStore(own_server.url(), lease=SHORT, local=FileStore(tmp_path / "here"))
    run = durable.start(
        "key",
        ["sh", "-c", "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done"],
        store=store,
        kill=QUICK,
        logs=proctree.Lines(lines),
    )
    lines.wait_for(1)
    own_server.crash()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.SUPERVISOR_LOST, 3)
    assert "asked" in lines.lines


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lease": 60.0}, "lease: with SqlStore"),
        ({"kill": KillPolicy.after(400.0)}, "kill: ending the run may take 405 s"),
    ],
)
def test_what_does_not_go_with_a_lease_of_the_stores(
    here: Machine, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        durable.start("key", SLEEPER, store=here.store(), **options)
    assert durable.list(here.local) == []
