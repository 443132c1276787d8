"""A supervisor of durable runs that is run so that its system calls can be made to fail:
test_durable_syscall_faults.py.

It is told what to do by lines of JSON on its standard input, as faulty_supervisor.py is. Beside it
is another supervisor, this program with the argument `unharmed`, whose calls never fail: it starts
what the first one comes to, and finds out afterwards what has become of the key.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from harmed import children as list_children
from harmed import descriptors, entries, failure, hear, listen, say
from proctree import CAPTURE, KillPolicy, Lines, Outcome, ProctreeError, Stage, durable, worker
from proctree import loop as _loop
from proctree.containment import warden
from proctree.durable import FileStore, SqlStore, reconnecting, sql
from proctree.durable.leased import LeasedRun
from proctree.durable.sql import SqlClaim

CONTAINMENT = sys.argv[1]
DATABASE = sys.argv[2] != "directory"
LEASE = float(sys.argv[3])
"""Seconds, of a database."""
urls: dict[str, str] = {}
"""By the folder: of a database server. Without one the database is a file in the folder."""
UNHARMED = sys.argv[-1] == "unharmed"
# With a lease it may take a quarter of that.
POLICY = KillPolicy((Stage(15, 0.05), Stage(9, LEASE / 4 - 0.05 if DATABASE else 2.0)))
KEY = "key"
WORKERS = 3
COME_BACK_SECONDS = warden.COME_BACK_SECONDS
LEAVE_SECONDS = 15.0
"""How long something that is ending may take to be gone."""

TREE = r"""
exec 9>> "$1/alone"
flock -n 9 || echo "$PROCTREE_TREE" >> "$1/two"
echo out
echo err >&2
[ ! -p "$1/gate" ] || : < "$1/gate"
"""
"""Two of them at once are told by a lock that every member holds."""

events: list[str] = []


def _target(folder: str) -> list[str]:
    return ["sh", "-c", TREE, "sh", folder]


def _store(folder: str, machine: str = "store") -> FileStore | SqlStore:
    """Two machines are two directories here."""
    local = FileStore(f"{folder}/{machine}")
    if not DATABASE:
        return local
    url = urls.get(folder) or f"sqlite:///{folder}/records"
    return SqlStore(url, lease=LEASE, local=local)


def _options(folder: str, machine: str = "store") -> dict[str, Any]:
    return {"store": _store(folder, machine), "containment": CONTAINMENT, "kill": POLICY}


# -- the one that is not harmed


held: list[durable.Run] = []


def _begin_held(folder: str) -> dict[str, Any]:
    """A tree that has come to its gate."""
    os.mkfifo(f"{folder}/gate")
    there = threading.Semaphore(0)
    logs = Lines(lambda _line: there.release())
    run = durable.start(KEY, _target(folder), logs=logs, **_options(folder))
    for _ in ("out", "err"):
        assert there.acquire(timeout=LEAVE_SECONDS)
    held.append(run)
    return {"tree": run.tree_id}


def _let_go(_folder: str) -> dict[str, Any]:
    run = held.pop()
    run.detach()
    assert run.wait() is not None
    return {}


def _leave(folder: str) -> dict[str, Any]:
    """A tree that has come to its gate, and that nobody is attached to."""
    return {**_begin_held(folder), **_let_go(folder)}


def _end(_folder: str) -> dict[str, Any]:
    run = held.pop()
    run.kill(reason="enough")
    assert run.wait() is not None
    return {}


def _finish(folder: str) -> dict[str, Any]:
    outcome = durable.run(KEY, _target(folder), **_options(folder))
    return {"tree": outcome.tree_id, "returncode": outcome.returncode}


def _settle(folder: str) -> dict[str, Any]:
    """What a fault has left is ended, and the next call works."""
    wrong = []
    store = _store(folder)
    local = FileStore(f"{folder}/store")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/gate")
    while held:
        _let_go(folder)
    with contextlib.suppress(durable.UnknownKey):
        durable.cancel(KEY, store=store, timeout=LEAVE_SECONDS)
    deadline = time.monotonic() + LEAVE_SECONDS
    while local.claimed(KEY) and time.monotonic() < deadline:
        time.sleep(0.005)  # a lock tells nobody when it is free
    following = None
    if local.claimed(KEY):
        wrong.append("the lock is held")
    else:
        outcome = durable.run(KEY, _target(folder), logs=(CAPTURE, None), **_options(folder))
        following = outcome.tree_id
        if not outcome.ok or outcome.stdout != b"out\n":
            wrong.append(f"the next call: {outcome!r}")
        _forget(store)
    return {"wrong": wrong + _two(folder), "following": following}


def _settle_there(folder: str) -> dict[str, Any]:
    """On another machine, which waits for the lease of what a fault has left, and cancels nothing:
    who was harmed is not attached any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/gate")
    while held:
        _let_go(folder)
    outcome = durable.run(KEY, _target(folder), **_options(folder, "there"))
    wrong = [] if outcome.ok else [f"the next call there: {outcome!r}"]
    # What has been ended by its lease may be just about to be gone.
    local = FileStore(f"{folder}/store")
    wrong += ["the lock is held"] if local.claimed(KEY) else []
    _forget(_store(folder, "there"))
    with contextlib.suppress(durable.UnknownKey):
        local.forget(KEY)
    return {"wrong": wrong + _two(folder), "following": outcome.tree_id}


def _forget(store: FileStore | SqlStore) -> None:
    """A key that could not be given back is free when its lease is over."""
    deadline = time.monotonic() + (LEAVE_SECONDS if DATABASE else 0.0)
    while True:
        try:
            return durable.forget(KEY, store=store)
        except durable.StillRunning:
            if time.monotonic() > deadline:
                raise
        time.sleep(LEASE / 10)


def _two(folder: str) -> list[str]:
    return ["two trees of one key ran at once"] if os.path.exists(f"{folder}/two") else []


DOINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "hold": _begin_held,
    "let_go": _let_go,
    "end": _end,
    "leave": _leave,
    "finish": _finish,
    "settle": _settle,
    "settle there": _settle_there,
}


def serve() -> None:
    while True:
        task = hear()
        urls[task["folder"]] = task["url"]
        try:
            answer = DOINGS[task["do"]](task["folder"])
        except Exception as error:  # the test is to see it
            answer = {"wrong": [repr(error)]}
        say(answer)


# -- the one whose calls fail


class Unharmed:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, "unharmed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid

    def do(self, what: str, folder: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        task = {"do": what, "folder": folder, "url": urls[folder]}
        say(task, self._process.stdin.fileno())
        return hear(self._process.stdout.fileno())


class Scenario:
    """What is done with the key in a folder; everything else is prepared before."""

    def __init__(self, folder: str, unharmed: Unharmed) -> None:
        self.folder = folder
        self._unharmed = unharmed
        self.lines: list[str] = []
        self._run: durable.Run | None = None
        self.options = {"logs": (CAPTURE, Lines(self.lines.append)), **_options(folder)}
        self.store = self.options["store"]

    def prepare(self, what: str) -> None:
        if what == "keep":
            os.mkfifo(f"{self.folder}/gate")
        if what in ("comeback", "keep", "succeed", "watch"):
            self._run = durable.start(KEY, _target(self.folder), **self.options)

    def start(self) -> Outcome | None:
        return durable.start(KEY, _target(self.folder), **self.options).wait()

    def reconnect(self) -> Outcome | None:
        return self._kill(durable.start(KEY, _target(self.folder), **self.options))

    def _kill(self, run: durable.Run) -> Outcome | None:
        try:
            run.kill(reason="enough")
        except BaseException:
            run.detach()
            raise
        return run.wait()

    def comeback(self) -> Outcome | None:
        """Its warden closes the connection, as it does to one that does not read."""
        run = self._run
        assert run is not None
        assert run._live is not None
        contained = run._live.contained
        gone = contained._control
        contained._loop.post(lambda: contained._say(b"nonsense"))
        deadline = time.monotonic() + LEAVE_SECONDS
        while contained._control in (gone, None) and run.outcome is None:
            time.sleep(0.001)  # what has come back tells nobody
            assert time.monotonic() < deadline
        return self._kill(run)

    def attach(self) -> Outcome | None:
        run = durable.attach(KEY, logs=self.options["logs"], store=self.store)
        run.detach()
        return run.wait()

    def result(self) -> Outcome | None:
        return durable.start(KEY, _target(self.folder), **self.options).wait()

    def cancel(self) -> Outcome | None:
        return durable.cancel(KEY, store=self.store, timeout=LEAVE_SECONDS)

    def keep(self) -> Outcome | None:
        """Its lease is renewed, and then it ends."""
        run = self._leased()
        claim = run._tender and run._tender._claim
        assert isinstance(claim, SqlClaim)
        renewed = threading.Event()
        claim.when_renewed.append(lambda _left: renewed.set())
        deadline = time.monotonic() + LEAVE_SECONDS
        while not renewed.wait(0.001) and run.outcome is None:
            assert time.monotonic() < deadline
        return self._open_gate(run)

    def succeed(self) -> Outcome | None:
        """Its owner goes, and we are the next one."""
        run = self._leased()
        self._unharmed.do("let_go", self.folder)
        assert run._tender is not None
        deadline = time.monotonic() + LEAVE_SECONDS
        while not run._tender._holds() and run.outcome is None:
            time.sleep(0.001)  # a claim tells nobody
            assert time.monotonic() < deadline
        return self._open_gate(run)

    def watch(self) -> Outcome | None:
        """Its owner ends it, and records that."""
        self._unharmed.do("end", self.folder)
        return self._leased().wait()

    def _leased(self) -> LeasedRun:
        assert isinstance(self._run, LeasedRun)
        return self._run

    def _open_gate(self, run: LeasedRun) -> Outcome | None:
        # For both: whether somebody reads it, or will, is not known.
        gate = os.open(f"{self.folder}/gate", os.O_RDWR | os.O_NONBLOCK)
        try:
            return run.wait()
        finally:
            os.close(gate)

    def run(self, what: str) -> dict[str, Any]:
        began = time.monotonic()
        outcome: Outcome | None = getattr(self, what)()
        fields = None if outcome is None else outcome.as_dict()
        return {"outcome": fields, "lines": self.lines, "seconds": time.monotonic() - began}


BEFORE = {
    "reconnect": "leave",
    "attach": "leave",
    "cancel": "leave",
    "comeback": "leave",
    "result": "finish",
    "succeed": "hold",
    "watch": "hold",
}
LEASED = {"lease": "proctree-lease", "tender": "proctree-tender"}
"""The threads that hold a key of a database, by their names."""


def check(before: dict[str, str], folder: str, unharmed: Unharmed, settle: str) -> dict[str, Any]:
    """What was left behind, and what becomes of the key."""
    settled = unharmed.do(settle, folder)
    wrong = settled["wrong"]
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        opened = [f"{fd} {name}" for fd, name in descriptors().items() if fd not in before]
        children, files = list_children([unharmed.pid]), entries()
        threads = [name for name, numbers in _leased_threads().items() if numbers]
        if not (opened or children or files or threads) or time.monotonic() > deadline:
            break
        time.sleep(0.005)  # the loop closes what is late, and tells nobody
    try:
        ours = durable.run(KEY, _target(folder), **_options(folder))
        wrong += [] if ours.ok else [f"our next call: {ours!r}"]
    except ProctreeError as error:
        wrong.append(f"our next call: {error!r}")
    left = {"opened": opened, "children": children, "files": files, "threads": threads}
    return {"wrong": wrong, "following": settled.get("following"), **left}


def _leased_threads() -> dict[str, list[int]]:
    return {
        which: [t.native_id for t in threading.enumerate() if t.name == name and t.native_id]
        for which, name in LEASED.items()
    }


def _workers() -> list[int]:
    """The threads on which callbacks run, of which there are more than will be needed, idle."""
    barrier = threading.Barrier(WORKERS + 1)
    for _ in range(WORKERS):
        worker.run(barrier.wait)
    barrier.wait(LEAVE_SECONDS)
    threads = [each for each in threading.enumerate() if each.name == "proctree-callbacks"]
    deadline = time.monotonic() + LEAVE_SECONDS
    while len(worker._threads._idle) < len(threads) and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that rests tells nobody
    return [each.native_id for each in threads if each.native_id is not None]


def main() -> None:
    # Whatever strace traces ends like this, and there is no second to lose on each.
    warden.TRACER_PAUSE = 0.01
    # A lasting fault keeps a supervisor from ever reaching the warden.
    worker.IDLE_SECONDS = 600.0
    reconnecting.PATIENCE = 2.0
    reconnecting.ANSWER_SECONDS = 1.0
    sql.BUSY_SECONDS = sql.CONFLICT_SECONDS = 1.0
    # On the thread whose calls are made to fail, as when there can be no other one.
    sql.untorn = lambda work: work()  # type: ignore[assignment]
    listen(events)
    threading.excepthook = lambda died: events.append(f"defect: {died.thread} died: {died}")
    unharmed = Unharmed()
    before: dict[str, str] | None = None
    while True:
        task = hear()
        what, folder = task["do"], task["folder"]
        urls[folder] = task["url"]
        # What fails for good keeps it from its warden for as long as that is waited for. Else a
        # machine that has much to do may be late, all the more under strace.
        warden.COME_BACK_SECONDS = 1.0 if task["lasting"] else COME_BACK_SECONDS
        events.clear()
        said = unharmed.do(BEFORE[what], folder) if what in BEFORE else {}
        scenario = Scenario(folder, unharmed)
        scenario.prepare(what)
        thread = _loop.get()._thread.native_id if _loop.exists() else None
        threads = {"loop": [thread], "workers": _workers(), **_leased_threads()}
        say({"threads": threads, "unharmed": unharmed.pid, **said})
        hear()
        try:
            answer = scenario.run(what)
        except (OSError, RuntimeError, MemoryError, ProctreeError) as error:
            answer = {"error": failure(error)}
        say({**answer, **said})
        hear()
        if before is None:  # what is made once, with the first run, is not what is tested here
            before = descriptors()
        say({**check(before, folder, unharmed, task["settle"]), "events": list(events)})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve() if UNHARMED else main()
