"""inotify(7): which files were written to. Through libc, as Python has no way of its own."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Any, NamedTuple

from proctree.process import fds

IN_MODIFY = 0x00000002
IN_Q_OVERFLOW = 0x00004000

_EVENT = struct.Struct("iIII")
"""struct inotify_event without its name: wd, mask, cookie, len."""


class Changed(NamedTuple):
    """One event.

    Attributes:
        watch: the number that `add_watch` gave; -1 for `IN_Q_OVERFLOW`.
        mask: what happened.
    """

    watch: int
    mask: int


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def make() -> int:
    """A new instance: an owned, non-blocking, close-on-exec descriptor (`fds.own`).

    Raises:
        OSError: EMFILE: this user has as many instances as /proc/sys/fs/inotify/max_user_instances
            allows (128 by default), or this process as many descriptors as it may have; ENFILE,
            ENOMEM.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC  # IN_NONBLOCK, IN_CLOEXEC: inotify_init(2)
    with fds.making():
        fd = _checked(_libc().inotify_init1(flags), "inotify_init1")
        return fds.own(fds.above_stdio(fd))


def add_watch(instance: int, fd: int) -> int:
    """Watches the file that `fd` is, whatever it is called by now, for writing and truncation.

    A file is watched once by an instance: whoever asks again gets the same number.

    Raises:
        OSError: ENOSPC: no more watches for this user (/proc/sys/fs/inotify/max_user_watches);
            ENOMEM.
    """
    path = f"/proc/self/fd/{fd}".encode()
    return _checked(_libc().inotify_add_watch(instance, path, IN_MODIFY), "inotify_add_watch")


def remove_watch(instance: int, watch: int) -> None:
    """Raises OSError: there is no such watch."""
    _checked(_libc().inotify_rm_watch(instance, watch), "inotify_rm_watch")


def read(instance: int, size: int) -> list[Changed]:
    """What has happened since, as much as goes into `size` bytes; [] if nothing has.

    Raises:
        OSError: of read(2).
    """
    try:
        data = os.read(instance, size)
    except BlockingIOError:
        return []
    return parse(data)


def parse(data: bytes) -> list[Changed]:
    """The events of one read(2), which gives whole ones only."""
    found, at = [], 0
    while at < len(data):
        watch, mask, _cookie, length = _EVENT.unpack_from(data, at)
        found.append(Changed(watch, mask))
        at += _EVENT.size + length
    return found
