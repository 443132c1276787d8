"""Moments in which something happens to the warden while something else is under way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import proctree
from integration.conftest import DEADLINE, available, eventually, is_alive, start_supervisor
from integration.test_warden_faults import warden_of
from integration.wards import standing_loop
from proctree import (
    KillPolicy,
    ProctreeError,
    Reason,
    Stage,
    State,
    WatchedSubprocess,
    loop,
    protocol,
)
from proctree.containment.warden import WARDEN_VARIABLE, WardenContained
from proctree.process import cgroups, proof
from proctree.protocol import Type


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", "it is stopped")


def state_of(pid: int) -> str | None:
    stat = proof.read_stat(pid)
    return None if stat is None else stat.state


def until_said() -> None:
    """Returns when everything that was asked for has been sent: the loop takes jobs in order."""
    done = threading.Event()
    loop.get().post(done.set)
    assert done.wait(DEADLINE)


# What one side says while the other side ends: a unix socket answers that with an error
# (ECONNRESET), ahead of everything that was said before and has not been read yet.


def test_a_command_that_the_warden_leaves_unread_does_not_lose_it(tmp_path: Path) -> None:
    """Its last messages, with the exit status and the proof, are there all the same."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handle = WatchedSubprocess.start(["sh", "-c", f"read _ <{fifo}; exit 5"], containment="warden")
    warden, main = warden_of(handle), handle.pid
    assert main is not None
    stop(warden)
    fifo.write_text("go\n")
    eventually(lambda: state_of(main) == "Z", "the main process has ended")
    handle.thaw()
    until_said()
    # It sees first that its last child has ended, and is through.
    os.kill(warden, signal.SIGCONT)
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 5)
    assert outcome.usage.max_rss > 0


def test_an_answer_that_the_supervisor_leaves_unread_does_not_end_what_is_left(
    tmp_path: Path,
) -> None:
    """RELEASE is there all the same: leftovers that may stay do stay."""
    fifo, copy = tmp_path / "fifo", tmp_path / "copy"
    os.mkfifo(fifo)
    os.mkfifo(copy)
    script = f"cat {copy} & read _ <{fifo}; exit 0"
    handle = WatchedSubprocess.start(
        ["sh", "-c", script], containment="warden", leftovers="leave", stdin=-3
    )
    warden, main = warden_of(handle), handle.pid
    assert main is not None
    writer = os.open(copy, os.O_WRONLY)  # opens when cat has opened it
    stop(warden)
    fifo.write_text("go\n")
    eventually(lambda: state_of(main) == "Z", "the main process has ended")
    handle.signal(signal.SIGCONT, "main")
    until_said()
    standing, go_on = threading.Event(), threading.Event()
    loop.get().post(lambda: standing.set() or go_on.wait(DEADLINE))
    assert standing.wait(DEADLINE)
    os.kill(warden, signal.SIGCONT)
    eventually(
        lambda: state_of(main) is None and state_of(warden) == "S",
        "it has told the end of the main process, and then answered",
    )
    stop(warden)  # so that it reads RELEASE when the other end has been closed
    go_on.set()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    (left,) = outcome.leftovers
    os.kill(warden, signal.SIGCONT)
    eventually(lambda: state_of(warden) is None, "the warden is through")
    assert is_alive(left.pid)
    os.close(writer)
    eventually(lambda: not is_alive(left.pid), "it ends by itself")


class Leaver(NamedTuple):
    """A tree that leaves one process behind, and whose main process ends when it is told to; what
    is left lives until `writer` is closed."""

    handle: WatchedSubprocess
    fifo: Path
    writer: int
    left: int

    @property
    def warden(self) -> int:
        return warden_of(self.handle)

    @property
    def main(self) -> int:
        assert self.handle.pid is not None
        return self.handle.pid

    def end_main(self) -> None:
        """It is dead, and its warden, which is stopped, does not know."""
        stop(self.warden)
        self.fifo.write_text("go\n")
        eventually(lambda: state_of(self.main) == "Z", "the main process has ended")

    def is_frozen(self) -> bool:
        leaf = self.handle._tree.contained.cgroup  # type: ignore[attr-defined]
        if leaf is None:
            return state_of(self.left) == "T"
        return "frozen 1" in Path(leaf, "cgroup.events").read_text()

    def is_told(self) -> bool:
        """The warden has told the end of the main process, and has nothing to do."""
        return state_of(self.main) is None and state_of(self.warden) == "S"

    def lives_on(self) -> None:
        assert is_alive(self.left)
        os.close(self.writer)
        eventually(lambda: not is_alive(self.left), "it goes on, and so ends by itself")


@pytest.fixture(params=["warden", "cgroup"])
def leaver(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Leaver]:
    containment = available(request.param)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    fifo, life = tmp_path / "fifo", tmp_path / "life"
    os.mkfifo(fifo)
    os.mkfifo(life)
    # Without its environment, what is left bears no mark.
    script = f"env -i cat {life} & read _ <{fifo}; exit 3"
    handle = WatchedSubprocess.start(
        ["sh", "-c", script], containment=containment, leftovers="leave"
    )
    writer = os.open(life, os.O_WRONLY)  # opens when cat has opened it
    (left,) = [member.pid for member in handle.processes() if member.pid != handle.pid]
    yield Leaver(handle, fifo, writer, left)
    if handle._tree.contained.cgroup is not None:  # type: ignore[attr-defined]
        cgroups.end(handle._tree.contained.cgroup, DEADLINE)  # type: ignore[attr-defined]
    if is_alive(left):
        os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_what_may_stay_stays_when_the_warden_is_killed_before_it_lets_go(
    leaver: Leaver, frozen: bool
) -> None:
    handle, warden = leaver.handle, leaver.warden
    contained = handle._tree.contained
    assert isinstance(contained, WardenContained)
    leaver.end_main()
    if frozen:
        handle.freeze()
        until_said()
    with standing_loop():
        os.kill(warden, signal.SIGCONT)
        eventually(leaver.is_told, "it has told the end of the main process")
        if frozen:
            eventually(leaver.is_frozen, "it has obeyed")
        os.kill(warden, signal.SIGKILL)
        eventually(lambda: state_of(warden) == "Z", "it is dead")
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 3)
    assert [member.pid for member in outcome.leftovers] == [leaver.left]
    assert proctree.sweep() == []
    if contained.cgroup is not None:
        leaf = Path(contained.cgroup)
        eventually(lambda: not leaf.exists(), "the cgroup is given back")
        own = Path("/proc/self/cgroup").read_text()
        assert Path(f"/proc/{leaver.left}/cgroup").read_text() == own
    leaver.lives_on()


def test_it_is_let_go_by_a_warden_that_could_not_be_told_at_once(leaver: Leaver) -> None:
    """There is no room for RELEASE: an end of file instead would have it end what is left. And the
    warden, whose answers nobody waits for any more, must come to it."""
    handle, warden = leaver.handle, leaver.warden
    contained = handle._tree.contained
    assert isinstance(contained, WardenContained)
    leaver.end_main()
    with standing_loop():
        os.kill(warden, signal.SIGCONT)
        eventually(leaver.is_told, "it has told the end of the main process")
        stop(warden)
        assert contained._control is not None
        with pytest.raises(BlockingIOError):
            while True:
                contained._control.send(protocol.encode_plain(Type.LIST, 10**6))
    assert handle.wait(timeout=DEADLINE) is not None
    assert len(contained._unsaid) == 1
    os.kill(warden, signal.SIGCONT)
    eventually(lambda: state_of(warden) is None, "the warden is through")
    leaver.lives_on()


LEAVES = """
import os, signal, sys, time
import proctree
from proctree.process import proof
handle = proctree.WatchedSubprocess.start(
    ["sh", "-c", f"sleep 1000 & echo $!; read _ <{sys.argv[1]}; exit 0"],
    containment="warden", leftovers="leave", stdin=proctree.DEVNULL,
)
contained, loop = handle._tree.contained, handle._tree._loop
os.kill(contained._warden, signal.SIGSTOP)
while proof.read_stat(contained._warden).state != "T": time.sleep(0.001)
with open(sys.argv[1], "w") as file: file.write("go\\n")
while not proof.read_stat(handle.pid).dead: time.sleep(0.001)
for _ in range(20):
    handle.signal(signal.SIGCONT, "main")
def go():
    contained.release()
    os.write(1, b"warden %d\\n" % contained._warden)
    os._exit(0)
loop.post(go)
time.sleep(1000)
"""


def test_race_the_supervisor_ends_right_behind_release(tmp_path: Path) -> None:
    """The warden sees both at once: its end, and what it had said before."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with start_supervisor(LEAVES, str(fifo)) as supervisor:
        assert supervisor.stdout is not None
        left = int(supervisor.stdout.readline())
        warden = int(supervisor.stdout.readline().split()[1])
        supervisor.wait(DEADLINE)
    pidfd = os.pidfd_open(left)
    os.kill(warden, signal.SIGCONT)
    eventually(lambda: state_of(warden) in (None, "Z"), "the warden is through")
    try:
        assert is_alive(left)
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def test_the_loop_rests_while_the_output_of_what_is_left_is_waited_for(tmp_path: Path) -> None:
    thread = loop.get()._thread.ident
    assert thread is not None
    clock = time.pthread_getcpuclockid(thread)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    before = time.clock_gettime(clock)
    outcome = proctree.run(
        ["sh", "-c", f"cat {fifo} & exit 0"],
        containment="warden",
        leftovers="leave",
        stdout=proctree.CAPTURE,
        drain_timeout=1.0,
    )
    spent = time.clock_gettime(clock) - before
    (left,) = outcome.leftovers
    os.close(writer)
    os.close(reader)
    eventually(lambda: not is_alive(left.pid), "it ends by itself")
    assert spent < 0.3, "seconds of CPU time, of one second in which nothing happens"


def test_killed_while_the_warden_does_not_start_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`launch` must not return as if the main process ran."""
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 1000\n")
    mute.chmod(0o755)
    monkeypatch.setenv(WARDEN_VARIABLE, str(mute))
    handle = WatchedSubprocess(["true"], containment="warden")
    killed: list[Exception] = []

    def launch() -> None:
        try:
            handle.launch()
        except ProctreeError as error:
            killed.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    eventually(lambda: handle.state is State.STARTING, "it is starting")
    handle.kill(KillPolicy((Stage(signal.SIGKILL, 0.1),)), reason="changed our mind")
    thread.join(DEADLINE)
    assert "killed before it had started" in str(killed)
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode, outcome.pid) == (Reason.KILLED, None, None)
