"""detection: from the exit of a child until the code that supervises it is called.

The process (programs/ending.c) notes the time and exits, as for `exit`; what is measured here is
not a call that returns but a callback that somebody has registered:

  ours         a subscriber to `MainExited`, and one to `TreeEnded`: by then the tree is proved
               empty and its warden reaped;
  asyncio      the line behind `await process.wait()`;
  supervisord  an event listener for PROCESS_STATE_EXITED, a process of its own as it has to be.
               The end of the child's output wakes supervisord, which then looks for dead children
               once; but the kernel closes a process's files before it makes a zombie of it. What is
               not there yet is seen a second later, and the listener is told in one of the next
               rounds of its loop;
  circus       the hook `after_reap`, which runs in the arbiter and before its subscribers are told.
               It looks for dead children now and then (`check_delay`, 1 s unless told otherwise),
               so once with 10 ms and once as it comes.

The daemons run for the whole measurement, in trees of ours, so that they end with it whatever
happens; they start the process when they are asked to, at a random moment of their own rhythm, over
sockets in our temporary directory. Nothing of that start is in the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import queue
import random
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import proctree
from benchmarks.moment import Ended, Moment
from benchmarks.native import scratch
from benchmarks.table import Row, below, skipped, times_as_long
from benchmarks.timing import Contender, Effort, medians

PROGRAMS = Path(__file__).parent / "programs"

EXITED = "proctree, MainExited"
PROVED = "proctree, TreeEnded"
ASYNCIO = "asyncio"
SUPERVISORD = "supervisord"
CIRCUS = "circus, 10 ms"
CIRCUS_DEFAULT = "circus, 1 s"

PATIENCE = 30.0
"""Seconds that a daemon may take to say something."""

LIMIT = 0.001

Way = Callable[[], Ended]


class _Unavailable(Exception):
    """A peer that cannot be measured here: why."""


class _Daemon:
    """One that starts the process when it is asked, and tells when it has seen it exit."""

    def __init__(self, name: str, stack: contextlib.ExitStack) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch()))
        self.fifo = self.folder / "told"
        os.mkfifo(self.fifo)
        # For reading and writing: so it opens at once, and never ends.
        self._told = os.open(self.fifo, os.O_RDWR)
        stack.callback(os.close, self._told)
        self._buffer = b""
        self._stack = stack

    def run(self, argv: list[str]) -> None:
        """Starts it and waits for its first, empty line."""
        log = self.folder / "log"
        handle = proctree.WatchedSubprocess.start(
            argv, stdin=proctree.DEVNULL, stdout=log, stderr=proctree.STDOUT
        )
        self._stack.enter_context(handle)
        try:
            self.line()
        except TimeoutError:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise _Unavailable(f"it says nothing: {' '.join(last)}") from None

    def line(self) -> bytes:
        """The next one that it writes."""
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._told], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"nothing from {self.folder.name} in {PATIENCE:g} s")
            self._buffer += os.read(self._told, 4096)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def way(self, start: Callable[[], object], rhythm: float) -> Way:
        """`start` has it run the process. `rhythm`: seconds after which it does everything again:
        a start at a random moment in it, or the exits would all come at the same one."""

        def wait() -> Ended:
            time.sleep(random.uniform(0, rhythm))
            began = time.monotonic()
            start()
            return began, int(self.line()) / 1e9

        return wait


_SUPERVISORD = """\
[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile={folder}/pid
childlogdir={folder}
identifier=detection

[unix_http_server]
file={folder}/socket
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[program:ending]
command={command}
autostart=false
autorestart=false
startsecs=0
startretries=0

[eventlistener:told]
command={listener}
events=PROCESS_STATE_EXITED
"""


def _supervisord(argv: list[str], stack: contextlib.ExitStack) -> Way:
    xmlrpc = _import("supervisor.xmlrpc")
    from xmlrpc.client import ServerProxy

    daemon = _Daemon("supervisord", stack)
    listener = [sys.executable, str(PROGRAMS / "supervisord_listener.py"), str(daemon.fifo)]
    configuration = daemon.folder / "conf"
    configuration.write_text(
        _SUPERVISORD.format(
            folder=daemon.folder, command=" ".join(argv), listener=" ".join(listener)
        )
    )
    command = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord"]
    daemon.run([*command, "-n", "-c", str(configuration)])
    transport = xmlrpc.SupervisorTransport(serverurl=f"unix://{daemon.folder}/socket")
    server: Any = stack.enter_context(ServerProxy("http://127.0.0.1", transport))
    # What happens wakes it, and its second begins anew: there is no rhythm to be met.
    return daemon.way(lambda: server.supervisor.startProcess("ending", False), 0.0)


def _circus(argv: list[str], delay: float, stack: contextlib.ExitStack) -> Way:
    client_module = _import("circus.client")
    daemon = _Daemon(f"circus-{delay:g}", stack)
    endpoint, publisher = (f"ipc://{daemon.folder}/{name}" for name in ("control", "publisher"))
    program = [sys.executable, "-W", "ignore", str(PROGRAMS / "circus_arbiter.py")]
    daemon.run([*program, endpoint, publisher, str(delay), str(daemon.fifo), *argv])
    client = client_module.CircusClient(endpoint=endpoint, timeout=PATIENCE)
    stack.callback(client.stop)

    def start() -> None:
        # It stops the watcher behind the hook, and a watcher that is not stopped is not started.
        while client.send_message("status", name="ending")["status"] != "stopped":
            time.sleep(delay / 10)
        # And it refuses while it looks after its watchers.
        while client.send_message("start", name="ending", waiting=True)["status"] != "ok":
            time.sleep(delay / 10)

    return daemon.way(start, delay)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _Unavailable(f"{error}; see benchmarks/requirements.txt") from None


def _ours(argv: list[str], kind: type, stack: contextlib.ExitStack) -> Way:
    told: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
    stack.enter_context(
        proctree.subscribe(lambda event: told.put((event.tree_id, time.monotonic())), kind)
    )

    def wait() -> Ended:
        with proctree.WatchedSubprocess.start(argv) as handle:
            began = time.monotonic()
            while True:
                tree_id, known = told.get(timeout=PATIENCE)
                if tree_id == handle.tree_id:
                    break
            handle.wait()
        return began, known

    return wait


def _asyncio(argv: list[str], stack: contextlib.ExitStack) -> Way:
    runner = stack.enter_context(asyncio.Runner())

    async def in_loop() -> Ended:
        process = await asyncio.create_subprocess_exec(*argv)
        began = time.monotonic()
        await process.wait()
        return began, time.monotonic()

    return lambda: runner.run(in_loop())


def _medians(ways: dict[str, Way], moment: Moment, rounds: int) -> dict[str, float]:
    contenders: dict[str, Contender] = {name: moment.after(way) for name, way in ways.items()}
    return medians(contenders, rounds, warm_up=2)


def measure(effort: Effort) -> Iterator[Row]:
    moment = Moment()
    argv = moment.argv
    peers: dict[str, Callable[[contextlib.ExitStack], Way]] = {
        ASYNCIO: lambda stack: _asyncio(argv, stack),
        CIRCUS: lambda stack: _circus(argv, 0.01, stack),
    }
    slow: dict[str, Callable[[contextlib.ExitStack], Way]] = {
        SUPERVISORD: lambda stack: _supervisord(argv, stack),
        CIRCUS_DEFAULT: lambda stack: _circus(argv, 1.0, stack),
    }
    yield from _beside(peers, moment, effort.rounds(100), limits=True)
    yield from _beside(slow, moment, effort.rounds(15), limits=False)


def _beside(
    peers: dict[str, Callable[[contextlib.ExitStack], Way]],
    moment: Moment,
    rounds: int,
    limits: bool,
) -> Iterator[Row]:
    what = {EXITED: "exit to a callback", PROVED: "exit to a callback, tree proved empty"}
    with contextlib.ExitStack() as stack:
        ways = {
            EXITED: _ours(moment.argv, proctree.MainExited, stack),
            PROVED: _ours(moment.argv, proctree.TreeEnded, stack),
        }
        for peer, make in peers.items():
            try:
                way = make(stack)
                way()
            except Exception as error:  # whatever it is, a peer that does not run is no fault here
                yield skipped(what[EXITED], f"{peer}: {error}")
            else:
                ways[peer] = way
        results = _medians(ways, moment, rounds)
    for ours, label in what.items():
        if limits:
            yield below(label, results[ours], LIMIT)
        for peer in peers:
            if peer in results:
                # asyncio waits for the one process, and proves nothing: there to be seen.
                limit = None if peer == ASYNCIO else 1.0
                yield times_as_long(label, results[ours], peer, results[peer], limit)
