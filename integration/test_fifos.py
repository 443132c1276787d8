"""FIFOs as standard streams: a tree waits for who has the other end, and nobody else does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, eventually, in_thread
from proctree import CAPTURE, Reason, durable

Run = Callable[..., Any]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture(params=["run", "durable"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    if request.param == "run":
        return lambda command, **options: proctree.run(command, stdout=CAPTURE, **options)
    where = tmp_path / "store"
    return lambda command, **options: durable.run(
        str(command), command, logs=CAPTURE, store=where, **options
    )


def nobody_reads(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def is_being_opened() -> bool:
    """By whichever thread: then that is what its innermost frame is busy with."""
    frames = sys._current_frames().values()
    return any(frame.f_code.co_name in ("_open", "open_file") for frame in frames)


def test_a_tree_waits_for_its_writer_and_others_do_not_wait_for_it(run: Run, fifo: Path) -> None:
    done = in_thread(lambda: run(["cat"], stdin=fifo))
    eventually(is_being_opened, "the FIFO is waited for")
    assert run(["echo", "another"]).stdout == b"another\n"
    writer = os.open(fifo, os.O_WRONLY)
    # The other end is open, and that is what a FIFO waits for: not for something to read.
    os.write(writer, b"one\n")
    assert run(["echo", "third"]).stdout == b"third\n"
    os.write(writer, b"two\n")
    os.close(writer)
    assert done.get(timeout=DEADLINE).stdout == b"one\ntwo\n"


def test_a_writer_that_says_nothing_starts_it_all_the_same(fifo: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    done = in_thread(lambda: proctree.run(["sh", "-c", f"touch {there}; cat"], stdin=fifo))
    writer = os.open(fifo, os.O_WRONLY)
    eventually(there.exists, "the tree runs")
    os.close(writer)
    assert done.get(timeout=DEADLINE).ok


def test_a_function_waits_too(fifo: Path) -> None:
    def copy() -> None:
        os.write(1, os.read(0, 100))

    done = in_thread(lambda: proctree.run(copy, stdin=fifo, stdout=CAPTURE))
    fifo.write_text("read")
    assert done.get(timeout=DEADLINE).stdout == b"read"


def test_output_waits_for_its_reader(fifo: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    os.mkfifo(second)
    command = ["sh", "-c", "echo out; echo err >&2"]
    done = in_thread(lambda: proctree.run(command, stdout=fifo, stderr=second))
    err = in_thread(second.read_text)
    assert fifo.read_text() == "out\n"
    assert err.get(timeout=DEADLINE) == "err\n"
    assert done.get(timeout=DEADLINE).ok


def test_nobody_waits_longer_than_the_tree_is_wanted(fifo: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    outcome = proctree.run(["cat"], stdin=fifo, timeout=0.1)
    assert (outcome.reason, outcome.pid) == (Reason.TIMEOUT, None)
    eventually(lambda: nobody_reads(fifo), "the FIFO is let go of")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "nothing of it is open")


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from proctree import durable

store = durable.FileStore(sys.argv[1] + ".store")

def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and not frame.f_code.co_filename.endswith("latch.py"):
        frame = frame.f_back
    return frame is not None and store.attempts("key")

def interrupt():
    while not waits():
        pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    durable.run("key", ["cat"], stdin=Path(sys.argv[1]), interrupted=sys.argv[2], store=store)
except KeyboardInterrupt:
    os.write(1, f"interrupted {store.claimed('key')}".encode())
"""


@pytest.mark.parametrize("interrupted", ["kill", "detach"])
def test_who_waits_can_be_interrupted(fifo: Path, interrupted: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(fifo), interrupted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "interrupted False", done.stderr
