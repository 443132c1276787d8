"""The loop: timers, handlers, posts from anywhere, and what a fork leaves of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest

import proctree
from forks import in_child, is_open
from proctree import loop as loop_module
from proctree.loop import READ, Loop
from proctree.process import fds

LONG = 60.0
T = TypeVar("T")


@pytest.fixture
def loop() -> Loop:
    """The process's own: a loop is never stopped, so that a second one would be left behind."""
    return loop_module.get()


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe() for _ in range(4)]
    yield made
    for pair in made:
        for fd in pair:
            with contextlib.suppress(OSError):
                os.close(fd)


def on(loop: Loop, function: Callable[[], T]) -> T:
    """What the function returns, or raises, on the loop's thread."""
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(function())
        except BaseException as exception:
            future.set_exception(exception)

    loop.post(job)
    return future.result(LONG)


def test_there_is_one_loop_and_one_thread(loop):
    assert loop_module.get() is loop
    assert loop_module.exists()
    assert [t.name for t in threading.enumerate()].count("proctree-loop") == 1


def test_jobs_run_on_the_loop_in_the_order_of_their_posts(loop):
    seen: list[int] = []
    for number in range(1000):
        loop.post(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert on(loop, loop.is_current_thread)
    assert not loop.is_current_thread()
    assert seen == list(range(1000))


def test_a_job_may_post(loop):
    done = threading.Event()
    loop.post(lambda: loop.post(done.set))
    assert done.wait(LONG)


def test_timers_fire_in_the_order_of_their_times(loop):
    fired: list[str] = []
    done = threading.Event()

    def arm() -> None:
        loop.call_later(0.04, done.set)
        loop.call_later(0.03, lambda: fired.append("last"))
        loop.call_later(0.0, lambda: fired.append("first"))
        loop.call_later(0.02, lambda: fired.append("third"))
        loop.call_later(0.01, lambda: fired.append("second"))

    on(loop, arm)
    assert done.wait(LONG)
    assert fired == ["first", "second", "third", "last"]


def test_timers_of_the_same_time_fire_in_the_order_in_which_they_were_made(loop, monkeypatch):
    fired: list[int] = []
    done = threading.Event()

    def arm() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loop_module.time, "monotonic", lambda: 0.0)
            for number in range(20):
                loop.call_later(0.0, lambda number=number: fired.append(number))  # type: ignore[misc]
            loop.call_later(0.0, done.set)

    on(loop, arm)
    assert done.wait(LONG)
    assert fired == list(range(20))


def test_a_cancelled_timer_never_fires(loop):
    fired: list[str] = []
    done = threading.Event()

    def arm() -> None:
        cancelled = loop.call_later(0.0, lambda: fired.append("cancelled"))
        cancelled.cancel()
        cancelled.cancel()
        victim = loop.call_later(0.01, lambda: fired.append("victim"))
        loop.call_later(0.0, victim.cancel)
        loop.call_later(0.02, done.set)

    on(loop, arm)
    assert done.wait(LONG)
    assert fired == []


def test_cancelled_timers_do_not_pile_up_behind_one_that_is_due_before_them(loop):
    """As the time limits of short trees beside a long one."""

    def arm() -> int:
        first = loop.call_later(1000.0, lambda: None)
        for _ in range(2000):
            loop.call_later(2000.0, lambda: None).cancel()
        kept = len(loop._timers)
        first.cancel()
        return kept

    assert on(loop, arm) < 200


def test_a_timer_may_cancel_another_one_that_is_due_in_the_same_turn(loop, monkeypatch):
    fired: list[str] = []
    done = threading.Event()

    def arm() -> None:
        timers: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(loop_module.time, "monotonic", lambda: 0.0)
            loop.call_later(0.0, lambda: timers[0].cancel())
            timers.append(loop.call_later(0.0, lambda: fired.append("cancelled")))
            loop.call_later(0.0, done.set)

    on(loop, arm)
    assert done.wait(LONG)
    assert fired == []


def run_python(code: str, timeout: float = 15.0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("seconds", ["30 * 24 * 3600", "1e10", "1e300", "float('inf')"])
def test_a_timer_in_the_far_future_stops_nobody(seconds):
    """epoll_wait(2) counts milliseconds in an int. In a process of its own: the loop may die."""
    code = (
        "import threading\n"
        "from proctree import loop\n"
        "loop = loop.get()\n"
        "armed, done = threading.Event(), threading.Event()\n"
        f"loop.post(lambda: (loop.call_later({seconds}, print), armed.set()))\n"
        "assert armed.wait(20)\n"
        "loop.post(lambda: loop.call_later(0.01, done.set))\n"
        "assert done.wait(5), 'the loop is dead'\n"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize("option", ["timeout", "drain_timeout"])
@pytest.mark.parametrize("seconds", ["1e10", "float('inf')"])
def test_a_tree_may_have_all_the_time_in_the_world(option, seconds):
    code = f"import proctree\nassert proctree.run(['true'], {option}={seconds}).ok"
    assert run_python(code) == ""


def test_a_handler_that_raises_stops_nobody(loop, pipes, caplog):
    caplog.set_level(logging.ERROR, "proctree")
    (bad, bad_end), (good, good_end) = pipes[:2]
    done = threading.Event()

    def raising(_mask: int) -> None:
        loop.unregister(bad)
        raise RuntimeError("a defect")

    def reading(_mask: int) -> None:
        loop.unregister(good)
        done.set()

    def fail() -> None:
        raise RuntimeError("a defect")

    def arm() -> None:
        loop.register(bad, READ, raising)
        loop.register(good, READ, reading)
        os.write(bad_end, b"x")
        os.write(good_end, b"x")
        loop.call_later(0.0, fail)

    loop.post(fail)
    on(loop, arm)
    assert done.wait(LONG)
    fired = threading.Event()
    on(loop, lambda: loop.call_later(0.01, fired.set))
    assert fired.wait(LONG)
    defects = [r.getMessage() for r in caplog.records if "loop.defect" in r.getMessage()]
    assert len(defects) == 3
    assert all("a defect" in text for text in defects)


def test_the_report_of_a_defect_says_where(loop, caplog):
    """With the standard logger too: without the traceback nobody could find it."""
    caplog.set_level(logging.ERROR, "proctree")

    def a_function_with_a_defect() -> None:
        raise RuntimeError("a defect")

    loop.post(a_function_with_a_defect)
    on(loop, lambda: None)
    assert "a_function_with_a_defect" in caplog.text


def test_an_event_for_what_has_just_been_unregistered_is_dropped(loop, pipes, caplog):
    """Two are readable in one turn, and whoever comes first ends the other."""
    (one, one_end), (two, two_end) = pipes[:2]
    calls: list[int] = []

    def handler(ours: int, other: int) -> Callable[[int], None]:
        def called(_mask: int) -> None:
            calls.append(ours)
            loop.unregister(ours)
            loop.unregister(other)

        return called

    def arm() -> None:
        for end in (one_end, two_end):
            os.write(end, b"x")
        loop.register(one, READ, handler(one, two))
        loop.register(two, READ, handler(two, one))

    on(loop, arm)
    # After the turn in which both were reported: a post in that turn's handlers runs behind them.
    for _ in range(3):
        on(loop, lambda: None)
    assert len(calls) == 1
    assert caplog.records == []


def test_an_event_for_a_number_that_has_just_got_another_file_is_dropped(loop, pipes):
    """Two are readable in one turn, and whoever comes first closes the other, whose number another
    file gets at once. That one is told of when it is ready itself."""
    (one, one_end), (two, two_end), (new, new_end) = pipes[:3]
    calls: list[str] = []

    def reused(_mask: int) -> None:
        calls.append("reused")
        loop.unregister(one)
        loop.unregister(two)

    def handler(ours: int, other: int) -> Callable[[int], None]:
        def called(_mask: int) -> None:
            calls.append("first")
            loop.unregister(ours)
            loop.unregister(other)
            os.dup2(new, other)
            loop.register(other, READ, reused)

        return called

    def arm() -> None:
        for end in (one_end, two_end):
            os.write(end, b"x")
        loop.register(one, READ, handler(one, two))
        loop.register(two, READ, handler(two, one))

    on(loop, arm)
    for _ in range(3):
        on(loop, lambda: None)
    assert calls == ["first"]
    os.write(new_end, b"x")
    for _ in range(3):
        on(loop, lambda: None)
    assert calls == ["first", "reused"]


def test_unregistering_twice_does_no_harm(loop, pipes):
    def job() -> None:
        loop.register(pipes[0][0], READ, lambda _mask: None)
        loop.unregister(pipes[0][0])
        loop.unregister(pipes[0][0])

    on(loop, job)


def test_register_from_any_thread(loop, pipes):
    reader, writer = pipes[0]
    done = threading.Event()

    def called(_mask: int) -> None:
        loop.unregister(reader)
        done.set()

    loop.register(reader, READ, called)
    os.write(writer, b"x")
    assert done.wait(LONG)


def test_post_from_a_signal_handler_in_the_middle_of_a_post(loop):
    count, asked = [0], [0]

    def add() -> None:
        count[0] += 1

    def handler(*_: object) -> None:
        asked[0] += 1
        loop.post(add)

    before = signal.signal(signal.SIGVTALRM, handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
    try:
        posted = 0
        while asked[0] < 20:
            loop.post(add)
            posted += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    on(loop, lambda: None)
    assert count[0] == posted + asked[0]


def test_posts_from_many_threads_are_all_run(loop):
    count = [0]

    def add() -> None:
        count[0] += 1

    def post_many() -> None:
        for _ in range(1000):
            loop.post(add)

    threads = [threading.Thread(target=post_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    on(loop, lambda: None)
    assert count[0] == 4000


def test_a_full_wake_counter_is_no_trouble(loop):
    """eventfd(2): a write that would go over 2**64 - 2 fails with EAGAIN."""

    def job() -> bool:
        os.eventfd_write(loop._wake, 2**64 - 2)
        loop.post(lambda: None)
        return True

    assert on(loop, job)
    assert on(loop, lambda: True)


# -- forks of the host program


def test_a_forked_child_has_no_loop_and_none_of_its_descriptors(loop, pipes):
    reader, writer = pipes[0]
    fds.own(reader)
    ours = [loop._wake, loop._epoll.fileno(), reader]

    def child() -> list[Any]:
        return [loop_module.exists(), [is_open(fd) for fd in ours], is_open(writer)]

    try:
        assert in_child(child) == [False, [False] * 3, True]
    finally:
        fds.close(reader)
    assert on(loop, lambda: True)


def test_what_a_forked_child_closes_stays_registered_here(loop, pipes):
    """The trap of epoll(7): a registration is shared with the child, and EPOLL_CTL_DEL there takes
    it away here."""
    reader, writer = pipes[0]
    done = threading.Event()
    fds.own(reader)

    def called(_mask: int) -> None:
        loop.unregister(reader)
        done.set()

    loop.register(reader, READ, called)

    try:
        assert in_child(lambda: is_open(reader)) is False
        os.write(writer, b"x")
        assert done.wait(LONG)
        assert on(loop, lambda: True)
    finally:
        fds.close(reader)


def test_what_the_child_opens_under_those_numbers_stays_open():
    """The objects that had the descriptors close them when they go: a second time by then."""
    code = (
        "import gc, os, signal\n"
        "import proctree\n"
        "from proctree import loop\n"
        "number = loop.get()._epoll.fileno()\n"
        "handle = proctree.WatchedSubprocess.start(['sleep', '1000'], stdout=proctree.CAPTURE)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    status = 1\n"
        "    try:\n"
        "        mine = []\n"
        "        while len(mine) < 50: mine.append(os.dup(2))\n"
        "        assert number in mine\n"
        "        del handle\n"
        "        loop.get()\n"
        "        gc.collect()\n"
        "        for fd in mine: os.fstat(fd)\n"
        "        status = 0\n"
        "    finally:\n"
        "        os._exit(status)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "handle.kill(proctree.KillPolicy.now())\n"
        "handle.wait()\n"
    )
    assert run_python(code) == ""


def test_a_forked_child_may_have_trees_of_its_own(loop):
    with proctree.WatchedSubprocess.start(["sleep", "1000"]) as handle:

        def child() -> list[Any]:
            outcome = proctree.run(["sh", "-c", "exit 3"])
            try:
                handle.kill()
            except proctree.ProctreeError as error:
                return [outcome.returncode, handle.tree_id in str(error)]
            return [outcome.returncode, False]

        assert in_child(child) == [3, True]
        assert handle.state is proctree.State.RUNNING


def test_a_fork_in_the_middle_of_making_descriptors_waits():
    """The lock that a launching thread holds is held by no one in a forked child."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with fds.making():
            inside.set()
            leave.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(LONG)
    timer = threading.Timer(0.05, leave.set)
    timer.start()

    def child() -> bool:
        with fds.making():
            return leave.is_set()

    assert in_child(child)
    thread.join(LONG)
    timer.join(LONG)


def test_a_job_that_posts_itself_for_ever_lets_others_have_their_turn(loop, pipes):
    """A reader does that while there is more to read."""
    reader, writer = pipes[0]
    seen: Future[int] = Future()
    over = threading.Event()
    ended = threading.Event()

    def again() -> None:
        if over.is_set():
            ended.set()
        else:
            loop.post(again)

    def readable(mask: int) -> None:
        loop.unregister(reader)
        seen.set_result(mask)

    loop.register(reader, READ, readable)
    loop.post(again)
    try:
        os.write(writer, b"x")
        assert seen.result(LONG) & READ
    finally:
        over.set()
    assert ended.wait(LONG)
