"""Subscribers hear of everything, in order, and can do no harm."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

import proctree
from proctree import subscriptions, transitions
from proctree.transitions import LOGGED, EventsMissed, TreeDraining

DEADLINE = 60.0


@pytest.fixture
def heard() -> Iterator[queue.Queue[Any]]:
    events: queue.Queue[Any] = queue.Queue()
    with proctree.subscribe(events.put):
        yield events


def of(tree_id: str, heard: queue.Queue[Any]) -> list[Any]:
    """Everything that happened to a tree that has ended, or is about to."""
    found = []
    while not found or not isinstance(found[-1], proctree.TreeEnded):
        event = heard.get(timeout=DEADLINE)
        if getattr(event, "tree_id", None) == tree_id:
            found.append(event)
    return found


def test_the_life_of_a_tree_that_ends_by_itself(heard):
    outcome = proctree.run(["sh", "-c", "exit 3"], name="three")
    events = of(outcome.tree_id, heard)
    assert [type(event).__name__ for event in events] == [
        "TreeStarting",
        "TreeStarted",
        "MainExited",
        "TreeEnded",
    ]
    _, started, exited, ended = events
    assert (started.name, started.pid) == ("three", outcome.pid)
    assert (exited.returncode, exited.leftovers) == (3, 0)
    assert (ended.reason, ended.returncode) == (proctree.Reason.EXITED, 3)
    assert ended.duration == outcome.duration
    times = [event.time_ns for event in events]
    assert times == sorted(times)


def test_the_life_of_a_tree_that_is_killed(heard):
    with proctree.WatchedSubprocess.start(["sleep", "60"], stdout=proctree.CAPTURE) as handle:
        handle.kill(reason="enough")
    events = of(handle.tree_id, heard)
    kinds = [type(event).__name__ for event in events]
    # The warden's word that the main process has exited may come when the tree is empty already.
    assert [kind for kind in kinds if kind != "TreeDraining"] == [
        "TreeStarting",
        "TreeStarted",
        "TreeStopping",
        "TreeSignalled",
        "MainExited",
        "TreeEnded",
    ]
    stopping, signalled = events[2:4]
    assert (stopping.reason, stopping.detail) == (proctree.Reason.KILLED, "enough")
    assert (signalled.signal, signalled.scope) == (signal.SIGTERM, proctree.Scope.TREE)


def test_output_that_is_held_up_is_told_as_draining(heard):
    told, go_on = threading.Event(), threading.Event()

    def line(_line: str) -> None:
        told.set()
        go_on.wait(DEADLINE)

    handle = proctree.WatchedSubprocess.start(["echo", "x"], stdout=proctree.Lines(line))
    assert told.wait(DEADLINE)
    while not isinstance(heard.get(timeout=DEADLINE), TreeDraining):
        pass
    go_on.set()
    assert handle.wait().ok


def test_a_tree_that_cannot_start_has_an_end_too(heard):
    handle = proctree.WatchedSubprocess(["/nonexistent"])
    with pytest.raises(FileNotFoundError):
        handle.launch()
    _starting, ended = of(handle.tree_id, heard)
    assert (ended.reason, ended.pid) == (proctree.Reason.EXEC_FAILED, None)


def test_only_what_was_asked_for():
    ended: queue.Queue[Any] = queue.Queue()
    with proctree.subscribe(ended.put, proctree.TreeEnded):
        proctree.run(["true"])
        assert isinstance(ended.get(timeout=DEADLINE), proctree.TreeEnded)
    assert ended.empty()


def test_nothing_comes_after_close(heard):
    closed: queue.Queue[Any] = queue.Queue()
    proctree.subscribe(closed.put).close()
    outcome = proctree.run(["true"])
    of(outcome.tree_id, heard)
    assert closed.empty()


def test_a_subscriber_that_raises_is_reported_once_and_goes_on(heard):
    structlog.configure()
    called = []

    def broken(event: Any) -> None:
        called.append(event)
        raise RuntimeError("mine")

    try:
        with structlog.testing.capture_logs() as logs, proctree.subscribe(broken):
            for _ in range(2):
                of(proctree.run(["true"]).tree_id, heard)
            while len(called) < 8:
                threading.Event().wait(0.01)
    finally:
        structlog.reset_defaults()
    failed = [log for log in logs if log["event"] == "subscriber.failed"]
    assert [log["error"] for log in failed] == ["RuntimeError('mine')"]


def test_one_that_blocks_holds_up_no_tree_and_is_told_what_it_missed():
    blocked, go_on = threading.Event(), threading.Event()
    received: queue.Queue[Any] = queue.Queue()

    def slow(event: Any) -> None:
        blocked.set()
        go_on.wait(DEADLINE)
        received.put(event)

    event = TreeDraining("a tree", "of none", transitions.now())
    with proctree.subscribe(slow, TreeDraining) as subscription:
        subscription.offer(event)
        assert blocked.wait(DEADLINE)
        for _ in range(subscriptions.PENDING_MAX + 7):
            subscription.offer(event)
        assert proctree.run(["true"]).ok
        go_on.set()
        for _ in range(1 + subscriptions.PENDING_MAX):
            assert received.get(timeout=DEADLINE) == event
        # `EventsMissed` stands where they would have stood, whatever kinds were asked for.
        subscription.offer(event)
        missed = received.get(timeout=DEADLINE)
        assert isinstance(missed, EventsMissed)
        assert missed.missed == 7
        assert received.get(timeout=DEADLINE) == event


def test_a_forked_child_tells_nobody(heard):
    child = os.fork()
    if child == 0:
        os._exit(0 if subscriptions._subscriptions == () else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_flush_waits_for_what_has_happened():
    slow, go_on, received = threading.Event(), threading.Event(), []

    def callback(event: Any) -> None:
        slow.set()
        go_on.wait(DEADLINE)
        received.append(event)

    with proctree.subscribe(callback, proctree.TreeEnded) as subscription:
        assert subscription.flush(DEADLINE)
        proctree.run(["true"])
        assert slow.wait(DEADLINE)
        proctree.run(["true"])
        assert not subscription.flush(0.01)
        assert received == []
        go_on.set()
        assert subscription.flush(DEADLINE)
        assert len(received) == 2


def test_flush_in_the_callback_itself_is_refused():
    raised: queue.Queue[Any] = queue.Queue()

    def callback(_event: Any) -> None:
        try:
            raised.put(subscription.flush())
        except RuntimeError as error:
            raised.put(error)

    with proctree.subscribe(callback, proctree.TreeEnded) as subscription:
        proctree.run(["true"])
        assert "waits for itself" in str(raised.get(timeout=DEADLINE))


@pytest.mark.parametrize("kind", ["TreeEnded", int, proctree.Outcome])
def test_what_is_no_kind_of_event_is_refused(kind):
    with pytest.raises(TypeError, match="kinds: a class of events"):
        proctree.subscribe(print, kind)


def test_a_callback_must_be_callable():
    with pytest.raises(TypeError, match="callback: must be callable, not 7"):
        proctree.subscribe(7)  # type: ignore[arg-type]


def test_every_kind_has_a_name_of_its_own_and_its_time_last():
    names = [name for _, name in LOGGED.values()]
    assert len(set(names)) == len(names)
    assert all(kind._fields[-1] == "time_ns" for kind in LOGGED)
