"""What a key's directory looks like, and what can be read in it without a lock.

    KEYDIR/             percent-encoded key (keys.py)
        lock            whose flock(2) is the claim
        key             a long key, which the directory's name does not say
        attempts/N/     an attempt: request, exit (exit~ before that), handle, cancelled, cursor,
                        out.log, err.log, control. It is made as .N.new and gets its name when it
                        is whole
        unreadable/     N.TIME: attempts of which something could not be read

Reading is wait-free: every change becomes visible by one rename(2), whoever makes it and wherever
it is killed. What is forgotten is renamed as a whole before anything of it is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from proctree.durable import files, keys, recording
from proctree.durable.files import step
from proctree.durable.recording import Exit, Request, Unreadable
from proctree.durable.store import Attempt

T = TypeVar("T")

LOCK = "lock"
KEY = "key"
ATTEMPTS = "attempts"
UNREADABLE = "unreadable"

REQUEST = "request"
EXIT = "exit"
HANDLE = "handle"
CANCELLED = "cancelled"
OUT = "out.log"
ERR = "err.log"

_ATTEMPT = re.compile(r"([1-9][0-9]{0,17})")
_BEGINNING = re.compile(r"\.([1-9][0-9]{0,17})\.new")
_ASIDE = re.compile(r"([1-9][0-9]{0,17})\.[0-9]+")

FORGOTTEN = ".forgotten."
"""With a number behind it, the name of a key's directory that is being removed."""

READING_TRIES = 64
"""Each other one means that somebody has forgotten the key in the middle of the one before."""


class KeyDirectory(NamedTuple):
    """Where everything of a key is; whether it is there is another matter.

    Attributes:
        key: the key.
        path: its directory.
    """

    key: str
    path: str

    @property
    def lock(self) -> str:
        return os.path.join(self.path, LOCK)

    @property
    def attempts(self) -> str:
        return os.path.join(self.path, ATTEMPTS)

    @property
    def unreadable(self) -> str:
        return os.path.join(self.path, UNREADABLE)

    def attempt(self, number: int) -> str:
        return os.path.join(self.attempts, str(number))


def at(store: str, key: str) -> KeyDirectory:
    """Raises TypeError and ValueError, as `keys.check_key`."""
    return KeyDirectory(key, os.path.join(store, keys.to_name(keys.check_key(key))))


class Listed(NamedTuple):
    """The names in a key's directory.

    Attributes:
        attempts: number -> path.
        aside: the same of what was kept aside.
        beginnings: paths of attempts that never got their name.
        foreign: (path, why) of what is not ours.
        highest: the highest number that is given or taken, by whatever; 0 if there is none.
    """

    attempts: dict[int, str]
    aside: dict[int, str]
    beginnings: list[str]
    foreign: list[tuple[str, str]]
    highest: int


def _names(folder: str) -> list[str]:
    with step("list", folder):
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []


def _not_ours(path: str) -> str | None:
    """Why it is left alone; None for a directory of ours, and for what is gone."""
    with step("look", path):
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return None
    if not stat.S_ISDIR(info.st_mode):
        return "not a directory"
    return None if info.st_uid == os.geteuid() else f"belongs to uid {info.st_uid}"


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.fullmatch(name)
    return int(match[1]) if match else 0


def listed(place: KeyDirectory) -> Listed:
    """Raises StoreUnusable."""
    attempts: dict[int, str] = {}
    aside: dict[int, str] = {}
    beginnings: list[str] = []
    foreign: list[tuple[str, str]] = []
    highest = 0
    # In this order: what is kept aside in between is in the second list, if not in both.
    for folder, pattern, found in (
        (place.attempts, _ATTEMPT, attempts),
        (place.unreadable, _ASIDE, aside),
    ):
        for name in _names(folder):
            path = os.path.join(folder, name)
            number, begun = _number(pattern, name), _number(_BEGINNING, name)
            highest = max(highest, number, begun)
            if why := _not_ours(path):
                foreign.append((path, why))
            elif number:
                found[number] = path
            elif begun:
                beginnings.append(path)
            else:
                foreign.append((path, "not a name of ours"))
    return Listed(attempts, aside, beginnings, foreign, highest)


# -- one attempt


def _decoded(directory: int, name: str, decode: Callable[[bytes], T]) -> tuple[T | None, str]:
    """What the record says, or None and the trouble with it.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return decode(files.read(directory, name).rstrip(b"\0")), ""
    except Unreadable as error:
        return None, f"{name}: {error}"


def _request(directory: int) -> tuple[Request | None, str]:
    try:
        return _decoded(directory, REQUEST, Request.decode)
    except FileNotFoundError:
        return None, f"{REQUEST}: there is none"


def _exit(directory: int) -> tuple[Exit | None, str]:
    """The record of the end, and the trouble with it; neither when there is none."""
    with contextlib.suppress(FileNotFoundError):
        return _decoded(directory, EXIT, Exit.decode)
    with contextlib.suppress(FileNotFoundError):
        # Whoever wrote it was killed before it could rename it, or is about to. Behind the record
        # may be the zeros of the room that was taken for it. One that is not whole is none yet.
        unnamed, _ = _decoded(directory, EXIT + "~", Exit.decode)
        if unnamed is not None:
            return unnamed, ""
    # It may have got its name between the two.
    with contextlib.suppress(FileNotFoundError):
        return _decoded(directory, EXIT, Exit.decode)
    return None, ""


def encode_handle(handle: str) -> bytes:
    return recording.encode("handle", {"handle": handle})


def _decode_handle(data: bytes) -> str:
    try:
        return recording.decode("handle", data)["handle"]
    except KeyError:
        raise Unreadable("a field is missing") from None


def handle(directory: int) -> tuple[str | None, str]:
    """What `submit` answered, and the trouble with it; neither when there is none.

    An unreadable one does not make the attempt unreadable: that would have the job submitted once
    more, where without a handle it is looked for. Raises OSError.
    """
    try:
        return _decoded(directory, HANDLE, _decode_handle)
    except FileNotFoundError:
        return None, ""


def read_attempt(number: int, path: str) -> Attempt | None:
    """What is recorded of it; None when it has gone to another place.

    Raises:
        StoreUnusable: it cannot be read, which says nothing about it.
    """
    with step("read", path):
        try:
            with files.opened(path) as fd:
                request, trouble = _request(fd)
                how, exit_trouble = _exit(fd)
                known, _ = handle(fd)
                cancelled = os.access(CANCELLED, os.F_OK, dir_fd=fd)
        except FileNotFoundError:
            return None
    both = "; ".join(why for why in (trouble, exit_trouble) if why)
    return Attempt(number, request, known, how, both, path, cancelled)


# -- a key


def _read(place: KeyDirectory) -> list[Attempt]:
    names = listed(place)
    found: dict[int, Attempt] = {}
    moved = False
    for number, path in names.attempts.items():
        attempt = read_attempt(number, path)
        if attempt is not None:
            found[number] = attempt
        else:
            moved = True
    aside = listed(place).aside if moved else names.aside
    for number, path in aside.items():
        attempt = None if number in found else read_attempt(number, path)
        if attempt is not None:
            found[number] = attempt._replace(trouble=attempt.trouble or "it was kept aside")
    return [found[number] for number in sorted(found)]


def _is_still(place: KeyDirectory, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(place.path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def read_attempts(place: KeyDirectory) -> list[Attempt]:
    """All that are recorded, oldest first; with a claim or without.

    Raises:
        StoreUnusable: it cannot be read.
    """
    for _ in range(READING_TRIES):
        with step("read", place.path):
            try:
                with files.opened(place.path) as fd:
                    found = _read(place)
                    # Otherwise it was forgotten meanwhile, and what was read is neither all that
                    # there was nor all that there is.
                    if _is_still(place, fd):
                        return found
            except FileNotFoundError:
                return []
    return []


def has_attempts(place: KeyDirectory) -> bool:
    """Raises StoreUnusable."""
    names = listed(place)
    return bool(names.attempts or names.aside)


def key_of(store: str, name: str) -> str | None:
    """The key of a directory in the store; None when it is none of ours."""
    if keys.says_all(name):
        return keys.from_name(name)
    path = os.path.join(store, name)
    with step("read", path):
        try:
            with files.opened(path) as fd:
                key = recording.decode(KEY, files.read(fd, KEY))["key"]
                return key if keys.to_name(keys.check_key(key)) == name else None
        except (FileNotFoundError, NotADirectoryError, Unreadable, KeyError, ValueError):
            return None


def write_key(place: KeyDirectory) -> None:
    """Where the directory's name does not say all of it. Raises StoreUnusable."""
    name = os.path.basename(place.path)
    if keys.says_all(name) or os.path.lexists(os.path.join(place.path, KEY)):
        return
    with step("write", os.path.join(place.path, KEY)), files.opened(place.path) as fd:
        files.write(fd, KEY, recording.encode(KEY, {"key": place.key}))
