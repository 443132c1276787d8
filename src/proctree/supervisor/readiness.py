"""What says that a child is ready: values, and the one of them that needs no I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from proctree.supervisor.aside import shorten, to_function
from proctree.supervisor.fields import (
    Endpoint,
    Headers,
    Statuses,
    to_context,
    to_endpoint,
    to_headers,
    to_host,
    to_limit,
    to_period,
    to_port,
    to_statuses,
)

if TYPE_CHECKING:
    import ssl

TIMEOUT_SECONDS = 90.0
"""DefaultTimeoutStartSec= of systemd (systemd-system.conf(5))."""

PAUSE_LEAST = 0.01
PAUSE_MOST = 1.0
"""Seconds between two attempts."""

SUN_PATH_MAX = 107
"""Bytes of a path in sun_path, which has a NUL at its end (unix(7))."""

LINE_MAX = 16 * 1024
"""Characters of a line that are searched."""


def pause(interval: float | None, elapsed: float) -> float:
    """Seconds to the next attempt: where nothing else was asked for a tenth of the time that it has
    taken so far, so that it is known soon in proportion, and little is done for what takes long."""
    if interval is not None:
        return interval
    return min(max(elapsed / 10, PAUSE_LEAST), PAUSE_MOST)


def _to_interval(value: Any, field: str = "interval") -> float | None:
    return None if value is None else to_period(value, field)


def _to_path(value: Any, field: str = "path") -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{field}: a str or a path, not {value!r}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"{field}: a str or a path, not {value!r}")
    if not path.startswith("/"):
        raise ValueError(f"{field}: {path!r} is not absolute: a child may be in another directory")
    if "\0" in path:
        raise ValueError(f"{field}: {path!r} has a NUL in it")
    return path


def _to_socket_path(value: Any, field: str = "path") -> str:
    if isinstance(value, str) and value.startswith("\0"):
        path, most = value, SUN_PATH_MAX + 1  # unix(7): an abstract address has no NUL at its end
    else:
        path, most = _to_path(value, field), SUN_PATH_MAX
    if len(os.fsencode(path)) > most:
        raise ValueError(f"{field}: {path!r} is longer than the {most} bytes of a socket's path")
    return path


def _to_pattern(value: Any, field: str = "pattern") -> re.Pattern[str]:
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{field}: a regular expression of str, not {value!r}")
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"{field}: {value!r} is no regular expression: {error}") from None


def _to_stream(value: Any, field: str = "stream") -> str | None:
    if value not in (None, "stdout", "stderr"):
        raise ValueError(f"{field}: {value!r} is none of 'stdout', 'stderr', None")
    return value  # type: ignore[no-any-return]


@attrs.frozen(kw_only=True)
class _Awaited:
    timeout: float = attrs.field(default=TIMEOUT_SECONDS, converter=to_limit)


@attrs.frozen(kw_only=True)
class _Polled(_Awaited):
    interval: float | None = attrs.field(default=None, converter=_to_interval)


@attrs.frozen
class Tcp(_Polled):
    """Ready when somebody accepts a connection, which is closed at once, without data.

    A port that accepts before the child has been started is a stranger's, and the start is refused.

    Args:
        port: 1 to 65535.
        host: a name or an address; of several addresses one is enough. Default `127.0.0.1`.
        timeout: seconds from the start until it has to be ready; may be infinite. Default 90.
        interval: seconds between two attempts. Default None: a tenth of the time since the start,
            but at least 10 ms and at most 1 s.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    port: int = attrs.field(converter=to_port)
    host: str = attrs.field(default="127.0.0.1", converter=to_host)

    def describe(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp {host}:{self.port}"


@attrs.frozen
class UnixSocket(_Polled):
    """Ready when somebody accepts a connection on a stream socket, as for `Tcp`. A socket file that
    an earlier run has left behind accepts nothing.

    Args:
        path: absolute, at most 107 bytes; or an abstract address, which begins with a NUL.
        timeout, interval: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    path: str = attrs.field(converter=_to_socket_path)

    def describe(self) -> str:
        return f"unix socket {self.path.replace(chr(0), '@')}"


def _endpoint(probe: Http) -> Endpoint:
    return to_endpoint(probe.url)


@attrs.frozen
class Http(_Polled):
    """Ready when a GET is answered with one of the statuses. Redirects are not followed.

    A URL that is answered so before the child has been started is a stranger's, and the start is
    refused. Other answers are not: a proxy says 502 until the child behind it is there.

    Args:
        url: as that of `HttpBeat`.
        status: Default 200 to 399.
        headers: sent with each request; not in the repr.
        context: for TLS. Default: `ssl.create_default_context()`, made once.
        timeout, interval: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    url: str
    status: Statuses = attrs.field(default=range(200, 400), converter=to_statuses)
    headers: Headers = attrs.field(default=(), converter=to_headers, repr=False, kw_only=True)
    context: ssl.SSLContext | None = attrs.field(default=None, converter=to_context, kw_only=True)
    endpoint: Endpoint = attrs.field(
        default=attrs.Factory(_endpoint, takes_self=True),
        init=False,
        repr=False,
        eq=False,
    )

    def describe(self) -> str:
        # Without the query, which may hold a secret.
        return f"GET {self.url.partition('?')[0]}"


@attrs.frozen
class File(_Polled):
    """Ready when there is a file that was not there before the start: another one than was found
    then, or the same one written since.

    Args:
        path: absolute; a symbolic link counts as what it leads to.
        timeout, interval: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    path: str = attrs.field(converter=_to_path)

    def describe(self) -> str:
        return f"file {self.path}"


@attrs.frozen
class Check(_Polled):
    """Ready when a function returns something true. It runs on a thread, one call at a time; what
    it raises means "not yet", and is in the message when time runs out.

    Args:
        function: called without arguments, after the start only.
        timeout, interval: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    function: Callable[[], object] = attrs.field(converter=to_function)

    def describe(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"check {name}"


@attrs.frozen
class OutputLine(_Awaited):
    """Ready when a line of the output matches.

    Args:
        pattern: a regular expression, searched for in the first 16384 characters of each line. What
            the child prints is matched with it in this process, and while it is no other thread
            runs: a pattern that backtracks without end (`(a+)+$`) stops everything.
        stream: `"stdout"`, `"stderr"`, or None, the default, for both.
        timeout: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    pattern: re.Pattern[str] = attrs.field(converter=_to_pattern)
    stream: str | None = attrs.field(default=None, converter=_to_stream)

    def describe(self) -> str:
        return f"line /{self.pattern.pattern}/ on {self.stream or 'stdout or stderr'}"


@attrs.frozen
class Notified(_Awaited):
    """Ready when the child says READY=1 by sd_notify(3).

    Args:
        timeout: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    def describe(self) -> str:
        return "READY=1 by sd_notify"


@attrs.frozen
class Completed(_Awaited):
    """Ready when the child has done its work: it has ended with a success. For what has to be done
    before the next child is started (systemd's Type=oneshot); with `restart="on-failure"` or
    `"never"`.

    Args:
        timeout: as for `Tcp`.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    def describe(self) -> str:
        return "its end with success"


Polled = Tcp | UnixSocket | Http | File | Check
Readiness = Polled | OutputLine | Notified | Completed


class Matcher:
    """Looks for an `OutputLine` in the lines of one tree. On one thread at a time, which should be
    the worker that the tree's lines are delivered on.

    Attributes:
        matched: whether a line has.
        trouble: why none has, for people.
    """

    def __init__(self, probe: OutputLine) -> None:
        self._probe = probe
        self._seen = 0
        self.matched = False
        self.trouble = "no line has come"

    def feed(self, stream: str, line: str) -> bool:
        """Whether this is the first line that matches."""
        if self.matched or self._probe.stream not in (None, stream):
            return False
        self.matched = self._probe.pattern.search(line[:LINE_MAX]) is not None
        self._seen += 1
        self.trouble = f"none of {self._seen} lines matched, the last one is {shorten(line)!r}"
        return self.matched
