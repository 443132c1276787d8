"""The watchdog of a tree, on the process's own loop."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.on_loop import LONG, on_loop

from proctree import loop as loop_module
from proctree.loop import Loop
from proctree.supervisor import watchdog as watchdog_module
from proctree.supervisor.watchdog import Watchdog

NEVER = 3600.0


class Watched:
    """One, and what it said."""

    def __init__(self, seconds: float) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        self.watchdog = on_loop(lambda: Watchdog(loop_module.get(), seconds, self.said.put))

    def call(self, name: str, *args: Any) -> None:
        on_loop(lambda: getattr(self.watchdog, name)(*args))


@pytest.fixture
def make() -> Iterator[Callable[[float], Watched]]:
    made: list[Watched] = []

    def one(seconds: float) -> Watched:
        made.append(Watched(seconds))
        return made[-1]

    yield one
    for watched in made:
        watched.call("stop")


class Clock:
    """What the watchdog takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Timers:
    """The part of a loop that it uses, whose time is the clock's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.timers: list[loop_module.Timer] = []
        self.made = 0

    def call_later(self, delay: float, callback: Callable[[], None]) -> loop_module.Timer:
        self.made += 1
        self.timers.append(loop_module.Timer(self._clock.now + delay, callback))
        return self.timers[-1]

    def run_until(self, end: float) -> None:
        while True:
            due = [t for t in self.timers if t.callback is not None and t.due <= end]
            if not due:
                self._clock.now = end
                return
            timer = min(due, key=lambda t: t.due)
            self._clock.now = max(self._clock.now, timer.due)
            callback, timer.callback = timer.callback, None
            assert callback is not None
            callback()


class Exact:
    """A watchdog whose time is ours: what it does is then a matter of numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.clock = Clock()
        monkeypatch.setattr(watchdog_module, "monotonic", self.clock)
        self.loop = Timers(self.clock)
        self.said: list[tuple[float, str]] = []
        loop: Any = self.loop
        self.watchdog = Watchdog(loop, seconds, self._expired)

    def _expired(self, why: str) -> None:
        self.said.append((self.clock.now - 1000.0, why))

    def at(self, second: float) -> Watchdog:
        self.loop.run_until(1000.0 + second)
        return self.watchdog


LATE = watchdog_module.LAST_LOOK


def test_one_that_is_not_fed_expires_once(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    exact.at(9.9)
    assert not exact.said
    exact.at(100)
    assert exact.said == [(10.0 + LATE, "no WATCHDOG=1 for 10 s")]


def test_the_last_feeding_counts(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    for second in range(1, 100, 7):
        exact.at(second).fed()
    exact.at(200)
    (said,) = exact.said
    assert said[0] == pytest.approx(99 + 10 + LATE)


def test_feeding_makes_no_timer(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    for millisecond in range(5000):
        exact.at(millisecond / 1000).fed()
    assert exact.loop.made == 1
    exact.at(100)
    assert exact.loop.made == 3
    assert len(exact.said) == 1


def test_what_was_sent_in_time_and_read_late_counts(monkeypatch):
    """The supervisor was stopped meanwhile: the timer comes before, or with, what was sent."""
    exact = Exact(monkeypatch, 10.0)
    exact.clock.now += 60
    exact.at(60)
    assert not exact.said
    exact.watchdog.fed()
    exact.at(69)
    assert not exact.said
    exact.at(100)
    (said,) = exact.said
    assert said[0] == pytest.approx(70 + LATE)


@pytest.mark.parametrize(("new", "expires"), [(2.0, 7.0), (50.0, 55.0)])
def test_another_interval_counts_from_now_on(monkeypatch, new, expires):
    exact = Exact(monkeypatch, 10.0)
    exact.at(5).set_interval(new)
    assert exact.watchdog.seconds == new
    exact.at(200)
    assert exact.said == [(pytest.approx(expires + LATE), f"no WATCHDOG=1 for {new:g} s")]


def test_none_and_one_later(monkeypatch):
    exact = Exact(monkeypatch, 0.0)
    exact.at(1000).fed()
    assert not exact.said
    exact.watchdog.set_interval(10.0)
    exact.at(1005).set_interval(0.0)
    exact.at(5000)
    assert not exact.said


def test_one_that_is_paused_waits(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    exact.at(9).pause()
    exact.at(1000).set_interval(20.0)
    exact.at(2000).resume()
    exact.at(2019)
    assert not exact.said
    exact.watchdog.resume()
    exact.at(3000)
    assert exact.said == [(pytest.approx(2020 + LATE), "no WATCHDOG=1 for 20 s")]


def test_one_that_is_triggered(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    exact.at(1).trigger()
    assert exact.said == [(1.0, "WATCHDOG=trigger")]
    exact.watchdog.trigger()
    exact.watchdog.set_interval(1.0)
    exact.at(100)
    assert len(exact.said) == 1


def test_one_that_is_stopped_says_nothing(monkeypatch):
    exact = Exact(monkeypatch, 10.0)
    exact.at(9).stop()
    for call in (exact.watchdog.trigger, exact.watchdog.fed, exact.watchdog.resume):
        call()
    exact.watchdog.set_interval(1.0)
    exact.at(100)
    assert not exact.said


# -- on the loop


def test_on_the_loop_it_expires(make):
    assert make(0.01).said.get(timeout=LONG) == "no WATCHDOG=1 for 0.01 s"


def test_on_the_loop_it_is_triggered(make):
    watched = make(NEVER)
    watched.call("trigger")
    assert watched.said.get(timeout=LONG) == "WATCHDOG=trigger"


def test_on_the_loop_a_shorter_interval(make):
    watched = make(NEVER)
    watched.call("set_interval", 0.01)
    assert watched.said.get(timeout=LONG) == "no WATCHDOG=1 for 0.01 s"


def test_the_loop_is_left_as_it_was(make):
    """A watchdog that is stopped leaves no timer that would keep it."""
    loop: Loop = loop_module.get()
    watched = make(NEVER)
    watched.call("stop")
    timers = on_loop(lambda: [entry[2].callback for entry in loop._timers])
    assert watched.watchdog._due not in timers
