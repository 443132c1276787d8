"""The records of this machine, in a directory of the user's; who has a key is said by a lock of the
kernel's, which ends with its last holder, however that ends.

What the directories look like is written in folders.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from typing import TYPE_CHECKING

from proctree import events
from proctree.containment import meeting
from proctree.durable import files, folders, recording
from proctree.durable.errors import StillRunning, StoreUnusable, UnknownKey
from proctree.durable.files import step
from proctree.durable.folders import KeyDirectory
from proctree.durable.store import Attempt, Claim, Store
from proctree.process import fds, private

if TYPE_CHECKING:
    import socket

    from proctree.command import StrPath
    from proctree.durable.recording import Exit, Request

PROBES_SECONDS = 2.0
"""For how long a claim waits for those who only look whether a key is claimed. Each holds the lock
for two system calls, unless it is stopped between them."""


def default_path() -> str:
    """`$XDG_STATE_HOME/proctree/durable`, else `~/.local/state/proctree/durable`."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(_home(), ".local", "state")
    return os.path.join(state, "proctree", "durable")


def _home() -> str:
    home = os.environ.get("HOME", "")
    if os.path.isabs(home):
        return home
    import pwd  # rarely needed

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        raise StoreUnusable(
            f"there is no place for the records: HOME is not set, and uid {os.geteuid()} is not in "
            "the password database; set XDG_STATE_HOME, or pass a store"
        ) from None


# -- the lock


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(fd: int) -> bool:
    """Whether we have got the lock. Who only looks (`_is_held`) has it shared for a moment, and
    must not make a claim fail: with them, but not with somebody who has claimed, it can be shared.
    It is given up before the next try, since it may be a claim like ours that is in the way."""
    due = time.monotonic() + PROBES_SECONDS
    while not _try_flock(fd, fcntl.LOCK_EX):
        if not _try_flock(fd, fcntl.LOCK_SH) or time.monotonic() > due:
            return False
        fcntl.flock(fd, fcntl.LOCK_UN)  # nobody shares this open file: no warden has it yet
        time.sleep(random.uniform(0, 0.001))  # noqa: S311
    return True


def _is_held(path: str) -> bool:
    """Whether somebody has claimed it.

    flock(2) can be tried but not asked. /proc/locks (proc_locks(5)) could be, but it leaves out, in
    a PID namespace, a lock whose taker has ended, as a supervisor that crashed has while its warden
    holds the lock on; and its device numbers are not those of stat(2) on every file system. So the
    lock is taken, shared: that fails for a claim and for nothing else, and `_take` knows of it.
    """
    # No fork of ours in between, in which the lock would live on.
    with fds.making():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        try:
            return not _try_flock(fd, fcntl.LOCK_SH) and _same_file(fd, path)
        finally:
            os.close(fd)


def _open_lock(path: str) -> fds.File:
    with fds.making():
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return fds.File(fds.above_stdio(private.create(path, flags)))


# -- the store


def _make_parents(path: str) -> None:
    """As the XDG Base Directory Specification wants them: closed to others."""
    parent = os.path.dirname(path)
    if os.path.isdir(parent):
        return
    _make_parents(parent)
    with contextlib.suppress(FileExistsError):
        private.make_directory(parent)
        files.sync(os.path.dirname(parent))


def _make(path: str) -> None:
    """A directory that is ours alone, for good. Raises OSError and NotPrivate."""
    if private.make(path):
        files.sync(os.path.dirname(path))


class FileStore(Store):
    """A directory of this user's.

    Args:
        path: the directory. It is made when it is first needed, and must be ours alone (mode
            0700). Default None: `$XDG_STATE_HOME/proctree/durable`, else
            `~/.local/state/proctree/durable`.

    Raises:
        StoreUnusable: there is no default, since nobody knows our home directory.

    Attributes:
        path: the directory, absolute.
    """

    def __init__(self, path: StrPath | None = None) -> None:
        self.path = default_path() if path is None else os.path.abspath(os.fsdecode(path))

    def __repr__(self) -> str:
        return f"FileStore({self.path!r})"

    def at(self, key: str) -> KeyDirectory:
        """Where everything of a key is, or would be; nothing is made.

        Raises:
            TypeError, ValueError: it is not a key.
        """
        return folders.at(self.path, key)

    def _exists(self) -> bool:
        with step("check", self.path):
            try:
                private.check(self.path)
            except FileNotFoundError:
                return False
        return True

    def claim(self, key: str) -> FileClaim | None:
        place = self.at(key)
        while True:
            claim = FileClaim(place, self._open(place))
            try:
                with step("lock", place.lock):
                    got, there = _take(claim.lock), _same_file(claim.lock, place.lock)
                if got and there:
                    claim._set_up()
                    return claim
            except BaseException:
                claim.release()
                raise
            claim.release()
            if there:
                return None

    def _open(self, place: KeyDirectory) -> fds.File:
        """The lock's file, with all that has to be there for it."""
        with step("make", self.path):
            _make_parents(self.path)
            _make(self.path)
        while True:
            # What was just there is gone when the key is forgotten at this moment.
            with contextlib.suppress(FileNotFoundError):
                with step("make", place.path, absent=True):
                    private.make(place.path)  # synced by `_name`, or by the warden
                with step("lock", place.lock, absent=True):
                    return _open_lock(place.lock)
            # It is not that when the whole store has gone.
            with step("check", self.path):
                private.check(self.path)

    def attempts(self, key: str) -> list[Attempt]:
        place = self.at(key)
        return folders.read_attempts(place) if self._exists() else []

    def ask_cancel(self, key: str, number: int) -> None:
        for attempt in self.attempts(key):
            if attempt.number == number:
                path = os.path.join(attempt.place, folders.CANCELLED)
                with step("write", path), files.opened(attempt.place) as fd:
                    files.write(fd, folders.CANCELLED, recording.encode("cancelled", {}))
                return
        raise UnknownKey(f"key {key!r}: there is no attempt {number} in {self.path}")

    def claimed(self, key: str) -> bool:
        place = self.at(key)
        if not self._exists():
            return False
        with step("look", place.lock):
            return _is_held(place.lock)

    def keys(self) -> list[str]:
        if not self._exists():
            return []
        with step("list", self.path):
            names = os.listdir(self.path)
        known = (folders.key_of(self.path, name) for name in names)
        return sorted(key for key in known if key and folders.has_attempts(self.at(key)))

    def forget(self, key: str) -> None:
        place = self.at(key)
        if not self._exists() or not os.path.lexists(place.path):
            raise UnknownKey(f"key {key!r}: nothing is recorded in {self.path}")
        claim = self.claim(key)
        if claim is None:
            raise StillRunning(
                f"key {key!r}: somebody has claimed it (flock(2) on {place.lock}): cancel what "
                "runs, or wait for it, and then forget it"
            )
        try:
            known = folders.has_attempts(place)
            claim._forget()
        finally:
            claim.release()
        self._clear()
        if not known:
            raise UnknownKey(f"key {key!r}: nothing is recorded in {self.path}")

    def _clear(self) -> None:
        """Of what is forgotten, by whomever: one may have been killed while it removed it."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                if name.startswith(folders.FORGOTTEN):
                    with contextlib.suppress(OSError):
                        files.remove(os.path.join(self.path, name))


class Prepared:
    """An attempt of a tree that is on the disk, and what its warden is handed.

    Attributes:
        attempt: what is recorded.
        run: a descriptor of its directory.
        listen: one of the socket `control` in it, bound, at which nobody listens yet.

    Both descriptors are owned (fds.py), close-on-exec and above the standard streams.
    """

    def __init__(self, attempt: Attempt, run: int, listen: int) -> None:
        self.attempt = attempt
        self.run = run
        self.listen = listen
        self._pid = os.getpid()

    def close(self) -> None:
        """Closes our descriptors. Twice is allowed."""
        run, self.run = self.run, -1
        listen, self.listen = self.listen, -1
        # In a forked child they are closed, and their numbers may be those of other files.
        if run >= 0 and self._pid == os.getpid():
            fds.close(run)
            fds.close(listen)


class FileClaim(Claim):
    """A key's lock, held. To be used by one thread at a time.

    Attributes:
        place: where everything of the key is.
    """

    def __init__(self, place: KeyDirectory, lock: fds.File) -> None:
        self.place = place
        self._lock = lock

    @property
    def lock(self) -> int:
        """The locked descriptor: owned (fds.py), close-on-exec, above the standard streams. A
        process that inherits it holds the claim on."""
        return self._lock.fileno()

    def _check_held(self) -> None:
        if self._lock.closed:
            raise ValueError(f"key {self.place.key!r}: this claim has been given back")

    def _set_up(self) -> None:
        folders.write_key(self.place)
        with step("make", self.place.attempts):
            private.make(self.place.attempts)
        # Of those who were killed while they began.
        for path in folders.listed(self.place).beginnings:
            with step("remove", path):
                files.remove(path)

    def attempts(self) -> list[Attempt]:
        self._check_held()
        for path, why in folders.listed(self.place).foreign:
            events.warning("durable.foreign", key=self.place.key, file=path, why=why)
        return [self._readable_or_aside(found) for found in folders.read_attempts(self.place)]

    def _readable_or_aside(self, attempt: Attempt) -> Attempt:
        if attempt.place != self.place.attempt(attempt.number):
            return attempt  # it is aside already
        if not attempt.trouble:
            if attempt.handle is None:
                self._set_handle_aside(attempt)
            if attempt.exit is not None:
                self._name_record(attempt)
            return attempt
        with step("make", self.place.unreadable):
            _make(self.place.unreadable)
        kept = os.path.join(self.place.unreadable, f"{attempt.number}.{time.time_ns()}")
        with step("keep aside", attempt.place):
            os.rename(attempt.place, kept)
            files.sync(self.place.unreadable)
            files.sync(self.place.attempts)
        self._warn(attempt.number, kept, attempt.trouble)
        return attempt._replace(place=kept)

    def _name_record(self, attempt: Attempt) -> None:
        """Its warden was killed between the last byte of the record and its name. Whoever is told
        of that end must find it behind a crash of the machine too."""
        if os.access(os.path.join(attempt.place, folders.EXIT), os.F_OK):
            return
        with step("sync", attempt.place), files.opened(attempt.place) as fd:
            if files.give_name(fd, folders.EXIT):
                self._sync_above()

    def _sync_above(self) -> None:
        for directory in (self.place.attempts, self.place.path, os.path.dirname(self.place.path)):
            files.sync(directory)

    def _set_handle_aside(self, attempt: Attempt) -> None:
        with step("read", attempt.place), files.opened(attempt.place) as fd:
            _, trouble = folders.handle(fd)
            if not trouble:
                return
            name = f"{folders.HANDLE}.{time.time_ns()}"
            try:
                os.rename(folders.HANDLE, name, src_dir_fd=fd, dst_dir_fd=fd)
            except FileNotFoundError:
                return  # a tree has none, and it was the looking for it that failed
            files.sync_directory(fd)
        self._warn(attempt.number, os.path.join(attempt.place, name), trouble)

    def _warn(self, number: int, kept: str, trouble: str) -> None:
        key = self.place.key
        events.warning("durable.unreadable", key=key, attempt=number, kept=kept, error=trouble)

    def begin(self, request: Request) -> Attempt:
        attempt, run, _ = self._begin(request, tree=False)
        fds.close(run)
        return attempt

    def prepare(self, request: Request) -> Prepared:
        """As `begin`, for a tree: with files for its output and a socket for its warden.

        It is there after any crash of ours, and nothing has waited for the disk: a machine that
        crashes takes the tree along, and then an attempt of which nothing is known, or nothing that
        can be read, is followed by another one just as one that was lost. When a tree has ended,
        its warden syncs all of it (record.c), before anybody is told.

        Raises:
            StoreUnusable: it could not be recorded.
        """
        attempt, run, sock = self._begin(request, tree=True)
        assert sock is not None
        return Prepared(attempt, run, sock.detach())

    def _begin(self, request: Request, tree: bool) -> tuple[Attempt, int, socket.socket | None]:
        self._check_held()
        number = folders.listed(self.place).highest + 1
        path = self.place.attempt(number)
        new = os.path.join(self.place.attempts, f".{number}.new")
        run, sock = -1, None
        try:
            with step("begin", new):
                private.make_directory(new)
                run = _open_directory(new)
                _fill(run, request, tree)
                sock = meeting.bind(run) if tree else None
                if not tree:
                    files.sync_directory(run)
            self._name(new, path, sync=not tree)
        except BaseException:
            if run >= 0:
                fds.close(run)
            if sock is not None:
                fds.close(sock.detach())
            with contextlib.suppress(OSError):
                files.remove(new)
            raise
        return Attempt(number, request, place=path), run, sock

    def _name(self, new: str, path: str, *, sync: bool) -> None:
        with step("begin", path):
            os.rename(new, path)
            if not sync:
                return
            try:
                self._sync_above()
            except BaseException:
                # It may be gone after a crash: then nobody may have seen it as begun.
                os.rename(path, new)
                raise

    def submitted(self, attempt: Attempt, handle: str) -> None:
        self._write(attempt, folders.HANDLE, folders.encode_handle(handle))

    def finish(self, attempt: Attempt, how: Exit) -> None:
        self._write(attempt, folders.EXIT, how.encode())

    def _write(self, attempt: Attempt, name: str, data: bytes) -> None:
        self._check_held()
        if len(data) > files.RECORD_MAX:
            raise ValueError(f"{name}: {len(data)} bytes are more than {files.RECORD_MAX}")
        path = os.path.join(attempt.place, name)
        with step("write", path), files.opened(attempt.place) as fd:
            files.write(fd, name, data)

    def _forget(self) -> None:
        """Everything at once: what is not removed in the end is not found any more, and who waits
        with the lock's file open finds another one in its place, or none."""
        path = self.place.path
        store = os.path.dirname(path)
        away = os.path.join(store, f"{folders.FORGOTTEN}{os.getpid()}.{time.time_ns()}")
        with step("forget", path):
            os.rename(path, away)
            files.sync(store)
            files.remove(away)

    def release(self) -> None:
        # By close(2), and never by LOCK_UN, which would take the lock from a warden that has
        # inherited it: it is the open file's (flock(2)), and the warden's alone from now on.
        self._lock.close()


def _open_directory(path: str) -> int:
    with fds.making():
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return fds.own(fds.above_stdio(os.open(path, flags)))


def _fill(directory: int, request: Request, tree: bool) -> None:
    files.write(directory, folders.REQUEST, request.encode(), sync=not tree)
    files.make_room(directory, folders.EXIT, sync=not tree)
    if tree:
        files.make_empty(directory, folders.OUT)
        files.make_empty(directory, folders.ERR)
