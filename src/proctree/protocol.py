"""The language between a supervisor and its warden: src/warden/protocol.h, in Python.

Pure: bytes in, values out. `tests/test_protocol.py` compiles the header and holds the two against
each other.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from proctree.policy import Scope, Stage

VERSION = 1
STAGES_MAX = 8
MEMBERS_MAX = 64
MAX_MESSAGE = 8192
"""Bytes; more than any message is long, so that one that fills it is known to be garbage."""


class Type(enum.IntEnum):
    START = 1
    SIGNAL = 2
    LIST = 3
    FREEZE = 4
    THAW = 5
    RELEASE = 6
    KEEP = 7
    DETACH = 8
    ATTACH = 9
    CANCEL = 10
    NOTE = 11

    STARTED = 64
    EXEC_FAILED = 65
    EXITED = 66
    MEMBERS = 67
    SIGNALLED = 68
    DENIED = 69
    ASKED = 70
    EMPTY = 71
    FAULT = 72
    STOPPED = 73
    ATTACHED = 74


SCOPES = {Scope.MAIN: 1, Scope.GROUP: 2, Scope.TREE: 3}

STAGE_RESUME = 1
STAGE_FOREGROUND = 2
STAGE_ENDING = 4
MEMBERS_MORE = 1
ATTACH_OWN = 1
ATTACHED_OWNER = 1
ATTACHED_ENDS = 2
NOTE_MAX = 236
"""Bytes that a note may have."""

LEASE_MAX = 0xFFFFFFFF / 1000
"""Seconds; no plain lease is longer."""

STEPS = {
    1: "arguments",
    2: "setsid",
    3: "subreaper",
    4: "signals",
    5: "proc",
    6: "pidfd",
    7: "memory",
    8: "fork",
    9: "pdeathsig",
    10: "chdir",
    11: "descriptors",
    12: "exec",
    13: "adopt",
    14: "protocol",
    15: "stdio",
    16: "parent",
    17: "cgroup",
    18: "limits",
    19: "namespace",
    20: "mount",
    21: "init",
    22: "registry",
    23: "setpgid",
    24: "terminal",
    25: "oom_score_adj",
    26: "nice",
    27: "ionice",
    28: "affinity",
    29: "rlimits",
    30: "groups",
    31: "gid",
    32: "uid",
    33: "no_new_privs",
    34: "lock",
    35: "run",
    36: "record",
    37: "listen",
    38: "attach",
    39: "lease",
}

HEADER = struct.Struct("=BBHI")
STAGE = struct.Struct("=iHHI")
START = struct.Struct("=BBHII" + STAGE.format[1:] * STAGES_MAX)
SIGNAL = struct.Struct("=BBHI" + STAGE.format[1:])
KEEP = struct.Struct("=BBHIQ")
NOTE = struct.Struct(f"=BBHII{NOTE_MAX}s")
STARTED = struct.Struct("=BBHIiiQ")
FAILURE = struct.Struct("=BBHIii")
EXITED = struct.Struct("=BBHIiIQQQ")
MEMBERS = struct.Struct("=BBHIII")
MEMBER = struct.Struct("=iiiiQii1s7x16s")
SIGNALLED = struct.Struct("=BBHIII")
DENIED = struct.Struct("=BBHIii")
ASKED = struct.Struct("=BBHIiiI")
EMPTY = struct.Struct("=BBHIQQQQQQQ")
STOPPED = struct.Struct("=BBHIi4x")
ATTACHED = struct.Struct("=BBHIiI")

_MEMBERS_SIZE = MEMBERS.size + MEMBERS_MAX * MEMBER.size


class ProtocolError(Exception):
    """What came is not the protocol: the peer is not to be believed any more."""


class Message(NamedTuple):
    """One message from the warden: its type, flags, serial, and the values behind the header."""

    type: Type
    flags: int
    serial: int
    values: tuple[int, ...]
    members: tuple[RawMember, ...] = ()


class RawMember(NamedTuple):
    pid: int
    ppid: int
    pgrp: int
    session: int
    start_time: int
    error: int
    tracer: int
    state: str
    name: str


_FROM_WARDEN = {
    Type.STARTED: STARTED,
    Type.EXEC_FAILED: FAILURE,
    Type.EXITED: EXITED,
    Type.SIGNALLED: SIGNALLED,
    Type.DENIED: DENIED,
    Type.ASKED: ASKED,
    Type.EMPTY: EMPTY,
    Type.FAULT: FAILURE,
    Type.STOPPED: STOPPED,
    Type.ATTACHED: ATTACHED,
}
_BY_NUMBER = {int(type_): (type_, layout) for type_, layout in _FROM_WARDEN.items()}


def _stage_values(stage: Stage) -> tuple[int, int, int, int]:
    """SIGCONT goes after every signal that a stopped process would otherwise keep pending."""
    resume = 0 if stage.signal.name in ("SIGKILL", "SIGSTOP", "SIGCONT") else STAGE_RESUME
    grace_ms = min(round(stage.grace * 1000), 0xFFFFFFFF)
    return stage.signal, SCOPES[stage.scope], resume, grace_ms


_NO_STAGE = (0, 0, 0, 0)


def encode_start(stages: Sequence[Stage]) -> bytes:
    """START: the orphan plan. At most STAGES_MAX stages."""
    values: list[int] = []
    for stage in stages:
        values += _stage_values(stage)
    values += _NO_STAGE * (STAGES_MAX - len(stages))
    return START.pack(VERSION, Type.START, 0, 0, len(stages), *values)


def encode_signal(
    serial: int, stage: Stage, *, resume: bool, foreground: bool = False, ending: bool = False
) -> bytes:
    """SIGNAL: one stage, carried out now. `resume` sends SIGCONT to stopped members, `foreground`
    gives the terminal to the main process's group first, `ending` says that this is a stage of an
    ending and not just a signal."""
    signo, scope, flags, grace_ms = _stage_values(stage)
    if not resume:
        flags = 0
    if foreground:
        flags |= STAGE_FOREGROUND
    if ending:
        flags |= STAGE_ENDING
    return SIGNAL.pack(VERSION, Type.SIGNAL, 0, serial, signo, scope, flags, grace_ms)


def encode_plain(type_: Type, serial: int) -> bytes:
    """LIST, FREEZE, THAW, RELEASE, DETACH, CANCEL: a header and nothing else."""
    return HEADER.pack(VERSION, type_, 0, serial)


def encode_attach(own: bool, serial: int = 0) -> bytes:
    """ATTACH: the first message on a connection to a durable warden; `own` asks for the ownership,
    now or when it becomes free. The answer repeats `serial`."""
    return HEADER.pack(VERSION, Type.ATTACH, ATTACH_OWN if own else 0, serial)


def encode_keep(seconds: float) -> bytes:
    """KEEP: a new lease.

    Args:
        seconds: how long it is; of a strict lease until when, by CLOCK_BOOTTIME.

    Raises:
        ValueError: `seconds` is negative or not a number.
    """
    if not seconds >= 0:
        raise ValueError(f"a lease of {seconds} seconds")
    return KEEP.pack(VERSION, Type.KEEP, 0, 0, min(round(seconds * 1000), 2**64 - 1))


def encode_note(text: bytes) -> bytes:
    """NOTE: what the exit record says when it is the owner who ends the tree.

    Raises:
        ValueError: it has more than NOTE_MAX bytes.
    """
    if len(text) > NOTE_MAX:
        raise ValueError(f"a note of {len(text)} bytes, and {NOTE_MAX} is the most")
    return NOTE.pack(VERSION, Type.NOTE, 0, 0, len(text), text)


def _decode_members(data: bytes) -> Message:
    if len(data) != _MEMBERS_SIZE:
        raise ProtocolError(f"MEMBERS of {len(data)} bytes")
    _, _, flags, serial, count, total = MEMBERS.unpack_from(data)
    if count > MEMBERS_MAX:
        raise ProtocolError(f"MEMBERS with {count} members")
    members = []
    for index in range(count):
        fields = MEMBER.unpack_from(data, MEMBERS.size + index * MEMBER.size)
        pid, ppid, pgrp, session, start, error, tracer, state, comm = fields
        name = comm.split(b"\0", 1)[0].decode("utf-8", "replace")
        members.append(
            RawMember(pid, ppid, pgrp, session, start, error, tracer, state.decode("latin-1"), name)
        )
    return Message(Type.MEMBERS, flags, serial, (count, total), tuple(members))


def decode(data: bytes) -> Message:
    """Reads one message from the warden.

    Raises:
        ProtocolError: another version, an unknown type, a wrong size, or impossible values.
    """
    if len(data) < HEADER.size:
        raise ProtocolError(f"a message of {len(data)} bytes")
    if data[0] != VERSION:
        raise ProtocolError(f"protocol version {data[0]}, not {VERSION}")
    if data[1] == Type.MEMBERS:
        return _decode_members(data)
    try:
        type_, layout = _BY_NUMBER[data[1]]
    except KeyError:
        raise ProtocolError(f"unknown message type {data[1]}") from None
    if len(data) != layout.size:
        raise ProtocolError(f"{type_.name} of {len(data)} bytes, not {layout.size}")
    _, _, flags, serial, *values = layout.unpack(data)
    return Message(type_, flags, serial, tuple(values))
