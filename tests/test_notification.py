"""The sd_notify protocol as bytes: what is taken, what is refused, and that nothing breaks it."""

from __future__ import annotations

import errno

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proctree.supervisor.flood import Budget
from proctree.supervisor.notification import (
    DATAGRAM_MAX,
    LONGEST,
    PID_MAX,
    STATUS_MAX,
    Notification,
    harmless,
    parse,
)

NOTHING = Notification()


def test_everything_that_is_known():
    told = parse(
        b"READY=1\nMONOTONIC_USEC=5000000\nSTATUS=at work\nMAINPID=4711\nWATCHDOG=1\n"
        b"WATCHDOG_USEC=2500000\nEXTEND_TIMEOUT_USEC=90000000\nERRNO=2\nEXIT_STATUS=7\n"
        b"BUSERROR=org.freedesktop.DBus.Error.TimedOut\nRESTART_RESET=1"
    )
    assert told == Notification(
        ready=True,
        monotonic=5.0,
        status="at work",
        main_pid=4711,
        watchdog=True,
        watchdog_seconds=2.5,
        extend_seconds=90.0,
        errno=2,
        exit_status=7,
        bus_error="org.freedesktop.DBus.Error.TimedOut",
        restart_reset=True,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        b"X_MINE=1",
        b"SOMETHING_NEW=2",
        b"no assignment",
        b"=1",
        b"ready=1",
        b" READY=1",
        b"NOTIFYACCESS=all",
        b"MAINPIDFDID=7",
        b"FDNAME=x",
        b"FDPOLL=0",
        b"VARLINKERROR=x.y",
    ],
)
def test_what_is_not_known_is_ignored(data):
    assert parse(data) == NOTHING


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"READY=1", Notification(ready=True)),
        (b"READY=1\0", Notification(ready=True)),
        (b"READY=1\r\nWATCHDOG=1\n", Notification(ready=True, watchdog=True)),
        (b"RELOADING=1", Notification(reloading=True)),
        (b"RELOADING=1\nREADY=1", Notification(reloading=True, ready=True)),
        (b"STOPPING=1", Notification(stopping=True)),
        (b"READY=1\nRELOADING=1\nSTOPPING=1", Notification(stopping=True)),
        (b"WATCHDOG=trigger", Notification(watchdog_trigger=True)),
        (b"WATCHDOG_USEC=0", Notification(watchdog_seconds=0.0)),
        (b"WATCHDOG_USEC=18446744073709551615", Notification(watchdog_seconds=0.0)),
        (b"BARRIER=1", Notification(barrier=True)),
        (b"BARRIER=1\n", Notification(barrier=True)),
        (b"STATUS=", Notification(status="")),
        (b"STATUS=a=b", Notification(status="a=b")),
        (b"ERRNO=ENOENT", Notification(errno=errno.ENOENT)),
        (b"ERRNO=0", Notification(errno=0)),
        (b"MAINPID=1", Notification(main_pid=1)),
        (b"MAINPID=%d" % PID_MAX, Notification(main_pid=PID_MAX)),
        (b"EXIT_STATUS=255", Notification(exit_status=255)),
        (b"BUSERROR=", Notification(bus_error="")),
        (b"EXTEND_TIMEOUT_USEC=1", Notification(extend_seconds=1e-6)),
        (b"READY=0\nREADY=1", Notification(ready=True)),
    ],
)
def test_what_each_says(data, told):
    assert parse(data) == told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"STATUS=one\nSTATUS=two", Notification(status="one")),
        (b"MAINPID=3\nMAINPID=4", Notification(main_pid=3)),
        (b"WATCHDOG=trigger\nWATCHDOG=1", Notification(watchdog_trigger=True)),
        (b"ERRNO=1\nERRNO=2", Notification(errno=1)),
    ],
)
def test_the_first_of_several_counts(data, told):
    """As for systemd, which looks for the first line that begins so."""
    assert parse(data) == told


def test_a_first_one_that_is_refused_is_not_replaced_by_the_next():
    told = parse(b"MAINPID=x\nMAINPID=4")
    assert told.main_pid is None
    assert [refused.name for refused in told.refused] == ["MAINPID"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"READY=0", "READY"),
        (b"READY=", "READY"),
        (b"STOPPING=yes", "STOPPING"),
        (b"BARRIER=2", "BARRIER"),
        (b"WATCHDOG=", "WATCHDOG"),
        (b"WATCHDOG=2", "WATCHDOG"),
        (b"MAINPID=0", "MAINPID"),
        (b"MAINPID=-1", "MAINPID"),
        (b"MAINPID=", "MAINPID"),
        (b"MAINPID= 7", "MAINPID"),
        (b"MAINPID=7 ", "MAINPID"),
        (b"MAINPID=+7", "MAINPID"),
        (b"MAINPID=0x7", "MAINPID"),
        (b"MAINPID=7_0", "MAINPID"),
        ("MAINPID=\N{ARABIC-INDIC DIGIT SEVEN}".encode(), "MAINPID"),
        (b"MAINPID=%d" % (PID_MAX + 1), "MAINPID"),
        (b"MAINPID=" + b"0" * 21, "MAINPID"),
        (b"WATCHDOG_USEC=1.5", "WATCHDOG_USEC"),
        (b"WATCHDOG_USEC=%d" % (int(LONGEST * 1e6) + 1), "WATCHDOG_USEC"),
        (b"EXTEND_TIMEOUT_USEC=18446744073709551615", "EXTEND_TIMEOUT_USEC"),
        (b"EXTEND_TIMEOUT_USEC=99999999999999999999", "EXTEND_TIMEOUT_USEC"),
        (b"MONOTONIC_USEC=18446744073709551616", "MONOTONIC_USEC"),
        (b"ERRNO=4096", "ERRNO"),
        (b"ERRNO=EWHAT", "ERRNO"),
        (b"ERRNO=errorcode", "ERRNO"),
        (b"ERRNO=__name__", "ERRNO"),
        (b"EXIT_STATUS=256", "EXIT_STATUS"),
        (b"BUSERROR=a b", "BUSERROR"),
        (b"BUSERROR=" + b"a" * 256, "BUSERROR"),
        (b"BUSERROR=\xff", "BUSERROR"),
        (b"FDSTORE=1", "FDSTORE"),
        (b"MAINPIDFD=1", "MAINPIDFD"),
    ],
)
def test_what_is_refused_by_name_with_a_reason(data, name):
    told = parse(data + b"\nX_KEPT=1\nSTATUS=kept")
    (refused,) = told.refused
    assert refused.name == name
    assert refused.why
    assert attrs.evolve(told, refused=()) == Notification(status="kept")


@pytest.mark.parametrize(
    "data",
    [
        b"READY=1\n" + b"x" * DATAGRAM_MAX,
        b"READY=1\0STATUS=x",
        b"\0\0",
        b"READY=1\nBARRIER=1",
        b"BARRIER=1\nBARRIER=1",
    ],
)
def test_what_is_refused_as_a_whole(data):
    told = parse(data)
    (refused,) = told.refused
    assert refused.name == ""
    assert attrs.evolve(told, refused=()) == NOTHING


def test_the_longest_datagram():
    data = b"READY=1\nX_=".ljust(DATAGRAM_MAX, b"x")
    assert parse(data) == Notification(ready=True)
    assert parse(data + b"x").refused


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain \xc3\xa4 \xe2\x82\xac", "plain ä €"),
        (b"\x1b[2J\x07", "�[2J�"),
        (b"a\tb\x0bc", "a b c"),
        (b"\xff\xfe", "��"),
        ("\u202eevil\u2028line\u00a0".encode(), "�evil line "),
        (b"\xed\xa0\x80", "���"),
        ("\x85\x9b".encode(), " �"),
        (b"x" * (STATUS_MAX + 1), "x" * STATUS_MAX),
    ],
)
def test_a_status_harms_nobody(data, text):
    assert harmless(data) == text
    assert parse(b"STATUS=" + data).status == text


NAMES = [
    *(b"READY", b"RELOADING", b"STOPPING", b"STATUS", b"ERRNO", b"BUSERROR", b"EXIT_STATUS"),
    *(b"MAINPID", b"WATCHDOG", b"WATCHDOG_USEC", b"EXTEND_TIMEOUT_USEC", b"MONOTONIC_USEC"),
    *(b"BARRIER", b"FDSTORE", b"MAINPIDFD", b"RESTART_RESET", b"X_OTHER"),
]
VALUES = st.one_of(
    st.sampled_from([b"1", b"0", b"trigger", b"", b"\xff", b"\x1b", b"18446744073709551615"]),
    st.integers(-10, 2**70).map(lambda number: b"%d" % number),
    st.binary(max_size=40),
)
LINES = st.tuples(st.sampled_from(NAMES), VALUES).map(b"=".join)
DATAGRAMS = st.one_of(
    st.binary(max_size=200),
    st.lists(LINES, max_size=8).map(b"\n".join),
    st.lists(LINES, max_size=8).map(b"\r\n".join),
)


def check(told: Notification) -> None:
    """What holds for every notification, whatever it was made of."""
    assert not (told.stopping and (told.ready or told.reloading))
    assert not (told.watchdog and told.watchdog_trigger)
    assert told.main_pid is None or 1 <= told.main_pid <= PID_MAX
    assert told.errno is None or 0 <= told.errno <= 4095
    assert told.exit_status is None or 0 <= told.exit_status <= 255
    for seconds in (told.watchdog_seconds, told.extend_seconds):
        assert seconds is None or 0 <= seconds <= LONGEST
    assert told.monotonic is None or told.monotonic >= 0
    for text in (told.status, told.bus_error):
        assert text is None or (text.isprintable() and len(text) <= STATUS_MAX)
    if told.barrier:
        assert told == Notification(barrier=True)


@given(DATAGRAMS)
@example(b"MAINPID=" + b"9" * 4000)
def test_whatever_comes_it_is_in_bounds(data):
    check(parse(data))


@given(st.lists(LINES, max_size=6), st.lists(LINES, max_size=6))
def test_what_comes_later_takes_nothing_back(lines, more):
    """But for STOPPING=1, which wins, and BARRIER=1, which must be alone."""
    first, both = parse(b"\n".join(lines)), parse(b"\n".join([*lines, *more]))
    if b"\0" in b"".join([*lines, *more]) or b"BARRIER=1" in b"\n".join(lines + more):
        return
    if any(b"\n" in line or b"\r" in line for line in lines + more):
        return
    for name in ("status", "main_pid", "errno", "watchdog_seconds", "extend_seconds"):
        assert getattr(first, name) in (None, getattr(both, name))
    if not both.stopping:
        assert both.ready >= first.ready


# -- how much of a sender is read


def test_a_budget_is_spent_and_comes_back():
    budget = Budget(rate=10, burst=3, now=100.0)
    assert [budget.spend(100.0) for _ in range(4)] == [True, True, True, False]
    assert not budget.spend(100.05)
    assert budget.spend(100.11)
    assert not budget.spend(100.11)


def test_nobody_saves_up_more_than_a_burst():
    budget = Budget(rate=10, burst=3, now=0.0)
    assert [budget.spend(1e6) for _ in range(5)] == [True, True, True, False, False]


@given(st.lists(st.floats(0, 0.5), max_size=200))
def test_no_more_is_spent_than_the_rate_allows(pauses):
    now, spent = 0.0, 0
    budget = Budget(rate=10, burst=5, now=0.0)
    for pause in pauses:
        now += pause
        spent += budget.spend(now)
        assert spent <= 5 + 10 * now + 1e-6
