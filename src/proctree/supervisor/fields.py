"""Checks of values that heartbeats and readiness have in common. Errors name the field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import attrs

from proctree.policy import to_seconds

Headers = tuple[tuple[str, str], ...]
Statuses = range | frozenset[int]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110, 5.6.2."""

_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
"""RFC 9110, 5.5: a line break would begin a header of somebody else's choice."""

_TARGET = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[0-9A-Za-z_.:%-]+")
PORT_MAX = 65535


def to_period(value: Any, field: str = "interval") -> float:
    """Seconds, more than none and not for ever."""
    seconds = to_limit(value, field)
    if math.isinf(seconds):
        raise ValueError(f"{field}: must be finite")
    return seconds


def to_limit(value: Any, field: str = "timeout") -> float:
    """Seconds, more than none; `math.inf` is no limit."""
    seconds = to_seconds(value, field)
    if seconds == 0:
        raise ValueError(f"{field}: must be more than 0 seconds")
    return seconds


def to_count(value: Any, field: str = "failures") -> int:
    """A number from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{field}: {value} is not 1 or more")
    return value


def to_port(value: Any, field: str = "port") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: an integer, not {value!r}")
    if not 1 <= value <= PORT_MAX:
        raise ValueError(f"{field}: {value} is not between 1 and {PORT_MAX}")
    return value


def to_host(value: Any, field: str = "host") -> str:
    """A name or an address."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: a str, not {value!r}")
    try:
        encoded = value.encode("idna")
    except UnicodeError as error:
        raise ValueError(f"{field}: {value!r} is no host name: {error}") from None
    if not _HOST.fullmatch(encoded.decode("ascii")):
        raise ValueError(f"{field}: {value!r} is no host name")
    return value


def to_statuses(value: Any, field: str = "status") -> Statuses:
    """Statuses of HTTP."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{field}: a range or a set of HTTP statuses, not {value!r}")
    statuses = value if isinstance(value, range) else frozenset(value)
    for status in statuses:
        if isinstance(status, bool) or not isinstance(status, int):
            raise TypeError(f"{field}: an HTTP status is an integer, not {status!r}")
        if not 100 <= status <= 599:
            raise ValueError(f"{field}: {status} is no HTTP status (100 to 599)")
    return statuses


def to_method(value: Any, field: str = "method") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field}: a str, not {value!r}")
    if not _TOKEN.fullmatch(value):
        raise ValueError(f"{field}: {value!r} is no HTTP method")
    return value


def to_headers(value: Any, field: str = "headers") -> Headers:
    """The fields of a request, in order."""
    if not isinstance(value, (Mapping, tuple)):
        raise TypeError(f"{field}: a mapping of str to str, not {type(value).__name__}")
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"{field}[{name!r}]: name and value are str")
        # The value may be a secret, so no error shows it.
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(text):
            raise ValueError(f"{field}[{name!r}]: no HTTP header: RFC 9110 forbids a character")
    return pairs


def to_context(value: Any, field: str = "context") -> Any:
    """An `ssl.SSLContext` or None."""
    if value is not None:
        import ssl

        if not isinstance(value, ssl.SSLContext):
            raise TypeError(f"{field}: an ssl.SSLContext, not {value!r}")
    return value


@attrs.frozen
class Endpoint:
    """Where a request goes to.

    Attributes:
        tls: whether the scheme is https.
        host: a name or an address, without brackets.
        port: 1 to 65535.
        target: path and query.
    """

    tls: bool
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The header Host (RFC 9110, 7.2)."""
        # A name outside of ASCII has no place in a header; addresses come out as they are.
        host = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode("ascii")
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def to_endpoint(value: Any, field: str = "url") -> Endpoint:
    """A URL's parts."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: a str, not {value!r}")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{field}: {value!r}: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{field}: {value!r} has the scheme {parts.scheme!r}, not http or https")
    if parts.username is not None:
        raise ValueError(f"{field}: no user and password in here: use a header Authorization")
    if not parts.hostname:
        raise ValueError(f"{field}: {value!r} has no host")
    host = to_host(parts.hostname, field)
    tls = parts.scheme == "https"
    if port is None:
        port = 443 if tls else 80
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # urlsplit() silently takes away line breaks and tabs: what is left is not what was given.
    if not _TARGET.fullmatch(target) or any(char in value for char in "\r\n\t"):
        raise ValueError(f"{field}: {value!r} must be percent-encoded: ASCII without spaces")
    return Endpoint(tls, host, to_port(port, field), target)
