"""What is ours alone, and for us to use whatever the umask says. In a place that others can write
to, a directory may have been there first."""

from __future__ import annotations

import contextlib
import os
import stat

from proctree.errors import ProctreeError

_DIRECTORY = 0o700
_FILE = 0o600


class NotPrivate(ProctreeError):
    """It is not ours alone; the message names it, and says why and what to do."""


def check(path: str) -> None:
    """That it is a directory of ours, and closed to others.

    Raises:
        NotPrivate: it is not.
        OSError: it cannot be looked at.
    """
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise NotPrivate(f"{path} is not a directory: remove it")
    if info.st_uid != os.geteuid():
        raise NotPrivate(f"{path} belongs to uid {info.st_uid} and not to us: remove it")
    if info.st_mode & 0o077:
        raise NotPrivate(f"{path} is open to others (it must have mode 0700): chmod it")


def make(path: str) -> bool:
    """Makes it if need be, and checks it.

    Returns:
        Whether it was made.

    Raises:
        NotPrivate: it is not ours alone.
        OSError: it cannot be made.
    """
    made = False
    with contextlib.suppress(FileExistsError):
        make_directory(path)
        made = True
    check(path)
    return made


def make_directory(path: str) -> None:
    """A new one. A umask may take our own rights too: then they are given by chmod(2), which it
    does not touch. Raises OSError."""
    os.mkdir(path, _DIRECTORY)
    if os.lstat(path).st_mode & _DIRECTORY != _DIRECTORY:
        os.chmod(path, _DIRECTORY)


def create(path: str, flags: int, *, dir_fd: int | None = None) -> int:
    """A descriptor of a file that is made if need be; as `make_directory`.

    Args:
        flags: for open(2); O_CREAT is added.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(path, flags | os.O_CREAT, _FILE, dir_fd=dir_fd)
    try:
        # One that was there may be somebody else's, and was opened all the same.
        info = os.fstat(fd)
        if info.st_mode & _FILE != _FILE and info.st_uid == os.geteuid():
            os.fchmod(fd, _FILE)
    except BaseException:
        os.close(fd)
        raise
    return fd
