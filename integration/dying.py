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
