"""Directories that are ours alone: in a place that others can write to, one may have been there
first."""

from __future__ import annotations

import contextlib
import os
import stat

from proctree.errors import ProctreeError


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
        os.mkdir(path, 0o700)
        made = True
    check(path)
    return made
