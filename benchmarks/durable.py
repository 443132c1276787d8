"""durable: what it costs that a run outlives its supervisor, and how fast it is found again.

Beside a durable start is the plain one of the same containment, in turns, with the records on the
disk of the temporary directory (TMPDIR). A start behind the end of another run finds the disk busy
with that one's record, and the turn of the plain one gives it the time for that.

Its peers are what people use to have a command outlive them: a session of its own with its output
in a file and its number in another one, and tmux, whose server runs already. Neither notices that
the command runs already, keeps its exit status, or ends what it has started.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import proctree
from benchmarks.native import program
from benchmarks.table import Row, milliseconds, skipped, times_as_long
from benchmarks.timing import Contender, Effort, medians, timed
from proctree import DEVNULL, KillPolicy, Lines, WatchedSubprocess, durable
from proctree.containment import choose

START_LIMIT = 3.0
"""How many times as long as a plain start of the same containment a durable one may take."""
RECONNECT_LIMIT = 0.05

LINE = b"x" * 79 + b"\n"
UNREAD = 10_000_000
"""Bytes of output that nobody has read."""
_WRITES = f"yes {'x' * 79} | head -c {UNREAD}; exec sleep 600"

RUNS = 500
DESCRIPTORS = 16 * RUNS
MEMORY = 30_000
EACH = 5
CPU = 0.01
DEADLINE = 300.0

_PROGRAM = Path(__file__).parent / "programs" / "many_durable.py"

_numbers = itertools.count()


def _fresh() -> str:
    return f"run-{next(_numbers)}"


def measure(effort: Effort) -> Iterator[Row]:
    # By default in the same place as every temporary file; a memory file system costs no fsync.
    with tempfile.TemporaryDirectory(prefix="proctree-durable-") as folder:
        store = os.path.join(folder, "store")
        yield from _starts(store, folder, effort)
        yield from _reconnects(store, effort)
        yield _results(store, effort)
    yield from _many(effort)


# -- start


def _plain(containment: str) -> Contender:
    argv = [program("resting")]

    def measure() -> float:
        before = time.perf_counter()
        handle = WatchedSubprocess.start(
            argv, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, containment=containment
        )
        seconds = time.perf_counter() - before
        handle.kill(KillPolicy.now())
        handle.wait()
        return seconds

    return measure


def _durable(containment: str, store: str) -> Contender:
    argv = [program("resting")]

    def measure() -> float:
        key = _fresh()
        before = time.perf_counter()
        run = durable.start(key, argv, store=store, containment=containment)
        seconds = time.perf_counter() - before
        run.kill(KillPolicy.now())
        run.wait()
        return seconds

    return measure


def _session(folder: str) -> Contender:
    """As `nohup setsid COMMAND >LOG & echo $! >PID` has it, and without its shell."""
    argv, log, number = [program("resting")], Path(folder, "log"), Path(folder, "pid")

    def measure() -> float:
        before = time.perf_counter()
        with log.open("ab") as file:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        number.write_text(str(process.pid))
        seconds = time.perf_counter() - before
        process.kill()
        process.wait()
        return seconds

    return measure


@contextlib.contextmanager
def _tmux(folder: str) -> Iterator[Contender | None]:
    binary = shutil.which("tmux")
    if binary is None:
        yield None
        return
    tmux = [binary, "-S", os.path.join(folder, "tmux"), "-f", "/dev/null"]

    def measure() -> float:
        name = _fresh()
        before = time.perf_counter()
        subprocess.run([*tmux, "new-session", "-d", "-s", name, program("resting")], check=True)
        seconds = time.perf_counter() - before
        subprocess.run([*tmux, "kill-session", "-t", name], check=True)
        return seconds

    subprocess.run([*tmux, "new-session", "-d", "-s", "keeps-the-server", "sleep 600"], check=True)
    try:
        yield measure
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def _starts(store: str, folder: str, effort: Effort) -> Iterator[Row]:
    rounds = effort.rounds(200)
    for name in ("warden", "cgroup"):
        what = f"durable start, in a {name}" if name != "warden" else "durable start"
        try:
            choose(name)
        except proctree.ContainmentUnavailable as error:
            yield skipped(what, str(error))
            continue
        contenders = {"ours": _durable(name, store), "plain": _plain(name)}
        results = medians(contenders, rounds, warm_up=5)
        peer = f"start, {name}"
        yield times_as_long(what, results["ours"], peer, results["plain"], START_LIMIT)
    with _tmux(folder) as tmux:
        contenders = {"ours": _durable("warden", store), "session": _session(folder)}
        if tmux is not None:
            contenders["tmux"] = tmux
        results = medians(contenders, effort.rounds(100), warm_up=3)
    names = {"session": "Popen(start_new_session)", "tmux": "tmux new-session -d"}
    for contender, peer in names.items():
        if contender in results:
            yield times_as_long("durable start", results["ours"], peer, results[contender], None)
        else:
            yield skipped("durable start", f"{peer}: not installed")


# -- coming back


def _below(what: str, seconds: float, limit: float) -> Row:
    return Row(what, milliseconds(seconds), target=f"< {limit * 1e3:g} ms", met=seconds < limit)


@contextlib.contextmanager
def _running(store: str, argv: list[str], unread: int) -> Iterator[tuple[str, Path]]:
    """A run that nobody is attached to, and the place of its output."""
    key = _fresh()
    run = durable.start(key, argv, store=store, containment="warden")
    try:
        log = Path(run.place, "out.log")
        due = time.monotonic() + DEADLINE
        while log.stat().st_size < unread:
            if time.monotonic() > due:
                raise TimeoutError(f"{log}: {log.stat().st_size} of {unread} bytes are written")
            time.sleep(0.01)
        run.detach()
        run.wait()
        yield key, Path(run.place)
    finally:
        durable.cancel(key, store=store, timeout=DEADLINE)


def _back(store: str, key: str, place: Path, argv: list[str], to_read: int) -> tuple[float, float]:
    """Seconds until `start` returned, and until all the output was delivered."""
    lines = to_read // len(LINE)
    got = 0
    last = 0.0

    def count(_line: str) -> None:
        nonlocal got, last
        got += 1
        if got == lines:
            last = time.perf_counter()

    before = time.perf_counter()
    run = durable.start(key, argv, store=store, containment="warden", logs=(Lines(count), None))
    back = time.perf_counter() - before
    if not run.reconnected:
        run.kill(KillPolicy.now())
        raise RuntimeError(f"{run!r} was started, and not reconnected to")
    try:
        due = time.monotonic() + DEADLINE
        while got < lines:
            if time.monotonic() > due:
                raise TimeoutError(f"{got} of {lines} lines were delivered")
            time.sleep(0.001)
    finally:
        run.detach()
        run.wait()
    # As if nobody had read anything.
    (place / "cursor").unlink(missing_ok=True)
    return back, max(back, last - before)


def _reconnects(store: str, effort: Effort) -> Iterator[Row]:
    rested = [program("resting")]
    with _running(store, rested, 0) as (key, place):
        nothing = medians(
            {"back": lambda: _back(store, key, place, rested, 0)[0]}, effort.rounds(100)
        )
    yield _below("reconnect", nothing["back"], RECONNECT_LIMIT)
    written = ["sh", "-c", _WRITES]
    delivered: list[float] = []

    def back() -> float:
        seconds, until = _back(store, key, place, written, UNREAD)
        delivered.append(until)
        return seconds

    with _running(store, written, UNREAD) as (key, place):
        much = medians({"back": back}, effort.rounds(30))
    what = f"reconnect, {UNREAD // 10**6} MB unread"
    yield _below(what, much["back"], RECONNECT_LIMIT)
    middle = sorted(delivered)[len(delivered) // 2]
    yield Row(
        f"{UNREAD // 10**6} MB unread: all lines delivered",
        milliseconds(middle),
        f"{UNREAD / middle / 1e6:.0f} MB/s",
    )


def _results(store: str, effort: Effort) -> Row:
    key = _fresh()

    def run() -> None:
        outcome = durable.run(key, ["/bin/true"], store=store, containment="warden")
        if outcome.returncode != 0:
            raise RuntimeError(outcome.describe())

    run()
    results = medians({"run": timed(run)}, effort.rounds(200), warm_up=5)
    if len(durable.list(store)[-1].attempts) != 1:
        raise RuntimeError("it was started again, and its result not taken")
    return _below("result of a finished run", results["run"], RECONNECT_LIMIT)


# -- many


def _many(effort: Effort) -> Iterator[Row]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        yield skipped(f"{RUNS} runs", f"{DESCRIPTORS} descriptors are needed, the limit is {hard}")
        return
    steady = 5.0 if effort.quick else 30.0
    with tempfile.TemporaryDirectory(prefix="proctree-durable-") as folder:
        store = os.path.join(folder, "store")
        for way, arguments in (("", []), (", output followed", ["--follow"])):
            command = [sys.executable, str(_PROGRAM), program("resting"), store]
            command += ["--runs", str(RUNS), "--steady", str(steady), *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=DEADLINE, check=True)
            result = json.loads(done.stdout)
            what = f"{RUNS} runs{way}"
            yield Row(f"{what}: started, each", milliseconds(result["start"]))
            used, memory, each = result["cpu"], result["memory"], result["descriptors"]
            yield Row(
                f"{what}: CPU in {steady:g} s", f"{used:.4%}", "", "", f"< {CPU:.0%}", used < CPU
            )
            yield Row(
                f"{what}: memory each",
                f"{memory / 1000:.1f} kB",
                target=f"< {MEMORY / 1000:g} kB",
                met=memory < MEMORY,
            )
            yield Row(
                f"{what}: descriptors each", f"{each:g}", target=f"<= {EACH}", met=each <= EACH
            )
