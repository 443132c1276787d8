"""Processes that run a module of ours, forked from one that has imported everything already: a
fresh interpreter takes half a second, and many tests want many."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = ["integration.job_supervisor", "integration.sql_holder", "psycopg"]


def serve(control: socket.socket) -> None:
    for module in MODULES:
        importlib.import_module(module)
    control.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not message:
            return
        word, *args = json.loads(message)
        if word == "wait":
            _, status = os.waitpid(args[0], 0)
            control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _become(word, args, fds[0])
        os.close(fds[0])
        control.send(json.dumps(pid).encode())


def _become(module: str, args: list[str], stdio: int) -> None:
    try:
        os.dup2(stdio, 0)
        os.dup2(stdio, 1)
        os.close(stdio)
        sys.argv = [module, *args]
        importlib.import_module(module).main()
        os._exit(0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
    finally:
        os._exit(1)


class Nursery:
    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def ask(self, *words: object, fd: int | None = None) -> int:
        fds = [] if fd is None else [fd]
        socket.send_fds(self._control, [json.dumps(words).encode()], fds)
        return int(json.loads(self._control.recv(65536)))

    def start(self, module: str, *args: str) -> Forked:
        ours, theirs = socket.socketpair()
        with theirs:
            return Forked(self, self.ask(module, *args, fd=theirs.fileno()), ours)


class Forked:
    """A process that talks by lines. It is reaped by `wait`, so that its number is its own until
    then."""

    def __init__(self, nursery: Nursery, pid: int, sock: socket.socket) -> None:
        self._nursery = nursery
        self.pid = pid
        self.stream = sock.makefile("rw", encoding="utf-8", newline="\n")
        self._fileno = sock.fileno()
        sock.close()  # when the stream is: it is the stream's from now on
        self._status: int | None = None

    def fileno(self) -> int:
        """For select(2)."""
        return self._fileno

    def tell(self, *words: object) -> None:
        self.stream.write(" ".join(str(word) for word in words) + "\n")
        self.stream.flush()

    def hear(self) -> str:
        """The next line; "" when it has ended."""
        with contextlib.suppress(ConnectionResetError):
            return self.stream.readline().rstrip("\n")
        return ""

    def ask(self, *words: object) -> str:
        self.tell(*words)
        return self.hear()

    def signal(self, signo: int) -> None:
        if self._status is None:
            os.kill(self.pid, signo)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self) -> int:
        """As `subprocess.Popen.wait`."""
        if self._status is None:
            self._status = self._nursery.ask("wait", self.pid)
        return self._status

    def end(self) -> None:
        self.kill()
        self.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stream.close()


@contextlib.contextmanager
def running() -> Iterator[Nursery]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "integration.nursery", str(theirs.fileno())],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            assert ours.recv(16) == b"ready"
            yield Nursery(ours)
        finally:
            ours.close()
            process.wait(30)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
