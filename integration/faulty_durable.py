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
from proctree.durable import FileStore, reconnecting

CONTAINMENT = sys.argv[1]
UNHARMED = sys.argv[-1] == "unharmed"
POLICY = KillPolicy((Stage(15, 0.05), Stage(9, 2.0)))
KEY = "key"
WORKERS = 3
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


def _options(folder: str) -> dict[str, Any]:
    return {"store": f"{folder}/store", "containment": CONTAINMENT, "kill": POLICY}


# -- the one that is not harmed


def _leave(folder: str) -> dict[str, Any]:
    """A tree that has come to its gate, and that nobody is attached to."""
    os.mkfifo(f"{folder}/gate")
    there = threading.Semaphore(0)
    logs = Lines(lambda _line: there.release())
    run = durable.start(KEY, _target(folder), logs=logs, **_options(folder))
    for _ in ("out", "err"):
        assert there.acquire(timeout=LEAVE_SECONDS)
    run.detach()
    assert run.wait() is not None
    return {"tree": run.tree_id}


def _finish(folder: str) -> dict[str, Any]:
    outcome = durable.run(KEY, _target(folder), **_options(folder))
    return {"tree": outcome.tree_id, "returncode": outcome.returncode}


def _settle(folder: str) -> dict[str, Any]:
    """What a fault has left is ended, and the next call works."""
    wrong = []
    store = FileStore(f"{folder}/store")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/gate")
    with contextlib.suppress(durable.UnknownKey):
        durable.cancel(KEY, store=store, timeout=LEAVE_SECONDS)
    deadline = time.monotonic() + LEAVE_SECONDS
    while store.claimed(KEY) and time.monotonic() < deadline:
        time.sleep(0.005)  # a lock tells nobody when it is free
    if store.claimed(KEY):
        wrong.append("the lock is held")
    else:
        outcome = durable.run(KEY, _target(folder), logs=(CAPTURE, None), **_options(folder))
        if not outcome.ok or outcome.stdout != b"out\n":
            wrong.append(f"the next call: {outcome!r}")
        durable.forget(KEY, store=store)
    if os.path.exists(f"{folder}/two"):
        wrong.append("two trees of one key ran at once")
    return {"wrong": wrong}


DOINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "leave": _leave,
    "finish": _finish,
    "settle": _settle,
}


def serve() -> None:
    while True:
        task = hear()
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
        say({"do": what, "folder": folder}, self._process.stdin.fileno())
        return hear(self._process.stdout.fileno())


class Scenario:
    """What is done with the key in a folder; everything else is prepared before."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self._run: durable.Run | None = None
        self.options = {"logs": (CAPTURE, Lines(self.lines.append)), **_options(folder)}
        self.store = FileStore(self.options["store"])

    def prepare(self, what: str) -> None:
        if what == "comeback":
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

    def run(self, what: str) -> dict[str, Any]:
        outcome: Outcome | None = getattr(self, what)()
        fields = None if outcome is None else outcome.as_dict()
        return {"outcome": fields, "lines": self.lines}


BEFORE = {
    "reconnect": "leave",
    "attach": "leave",
    "cancel": "leave",
    "comeback": "leave",
    "result": "finish",
}


def check(before: dict[str, str], folder: str, unharmed: Unharmed) -> dict[str, Any]:
    """What was left behind, and what becomes of the key."""
    wrong = unharmed.do("settle", folder)["wrong"]
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        opened = [f"{fd} {name}" for fd, name in descriptors().items() if fd not in before]
        children, files = list_children([unharmed.pid]), entries()
        if not (opened or children or files) or time.monotonic() > deadline:
            break
        time.sleep(0.005)  # the loop closes what is late, and tells nobody
    try:
        ours = durable.run(KEY, _target(folder), **_options(folder))
        wrong += [] if ours.ok else [f"our next call: {ours!r}"]
    except ProctreeError as error:
        wrong.append(f"our next call: {error!r}")
    return {"wrong": wrong, "opened": opened, "children": children, "files": files}


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
    warden.COME_BACK_SECONDS = 1.0
    reconnecting.PATIENCE = 2.0
    reconnecting.ANSWER_SECONDS = 1.0
    listen(events)
    unharmed = Unharmed()
    before: dict[str, str] | None = None
    while True:
        task = hear()
        what, folder = task["do"], task["folder"]
        events.clear()
        said = unharmed.do(BEFORE[what], folder) if what in BEFORE else {}
        scenario = Scenario(folder)
        scenario.prepare(what)
        thread = _loop.get()._thread.native_id if _loop.exists() else None
        say({"loop": thread, "workers": _workers(), "unharmed": unharmed.pid, **said})
        hear()
        try:
            answer = scenario.run(what)
        except (OSError, RuntimeError, MemoryError, ProctreeError) as error:
            answer = {"error": failure(error)}
        say({**answer, **said})
        hear()
        if before is None:  # what is made once, with the first run, is not what is tested here
            before = descriptors()
        say({**check(before, folder, unharmed), "events": list(events)})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve() if UNHARMED else main()
