"""Small files that are there after any crash, whole or not at all, and what to say when they cannot
be written.

A file gets its name when all of it is on the disk (fsync(2) before rename(2)), and has it for good
when its directory is (fsync(2) of that). What is being written is called `NAME~`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator

from proctree.durable.errors import StoreUnusable
from proctree.durable.recording import Unreadable
from proctree.errors import errno_name
from proctree.process import fds, private
from proctree.process.private import NotPrivate

RECORD_MAX = 1 << 20
"""Bytes of a record at most: what is longer was not written by us."""

ROOM = 4096
"""Bytes that are taken for a record beforehand: more than an exit record can have."""

_ADVICE = {
    errno.EROFS: "its file system is mounted read-only: mount it writable, or take another store",
    errno.ENOSPC: "its file system is full: make room",
    errno.EDQUOT: "the quota is used up: make room",
    errno.EACCES: "it, or a directory above it, is closed to us: chmod it, or take another store",
    errno.EPERM: "it, or a directory above it, is closed to us: chmod it, or take another store",
    errno.ENOTDIR: "it, or something above it, is not a directory: remove that",
    errno.ELOOP: "it, or something above it, is a symbolic link where none should be: remove that",
    errno.ENAMETOOLONG: "take a store with a shorter path",
    errno.EMFILE: "raise the limit on open files (RLIMIT_NOFILE, getrlimit(2))",
    errno.ENFILE: "the whole machine has too many open files (/proc/sys/fs/file-max, proc(5))",
    errno.EIO: "the disk fails: see the kernel's log",
}


def unusable(step: str, path: str, error: OSError) -> StoreUnusable:
    number = error.errno or 0
    advice = _ADVICE.get(number, os.strerror(number))
    return StoreUnusable(f"{path}: {errno_name(number)} at step {step!r}: {advice}")


@contextlib.contextmanager
def step(name: str, path: str, *, absent: bool = False) -> Iterator[None]:
    """What goes wrong with `path` is StoreUnusable, and says at which step; with `absent` it may be
    FileNotFoundError too."""
    try:
        yield
    except FileNotFoundError as error:
        if absent:
            raise
        raise unusable(name, path, error) from error
    except NotPrivate as error:
        raise StoreUnusable(f"step {name!r}: {error}") from None
    except OSError as error:
        raise unusable(name, path, error) from error


@contextlib.contextmanager
def opened(path: str, *, dir_fd: int | None = None) -> Iterator[int]:
    """A directory's descriptor. It is not followed when it is a symbolic link.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_directory(fd: int) -> None:
    """Puts on the disk what names it has. Raises OSError."""
    try:
        os.fsync(fd)
    except OSError as error:
        # Of a file system that knows no such thing for directories (fsync(2)).
        if error.errno != errno.EINVAL:
            raise


def sync(path: str) -> None:
    """The same by its path, which may be a symbolic link. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory(fd)
    finally:
        os.close(fd)


def _create(name: str, directory: int) -> int:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    return private.create(name, flags, dir_fd=directory)


def write(directory: int, name: str, data: bytes, *, sync: bool = True) -> None:
    """Writes a file, whole or not at all, and with `sync` for good. Raises OSError."""
    # Without O_TRUNC, which would give back the room that was taken for it.
    fd = _create(name + "~", directory)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], done)
        os.ftruncate(fd, len(data))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(name + "~", name, src_dir_fd=directory, dst_dir_fd=directory)
    if sync:
        sync_directory(directory)


def give_name(directory: int, name: str) -> bool:
    """Finishes what `write` had begun, with all that it would have written: puts it on the disk and
    gives it its name, if it has none. Raises OSError.

    Returns:
        Whether it had none.
    """
    try:
        fd = os.open(name + "~", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(name + "~", name, src_dir_fd=directory, dst_dir_fd=directory)
    sync_directory(directory)
    return True


def make_room(directory: int, name: str, *, sync: bool = True) -> None:
    """Takes the room on the disk that a `write` of this name will need. Raises OSError."""
    fd = _create(name + "~", directory)
    try:
        try:
            os.posix_fallocate(fd, 0, ROOM)
        except OSError as error:
            # The C library's way out where the file system has no such call is not everybody's.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.pwrite(fd, bytes(ROOM), 0)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def make_empty(directory: int, name: str) -> None:
    """Raises OSError."""
    os.close(_create(name, directory))


def read(directory: int, name: str) -> bytes:
    """All of a file.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is not a file of ours, or the disk cannot give it back.
        OSError: we cannot read it, which says nothing about it.
    """
    # O_NONBLOCK: the opening of a FIFO would wait for somebody who writes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory)
        try:
            return _read(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EIO, errno.EAGAIN):
            raise Unreadable(f"{errno_name(error.errno)}: not a file that can be read") from None
        raise


def _read(fd: int) -> bytes:
    parts, length = [], 0
    while part := os.read(fd, 65536):
        parts.append(part)
        length += len(part)
        if length > RECORD_MAX:
            raise Unreadable(f"longer than {RECORD_MAX} bytes")
    return b"".join(parts)


def is_written(path: str) -> bool:
    """Whether somebody on this machine has it open for writing, whatever namespace they live in: a
    read lease is refused then (fcntl(2), Leases).

    Raises:
        OSError: EINVAL: this file system has no leases, or EACCES: it is not ours: it cannot be
            said.
    """
    with fds.making():  # no fork of ours in between, in which the lease would live on
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags)
        try:
            # Whoever opens it in this moment has the holder of the lease told: by a signal that
            # is ignored by default, and not by SIGIO, which kills.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False


def remove(path: str) -> None:
    """A directory with all that is in it, whatever it is; what is gone already is no trouble.
    Symbolic links are removed and not followed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        for _, folders, names, fd in os.fwalk(path, topdown=False, onerror=_onerror):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
            for name in folders:
                _remove_folder(name, fd)
        os.rmdir(path)


def _onerror(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_folder(name: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(name, dir_fd=fd)
        except NotADirectoryError:  # a symbolic link to one is listed with them
            os.unlink(name, dir_fd=fd)
