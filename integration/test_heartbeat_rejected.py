"""The scene that this library exists for: a server no longer wants a run, and answers 409.

A bash starts a Python in a venv; that starts a grandchild which daemonises, ignores SIGTERM and
holds the standard output open. Elsewhere the grandchild went on under pid 1 for half an hour, and
the supervisor died of `I/O operation on closed epoll object`.
"""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import proctree
from integration.conftest import Lines, Stopwatch, is_alive, living, outer_pid
from proctree import KillPolicy, Reason, Stage, WatchedSubprocess

GRANDCHILD = """
import os, signal
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b"grandchild %d\\n" % os.getpid())
while True:
    signal.pause()
"""

TASK = """
import os, subprocess, sys, signal
subprocess.run([sys.executable, "-S", "-c", {grandchild!r}])
os.write(1, b"task up\\n")  # in one piece, whatever PYTHONUNBUFFERED says
signal.pause()
"""


class Api(http.server.BaseHTTPRequestHandler):
    """Accepts two heartbeats and rejects the third."""

    beats = 0

    def do_PUT(self) -> None:
        type(self).beats += 1
        self.send_response(204 if type(self).beats < 3 else 409)
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Silence."""


@pytest.fixture
def api() -> Iterator[str]:
    Api.beats = 0
    server = http.server.HTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/heartbeat"
    server.shutdown()
    thread.join()
    server.server_close()


def beat_until_rejected(url: str) -> int:
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code


@pytest.mark.parametrize("grace", [0.5])
def test_heartbeat_409(api: str, tmp_path: Path, containment: str, grace: float) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    task = tmp_path / "task.py"
    task.write_text(TASK.format(grandchild=textwrap.dedent(GRANDCHILD)))
    lines = Lines()
    handle = WatchedSubprocess.start(
        ["bash", "-c", f"{venv}/bin/python {task}; true"],
        stdout=proctree.Lines(lines),
        containment=containment,
        kill=KillPolicy(stages=(Stage(15, grace), Stage(9, 20.0))),
    )
    lines.wait_for(2)
    # A process outside the tree holds the stream open, so that its end never comes by itself.
    stolen = os.open(f"/proc/{handle.pid}/fd/1", os.O_WRONLY)
    try:
        inner = next(int(line.split()[1]) for line in lines.lines if "grandchild" in line)
        grandchild = outer_pid(handle, inner)
        assert is_alive(grandchild)
        pids = {info.pid for info in handle.processes()}
        assert handle.pid in pids

        code = beat_until_rejected(api)
        watch = Stopwatch()
        handle.kill(reason=f"heartbeat answered {code}")
        outcome = handle.wait(timeout=60)
        took = watch.stop()
    finally:
        os.close(stolen)

    assert outcome is not None
    assert (outcome.reason, outcome.detail) == (Reason.KILLED, "heartbeat answered 409")
    assert outcome.returncode == -15
    assert outcome.survivors == ()
    assert not is_alive(grandchild)
    assert not living()
    assert took < grace + 1.0
    assert handle.wait() is outcome
