"""Supervisors of real children: order, restarts, what watches over them, and the end."""

from __future__ import annotations

import http.server
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lifeline,
    Lines,
    eventually,
    is_alive,
    start_supervisor,
)
from integration.fault_tools import Helper
from proctree import Reason, loop
from proctree.supervisor import (
    Backoff,
    Beat,
    Check,
    ChildDone,
    ChildEnded,
    ChildReady,
    ChildReloading,
    ChildRestarting,
    ChildSpec,
    ChildStarting,
    ChildStatus,
    ChildStopping,
    ChildSurvived,
    Completed,
    File,
    Heartbeat,
    HeartbeatMissed,
    Http,
    HttpBeat,
    IntensityExceeded,
    Notified,
    OutputLine,
    Rejected,
    StartFailed,
    Supervisor,
    SupervisorGaveUp,
    SupervisorStarted,
    SupervisorStopped,
    SupervisorStopping,
    Tcp,
    UnixSocket,
)

SLEEP = ["sleep", "1000"]
AT_ONCE = Backoff(base=0.0)


class Heard:
    """What happened, in order, and somebody who waits for it."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._queue: queue.Queue[Any] = queue.Queue()
        self.subscription = proctree.subscribe(self._queue.put)

    def wait_for(self, kind: type, child: str | None = None, count: int = 1) -> Any:
        """The `count`-th of its kind since the last call."""
        while True:
            try:
                event = self._queue.get(timeout=DEADLINE)
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} of {child}: {self.events}") from None
            self.events.append(event)
            if isinstance(event, kind) and (child is None or event.child == child):
                count -= 1
                if count == 0:
                    return event

    def until_stopped(self) -> list[Any]:
        self.wait_for(SupervisorStopped)
        return self.events

    def of(self, *kinds: type) -> list[tuple[str, str]]:
        """(kind, child) of those that have been waited for."""
        return [
            (type(event).__name__, event.child) for event in self.events if isinstance(event, kinds)
        ]


@pytest.fixture
def heard() -> Iterator[Heard]:
    events = Heard()
    yield events
    events.subscription.close()


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-c", code, *args]


def sleeper(name: str, **options: Any) -> ChildSpec:
    return ChildSpec(name, SLEEP, **options)


# -- order


def test_children_start_in_order_when_ready_and_stop_in_reverse(heard, tmp_path):
    """The second finds what the first has made, and at its end it is still there."""
    made = tmp_path / "made"
    code = "trap 'rm {0}; exit 0' TERM; sleep 0.1; touch {0}; while :; do sleep 0.05; done"
    first = ChildSpec("first", ["sh", "-c", code.format(made)], ready=File(str(made)))
    code = "test -e {0} || exit 9; trap 'test -e {0} && exit 7' TERM; echo up; sleep 1000 & wait"
    second = ChildSpec(
        "second",
        ["sh", "-c", code.format(made)],
        ready=OutputLine("^up$"),
    )
    with Supervisor([first, second]):
        assert made.exists()
    heard.until_stopped()
    order = heard.of(ChildStarting, ChildReady, ChildStopping, ChildEnded)
    assert order == [
        ("ChildStarting", "first"),
        ("ChildReady", "first"),
        ("ChildStarting", "second"),
        ("ChildReady", "second"),
        ("ChildStopping", "second"),
        ("ChildEnded", "second"),
        ("ChildStopping", "first"),
        ("ChildEnded", "first"),
    ]
    ended = [event for event in heard.events if isinstance(event, ChildEnded)]
    assert [event.returncode for event in ended] == [7, 0]
    assert not made.exists()


def test_a_job_that_has_to_be_done_first(heard, tmp_path):
    done = tmp_path / "done"
    job = ChildSpec("job", ["touch", str(done)], restart="never", ready=Completed())
    server = ChildSpec("server", ["sh", "-c", f"test -e {done} && exec sleep 1000"])
    with Supervisor([job, server]) as supervisor:
        assert [child.phase for child in supervisor.children()] == ["done", "up"]


def test_what_said_that_it_is_ready_was_ready_however_soon_it_exits(heard, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    exited = threading.Event()

    def on_line(line: str) -> None:
        # On the thread that looks for the line: it sees "at work" when the main process has exited.
        if line == "first":
            gate.write_text("go\n")
            assert exited.wait(DEADLINE)

    program = f"echo first; read go <{gate}; echo at work"
    quick = ChildSpec(
        "quick",
        ["sh", "-c", program],
        restart="never",
        ready=OutputLine("at work"),
        stdout=proctree.Lines(on_line),
    )
    with proctree.subscribe(lambda _event: exited.set(), proctree.MainExited):
        Supervisor([quick]).run()
    heard.until_stopped()
    assert heard.of(ChildReady, ChildEnded) == [("ChildReady", "quick"), ("ChildEnded", "quick")]


def test_one_that_cannot_become_ready_stops_those_before_it(heard):
    third = sleeper("third")
    never = ChildSpec(
        "never", ["sh", "-c", "echo no such file >&2; exit 4"], ready=Tcp(free_port())
    )
    supervisor = Supervisor([sleeper("first"), never, third])
    with pytest.raises(StartFailed) as raised:
        supervisor.start()
    failure = raised.value
    assert (failure.child, failure.lines) == ("never", ("no such file",))
    assert failure.outcome is not None
    assert failure.outcome.returncode == 4
    assert "ended before it was ready: tcp 127.0.0.1:" in failure.outcome.detail
    assert "'never' could not be started" in str(failure)
    assert "    no such file" in str(failure)
    heard.until_stopped()
    assert ("ChildEnded", "first") in heard.of(ChildEnded)
    assert ("ChildStarting", "third") not in heard.of(ChildStarting)
    with pytest.raises(proctree.ProctreeError, match="is stopping"):
        supervisor.add(sleeper("late"))


def test_one_that_does_not_exist(heard):
    with pytest.raises(StartFailed, match="No such file or directory: '/nonexistent'"):
        Supervisor([sleeper("first"), ChildSpec("second", ["/nonexistent"])]).start()
    heard.until_stopped()


def test_one_that_is_not_ready_in_time(heard):
    late = sleeper("late", ready=OutputLine("never", timeout=0.2), kill=QUICK)
    with pytest.raises(StartFailed) as raised:
        Supervisor([late]).start()
    assert raised.value.outcome is not None
    assert raised.value.outcome.reason is Reason.NOT_READY
    assert "line /never/ on stdout or stderr" in raised.value.outcome.detail


def test_a_job_that_is_not_done_in_time(heard):
    with pytest.raises(StartFailed) as raised:
        Supervisor([sleeper("job", ready=Completed(timeout=0.2))]).start()
    assert raised.value.outcome is not None
    assert raised.value.outcome.reason is Reason.NOT_READY
    assert "not ready within 0.2 s: its end with success" in raised.value.outcome.detail


# -- restarts


def test_a_restart_storm_stops_at_the_intensity(heard):
    flaky = ChildSpec("flaky", ["sh", "-c", "echo oops >&2; exit 3"], backoff=AT_ONCE)
    supervisor = Supervisor([sleeper("good"), flaky], restarts=3, period=1000.0, name="mine")
    supervisor.start()
    with pytest.raises(IntensityExceeded) as raised:
        supervisor.wait()
    failure = raised.value
    assert (failure.supervisor, failure.child, failure.lines[-1]) == ("mine", "flaky", "oops")
    assert "more than 3 restarts within 1000 s" in str(failure)
    assert "exit status 3" in failure.why
    events = heard.until_stopped()
    assert heard.of(ChildStarting).count(("ChildStarting", "flaky")) == 4
    assert [event.restarts for event in events if isinstance(event, ChildRestarting)] == [1, 2, 3]
    gave_up = [event for event in events if isinstance(event, SupervisorGaveUp)]
    assert [(event.child, event.lines[-1]) for event in gave_up] == [("flaky", "oops")]
    assert heard.of(ChildEnded)[-1] == ("ChildEnded", "good")


MAIN = """
import sys
from proctree.supervisor import Backoff, ChildSpec, Supervisor
flaky = ChildSpec("flaky", ["sh", "-c", "echo oops >&2; exit 3"], backoff=Backoff(base=0.0))
sys.exit(Supervisor([flaky, ChildSpec("good", ["sleep", "1000"])], restarts=2).main())
"""


def test_main_exits_with_1_and_says_why():
    outcome = proctree.run(python(MAIN), stdout=proctree.CAPTURE, stderr=proctree.CAPTURE)
    assert (outcome.returncode, outcome.leftovers) == (1, ())
    said = (outcome.stderr or b"").decode()
    last = said[said.index("proctree: ") :].splitlines()
    assert last[0].startswith("proctree: supervisor 'supervisor': child 'flaky' was restarted too")
    assert "more than 2 restarts within 10 s; last, exited, exit status 3" in last[0]
    assert last[1:] == ["its last lines:"] + ["    oops"] * 3


def test_the_policies(heard, tmp_path):
    """Each ends once with 0 and once with 1; who comes back tells them apart."""
    once = "import os, sys; path = sys.argv[1]; first = not os.path.exists(path);open(path, 'w');"
    specs = [
        ChildSpec(
            f"{restart}-{status}",
            python(
                once + f"first and sys.exit({status}); import time; time.sleep(1000)",
                str(tmp_path / f"{restart}-{status}"),
            ),
            restart=restart,
            backoff=AT_ONCE,
        )
        for restart in ("always", "on-failure", "never")
        for status in (0, 1)
    ]
    supervisor = Supervisor(specs, restarts=None)
    with supervisor:
        for name in ("always-0", "always-1", "on-failure-1"):
            while supervisor.child(name).starts < 2:
                heard.wait_for(ChildStarting)
        for name in ("on-failure-0", "never-0", "never-1"):
            while supervisor.child(name).phase != "done":
                heard.wait_for(ChildDone)
        starts = {child.name: child.starts for child in supervisor.children()}
    assert starts == {
        "always-0": 2,
        "always-1": 2,
        "on-failure-0": 1,
        "on-failure-1": 2,
        "never-0": 1,
        "never-1": 1,
    }


def test_exit_statuses_that_are_a_success(heard):
    spec = ChildSpec("seven", ["sh", "-c", "exit 7"], restart="on-failure", success=(0, 7))
    Supervisor([spec]).run()
    heard.until_stopped()
    assert heard.of(ChildRestarting) == []


def test_run_returns_when_the_last_one_has_ended_for_good(heard):
    supervisor = Supervisor([ChildSpec(name, ["true"], restart="never") for name in "abc"])
    supervisor.run()
    heard.until_stopped()
    assert supervisor.wait()
    with pytest.raises(proctree.ProctreeError, match="was started before"):
        supervisor.run()


def test_a_command_that_is_gone_at_its_restart(heard, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nrm $0\n")
    program.chmod(0o755)
    supervisor = Supervisor([ChildSpec("it", [str(program)], backoff=AT_ONCE)], restarts=2)
    supervisor.start()
    with pytest.raises(IntensityExceeded, match="No such file or directory"):
        supervisor.wait()
    assert heard.wait_for(SupervisorGaveUp).child == "it"


@pytest.mark.parametrize(
    ("strategy", "restarted"),
    [("one-for-one", "b"), ("one-for-all", "abc"), ("rest-for-one", "bc")],
)
def test_who_is_restarted_with_a_child(heard, strategy, restarted):
    specs = [sleeper(name, backoff=AT_ONCE) for name in "abc"]
    with Supervisor(specs, strategy=strategy) as supervisor:
        before = {child.name: child.pid for child in supervisor.children()}
        os.kill(before["b"] or 0, signal.SIGKILL)
        for name in restarted:
            while supervisor.child(name).starts < 2 or supervisor.child(name).phase != "up":
                heard.wait_for(ChildReady)
        after = {child.name: child.pid for child in supervisor.children()}
        assert {name for name in "abc" if before[name] != after[name]} == set(restarted)
    heard.until_stopped()
    again = [child for _, child in heard.of(ChildStarting)][3:]
    assert again == sorted(restarted)


HOLDS = "{0} pause & echo $!; exec {0} pause"


def test_what_could_not_be_ended_has_no_second_one_beside_it(heard, actors):
    """A tracer that does not let go of a dead process is the gentlest of such things."""
    lines = Lines()
    spec = ChildSpec(
        "it",
        ["sh", "-c", HOLDS.format(actors)],
        stdout=proctree.Lines(lines),
        kill=proctree.KillPolicy((proctree.Stage(signal.SIGKILL, 0.3),)),
    )
    with pytest.raises(ChildSurvived) as raised:
        with Supervisor([spec, sleeper("other")]) as supervisor:
            (background,) = (line for line in lines.wait_for(3) if line.isdigit())
            tracer = Helper([actors, "trace", background], b"tracing\n")
            try:
                os.kill(supervisor.child("it").pid or 0, signal.SIGKILL)
                supervisor.wait()
            finally:
                tracer.close()
    assert "could not be ended" in str(raised.value)
    assert "which traces it" in raised.value.why
    heard.until_stopped()
    assert heard.of(ChildStarting).count(("ChildStarting", "it")) == 1


def test_files_are_appended_to_at_each_start(heard, tmp_path):
    log = tmp_path / "log"
    log.write_text("from before\n")
    spec = ChildSpec("it", ["sh", "-c", "echo again; exit 1"], stdout=log, backoff=AT_ONCE)
    supervisor = Supervisor([spec], restarts=2)
    with pytest.raises(IntensityExceeded):
        supervisor.run()
    assert log.read_text() == "from before\n" + 3 * "again\n"


def test_a_pool_of_the_same():
    one = sleeper("worker-0", backoff=AT_ONCE, env={"KIND": "worker"}, ready=Check(lambda: True))
    pool = [one.replace(name=f"worker-{number}") for number in range(3)]
    assert [spec.name for spec in pool] == ["worker-0", "worker-1", "worker-2"]
    assert {spec.options["env"]["KIND"] for spec in pool} == {"worker"}
    assert all(spec.backoff is AT_ONCE and spec.ready is one.ready for spec in pool)
    with pytest.raises(ValueError, match="restart: 'often'"):
        one.replace(restart="often")
    with Supervisor(pool) as supervisor:
        assert {child.phase for child in supervisor.children()} == {"up"}


def test_who_waits_on_the_loops_thread_is_told(heard):
    """As a log processor of the host might."""
    told: queue.Queue[Any] = queue.Queue()
    with Supervisor([sleeper("a")]) as supervisor:
        for ask in (supervisor.children, supervisor.wait):

            def job(ask: Callable[[], object] = ask) -> None:
                try:
                    ask()
                except RuntimeError as error:
                    told.put(str(error))

            loop.get().post(job)
            assert "would wait for its own loop" in told.get(timeout=DEADLINE)


# -- adding, removing, asking


def test_children_come_and_go_while_it_runs(heard):
    with Supervisor([sleeper("first")], auto_shutdown="never") as supervisor:
        supervisor.add(
            ChildSpec("second", ["sh", "-c", "echo up; exec sleep 1000"], ready=OutputLine("up"))
        )
        second = supervisor.child("second")
        assert (second.phase, second.starts, second.lines) == ("up", 1, ("up",))
        assert second.pid is not None
        assert is_alive(second.pid)
        with pytest.raises(ValueError, match="name: there is a child called 'second'"):
            supervisor.add(sleeper("second"))
        supervisor.remove("second")
        assert not is_alive(second.pid)
        with pytest.raises(KeyError, match="second"):
            supervisor.child("second")
        supervisor.add(sleeper("second"))
        supervisor.restart("second")
        heard.wait_for(ChildStarting, "second", count=3)
        assert [child.name for child in supervisor.children()] == ["first", "second"]


def test_one_that_is_added_and_cannot_start_goes_on_by_its_policy(heard):
    with Supervisor([sleeper("first")]) as supervisor:
        with pytest.raises(StartFailed, match="exit status 5"):
            supervisor.add(
                ChildSpec("second", ["sh", "-c", "exit 5"], restart="never", ready=Notified())
            )
        assert supervisor.child("second").phase == "done"
        assert supervisor.child("first").phase == "up"


def test_children_added_and_removed_by_a_subscriber_and_by_many_threads():
    with Supervisor(auto_shutdown="never") as supervisor:
        done = threading.Semaphore(0)

        def follow(event: ChildReady) -> None:
            if event.child.startswith("leader"):
                supervisor.add(sleeper("follower of " + event.child))
                supervisor.remove(event.child)
                done.release()

        def work(index: int) -> None:
            for turn in range(3):
                supervisor.add(sleeper(f"leader {index}.{turn}"))

        with proctree.subscribe(follow, ChildReady):
            threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(12):
                assert done.acquire(timeout=DEADLINE)
            for thread in threads:
                thread.join(DEADLINE)
        names = [child.name for child in supervisor.children()]
        assert len(names) == 12
        assert all(name.startswith("follower") for name in names)


def test_it_is_removed_while_it_waits_to_be_ready():
    with Supervisor(auto_shutdown="never") as supervisor:
        added: queue.Queue[Any] = queue.Queue()

        def add() -> None:
            try:
                supervisor.add(sleeper("slow", ready=Notified()))
            except StartFailed as failure:
                added.put(failure)

        thread = threading.Thread(target=add)
        thread.start()
        while not supervisor.children():
            pass
        supervisor.remove("slow")
        assert isinstance(added.get(timeout=DEADLINE), StartFailed)
        thread.join(DEADLINE)


# -- the end

SIGNALLED = """
import os
import sys
import proctree
from proctree.supervisor import ChildSpec, Supervisor, SupervisorStarted, SupervisorStopping
def tell(event):
    os.write(1, type(event).__name__.encode() + bytes([10]))  # in one piece: children write, too
proctree.subscribe(tell, SupervisorStarted, SupervisorStopping)
grace = float(sys.argv[1])
stop_timeout = float(sys.argv[2])
stubborn = ["sh", "-c", "trap '' TERM; echo $$; while :; do sleep 1; done"]
kill = proctree.KillPolicy.after(grace)
children = [ChildSpec(name, stubborn, kill=kill) for name in "ab"]
sys.exit(Supervisor(children, stop_timeout=stop_timeout).main())
"""


def lines_of(process: Any, count: int) -> list[str]:
    return [process.stdout.readline().strip() for _ in range(count)]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order_and_a_second_one_at_once(signo):
    with start_supervisor(SIGNALLED, "1000", "1000") as process:
        lines = lines_of(process, 3)
        pids = [int(line) for line in lines if line.isdigit()]
        assert len(pids) == 2
        process.send_signal(signo)
        assert process.stdout.readline().strip() == "SupervisorStopping"
        assert all(is_alive(pid) for pid in pids)
        process.send_signal(signo)
        assert process.wait(DEADLINE) == 0
    assert not any(is_alive(pid) for pid in pids)


def test_the_deadline_of_the_whole_shutdown():
    with start_supervisor(SIGNALLED, "1000", "0.3") as process:
        pids = [int(line) for line in lines_of(process, 3) if line.isdigit()]
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    assert not any(is_alive(pid) for pid in pids)


def test_a_supervisor_that_is_killed_leaves_nothing():
    with start_supervisor(SIGNALLED, "0.1", "1000") as process:
        pids = [int(line) for line in lines_of(process, 3) if line.isdigit()]
        process.kill()
    for pid in pids:
        eventually(lambda pid=pid: not is_alive(pid), f"the end of {pid}")  # type: ignore[misc]


def test_an_exception_in_the_block_stops_them_and_goes_on(heard):
    with pytest.raises(RuntimeError, match="mine"), Supervisor([sleeper("a")]):
        raise RuntimeError("mine")
    heard.until_stopped()


def test_an_interrupt_while_it_starts_leaves_nothing(heard):
    def interrupt(_signo: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            Supervisor([sleeper("a"), sleeper("b", ready=Notified())]).start()
    finally:
        signal.signal(signal.SIGALRM, before)
    heard.until_stopped()


def test_stopping_before_it_was_started_and_twice():
    supervisor = Supervisor([sleeper("a")])
    supervisor.stop()
    supervisor.stop()
    supervisor.stop_now()
    assert supervisor.wait(DEADLINE)
    assert supervisor.children()[0].phase == "done"


def test_wait_with_a_time_that_runs_out():
    with Supervisor([sleeper("a")]) as supervisor:
        assert not supervisor.wait(0.01)


# -- heartbeats


class Beats(http.server.ThreadingHTTPServer):
    """Answers with the statuses it was given, and with the last of them for ever."""

    daemon_threads = True

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.requests: queue.Queue[str] = queue.Queue()
        super().__init__(("127.0.0.1", 0), Answering)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/beat"

    def end(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Answering(http.server.BaseHTTPRequestHandler):
    server: Beats

    def do_POST(self) -> None:
        statuses = self.server.statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        self.server.requests.put(self.path)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Quietly."""


@pytest.fixture
def serve() -> Iterator[Callable[..., Beats]]:
    servers: list[Beats] = []

    def start(*statuses: int) -> Beats:
        servers.append(Beats(*statuses))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def test_a_rejected_heartbeat_ends_the_tree_for_good(heard, serve):
    server = serve(200, 200, 409)
    beat = Heartbeat(HttpBeat(server.url), interval=0.05, timeout=0.05)
    code = "trap '' HUP; setsid sleep 1000 & sleep 1000"
    task = ChildSpec("task", ["sh", "-c", code], heartbeat=beat)
    with Supervisor([task, sleeper("other")]) as supervisor:
        ended = heard.wait_for(ChildEnded)
        assert (ended.child, ended.reason) == ("task", Reason.HEARTBEAT_REJECTED)
        assert "409" in ended.detail
        heard.wait_for(ChildDone)
        assert [child.phase for child in supervisor.children()] == ["done", "up"]
        assert supervisor.child("task").starts == 1


def test_a_heartbeat_that_fails_too_often_ends_the_tree_and_it_is_restarted(heard, serve):
    server = serve(500, 500, 200)
    beat = Heartbeat(HttpBeat(server.url), interval=0.05, timeout=0.05, failures=2)
    with Supervisor([sleeper("task", heartbeat=beat, backoff=AT_ONCE)]):
        ended = heard.wait_for(ChildEnded)
        assert ended.reason is Reason.HEARTBEAT_FAILED
        assert "500" in ended.detail
        heard.wait_for(ChildReady)
    missed = [event for event in heard.events if isinstance(event, HeartbeatMissed)]
    assert [(event.failures, event.allowed) for event in missed[:2]] == [(1, 2), (2, 2)]


def test_a_heartbeat_by_a_function(heard):
    beats: queue.Queue[Beat] = queue.Queue()

    def beat(whose: Beat) -> None:
        beats.put(whose)
        if beats.qsize() == 3:
            raise Rejected("taken over")

    with Supervisor(
        [sleeper("task", heartbeat=Heartbeat(beat, interval=0.02))], auto_shutdown="never"
    ):
        ended = heard.wait_for(ChildEnded)
    assert (ended.reason, "taken over" in ended.detail) == (Reason.HEARTBEAT_REJECTED, True)
    assert {beats.get().tree_id for _ in range(3)} == {ended.tree_id}


def test_a_heartbeat_that_hangs_counts_and_delays_nobody(heard):
    release = threading.Event()
    hanging = Heartbeat(lambda _beat: release.wait(DEADLINE), interval=0.05, failures=3)
    others: queue.Queue[Beat] = queue.Queue()
    try:
        with Supervisor(
            [
                sleeper("hangs", heartbeat=hanging, restart="never"),
                sleeper("beats", heartbeat=Heartbeat(others.put, interval=0.05)),
            ]
        ):
            ended = heard.wait_for(ChildEnded)
            assert (ended.child, ended.reason) == ("hangs", Reason.HEARTBEAT_FAILED)
            while not others.empty():
                others.get()
            others.get(timeout=DEADLINE)
    finally:
        release.set()


# -- readiness and the watchdog

SAY = """
import sys, time
from proctree import notify
for word in sys.argv[1:]:
    if word.startswith("sleep="):
        time.sleep(float(word[6:]))
    else:
        notify.notify(word)
time.sleep(1000)
"""


def says(*words: str) -> list[str]:
    return python(SAY, *words)


def test_ready_and_status_by_sd_notify(heard):
    spec = ChildSpec("it", says("STATUS=warming up", "READY=1"), ready=Notified())
    with Supervisor([spec]) as supervisor:
        assert heard.wait_for(ChildStatus).status == "warming up"
        assert supervisor.child("it").status == "warming up"
        assert heard.wait_for(ChildReady).child == "it"


def test_it_reads_its_configuration_again(heard):
    spec = ChildSpec("it", says("READY=1", "RELOADING=1", "READY=1"), ready=Notified())
    with Supervisor([spec]):
        heard.wait_for(ChildReloading)
        heard.wait_for(ChildReady)
    assert len(heard.of(ChildReady)) == 2


def test_silent_past_its_watchdog_it_is_ended_and_restarted(heard):
    words = ("READY=1", "WATCHDOG=1", "sleep=0.2", "WATCHDOG=1")
    spec = ChildSpec("it", says(*words), ready=Notified(), watchdog=0.5, backoff=AT_ONCE)
    with Supervisor([spec]):
        ended = heard.wait_for(ChildEnded)
        assert (ended.reason, ended.failed) == (Reason.WATCHDOG, True)
        heard.wait_for(ChildReady)


def test_a_watchdog_that_the_child_asks_for(heard):
    spec = ChildSpec("it", says("WATCHDOG_USEC=100000"), notify=True, restart="never")
    with Supervisor([spec], auto_shutdown="never"):
        assert heard.wait_for(ChildEnded).reason is Reason.WATCHDOG


def test_a_watchdog_that_is_fed_stays_quiet(heard):
    code = "from proctree import notify; import time\nwhile notify.watchdog(): time.sleep(0.05)"
    with Supervisor([ChildSpec("it", python(code), watchdog=5.0)]) as supervisor:
        supervisor.add(sleeper("silent", watchdog=0.3, restart="never"))
        assert heard.wait_for(ChildEnded).child == "silent"
        assert supervisor.child("it").phase == "up"


def test_the_time_to_become_ready_can_be_extended(heard):
    words = ("EXTEND_TIMEOUT_USEC=60000000", "sleep=1.5", "READY=1")
    with Supervisor([ChildSpec("it", says(*words), ready=Notified(timeout=1.0))]):
        pass
    assert heard.wait_for(ChildReady).seconds > 1.0


def test_but_not_for_ever(heard):
    words = ["EXTEND_TIMEOUT_USEC=60000000", "sleep=0.05"] * 10
    spec = ChildSpec("it", says(*words), ready=Notified(timeout=0.5), extension=0.5)
    with pytest.raises(StartFailed, match="not-ready"):
        Supervisor([spec]).start()


STUBBORN = """
import signal, sys, time
from proctree import notify
def end(*_):
    notify.notify("STOPPING=1", "EXTEND_TIMEOUT_USEC=60000000")
    time.sleep(1.5)
    sys.exit(8)
signal.signal(signal.SIGTERM, end)
notify.ready()
while True: time.sleep(1)
"""


def test_the_time_to_stop_can_be_extended_too(heard):
    spec = ChildSpec("it", python(STUBBORN), ready=Notified(), kill=proctree.KillPolicy.after(0.7))
    with Supervisor([spec]):
        pass
    assert heard.wait_for(ChildEnded).returncode == 8


FORKING = """
import os, signal, sys, time
from proctree import notify
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    os.read(reader, 1)
    time.sleep(0.2)
    os._exit(6) if sys.argv[1] == "ends" else time.sleep(1000)
notify.notify("READY=1", f"MAINPID={child}")
notify.barrier(10.0)
os.write(writer, b"x")
"""


def test_a_daemon_that_forks_is_its_main_pid(heard):
    """The process that was started has exited, and the child lives; its end is the child's."""
    spec = ChildSpec("daemon", python(FORKING, "stays"), ready=Notified())
    with Supervisor([spec]) as supervisor:
        while not isinstance(heard.wait_for(proctree.MainExited), proctree.MainExited):
            pass
        child = supervisor.child("daemon")
        assert (child.phase, is_alive(child.pid or 0)) == ("up", True)
    ended = heard.wait_for(ChildEnded)
    assert (ended.reason, ended.failed) == (Reason.KILLED, False)


def test_and_its_end_is_that_of_the_child(heard):
    spec = ChildSpec("daemon", python(FORKING, "ends"), ready=Notified(), restart="never")
    Supervisor([spec]).run()
    ended = heard.wait_for(ChildEnded)
    assert ended.reason is Reason.EXITED
    assert ended.returncode in (6, 0)  # 0 before Linux 6.15, which tells us the one it cannot


def test_our_own_manager_is_not_told_by_our_children(monkeypatch, tmp_path):
    ours = tmp_path / "ours"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(ours))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(ours))
        monkeypatch.setenv("WATCHDOG_USEC", "1000")
        lines = Lines()
        spec = ChildSpec(
            "it",
            ["sh", "-c", "echo ${NOTIFY_SOCKET-none} ${WATCHDOG_USEC-none}; exec sleep 1000"],
            stdout=proctree.Lines(lines),
        )
        with Supervisor([spec, spec.replace(name="copy", env=dict(os.environ))]):
            assert lines.wait_for(2) == ["none none"] * 2
        with pytest.raises(BlockingIOError):
            manager.recv(100)


UNDER_A_MANAGER = """
import sys
from proctree.supervisor import ChildSpec, Supervisor
sys.exit(Supervisor([ChildSpec("it", ["sleep", "1000"])]).main())
"""


def test_our_own_manager_is_told_by_us(heard):
    """A supervisor below a supervisor, as it would be below systemd."""
    spec = ChildSpec("inner", python(UNDER_A_MANAGER), ready=Notified(), watchdog=30.0)
    with Supervisor([spec]) as supervisor:
        assert supervisor.child("inner").status == "children: 1"
    assert heard.wait_for(ChildEnded).returncode == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listening(kind: str, where: str) -> list[str]:
    made = {
        "tcp": f"socket.create_server(('127.0.0.1', {where}))",
        "unix": f"socket.socket(socket.AF_UNIX); s.bind({where!r}); s.listen()",
    }[kind]
    return python(f"import socket, time; time.sleep(0.1); s = {made}; time.sleep(1000)")


def test_ready_by_tcp_unix_socket_http_file_and_function(tmp_path, heard):
    tcp, http_port = free_port(), free_port()
    path, file = tmp_path / "socket", tmp_path / "file"
    serving = f"""
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(204); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(('127.0.0.1', {http_port}), Answer).serve_forever()
"""
    specs = [
        ChildSpec("tcp", listening("tcp", str(tcp)), ready=Tcp(tcp)),
        ChildSpec("unix", listening("unix", str(path)), ready=UnixSocket(str(path))),
        ChildSpec("http", python(serving), ready=Http(f"http://127.0.0.1:{http_port}/")),
        ChildSpec(
            "file", ["sh", "-c", f"sleep 0.1; touch {file}; sleep 1000"], ready=File(str(file))
        ),
        ChildSpec("check", SLEEP, ready=Check(file.exists)),
    ]
    with Supervisor(specs) as supervisor:
        assert {child.phase for child in supervisor.children()} == {"up"}
        with socket.create_connection(("127.0.0.1", tcp)):
            pass
        assert file.exists()


def test_a_port_that_somebody_else_has_is_not_taken_for_ready():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(StartFailed, match=r"port: .* it is somebody else's"):
            Supervisor([ChildSpec("it", SLEEP, ready=Tcp(port))]).start()


def test_it_is_stopped_while_something_is_looked_at_before_its_start(heard):
    """A server that does not answer is looked at for seconds before the child is launched."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        supervisor = Supervisor([ChildSpec("it", SLEEP, ready=Http(url))])
        raised: queue.Queue[Any] = queue.Queue()

        def start() -> None:
            with pytest.raises(proctree.ProctreeError) as stopped:
                supervisor.start()
            raised.put(stopped.value)

        thread = threading.Thread(target=start)
        thread.start()
        connection, _ = silent.accept()
        supervisor.stop()
        heard.until_stopped()
        assert "stopped before all of its children were ready" in str(raised.get(timeout=DEADLINE))
        thread.join(DEADLINE)
        connection.close()


# -- nobody holds up anybody


def test_a_callback_that_blocks_and_a_flood_hold_up_nobody(heard):
    release, blocked = threading.Event(), threading.Event()

    def block(_line: str) -> None:
        blocked.set()
        release.wait(DEADLINE)

    try:
        with Supervisor(
            [
                ChildSpec("flood", ["yes"], stdout=proctree.DEVNULL),
                ChildSpec("floods us", ["yes"], stdout=proctree.Lines(len)),
                ChildSpec(
                    "blocks", ["sh", "-c", "echo x; exec sleep 1000"], stdout=proctree.Lines(block)
                ),
            ],
            restarts=None,
        ) as supervisor:
            assert blocked.wait(DEADLINE)
            for index in range(20):
                supervisor.add(ChildSpec(f"short {index}", ["true"], restart="never"))
                heard.wait_for(ChildDone, f"short {index}")
            release.set()
    finally:
        release.set()


def test_what_a_child_says_goes_where_it_would_have_gone(capfd):
    Supervisor(
        [ChildSpec("it", ["sh", "-c", "echo to stdout; echo to stderr >&2"], restart="never")]
    ).run()
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")


def test_supervisors_side_by_side(heard):
    with Supervisor([sleeper("x")], name="one"), Supervisor([sleeper("x")], name="two") as two:
        os.kill(two.child("x").pid or 0, signal.SIGKILL)
        assert heard.wait_for(ChildRestarting).supervisor == "two"


def test_events_of_the_whole(heard):
    with Supervisor([sleeper("a")], name="mine"):
        pass
    kinds = [type(event) for event in heard.until_stopped()]
    wanted = [SupervisorStarted, SupervisorStopping, SupervisorStopped]
    assert [kind for kind in kinds if kind in wanted] == wanted


def test_a_pool_of_functions(heard, lifeline: Lifeline):
    def work() -> None:
        time.sleep(1000)

    spec = ChildSpec("worker", work, pass_fds=[lifeline.writer])
    with Supervisor([spec]):
        lifeline.handed_over()
    assert lifeline.cut()


# -- what is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ChildSpec("a"), TypeError, "target: neither a command nor a callable"),
        (lambda: ChildSpec("", SLEEP), ValueError, "name: '' is empty"),
        (lambda: ChildSpec(7, SLEEP), TypeError, "name: a string, not 7"),  # type: ignore[arg-type]
        (lambda: ChildSpec("a", []), ValueError, "argv: must not be empty"),
        (lambda: ChildSpec("a", SLEEP, restart="often"), ValueError, "restart: 'often' is none of"),
        (lambda: ChildSpec("a", SLEEP, success=(256,)), ValueError, "success: 256 is no exit"),
        (lambda: ChildSpec("a", SLEEP, backoff=1), TypeError, "backoff: a Backoff"),  # type: ignore[arg-type]
        (lambda: ChildSpec("a", SLEEP, ready=80), TypeError, "ready: a readiness check"),  # type: ignore[arg-type]
        (lambda: ChildSpec("a", SLEEP, heartbeat=print), TypeError, "heartbeat: a Heartbeat"),  # type: ignore[arg-type]
        (lambda: ChildSpec("a", SLEEP, watchdog=-1), ValueError, "watchdog: -1"),
        (lambda: ChildSpec("a", SLEEP, watchdog=1, notify=False), ValueError, "notify: False"),
        (lambda: ChildSpec("a", SLEEP, extension=-1), ValueError, "extension: -1"),
        (lambda: ChildSpec("a", SLEEP, tail=-1), ValueError, "tail: -1"),
        (lambda: ChildSpec("a", SLEEP, color="red"), TypeError, "color"),
        (lambda: ChildSpec("a", SLEEP, timeout=-1), ValueError, "timeout: -1"),
        (
            lambda: ChildSpec(
                "a", SLEEP, ready=OutputLine("x"), stdout=proctree.DEVNULL, stderr=proctree.DEVNULL
            ),
            ValueError,
            "ready: line /x/ on stdout or stderr needs output",
        ),
        (lambda: Backoff(base=-1), ValueError, "base: -1"),
        (lambda: Backoff(factor=0.5), ValueError, "factor: at least 1"),
        (lambda: Backoff(cap=float("inf")), ValueError, "cap: must be finite"),
        (lambda: Heartbeat(print, interval=-1), ValueError, "interval: -1"),
        (lambda: Supervisor([SLEEP]), TypeError, "children: a ChildSpec"),  # type: ignore[list-item]
        (
            lambda: Supervisor([sleeper("a"), sleeper("a")]),
            ValueError,
            "name: there are two children called 'a'",
        ),
        (lambda: Supervisor(strategy="two-for-one"), ValueError, "strategy: 'two-for-one' is none"),
        (lambda: Supervisor(restarts=-1), ValueError, "restarts: -1"),
        (lambda: Supervisor(period=0), ValueError, "period: "),
        (lambda: Supervisor(auto_shutdown="some"), ValueError, "auto_shutdown: 'some'"),
        (lambda: Supervisor(stop_timeout=-1), ValueError, "stop_timeout: -1"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_name_that_is_there_changes_nothing():
    with Supervisor([sleeper("a")]) as supervisor:
        pid = supervisor.child("a").pid
        with pytest.raises(ValueError, match="'a'"):
            supervisor.add(sleeper("a"))
        assert supervisor.child("a").pid == pid


def test_a_forked_child_has_no_supervisor():
    with Supervisor([sleeper("a")]) as supervisor:
        child = os.fork()
        if child == 0:
            refused = 0
            for ask in (supervisor.stop, supervisor.stop_now, supervisor.children, supervisor.wait):
                try:
                    ask()
                except proctree.ProctreeError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        assert supervisor.child("a").phase == "up"


def test_it_leaves_no_file_behind(tmp_path):
    directory = Path(os.environ["XDG_RUNTIME_DIR"])
    before = set(directory.rglob("*"))
    with Supervisor([ChildSpec("it", says("READY=1"), ready=Notified())]):
        pass
    left = {path for path in set(directory.rglob("*")) - before if path.is_socket()}
    assert left == set()
