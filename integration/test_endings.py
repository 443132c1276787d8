"""Trees that do not want to end, and end."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lines,
    Stopwatch,
    available,
    eventually,
    is_alive,
    living,
)
from integration.fault_tools import cgroup_mount
from proctree import KillPolicy, Reason, Stage, WatchedSubprocess
from proctree.containment.warden import WARDEN_VARIABLE, warden_path
from proctree.process import proof

pytestmark = pytest.mark.wardens("sanitized")


def start(argv: list[str], containment: str, **options: object) -> tuple[WatchedSubprocess, Lines]:
    lines = Lines()
    handle = WatchedSubprocess.start(
        argv,
        containment=containment,
        stdout=proctree.Lines(lines),
        kill=QUICK,
        **options,
    )
    return handle, lines


def end(handle: WatchedSubprocess, policy: KillPolicy | None = None) -> proctree.Outcome:
    handle.kill(policy)
    outcome = handle.wait(timeout=60)
    assert outcome is not None, f"{handle} did not end"
    return outcome


def test_a_plain_child_ends_by_sigterm(actors: str, containment: str) -> None:
    handle, lines = start([actors, "pause"], containment)
    lines.wait_for()
    outcome = end(handle)
    assert (outcome.returncode, outcome.reason) == (-15, Reason.KILLED)
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM]
    assert outcome.containment == containment
    assert not living()


def test_one_that_ignores_sigterm_gets_sigkill(actors: str, containment: str) -> None:
    handle, lines = start([actors, "ignore"], containment)
    lines.wait_for()
    outcome = end(handle)
    assert outcome.returncode == -9
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
    assert outcome.stages[1].at - outcome.stages[0].at >= 0.3
    assert not living()


def test_a_stopped_one_sees_sigterm_by_sigcont(actors: str, containment: str) -> None:
    handle, lines = start([actors, "stopped"], containment)
    lines.wait_for()
    pid = handle.pid
    assert pid is not None
    eventually(lambda: (s := proof.read_stat(pid)) is not None and s.state == "T", "it stops")
    outcome = end(handle, KillPolicy(stages=(Stage(15, 20.0), Stage(9, 5.0))))
    # SIGTERM did it, not SIGKILL after 20 s: it was let go on to see it.
    assert outcome.returncode == -15
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM]


@pytest.mark.wardens("valgrind")
def test_a_daemon_with_closed_descriptors_and_no_environment(actors: str) -> None:
    """setsid, double fork, closed fds, env -i, main gone, SIGTERM ignored: all at once."""
    lines = Lines()
    outcome = proctree.run(
        ["env", "-i", actors, "daemonise"],
        stdout=proctree.Lines(lines),
        containment="warden",
        kill=QUICK,
    )
    daemon = int(lines.lines[0])
    assert outcome.returncode == 0
    assert [member.pid for member in outcome.leftovers] == [daemon]
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
    assert not is_alive(daemon)
    assert not living()


def test_a_daemon_is_known_to_the_group_backend_by_its_environment(actors: str) -> None:
    lines = Lines()
    outcome = proctree.run(
        [actors, "daemonise"], stdout=proctree.Lines(lines), containment="group", kill=QUICK
    )
    assert [member.pid for member in outcome.leftovers] == [int(lines.lines[0])]
    assert not living()


@pytest.mark.wardens("valgrind")
def test_main_that_exits_first(actors: str, containment: str) -> None:
    outcome = proctree.run(
        ["sh", "-c", f"{actors} ignore & {actors} pause & exit 7"],
        containment=containment,
        stdout=proctree.DEVNULL,
        kill=QUICK,
    )
    assert (outcome.returncode, outcome.reason) == (7, Reason.EXITED)
    assert len(outcome.leftovers) == 2
    assert not living()


def test_leftovers_may_be_waited_for(containment: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handle = WatchedSubprocess.start(
        ["sh", "-c", f"cat {fifo} >{tmp_path}/copy & exit 0"],
        leftovers="wait",
        containment=containment,
    )
    writer = os.open(fifo, os.O_WRONLY)  # opens when cat has opened it
    eventually(lambda: handle._tree.life.main_exited, "the main process is gone")
    assert handle.outcome is None
    os.write(writer, b"by itself")
    os.close(writer)
    outcome = handle.wait(timeout=30)
    assert outcome is not None
    assert outcome.stages == ()
    assert (tmp_path / "copy").read_bytes() == b"by itself"
    assert len(outcome.leftovers) >= 1


def test_leftovers_may_be_left(containment: str, tmp_path: Path) -> None:
    if containment == "pidns":
        with pytest.raises(proctree.ContainmentUnavailable, match="ends them with the namespace"):
            proctree.run(["true"], leftovers="leave", containment=containment)
        return
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    outcome = proctree.run(
        ["sh", "-c", f"cat {fifo} >{tmp_path}/copy & exit 0"],
        leftovers="leave",
        containment=containment,
        stdout=proctree.CAPTURE,
    )
    (left,) = outcome.leftovers
    assert is_alive(left.pid)
    assert outcome.stages == ()
    with open(fifo, "w") as writer:
        writer.write("still alive")
    eventually(lambda: not is_alive(left.pid), "it ends when it has read everything")
    assert (tmp_path / "copy").read_text() == "still alive"


@pytest.mark.parametrize("containment", ["cgroup", "warden", "group"])
def test_what_is_let_go_while_it_is_frozen_goes_on(containment: str, tmp_path: Path) -> None:
    """Nobody would be left who could thaw it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handle = WatchedSubprocess.start(
        ["sh", "-c", f"cat {fifo} & exec sleep 1000"],
        leftovers="leave",
        containment=available(containment),
        stdin=proctree.DEVNULL,
    )
    writer = os.open(fifo, os.O_WRONLY)  # opens when cat has opened it
    handle.freeze()
    assert handle.pid is not None
    eventually(lambda: not runs(handle.pid), "it is frozen")
    os.kill(handle.pid, signal.SIGKILL)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    (left,) = outcome.leftovers
    eventually(lambda: runs(left.pid), "it goes on")
    os.close(writer)
    eventually(lambda: not is_alive(left.pid), "it ends when it has read everything")


def runs(pid: int | None) -> bool:
    """Or sleeps, but could run: neither SIGSTOP nor a frozen cgroup keeps it from that."""
    try:
        stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        cgroup = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        mount = cgroup_mount("cgroup2")
        events = None if mount is None else mount / cgroup.lstrip("/") / "cgroup.events"
        if events is None or not events.exists():  # the root has none, and cannot be frozen
            return not stopped
        return not stopped and "frozen 1" not in events.read_text()
    except FileNotFoundError:
        return False


def test_a_thousand_processes_in_a_thousand_sessions(actors: str, containment: str) -> None:
    handle, lines = start([actors, "sessions", "1000"], containment)
    lines.wait_for()
    outcome = end(handle, KillPolicy.now())
    assert outcome.survivors == ()
    assert not living()
    if containment == "warden":
        assert outcome.stages[0].reached == 1001


def test_each_process_is_signalled_once_a_stage(actors: str, containment: str) -> None:
    """One in the main group, one outside it: both count one SIGTERM."""
    script = f"trap '' TERM; {actors} counter & setsid {actors} counter & wait"
    lines = Lines()
    handle = WatchedSubprocess.start(
        ["bash", "-c", script],
        containment=containment,
        stdout=proctree.Lines(lines),
        kill=KillPolicy(stages=(Stage(15, 60.0),)),
    )
    lines.wait_for(2)
    handle.kill()
    eventually(lambda: handle.state is proctree.State.STOPPING, "the stage begins")
    handle.signal(signal.SIGUSR1, scope="tree")
    assert sorted(lines.wait_for(4)[2:]) == ["1", "1"]
    outcome = end(handle, KillPolicy.now())
    assert outcome.stages[0].signal == signal.SIGTERM


@pytest.mark.wardens("valgrind")
def test_scopes(actors: str, containment: str) -> None:
    """main: the shell alone; group: its group; tree: everything."""
    script = f"""
        trap 'echo main' USR2
        {actors} counter & setsid {actors} counter & echo up
        while :; do wait; done
    """
    handle, lines = start(["bash", "-c", script], containment)
    lines.wait_for(3)
    handle.signal(signal.SIGUSR2, scope="main")
    assert lines.wait_for(4)[3] == "main"
    handle.signal(signal.SIGTERM, scope="group")
    # Two counters; SIGTERM ended the shell, and its group's counter has one.
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.returncode == -15
    assert len(outcome.leftovers) == 2
    assert not living()


def test_a_bounded_fork_bomb(actors: str, containment: str) -> None:
    handle = WatchedSubprocess.start(
        [actors, "bounded-bomb", "500"],
        containment=containment,
        stdout=proctree.DEVNULL,
        kill=KillPolicy(stages=(Stage(15, 0.2), Stage(9, 30.0))),
    )
    outcome = end(handle)
    assert outcome.survivors == ()
    assert not living()


def test_a_comet(actors: str) -> None:
    """Whoever looks it up is late: it has forked and is gone."""
    handle, lines = start([actors, "comet"], "warden", leftovers="wait")
    lines.wait_for()
    outcome = end(handle)
    assert outcome.survivors == ()
    assert not living()


def test_a_long_chain(actors: str) -> None:
    handle, lines = start([actors, "chain", "400"], "warden")
    lines.wait_for()
    outcome = end(handle)
    assert outcome.stages[0].reached == 401
    assert not living()


def test_a_zombie_maker(actors: str, containment: str) -> None:
    handle, lines = start([actors, "zombies", "200"], containment)
    lines.wait_for()
    outcome = end(handle)
    assert outcome.returncode == -15
    assert not living()


def test_a_grandchild_that_holds_stdout(actors: str, containment: str) -> None:
    handle, lines = start(["sh", "-c", f"setsid {actors} ignore & wait"], containment)
    lines.wait_for()
    outcome = end(handle)
    assert outcome.survivors == ()
    assert not living()


def test_a_stream_held_open_outside_the_tree_costs_nothing(containment: str) -> None:
    """Invariant 2: a stream that never reports its end."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    held: list[bytes] = []
    handle = WatchedSubprocess.start(
        ["sh", "-c", "echo $$; exec sleep 1000"],
        stdout=proctree.Chunks(held.append),
        containment=containment,
    )
    eventually(lambda: bool(held), "it has written")
    # Steal a copy of its stdout, as a process outside the tree would have inherited it.
    stolen = os.open(f"/proc/{handle.pid}/fd/1", os.O_WRONLY)
    try:
        watch = Stopwatch()
        outcome = end(handle, KillPolicy.after(1.0))
        assert watch.stop() < 2.0
        assert outcome.returncode == -15
    finally:
        for fd in (stolen, reader, writer):
            os.close(fd)


def test_timeout(actors: str, containment: str) -> None:
    outcome = proctree.run(
        [actors, "pause"], timeout=0.2, containment=containment, stdout=proctree.DEVNULL, kill=QUICK
    )
    assert outcome.reason is Reason.TIMEOUT
    assert outcome.returncode == -15
    assert outcome.duration >= 0.2


def test_check_raises_with_the_outcome(containment: str) -> None:
    with pytest.raises(proctree.TreeFailed, match="exit status 3") as caught:
        proctree.run(["sh", "-c", "exit 3"], check=True, containment=containment)
    assert caught.value.outcome.returncode == 3


@pytest.mark.wardens("valgrind")
def test_freeze_and_thaw(actors: str, containment: str) -> None:
    handle, lines = start(["sh", "-c", f"setsid {actors} pause & wait"], containment)
    lines.wait_for()
    pids = [info.pid for info in handle.processes()]
    assert len(pids) == 2

    def frozen() -> set[bool]:
        leaf = handle._tree.contained.cgroup if containment == "cgroup" else None
        if leaf is not None:  # the freezer of cgroup v2 does not show in the states of processes
            return {"frozen 1" in Path(f"{leaf}/cgroup.events").read_text()}
        stats = [proof.read_stat(pid) for pid in pids]
        return {stat.state == "T" for stat in stats if stat is not None}

    handle.freeze()
    eventually(lambda: frozen() == {True}, "all are stopped")
    handle.thaw()
    eventually(lambda: frozen() == {False}, "all go on")
    end(handle)


def test_a_frozen_tree_hears_that_it_is_to_end(actors: str, containment: str) -> None:
    handle, lines = start([actors, "pause"], containment)
    lines.wait_for()
    handle.freeze()
    outcome = end(handle)
    assert outcome.returncode == -signal.SIGTERM
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM]


def test_the_context_manager_ends_the_tree(actors: str, containment: str) -> None:
    lines = Lines()
    with WatchedSubprocess.start(
        [actors, "ignore"], containment=containment, stdout=proctree.Lines(lines), kill=QUICK
    ) as handle:
        lines.wait_for()
        assert [info.pid for info in handle.processes()] == [handle.pid]
    assert handle.outcome is not None
    assert handle.outcome.detail == "left the with block"
    assert not living()


def test_without_a_helper_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    missing = str(tmp_path / "no-warden")
    monkeypatch.setenv(WARDEN_VARIABLE, missing)
    outcomes = [proctree.run(["true"]) for _ in range(2)]
    assert [outcome.containment for outcome in outcomes] == ["group", "group"]
    assert len(caplog.records) == 1
    assert "containment.fallback containment='group'" in caplog.text
    with pytest.raises(proctree.ContainmentUnavailable, match=f"{missing} is missing"):
        proctree.run(["true"], containment="warden")


@pytest.mark.parametrize("target", [["sleep", "1000"], lambda: os.execlp("sleep", "sleep", "1000")])
def test_out_of_descriptors_in_the_middle_of_a_start(
    containment: str, target: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is there and its pidfd cannot be opened: an error, and nothing is left, not even
    a zombie (the suite's own check sees to that)."""

    def full(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", full)
        with pytest.raises(OSError, match="Too many open files"):
            proctree.run(target, containment=containment)  # type: ignore[arg-type]
    assert not living()


def test_usage_is_the_whole_trees() -> None:
    burn = "sum(range(3_000_000))"
    script = f"{sys.executable} -S -c '{burn}'; {sys.executable} -S -c '{burn}'"
    outcome = proctree.run(["sh", "-c", script], containment="warden")
    assert outcome.usage.user > 0.02
    assert outcome.usage.max_rss > 4 * 1024 * 1024


@pytest.mark.wardens("valgrind")
def test_a_callable(containment: str) -> None:
    def target() -> None:
        import subprocess

        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print("from the callable", os.getpid() == os.getsid(0))
        sys.exit(5)

    outcome = proctree.run(target, stdout=proctree.CAPTURE, containment=containment, kill=QUICK)
    assert outcome.stdout == b"from the callable True\n"
    assert outcome.returncode == 5
    assert [member.name for member in outcome.leftovers] == ["sleep"]
    assert not living()


def test_a_callable_that_supervises(containment: str) -> None:
    """The lock around descriptors is held when we fork it, and free in the child: for all of its
    threads."""

    def target() -> None:
        sys.exit(proctree.run(["sh", "-c", "exit 5"]).returncode)

    outcome = proctree.run(target, containment=containment, kill=QUICK, timeout=DEADLINE)
    assert (outcome.reason, outcome.returncode) == (Reason.EXITED, 5)


def test_a_callable_that_ends_before_its_warden_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It does not begin before, but it may be killed: its SIGCHLD came too early for anybody to
    see."""
    late = tmp_path / "late-warden"
    late.write_text(
        f"""#!/bin/sh
        for argument; do
            case $argument in adopt=*) pid=${{argument#adopt=}} ;; esac
        done
        kill -9 $pid
        until read -r _ _ state _ </proc/$pid/stat && [ "$state" = Z ]; do :; done
        exec {warden_path()} "$@"
        """
    )
    late.chmod(0o755)
    monkeypatch.setenv(WARDEN_VARIABLE, str(late))
    ran = tmp_path / "ran"
    outcome = proctree.run(ran.touch, containment="warden")
    assert (outcome.returncode, outcome.reason) == (-9, Reason.SIGNALED)
    assert not ran.exists()


def test_a_callable_that_raises(containment: str) -> None:
    def target() -> None:
        raise LookupError("in the child")

    outcome = proctree.run(target, stderr=proctree.CAPTURE, containment=containment)
    assert outcome.returncode == 1
    assert outcome.stderr is not None
    assert b"LookupError: in the child" in outcome.stderr
