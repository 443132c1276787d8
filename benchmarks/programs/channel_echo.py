"""The other end of a channel, as cheap as Python makes it: answers every request with its own key.

Whoever is measured, ours or a peer, is measured against this program, which inherits one end of a
socketpair and runs until the other end is closed. A frame is four bytes of length, big-endian, and
that many of msgpack: a request `[id, body]` or `[id, body, anything]`, an answer
`[id, body, null]`. Both bodies are typed, that is tagged Structs. All that has come is read at once
and answered at once.

With --delay each answer is sent so long after its request came, however many wait at a time. With
--raw there are no frames: N bytes are sent back for every N bytes that came.
"""

from __future__ import annotations

import argparse
import ctypes
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

BLOCK = 256 * 1024
HEADER = 4


class GetVariable(msgspec.Struct, tag_field="type", tag=True):
    key: str


class PutVariable(msgspec.Struct, tag_field="type", tag=True):
    key: str
    value: str | None = None
    description: str | None = None


class DeleteVariable(msgspec.Struct, tag_field="type", tag=True):
    key: str


class VariableResult(msgspec.Struct, tag_field="type", tag=True):
    key: str
    value: str | None


class Request(msgspec.Struct, array_like=True):
    id: int
    body: GetVariable | PutVariable | DeleteVariable
    context: Any = None


class Answer(msgspec.Struct, array_like=True):
    id: int
    body: VariableResult | None = None
    error: dict[str, Any] | None = None


class First(msgspec.Struct, array_like=True):
    """What a supervisor sends unasked before it answers anything."""

    id: int
    body: dict[str, Any]
    error: None = None


_decode = msgspec.msgpack.Decoder(Request).decode
_encoder = msgspec.msgpack.Encoder()


def _frame(message: Answer | First) -> bytearray:
    buffer = bytearray(64)
    _encoder.encode_into(message, buffer, HEADER)
    buffer[:HEADER] = (len(buffer) - HEADER).to_bytes(HEADER, "big")
    return buffer


class Frames:
    """Requests in, answers out."""

    def __init__(self) -> None:
        self._rest = b""

    def answers(self, data: bytes) -> list[bytearray]:
        if self._rest:
            data = self._rest + data
        view = memoryview(data)
        answers = []
        position, length = 0, len(data)
        while length - position >= HEADER:
            start = position + HEADER
            end = start + int.from_bytes(view[position:start], "big")
            if end > length:
                break
            request = _decode(view[start:end])
            key = request.body.key
            answers.append(_frame(Answer(request.id, VariableResult(key, key))))
            position = end
        self._rest = data[position:]
        return answers


class Raw:
    """So many bytes in, so many out."""

    def __init__(self, size: int) -> None:
        self._answer = bytearray(size)
        self._size = size
        self._waiting = 0

    def answers(self, data: bytes) -> list[bytearray]:
        count, self._waiting = divmod(self._waiting + len(data), self._size)
        return [self._answer] * count


Answers = Callable[[bytes], list[bytearray]]


def _send(connection: socket.socket, out: bytes) -> bytes:
    """Sends what can be sent without waiting, and returns the rest."""
    try:
        return out[connection.send(out, socket.MSG_DONTWAIT) :]
    except BlockingIOError:
        return out


def serve(connection: socket.socket, answers: Answers) -> None:
    """Answers at once."""
    while data := connection.recv(BLOCK):
        out = _send(connection, b"".join(answers(data)))
        while out:
            # Read on while it cannot be sent: the other end may do nothing but send just now.
            readable, writable, _ = select.select([connection], [connection], [])
            if readable:
                if not (data := connection.recv(BLOCK)):
                    connection.sendall(out)
                    return
                out += b"".join(answers(data))
            if writable:
                out = _send(connection, out)


def serve_late(connection: socket.socket, answers: Answers, delay: float) -> None:
    """Answers each `delay` seconds after it came."""
    # A sleep may last 50 us longer otherwise: PR_SET_TIMERSLACK of prctl(2).
    ctypes.CDLL(None).prctl(29, 1)
    waiting: deque[tuple[float, bytes]] = deque()
    out = b""
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([connection], [connection] if out else [], [], timeout)
        if readable:
            if not (data := connection.recv(BLOCK)):
                return
            waiting.append((time.monotonic() + delay, b"".join(answers(data))))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            out += waiting.popleft()[1]
        if out:
            out = _send(connection, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, default=0, help="the inherited socket")
    parser.add_argument("--delay", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--raw", type=int, metavar="BYTES")
    parser.add_argument("--first", metavar="TYPE", help="the type of a message to send unasked")
    arguments = parser.parse_args()
    with socket.socket(fileno=arguments.fd) as connection:
        answers = (Raw(arguments.raw) if arguments.raw else Frames()).answers
        try:
            if arguments.first:
                connection.sendall(_frame(First(0, {"type": arguments.first})))
            if arguments.delay:
                serve_late(connection, answers, arguments.delay)
            else:
                serve(connection, answers)
        except (BrokenPipeError, ConnectionResetError):
            pass


if __name__ == "__main__":
    main()
