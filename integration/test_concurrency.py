"""Many threads, many trees, and host programs with habits of their own."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, Lines, eventually, living
from integration.test_endings import end
from proctree import KillPolicy, Reason, WatchedSubprocess


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_the_thread_that_started_a_tree_ends(actors: str, containment: str) -> None:
    """PR_SET_PDEATHSIG fires when the parent *thread* ends: here nothing happens."""
    lines = Lines()
    handles: list[WatchedSubprocess] = []

    def start() -> None:
        handles.append(
            WatchedSubprocess.start(
                [actors, "counter"],
                containment=containment,
                stdout=proctree.Lines(lines),
                kill=QUICK,
            )
        )

    in_thread(start).join()
    (handle,) = handles
    lines.wait_for(1)
    gc.collect()
    handle.signal(signal.SIGUSR1)
    assert lines.wait_for(2)[1] == "0"
    assert end(handle, KillPolicy.now()).returncode == -9


@pytest.mark.parametrize(("backend", "rounds"), [("warden", 1000), ("group", 50)])
def test_rounds_beside_eight_other_threads(backend: str, rounds: int) -> None:
    """Every outcome is right, and no descriptor, process or zombie is left."""
    wrong: list[object] = []
    stop = threading.Event()
    fds = len(os.listdir("/proc/self/fd"))

    def others(number: int) -> None:
        while not stop.is_set():
            try:
                text = f"out {number}\n"
                outcome = proctree.run(
                    ["sh", "-c", f"printf 'out {number}\\n'; exit {number}"],
                    stdout=proctree.CAPTURE,
                    containment=backend,
                )
                if (outcome.returncode, outcome.stdout) != (number, text.encode()):
                    wrong.append(outcome)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [in_thread(lambda n=n: others(n)) for n in range(1, 9)]
    try:
        for round_ in range(rounds):
            outcome = proctree.run(["sh", "-c", f"exit {round_ % 100}"], containment=backend)
            if outcome.returncode != round_ % 100 or outcome.reason is not Reason.EXITED:
                wrong.append(outcome)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert not living()
    eventually(lambda: len(os.listdir("/proc/self/fd")) == fds, "every descriptor is closed")
    assert not [p for p in os.listdir("/proc/self/task") if not p.isdigit()]


def test_rounds_of_kills_from_eight_threads(actors: str, containment: str) -> None:
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(10):
                lines = Lines()
                handle = WatchedSubprocess.start(
                    [actors, "pause"],
                    stdout=proctree.Lines(lines),
                    containment=containment,
                    kill=KillPolicy.after(30.0),
                )
                lines.wait_for()
                outcome = end(handle)
                if outcome.returncode != -15 or outcome.survivors:
                    wrong.append(outcome)
        except BaseException as error:
            wrong.append(error)

    threads = [in_thread(work) for _ in range(8)]
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not living()


HOST = """
import os, signal, sys, threading
import proctree

{habit}

containment = sys.argv[1]
for status in range(40):
    outcome = proctree.run(["sh", "-c", f"exit {{status}}"], containment=containment)
    assert outcome.returncode == status, outcome
    assert outcome.reason is proctree.Reason.EXITED, outcome
for _ in range(10):
    outcome = proctree.run(["sh", "-c", "kill -9 $$"], containment=containment)
    assert (outcome.returncode, outcome.reason) == (-9, proctree.Reason.SIGNALED), outcome
outcome = proctree.run(
    ["sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 4"],
    containment=containment, kill=proctree.KillPolicy.after(20),
)
assert (outcome.returncode, len(outcome.leftovers)) == (4, 2), outcome
print("right")
"""

IGNORES = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"

STEALS = """
def steal():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            pass

threading.Thread(target=steal, daemon=True).start()
"""


@pytest.mark.parametrize("habit", [IGNORES, STEALS], ids=["SIGCHLD ignored", "waitpid(-1)"])
def test_host_programs_that_take_exit_statuses(habit: str, containment: str) -> None:
    if containment == "group" and not status_by_pidfd():
        pytest.skip("before Linux 6.15 a stolen exit status is gone: documented")
    done = subprocess.run(
        [sys.executable, "-c", HOST.format(habit=habit), containment],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("right\n", "")


def status_by_pidfd() -> bool:
    from proctree.process.exit_status import status_from_pidfd

    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], os.environ)
    pidfd = os.pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        return status_from_pidfd(pidfd) == 9 << 8
    finally:
        os.close(pidfd)


def test_kill_from_another_thread(actors: str, containment: str) -> None:
    lines = Lines()
    handle = WatchedSubprocess.start(
        [actors, "pause"], stdout=proctree.Lines(lines), containment=containment, kill=QUICK
    )
    lines.wait_for()
    in_thread(handle.kill).join()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert outcome.returncode == -15


def test_kill_from_a_line_callback(containment: str) -> None:
    handle: WatchedSubprocess
    refused: list[Exception] = []

    def on_line(line: str) -> None:
        handle.kill(reason=f"it said {line}")
        try:
            handle.wait()
        except RuntimeError as error:
            refused.append(error)

    handle = WatchedSubprocess(
        ["sh", "-c", "echo end me; exec sleep 1000"],
        stdout=proctree.Lines(on_line),
        containment=containment,
        kill=QUICK,
    )
    handle.launch()
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "it said end me")
    assert "would wait for itself" in str(refused[0])


def test_kill_from_a_signal_handler(actors: str, containment: str) -> None:
    """The handler runs in the main thread, in the middle of whatever that was doing."""
    handle = WatchedSubprocess([actors, "pause"], containment=containment, stdout=-3, kill=QUICK)
    old = signal.signal(signal.SIGUSR1, lambda *_: handle.kill(reason="SIGUSR1"))
    try:
        handle.launch()
        in_thread(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        outcome = handle.wait(timeout=DEADLINE)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "SIGUSR1")


def test_a_storm_of_signals_while_posting(actors: str) -> None:
    """Handlers that kill and wait, while the main thread does the same: no lock to dead-lock on."""
    handles: list[WatchedSubprocess] = []

    def on_signal(*_: object) -> None:
        for handle in handles[-3:]:
            handle.kill()
            handle.wait(timeout=0.0)

    old = signal.signal(signal.SIGUSR1, on_signal)
    stop = threading.Event()

    def storm() -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not stop.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = in_thread(storm)
    try:
        for _ in range(50):
            handle = WatchedSubprocess([actors, "pause"], stdout=-3, kill=QUICK)
            handles.append(handle)
            with contextlib.suppress(proctree.ProctreeError):  # killed before it was launched
                handle.launch()
            handle.kill()
            assert handle.wait(timeout=DEADLINE) is not None
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, old)


def test_kill_before_start_returns(actors: str, containment: str) -> None:
    """At every moment of the start, and the tree ends as killed or never runs."""
    for spins in range(0, 4000, 100):
        handle = WatchedSubprocess(
            [actors, "pause"], stdout=-3, containment=containment, kill=QUICK
        )
        barrier = threading.Barrier(2)

        def kill(handle: WatchedSubprocess = handle, spins: int = spins) -> None:
            barrier.wait()  # noqa: B023
            for _ in range(spins):
                pass
            handle.kill(reason="early")

        thread = in_thread(kill)
        barrier.wait()
        with contextlib.suppress(proctree.ProctreeError):  # killed before it was launched
            handle.launch()
        thread.join()
        outcome = handle.wait(timeout=DEADLINE)
        assert outcome is not None
        assert (outcome.reason, outcome.detail) == (Reason.KILLED, "early")
    assert not living()


def test_kill_before_launch_means_that_nothing_runs(containment: str, tmp_path: object) -> None:
    handle = WatchedSubprocess(["touch", f"{tmp_path}/ran"], containment=containment)
    handle.kill(reason="changed our mind")
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert (outcome.reason, outcome.returncode, outcome.pid) == (Reason.KILLED, None, None)
    with pytest.raises(proctree.ProctreeError):
        handle.launch()
    assert not os.path.exists(f"{tmp_path}/ran")


def test_kill_twice_and_after_the_end(actors: str, containment: str) -> None:
    lines = Lines()
    handle = WatchedSubprocess.start(
        [actors, "ignore"],
        stdout=proctree.Lines(lines),
        containment=containment,
        kill=KillPolicy.after(60.0),
    )
    lines.wait_for()
    handle.kill(reason="first")
    handle.kill(reason="second")
    handle.kill(KillPolicy.after(100.0))
    handle.kill(KillPolicy.now(), reason="impatient")
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    assert outcome.detail == "first"
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
    handle.kill()
    handle.signal(signal.SIGTERM)
    assert handle.wait() is outcome
    assert handle.processes() == []


def test_ctrl_c_while_run_waits(actors: str, containment: str) -> None:
    lines = Lines()

    def interrupt() -> None:
        lines.wait_for()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        proctree.run(
            [actors, "pause"], stdout=proctree.Lines(lines), containment=containment, kill=QUICK
        )
    thread.join()
    assert not living()


def test_a_forked_child_holds_no_tree(actors: str, containment: str) -> None:
    """multiprocessing, os.fork: the copy of the handle is refused, the tree is not disturbed, and
    the child can supervise trees of its own."""
    lines = Lines()
    handle = WatchedSubprocess.start(
        [actors, "counter"], stdout=proctree.Lines(lines), containment=containment, kill=QUICK
    )
    lines.wait_for()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for attempt in (handle.kill, handle.wait, lambda: handle.signal(15)):
                with pytest.raises(proctree.ProctreeError, match="a fork of it"):
                    attempt()
            own = proctree.run(["sh", "-c", "exit 6"], containment=containment)
            status = 0 if own.returncode == 6 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    handle.signal(signal.SIGUSR1)
    assert lines.wait_for(2)[1] == "0"
    end(handle, KillPolicy.now())


def test_stdin_ends_although_a_fork_happened(containment: str) -> None:
    """A forked child must not hold the write end of a tree's standard input."""
    release, hold = os.pipe()
    handle = WatchedSubprocess(
        ["cat"], stdin=b"x" * 3_000_000, stdout=proctree.CAPTURE, containment=containment
    )
    handle.launch()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        os.read(release, 1)
        os._exit(0)
    outcome = handle.wait(timeout=DEADLINE)
    os.close(hold)
    os.close(release)
    os.waitpid(pid, 0)
    assert outcome is not None
    assert outcome.stdout == b"x" * 3_000_000


class Interrupted(Exception):
    pass


def test_exceptions_from_signal_handlers_at_any_moment(containment: str) -> None:
    """KeyboardInterrupt and its like come between any two bytecodes of the main thread: between a
    process and its being known too, if the main thread made it."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    main = threading.main_thread().ident or 0
    rounds = 300 if containment == "warden" else 40
    interrupted = 0
    old = signal.signal(signal.SIGUSR2, interrupt)

    def later(delay: float) -> None:
        time.sleep(delay)  # no event: any moment is as good as another
        signal.pthread_kill(main, signal.SIGUSR2)

    try:
        for round_ in range(rounds):
            thread = threading.Thread(target=later, args=(0.003 * round_ / rounds,))
            try:
                thread.start()
                proctree.run(["sleep", "1000"], containment=containment, kill=KillPolicy.now())
            except Interrupted:
                interrupted += 1
            thread.join()
    finally:
        signal.signal(signal.SIGUSR2, old)
    assert interrupted == rounds
    eventually(lambda: not living(), "every tree has ended")
