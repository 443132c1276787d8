"""Trees whose keys are held in a database: what another machine may start, and when.

Two machines are two local directories here: nothing but the database is shared between them. What
depends on more (another boot, another clock) is in test_sql_store.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, Lines, eventually, in_thread, is_alive
from integration.databases import Server, postgresql
from proctree import CAPTURE, KillPolicy, Reason, Stage, durable
from proctree.durable import DifferentTarget, FileStore, NotOwner, NotRunning, Run, UnknownKey
from proctree.durable.leased import LeasedRun, RunElsewhere
from proctree.durable.recording import Cause
from proctree.durable.sql import SqlStore
from proctree.process import proof

LONG = 600.0
"""A lease that does not run out in a test."""
SHORT = 3.0
QUICK = KillPolicy((Stage(15, 0.2), Stage(9, 0.5)))
SLEEPER = ["sleep", "1000"]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, server: Server | None, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/records"
    if server is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return server.new_url()


class Machine:
    """What one machine has of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.local = FileStore(folder)

    def store(self, lease: float = LONG) -> SqlStore:
        return SqlStore(self.url, lease=lease, local=self.local)


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


class Job:
    """As in test_durable.py; and it fails if another one of its kind runs at the same time."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.effect, self.twice = folder / "gate", folder / "effect", folder / "twice"
        os.mkfifo(self.gate)
        inner = f"echo one; read x < {self.gate}; echo two; echo ran >> {self.effect}"
        lock = folder / "lock"
        self.command = [
            "sh",
            "-c",
            f"exec 9> {lock}; flock -n 9 || {{ echo twice > {self.twice}; exit 9; }}; {inner}",
        ]

    def let_go(self) -> None:
        with open(self.gate, "w", encoding="ascii") as file:
            file.write("go\n")

    @property
    def ran(self) -> int:
        assert not self.twice.exists(), "two at once"
        return len(self.effect.read_text().splitlines()) if self.effect.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


SUPERVISOR = """
import json, os, sys
from proctree import durable, KillPolicy, Lines, Stage
from proctree.durable import FileStore
from proctree.durable.sql import SqlStore

def say(**fields):
    os.write(1, (json.dumps(fields) + "\\n").encode())

url, folder, lease, command = sys.argv[1:5]
run = durable.start(
    "key", json.loads(command), store=SqlStore(url, lease=float(lease), local=FileStore(folder)),
    logs=Lines(lambda line: say(line=line)), kill=KillPolicy((Stage(15, 0.2), Stage(9, 0.5))),
)
say(pid=run.pid, owned=run.owned, reconnected=run.reconnected, number=run.number)
outcome = run.wait()
say(reason=outcome.reason, returncode=outcome.returncode)
"""


class Supervisor:
    """Another process, on one of the machines."""

    def __init__(self, machine: Machine, command: list[str], lease: float) -> None:
        arguments = [machine.url, str(machine.folder), str(lease), json.dumps(command)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: dict[str, Any] = {}

    def hear_until(self, name: str) -> Any:
        assert self.process.stdout is not None
        while name not in self.said:
            text = self.process.stdout.readline()
            assert text, "the supervisor has ended"
            self.said.update(json.loads(text))
        return self.said[name]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Supervisor]


@pytest.fixture
def supervise(here: Machine) -> Iterator[Start]:
    made: list[Supervisor] = []

    def start(command: list[str], lease: float = LONG) -> Supervisor:
        made.append(Supervisor(here, command, lease))
        made[-1].hear_until("pid")
        return made[-1]

    yield start
    for supervisor in made:
        supervisor.close()


def end(run: Run) -> None:
    run.kill(KillPolicy.now())
    assert run.wait(DEADLINE) is not None


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
    done = in_thread(lambda: durable.run("key", job.command, store=there.store(SHORT), kill=QUICK))
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
    run = durable.start("key", job.command, store=there.store(SHORT), kill=QUICK)
    if isinstance(run, RunElsewhere):
        outcome = run.wait(DEADLINE)
        assert outcome is not None
        assert run.lost
        assert outcome.reason is Reason.SUPERVISOR_LOST
        run = durable.start("key", job.command, store=there.store(SHORT), kill=QUICK)
    assert not run.reconnected
    assert run.number == 2
    first.process.send_signal(signal.SIGCONT)
    assert first.hear_until("reason") == "supervisor-lost"
    job.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0
    assert job.ran == 1
    assert [attempt.exit is None for attempt in there.store().attempts("key")] == [True, False]


def test_a_retry_on_the_same_machine_reconnects_at_once_and_renews_the_lease(
    here: Machine, there: Machine, job: Job, supervise: Start
) -> None:
    first = supervise(job.command, SHORT)
    first.kill()
    run = durable.start("key", job.command, store=here.store(SHORT), kill=QUICK)
    assert run.reconnected
    assert run.pid == first.said["pid"]
    assert run.wait(SHORT * 1.5) is None
    assert is_alive(run.pid or 0)
    elsewhere = durable.start("key", job.command, store=there.store(SHORT), kill=QUICK)
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
    first = supervise(job.command, SHORT)
    run = durable.start("key", job.command, store=here.store(SHORT), kill=QUICK)
    assert not run.owned
    first.kill()
    eventually(lambda: run.owned, "it is ours")
    assert run.wait(SHORT * 1.5) is None
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


def test_it_is_cancelled_from_another_machine(here: Machine, there: Machine) -> None:
    run = durable.start("key", SLEEPER, store=here.store(SHORT), kill=QUICK)
    outcome = durable.cancel("key", store=there.store(SHORT), timeout=DEADLINE)
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
    assert is_alive(run.pid or 0)
    done = in_thread(lambda: durable.run("key", job.command, store=there.store(SHORT), kill=QUICK))
    eventually(lambda: bool(there.local.attempts("key")), "it is started there")
    assert not is_alive(run.pid or 0)
    job.let_go()
    assert done.get(timeout=DEADLINE).returncode == 0
    assert job.ran == 1


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


def test_a_lost_attempt_is_no_run_to_attach_to(
    here: Machine, there: Machine, supervise: Start
) -> None:
    first = supervise(SLEEPER, SHORT)
    stat = proof.read_stat(first.said["pid"])
    assert stat is not None
    os.kill(stat.ppid, signal.SIGKILL)
    first.kill()
    eventually(lambda: not is_alive(first.said["pid"]), "it dies with its warden")
    with pytest.raises(NotRunning, match="it was lost"):
        durable.attach("key", store=here.store(SHORT))
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
