"""One HTTP request and its answer, within a time; for a thread that may wait.

By http.client, which reads neither proxies nor credentials from the environment, and follows no
redirects. What it is given instead of a socket has the time limit and the bound.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import time
from typing import TYPE_CHECKING, Any

import attrs

from proctree.supervisor.aside import describe, shorten
from proctree.supervisor.connecting import Stream, Trouble, connect, doing
from proctree.supervisor.fields import Endpoint, Headers

if TYPE_CHECKING:
    import ssl

ANSWER_MAX = 64 * 1024
"""Bytes of an answer, head and body, that are read."""

LINGER_SECONDS = 1.0
"""How long the body is waited for. It decides nothing: but to close before it has come resets the
connection, and servers log that as an error."""

BODY_SHOWN = 200


@attrs.frozen
class Answer:
    """What a server said.

    Attributes:
        status: of HTTP.
        text: status, reason, and the beginning of the body, for people.
        location: where a redirect leads to.
    """

    status: int
    text: str
    location: str | None


@functools.cache
def _default_context() -> ssl.SSLContext:
    """Kept: reading the certificates takes tens of milliseconds."""
    import ssl

    return ssl.create_default_context()


def exchange(
    endpoint: Endpoint,
    method: str,
    headers: Headers,
    body: bytes | None,
    context: ssl.SSLContext | None,
    deadline: float,
) -> Answer:
    """Asks, and returns when the head of the answer has come and, for a moment, its body.

    Raises:
        Trouble: there is no answer; says at which step that was.
    """
    stream = connect(endpoint.host, endpoint.port, deadline, ANSWER_MAX)
    try:
        if endpoint.tls:
            stream.encrypt(context or _default_context(), endpoint.host)
        return _ask(stream, endpoint, method, headers, body)
    finally:
        stream.end()


def _ask(
    stream: Stream, endpoint: Endpoint, method: str, headers: Headers, body: bytes | None
) -> Answer:
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
    connection.sock = stream
    fields = {"Host": endpoint.authority, "Connection": "close"}
    given = {name.lower() for name, _ in headers}
    fields = {name: text for name, text in fields.items() if name.lower() not in given}
    with doing("the request"):
        connection.request(method, endpoint.target, body, fields | dict(headers))
    try:
        with doing("the answer"):
            response = connection.getresponse()
    except http.client.HTTPException as error:
        raise Trouble(f"no HTTP in the answer: {describe(error)}") from None
    with response:
        text = f"{response.status} {shorten(response.reason)}".strip()
        said = shorten(_body(stream, response).decode("utf-8", "replace"), BODY_SHOWN)
        return Answer(
            response.status, f"{text}: {said}" if said else text, response.getheader("Location")
        )


def _body(stream: Stream, response: http.client.HTTPResponse) -> bytes:
    """As much of it as comes in time: its trouble is not that of the answer."""
    stream.deadline = min(stream.deadline, time.monotonic() + LINGER_SECONDS)
    pieces: list[Any] = []
    with contextlib.suppress(Trouble, OSError, ValueError, http.client.HTTPException):
        while piece := response.read1(ANSWER_MAX):
            pieces.append(piece)
    return b"".join(pieces)
