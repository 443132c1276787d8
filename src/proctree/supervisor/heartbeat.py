"""What a heartbeat is: which call, how often, and what is made of its failures. Values only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from proctree.errors import ProctreeError
from proctree.supervisor.aside import to_function
from proctree.supervisor.fields import (
    Endpoint,
    Headers,
    Statuses,
    to_context,
    to_count,
    to_endpoint,
    to_headers,
    to_method,
    to_period,
    to_statuses,
)

if TYPE_CHECKING:
    import ssl

TIMEOUT_SECONDS = 5.0


class Rejected(ProctreeError):
    """Raised by the callable of a heartbeat: the tree is not wanted any more, and is ended at once
    with the reason `heartbeat-rejected`."""


@attrs.frozen
class Beat:
    """Whose heartbeat it is.

    Attributes:
        name: of the child.
        tree_id: of this incarnation of it; a restarted child has another one.
        pid: of its main process.
    """

    name: str
    tree_id: str
    pid: int | None


BeatFunction = Callable[[Beat], object]


def _rejected(value: Any) -> Statuses:
    return to_statuses(value, "rejected")


def _accepted(value: Any) -> Statuses:
    return to_statuses(value, "accepted")


def _timeout(value: Any) -> float:
    return to_period(value, "timeout")


def _to_body(value: Any, field: str = "body") -> Any:
    if value is None or isinstance(value, bytes):
        return value
    if not callable(value):
        raise TypeError(f"{field}: bytes, a function that returns them, or None, not {value!r}")
    return to_function(value, field)


def _endpoint(beat: HttpBeat) -> Endpoint:
    return to_endpoint(beat.url)


@attrs.frozen
class HttpBeat:
    """A heartbeat by HTTP: one request on a connection of its own.

    The status decides. Redirects are not followed, and proxies of the environment are not used.

    Args:
        url: `http` or `https`, with a host; no user and password.
        method: default `POST`.
        headers: sent with each request. They and the body are in no repr and in no message, since
            they may hold secrets.
        body: bytes, or a function that gets the `Beat` and returns them, on the thread of the call.
            Default None: no body.
        rejected: statuses that end the tree at once. Default 404, 409, 410.
        accepted: statuses of a success. Default 200 to 299. All others are failures.
        context: for TLS. Default: `ssl.create_default_context()`, made once.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    url: str
    method: str = attrs.field(default="POST", converter=to_method)
    headers: Headers = attrs.field(default=(), converter=to_headers, repr=False)
    body: bytes | Callable[[Beat], bytes] | None = attrs.field(
        default=None, converter=_to_body, repr=False
    )
    rejected: Statuses = attrs.field(
        default=frozenset((404, 409, 410)),
        converter=_rejected,
        kw_only=True,
    )
    accepted: Statuses = attrs.field(
        default=range(200, 300),
        converter=_accepted,
        kw_only=True,
    )
    context: ssl.SSLContext | None = attrs.field(default=None, converter=to_context, kw_only=True)
    endpoint: Endpoint = attrs.field(
        default=attrs.Factory(_endpoint, takes_self=True),
        init=False,
        repr=False,
        eq=False,
    )

    def __attrs_post_init__(self) -> None:
        both = sorted(set(self.rejected) & set(self.accepted))
        if both:
            raise ValueError(f"rejected: {both[0]} is among the accepted statuses too")
        if self.context is not None and not self.endpoint.tls:
            raise ValueError("context: the url is of http, which has no TLS")


def _to_beat(value: Any, field: str = "beat") -> Any:
    return value if isinstance(value, HttpBeat) else to_function(value, field)


def _default_timeout(heartbeat: Heartbeat) -> float:
    return min(TIMEOUT_SECONDS, heartbeat.interval)


@attrs.frozen
class Heartbeat:
    """A call at every interval that says that a child is there, and asks whether it still may be.

    A call that returns is a success. One that raises, or takes longer than `timeout`, is a failure;
    so is each interval in which none could be made, because one before it still hangs. One that
    raises `Rejected` ends the tree.

    Args:
        beat: an `HttpBeat`, or a function that gets a `Beat`. It runs on a thread, one call at a
            time.
        interval: seconds from one beat to the next. Default 10.0.
        timeout: seconds that one beat may take, at most the interval. Default 5.0, or the interval
            where that is shorter.
        failures: how many in a row end the tree, with the reason `heartbeat-failed`. Default 3.

    Raises:
        TypeError, ValueError: by the name of the field.
    """

    beat: BeatFunction | HttpBeat = attrs.field(converter=_to_beat)
    interval: float = attrs.field(default=10.0, converter=to_period)
    timeout: float = attrs.field(
        default=attrs.Factory(_default_timeout, takes_self=True),
        converter=_timeout,
    )
    failures: int = attrs.field(default=3, converter=to_count)

    def __attrs_post_init__(self) -> None:
        if self.timeout > self.interval:
            raise ValueError(
                f"timeout: {self.timeout:g} s is longer than the interval of {self.interval:g} s"
            )
