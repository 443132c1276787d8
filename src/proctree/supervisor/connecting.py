"""A stream to somebody who may be slow, absent or hostile, within a time.

For a thread that may wait. Each step ends at the deadline, however little the other side gives at
a time: the socket's time-out is what is left of it, anew for each system call. Looking up a name is
the exception: getaddrinfo(3) takes as long as /etc/resolv.conf lets it.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from proctree.errors import errno_name
from proctree.process import fds
from proctree.supervisor.aside import describe, shorten

if TYPE_CHECKING:
    import ssl

    from _typeshed import WriteableBuffer

_LINGER_NONE = struct.pack("ii", 1, 0)


class Trouble(Exception):
    """What went wrong at which step, for people."""


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says at which step a system call failed.

    Raises:
        Trouble: for every OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, TimeoutError) and error.errno is None:
            raise Trouble(f"out of time at {what}") from None
        # Those of `socket` and `ssl` have numbers of their own, which mean nothing in errno(3).
        if type(error).__module__ == "builtins" and error.errno is not None:
            raise Trouble(f"{errno_name(error.errno)} at {what}") from None
        raise Trouble(f"{shorten(error.strerror or describe(error))} at {what}") from None


def show(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Stream:
    """A connected socket. Reading is bounded, by time and by size.

    Args:
        deadline: on the monotonic clock, for everything; it may be moved.
        room: how many bytes may be received in all.
    """

    def __init__(self, sock: socket.socket, deadline: float, room: int) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self.deadline = deadline
        self.room = room

    def _arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def connect(self, address: object) -> None:
        with doing("connect"):
            self._arm()
            self._sock.connect(address)  # type: ignore[arg-type]
            if _is_itself(self._sock):
                # No TIME_WAIT: that would keep the port from the child that is to listen there.
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
                raise Trouble("ECONNREFUSED at connect (it had reached itself)")

    def encrypt(self, context: ssl.SSLContext, host: str) -> None:
        with doing("the TLS handshake"):
            self._arm()
            wrapped = self._wrap(context, host)
            self._arm()
            wrapped.do_handshake()

    def _wrap(self, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        # Without the handshake, which would know of no deadline. What fails has closed the
        # descriptor already: nobody else may have its number before it is disowned.
        with fds.making():
            fds.disown(self._fd)
            try:
                wrapped = context.wrap_socket(
                    self._sock, server_hostname=host, do_handshake_on_connect=False
                )
            except BaseException:
                self._sock.close()
                self._fd = -1
                raise
            self._sock = wrapped
            fds.own(self._fd)
        return wrapped

    # -- what http.client asks of a socket

    def sendall(self, data: bytes) -> None:
        self._arm()
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def receive_into(self, buffer: WriteableBuffer) -> int:
        if self.room <= 0:
            raise Trouble("the answer is too long")
        self._arm()
        window = memoryview(buffer)[: self.room]
        size = self._sock.recv_into(window)
        self.room -= size
        return size

    def close(self) -> None:
        """http.client closes when it likes: nothing yet."""

    # -- the end

    def end(self) -> None:
        with fds.making():
            fds.disown(self._fd)
            self._sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._stream.receive_into(buffer)


def _new_socket(family: int, kind: int, protocol: int) -> socket.socket:
    with fds.making():
        sock = fds.lifted(socket.socket(family, kind, protocol))
        fds.own(sock.fileno())
        return sock


def _is_itself(sock: socket.socket) -> bool:
    """Nobody listens, and yet it is connected: the kernel gave us, as our own port, the very one
    that we called, and so a simultaneous open with ourselves (RFC 9293, 3.5) came about."""
    return sock.family in (socket.AF_INET, socket.AF_INET6) and (
        sock.getsockname() == sock.getpeername()
    )


def connect_to(
    family: int, kind: int, protocol: int, address: object, deadline: float, room: int = 0
) -> Stream:
    """A connection to one address.

    Raises:
        Trouble: there is none.
    """
    with doing("socket"):
        stream = Stream(_new_socket(family, kind, protocol), deadline, room)
    try:
        stream.connect(address)
    except BaseException:
        stream.end()
        raise
    return stream


def connect(host: str, port: int, deadline: float, room: int = 0) -> Stream:
    """A TCP connection to the first address of the host that accepts one; each of them may take its
    share of the time.

    Raises:
        Trouble: none does; says what each of them did.
    """
    with doing(f"looking up {host}"):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    troubles: list[tuple[str, str]] = []
    for index, (family, kind, protocol, _, address) in enumerate(found):
        now = time.monotonic()
        share = now + (deadline - now) / (len(found) - index)
        try:
            stream = connect_to(family, kind, protocol, address, share, room)
        except Trouble as trouble:
            troubles.append((str(trouble), show(str(address[0]), port)))
        else:
            stream.deadline = deadline
            return stream
    if len(troubles) == 1:
        raise Trouble(troubles[0][0])
    raise Trouble(shorten("; ".join(f"{trouble} to {where}" for trouble, where in troubles)))
