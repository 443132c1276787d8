"""A heartbeat is answered with 409, and the whole task has to end: `make demo`.

The task is a bash that runs a Python program in a virtual environment, and that program starts one
that leaves (task.py). A server on this machine answers the heartbeat of its supervisor a few times
with 200 and then with 409 Conflict: the task should not be running any more. The scene is played
twice, by a supervisor that uses `subprocess` and by one that uses proctree; each is a process of
its own, so that its exit status can be seen too.

Exit status 1 if proctree left anything, or its supervisor did not exit with status 0.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import processes
import structlog
from processes import Process

from proctree import KillPolicy, Lines, WatchedSubprocess

BEATS = 3
"""How often the server answers 200 before it answers 409."""
INTERVAL = 0.2
"""Seconds between two heartbeats."""
GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL."""
DEADLINE = 15.0
"""Seconds that anything here may take before the demo gives up."""

BASH = '"$0" "$1"; echo "bash: the task has ended"'
"""Two commands, so that bash stays and does not become the first of them."""


class Scene(NamedTuple):
    """What a supervisor has to know.

    Attributes:
        python: the interpreter of the virtual environment.
        marker: the value of the environment variable that the task's processes inherit.
        port: where the server listens.
        members: file for the processes that the supervisor has seen.
    """

    python: str
    marker: str
    port: int
    members: str

    def argv(self) -> list[str]:
        """The command: bash, which runs the program."""
        return ["bash", "-c", BASH, self.python, str(Path(__file__).with_name("task.py"))]

    def env(self, report_fd: int) -> dict[str, str]:
        """Ours, the marker, and where to report."""
        ours = {processes.MARKER: self.marker, "DEMO_REPORT_FD": str(report_fd)}
        return dict(os.environ) | ours


def say(text: str = "", lines: Iterable[str] = ()) -> None:
    """Prints at once: two processes write to the same place in turn."""
    print(text, flush=True)
    for line in lines:
        print(f"      {line}", flush=True)


# -- the server, in the demo's own process


class Server(http.server.ThreadingHTTPServer):
    """Answers `BEATS` heartbeats on each path, and no more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.beats: dict[str, int] = {}


class Handler(http.server.BaseHTTPRequestHandler):
    """One heartbeat is one PUT."""

    server: Server

    def do_PUT(self) -> None:
        """200, or 409 for a task that should not be running any more."""
        self.server.beats[self.path] = self.server.beats.get(self.path, 0) + 1
        self.send_response(200 if self.server.beats[self.path] <= BEATS else 409)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """The supervisor says what it was answered."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


# -- what both supervisors do


def heartbeat(scene: Scene, rejected: Callable[[], None], stop: threading.Event) -> None:
    """Sends heartbeats until one is rejected."""
    answers = []
    while not stop.wait(INTERVAL):
        connection = http.client.HTTPConnection("127.0.0.1", scene.port, timeout=DEADLINE)
        connection.request("PUT", f"/{scene.marker}/heartbeat")
        answers.append(connection.getresponse().status)
        connection.close()
        if answers[-1] == http.HTTPStatus.CONFLICT:
            say(f"   heartbeat answered {' '.join(map(str, answers))}")
            rejected()
            return


def await_reports(fd: int) -> None:
    """Until the task and the process that leaves have both said that they run."""
    expected = {b"task", b"daemon"}
    text = b""
    deadline = time.monotonic() + DEADLINE
    while expected - set(text.split(b"\n")):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(fd, 4096) if ready else b""
        if not data:
            raise RuntimeError("the task did not start")
        text += data


def remember(scene: Scene, members: Iterable[Process]) -> None:
    """For the demo, which looks for them when the supervisor has ended."""
    Path(scene.members).write_text(json.dumps(list(members)))


# -- the supervisor that uses subprocess


def with_subprocess(scene: Scene) -> None:
    """Popen, terminate(), kill(), wait(): as it is usually written."""
    report, told = os.pipe()
    task = subprocess.Popen(
        scene.argv(), env=scene.env(told), stdout=subprocess.PIPE, pass_fds=[told]
    )
    os.close(told)
    await_reports(report)
    members = processes.living(scene.marker)
    remember(scene, members)
    say("   before", processes.draw(members))

    rejected = threading.Event()
    threading.Thread(target=heartbeat, args=(scene, rejected.set, threading.Event())).start()
    rejected.wait(DEADLINE)
    task.terminate()
    try:
        status = task.wait(GRACE)
    except subprocess.TimeoutExpired:
        task.kill()
        status = task.wait()
    say(f"   terminate() and wait(): bash ended with {status}, and subprocess is content")
    assert task.stdout is not None
    os.set_blocking(task.stdout.fileno(), False)
    if task.stdout.read() is None:
        say("   its standard output is still open: reading it to the end would hang here")


# -- the supervisor that uses proctree


def show_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """A structlog processor: one short line for each event."""
    name = event.pop("event")
    event.pop("tree_id", None)
    fields = " ".join(
        f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}"
        for key, value in event.items()
    )
    return f"      {time.monotonic() - BEGAN:5.2f} s  {name:<15} {fields}"


BEGAN = time.monotonic()


def with_proctree(scene: Scene) -> None:
    """The same with a tree that ends."""
    structlog.configure(
        processors=[show_event], logger_factory=structlog.PrintLoggerFactory(sys.stdout)
    )
    report, told = os.pipe()
    with WatchedSubprocess.start(
        scene.argv(),
        env=scene.env(told),
        stdout=Lines(lambda line: say(f"   stdout: {line}")),
        pass_fds=[told],
        name="task",
    ) as handle:
        os.close(told)
        await_reports(report)
        members = [p for p in (processes.read(info.pid) for info in handle.processes()) if p]
        warden = processes.read(members[0].ppid)
        assert warden is not None
        remember(scene, [*members, warden])
        say("   before", processes.draw(members))

        def rejected() -> None:
            handle.kill(KillPolicy.after(GRACE), reason="heartbeat answered 409")

        stop = threading.Event()
        threading.Thread(target=heartbeat, args=(scene, rejected, stop)).start()
        outcome = handle.wait(DEADLINE)
        stop.set()
    assert outcome is not None
    say(f"   outcome: {outcome.describe()}")
    for stage in outcome.stages:
        text = f"{stage.signal.name} to the {stage.scope} after {stage.at:.2f} s"
        say(f"      {text} reached {stage.reached} process{'es' if stage.reached != 1 else ''}")


# -- the demo


def play(name: str, scene: Scene) -> tuple[int, list[Process]]:
    """Runs a supervisor; returns its exit status and what it has left behind."""
    arguments = [sys.executable, __file__, name, json.dumps(scene)]
    status = subprocess.run(arguments, timeout=DEADLINE, check=False).returncode
    known = [Process(*fields) for fields in json.loads(Path(scene.members).read_text())]
    return status, processes.living(scene.marker, known)


def show_left(left: list[Process]) -> None:
    """Who is still there, and below whom."""
    for process in left:
        parent = processes.read(process.ppid)
        owner = f"pid {process.ppid} ({parent.name if parent else '?'})"
        what = processes.label(process.pid)
        say(f"   LEFT ALIVE: {process.pid}  {what}  state {process.state}, parent is {owner}")


def show(folder: Path, server: Server) -> int:
    """Plays the scene twice; returns the exit status."""
    say("A task: bash -> Python in a virtual environment -> a daemon that has left it (setsid,")
    say("forked twice), ignores SIGTERM and holds standard output open. Its supervisor sends")
    say(f"heartbeats to a server that answers 200 {BEATS} times and then 409: the task has to end.")
    make_venv = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
    subprocess.run(make_venv, check=True, timeout=DEADLINE)
    python = str(folder / "venv" / "bin" / "python")

    def scene() -> Scene:
        return Scene(python, secrets.token_hex(8), server.server_port, str(folder / "members"))

    say("\n1. With subprocess")
    plain = scene()
    try:
        status, left = play("with-subprocess", plain)
        count_plain = len(left)
        say(f"   after: the supervisor exited with status {status}")
        show_left(left)
    finally:
        processes.end(processes.living(plain.marker), DEADLINE)
    say("   (the demo has ended them now)")

    say("\n2. With proctree")
    ours = scene()
    try:
        status, left = play("with-proctree", ours)
        say(f"   after: the supervisor exited with status {status}")
        show_left(left)
    finally:
        processes.end(processes.living(ours.marker), DEADLINE)
    if left or status != 0:
        say("\nFAILED: proctree did not keep its promise.")
        return 1
    count = sum(1 for _ in processes.every())
    say(
        f"   nothing left: looked at all {count} processes of this machine, under every parent, for"
    )
    say("   the mark of the task in their environment and for the pids and start times seen before")
    say(f"\nsubprocess left {count_plain}, proctree left 0.")
    return 0


def main() -> int:
    """The demo, or with arguments one of its supervisors."""
    if len(sys.argv) == 3:
        scene = Scene(*json.loads(sys.argv[2]))
        {"with-subprocess": with_subprocess, "with-proctree": with_proctree}[sys.argv[1]](scene)
        return 0
    # Being asked to end must not keep the clean-up from running.
    signal.signal(signal.SIGTERM, lambda _signo, _frame: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="proctree-demo-") as folder, serving() as server:
        return show(Path(folder), server)


if __name__ == "__main__":
    sys.exit(main())
