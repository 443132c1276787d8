"""What a datagram of the sd_notify protocol says: sd_notify(3), "Well-known assignments".

Pure: bytes in, a value out, and nothing is ever raised, since the bytes are a stranger's until
somebody has looked who sent them. Of an assignment that is there several times the first counts, of
READY=1, RELOADING=1 and STOPPING=1 any, and STOPPING=1 wins: as systemd does it.
"""

from __future__ import annotations

import errno as _errno
import re

import attrs

DATAGRAM_MAX = 4096
"""Bytes of a datagram; a longer one is refused as a whole. As systemd."""

STATUS_MAX = 1024
"""Characters of a STATUS that are kept."""

ERROR_NAME_MAX = 255
"""Characters of a D-Bus error name: D-Bus Specification, "Bus names"."""

PID_MAX = 1 << 22
"""proc_sys_kernel(5), pid_max: the most that a kernel gives out."""

ERRNO_MAX = 4095
"""The largest number that a system call can answer as an error."""

LONGEST = 10 * 366 * 86400.0
"""Seconds that may be asked for: far beyond, the difference of two times is lost in rounding."""

FOREVER = (1 << 64) - 1
"""Of WATCHDOG_USEC: no watchdog, as 0 (sd_watchdog_enabled(3) takes neither for an interval)."""

_DIGITS = re.compile(rb"[0-9]{1,20}")
_NAME = re.compile(rb"[!-~]*")
_FLAGS = (b"READY", b"RELOADING", b"STOPPING", b"BARRIER", b"RESTART_RESET")
_UNSUPPORTED = {
    b"FDSTORE": "descriptors are not stored: they are closed",
    b"FDSTOREREMOVE": "descriptors are not stored",
    b"MAINPIDFD": "descriptors are not taken: use MAINPID",
}


@attrs.frozen
class Refused:
    """An assignment that was not taken.

    Attributes:
        name: its name; "" for the whole datagram.
        why: for people.
    """

    name: str
    why: str


@attrs.frozen
class Notification:
    """One datagram.

    Attributes:
        ready: READY=1: it has started, or has finished reloading.
        reloading: RELOADING=1. Together with `ready`: it has reloaded already.
        stopping: STOPPING=1; `ready` and `reloading` are False then, whatever else was said.
        monotonic: MONOTONIC_USEC in seconds (CLOCK_MONOTONIC), the time of what is reported.
        status: STATUS, for people: at most 1024 characters, all of them printable. "" takes back an
            earlier one; None: it was not sent.
        main_pid: MAINPID, as the sender counts (pid_namespaces(7)).
        watchdog: WATCHDOG=1: it is alive.
        watchdog_trigger: WATCHDOG=trigger: act as if the watchdog had expired.
        watchdog_seconds: WATCHDOG_USEC: the interval from now on. 0.0: no watchdog.
        extend_seconds: EXTEND_TIMEOUT_USEC: it needs that long from now on to start, reload or
            stop, unless it says so again.
        errno: ERRNO, by number or by name.
        bus_error: BUSERROR, the name of a D-Bus error.
        exit_status: EXIT_STATUS, 0 to 255.
        restart_reset: RESTART_RESET=1: count restarts anew.
        barrier: BARRIER=1: whoever sent it waits until its descriptor is closed. It comes alone.
        refused: what was not taken, and why. What is not known is not refused but ignored.
    """

    ready: bool = False
    reloading: bool = False
    stopping: bool = False
    monotonic: float | None = None
    status: str | None = None
    main_pid: int | None = None
    watchdog: bool = False
    watchdog_trigger: bool = False
    watchdog_seconds: float | None = None
    extend_seconds: float | None = None
    errno: int | None = None
    bus_error: str | None = None
    exit_status: int | None = None
    restart_reset: bool = False
    barrier: bool = False
    refused: tuple[Refused, ...] = ()


class _Assignments:
    """Of one datagram, and what is wrong with them."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = set(lines)
        self.first: dict[bytes, bytes] = {}
        self.refused: list[Refused] = []
        for line in lines:
            name, equals, value = line.partition(b"=")
            if equals:
                self.first.setdefault(name, value)

    def refuse(self, name: bytes, why: str) -> None:
        self.refused.append(Refused(name.decode("ascii"), why))

    def flag(self, name: bytes) -> bool:
        if name + b"=1" in self.lines:
            return True
        if name in self.first:
            self.refuse(name, "it can be 1, and nothing else")
        return False

    def number(self, name: bytes, low: int, high: int) -> int | None:
        value = self.first.get(name)
        if value is None:
            return None
        if not _DIGITS.fullmatch(value):
            self.refuse(name, "that is no number")
        elif not low <= int(value) <= high:
            self.refuse(name, f"it must be from {low} to {high}")
        else:
            return int(value)
        return None

    def seconds(self, name: bytes) -> float | None:
        value = self.number(name, 0, int(LONGEST * 1e6))
        return None if value is None else value / 1e6

    def watchdog_seconds(self) -> float | None:
        if self.first.get(b"WATCHDOG_USEC") == b"%d" % FOREVER:
            return 0.0
        return self.seconds(b"WATCHDOG_USEC")

    def watchdog(self) -> bytes:
        value = self.first.get(b"WATCHDOG", b"")
        if value not in (b"1", b"trigger") and b"WATCHDOG" in self.first:
            self.refuse(b"WATCHDOG", "it can be 1 or trigger")
        return value

    def error_number(self) -> int | None:
        named = getattr(_errno, self.first.get(b"ERRNO", b"").decode("ascii", "replace"), None)
        return named if type(named) is int else self.number(b"ERRNO", 0, ERRNO_MAX)

    def bus_error(self) -> str | None:
        value = self.first.get(b"BUSERROR")
        if value is None:
            return None
        if len(value) > ERROR_NAME_MAX or not _NAME.fullmatch(value):
            self.refuse(b"BUSERROR", "that is no name of an error")
            return None
        return value.decode("ascii")


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"


def harmless(data: bytes, most: int = STATUS_MAX) -> str:
    """Text of somebody else's for logs and terminals: at most so many characters, none of which
    moves a cursor or turns a line around, and nothing that is not Unicode."""
    return "".join(map(_printable, data.decode("utf-8", "replace")[:most]))


def _refuse_all(why: str) -> Notification:
    return Notification(refused=(Refused("", why),))


def parse(data: bytes) -> Notification:
    """What a datagram says. Never raises.

    Args:
        data: at most one byte more than `DATAGRAM_MAX` needs to be there of one that is longer.
    """
    if len(data) > DATAGRAM_MAX:
        return _refuse_all(f"a datagram may have {DATAGRAM_MAX} bytes")
    if b"\0" in data[:-1]:
        return _refuse_all("there is a null byte in it")
    text = data.removesuffix(b"\0").replace(b"\r", b"\n")
    lines = [line for line in text.split(b"\n") if line]
    if b"BARRIER=1" in lines:
        if len(lines) > 1:
            return _refuse_all("BARRIER=1 must come alone")
        return Notification(barrier=True)
    return _parse(_Assignments(lines))


def _parse(said: _Assignments) -> Notification:
    for name, why in _UNSUPPORTED.items():
        if name + b"=1" in said.lines:
            said.refuse(name, why)
    ready, reloading, stopping, _, restart_reset = map(said.flag, _FLAGS)
    watchdog = said.watchdog()
    status = said.first.get(b"STATUS")
    monotonic = said.number(b"MONOTONIC_USEC", 0, FOREVER)
    return Notification(
        ready=ready and not stopping,
        reloading=reloading and not stopping,
        stopping=stopping,
        monotonic=None if monotonic is None else monotonic / 1e6,
        status=None if status is None else harmless(status),
        main_pid=said.number(b"MAINPID", 1, PID_MAX),
        watchdog=watchdog == b"1",
        watchdog_trigger=watchdog == b"trigger",
        watchdog_seconds=said.watchdog_seconds(),
        extend_seconds=said.seconds(b"EXTEND_TIMEOUT_USEC"),
        errno=said.error_number(),
        bus_error=said.bus_error(),
        exit_status=said.number(b"EXIT_STATUS", 0, 255),
        restart_reset=restart_reset,
        refused=tuple(said.refused),
    )
