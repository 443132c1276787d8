"""What a supervisor promises in the moments that nobody plans for: every call returns, every start
has one end, and nothing lives longer than its reason."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lines,
    eventually,
    in_thread,
    is_alive,
    start_supervisor,
)
from integration.test_supervisor import AT_ONCE, SLEEP, Heard, python, says, sleeper
from proctree import Reason
from proctree.channel import Channel, Server
from proctree.loop import Timer
from proctree.supervisor import (
    Check,
    ChildDone,
    ChildEnded,
    ChildReady,
    ChildRestarting,
    ChildSpec,
    ChildStarting,
    ChildStopping,
    Completed,
    Heartbeat,
    Http,
    IntensityExceeded,
    Notified,
    Rejected,
    StartFailed,
    Supervisor,
    SupervisorStarted,
)
from proctree.supervisor.attempt import Attempt
from proctree.tree import Tree
from proctree.watched import WatchedSubprocess


@pytest.fixture
def heard() -> Iterator[Heard]:
    events = Heard()
    yield events
    events.subscription.close()


def one_that_fails_at_once(name: str, **options: Any) -> ChildSpec:
    """The descriptor that it was made with has been closed since: there is not even a tree."""
    reader, writer = os.pipe()
    try:
        return ChildSpec(name, SLEEP, stdout=writer, **options)
    finally:
        os.close(reader)
        os.close(writer)


# -- every call returns


def test_adding_one_that_cannot_be_launched_returns():
    with Supervisor(auto_shutdown="never") as supervisor:
        spec = one_that_fails_at_once("a", restart="never")
        added = in_thread(lambda: supervisor.add(spec))
        assert isinstance(added.get(timeout=DEADLINE), StartFailed)
        assert supervisor.child("a").phase == "done"


def test_one_that_was_stopped_first_does_not_start():
    supervisor = Supervisor([sleeper("a")])
    supervisor.stop("not needed")
    with pytest.raises(proctree.ProctreeError, match=r"stopped before all .*: not needed"):
        supervisor.start()
    assert supervisor.wait()
    assert supervisor.child("a").starts == 0
    with pytest.raises(proctree.ProctreeError, match="is stopping"):
        supervisor.add(sleeper("b"))
    assert Supervisor([sleeper("a")]).wait(0.0) is False


def test_waiting_for_what_was_not_started_is_refused():
    with pytest.raises(RuntimeError, match="was not started"):
        Supervisor([sleeper("a")]).wait()


def test_a_stop_during_the_start_is_no_success(heard):
    supervisor = Supervisor([sleeper("a"), sleeper("b", ready=Notified())])
    started = in_thread(supervisor.start)
    heard.wait_for(ChildStarting, "b")
    supervisor.stop()
    error = started.get(timeout=DEADLINE)
    assert isinstance(error, proctree.ProctreeError)
    assert "stopped before all of its children were ready: asked to stop" in str(error)


def test_but_run_returns_then(heard):
    supervisor = Supervisor([sleeper("a", ready=Notified())])
    ran = in_thread(supervisor.run)
    heard.wait_for(ChildStarting)
    supervisor.stop()
    assert ran.get(timeout=DEADLINE) is None


def test_a_restart_is_refused_where_nothing_can_be_restarted():
    supervisor = Supervisor([sleeper("a")])
    with pytest.raises(proctree.ProctreeError, match="was not started"):
        supervisor.restart("a")
    with supervisor, pytest.raises(KeyError):
        supervisor.restart("b")
    with pytest.raises(proctree.ProctreeError, match="is stopping"):
        supervisor.restart("a")


STUBBORN = ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]


def stubborn(name: str, grace: float, **options: Any) -> ChildSpec:
    return ChildSpec(name, STUBBORN, kill=proctree.KillPolicy.after(grace), **options)


def test_removed_by_two_at_once_and_added_meanwhile(heard):
    up = Lines()
    with Supervisor(auto_shutdown="never") as supervisor:
        supervisor.add(stubborn("a", 1000, stdout=proctree.Lines(up)))
        up.wait_for()
        removed = [in_thread(lambda: supervisor.remove("a")) for _ in range(2)]
        heard.wait_for(ChildStopping)
        with pytest.raises(ValueError, match="there is a child called 'a', which is being removed"):
            supervisor.add(sleeper("a"))
        supervisor.remove("a", wait=False)
        supervisor.stop_now()
        for result in removed:
            assert result.get(timeout=DEADLINE) in (None, "a")
    with pytest.raises(KeyError):
        supervisor.child("a")


def test_a_child_is_removed_by_its_own_callbacks():
    with Supervisor(auto_shutdown="never") as supervisor:

        def removing(name: str) -> Callable[[Any], None]:
            return lambda _what: supervisor.remove(name)

        def check() -> bool:
            supervisor.remove("check")
            return True

        talks = ["sh", "-c", "echo x; exec sleep 1000"]
        supervisor.add(ChildSpec("lines", talks, stdout=proctree.Lines(removing("lines"))))
        supervisor.add(sleeper("beat", heartbeat=Heartbeat(removing("beat"), interval=1000)))
        with pytest.raises(StartFailed):
            supervisor.add(sleeper("check", ready=Check(check)))
        eventually(lambda: not supervisor.children(), "the last child's removal")


@pytest.mark.parametrize("what", ["ended", "ready", "shutdown"])
def test_a_defect_leaves_nobody_waiting_and_nothing_alive(monkeypatch, what):
    supervisor = Supervisor([sleeper("a"), sleeper("b")])
    supervisor.start()
    pids = [child.pid or 0 for child in supervisor.children()]

    def fail(*_args: Any, **_facts: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(supervisor._running.plan, what, fail)
    fail.__name__ = what
    added = in_thread(lambda: supervisor.add(sleeper("c", ready=Notified())))
    if what == "ready":
        added = in_thread(lambda: supervisor.add(sleeper("d")))
    elif what == "ended":
        os.kill(pids[0], signal.SIGKILL)
    else:
        eventually(lambda: len(supervisor.children()) == 3, "the third")
        supervisor.stop()
    with pytest.raises(proctree.ProctreeError, match=f"has a defect .at {what}: ZeroDivisionError"):
        supervisor.wait()
    error = added.get(timeout=DEADLINE)
    assert isinstance(error, proctree.ProctreeError) or (what == "ready" and error is None)
    assert not any(is_alive(pid) for pid in pids)
    supervisor.stop()
    supervisor.stop_now()
    with pytest.raises(proctree.ProctreeError):
        supervisor.add(sleeper("e"))


# -- nothing outlives its reason

RUNNING = """
import signal, sys
from proctree import subscribe
from proctree.supervisor import ChildSpec, Supervisor, SupervisorStarted
class Late(Exception): pass
def late(*_):
    raise Late
signal.signal(signal.SIGUSR1, late)
subscribe(lambda event: print("up", flush=True), SupervisorStarted)
supervisor = Supervisor([ChildSpec("a", ["sleep", "1000"])])
try:
    supervisor.run()
except Late:
    print(supervisor.child("a").phase, flush=True)
"""


def test_what_a_signal_handler_raises_in_run_ends_the_children():
    with start_supervisor(RUNNING) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "done\n"
        assert process.wait(DEADLINE) == 0


LEAVING = """
import proctree
from proctree.supervisor import Backoff, ChildSpec, Supervisor
family = ["sh", "-c", "echo start; sleep 1000 & wait"]
stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
Supervisor([
    ChildSpec(
        "stubborn", stubborn, containment="group", kill=proctree.KillPolicy.after(0.7)
    ),
    ChildSpec("family", family, containment="group", backoff=Backoff(base=0.0)),
]).start()
"""


def test_at_the_end_of_the_interpreter_nothing_is_started_again():
    with start_supervisor(LEAVING) as process:
        assert process.wait(DEADLINE) == 0
        # Ended before it said anything, perhaps; but not started twice.
        assert process.stdout.read().count("start") <= 1


FORKING_HOST = """
import os, sys, threading
def say(text):  # in one piece: two processes write to this pipe
    os.write(1, text.encode() + bytes([10]))
from proctree import subscribe
from proctree.supervisor import ChildSpec, Supervisor, SupervisorStarted
def fork(_event):
    os.kill(os.getpid(), 10)
def on_usr1(*_):
    pid = os.fork()
    if pid == 0:
        say(f"child {os.getpid()}")
        while True: __import__("time").sleep(1)
    say("forked")
    say(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
import signal
signal.signal(signal.SIGUSR1, on_usr1)
subscribe(fork, SupervisorStarted)
sys.exit(Supervisor([ChildSpec("a", ["sleep", "1000"])]).main())
"""


def test_a_fork_of_us_is_ended_by_its_own_sigterm():
    with start_supervisor(FORKING_HOST) as process:
        said = sorted(process.stdout.readline().split() for _ in range(2))
        os.kill(int(said[0][1]), signal.SIGTERM)
        assert process.stdout.readline() == "-15\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0


IGNORING = """
import os, signal, sys, threading
def say(text):  # in one piece: two threads write to this pipe
    os.write(1, text.encode() + bytes([10]))
from proctree import subscribe
from proctree.supervisor import ChildSpec, Supervisor, SupervisorStarted, SupervisorStopping
signal.signal(signal.SIGINT, signal.SIG_IGN)
def tell(event):
    say(type(event).__name__ + " " + getattr(event, "why", ""))
subscription = subscribe(tell, SupervisorStarted, SupervisorStopping)
supervisor = Supervisor([ChildSpec("a", ["sleep", "1000"])])
if sys.argv[1] == "main":
    status = supervisor.main()
    subscription.flush(30)
    say(str(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL))
else:
    found = []
    thread = threading.Thread(target=lambda: found.append(supervisor.main()))
    thread.start()
    sys.stdin.readline()
    supervisor.stop("by hand")
    thread.join()
    status = found[0]
    subscription.flush(30)
sys.exit(status)
"""


def test_a_signal_that_is_ignored_stays_ignored():
    with start_supervisor(IGNORING, "main") as process:
        assert process.stdout.readline().split() == ["SupervisorStarted"]
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().split() == ["SupervisorStopping", "got", "SIGTERM"]
        assert process.stdout.readline() == "True\n"
        assert process.wait(DEADLINE) == 0


def test_main_on_another_thread():
    with start_supervisor(IGNORING, "thread") as process:
        assert process.stdout.readline().split() == ["SupervisorStarted"]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == ["SupervisorStopping", "by", "hand"]
        assert process.wait(DEADLINE) == 0


# -- every start has one end


def check_events(events: list[Any]) -> None:
    """Each start is followed by one end of the same tree, and no other start in between; it is
    ready only before it is stopped."""
    running: dict[str, str] = {}
    stopping: set[str] = set()
    for event in events:
        if isinstance(event, ChildStarting):
            assert event.child not in running, events
            running[event.child] = event.tree_id
        elif isinstance(event, ChildStopping):
            assert running[event.child] == event.tree_id, events
            assert event.child not in stopping, "stopped twice"
            stopping.add(event.child)
        elif isinstance(event, ChildReady):
            assert running[event.child] == event.tree_id, events
            assert event.child not in stopping, "ready while it is stopped"
        elif isinstance(event, ChildEnded):
            assert running.pop(event.child) == event.tree_id, events
            stopping.discard(event.child)
    assert running == {}


def test_stopped_before_its_launch_it_has_a_beginning_and_an_end(heard):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        supervisor = Supervisor([sleeper("it", ready=Http(url))])
        started = in_thread(supervisor.start)
        connection, _ = silent.accept()
        supervisor.stop()
        heard.until_stopped()
        assert isinstance(started.get(timeout=DEADLINE), proctree.ProctreeError)
        connection.close()
    ended = [event for event in heard.events if isinstance(event, ChildEnded)]
    assert [(event.reason, event.failed) for event in ended] == [(Reason.KILLED, False)]
    assert len(heard.of(ChildStarting)) == 1
    check_events(heard.events)


def test_one_that_cannot_be_launched_has_a_beginning_and_an_end(heard):
    with pytest.raises(StartFailed, match="is not open"):
        Supervisor([one_that_fails_at_once("it")]).start()
    heard.until_stopped()
    assert heard.of(ChildStarting, ChildEnded) == [("ChildStarting", "it"), ("ChildEnded", "it")]
    check_events(heard.events)


READY_AT_THE_END = """
import signal, sys, time
from proctree import notify
def end(*_):
    notify.ready()
    notify.barrier(10.0)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
while True: time.sleep(1)
"""


def test_one_that_says_ready_when_it_is_stopped_is_not_ready(heard):
    up = Lines()
    with Supervisor(auto_shutdown="never") as supervisor:
        spec = ChildSpec(
            "late", python(READY_AT_THE_END), ready=Notified(), stdout=proctree.Lines(up)
        )
        added = in_thread(lambda: supervisor.add(spec))
        up.wait_for()
    assert isinstance(added.get(timeout=DEADLINE), StartFailed)
    heard.until_stopped()
    assert heard.of(ChildReady) == []
    check_events(heard.events)


def test_it_is_stopped_once_however_often_that_is_asked(heard):
    up = Lines()
    with Supervisor([stubborn("a", 1000, stdout=proctree.Lines(up))]) as supervisor:
        up.wait_for()
        supervisor.stop()
        supervisor.stop_now()
        supervisor.stop_now()
    heard.until_stopped()
    assert heard.of(ChildStopping) == [("ChildStopping", "a")]
    check_events(heard.events)


def test_restarted_by_hand_a_rejected_one_is_a_child_like_any_other(heard):
    rejecting = threading.Event()
    rejecting.set()

    def beat(_beat: object) -> None:
        if rejecting.is_set():
            raise Rejected("not now")

    spec = sleeper("a", heartbeat=Heartbeat(beat, interval=1000), backoff=AT_ONCE)
    with Supervisor([sleeper("b")], auto_shutdown="never") as supervisor:
        supervisor.add(spec)
        heard.wait_for(ChildDone)
        rejecting.clear()
        supervisor.restart("a")
        heard.wait_for(ChildReady)
        os.kill(supervisor.child("a").pid or 0, signal.SIGKILL)
        heard.wait_for(ChildRestarting)
        heard.wait_for(ChildReady)


def test_no_descriptors_at_a_restart_is_a_failure_like_any_other(heard):
    spec = sleeper("a", backoff=proctree.supervisor.Backoff(base=0.05, cap=0.05))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Supervisor([spec], restarts=None) as supervisor:
        pid = supervisor.child("a").pid or 0
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            os.kill(pid, signal.SIGKILL)
            heard.wait_for(ChildEnded)
            failed = heard.wait_for(ChildEnded)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert (failed.reason, failed.failed) == (Reason.EXEC_FAILED, True)
        assert "Too many open files" in failed.detail
        heard.wait_for(ChildReady)
    heard.until_stopped()
    check_events(heard.events)


def test_a_job_that_fails_is_started_again_and_one_that_succeeds_is_done(heard, tmp_path):
    mark = tmp_path / "mark"
    code = f"test -e {mark} && exit 0; touch {mark}; exit 1"
    with Supervisor([sleeper("a")]) as supervisor:
        spec = ChildSpec(
            "job", ["sh", "-c", code], ready=Completed(), restart="on-failure", backoff=AT_ONCE
        )
        with pytest.raises(StartFailed, match="exit status 1"):
            supervisor.add(spec)
        heard.wait_for(ChildDone)
        job = supervisor.child("job")
        assert (job.phase, job.starts, job.restarts) == ("done", 2, 1)


# -- output


def test_captured_output_is_in_the_message():
    spec = ChildSpec(
        "it",
        ["sh", "-c", "echo some; echo wrong >&2; exit 1"],
        ready=Notified(),
        stdout=proctree.CAPTURE,
        stderr=proctree.Capture(),
    )
    with pytest.raises(StartFailed) as raised:
        Supervisor([spec]).start()
    assert raised.value.lines == ("some", "wrong")
    assert raised.value.outcome is not None
    assert raised.value.outcome.stdout == b"some\n"


def test_no_pty_is_no_reason_not_to_see_its_output(capfd):
    spec = ChildSpec("it", ["echo", "said"], pty=False, restart="never")
    supervisor = Supervisor([spec])
    supervisor.run()
    assert supervisor.child("it").lines == ("said",)
    assert capfd.readouterr().out == "said\n"


def test_output_of_a_pty(heard):
    lines = Lines()
    spec = ChildSpec(
        "it", ["sh", "-c", "tty; exit 3"], pty=True, stdout=proctree.Lines(lines), restart="never"
    )
    supervisor = Supervisor([spec])
    supervisor.run()
    assert supervisor.child("it").lines[0].startswith("/dev/pts/")


OUTPUT = """
import os, sys
from proctree.supervisor import ChildSpec, Supervisor
if sys.argv[1] == "nonblocking":
    os.set_blocking(1, False)
elif sys.argv[1] == "closed":
    os.close(1)
flood = ["sh", "-c", "yes 0123456789abcde | head -c 3000000"]
sys.exit(Supervisor([ChildSpec("it", flood, restart="never")]).main())
"""


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
def test_a_reader_that_is_slow_gets_everything(how):
    with start_supervisor(OUTPUT, how) as process:
        said = process.stdout.read()
        assert process.wait(DEADLINE) == 0
    assert (len(said), set(said.split())) == (3_000_000, {"0123456789abcde"})


def test_output_that_nobody_wants_stops_nothing():
    outcome = proctree.run(
        python(OUTPUT, "closed"), stdout=proctree.CAPTURE, stderr=proctree.CAPTURE
    )
    assert (outcome.returncode, outcome.stdout) == (0, b"")
    with start_supervisor(OUTPUT, "blocking") as process:
        process.stdout.close()
        assert process.wait(DEADLINE) == 0


FAILING = """
import os, sys
from proctree.supervisor import ChildSpec, Supervisor
if sys.argv[1] == "closed": os.close(2)
if sys.argv[1] == "none": sys.stderr = None
sys.exit(Supervisor([ChildSpec("it", ["/nonexistent"])]).main())
"""


@pytest.mark.parametrize("how", ["closed", "none"])
def test_main_without_a_standard_error_still_says_it_by_its_status(how):
    outcome = proctree.run(python(FAILING, how), stdout=proctree.CAPTURE, stderr=proctree.CAPTURE)
    assert (outcome.returncode, outcome.stdout) == (1, b"")


# -- nothing piles up


def test_one_failure_is_raised_to_many():
    supervisor = Supervisor(
        [ChildSpec("it", ["sh", "-c", "echo x; exit 1"], backoff=AT_ONCE)], restarts=0
    )
    supervisor.start()
    found = []
    for _ in range(3):
        with pytest.raises(IntensityExceeded) as raised:
            supervisor.wait()
        depth, traceback = 0, raised.value.__traceback__
        while traceback is not None:
            depth, traceback = depth + 1, traceback.tb_next
        found.append((str(raised.value), depth))
    assert found[0] == found[1] == found[2]
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.lines, again.outcome) == (
        str(raised.value),
        raised.value.lines,
        raised.value.outcome,
    )


def test_restarts_leave_nothing_behind(heard):
    """What there is of one incarnation goes with it."""
    kinds = (Attempt, Tree, WatchedSubprocess, Timer)

    def count() -> Counter[type]:
        gc.collect()
        return Counter(type(thing) for thing in gc.get_objects() if type(thing) in kinds)

    spec = ChildSpec(
        "it",
        ["sh", "-c", "echo up; exit 1"],
        backoff=AT_ONCE,
        notify=True,
        heartbeat=Heartbeat(lambda _beat: None, interval=1000),
        watchdog=1000,
    )
    with Supervisor([spec], restarts=None) as supervisor:
        heard.wait_for(ChildEnded, count=10)
        heard.events.clear()
        before = count()
        heard.wait_for(ChildEnded, count=100)
        heard.events.clear()
        after = count()
        running = supervisor._running
        assert len(running._actions) + len(running._backoffs) <= 2
    for kind in kinds[:3]:
        # One ends while the next one starts, and workers hold what they were last busy with.
        assert after[kind] <= before[kind] + 5, (before, after)
    assert after[Timer] <= 200


# -- every kind of child


def test_every_containment_and_a_channel(heard, containment):
    server = Server()
    asked: queue.Queue[int] = queue.Queue()
    server.handle("hello", lambda body, _caller: asked.put(body["pid"]))

    def work() -> None:
        with Channel.connect() as channel:
            channel.request({"type": "hello", "pid": 1}, timeout=DEADLINE)
        time.sleep(1000)

    spec = ChildSpec("it", work, channel=server, containment=containment, kill=QUICK)
    with Supervisor([spec]) as supervisor:
        for _ in range(2):
            asked.get(timeout=DEADLINE)
            supervisor.restart("it")
        asked.get(timeout=DEADLINE)
    heard.until_stopped()
    check_events(heard.events)
    assert len(heard.of(ChildStarting)) == 3


def test_extended_when_it_is_ready_nothing_is_extended(heard):
    words = ("READY=1", "EXTEND_TIMEOUT_USEC=60000000", "STATUS=x")
    with Supervisor([ChildSpec("it", says(*words), ready=Notified())]) as supervisor:
        heard.wait_for(SupervisorStarted)
        eventually(lambda: supervisor.child("it").status == "x", "its last word")
        attempt = supervisor._running.children["it"].attempt
        assert attempt is not None
        assert attempt._extended == 0.0
