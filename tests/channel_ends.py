"""The two ends of a channel without a tree: a real `Served`, and a client that is no more than a
socket, so that it can say what it likes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from proctree import events
from proctree.channel import Server, tasks
from proctree.channel.lane import Lane
from proctree.channel.server import _channel_loop

DEADLINE = 30.0
"""Seconds that an event may take before a test says that it will not come."""


class Stuck(AssertionError):
    """Something that has to happen did not. What every thread was doing is on standard error."""

    def __init__(self, what: str) -> None:
        super().__init__(f"never happened: {what}")
        faulthandler.dump_traceback(file=sys.__stderr__)


def eventually(condition: Callable[[], object], what: str) -> None:
    """For what nothing reports."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise Stuck(what)
        time.sleep(0.002)


@pytest.fixture(scope="session")
def warm() -> None:
    """What the first use makes for the whole process is nobody's leak."""
    _channel_loop()
    tasks.loop()


class Told:
    """The events of the package, and who looks at them at the end: a defect is never right."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, _level: str, event: str, fields: dict[str, Any]) -> None:
        if event == "loop.defect":
            fields["traceback"] = traceback.format_exc()
        self.events.append((event, fields))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.events if event == name]

    def require_no_defect(self) -> None:
        defects = self.named("loop.defect")
        assert not defects, defects[0]["traceback"]


@pytest.fixture
def told(warm: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    told = Told()
    monkeypatch.setattr(events, "_emit", told)
    yield told
    told.require_no_defect()


# -- frames, made here and not by what is tested


def frame(value: Any) -> bytes:
    """One frame of any value."""
    return framed(msgspec.msgpack.encode(value))


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(DEADLINE)
        self._received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def offer(self, data: bytes) -> int:
        """As much as there is room for; returns how much that was."""
        sent = 0
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += self.sock.send(data[sent : sent + 65536])
        self.sock.settimeout(DEADLINE)
        return sent

    def receive(self) -> list[Any] | None:
        """The next frame, decoded; None: it has ended."""
        while True:
            if len(self._received) >= 4:
                (length,) = struct.unpack(">I", self._received[:4])
                if len(self._received) >= 4 + length:
                    whole, self._received = (
                        self._received[4 : 4 + length],
                        self._received[4 + length :],
                    )
                    answer = msgspec.msgpack.decode(whole)
                    assert isinstance(answer, list)
                    assert len(answer) == 3
                    return answer
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                return None
            except TimeoutError:
                raise Stuck("an answer") from None
            if not data:
                return None
            self._received += data

    def ask(self, number: int, body: Any) -> list[Any]:
        """One request, and its answer, which has to come next."""
        self.send(frame([number, body]))
        answer = self.receive()
        assert answer is not None
        assert answer[0] == number, answer
        return answer

    def has_ended(self) -> bool:
        """Whether the server has closed it, which may discard what was on its way."""
        poller = select.poll()
        poller.register(self.sock, select.POLLHUP)
        return bool(poller.poll(0))


class Ends:
    """A server's side of one tree, and the door to it."""

    def __init__(self, server: Server, name: str = "test") -> None:
        self.served = server.serve("0123456789abcdef", name)
        fd, self.variable = self.served.open()
        self.door = socket.socket(fileno=os.dup(fd))
        self.door.settimeout(DEADLINE)
        self.served.close_child_end()
        self.served.start()

    def knock(self, nonce: bytes = b"n" * 16) -> tuple[list[Any], list[int]]:
        self.door.send(nonce)
        data, fds, _, _ = socket.recv_fds(self.door, 4096, 4)
        return msgspec.msgpack.decode(data), fds

    def connect(self) -> Client:
        nonce = os.urandom(16)
        (echo, error), fds = self.knock(nonce)
        assert (echo, error) == (nonce, "")
        assert len(fds) == 1
        return Client(socket.socket(fileno=fds[0]))

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.served.close()
        self.door.close()
        eventually(lambda: not self.lanes and self.served._door is None, "the server's side closes")

    @property
    def lanes(self) -> list[Lane]:
        return list(self.served._lanes)
