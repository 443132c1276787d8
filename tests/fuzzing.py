"""The fuzz targets in tests/fuzz: how they are built and what they begin with.

``python tests/fuzzing.py [--seconds N] [TARGET...]`` runs them for longer than the tests do, and
keeps in build/fuzz what it has learnt, so that the next run goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helper_sources import SANITIZE, WARDEN

HERE = Path(__file__).resolve().parent
FUZZ = HERE / "fuzz"
KEPT = HERE.parent / "build" / "fuzz"

PURE = ("options.c", "proc.c", "request.c", "system.c")
"""What the targets are linked to; children.c includes the file that it is about."""

FLAGS = ["-std=gnu99", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]


# -- Seeds: what is real, and what is nasty.

TYPES = {"START": 1, "SIGNAL": 2, "LIST": 3, "FREEZE": 4, "THAW": 5, "RELEASE": 6}


def header(kind: int, version: int = 1, flags: int = 0, serial: int = 1) -> bytes:
    return struct.pack("=BBHI", version, kind, flags, serial)


def stage(signo: int, scope: int, flags: int = 0, grace_ms: int = 1000) -> bytes:
    return struct.pack("=iHHI", signo, scope, flags, grace_ms)


def start(count: int, *stages: bytes) -> bytes:
    body = b"".join(stages)
    return header(TYPES["START"]) + struct.pack("=I", count) + body.ljust(8 * 12, b"\0")


STAT = (
    b"25365 (cat) R 25363 25363 23461 0 -1 4194560 140 0 0 0 0 0 0 0 20 0 1 0 1551505 3133440 380 "
    b"18446744073709551615 93900125118464 93900125138345 140734060806432 0 0 0 0 0 0 0 0 0 17 1 0 "
    b"0 0 0 0 93900125154352 93900125155968 93901104447488 140734060808705 140734060808753 "
    b"140734060808753 140734060810219 0\n"
)
KTHREADD = (
    b"2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 2 0 0 20 0 1 0 24 0 0 18446744073709551615 0 0 0 "
    b"0 0 0 0 2147483647 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
)


def named(name: bytes) -> bytes:
    return STAT.replace(b"(cat)", b"(" + name + b")")


STATS = [
    STAT,
    KTHREADD,
    *(named(name) for name in (b"a b", b") S 1 2 3", b"((((", b"))))", b"\n) (\n", b"", b"x" * 64)),
    named(b"\xff\x80\x01"),
    STAT[: STAT.index(b")") + 1],
    STAT[: STAT.index(b")") + 2],
    STAT[:150],
    STAT[:-1],
    STAT.replace(b"25363", b"-1"),
    STAT.replace(b"1551505", b"18446744073709551616"),
    STAT.replace(b"25365", b"99999999999999999999999"),
    STAT.replace(b" ", b"  "),
    STAT.replace(b" ", b"\t"),
    STAT.replace(b" R ", b" R"),
    b")(",
    b"1 (",
    b"",
]


def children(text: bytes, sizes: bytes = b"", fails_at: int = 0) -> bytes:
    assert len(sizes) < 256
    return bytes([fails_at, len(sizes)]) + sizes + text


HUNDREDS = b"".join(b"%d " % pid for pid in range(4_193_300, 4_194_304))
CHILDREN = [
    children(b"1 22 333 4444 "),
    children(b"1 22 333 4444"),
    children(b"12 345 6789 ", bytes([0])),
    children(b"12 345 6789 ", bytes([0, 1, 2, 5])),
    children(HUNDREDS),
    children(HUNDREDS, bytes([255, 7, 100])),
    children(HUNDREDS, bytes([255]), fails_at=9),
    children(b"1 " * 3000),
    children(b"7" * 5000),
    children(b" " * 5000 + b"8 "),
    children(b"0 5 4194303 4194304 4194305 -7 6 "),
    children(b"18446744073709551615 18446744073709551617 -18446744073709551615 3 "),
    children(b"1 2x 3 "),
    children(b"-", bytes([0])),
    children(b""),
    children(b"1 2 3 ", fails_at=1),
]

REQUESTS = [
    *(header(kind) for kind in TYPES.values()),
    *(header(kind)[:-1] for kind in TYPES.values()),
    *(header(kind) + b"\0" for kind in TYPES.values()),
    *(header(kind) for kind in (0, 7, 8, 63, 64, 255)),
    *(header(3, version=version) for version in (0, 2, 255)),
    header(3, flags=0xFFFF, serial=0xFFFFFFFF),
    *(header(2) + stage(signo, 3) for signo in (0, 9, 15, 64, 65, -1, 2**31 - 1, -(2**31))),
    *(header(2) + stage(15, scope) for scope in (0, 1, 2, 3, 4, 0xFFFF)),
    start(1, stage(15, 3)),
    start(2, stage(15, 3, flags=3), stage(9, 3, grace_ms=2**32 - 1)),
    start(8, *[stage(64, 2)] * 8),
    start(8, *[stage(15, 3)] * 7),
    start(0),
    start(9, *[stage(15, 3)] * 8),
    start(2**32 - 1, *[stage(15, 3)] * 8),
    start(1, stage(65, 3)),
    b"x" * 200,
]


def argv(*arguments: bytes) -> bytes:
    return b"".join(argument + b"\0" for argument in (b"w", *arguments))


LEAST = (b"control=3", b"supervisor=1")
OPTIONS = [
    argv(*LEAST, b"--", b"true"),
    argv(*LEAST, b"adopt=7"),
    argv(b"control=3", b"beinit=1"),
    argv(*LEAST, b"cwd=/a=b", b"pass=3,4", b"scan=1", b"--", b"sh", b"-c", b"--"),
    argv(*LEAST, b"cgroup=/c", b"limit=memory.max,1", b"limit=pids.max,2", b"--", b"true"),
    argv(*LEAST, b"pidns=1", b"init=9", b"initpid=77", b"entry=/e", b"record=r\nr", b"--", b"a"),
    argv(*LEAST, b"umask=18", b"nice=-5", b"ionice=16388", b"oom=-1000", b"--", b"true"),
    argv(*LEAST, b"uid=4294967294", b"gid=0", b"groups=", b"affinity=0,2", b"--", b"true"),
    argv(*LEAST, b"nonewprivs=1", b"keepsession=1", b"terminal=1", b"proc=5", b"--", b"true"),
    argv(*LEAST, *[b"limit=1,2"] * 5, b"--", b"true"),
    argv(*LEAST, *[b"rlimit=7,1,2"] * 17, b"--", b"true"),
    argv(b"control=4294967299", b"supervisor=1", b"--", b"true"),
    argv(b"control=3", b"supervisor=4294967297", b"--", b"true"),
    argv(*LEAST, b"nice=9223372036854775808", b"--", b"true"),
    argv(*LEAST, b"scan=0", b"--", b"true"),
    argv(b"=3", *LEAST, b"--", b"true"),
    argv(*LEAST, b"--"),
    argv(*LEAST),
    argv(),
    b"",
]

TEXTS = [
    b"18446744073709551615",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1,22,333",
    b"5,18446744073709551616,-1",
    b"1,,2",
    b",1",
    b"1;2",
    b"  7 8",
    b"Name:\tcat\nUmask:\t0022\nState:\tt\nTgid:\t7\nTracerPid:\t4711\nUid:\t0\t0\t0\t0\n",
    b"Name:\tTracerPid:\t4711\nTracerPid:\t0\n",
    b"\nTracerPid:\t",
    b"\nTracerPid:\t\nTracerPid:\t5\n",
    b"\nTracerPid:",
]

SEEDS: dict[str, list[bytes]] = {
    "children": CHILDREN,
    "options": OPTIONS,
    "request": REQUESTS,
    "stat": STATS,
    "texts": TEXTS,
}

ASK = b"\x92\x01\x82\xa4type\xa3Ask\xa3key\xa4name"
THREAD = b"\x92\x02\x82\xa4type\xa6thread\xa3key\xa4name"
TASK = b"\x92\x03\x81\xa4type\xa4task"
ANSWER = b"\x93\x05\x81\xa4name\xa5value\xc0"
FAILED = b"\x93\x05\xc0\x82\xa4type\xa5Error\xa6detail\x81\xa3key\xcb?\xf8\0\0\0\0\0\0"
NESTED = b"\x92\xcd\x01\x00\x83\xa4type\xa3Ask\xa3key\xa0\xa4more\x81\xa1a\xd1\xff\x00"
GARBLED = b"\x92\x04\x82\xa4type\xa3Ask\xa3key\xa4n\xffme"
"""No UTF-8."""
LIARS = [b"\xdd\xff\xff\xff\xff\x09", b"\x91" * 500, b""]
BODIES = [ASK, THREAD, TASK, ANSWER, FAILED, NESTED, GARBLED, *LIARS]


def framed(body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(body) if length is None else length) + body


STREAM = b"".join(map(framed, BODIES))
HUGE = framed(b"\x92\xcd\x12\x34" + b"\xc0" * 40, 2**32 - 1)
OVER = framed(b"\x92\x07" + b"\xc0" * 5000) + framed(ASK)

TOLD = (
    b"READY=1\nSTATUS=up \xc3\xa4\x1b[m\nMAINPID=4711\nWATCHDOG=1\nWATCHDOG_USEC=2500000\n"
    b"EXTEND_TIMEOUT_USEC=9\nERRNO=ENOENT\nEXIT_STATUS=7\nBUSERROR=a.b\nMONOTONIC_USEC=5"
)

PYTHON_SEEDS = {
    "channel_frames": [
        *(bytes([step]) + STREAM for step in (0, 1, 6, 255)),
        *(b"\xff" + body for body in BODIES),
        *(b"\x20" + data for data in (HUGE, OVER[:700])),
    ],
    "channel_served": [
        *(bytes([how, 1]) + STREAM for how in range(16)),
        *(b"\4\xff" + framed(body) for body in BODIES),
        *(bytes([how, 3]) + data for how in (0, 4, 7) for data in (HUGE, OVER)),
        *(b"\xf0\0" + nonce for nonce in (b"", b"n" * 16, b"n" * 17, b"n" * 3000)),
    ],
    "notification": [
        TOLD,
        TOLD.replace(b"\n", b"\r\n") + b"\0",
        *TOLD.split(b"\n"),
        *(b"STOPPING=1\nREADY=1", b"RELOADING=1", b"BARRIER=1", b"WATCHDOG=trigger", b"FDSTORE=1"),
        *(b"MAINPID=0", b"ERRNO=4096", b"WATCHDOG_USEC=18446744073709551615", b"STATUS=\xff\x85"),
        b"STATUS=" + b"x" * 4089,
        b"BARRIER=1\nX=1",
        b"",
    ],
}
"""Of the targets in Python, which atheris runs."""

SEEDS |= PYTHON_SEEDS

LARGEST = {
    "channel_frames": 1200,
    "channel_served": 6000,
    "children": 9000,
    "notification": 4200,
    "options": 1500,
    "request": 200,
    "stat": 600,
    "texts": 200,
}
"""Bytes of an input. A list of children has to be longer than one read of it."""


def write_seeds(target: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, seed in enumerate(SEEDS[target]):
        paths.append(folder / f"seed-{number:02}")
        paths[-1].write_bytes(seed)
    return paths


# -- Building and running.


def atheris() -> str:
    """Why there is none, or nothing."""
    found = importlib.util.find_spec("atheris")
    return "" if found is not None else "there is no atheris"


def unavailable(target: str) -> str:
    """Why the target cannot be run, or nothing."""
    return atheris() if target in PYTHON_SEEDS else libfuzzer()


@functools.cache
def libfuzzer() -> str:
    """Why there is none, or nothing."""
    if shutil.which("clang") is None:
        return "there is no clang"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "target.c"
        source.write_text(
            "#include <stddef.h>\n#include <stdint.h>\n"
            "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);\n"
            "int LLVMFuzzerTestOneInput(const uint8_t *d, size_t s) { (void)d, (void)s; return 0; }"
        )
        command = ["clang", "-fsanitize=fuzzer,address,undefined", source, "-o", f"{folder}/target"]
        made = subprocess.run(command, capture_output=True, check=False)
    return "" if made.returncode == 0 else "this clang has no libFuzzer"


def build(target: str, program: Path, *, fuzzer: bool, warden: Path = WARDEN) -> None:
    """With libFuzzer, or with what runs given inputs only. One in Python is what it is."""
    if target in PYTHON_SEEDS:
        return
    if fuzzer:
        command = ["clang", *FLAGS, "-fsanitize=fuzzer", *SANITIZE]
    else:
        command = ["cc", *FLAGS, *SANITIZE, str(FUZZ / "replay.c")]
    command += ["-I", str(warden), "-iquote", str(FUZZ), str(FUZZ / f"{target}.c")]
    command += [str(warden / name) for name in PURE]
    made = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"{target} cannot be built:\n{made.stderr}")


def command(target: str, program: Path, corpus: Path, artifacts: Path, *how: str) -> list[str]:
    """An input that takes a minute is one that hangs: a failure like any other."""
    run = [str(program)]
    if target in PYTHON_SEEDS:
        run = [sys.executable, str(FUZZ / f"{target}.py")]
    return [
        *(*run, str(corpus), f"-artifact_prefix={artifacts}/{target}-"),
        *(f"-max_len={LARGEST[target]}", "-timeout=60", "-rss_limit_mb=1000", *how),
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fuzzing.py", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(SEEDS))
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.targets) - set(SEEDS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    for target in chosen.targets or SEEDS:
        if reason := unavailable(target):
            parser.error(f"{target}: {reason}")
        corpus = KEPT / "corpus" / target
        write_seeds(target, corpus)
        program = KEPT / target
        build(target, program, fuzzer=True)
        how = f"-max_total_time={chosen.seconds}"
        done = subprocess.run(command(target, program, corpus, KEPT, how), check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
