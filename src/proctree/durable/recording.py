"""The records of a run, as bytes: text for people, with a checksum for the program. Pure.

    proctree request 1
    key nightly
    ...
    crc32 1c291ca3

One line for each field; a value is escaped so that it is one line of ASCII. The last line is the
CRC-32 (zlib's) of everything before it, so that a record which was torn or changed is not believed.
The exit record of a tree is written by its warden, in C: src/warden/record.c.
"""

from __future__ import annotations

import enum
import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from proctree.records import Usage

VERSION = 1


class Unreadable(ValueError):
    """Not a record, or not a whole one; the message says why."""


def escape(text: str) -> str:
    """One line of ASCII."""
    return text.encode("unicode_escape").decode("ascii")


def unescape(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape")


def encode(kind: str, fields: Mapping[str, str | int]) -> bytes:
    """A record. The names of the fields are ours; their values may be any text or number."""
    lines = [f"proctree {kind} {VERSION}"]
    lines += [f"{name} {escape(str(value))}" for name, value in fields.items()]
    body = ("\n".join(lines) + "\n").encode("ascii")
    return body + b"crc32 %08x\n" % zlib.crc32(body)


def decode(kind: str, data: bytes) -> dict[str, str]:
    """The fields of a record.

    Raises:
        Unreadable: it is not one of this kind and version, or not whole.
    """
    body, mark, tail = data.rpartition(b"crc32 ")
    if not mark or not body.endswith(b"\n") or len(tail) != 9 or not tail.endswith(b"\n"):
        raise Unreadable("cut off: it does not end with a checksum")
    if tail[:-1] != b"%08x" % zlib.crc32(body):
        raise Unreadable("the checksum is wrong")
    try:
        first, *lines = body.decode("ascii").splitlines()
        if first != f"proctree {kind} {VERSION}":
            raise Unreadable(f"it says {first!r} and not 'proctree {kind} {VERSION}'")
        pairs = (line.split(" ", 1) for line in lines)
        return {name: unescape(value) for name, value in pairs}
    except Unreadable:
        raise
    except (ValueError, UnicodeError) as error:
        raise Unreadable(f"not a record: {error}") from None


_NUMBERS = frozenset({"pid_namespace", "supervisor", "requested", "user_namespace"})
"""The fields of a request that are numbers."""


class Request(NamedTuple):
    """What was asked for: written before anything is started or submitted.

    Attributes:
        key: the key.
        target: what it is, for people: the arguments of a command, the name of a function or job.
        fingerprint: of the target, so that another one is known for another one.
        tree_id: 16 hexadecimal digits; of a tree it is the id, of a job the idempotency key.
        kind: "tree" or "job".
        boot: the boot of the machine (/proc/sys/kernel/random/boot_id).
        pid_namespace: in which the numbers are meant.
        host: the name of the machine, for people.
        supervisor: the pid of who wrote it, for people.
        requested: when, nanoseconds since the epoch, for people.
        containment: the backend of a tree, or "".
        cgroup: the directory of its cgroup, or "".
        user_namespace: of who wrote it; 0: it is not known.
    """

    key: str
    target: str
    fingerprint: str
    tree_id: str
    kind: str
    boot: str
    pid_namespace: int
    host: str
    supervisor: int
    requested: int
    containment: str = ""
    cgroup: str = ""
    user_namespace: int = 0

    def encode(self) -> bytes:
        return encode("request", self._asdict())

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Raises Unreadable."""
        fields = {"user_namespace": "0", **decode("request", data)}
        try:
            values = {
                name: int(fields[name]) if name in _NUMBERS else fields[name]
                for name in cls._fields
            }
        except (KeyError, ValueError) as error:
            raise Unreadable(f"a field is missing or wrong: {error}") from None
        return cls(**values)  # type: ignore[arg-type]


class Cause(enum.IntEnum):
    """Why an attempt ended, as the warden counts (src/warden/record.c)."""

    ITSELF = 0
    OWNER = 1
    """Its owner ended it: the note says why."""
    CANCELLED = 2
    LEASE = 3
    """Nobody had been attached, or had renewed the lease, for so long."""
    ASKED = 4
    """Somebody sent a signal to the warden."""
    NOT_STARTED = 5


class Exit(NamedTuple):
    """How an attempt ended. No exit is recorded before its tree is proved empty.

    Attributes:
        status: the wait status of the main process; None if it has none.
        cause: why it ended.
        note: for `Cause.OWNER`: "reason\\0detail", as its containment sends it; of a job, what
            `poll` said.
        error, step: for `Cause.NOT_STARTED`: errno, and the number of the step (protocol.STEPS).
        pid: of the main process, or 0.
        duration: seconds.
        usage: CPU and memory of the whole tree.
    """

    status: int | None
    cause: Cause = Cause.ITSELF
    note: str = ""
    error: int = 0
    step: int = 0
    pid: int = 0
    duration: float = 0.0
    usage: Usage = Usage()

    @property
    def returncode(self) -> int | None:
        return None if self.status is None else os.waitstatus_to_exitcode(self.status)

    @property
    def by_itself(self) -> bool:
        return self.cause is Cause.ITSELF

    def encode(self) -> bytes:
        usage = self.usage
        fields: dict[str, str | int] = {
            "status": -1 if self.status is None else self.status,
            "cause": int(self.cause),
            "error": self.error,
            "step": self.step,
            "pid": self.pid,
            "duration_ms": round(self.duration * 1000),
            "user_us": round(usage.user * 1e6),
            "system_us": round(usage.system * 1e6),
            "max_rss": usage.max_rss,
            "memory_peak": usage.memory_peak,
            "pids_peak": usage.pids_peak,
            "oom_kills": usage.oom_kills,
            "note": self.note.encode("utf-8", "surrogateescape").hex(),
        }
        return encode("exit", fields)

    @classmethod
    def decode(cls, data: bytes) -> Exit:
        """Raises Unreadable."""
        fields = decode("exit", data)
        try:
            note = bytes.fromhex(fields.pop("note")).decode("utf-8", "surrogateescape")
            number = {name: int(value) for name, value in fields.items()}
            return cls(
                status=None if number["status"] < 0 else number["status"],
                cause=Cause(number["cause"]),
                note=note,
                error=number["error"],
                step=number["step"],
                pid=number["pid"],
                duration=number["duration_ms"] / 1000,
                usage=Usage(
                    number["user_us"] / 1e6,
                    number["system_us"] / 1e6,
                    number["max_rss"],
                    number["memory_peak"],
                    number["pids_peak"],
                    number["oom_kills"],
                ),
            )
        except (KeyError, ValueError) as error:
            raise Unreadable(f"a field is missing or wrong: {error}") from None
