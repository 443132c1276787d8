"""Any bytes as a datagram of the sd_notify protocol: nothing is raised, and everything that comes
of it is in its bounds."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["proctree.supervisor.notification"]):
    from proctree.supervisor.notification import (
        DATAGRAM_MAX,
        LONGEST,
        PID_MAX,
        STATUS_MAX,
        Notification,
        parse,
    )


def one(data: bytes) -> None:
    told = parse(data)
    assert told == parse(data), "it has a memory"
    if len(data) > DATAGRAM_MAX:
        assert told == Notification(refused=told.refused)
        assert told.refused
    assert not (told.stopping and (told.ready or told.reloading))
    assert not (told.watchdog and told.watchdog_trigger)
    if told.barrier:
        assert told == Notification(barrier=True), "a barrier comes alone"
    assert told.main_pid is None or 1 <= told.main_pid <= PID_MAX
    assert told.errno is None or 0 <= told.errno <= 4095
    assert told.exit_status is None or 0 <= told.exit_status <= 255
    for seconds in (told.watchdog_seconds, told.extend_seconds):
        assert seconds is None or 0.0 <= seconds <= LONGEST
    for text in (told.status, told.bus_error):
        assert text is None or (text.isprintable() and len(text) <= STATUS_MAX)
    for refused in told.refused:
        assert refused.why.isprintable(), "it quotes what was sent"


atheris.Setup(sys.argv, one)
atheris.Fuzz()
