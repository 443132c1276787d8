"""A server on loopback that does with each connection what it was told, right or wrong."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from integration.conftest import DEADLINE

Behaviour = Callable[["Server", socket.socket], None]


class Server:
    """The behaviours in turn, the last one again and again; each connection on a thread."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = behaviours
        self._changed = threading.Condition()
        self.requests: list[bytes] = []
        self.request_of: dict[socket.socket, bytes] = {}
        self.over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/beat?run=7"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            behaviour = self._behaviours[min(len(self._threads), len(self._behaviours) - 1)]
            thread = threading.Thread(target=self._serve, args=(sock, behaviour))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, behaviour: Behaviour) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(DEADLINE)
            request = self._read(sock)
            with self._changed:
                self.requests.append(request)
                self.request_of[sock] = request
                self._changed.notify_all()
            behaviour(self, sock)

    @staticmethod
    def _read(sock: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            data = sock.recv(65536)
            if not data:
                return request
            request += data
        head, _, body = request.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                while len(body) < int(value):
                    body += sock.recv(65536)
        return head + b"\r\n\r\n" + body

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, DEADLINE)

    def close(self) -> None:
        self.over.set()
        # close(2) alone does not wake an accept(2) that sleeps.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def serving(*behaviours: Behaviour) -> Iterator[Server]:
    server = Server(*behaviours)
    try:
        yield server
    finally:
        server.close()


def status(line: str, *headers: str, body: bytes = b"") -> Behaviour:
    """An answer by the book."""

    def answer(_server: Server, sock: socket.socket) -> None:
        head = [f"HTTP/1.1 {line}", *headers, f"Content-Length: {len(body)}", "", ""]
        sock.sendall("\r\n".join(head).encode() + body)

    return answer


def raw(data: bytes) -> Behaviour:
    """These bytes, and the end of the connection."""
    return lambda _server, sock: sock.sendall(data)


def closing(_server: Server, _sock: socket.socket) -> None:
    """No answer."""


def resetting(_server: Server, sock: socket.socket) -> None:
    """SO_LINGER with 0 seconds: close(2) sends a reset (socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _until_gone(server: Server, sock: socket.socket) -> None:
    """Until the client goes away, or the server has to."""
    sock.settimeout(0.05)
    while not server.over.is_set():
        with contextlib.suppress(TimeoutError):
            if not sock.recv(1):
                return


def hanging(server: Server, sock: socket.socket) -> None:
    """Neither an answer nor an end."""
    _until_gone(server, sock)


def hanging_after(data: bytes) -> Behaviour:
    """These bytes, and then neither more nor an end."""

    def answer(server: Server, sock: socket.socket) -> None:
        sock.sendall(data)
        _until_gone(server, sock)

    return answer


def dribbling(server: Server, sock: socket.socket) -> None:
    """The head of an answer a byte at a time, and without an end."""
    sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while not server.over.wait(0.02):
        sock.sendall(b"x")


def flooding(server: Server, sock: socket.socket) -> None:
    """Provisional answers without an end."""
    while not server.over.is_set():
        sock.sendall(b"HTTP/1.1 100 Continue\r\n" + b"X: " + b"y" * 4000 + b"\r\n\r\n")


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody gets meanwhile who does not ask for it with
    SO_REUSEPORT."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
