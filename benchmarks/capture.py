"""capture: bytes a second from a fast writer.

The writer (programs/writer.c) writes blocks of 64 KiB as fast as they are read. The yardstick is a
bare `os.read` loop on a pipe of the default size, which is what a pipe read from Python can do. It
keeps nothing, where ours ends with all of it in one bytes object; so there are shown beside it the
same loop with its blocks joined, `subprocess.run` and processkit, which all keep it too, and ours
with captures that keep less than all: 64 MiB, which is the default limit, and little.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import processkit

import proctree
from benchmarks.native import program
from benchmarks.table import Row, as_much
from benchmarks.timing import Contender, Effort, medians, timed

BLOCK = 64 * 1024
MIB = 1024**2
SIZE = 256 * MIB
QUICK_SIZE = 128 * MIB
LIMITS = (64 * MIB, MIB)
SLOW_PART = 4
"""The part of the bytes that is used beside processkit, for which all would take too long."""

OURS = "proctree"
READ = "os.read loop"
JOIN = "os.read loop, joined"
RUN = "subprocess.run"
PROCESSKIT = "processkit"


def _argv(size: int) -> list[str]:
    return [program("writer"), str(size // BLOCK)]


def _ours(size: int, limit: int) -> Contender:
    def capture() -> None:
        outcome = proctree.run(_argv(size), stdout=proctree.Capture(limit=limit))
        assert outcome.stdout is not None
        assert len(outcome.stdout) == limit

    return timed(capture)


def _read(size: int) -> Contender:
    def read() -> None:
        with subprocess.Popen(_argv(size), stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            fd = process.stdout.fileno()
            total = 0
            while data := os.read(fd, BLOCK):
                total += len(data)
        assert total == size

    return timed(read)


def _join(size: int) -> Contender:
    def read() -> None:
        with subprocess.Popen(_argv(size), stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            fd = process.stdout.fileno()
            blocks = []
            while data := os.read(fd, BLOCK):
                blocks.append(data)
            assert len(b"".join(blocks)) == size

    return timed(read)


def _run(size: int) -> Contender:
    def run() -> None:
        done = subprocess.run(_argv(size), stdout=subprocess.PIPE, check=True)
        assert len(done.stdout) == size

    return timed(run)


def _processkit(size: int) -> Contender:
    def capture() -> None:
        program, *arguments = _argv(size)
        assert len(processkit.Command(program, arguments).output_bytes().stdout) == size

    return timed(capture)


def measure(effort: Effort) -> Iterator[Row]:
    size = QUICK_SIZE if effort.quick else SIZE
    contenders = {
        OURS: _ours(size, size),
        READ: _read(size),
        JOIN: _join(size),
        RUN: _run(size),
    }
    bounded = {f"{OURS}, {limit // MIB} MiB": _ours(size, limit) for limit in LIMITS}
    contenders |= bounded
    rates = {name: size / took for name, took in medians(contenders, effort.rounds(9)).items()}
    what = f"capture of {size // MIB} MiB"
    yield _row(what, rates[OURS], READ, rates[READ], 0.8)
    for peer in (JOIN, RUN):
        yield _row(what, rates[OURS], peer, rates[peer], None)
    for limit, name in zip(LIMITS, bounded, strict=True):
        yield _row(f"the same, {limit // MIB} MiB kept", rates[name], READ, rates[READ], None)

    part = size // SLOW_PART
    contenders = {OURS: _ours(part, part), PROCESSKIT: _processkit(part)}
    rates = {name: part / took for name, took in medians(contenders, effort.rounds(5)).items()}
    yield _row(f"capture of {part // MIB} MiB", rates[OURS], PROCESSKIT, rates[PROCESSKIT], None)


def _row(what: str, ours: float, peer: str, theirs: float, least: float | None) -> Row:
    return as_much(what, ours, peer, theirs, least, _rate)


def _rate(rate: float) -> str:
    return f"{rate / 1e6:.0f} MB/s"
