"""Processes that are killed at a chosen call, and what they say before that."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from integration.conftest import DEADLINE

CALLS = (
    *("open", "close", "mkdir", "rename", "unlink", "rmdir", "pwrite", "ftruncate", "fsync"),
    *("posix_fallocate", "listdir", "read"),
)


class Death(NamedTuple):
    """Where it comes.

    Attributes:
        nth: at which call, counted from 1; 0: at none.
        when: "before" or "after" it, or "in" it: then half of what is written has been.
    """

    nth: int
    when: str = "before"


class Calls:
    """Counts, in this process and from now on, the calls that change or look at files."""

    def __init__(self, death: Death) -> None:
        self.names: list[str] = []
        self._death = death
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        fcntl.flock = self._counted("flock", fcntl.flock)  # type: ignore[assignment]
        bind = self._counted("bind", socket.socket.bind)
        socket.socket.bind = lambda sock, address: bind(sock, address)  # type: ignore

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            here = len(self.names) == self._death.nth
            if here and self._death.when == "in" and name == "pwrite":
                fd, data, offset = args
                call(fd, data[: len(data) // 2], offset)
            if here and self._death.when != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)

        return counted


class Unsynced:
    """What a loss of power would take, in this process and from now on: files written to, and
    directories whose names were changed, since they were last synced (fsync(2)).

    Attributes:
        paths: of what would be lost now.
        named: what got a name, or another one, before it was synced itself.
    """

    def __init__(self) -> None:
        self._dirty: dict[tuple[int, int], str] = {}
        self.named: list[str] = []
        for name in ("open", "pwrite", "ftruncate", "fsync", "rename", "mkdir"):
            setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
        os.posix_fallocate = self._pwrite(os.posix_fallocate)  # type: ignore[assignment]
        socket.socket.bind = self._bind(socket.socket.bind)  # type: ignore

    @property
    def paths(self) -> list[str]:
        return sorted(self._dirty.values())

    @staticmethod
    def _id(file: int | str) -> tuple[int, int]:
        info = os.stat(file)
        return info.st_dev, info.st_ino

    def _touch(self, file: int | str) -> None:
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
        self._dirty[self._id(file)] = path

    def _touch_parent(self, path: str, directory: int | None) -> None:
        self._touch(directory if directory is not None else os.path.dirname(path))

    def _open(self, call: Any) -> Any:
        def opened(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            creates = flags & os.O_CREAT
            there = creates and os.access(path, os.F_OK, dir_fd=dir_fd)
            fd: int = call(path, flags, mode, dir_fd=dir_fd)
            if creates and not there:
                self._touch_parent(path, dir_fd)
            return fd

        return opened

    def _pwrite(self, call: Any) -> Any:
        def written(fd: int, *args: Any) -> Any:
            result = call(fd, *args)
            self._touch(fd)
            return result

        return written

    _ftruncate = _pwrite

    def _fsync(self, call: Any) -> Any:
        def synced(fd: int) -> None:
            call(fd)
            self._dirty.pop(self._id(fd), None)

        return synced

    def _mkdir(self, call: Any) -> Any:
        def made(path: str, mode: int = 0o777) -> None:
            call(path, mode)
            self._touch_parent(path, None)

        return made

    def _rename(self, call: Any) -> Any:
        def renamed(
            old: str, new: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
        ) -> None:
            info = os.stat(old, dir_fd=src_dir_fd)
            if (info.st_dev, info.st_ino) in self._dirty:
                self.named.append(new)
            call(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._touch_parent(old, src_dir_fd)
            self._touch_parent(new, dst_dir_fd)

        return renamed

    def _bind(self, call: Any) -> Any:
        def bound(sock: socket.socket, address: str) -> None:
            call(sock, address)
            self._touch_parent(address, None)

        return bound


class Child:
    """A fork of this process that runs `function(say)`. What it says is heard here, whatever then
    becomes of it."""

    def __init__(self, function: Callable[[Callable[[str], None]], None]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, writer)
        os.close(writer)
        self._heard = b""

    def _run(self, function: Callable[[Callable[[str], None]], None], writer: int) -> None:
        write = os.write
        status = 1
        try:
            function(lambda text: (write(writer, text.encode() + b"\n"), None)[1])
            status = 0
        except BaseException:
            write(2, traceback.format_exc().encode())
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _read(self) -> bool:
        """Whether there is more."""
        assert select.select([self._reader], [], [], DEADLINE)[0], "the child says nothing"
        part = os.read(self._reader, 65536)
        self._heard += part
        return bool(part)

    def hear(self) -> str:
        """The next line."""
        while b"\n" not in self._heard:
            assert self._read(), "the child has ended"
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def end(self) -> tuple[int, list[str]]:
        """Its exit status, as subprocess has it, and the rest of what it said."""
        try:
            while self._read():
                pass
        finally:
            os.close(self._reader)
            _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self._heard.decode().splitlines()


@contextlib.contextmanager
def children(functions: list[Callable[[Callable[[str], None]], None]]) -> Iterator[list[Child]]:
    """All at once; each must end with status 0."""
    started = [Child(function) for function in functions]
    try:
        yield started
    except BaseException:
        for child in started:
            os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the number is its own
            child.end()
        raise
    assert [child.end()[0] for child in started] == [0] * len(started)
