"""The descriptors that belong to supervision, and what a fork may do with them.

Two things go wrong when a host program forks while trees run. The child inherits copies of our
ends of the trees' pipes, so that a tree's standard input never ends and a closed reader is never
noticed; and it inherits the epoll descriptor, whose registrations it shares with the parent. So
every descriptor that we keep is known here, and a forked child closes them all: by close(2) alone,
since an EPOLL_CTL_DEL in the child would take the registration away from the parent (epoll(7), Q6).

The lock closes the gap between a descriptor's making and its registration: no fork of this
interpreter, ours or the host's, falls into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable, Iterator

_owned: set[int] = set()
_files: list[weakref.ref[File]] = []
_spared: tuple[int, ...] = ()
_kept: list[File] = []
"""In a forked child: the end of such an object would close what is not its own any more."""
_lock = threading.RLock()
_after_fork: list[Callable[[], None]] = []


def making() -> contextlib.AbstractContextManager[object]:
    """The lock to hold while descriptors are made, handed to children, and owned."""
    return _lock


def own(fd: int) -> int:
    """Says that `fd` stays with this process and must not live on in a forked child."""
    _owned.add(fd)
    return fd


def close(fd: int) -> None:
    """Closes an owned or a plain descriptor."""
    # Forgotten before it is closed: afterwards the number may be somebody else's.
    _owned.discard(fd)
    os.close(fd)


def disown(fd: int) -> None:
    """Forgets an owned descriptor that somebody else closes."""
    _owned.discard(fd)


class File(io.FileIO):
    """An owned descriptor that is closed when nobody refers to it any more, if not before: an
    exception that a signal handler raises may come between any call and its `finally`. It must not
    come here instead, where it would be lost: so no `__del__`, and nothing that a WeakSet calls.

    Made with the lock.

    Args:
        fd: open for reading and writing, close-on-exec. It is the object's from now on.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "r+")
        _files[:] = [known for known in _files if known() is not None]
        _files.append(weakref.ref(self))


@contextlib.contextmanager
def sparing(numbers: tuple[int, ...]) -> Iterator[None]:
    """With the lock: a child that is forked in here keeps these owned ones open. They are its own
    then, by their numbers."""
    global _spared
    _spared = numbers
    try:
        yield
    finally:
        _spared = ()


def above_stdio(fd: int) -> int:
    """The same file at a number above 2; `fd` itself is closed if it had to move.

    A host program that runs with its standard streams closed gets their numbers for new files,
    and those would be written over when the child's standard streams are put in place.
    """
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def lifted(sock: socket.socket) -> socket.socket:
    """As `above_stdio`; `sock` itself is used up."""
    family, kind, protocol = sock.family, sock.type, sock.proto
    # What is not given here is asked for by getsockopt(2), and nobody has the number if that fails.
    return socket.socket(family, kind, protocol, fileno=above_stdio(sock.detach()))


def pipe() -> tuple[int, int]:
    """A close-on-exec pipe (read end, write end), both above the standard streams."""
    reader, writer = os.pipe()
    return above_stdio(reader), above_stdio(writer)


def write_all(fd: int, data: bytes) -> None:
    """Writes everything, and waits for whoever reads it."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # O_NONBLOCK belongs to the open file: whoever else has it may have set that, as an ssh
            # that shares our terminal does.
            room = select.poll()
            room.register(fd, select.POLLOUT)
            room.poll()


def memory(data: bytes) -> int:
    """A close-on-exec descriptor, above the standard streams, of a file in memory that holds
    `data` (memfd_create(2))."""
    fd = above_stdio(os.memfd_create("proctree", os.MFD_CLOEXEC))
    try:
        write_all(fd, data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def in_forked_child(function: Callable[[], None]) -> None:
    """Calls `function` in every child that this interpreter forks, after the descriptors."""
    _after_fork.append(function)


def _before() -> None:
    _lock.acquire()


def _parent() -> None:
    _lock.release()


def _child() -> None:
    # A new one: the thread that forked may hold the old one several times over, as it does when we
    # fork a function ourselves, and no other thread here would ever get it.
    global _lock
    _lock = threading.RLock()
    for fd in _owned.difference(_spared):
        with contextlib.suppress(OSError):
            os.close(fd)
    _owned.clear()
    for file in [file for known in _files if (file := known()) and not file.closed]:
        if file.fileno() in _spared:
            _kept.append(file)
        else:
            with contextlib.suppress(OSError):
                file.close()
    _files.clear()
    for function in _after_fork:
        function()


os.register_at_fork(before=_before, after_in_parent=_parent, after_in_child=_child)
