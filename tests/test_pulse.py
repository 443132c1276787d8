"""When beats are due, and what failures add up to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proctree.supervisor.pulse import Failures, Schedule, spread

times = st.floats(min_value=0.0, max_value=1e7)
intervals = st.floats(min_value=1e-3, max_value=1e5)


@given(times, intervals, times)
def test_the_next_time_is_on_the_grid_ahead_and_the_first_such(origin, interval, now):
    due = Schedule(origin, interval).next(now)
    slack = 1e-6 * interval + 1e-8
    assert now < due <= now + interval + slack
    steps = (due - origin) / interval
    assert abs(steps - round(steps)) * interval <= 1e-6 * interval + 1e-8


@given(intervals, st.lists(st.floats(min_value=0.0, max_value=0.9), min_size=1, max_size=50))
def test_what_beats_take_adds_up_to_nothing(interval, delays):
    schedule = Schedule(0.0, interval)
    now = 0.0
    for delay in delays:
        now = schedule.next(now) + delay * interval
    assert schedule.next(now) <= (len(delays) + 1) * interval * (1 + 1e-9)


def test_a_stall_is_not_made_up_for():
    schedule = Schedule(100.0, 10.0)
    assert schedule.next(100.0) == 110.0
    assert schedule.next(1004.0) == 1010.0
    assert schedule.next(93.0) == 100.0


def test_the_phases_are_spread():
    phases = [spread(f"{number:016x}") for number in range(2000)]
    assert all(0 <= phase < 1 for phase in phases)
    tenths = [sum(int(phase * 10) == tenth for phase in phases) for tenth in range(10)]
    assert min(tenths) > 100
    assert spread("a tree") == spread("a tree")


def test_failures_in_a_row_add_up():
    failures = Failures(3)
    assert failures.failed("first") is None
    assert failures.failed("second") is None
    assert failures.failed("third") == "3 heartbeats in a row failed, the last one: third"


def test_a_success_sets_them_back():
    failures = Failures(2)
    for _ in range(5):
        assert failures.failed("again") is None
        failures.succeeded()
        assert failures.in_a_row == 0
    failures.failed("one")
    assert failures.failed("two") is not None


def test_one_may_be_enough():
    assert Failures(1).failed("reset") == "a heartbeat failed: reset"
