"""kill-1000: end a tree of 1000 processes in 1000 sessions, and know that it has ended.

The tree is the same for all (programs/sessions.c), and so is the start of the clock: all of it is
up and waiting, and the first call that ends it is about to be made. The clock stops

  ours       (in `warden` and in `cgroup` containment) when `wait` returns: all are killed, reaped,
             and proved to be gone;
  cgroup     when the cgroup reports `populated 0` after a write to its cgroup.kill. Nothing is
             reaped by then, so this is less than the others do;
  psutil     when `wait_procs` returns after the idiom of its documentation: list the children
             recursively, kill each, wait for all.

Orphans are reaped by the nearest subreaper, or by PID 1 whenever it gets around to that. The
target is about psutil as programs use it, which depends on PID 1. Beside it stands psutil in a
process that is a subreaper and reaps the orphans itself: what the idiom costs where PID 1 is quick.
(Our own tree is reaped by its warden in any case.)
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil

import proctree
from benchmarks import cgroup
from benchmarks.native import program
from benchmarks.table import Row, skipped, times_as_long, times_faster
from benchmarks.timing import Contender, Effort, medians
from proctree.process import prctl

COUNT = 1000
OURS = "proctree"
OURS_IN_CGROUP = "proctree, cgroup"
CGROUP = "cgroup.kill"
PSUTIL = "psutil in a subreaper"
PSUTIL_PLAIN = "psutil"
PATIENCE = 20.0
"""Seconds that psutil may wait: where PID 1 does not reap at all, it would wait for ever."""


@contextlib.contextmanager
def _lines() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """(stdin, stdout, wait until ready) for a tree. At the end of the block its standard input
    ends, and with that whatever is left of it."""
    stdin, lifeline = os.pipe()
    said, stdout = os.pipe()

    def ready() -> None:
        os.close(stdin)
        os.close(stdout)
        if os.read(said, 16) != b"ready\n":
            raise RuntimeError(f"the tree of {COUNT} processes could not be started")

    try:
        yield stdin, stdout, ready
    finally:
        os.close(lifeline)
        os.close(said)


def ours(containment: str) -> float:
    argv = [program("sessions"), str(COUNT)]
    with _lines() as (stdin, stdout, ready):
        with proctree.WatchedSubprocess.start(
            argv, stdin=stdin, stdout=stdout, containment=containment
        ) as handle:
            ready()
            before = time.perf_counter()
            handle.kill(policy=proctree.KillPolicy.now())
            outcome = handle.wait()
            seconds = time.perf_counter() - before
    assert outcome is not None
    assert outcome.returncode == -9
    assert not outcome.survivors
    return seconds


def _peer(argv: list[str], end: Callable[[subprocess.Popen[bytes]], None]) -> float:
    try:
        with _lines() as (stdin, stdout, ready):
            with subprocess.Popen(argv, stdin=stdin, stdout=stdout) as main:
                try:
                    ready()
                    before = time.perf_counter()
                    end(main)
                    return time.perf_counter() - before
                finally:
                    main.kill()
    finally:
        _reap_orphans()


def _reap_orphans() -> None:
    """Waits for everything that came to us, if we are a subreaper."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def by_psutil() -> float:
    def end(main: subprocess.Popen[bytes]) -> None:
        parent = psutil.Process(main.pid)
        processes = [*parent.children(recursive=True), parent]
        for process in processes:
            process.kill()
        assert len(processes) == COUNT + 1
        psutil.wait_procs(processes, timeout=PATIENCE)

    return _peer([program("sessions"), str(COUNT)], end)


def by_cgroup(group: cgroup.Leaf) -> Contender:
    argv = [program("sessions"), str(COUNT), group.procs]

    return lambda: _peer(argv, lambda _main: group.kill())


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    calls = prctl.load()
    before = calls.get_child_subreaper()
    calls.set_child_subreaper(True)
    try:
        yield
    finally:
        calls.set_child_subreaper(before)


def measure(effort: Effort) -> Iterator[Row]:
    what = f"kill, reap, prove {COUNT} processes"
    warden, in_cgroup = partial(ours, "warden"), partial(ours, "cgroup")
    contenders: dict[str, Contender] = {OURS: warden, PSUTIL: by_psutil}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_subreaper())
        try:
            group = stack.enter_context(cgroup.leaf())
            contenders[CGROUP] = by_cgroup(group)
            contenders[OURS_IN_CGROUP] = in_cgroup
        except cgroup.Unavailable as error:
            yield skipped(what, f"{CGROUP}: {error}")
        results = medians(contenders, effort.rounds(9))
    if CGROUP in results:
        yield times_as_long(what, results[OURS], CGROUP, results[CGROUP], 3)
        in_one = results[OURS_IN_CGROUP]
        yield times_as_long(f"{what}, in a cgroup", in_one, CGROUP, results[CGROUP], 1.3)
    yield times_as_long(what, results[OURS], PSUTIL, results[PSUTIL], None)
    results = medians({OURS: warden, PSUTIL_PLAIN: by_psutil}, effort.rounds(3), warm_up=0)
    yield times_faster(what, results[OURS], PSUTIL_PLAIN, results[PSUTIL_PLAIN], 10)
