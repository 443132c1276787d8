"""A durable warden, and supervisors for it that speak the protocol and do nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from integration.conftest import DEADLINE
from proctree import protocol
from proctree.containment.warden import warden_path
from proctree.durable.recording import Exit
from proctree.policy import Stage
from proctree.protocol import Message, Type

PREALLOCATED = 4096
"""Bytes of the file for the exit record."""

LONG = 600_000
"""Milliseconds: a lease that no test sees the end of."""


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


PLAN = (Stage(signal.SIGTERM, DEADLINE), Stage(signal.SIGKILL, DEADLINE))
"""What ends at SIGTERM is seen to have ended at it."""


class Client:
    """One end of a connection to a warden."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.seen: list[Message] = []

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def plain(self, type_: Type, serial: int = 0) -> None:
        self.send(protocol.encode_plain(type_, serial))

    def attach(self, own: bool = False, serial: int = 0) -> Message:
        """Returns the answer; what follows it is still to be received."""
        self.send(protocol.encode_attach(own, serial))
        return self.until(Type.ATTACHED)

    def signal(self, signo: int, serial: int = 1, *, ending: bool = False) -> None:
        stage = Stage(signal.Signals(signo))
        self.send(protocol.encode_signal(serial, stage, resume=True, ending=ending))

    def receive(self) -> Message | None:
        """The next message; None at the end."""
        ready, _, _ = select.select([self.socket], [], [], DEADLINE)
        assert ready, f"nothing more comes behind {self.seen}"
        try:
            data = self.socket.recv(protocol.MAX_MESSAGE)
        except ConnectionResetError:  # once, ahead of what the warden had said
            return self.receive()
        if not data:
            return None
        self.seen.append(protocol.decode(data))
        return self.seen[-1]

    def until(self, type_: Type) -> Message:
        while (message := self.receive()) is not None:
            if message.type is type_:
                return message
        raise AssertionError(f"no {type_.name} before the end: {self.seen}")

    def rest(self) -> list[Message]:
        """What comes before the end."""
        got = []
        while (message := self.receive()) is not None:
            got.append(message)
        return got

    def silent(self) -> bool:
        ready, _, _ = select.select([self.socket], [], [], 0)
        return not ready

    def close(self) -> None:
        self.socket.close()


class Run:
    """The directory of an attempt, its lock, and the warden."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = folder / "attempt"
        self.attempt.mkdir()
        self.lock = folder / "lock"
        self.lock.touch()
        self.warden = -1
        self.status: int | None = None
        self.owner: Client
        self.clients: list[Client] = []

    # -- starting it

    def start(
        self,
        argv: Sequence[str],
        *,
        lease: int = LONG,
        strict: bool = False,
        end_leftovers: bool = False,
        plan: Iterable[Stage] = PLAN,
        more: Sequence[str] = (),
        opened: int = os.O_RDONLY | os.O_DIRECTORY,
        begin: bool = True,
        listen: bool = True,
    ) -> Client:
        """The warden, its first owner, and START. Returns the owner, which has read nothing."""
        record = os.open(self.attempt / "exit~", os.O_CREAT | os.O_WRONLY, 0o600)
        with contextlib.closing(os.fdopen(record, "wb")):
            os.posix_fallocate(record, 0, PREALLOCATED)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lock = os.open(self.lock, os.O_RDWR)
        run = os.open(self.attempt, opened)
        log = os.open(self.attempt / "out.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        (self.attempt / "err.log").touch()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            listener.bind(f"/proc/self/fd/{run}/control")
            fds = {
                "control": theirs.fileno(),
                "lock": lock,
                "run": run,
            }
            if listen:
                fds["listen"] = listener.fileno()
            options = [*(f"{name}={fd}" for name, fd in fds.items()), f"supervisor={os.getpid()}"]
            options += [f"until={round(boottime() * 1000) + lease}" if strict else f"lease={lease}"]
            options += ["endleftovers=1"] * end_leftovers + list(more)
            self.warden = os.posix_spawn(
                warden_path(),
                ["proctree-warden: kept", *options, "--", *argv],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds.values()),
                ],
            )
        finally:
            theirs.close()
            listener.close()
            for fd in (lock, run, log):
                os.close(fd)
        self.owner = self._client(ours)
        if begin:
            self.owner.send(protocol.encode_start(list(plan)))
        return self.owner

    def _client(self, connection: socket.socket) -> Client:
        client = Client(connection)
        self.clients.append(client)
        return client

    def connect(self) -> Client:
        """As soon as the warden listens."""
        deadline = time.monotonic() + DEADLINE
        directory = os.open(self.attempt, os.O_PATH)
        try:
            while True:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    connection.connect(f"/proc/self/fd/{directory}/control")
                except ConnectionRefusedError:
                    connection.close()
                    assert time.monotonic() < deadline, "it never listens"
                    time.sleep(0.005)
                except BaseException:
                    connection.close()
                    raise
                else:
                    return self._client(connection)
        finally:
            os.close(directory)

    def attached(self, own: bool = False) -> Client:
        client = self.connect()
        client.attach(own)
        client.until(Type.STARTED)
        return client

    # -- how it is

    def main(self) -> int:
        """Once it has started."""
        return int(self.owner.until(Type.STARTED).values[0])

    def locked(self) -> bool:
        fd = os.open(self.lock, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(fd)

    def wait(self) -> Exit:
        """Until the warden has ended; returns what it has written down."""
        pidfd = os.pidfd_open(self.warden)
        try:
            ready, _, _ = select.select([pidfd], [], [], DEADLINE)
        finally:
            os.close(pidfd)
        assert ready, "the warden does not end"
        _, self.status = os.waitpid(self.warden, 0)
        return self.record()

    def record(self) -> Exit:
        return Exit.decode((self.attempt / "exit").read_bytes())

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.warden > 0 and self.status is None:
            os.kill(self.warden, signal.SIGKILL)
            os.waitpid(self.warden, 0)
