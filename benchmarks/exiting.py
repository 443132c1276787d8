"""exit: from the exit of the main process until whoever waits for it knows.

The process (programs/ending.c) sleeps until the waiter certainly waits, notes the time in memory
that it shares with us and exits. All clocks are CLOCK_MONOTONIC. The least that anybody can do is a
poll of the process's pidfd; ours has also reaped the process, proved its tree empty and reaped the
warden when `wait` returns.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator

import processkit

import proctree
from benchmarks.moment import Ended, Moment
from benchmarks.table import Row, times_as_long
from benchmarks.timing import Effort, medians

OURS = "proctree"
PIDFD = "poll of a pidfd"
ASYNCIO = "asyncio"
BLOCKING = "Popen.wait()"
TIMEOUT = "Popen.wait(timeout)"
PROCESSKIT = "processkit"


def _waited(wait: Callable[[], object]) -> Ended:
    began = time.monotonic()
    wait()
    return began, time.monotonic()


def measure(effort: Effort) -> Iterator[Row]:
    moment = Moment()
    argv = moment.argv
    command = processkit.Command(argv[0], argv[1:]).stdout("inherit").stderr("inherit")

    def ours() -> Ended:
        return _waited(proctree.WatchedSubprocess.start(argv).wait)

    def pidfd() -> Ended:
        with subprocess.Popen(argv) as process:
            fd = os.pidfd_open(process.pid)
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            ended = _waited(poller.poll)
            os.close(fd)
        return ended

    def blocking() -> Ended:
        return _waited(subprocess.Popen(argv).wait)

    def timeout() -> Ended:
        process = subprocess.Popen(argv)
        return _waited(lambda: process.wait(timeout=60))

    def kit() -> Ended:
        return _waited(command.start().outcome)

    async def wait_in_loop() -> Ended:
        process = await asyncio.create_subprocess_exec(*argv)
        began = time.monotonic()
        await process.wait()
        return began, time.monotonic()

    with asyncio.Runner() as runner:
        ways: dict[str, Callable[[], Ended]] = {
            OURS: ours,
            PIDFD: pidfd,
            ASYNCIO: lambda: runner.run(wait_in_loop()),
            BLOCKING: blocking,
            TIMEOUT: timeout,
        }
        contenders = {name: moment.after(way) for name, way in ways.items()}
        results = medians(contenders, effort.rounds(200), warm_up=3)

    what = "exit to wait() returning"
    limits = {PIDFD: 2.0, ASYNCIO: 1.0, BLOCKING: None, TIMEOUT: None}
    for peer, limit in limits.items():
        yield times_as_long(what, results[OURS], peer, results[peer], limit)

    contenders = {OURS: moment.after(ours), PROCESSKIT: moment.after(kit)}
    results = medians(contenders, effort.rounds(100), warm_up=3)
    yield times_as_long(what, results[OURS], PROCESSKIT, results[PROCESSKIT], None)
