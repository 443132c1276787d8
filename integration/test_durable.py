"""Durable runs, from the front door: one tree per key, whoever supervises it and for however long.

What a crash does at each system call is in test_durable_crashes.py, and many at once in
test_durable_storm.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration import strace
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lines,
    available,
    eventually,
    in_thread,
    is_alive,
)
from integration.durable_runs import SLEEPER, Job, Supervisor, disconnect, end
from proctree import CAPTURE, Function, KillPolicy, Reason, Stage, durable, registry
from proctree.containment.warden import WARDEN_VARIABLE, warden_path
from proctree.durable import (
    DifferentTarget,
    FileStore,
    NotOwner,
    NotRunning,
    Run,
    StillRunning,
    UnknownKey,
    reconnecting,
)
from proctree.durable.cursor import stored
from proctree.durable.recording import Cause
from proctree.durable.running import Live
from proctree.durable.sql import SqlStore
from proctree.process import cgroups, proof

PATIENT = KillPolicy((Stage(15, 600.0), Stage(9, 30.0)))
"""The grace lasts until the test goes on."""


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


Start = Callable[..., Supervisor]


@pytest.fixture
def supervise(store: FileStore) -> Iterator[Start]:
    made: list[Supervisor] = []

    def start(command: list[str], **options: Any) -> Supervisor:
        made.append(Supervisor(store, command, **options))
        return made[-1].started()

    yield start
    for supervisor in made:
        supervisor.close()
    for listed in durable.list(store):
        if listed.claimed:
            durable.cancel(listed.key, store=store)


def warden_of(pid: int) -> int:
    stat = proof.read_stat(pid)
    assert stat is not None
    return stat.ppid


def read_so_far(store: FileStore, size: int) -> None:
    """The line was delivered, and that has been written down: who is killed in between has the next
    reader repeat it."""
    (attempt,) = store.attempts("key")
    eventually(lambda: stored(attempt.place)["stdout"] == size, "the cursor is behind the line")


# -- one row of the table after the other


def test_the_first_time_it_is_started_and_its_output_is_in_files(
    store: FileStore, job: Job
) -> None:
    done = in_thread(lambda: durable.run("key", job.command, store=store))
    job.let_go()
    outcome = done.get(timeout=DEADLINE)
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert outcome.duration > 0
    (listed,) = durable.list(store)
    (attempt,) = listed.attempts
    assert not listed.claimed
    assert Path(attempt.place, "out.log").read_text() == "one\ntwo\n"
    assert Path(attempt.place, "err.log").read_text() == ""
    assert not Path(attempt.place, "control").exists()


def test_what_has_finished_is_not_started_again(store: FileStore, job: Job) -> None:
    with durable.start("key", job.command, store=store) as run:
        job.let_go()
        first = run.wait(DEADLINE)
    again = durable.start("key", job.command, store=store, logs=CAPTURE)
    assert first is not None
    assert again.reconnected
    assert again.outcome is not None
    assert (again.outcome.returncode, again.outcome.pid) == (0, first.pid)
    assert again.outcome.stdout == b"one\ntwo\n"
    assert again.outcome.usage == first.usage
    assert job.ran == 1


def test_what_a_warden_has_left_that_was_killed_behind_its_record_is_cleared_away(
    store: FileStore, job: Job
) -> None:
    with durable.start("key", job.command, store=store) as run:
        job.let_go()
        run.wait(DEADLINE)
    folder = registry.directory()
    assert folder is not None
    entry, control = Path(registry.path_of(folder, run.tree_id)), Path(run.place, "control")
    entry.write_text(registry.record(run.tree_id, "sh", "warden", None))
    control.touch()
    assert durable.run("key", job.command, store=store).returncode == 0
    assert not entry.exists()
    assert not control.exists()
    assert job.ran == 1


def test_an_allowed_status_is_a_success_and_another_one_is_not(
    store: FileStore, tmp_path: Path
) -> None:
    effect = tmp_path / "effect"
    command = ["sh", "-c", f"echo ran >> {effect}; exit 3"]
    for allowed, expected in (((3,), 1), ((3, 0), 1), ((0,), 2), ((0, 4), 3)):
        outcome = durable.run("key", command, store=store, allowed=allowed)
        assert outcome.returncode == 3
        assert len(effect.read_text().splitlines()) == expected
    (listed,) = durable.list(store)
    assert [attempt.number for attempt in listed.attempts] == [1, 2, 3]
    assert all(Path(attempt.place, "out.log").exists() for attempt in listed.attempts)


def test_a_retry_after_the_supervisors_death_reconnects_and_goes_on_with_the_output(
    store: FileStore, job: Job, supervise: Start
) -> None:
    first = supervise(job.command)
    first.hear_until(lambda: first.lines == ["one"])
    read_so_far(store, len("one\n"))
    first.kill()
    lines = Lines()
    run = durable.start("key", job.command, store=store, logs=proctree.Lines(lines))
    assert run.reconnected
    assert run.owned
    assert run.pid == first.said["pid"]
    job.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert lines.lines == ["two"]
    assert job.ran == 1


def test_output_that_nobody_has_read_is_delivered_behind_the_end(
    store: FileStore, job: Job, supervise: Start
) -> None:
    first = supervise(job.command)
    first.hear_until(lambda: first.lines == ["one"])
    read_so_far(store, len("one\n"))
    first.kill()
    job.let_go()
    eventually(lambda: not store.claimed("key"), "the run ends")
    lines = Lines()
    outcome = durable.run("key", job.command, store=store, logs=proctree.Lines(lines))
    assert outcome.returncode == 0
    assert lines.lines == ["two"]
    assert job.ran == 1


@pytest.mark.parametrize("containment", ["warden", "cgroup", "pidns"])
def test_lost_with_its_warden_it_is_swept_and_started_anew(
    store: FileStore, tmp_path: Path, supervise: Start, containment: str
) -> None:
    available(containment)
    flag = tmp_path / "flag"
    # The lock is the descendant's, which nobody ends when its warden is killed.
    inside = f"flock -n {flag} sh -c 'echo inside; sleep 1000 & wait' || echo two at once"
    command = ["sh", "-c", f"setsid sh -c {inside!r} & wait"]
    command[2] = f'setsid sh -c "{inside}" & wait'
    first = supervise(command, containment=containment)
    first.hear_until(lambda: bool(first.lines))
    warden = warden_of(first.said["pid"])
    first.process.send_signal(signal.SIGSTOP)
    while proof.read_stat(warden).name != "proctree-warden":  # type: ignore[union-attr]
        warden = warden_of(warden)  # the init of a namespace is between them
    os.kill(warden, signal.SIGKILL)
    first.kill()
    lines = Lines()
    run = durable.start(
        "key", command, store=store, containment=containment, logs=proctree.Lines(lines)
    )
    assert not run.reconnected
    assert run.number == 2
    assert lines.wait_for(1) == ["inside"]
    attempts = store.attempts("key")
    assert [attempt.exit is None for attempt in attempts] == [True, True]
    end(run)


@pytest.mark.parametrize("containment", ["cgroup", "pidns"])
def test_who_has_reconnected_and_loses_the_warden_ends_what_nothing_marks(
    store: FileStore, supervise: Start, containment: str
) -> None:
    available(containment)
    command = ["sh", "-c", "setsid env -i sleep 1000 & echo ready; wait"]
    first = supervise(command, containment=containment)
    first.hear_until(lambda: first.lines == ["ready"])
    first.kill()
    run = durable.start("key", command, store=store, containment=containment)
    assert run.reconnected
    members = [member.pid for member in run.processes()]
    assert len(members) == 2
    live = run._live
    assert live is not None
    os.kill(live.contained._warden, signal.SIGKILL)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.survivors) == (Reason.WARDEN_LOST, ())
    assert not any(map(is_alive, members))


def test_an_unreadable_record_is_kept_aside_and_a_new_attempt_made(
    store: FileStore, job: Job
) -> None:
    with durable.start("key", job.command, store=store) as run:
        job.let_go()
        run.wait(DEADLINE)
    record = Path(run.place, "request")
    record.write_bytes(record.read_bytes().replace(b"key key", b"key kez"))
    with durable.start("key", job.command, store=store) as again:
        assert again.number == 2
        job.let_go()
        assert again.wait(DEADLINE) is not None
    first, second = durable.list(store)[0].attempts
    assert "checksum" in first.trouble
    assert Path(first.place, "out.log").read_text() == "one\ntwo\n"
    assert second.exit is not None


def test_another_target_under_the_same_key_is_refused(store: FileStore, job: Job) -> None:
    run = durable.start("key", job.command, store=store)
    with pytest.raises(DifferentTarget, match=r"'key' was started with another target: sh -c"):
        durable.start("key", SLEEPER, store=store)
    alike = durable.start("key", SLEEPER, store=store, same_target=False)
    assert alike.pid == run.pid
    job.let_go()
    assert run.wait(DEADLINE) is not None
    with pytest.raises(DifferentTarget, match="Forget the key"):
        durable.run("key", SLEEPER, store=store)
    assert durable.run("key", SLEEPER, store=store, same_target=False).returncode == 0
    assert job.ran == 1


def test_the_directory_makes_another_target_and_the_environment_does_not(
    store: FileStore, tmp_path: Path
) -> None:
    durable.run("key", ["true"], store=store, env={"A": "1"})
    assert durable.start("key", ["true"], store=store, env={"A": "2"}).reconnected
    with pytest.raises(DifferentTarget):
        durable.start("key", ["true"], store=store, cwd=tmp_path)


# -- two of them


def test_of_many_that_race_for_a_key_one_starts_and_the_others_attach(
    store: FileStore, job: Job
) -> None:
    gate = threading.Barrier(8)

    def start() -> Run:
        gate.wait(DEADLINE)
        return durable.start("key", job.command, store=store)

    waiting = [in_thread(start) for _ in range(8)]
    made = [each.get(timeout=DEADLINE) for each in waiting]
    assert sorted(run.reconnected for run in made) == [False] + [True] * 7
    assert [run.owned for run in made].count(True) == 1
    assert len({run.pid for run in made}) == 1
    job.let_go()
    outcomes = [run.wait(DEADLINE) for run in made]
    assert [outcome.returncode for outcome in outcomes] == [0] * 8
    assert job.ran == 1


def test_only_the_owner_ends_it_and_every_one_gets_to_know_why(
    store: FileStore, supervise: Start
) -> None:
    owner = durable.start("key", SLEEPER, store=store)
    watcher = supervise(SLEEPER)
    assert not watcher.said["owned"]
    ours = durable.attach("key", store=store)
    with pytest.raises(NotOwner, match=r"durable\.cancel"):
        ours.kill()
    with pytest.raises(NotOwner):
        ours.signal(signal.SIGTERM)
    assert is_alive(owner.pid or 0)
    watcher.tell("outcome = run.wait(); say(reason=outcome.reason, detail=outcome.detail)")
    owner.kill(reason="no longer needed")
    outcome = ours.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "no longer needed")
    watcher.hear_until(lambda: "reason" in watcher.said)
    assert watcher.said["reason"] == "killed"
    assert watcher.said["detail"] == "no longer needed"
    assert owner.wait(DEADLINE) is not None


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("x" * 1000, "x" * 229),
        ("\u00e9" * 1000, "\u00e9" * 114),  # of which the next one would be cut in two
        ("a \ud800 of \udce9", r"a \ud800 of \udce9"),
        ("two\0parts", "two\0parts"),
    ],
    ids=["long", "wide", "no characters", "with a zero"],
)
def test_whatever_it_says_when_it_ends_it_is_text_that_there_is_room_for(
    store: FileStore, reason: str, kept: str
) -> None:
    run = durable.start("key", SLEEPER, store=store)
    run.kill(reason=reason)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, kept)


def test_a_watcher_becomes_the_owner_when_the_owner_dies(
    store: FileStore, supervise: Start
) -> None:
    first = supervise(SLEEPER)
    ours = durable.start("key", SLEEPER, store=store)
    assert not ours.owned
    first.kill()
    eventually(lambda: ours.owned, "the watcher owns it")
    end(ours)


def test_a_time_limit_that_passed_under_another_owner_is_kept_by_the_next(
    store: FileStore, supervise: Start
) -> None:
    first = supervise(SLEEPER)  # which knows of no limit
    ours = durable.start("key", SLEEPER, store=store, timeout=0.01)
    assert ours._live is not None
    live = ours._live
    eventually(lambda: live._overdue, "the time is over")
    assert is_alive(ours.pid or 0)
    first.kill()
    outcome = ours.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.TIMEOUT, "not done after 0.01 s")


def test_the_time_limit_counts_from_the_start_of_the_run_and_not_of_its_supervisor(
    store: FileStore, job: Job, supervise: Start
) -> None:
    first = supervise(SLEEPER)
    began = time.monotonic()
    first.kill()
    time.sleep(0.3)  # not for something to happen: this is what the limit is about
    run = durable.start("key", SLEEPER, store=store, timeout=0.2)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.reason is Reason.TIMEOUT
    assert time.monotonic() - began < 600


def test_of_the_limit_is_left_what_the_run_has_not_used_up(
    store: FileStore, supervise: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float] = []
    call_later = Live._call_later

    def noted(self: Live, seconds: float) -> None:
        armed.append(seconds)
        call_later(self, seconds)

    monkeypatch.setattr(Live, "_call_later", noted)
    supervise(SLEEPER).kill()
    time.sleep(0.3)  # the span that is measured
    run = durable.start("key", SLEEPER, store=store, timeout=3600)
    eventually(lambda: bool(armed), "the limit is set")
    assert armed[0] <= 3600 - 0.28
    end(run)


def test_a_new_owner_writes_down_how_far_it_has_read(
    store: FileStore, job: Job, supervise: Start
) -> None:
    first = supervise(job.command)
    first.hear_until(lambda: first.lines == ["one"])
    lines, rest = Lines(), Lines()
    run = durable.start("key", job.command, store=store, logs=proctree.Lines(lines))
    first.kill()
    eventually(lambda: run.owned, "the watcher owns it")
    job.let_go()
    assert run.wait(DEADLINE) is not None
    assert lines.lines[-1] == "two"
    assert durable.run("key", job.command, store=store, logs=proctree.Lines(rest)).ok
    assert rest.lines == []


def test_a_watcher_that_leaves_its_block_ends_nothing(store: FileStore) -> None:
    owner = durable.start("key", SLEEPER, store=store)
    with durable.start("key", SLEEPER, store=store) as watcher:
        assert not watcher.owned
    assert watcher.outcome is not None
    assert watcher.outcome.reason is Reason.DETACHED
    assert is_alive(owner.pid or 0)
    end(owner)


def test_who_has_let_go_of_it_is_not_told_how_it_ended(store: FileStore, job: Job) -> None:
    run = durable.start("key", job.command, store=store)
    run.detach()
    assert run._live is not None
    assert run._live.tree.closed.wait(DEADLINE)
    job.let_go()
    eventually(lambda: not store.claimed("key"), "it has ended")
    assert run.outcome is not None
    assert (run.outcome.reason, run.outcome.returncode) == (Reason.DETACHED, None)


def test_in_a_callback_of_the_run_its_end_cannot_be_waited_for(store: FileStore) -> None:
    runs: queue.Queue[Run] = queue.Queue()
    raised: queue.Queue[BaseException] = queue.Queue()

    def wait(_line: str) -> None:
        try:
            runs.get(timeout=DEADLINE).wait()
        except RuntimeError as error:
            raised.put(error)

    command = ["sh", "-c", "echo one; exec sleep 1000"]
    run = durable.start("key", command, store=store, logs=proctree.Lines(wait))
    runs.put(run)
    try:
        assert "wait for itself" in str(raised.get(timeout=DEADLINE))
    finally:
        end(run)


# -- the lease


def test_with_nobody_attached_it_is_ended_when_its_lease_runs_out(
    store: FileStore, supervise: Start
) -> None:
    first = supervise(SLEEPER, lease=0.2)
    first.kill()
    eventually(lambda: not store.claimed("key"), "the lease runs out")
    (attempt,) = store.attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.LEASE
    outcome = durable.attach("key", store=store).outcome
    assert outcome is not None
    assert outcome.reason is Reason.SUPERVISOR_LOST
    assert "lease" in outcome.detail


def test_whoever_is_attached_keeps_it_alive(store: FileStore, job: Job, supervise: Start) -> None:
    first = supervise(job.command, lease=0.1)
    ours = durable.attach("key", store=store)
    first.kill()
    eventually(lambda: ours.owned, "the watcher owns it")
    assert ours.wait(0.5) is None  # five leases
    job.let_go()
    outcome = ours.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 0


def test_a_supervisor_that_ends_in_order_leaves_the_run_too(
    store: FileStore, job: Job, supervise: Start
) -> None:
    first = supervise(job.command)
    first.tell("raise SystemExit")
    first.process.wait(DEADLINE)
    run = durable.start("key", job.command, store=store)
    assert run.reconnected
    job.let_go()
    assert run.wait(DEADLINE) is not None
    assert job.ran == 1


def test_what_was_let_go_of_lives_on(store: FileStore, job: Job) -> None:
    lines = Lines()
    run = durable.start("key", job.command, store=store, logs=proctree.Lines(lines))
    lines.wait_for(1)
    read_so_far(store, len("one\n"))
    run.detach()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.reason is Reason.DETACHED
    assert is_alive(run.pid or 0)
    rest = Lines()
    again = durable.start("key", job.command, store=store, logs=proctree.Lines(rest))
    assert again.pid == run.pid
    eventually(lambda: again.owned, "the first connection is gone")
    job.let_go()
    assert again.wait(DEADLINE) is not None
    assert (lines.lines, rest.lines) == (["one"], ["two"])


def cgroup_of(pid: int) -> str | None:
    return cgroups.parse_own(Path(f"/proc/{pid}/cgroup").read_text())


@pytest.mark.parametrize("containment", ["warden", "cgroup"])
def test_what_was_let_go_of_and_has_lost_its_warden_is_found_where_it_was(
    store: FileStore, containment: str
) -> None:
    available(containment)
    run = durable.start("key", SLEEPER, store=store, containment=containment)
    pid, warden = run.pid or 0, warden_of(run.pid or 0)
    inside = cgroup_of(pid)
    run.detach()
    assert run.wait(DEADLINE) is not None
    os.kill(warden, signal.SIGKILL)
    eventually(lambda: proof.read_stat(warden) is None, "it has been reaped")
    time.sleep(0.1)  # in which whoever reaped it could take its tree apart
    assert cgroup_of(pid) == inside
    again = durable.start("key", SLEEPER, store=store, containment=containment)
    assert again.number == 2
    assert not is_alive(pid)
    end(again)


def test_an_ending_that_a_dead_owner_has_begun_is_carried_through(
    store: FileStore, tmp_path: Path, supervise: Start
) -> None:
    """And who comes meanwhile waits for it, and makes another attempt."""
    text = "trap 'echo asked' TERM; echo ready; while :; do sleep 1000 & wait; done"
    stubborn = ["sh", "-c", text]
    first = supervise(stubborn, lease=600.0, policy=[[15, 0.2], [9, 30.0]])
    first.hear_until(lambda: first.lines == ["ready"])
    first.tell("run.kill(KillPolicy((Stage(15, 600.0), Stage(9, 30.0))))")
    first.hear_until(lambda: "asked" in first.lines)
    first.kill()
    run = durable.start("key", stubborn, store=store, kill=QUICK)
    assert run.number == 2
    (attempt, _) = store.attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.OWNER
    end(run)


def test_all_of_a_run_is_on_the_disk_before_anybody_is_told_of_its_end(
    store: FileStore, job: Job, tmp_path: Path
) -> None:
    run = durable.start("key", job.command, store=store, containment="warden")
    log = tmp_path / "strace"
    with strace.attached(warden_of(run.pid or 0), log, "fsync,fdatasync,renameat,sendto", None):
        job.let_go()
        assert run.wait(DEADLINE) is not None
        eventually(lambda: "+++ exited" in log.read_text(), "the warden has ended")
    calls = log.read_text().splitlines()
    place = Path(run.place)
    renamed = next(n for n, call in enumerate(calls) if call.startswith("renameat"))
    told = max(n for n, call in enumerate(calls) if call.startswith("sendto"))

    def synced(path: Path) -> int:
        return next(n for n, call in enumerate(calls) if "sync(" in call and f"<{path}>" in call)

    for name in ("out.log", "err.log", "request", "exit~"):
        assert synced(place / name) < renamed
    for directory in (place, place.parent, place.parent.parent, place.parent.parent.parent):
        assert renamed < synced(directory) < told


# -- a supervisor that its warden has let go of


def test_one_that_its_warden_has_let_go_of_comes_back_and_owns_it(
    store: FileStore, job: Job
) -> None:
    lines = Lines()
    run = durable.start("key", job.command, store=store, logs=proctree.Lines(lines))
    lines.wait_for(1)
    for _ in range(2):
        disconnect(run)
        assert run.owned
    run.signal(signal.SIGCONT)
    job.let_go()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert lines.lines == ["one", "two"]


@contextlib.contextmanager
def unaware(run: Run) -> Iterator[None]:
    """Its warden has let go of it, and it does not know that yet."""
    assert run._live is not None
    contained, busy, goes_on = run._live.contained, threading.Event(), threading.Event()
    control = contained._control
    assert control is not None
    contained._loop.post(lambda: (busy.set(), goes_on.wait(DEADLINE)))
    try:
        assert busy.wait(DEADLINE)
        control.send(b"nonsense")
        poller = select.poll()
        poller.register(control, 0)
        assert poller.poll(DEADLINE * 1000), "the warden lets go of it"
        yield
    finally:
        goes_on.set()


def test_what_it_asked_for_meanwhile_is_said_when_it_has_come_back(store: FileStore) -> None:
    run = durable.start("key", SLEEPER, store=store, containment="warden")
    assert run._live is not None
    unsaid, warden = run._live.contained._unsaid, warden_of(run.pid or 0)
    with unaware(run):
        os.kill(warden, signal.SIGSTOP)
    try:
        run.kill(reason="meanwhile")
        eventually(lambda: len(unsaid) == 2, "why, and the signal")
        assert run._live.contained._control is None
    finally:
        os.kill(warden, signal.SIGCONT)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "meanwhile")
    (attempt,) = store.attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.note == "killed\0meanwhile"


def test_behind_the_exit_of_the_main_process_it_comes_back_too(
    store: FileStore, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ["sh", "-c", f"(read x < {gate}; echo last) & echo first"]
    run = durable.start("key", command, store=store, logs=CAPTURE, leftovers="wait")
    live = run._live
    assert live is not None
    eventually(lambda: live.tree.life.main_exited, "the main process has exited")
    disconnect(run)
    assert run.owned
    gate.write_text("go\n")
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert outcome.stdout == b"first\nlast\n"
    assert len(outcome.leftovers) == 1


def test_who_comes_back_to_another_owner_watches_and_owns_it_again_behind_that_one(
    store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile what the main process leaves behind is that one's business."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    leaves = ["sh", "-c", f"(read x < {gate}) & echo $!; read x < {gate}"]
    run = durable.start("key", leaves, store=store, logs=CAPTURE)
    other = durable.start("key", leaves, store=store, leftovers="wait")
    disconnect(run)
    assert not run.owned
    eventually(lambda: other.owned, "the other one owns it")
    with pytest.raises(NotOwner):
        run.kill()
    live = run._live
    assert live is not None
    os.kill(run.pid or 0, signal.SIGKILL)
    eventually(lambda: live.tree.life.main_exited, "the main process has exited")
    assert run.wait(0.3) is None
    assert other.processes()
    other.detach()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == -signal.SIGKILL
    refused = [record.getMessage() for record in caplog.records if "EPERM" in record.getMessage()]
    assert not refused, "it has tried to end what was not its own"


def test_a_watcher_that_comes_back_when_the_owner_has_gone_does_its_work(
    store: FileStore, supervise: Start
) -> None:
    """It is told that it owns the run when it comes, and never again."""
    first = supervise(SLEEPER)
    run = durable.start("key", SLEEPER, store=store, timeout=0.01)
    live = run._live
    assert live is not None
    eventually(lambda: live._overdue, "the time is over")
    with unaware(run):
        first.kill()
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.TIMEOUT, "not done after 0.01 s")


def test_one_that_comes_back_behind_the_record_and_before_the_end_of_the_warden(
    store: FileStore, job: Job, tmp_path: Path
) -> None:
    """Nobody listens there any more, and the warden is not yet gone: the run has ended, and how it
    did is known."""
    run = durable.start("key", job.command, store=store, logs=CAPTURE, containment="warden")
    control, slow = Path(run.place, "control"), strace.Delay("unlinkat", 1.0)
    with strace.attached(warden_of(run.pid or 0), tmp_path / "strace", "unlinkat", slow):
        with unaware(run):
            job.let_go()
            eventually(lambda: not control.exists(), "it is recorded")
        outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert outcome.stdout == b"one\ntwo\n"


STOPPED = """
import signal
contained = run._live.contained
def ask_and_stop():
    for _ in range(150):
        try:
            contained._control.send(b"\\1\\3\\0\\0\\0\\0\\0\\0")
        except BlockingIOError:
            break
    os.kill(os.getpid(), signal.SIGSTOP)
contained._loop.post(ask_and_stop)
"""


def test_a_supervisor_that_is_stopped_loses_the_run_and_comes_back_to_it(
    store: FileStore, tmp_path: Path, supervise: Start
) -> None:
    """Nobody reads the lists of its members that it has asked for, and its warden does not wait."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"for i in $(seq 70); do sleep 1000 & done; echo ready; read x < {gate}; exit 4"
    command = ["sh", "-c", text]
    first = supervise(command)
    first.hear_until(lambda: first.lines == ["ready"])
    ours = durable.start("key", command, store=store)
    assert not ours.owned
    first.tell(f"exec({STOPPED!r})")
    try:
        eventually(lambda: ours.owned, "the warden waits no longer")
    finally:
        first.process.send_signal(signal.SIGCONT)
    first.tell("while run.owned: __import__('time').sleep(0.001)")
    first.tell("say(owned=run.owned)")
    first.hear_until(lambda: first.said["owned"] is False)
    ours.detach()
    first.tell("while not run.owned: __import__('time').sleep(0.001)")
    first.tell("say(owned=run.owned)")
    first.hear_until(lambda: first.said["owned"] is True)
    first.tell("outcome = run.wait(); say(status=outcome.returncode, reason=outcome.reason)")
    gate.write_text("go\n")
    first.hear_until(lambda: "status" in first.said)
    assert (first.said["status"], first.said["reason"]) == (4, "exited")


# -- what its main process leaves behind

LEAVES = ["sh", "-c", "setsid sleep 1000 > /dev/null & echo $!"]


def test_leftovers_are_ended_by_the_owner(store: FileStore) -> None:
    run = durable.start("key", LEAVES, store=store, logs=CAPTURE)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)
    assert len(outcome.leftovers) == 1
    assert not is_alive(int(outcome.stdout or b"0"))


def test_and_by_the_warden_where_there_is_none(
    store: FileStore, tmp_path: Path, supervise: Start
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ["sh", "-c", f"setsid sleep 1000 > /dev/null & echo $!; read x < {gate}"]
    first = supervise(command, lease=600.0)
    first.hear_until(lambda: bool(first.lines))
    first.kill()
    gate.write_text("go\n")
    eventually(lambda: not store.claimed("key"), "the rest of the tree is ended")
    assert not is_alive(int(first.lines[0]))
    outcome = durable.run("key", command, store=store)
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 0)


def test_leftovers_wait_waits_for_them(store: FileStore, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ["sh", "-c", f"(read x < {gate}; echo last) & echo first"]
    run = durable.start("key", command, store=store, logs=CAPTURE, leftovers="wait")
    assert run.wait(0.1) is None
    gate.write_text("go\n")
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.stdout == b"first\nlast\n"


# -- cancel, attach, forget


def test_cancel_asks_the_owner(store: FileStore, supervise: Start) -> None:
    first = supervise(SLEEPER)
    first.tell("outcome = run.wait(); say(reason=outcome.reason, detail=outcome.detail)")
    outcome = durable.cancel("key", store=store, timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "cancelled")
    first.hear_until(lambda: "reason" in first.said)
    assert first.said["detail"] == "cancelled"


def test_cancel_ends_what_nobody_owns(store: FileStore, supervise: Start) -> None:
    supervise(SLEEPER).kill()
    outcome = durable.cancel("key", store=store, timeout=DEADLINE)
    assert outcome is not None
    assert outcome.reason is Reason.KILLED
    assert durable.cancel("key", store=store) is None
    with pytest.raises(UnknownKey):
        durable.cancel("another", store=store)


def test_cancel_says_when_it_takes_too_long(store: FileStore) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000 & wait; done"]
    lines = Lines()
    run = durable.start("key", stubborn, store=store, kill=PATIENT, logs=proctree.Lines(lines))
    lines.wait_for(1)
    with pytest.raises(TimeoutError, match="asked to end, and has not"):
        durable.cancel("key", store=store, timeout=0.5)
    end(run)


def test_cancel_waits_no_longer_than_it_may_for_a_warden_that_does_not_answer(
    store: FileStore,
) -> None:
    run = durable.start("key", SLEEPER, store=store, containment="warden")
    warden = warden_of(run.pid or 0)
    os.kill(warden, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError, match=r"not answered in 0\.2 s"):
            durable.cancel("key", store=store, timeout=0.2)
    finally:
        os.kill(warden, signal.SIGCONT)
    end(run)


def test_what_its_warden_ends_is_waited_for_and_not_for_ever(
    store: FileStore, supervise: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting, "PATIENCE", 0.3)
    text = "trap '' TERM; echo ready; while :; do sleep 1000 & wait; done"
    stubborn = ["sh", "-c", text]
    first = supervise(stubborn, lease=0.0, policy=[[15, 5.0], [9, 30.0]])
    first.hear_until(lambda: first.lines == ["ready"])
    first.kill()
    with pytest.raises(StillRunning, match=r"attempt 1 is being ended by its warden, process \d+"):
        durable.start("key", stubborn, store=store)
    assert len(store.attempts("key")) == 1


@pytest.mark.parametrize("replacement", ["mkfifo", "mkdir"])
def test_a_tree_that_puts_something_else_in_place_of_its_output_holds_nobody_up(
    store: FileStore, replacement: str
) -> None:
    """Its warden syncs it, and must not wait for whoever might write to a FIFO."""
    text = f'out=$(readlink /proc/$$/fd/1); rm "$out" "${{out%/*}}/request"; {replacement} "$out"'
    outcome = durable.run("key", ["sh", "-c", text], store=store, logs=CAPTURE)
    assert outcome.returncode == 0


def test_attach_never_starts_anything(store: FileStore, job: Job) -> None:
    with pytest.raises(UnknownKey, match="nothing is recorded"):
        durable.attach("key", store=store)
    with durable.start("key", job.command, store=store) as run:
        assert durable.attach("key", store=store).pid == run.pid
        job.let_go()
        run.wait(DEADLINE)
    ended = durable.attach("key", store=store, logs=CAPTURE)
    assert ended.outcome is not None
    assert ended.outcome.stdout == b"one\ntwo\n"
    Path(run.place, "exit").unlink()
    with pytest.raises(NotRunning, match="it was lost"):
        durable.attach("key", store=store)


def test_forgotten_it_is_as_if_it_had_never_been(store: FileStore, job: Job) -> None:
    with durable.start("key", job.command, store=store) as run:
        with pytest.raises(StillRunning):
            durable.forget("key", store=store)
        job.let_go()
        run.wait(DEADLINE)
    durable.forget("key", store=store)
    assert durable.list(store) == []
    assert not durable.start("key", ["true"], store=store).reconnected


# -- run


def test_retries_are_for_what_fails_and_not_for_what_is_ended_on_purpose(
    store: FileStore, tmp_path: Path
) -> None:
    effect = tmp_path / "effect"
    text = f"echo ran >> {effect}; test $(wc -l < {effect}) = 3"
    outcome = durable.run("key", ["sh", "-c", text], store=store, retries=5)
    assert outcome.returncode == 0
    assert len(effect.read_text().splitlines()) == 3
    assert [attempt.number for attempt in store.attempts("key")] == [1, 2, 3]

    done = in_thread(lambda: durable.run("other", SLEEPER, store=store, retries=5))
    eventually(lambda: store.claimed("other"), "it runs")
    assert durable.cancel("other", store=store, timeout=DEADLINE) is not None
    assert done.get(timeout=DEADLINE).reason is Reason.KILLED
    assert len(store.attempts("other")) == 1


INTERRUPTED = """
import os, signal, sys, threading
from proctree import durable
def interrupt():
    while not durable.FileStore(sys.argv[1]).claimed("key") or not started.is_set():
        started.wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)
started = threading.Event()
from proctree.durable.running import Run
wait = Run.wait
def noted(self, timeout=None):
    started.set()
    return wait(self, timeout)
Run.wait = noted
threading.Thread(target=interrupt, daemon=True).start()
try:
    durable.run("key", ["sleep", "1000"], store=sys.argv[1], interrupted=sys.argv[2])
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("interrupted", ["kill", "detach"])
def test_an_interrupt_ends_the_run_or_lets_go_of_it(store: FileStore, interrupted: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, store.path, interrupted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "interrupted\n", done.stderr
    assert store.claimed("key") is (interrupted == "detach")
    outcome = durable.cancel("key", store=store, timeout=DEADLINE)
    assert (outcome is None) is (interrupted == "kill")


def test_what_cannot_be_started_says_so_and_is_recorded(store: FileStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.run("key", ["no-such-command"], store=store)
    with pytest.raises(NotADirectoryError):
        durable.run("key", ["true"], store=store, cwd=Path(__file__), same_target=False)
    attempts = store.attempts("key")
    assert [attempt.exit and attempt.exit.cause for attempt in attempts] == [Cause.NOT_STARTED] * 2
    outcome = durable.attach("key", store=store).outcome
    assert outcome is not None
    assert outcome.reason is Reason.EXEC_FAILED
    assert outcome.detail == "chdir: ENOTDIR"
    assert not store.claimed("key")
    assert durable.run("key", ["true"], store=store, same_target=False).ok


# -- targets, containments, and the host program


def works() -> None:
    os.write(1, b"from a function\n")
    raise SystemExit(4)


@pytest.mark.parametrize("containment", ["warden", "cgroup", "pidns"])
@pytest.mark.parametrize("target", [works, Function("integration.called:say", ("named",))])
def test_functions_are_targets_too(store: FileStore, target: Any, containment: str) -> None:
    available(containment)
    run = durable.start("key", target, store=store, containment=containment, logs=CAPTURE)
    again = durable.start("key", target, store=store, allowed=(0, 4))
    assert again.reconnected
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    expected = (4, b"from a function\n") if target is works else (0, b"named\n")
    assert (outcome.returncode, outcome.stdout) == expected
    assert outcome.containment == containment
    assert again.wait(DEADLINE) is not None


def test_the_tree_has_nothing_of_its_wardens(store: FileStore) -> None:
    run = durable.start("key", ["sh", "-c", "ls -l /proc/$$/fd; :"], store=store, logs=CAPTURE)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    links = [line.split()[8:] for line in (outcome.stdout or b"").decode().splitlines()[1:]]
    assert [link[0] for link in links] == ["0", "1", "2"]


def test_a_fork_of_the_host_holds_no_lock(store: FileStore) -> None:
    """It has copies of our descriptors only for as long as it takes to close them."""
    run = durable.start("key", SLEEPER, store=store)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    end(run)
    eventually(lambda: not store.claimed("key"), "nobody holds the lock")
    os.close(writer)
    os.waitpid(pid, 0)


def test_a_warden_that_does_not_answer_is_named_and_nothing_started_beside_it(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting, "ANSWER_SECONDS", 0.2)
    run = durable.start("key", SLEEPER, store=store, containment="warden")
    warden = warden_of(run.pid or 0)
    os.kill(warden, signal.SIGSTOP)
    try:
        with pytest.raises(StillRunning, match=r"attempt 1 runs and cannot be reached.*ETIMEDOUT"):
            durable.start("key", SLEEPER, store=store)
    finally:
        os.kill(warden, signal.SIGCONT)
    assert len(store.attempts("key")) == 1
    end(run)


@pytest.mark.parametrize("kind", [FileStore, SqlStore])
@pytest.mark.parametrize(("killed", "attempts"), [(2, 3), (9, 3)])
def test_an_attempt_whose_warden_is_killed_before_it_has_begun_is_followed_by_another(
    store: FileStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
    attempts: int,
    kind: type,
) -> None:
    """But not for ever."""
    shared: FileStore | SqlStore = store
    if kind is SqlStore:
        shared = SqlStore(f"sqlite:///{tmp_path}/records", lease=600.0, local=store)
    folder = tmp_path / "bin"
    folder.mkdir()
    warden = folder / "warden"
    times = f'for n in $(seq {killed}); do mkdir "{folder}/$n" 2> /dev/null && kill -9 $$; done'
    warden.write_text(f'#!/bin/sh\n{times}\nexec {warden_path()} "$@"\n')
    warden.chmod(0o755)
    monkeypatch.setenv(WARDEN_VARIABLE, str(warden))
    if killed < attempts:
        outcome = durable.run("key", ["sh", "-c", "echo done"], store=shared, logs=CAPTURE)
        assert (outcome.returncode, outcome.stdout) == (0, b"done\n")
    else:
        with pytest.raises(proctree.ContainmentUnavailable, match="the warden ended"):
            durable.run("key", ["sh", "-c", "echo done"], store=shared)
    for each in {store, shared}:
        recorded = each.attempts("key")
        assert len(recorded) == attempts
        assert len({a.request.tree_id for a in recorded if a.request is not None}) == attempts
        assert not each.claimed("key")


def test_standard_input_is_empty_or_what_was_given(store: FileStore, tmp_path: Path) -> None:
    for stdin, expected in ((None, b""), (b"given", b"given")):
        outcome = durable.run(f"{stdin!r}", ["cat"], store=store, stdin=stdin, logs=CAPTURE)
        assert outcome.stdout == expected


def test_both_streams_in_one_file(store: FileStore) -> None:
    command = ["sh", "-c", "echo out; echo err >&2; echo out"]
    options: dict[str, Any] = {"store": store, "stderr": proctree.STDOUT, "logs": CAPTURE}
    run = durable.start("key", [*command], **options)
    again = durable.start("key", [*command], **options)
    outcomes = [run.wait(DEADLINE), again.wait(DEADLINE), durable.run("key", command, **options)]
    for outcome in outcomes:  # started, reconnected to, and recorded
        assert outcome is not None
        assert (outcome.stdout, outcome.stderr) == (b"out\nerr\nout\n", None)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": ""}, ValueError, "key"),
    ({"key": 7}, TypeError, "key"),
    ({"key": "a\0b"}, ValueError, "key"),
    ({"key": "a" * 5000}, ValueError, "key"),
    ({"allowed": 0}, TypeError, "allowed"),
    ({"allowed": ()}, ValueError, "allowed"),
    ({"allowed": (256,)}, ValueError, "allowed"),
    ({"allowed": ("0",)}, TypeError, "allowed"),
    ({"lease": -1}, ValueError, "lease"),
    ({"lease": float("inf")}, ValueError, "lease"),
    ({"lease": "1"}, TypeError, "lease"),
    ({"logs": print}, TypeError, "logs"),
    ({"logs": (None, None, None)}, ValueError, "logs"),
    ({"store": 7}, TypeError, "store"),
    ({"retries": -1}, ValueError, "retries"),
    ({"retries": 1.5}, TypeError, "retries"),
    ({"interrupted": "wait"}, ValueError, "interrupted"),
    ({"same_target": 1}, TypeError, "same_target"),
    ({"leftovers": "leave"}, ValueError, "leftovers"),
    ({"stderr": proctree.CAPTURE}, ValueError, "stderr"),
    ({"stdin": proctree.INHERIT}, ValueError, "stdin"),
    ({"target": "true"}, TypeError, "argv"),
    ({"pty": True}, TypeError, "pty"),
    ({"channel": None}, TypeError, "channel"),
    ({"containment": "group"}, proctree.ContainmentUnavailable, "lives on with its warden"),
]


@pytest.mark.parametrize(("wrong", "error", "named"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named_and_nothing_is_started(
    store: FileStore, wrong: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments = {"key": "key", "target": ["true"], "store": store} | wrong
    with pytest.raises(error, match=named):
        durable.run(arguments.pop("key"), arguments.pop("target"), **arguments)
    assert store.keys() == []
    assert not store.claimed("key")


def test_a_template_ends_with_its_supervisor_and_so_is_refused(store: FileStore) -> None:
    with proctree.Template([]) as template:
        target = Function("integration.called:say", template=template)
        with pytest.raises(ValueError, match="template"):
            durable.run("key", target, store=store)


# -- on the command line

PROCTREE = [sys.executable, "-m", "proctree.cli"]


def test_on_the_command_line_it_is_run_lost_sight_of_and_attached_to(
    store: FileStore, tmp_path: Path
) -> None:
    job = Job(tmp_path, status=5)
    command = [*PROCTREE, "run", "--durable", "key", "--store", store.path, "--", *job.command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "one\n"
        read_so_far(store, len("one\n"))
        first.kill()
    attach = [*PROCTREE, "attach", "key", "--store", store.path]
    with subprocess.Popen(attach, stdout=subprocess.PIPE, text=True) as second:
        job.let_go()
        text, _ = second.communicate(timeout=DEADLINE)
    assert (text, second.returncode) == ("two\n", 5)
    done = subprocess.run(attach, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.returncode) == ("", 5)
    other = [*PROCTREE, "run", "--durable", "key", "--store", store.path, "--", "true"]
    done = subprocess.run(other, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 125
    assert "another target" in done.stderr
    done = subprocess.run([*attach[:3], "attach", "none", *attach[5:]], capture_output=True)
    assert done.returncode == 125


@pytest.mark.parametrize("keep", [False, True])
def test_a_signal_ends_the_run_or_lets_go_of_it(store: FileStore, keep: bool) -> None:
    options = ["--keep"] if keep else []
    text = "echo ready; exec sleep 1000"
    command = [*PROCTREE, "run", "--durable", "key", "--store", store.path, *options]
    with subprocess.Popen(
        [*command, "--", "sh", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM
    outcome = durable.cancel("key", store=store, timeout=DEADLINE)
    assert (outcome is not None) is keep
