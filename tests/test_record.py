"""The exit record that the warden writes is the one that recording.py would have written."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from integration import wardens

from helper_sources import SANITIZE, WARDEN
from proctree import protocol
from proctree.durable.recording import Cause, Exit, decode
from proctree.records import Usage

LAYOUT = struct.Struct(f"=iiiii4xqQQQQQQI{protocol.NOTE_MAX}s")

DRIVER = f"""
#include <stdio.h>
#include <string.h>
#include "warden.h"

#pragma pack(1)
struct given {{
    int32_t status, cause, error, step, pid, gap;
    int64_t duration_ms;
    uint64_t numbers[6];
    uint32_t length;
    char text[{protocol.NOTE_MAX}];
}};
#pragma pack()

int main(void)
{{
    struct given g;
    while (fread(&g, 1, sizeof g, stdin) == sizeof g) {{
        struct message_empty empty = {{
            .usage = {{g.numbers[0], g.numbers[1], g.numbers[2]}},
            .memory_peak = g.numbers[3],
            .pids_peak = g.numbers[4],
            .oom_kills = g.numbers[5],
        }};
        struct message_note note = {{.length = g.length}};
        memcpy(note.text, g.text, sizeof g.text);
        struct record record = {{
            .status = g.status,
            .cause = (enum cause)g.cause,
            .failure = {{g.error, g.step}},
            .pid = g.pid,
            .duration_ms = g.duration_ms,
            .empty = &empty,
            .note = &note,
        }};
        char out[RECORD_MAX + 1];
        memset(out, '!', sizeof out);
        const size_t size = record_format(out, &record);
        if (size > RECORD_MAX || out[RECORD_MAX] != '!')
            return 3;
        fwrite(&size, sizeof size, 1, stdout);
        fwrite(out, 1, size, stdout);
    }}
    return 0;
}}
"""

CRC = """
#include <stdio.h>
#include "warden.h"
int main(void)
{
    static char text[65536];
    const size_t size = fread(text, 1, sizeof text, stdin);
    printf("%u", crc32_of(text, size));
    return 0;
}
"""

Write = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def link(compile_c: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory):
    """A program with all of the warden but its main()."""
    folder = tmp_path_factory.mktemp("objects")
    command = ["cc", "-std=gnu99", "-g", *SANITIZE, "-Dmain=warden_main", "-I", str(WARDEN), "-c"]
    subprocess.run([*command, *map(str, wardens.sources())], cwd=folder, check=True)
    return lambda source: compile_c(source, *SANITIZE, *folder.glob("*.o"))


@pytest.fixture(scope="module")
def write(link: Callable[[str], Path]) -> Write:
    program = link(DRIVER)

    def write_(given: list[bytes]) -> list[bytes]:
        done = subprocess.run([program], input=b"".join(given), capture_output=True, check=True)
        assert not done.stderr
        records, at = [], 0
        while at < len(done.stdout):
            (size,) = struct.unpack_from("=Q", done.stdout, at)
            records.append(done.stdout[at + 8 : at + 8 + size])
            at += 8 + size
        return records

    return write_


@pytest.fixture(scope="module")
def checksum(link: Callable[[str], Path]) -> Path:
    return link(CRC)


def packed(how: Exit, note: bytes, milliseconds: int, numbers: list[int]) -> bytes:
    status = -1 if how.status is None else how.status
    fixed = (status, how.cause, how.error, how.step, how.pid, milliseconds)
    return LAYOUT.pack(*fixed, *numbers, len(note), note)


number = st.integers(0, 2**40)
given_exits = st.tuples(
    st.one_of(st.none(), st.integers(0, 0xFFFF)),
    st.sampled_from(Cause),
    st.integers(0, 133),
    st.integers(0, 39),
    st.integers(0, 2**22),
    number,
    st.lists(number, min_size=6, max_size=6),
    st.binary(max_size=protocol.NOTE_MAX),
)


@settings(max_examples=25)
@given(st.lists(given_exits, min_size=1, max_size=40))
@example([(None, Cause.OWNER, 0, 0, 0, 0, [0] * 6, b"")])
@example([(0, Cause.OWNER, 133, 39, 2**22, 2**40, [2**40] * 6, b"\xff" * protocol.NOTE_MAX)])
def test_byte_for_byte_what_python_writes(write, exits) -> None:
    wanted, given = [], []
    for status, cause, error, step, pid, milliseconds, numbers, note in exits:
        user, system, *others = numbers
        kept = note.decode("utf-8", "surrogateescape") if cause is Cause.OWNER else ""
        usage = Usage(user / 1e6, system / 1e6, *others)
        how = Exit(status, cause, kept, error, step, pid, milliseconds / 1000, usage)
        wanted.append(how)
        given.append(packed(how, note, milliseconds, numbers))
    written = write(given)
    assert [Exit.decode(record) for record in written] == wanted
    assert written == [how.encode() for how in wanted]


def test_the_largest_record_has_room(write) -> None:
    """Numbers larger than a kernel says; they are cut and not made into others."""
    how = Exit(2**31 - 1, Cause.OWNER, "", 2**31 - 1, 2**31 - 1, 2**31 - 1)
    note = b"\xff" * protocol.NOTE_MAX
    (record,) = write([packed(how, note, 2**63 - 1, [2**64 - 1] * 6)])
    fields = decode("exit", record)
    assert fields["max_rss"] == fields["oom_kills"] == str(2**63 - 1)
    assert fields["note"] == note.hex()
    assert len(record) < 1024


@pytest.mark.parametrize("text", [b"", b"123456789", bytes(range(256)) * 200, b"\0" * 7, b"\xff"])
def test_the_checksum_is_that_of_zlib(checksum, text) -> None:
    done = subprocess.run([checksum], input=text, capture_output=True, check=True)
    assert int(done.stdout) == zlib.crc32(text)
