"""Waiting for what becomes true once, also from signal handlers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from proctree.latch import Latch

LONG = 60.0


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Installs a handler for SIGUSR1 that calls a function."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda function: signal.signal(signal.SIGUSR1, lambda *_: function())  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, before)


def when_waiting(latch: Latch, waiters: int) -> None:
    """Returns when so many threads wait. The latch tells nobody, so it has to be looked at."""
    deadline = time.monotonic() + LONG
    while len(latch._gates) < waiters:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_set_before_wait():
    latch = Latch()
    assert not latch.is_set()
    latch.set()
    latch.set()
    assert latch.is_set()
    assert latch.wait()
    assert latch.wait(0)


@pytest.mark.parametrize("timeout", [0, -1.0, 0.001])
def test_wait_says_when_time_ran_out(timeout):
    assert Latch().wait(timeout) is False


@pytest.mark.parametrize("timeout", [None, LONG, 1e12, float("inf")])
def test_set_wakes_everybody(timeout):
    latch = Latch()
    results: list[bool] = []
    threads = [in_thread(lambda: results.append(latch.wait(timeout))) for _ in range(8)]
    when_waiting(latch, 8)
    latch.set()
    for thread in threads:
        thread.join(LONG)
    assert results == [True] * 8
    assert not latch._gates


def test_timeouts_do_not_pile_up():
    latch = Latch()
    for _ in range(1000):
        latch.wait(0)
    assert len(latch._gates) == 0


def test_timeouts_do_not_disturb_those_who_go_on_waiting():
    latch = Latch()
    waiter = in_thread(latch.wait)
    when_waiting(latch, 1)
    for _ in range(100):
        latch.wait(0)
    assert len(latch._gates) == 1
    latch.set()
    waiter.join(LONG)
    assert not waiter.is_alive()


def interrupt_when_waiting(latch: Latch, waiters: int = 1) -> threading.Thread:
    main = threading.main_thread().ident
    assert main is not None

    def work() -> None:
        when_waiting(latch, waiters)
        signal.pthread_kill(main, signal.SIGUSR1)

    return in_thread(work)


def test_a_handler_sets_what_the_interrupted_thread_waits_for(on_signal):
    latch = Latch()
    on_signal(latch.set)
    helper = interrupt_when_waiting(latch)
    assert latch.wait(LONG)
    helper.join(LONG)


def test_a_handler_waits_for_what_the_interrupted_thread_waits_for(on_signal):
    latch = Latch()
    seen: list[bool] = []
    on_signal(lambda: seen.append(latch.wait(LONG)))
    helper = interrupt_when_waiting(latch)

    def set_when_both_wait() -> None:
        when_waiting(latch, 2)
        latch.set()

    setter = in_thread(set_when_both_wait)
    assert latch.wait(LONG)
    assert seen == [True]
    helper.join(LONG)
    setter.join(LONG)


def test_a_handler_sets_in_the_middle_of_set():
    """Whatever the moment at which the signal comes: everybody is woken, nothing is raised."""
    latches, signals = [Latch()], []
    signal.signal(signal.SIGVTALRM, lambda *_: (signals.append(1), latches[-1].set()))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0002, 0.0002)
    try:
        while len(signals) < 50:
            latches.append(Latch())
            latches[-1].wait(0)
            latches[-1].set()
            assert latches[-1].wait(LONG)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def test_race_set_comes_just_before_the_waiter_is_in_the_queue():
    latch = Latch()

    class Queue(list):  # type: ignore[type-arg]
        def append(self, gate: object) -> None:
            latch.set()
            super().append(gate)

    latch._gates = Queue()
    waiter = in_thread(latch.wait)
    waiter.join(LONG)
    assert not waiter.is_alive()


def test_no_wakeup_is_lost_between_set_and_wait():
    for _ in range(500):
        latch = Latch()
        waiter = in_thread(latch.wait)
        latch.set()
        waiter.join(LONG)
        assert not waiter.is_alive()
