"""The socket at which an attempt's warden is found again.

It is bound and reached through /proc/self/fd: a socket's address has room for 107 bytes (unix(7)),
and the path of an attempt may have more.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from proctree.process import fds

SOCKET_NAME = "control"
"""In the directory of an attempt."""

BACK_OFF = 0.005
"""Seconds between two tries."""


def _address(directory: int) -> str:
    return f"/proc/self/fd/{directory}/{SOCKET_NAME}"


def _socket() -> socket.socket:
    with fds.making():
        sock = fds.lifted(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        fds.own(sock.fileno())
    sock.setblocking(False)
    return sock


def bind(directory: int) -> socket.socket:
    """A socket with the name `control` in this directory, which it keeps wherever that is moved.
    Nobody listens yet: then connecting is refused. It is owned (fds.py). Raises OSError."""
    sock = _socket()
    try:
        sock.bind(_address(directory))
        # Who connects must be allowed to write (unix(7)), whatever the umask takes away.
        os.chmod(_address(directory), 0o700)
    except BaseException:
        fds.close(sock.detach())
        raise
    return sock


def _require_proc() -> None:
    """Without /proc nothing is found there, whatever there is."""
    if not os.path.exists("/proc/self/fd"):
        raise OSError(errno.ENXIO, "its socket is reached through /proc/self/fd: mount /proc")


def connect(place: str, patience: float) -> socket.socket:
    """A connection to the warden of an attempt.

    Args:
        place: the attempt's directory.
        patience: seconds for which a warden is waited for that has more to accept than fits its
            backlog. Nobody tells when there is room (connect(2), EAGAIN), so it is tried again.

    Returns:
        The socket, which does not block. It is owned: close it by `fds.close(sock.detach())`.

    Raises:
        ConnectionRefusedError: nobody listens: the warden has not begun to, or is dead.
        FileNotFoundError: there is no socket: the attempt has ended, or is no tree's.
        TimeoutError: the backlog stayed full.
        OSError: what else may go wrong.
    """
    due = time.monotonic() + patience
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sock = _socket()
        try:
            while True:
                try:
                    sock.connect(_address(directory))
                    return sock
                except FileNotFoundError:
                    _require_proc()
                    raise
                except (BlockingIOError, InterruptedError):
                    if time.monotonic() >= due:
                        text = f"the warden did not accept the connection within {patience:g} s"
                        raise TimeoutError(
                            errno.ETIMEDOUT, text, os.path.join(place, SOCKET_NAME)
                        ) from None
                    time.sleep(BACK_OFF)
        except BaseException:
            fds.close(sock.detach())
            raise
    finally:
        os.close(directory)
