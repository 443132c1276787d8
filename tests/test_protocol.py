"""protocol.py and protocol.h are one language: the compiler says what the header means."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helper_sources import WARDEN
from proctree import policy, protocol
from proctree.durable import recording
from proctree.policy import KillPolicy, Scope, Stage
from proctree.protocol import MEMBERS_MAX, ProtocolError, Type, decode

HEADER_H = WARDEN / "protocol.h"

HEADER = [f"header.{name}" for name in ("version", "type", "flags", "serial")]
STAGE = ["signo", "scope", "flags", "grace_ms"]
STAGES = [f"stages[{index}].{name}" for index in range(protocol.STAGES_MAX) for name in STAGE]
USAGE = [f"usage.{name}" for name in ("user_us", "system_us", "max_rss")]

LAYOUTS: dict[str, tuple[struct.Struct, list[str]]] = {
    "message_header": (protocol.HEADER, ["version", "type", "flags", "serial"]),
    "message_stage": (protocol.STAGE, STAGE),
    "message_start": (protocol.START, [*HEADER, "stage_count", *STAGES]),
    "message_signal": (protocol.SIGNAL, [*HEADER, *(f"stage.{name}" for name in STAGE)]),
    "message_keep": (protocol.KEEP, [*HEADER, "lease_ms"]),
    "message_note": (protocol.NOTE, [*HEADER, "length", "text"]),
    "message_started": (protocol.STARTED, [*HEADER, "pid", "reserved", "start_time"]),
    "message_failure": (protocol.FAILURE, [*HEADER, "error", "step"]),
    "message_exited": (protocol.EXITED, [*HEADER, "status", "leftovers", *USAGE]),
    "message_member": (
        protocol.MEMBER,
        ["pid", "ppid", "pgrp", "session", "start_time", "error", "tracer", "state", "comm"],
    ),
    "message_signalled": (protocol.SIGNALLED, [*HEADER, "count", "denied"]),
    "message_denied": (protocol.DENIED, [*HEADER, "pid", "error"]),
    "message_asked": (protocol.ASKED, [*HEADER, "signo", "pid", "uid"]),
    "message_empty": (
        protocol.EMPTY,
        [*HEADER, "reaped", *USAGE, "memory_peak", "pids_peak", "oom_kills"],
    ),
    "message_stopped": (protocol.STOPPED, [*HEADER, "signo"]),
    "message_attached": (protocol.ATTACHED, [*HEADER, "owner", "ending"]),
}

NUMBERS = [
    "PROTOCOL_VERSION",
    "PROTOCOL_STAGES_MAX",
    "PROTOCOL_MEMBERS_MAX",
    "STAGE_RESUME",
    "STAGE_FOREGROUND",
    "STAGE_ENDING",
    "MEMBERS_MORE",
    "ATTACH_OWN",
    "ATTACHED_OWNER",
    "ATTACHED_ENDS",
    "PROTOCOL_NOTE_MAX",
    "sizeof(struct message_members)",
    "offsetof(struct message_members, count)",
    "offsetof(struct message_members, total)",
    "offsetof(struct message_members, members)",
]


def enumerators() -> list[str]:
    """Every name in the header's enums; what they are worth is for the compiler to say."""
    return re.findall(r"\b((?:MESSAGE|SCOPE|STEP|CAUSE)_\w+) = ", HEADER_H.read_text())


def describe_field(name: str, field: str) -> str:
    where = f"((struct {name} *)0)->{field}"
    # An array has no sign, and none is asked of characters.
    sign = f"((__typeof__({where}))-1 < 0)" if field not in ("state", "comm", "text") else "-1"
    return (
        f'printf("%s[%zu, %zu, %d]", first++ ? ", " : "", offsetof(struct {name}, {field}), '
        f"sizeof({where}), {sign});"
    )


def program() -> str:
    lines = [
        "#include <stddef.h>",
        "#include <stdio.h>",
        '#include "protocol.h"',
        'int main(void) { int first; printf("{");',
    ]
    for name, (_, fields) in LAYOUTS.items():
        lines.append(f'first = 0; printf("\\"{name}\\": [%zu, [", sizeof(struct {name}));')
        lines += [describe_field(name, field) for field in fields]
        lines.append('printf("]],\\n");')
    for text in [*NUMBERS, *enumerators()]:
        lines.append(f'printf("\\"{text}\\": %ld,\\n", (long)({text}));')
    lines.append('printf("\\"end\\": 0}"); return 0; }')
    return "\n".join(lines)


@pytest.fixture(scope="module")
def c(compile_c) -> dict[str, Any]:
    """What the compiler makes of the header."""
    measure = compile_c(program(), "-Wno-type-limits")  # comparing with 0 is how it is asked
    done = subprocess.run([measure], capture_output=True, check=True)
    return json.loads(done.stdout)


def python_fields(layout: struct.Struct) -> Iterator[list[int]]:
    """[offset, size, signed] of each value; -1 for what has no sign."""
    offset = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        size = struct.calcsize(f"={count}{code}")
        if code == "s":
            yield [offset, size, -1]
        elif code != "x":
            for _ in range(int(count or 1)):
                yield [offset, struct.calcsize(f"={code}"), int(code.islower())]
                offset += struct.calcsize(f"={code}")
            continue
        offset += size


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(c, name):
    layout, _ = LAYOUTS[name]
    size, fields = c[name]
    assert layout.size == size
    assert list(python_fields(layout)) == fields


def test_layout_of_members(c):
    assert c["offsetof(struct message_members, members)"] == protocol.MEMBERS.size
    assert list(python_fields(protocol.MEMBERS))[-2:] == [
        [c["offsetof(struct message_members, count)"], 4, 0],
        [c["offsetof(struct message_members, total)"], 4, 0],
    ]
    whole = protocol.MEMBERS.size + MEMBERS_MAX * protocol.MEMBER.size
    assert c["sizeof(struct message_members)"] == whole


def test_no_message_fills_the_buffer(c):
    sizes = [value[0] for name, value in c.items() if name in LAYOUTS]
    assert max(*sizes, c["sizeof(struct message_members)"]) < protocol.MAX_MESSAGE


def test_types(c):
    values = {name[len("MESSAGE_") :]: c[name] for name in c if name.startswith("MESSAGE_")}
    assert {type_.name: type_.value for type_ in Type} == values


def test_scopes(c):
    values = {name[len("SCOPE_") :].lower(): c[name] for name in c if name.startswith("SCOPE_")}
    assert {str(scope): number for scope, number in protocol.SCOPES.items()} == values


def test_steps(c):
    values = {c[name]: name[len("STEP_") :].lower() for name in c if name.startswith("STEP_")}
    assert values == protocol.STEPS


def test_causes(c):
    values = {name[len("CAUSE_") :]: c[name] for name in c if name.startswith("CAUSE_")}
    assert {cause.name: cause.value for cause in recording.Cause} == values


def test_limits(c):
    assert c["PROTOCOL_VERSION"] == protocol.VERSION
    assert c["PROTOCOL_STAGES_MAX"] == protocol.STAGES_MAX == policy.MAX_STAGES
    assert c["PROTOCOL_MEMBERS_MAX"] == MEMBERS_MAX
    assert c["STAGE_RESUME"] == protocol.STAGE_RESUME
    assert c["STAGE_FOREGROUND"] == protocol.STAGE_FOREGROUND
    assert c["STAGE_ENDING"] == protocol.STAGE_ENDING
    assert c["MEMBERS_MORE"] == protocol.MEMBERS_MORE
    assert c["ATTACH_OWN"] == protocol.ATTACH_OWN
    assert c["ATTACHED_OWNER"] == protocol.ATTACHED_OWNER
    assert c["ATTACHED_ENDS"] == protocol.ATTACHED_ENDS
    assert c["PROTOCOL_NOTE_MAX"] == protocol.NOTE_MAX


READ_PLAN = """
#include <stdio.h>
#include "protocol.h"
int main(void)
{
    struct message_start start;
    if (fread(&start, 1, sizeof start, stdin) != sizeof start)
        return 1;
    printf("[%d, %d, [", start.header.version, start.header.type);
    for (uint32_t i = 0; i < start.stage_count; i++)
        printf("%s[%d, %d, %d, %u]", i ? ", " : "", start.stages[i].signo, start.stages[i].scope,
               start.stages[i].flags, start.stages[i].grace_ms);
    printf("]]");
    return 0;
}
"""


def test_c_reads_the_plan_that_python_wrote(compile_c):
    plan = KillPolicy(
        [
            Stage(signal.SIGINT, 0.0, "main"),
            Stage(signal.SIGSTOP, 0.25, "group"),
            Stage(signal.SIGTERM, 1e12, "tree"),
        ]
    )
    reader = compile_c(READ_PLAN)
    data = protocol.encode_start(plan.stages)
    done = subprocess.run([reader], input=data, capture_output=True, check=True)
    assert json.loads(done.stdout) == [
        protocol.VERSION,
        Type.START,
        [
            [signal.SIGINT, 1, protocol.STAGE_RESUME, 0],
            [signal.SIGSTOP, 2, 0, 250],
            [signal.SIGTERM, 3, protocol.STAGE_RESUME, 0xFFFFFFFF],
            [signal.SIGKILL, 3, 0, 5000],
        ],
    ]


# -- decoding

FROM_WARDEN = {
    Type.STARTED: protocol.STARTED,
    Type.EXEC_FAILED: protocol.FAILURE,
    Type.EXITED: protocol.EXITED,
    Type.SIGNALLED: protocol.SIGNALLED,
    Type.DENIED: protocol.DENIED,
    Type.ASKED: protocol.ASKED,
    Type.EMPTY: protocol.EMPTY,
    Type.FAULT: protocol.FAILURE,
    Type.STOPPED: protocol.STOPPED,
    Type.ATTACHED: protocol.ATTACHED,
}
MEMBERS_SIZE = protocol.MEMBERS.size + MEMBERS_MAX * protocol.MEMBER.size
SIZES = sorted({layout.size for layout in FROM_WARDEN.values()} | {MEMBERS_SIZE})


def decodes(data: bytes) -> bool:
    """Whether it decodes; what is raised but ProtocolError fails the test."""
    try:
        message = decode(data)
    except ProtocolError:
        return False
    assert message.type == data[1]
    assert len(message.members) <= MEMBERS_MAX
    return True


@given(st.binary(max_size=200))
@example(b"")
def test_garbage_decodes_or_is_refused(data):
    decodes(data)


@given(st.sampled_from(list(Type)), st.sampled_from(SIZES), st.binary(min_size=16, max_size=16))
def test_garbage_behind_a_good_header(type_, size, noise):
    data = (bytes([protocol.VERSION, type_]) + noise * (size // 16 + 1))[:size]
    right = FROM_WARDEN.get(type_)
    if right is not None:
        assert decodes(data) == (size == right.size)
    elif type_ is Type.MEMBERS and size == MEMBERS_SIZE:
        (count,) = struct.unpack_from("=I", data, protocol.HEADER.size)
        assert decodes(data) == (count <= MEMBERS_MAX)
    else:
        assert not decodes(data)


@pytest.mark.parametrize("type_", FROM_WARDEN)
def test_every_other_size_is_refused(type_):
    right = FROM_WARDEN[type_].size
    message = bytes([protocol.VERSION, type_]).ljust(2 * right, b"\1")
    assert [size for size in range(2 * right) if decodes(message[:size])] == [right]


@pytest.mark.parametrize("size", [MEMBERS_SIZE - 1, MEMBERS_SIZE + 1, protocol.MEMBERS.size])
def test_members_of_another_size_are_refused(size):
    with pytest.raises(ProtocolError, match=f"MEMBERS of {size} bytes"):
        decode(bytes([protocol.VERSION, Type.MEMBERS]).ljust(size, b"\0"))


def test_more_members_than_fit_are_refused():
    head = protocol.MEMBERS.pack(protocol.VERSION, Type.MEMBERS, 0, 1, MEMBERS_MAX + 1, 0)
    with pytest.raises(ProtocolError, match="65 members"):
        decode(head.ljust(MEMBERS_SIZE, b"\0"))


@pytest.mark.parametrize("version", [0, protocol.VERSION + 1, 255])
def test_another_version_is_refused(version):
    data = protocol.FAILURE.pack(version, Type.FAULT, 0, 0, 1, 1)
    with pytest.raises(ProtocolError, match=f"protocol version {version}"):
        decode(data)


@pytest.mark.parametrize("number", [0, Type.START, Type.NOTE, 12, 63, 75, 255])
def test_a_type_that_no_warden_sends_is_refused(number):
    with pytest.raises(ProtocolError, match=f"unknown message type {number}"):
        decode(bytes([protocol.VERSION, number]).ljust(16, b"\0"))


@pytest.mark.parametrize("type_", FROM_WARDEN)
@given(st.data())
def test_round_trip(type_, data):
    layout = FROM_WARDEN[type_]
    _, _, *sizes = python_fields(layout)
    flags, serial, *values = (
        data.draw(
            st.integers(-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1)
            if signed
            else st.integers(0, (1 << 8 * size) - 1)
        )
        for _, size, signed in sizes
    )
    message = decode(layout.pack(protocol.VERSION, type_, flags, serial, *values))
    assert message == (type_, flags, serial, tuple(values), ())


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**22),
            st.integers(0, 2**64 - 1),
            st.sampled_from("RSDZTtXx"),
            st.text(max_size=15).filter(lambda name: "\0" not in name),
        ),
        max_size=MEMBERS_MAX,
    )
)
def test_round_trip_of_members(members):
    data = protocol.MEMBERS.pack(
        protocol.VERSION, Type.MEMBERS, protocol.MEMBERS_MORE, 9, len(members), 1000
    )
    for pid, start, state, name in members:
        comm = name.encode()[:15]  # as the kernel cuts it, perhaps in the middle of a character
        data += protocol.MEMBER.pack(pid, 1, 2, 3, start, 4, 5, state.encode(), comm)
    message = decode(data.ljust(MEMBERS_SIZE, b"\xff"))
    assert message[:4] == (
        Type.MEMBERS,
        protocol.MEMBERS_MORE,
        9,
        (len(members), 1000),
    )
    assert [(m.pid, m.start_time, m.state) for m in message.members] == [m[:3] for m in members]
    assert [m.name for m in message.members] == [
        m[3].encode()[:15].decode("utf-8", "replace") for m in members
    ]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("scope", Scope)
def test_signal_is_encoded(scope, resume):
    data = protocol.encode_signal(7, Stage(signal.SIGHUP, 1.5, scope), resume=resume)
    assert protocol.SIGNAL.unpack(data) == (
        *(protocol.VERSION, Type.SIGNAL, 0, 7),
        *(signal.SIGHUP, protocol.SCOPES[scope], int(resume), 1500),
    )


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT])
def test_what_a_stopped_process_sees_anyway_is_not_followed_by_sigcont(signo):
    data = protocol.encode_signal(7, Stage(signo), resume=True)
    assert protocol.SIGNAL.unpack(data)[6] == 0


def test_the_longest_plan_fits():
    plan = KillPolicy([Stage(signal.SIGTERM, 1.0)] * (protocol.STAGES_MAX - 1))
    data = protocol.encode_start(plan.stages)
    assert len(data) == protocol.START.size
    assert protocol.START.unpack(data)[4] == protocol.STAGES_MAX


@pytest.mark.parametrize(
    "type_",
    [Type.LIST, Type.FREEZE, Type.THAW, Type.RELEASE, Type.DETACH, Type.CANCEL],
)
def test_plain_messages_are_a_header(type_):
    assert protocol.HEADER.unpack(protocol.encode_plain(type_, 3)) == (1, type_, 0, 3)


@pytest.mark.parametrize("own", [False, True])
def test_attach_is_encoded(own):
    data = protocol.encode_attach(own, 9)
    assert protocol.HEADER.unpack(data) == (1, Type.ATTACH, int(own), 9)


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(0, 0), (1.5, 1500), (0.0004, 0), (2**32, 2**32 * 1000), (1e30, 2**64 - 1)],
)
def test_keep_is_encoded(seconds, wanted):
    assert protocol.KEEP.unpack(protocol.encode_keep(seconds)) == (1, Type.KEEP, 0, 0, wanted)


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan")])
def test_a_lease_that_is_none(seconds):
    with pytest.raises(ValueError, match=f"a lease of {seconds} seconds"):
        protocol.encode_keep(seconds)


READ_NOTE = """
#include <stdio.h>
#include "protocol.h"
int main(void)
{
    struct message_note note;
    if (fread(&note, 1, sizeof note, stdin) != sizeof note || note.header.type != MESSAGE_NOTE)
        return 1;
    return fwrite(note.text, 1, note.length, stdout) != note.length;
}
"""


def test_c_reads_the_note_that_python_wrote(compile_c):
    reader = compile_c(READ_NOTE)
    for text in (b"", b"timeout\0after 3 s", bytes(range(256))[: protocol.NOTE_MAX]):
        data = protocol.encode_note(text)
        done = subprocess.run([reader], input=data, capture_output=True, check=True)
        assert done.stdout == text


def test_a_note_that_does_not_fit():
    with pytest.raises(ValueError, match="a note of 237 bytes, and 236 is the most"):
        protocol.encode_note(b"x" * 237)


def test_a_stage_of_an_ending_is_encoded():
    data = protocol.encode_signal(7, Stage(signal.SIGKILL), resume=True, ending=True)
    assert protocol.SIGNAL.unpack(data)[6] == protocol.STAGE_ENDING
