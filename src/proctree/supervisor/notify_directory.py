"""Where the sockets are: a directory of this process, made when it is first needed and removed at
its end. What a crash leaves is removed by whoever makes the next one: each directory is locked
(flock(2)) while its process lives, so that one that can be locked is a dead one's.

It is beside the registry and not in it: that holds entries and nothing else, and may be closed to
the user that a tree runs as.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator

from proctree import registry
from proctree.process import fds

PREFIX = "proctree-notify-"
ADDRESS_MAX = 107
"""Bytes of a socket's path: unix(7), sun_path with its null byte has 108."""

NAME_MAX = 12
"""Bytes that are left for the name of a socket."""

TRIES = 16


class Directory:
    """One of them.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._count = 0

    def next_path(self) -> str:
        """A name that was not used before."""
        self._count += 1
        return f"{self.path}/{self._count:x}"

    def remove(self) -> None:
        """And what is in it."""
        _remove(self.path)
        fds.close(self._lock)


def _fits(path: str) -> bool:
    return len(os.fsencode(path)) + 1 + NAME_MAX <= ADDRESS_MAX


def _open_to_others(path: str) -> bool:
    """Whether every user can go through it, and through what is above it."""
    while True:
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
        if path == os.path.dirname(path):
            return True
        path = os.path.dirname(path)


def candidates(reachable: bool) -> Iterator[str]:
    """Directories that may have it in them."""
    for base in (os.path.dirname(registry.default_directory()), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        with contextlib.suppress(OSError):
            if not reachable or _open_to_others(os.path.realpath(base)):
                yield base


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def _lock(path: str) -> int:
    """A descriptor of the directory, locked.

    Raises:
        OSError: it is locked by its process, is somebody else's, or is gone.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there, here = os.stat(path, follow_symlinks=False), os.fstat(fd)
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise FileNotFoundError(errno.ENOENT, "it was replaced", path)
        if here.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is somebody else's", path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _clear(base: str) -> None:
    """Of what dead processes have left."""
    with contextlib.suppress(OSError):
        for name in os.listdir(base):
            if name.startswith(PREFIX):
                path = os.path.join(base, name)
                with contextlib.suppress(OSError):
                    fd = _lock(path)
                    try:
                        _remove(path)
                    finally:
                        os.close(fd)


def _make(base: str, reachable: bool) -> Directory:
    _clear(base)
    for _ in range(TRIES):
        path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        try:
            lock = fds.own(fds.above_stdio(_lock(path)))
        except (BlockingIOError, FileNotFoundError):
            continue  # somebody clears, and took it for a dead one's before we had locked it
        if reachable:
            os.chmod(path, 0o711)  # noqa: S103 - entered, and not listed
        return Directory(path, lock)
    raise FileExistsError(errno.EEXIST, "what is made there is taken away at once", base)


def make(reachable: bool) -> Directory:
    """A directory of our own, 0700, or 0711 if `reachable`, where every user can come to it; with
    the descriptor lock held.

    Raises:
        OSError: there is no place for it; says which ones were tried.
    """
    tried = []
    problem: int = errno.ENOENT
    for base in candidates(reachable):
        if not _fits(os.path.join(base, PREFIX + "12345678")):
            tried.append(f"{base} (too long for the address of a socket, unix(7))")
            problem = errno.ENAMETOOLONG
            continue
        try:
            return _make(base, reachable)
        except OSError as error:
            problem = error.errno or errno.EIO
            tried.append(f"{base} ({error.strerror})")
    text = "no directory for the notification sockets can be made: " + ", ".join(tried)
    raise OSError(problem, text)


_made: dict[bool, Directory] = {}


def get(*, reachable: bool = False) -> Directory:
    """The process's own; two at most, one for each kind.

    Raises:
        OSError: as `make`.
    """
    with fds.making():
        directory = _made.get(reachable)
        if directory is None or not os.path.isdir(directory.path):
            if directory is not None:
                del _made[reachable]
                directory.remove()
            directory = _made[reachable] = make(reachable)
        return directory


def _remove_all() -> None:
    while _made:
        _made.popitem()[1].remove()


atexit.register(_remove_all)
# It is not the forked child's, which makes its own.
fds.in_forked_child(_made.clear)
