"""A client that sends any bytes, to a real server: it never raises, goes on answering others, and
keeps nothing. The first byte says how it is sent, the second where it is cut."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["proctree.channel"]):
    from channel_ends import Ends, eventually, frame
    from proctree import events
    from proctree.channel import Message, Server

CONNECTIONS = 8
MEGABYTES = 150
"""More than this is not taken beyond what it began with."""

defects: list[str] = []


def emit(_level: str, event: str, fields: dict[str, Any]) -> None:
    if event == "loop.defect":
        defects.append(f"{fields}\n{traceback.format_exc()}")


events._emit = emit
threading.excepthook = lambda args: defects.append(
    "".join(traceback.format_exception(args.exc_value))
)


class Ask(Message):
    key: str
    more: dict[str, int] | None = None


async def in_a_task(request: Any, _caller: Any) -> Any:
    return request


server = Server(max_frame=4096, max_connections=CONNECTIONS, max_in_flight=4)
server.handle(Ask, lambda request, _: request, inline=True)
server.handle("thread", lambda request, _: request)
server.handle("task", in_a_task)
ends = Ends(server)
well_behaved = ends.connect()
asked = 0
began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check() -> None:
    """Somebody else is answered, by its own answer, and nothing has piled up."""
    global asked
    asked += 1
    key = f"k{asked}"
    answer = well_behaved.ask(asked, {"type": "Ask", "key": key})
    assert answer[1]["key"] == key
    assert not defects, defects[0]
    assert len(ends.lanes) <= CONNECTIONS
    assert threading.active_count() < 40
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began
    assert taken < MEGABYTES << 10, f"{taken} KiB"


def knock(data: bytes) -> None:
    with contextlib.suppress(BlockingIOError):
        # An empty message is how a SEQPACKET socket says its end: the tree would be shut out.
        ends.door.send(data or b"x", socket.MSG_DONTWAIT)
    eventually(answered, "the door answers")


def answered() -> bool:
    """Takes one answer: whoever sends what would do as a nonce is connected, too."""
    ends.door.setblocking(False)
    try:
        _, fds, _, _ = socket.recv_fds(ends.door, 8192, 4)
    except BlockingIOError:
        return False
    finally:
        ends.door.settimeout(30)
    for fd in fds:
        socket.socket(fileno=fd).close()
    return True


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    how, step, data = data[0], 1 + 16 * data[1], data[2:]
    if how & 0xF0 == 0xF0:
        knock(data)
    else:
        with ends.connect() as client:
            if how & 8:
                data = frame([1, {"type": "thread", "key": "x"}]) + data
            client.sock.settimeout(None)
            with contextlib.suppress(OSError):
                for at in range(0, len(data), step):
                    client.offer(data[at : at + step])
                if how & 1:
                    client.sock.shutdown(socket.SHUT_WR)
                if how & 2:
                    client.sock.setblocking(False)
                    client.sock.recv(1 << 16)
    check()
    if how & 4:
        settled = lambda: len(ends.lanes) == 1 and not ends.served._under_way  # noqa: E731
        eventually(lambda: defects or settled(), "who has gone is forgotten, with its requests")
        assert not defects, defects[0]


atheris.Setup(sys.argv, one)
atheris.Fuzz()
