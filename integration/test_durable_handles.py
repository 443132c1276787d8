"""Handles of durable runs: what they cost, whose outcome they answer, and what an interrupt does to
them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import proctree
from integration.conftest import DEADLINE, Lines, eventually, is_alive, start_supervisor
from proctree import CAPTURE, KillPolicy, Reason, Stage, durable, loop
from proctree.containment import reaching, warden
from proctree.durable import Attempt, FileStore, Run
from proctree.durable.recording import Cause
from proctree.lifecycle import State

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


def test_who_only_comes_to_look_ends_no_leftovers_that_are_waited_for(
    store: FileStore, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ["sh", "-c", f"(read x < {gate}; echo last) & echo first"]
    run = durable.start("key", command, store=store, leftovers="wait")
    assert run._live is not None
    life = run._live.tree.life
    eventually(lambda: life.main_exited, "the main process exits")
    run.detach()
    assert run.wait(DEADLINE) is not None
    again = durable.attach("key", store=store, logs=CAPTURE)
    eventually(lambda: again.owned, "the first connection is gone")
    gate.write_text("go\n")
    outcome = again.wait(DEADLINE)
    assert outcome is not None
    assert outcome.stdout == b"first\nlast\n"


def test_a_handle_answers_for_its_own_run_and_not_for_the_next_of_that_number(
    store: FileStore,
) -> None:
    run = durable.start("key", ["sh", "-c", "exit 3"], store=store)
    eventually(lambda: not store.claimed("key"), "the run ends")
    durable.forget("key", store=store)
    assert durable.run("key", ["sh", "-c", "exit 4"], store=store).returncode == 4
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 3


# -- who gets no handle lets go


def test_a_logger_that_is_none_leaves_nobody_attached(store: FileStore) -> None:
    run = durable.start("key", SLEEPER, store=store)

    def come() -> None:
        with pytest.raises(AttributeError):
            durable.attach("key", store=store, logs=proctree.Log(logger=object()))

    come()
    before = descriptors()
    for _ in range(10):
        come()
    assert descriptors() <= before + 2  # of what other threads are busy with
    end(run)


INTERRUPTED = """
import os, signal, sys, threading, time
from proctree import durable, loop

def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and not frame.f_code.co_filename.endswith("latch.py"):
        frame = frame.f_back
    return frame is not None

def interrupt():
    while not waits():
        pass
    os.kill(os.getpid(), signal.SIGINT)
    interrupted.wait()
    gate.set()

def on_signal(*_):
    interrupted.set()
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, on_signal)
interrupted, gate = threading.Event(), threading.Event()
if sys.argv[2] == "attach":
    loop.get().post(gate.wait)  # busy until the interrupt has come
threading.Thread(target=interrupt).start()
try:
    getattr(durable, sys.argv[2])("key", store=sys.argv[1])
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
sys.stdin.read()
"""


def sockets(pid: int) -> int:
    """How many SOCK_SEQPACKET sockets it has: it supervises nothing else."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    kinds = {f"socket:[{line.split()[6]}]": line.split()[4] for line in lines}
    return sum(kinds.get(inode) == "0005" for inode in inodes)


@pytest.mark.parametrize("call", ["attach", "cancel"])
def test_an_interrupted_caller_does_not_stay_attached(store: FileStore, call: str) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000; done"]
    patient = KillPolicy((Stage(15, 600.0), Stage(9, 30.0)))
    lines = Lines()
    run = durable.start("key", stubborn, store=store, kill=patient, logs=proctree.Lines(lines))
    lines.wait_for(1)
    with start_supervisor(INTERRUPTED, store.path, call) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "interrupted\n"
        eventually(lambda: sockets(other.pid) == 0, "its connection is gone")
        other.communicate(timeout=DEADLINE)
    end(run)


# -- whose connection breaks


def break_connection(run: Run) -> None:
    """Nonsense has the warden let go of us, much as it lets go of who does not read."""
    assert run._live is not None
    contained = run._live.contained
    loop.get().post(lambda: contained._say(b"nonsense"))


@pytest.mark.parametrize("patient", [False, True])
def test_an_owner_that_cannot_come_back_leaves_the_tree_to_its_lease(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """And if it ends soon, it knows of that end."""
    monkeypatch.setattr(warden, "COME_BACK_SECONDS", DEADLINE if patient else 0.0)
    run = durable.start("key", SLEEPER, store=store, lease=1.0)
    Path(run.place, "control").unlink()
    break_connection(run)
    outcome = run.wait(DEADLINE)
    assert outcome is not None
    expected = (Reason.DETACHED, "its warden cannot be reached")
    if patient:
        expected = (Reason.SUPERVISOR_LOST, "no supervisor was attached for as long as its lease")
    assert (outcome.reason, outcome.detail) == expected
    eventually(lambda: not store.claimed("key"), "the lease runs out")
    (attempt,) = store.attempts("key")
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.LEASE


def test_a_watcher_that_comes_back_as_the_owner_acts_as_one(
    store: FileStore, tmp_path: Path
) -> None:
    gate, left = tmp_path / "gate", tmp_path / "left"
    os.mkfifo(gate)
    command = ["sh", "-c", f"setsid sleep 1000 & echo $! > {left}; read x < {gate}; exit 3"]
    owner = durable.start("key", command, store=store)
    watcher = durable.start("key", command, store=store)
    break_connection(watcher)
    owner.detach()
    eventually(lambda: watcher.owned, "the watcher owns it")
    gate.write_text("go\n")
    outcome = watcher.wait(DEADLINE)
    assert outcome is not None
    assert outcome.returncode == 3
    assert not is_alive(int(left.read_text()))


def test_an_owner_that_comes_back_as_a_watcher_acts_as_one(
    store: FileStore, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    os.mkfifo(first)
    os.mkfifo(second)
    command = ["sh", "-c", f"(read x < {second}; echo last) & read x < {first}; exit 3"]
    owner = durable.start("key", command, store=store, logs=CAPTURE)
    watcher = durable.start("key", command, store=store, leftovers="wait")
    break_connection(owner)
    eventually(lambda: watcher.owned and not owner.owned, "they have changed places")
    first.write_text("go\n")
    assert owner._live is not None
    life = owner._live.tree.life
    eventually(lambda: life.main_exited, "the main process exits")
    assert owner.wait(0.1) is None
    assert life.state is State.RUNNING  # and ends nothing
    second.write_text("go\n")
    outcome = owner.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.returncode, outcome.stdout) == (3, b"last\n")
    assert watcher.wait(DEADLINE) is not None


# -- what ends, or begins, while somebody comes


def test_a_warden_that_ends_while_it_is_looked_up_is_nobody(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = ["sh", "-c", f"read x < {gate}; exit 3"]
    run = durable.start("key", command, store=store)
    peer = reaching._peer

    def peer_that_ends(control: socket.socket) -> int:
        pid = peer(control)
        gate.write_text("go\n")
        assert run.wait(DEADLINE) is not None
        return pid

    monkeypatch.setattr(reaching, "_peer", peer_that_ends)
    again = durable.start("key", command, store=store, allowed=(3,))
    assert again.reconnected
    assert again.outcome is not None
    assert again.outcome.returncode == 3


class Late(FileStore):
    """A run begins between our look at its lock and that at its records."""

    run: Run | None = None

    def attempts(self, key: str) -> list[Attempt]:
        if self.run is None:
            self.run = durable.start(key, SLEEPER, store=FileStore(self.path))
        return super().attempts(key)


def test_what_has_just_begun_is_not_lost(store: FileStore) -> None:
    late = Late(store.path)
    watcher = durable.attach("key", store=late)
    assert late.run is not None
    assert watcher.pid == late.run.pid
    end(late.run)
    assert watcher.wait(DEADLINE) is not None
