"""The supervisor's end: what is done about the requests of trees."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from proctree.channel.frames import MAX_FRAME
from proctree.channel.handlers import Handlers, message_type
from proctree.channel.served import Rules, Served
from proctree.channel.tasks import Tasks
from proctree.channel.types import to_max_frame
from proctree.loop import Loop
from proctree.process import fds

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_IN_FLIGHT = 64
MAX_CONNECTIONS = 32

_lock = threading.Lock()
_loop: Loop | None = None


def _channel_loop() -> Loop:
    """The loop of all channels of the process: not that of the trees, which must never wait for a
    message to be decoded."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = Loop("proctree-channel")
        return _loop


def _forget() -> None:
    global _loop, _lock
    _loop = None
    _lock = threading.Lock()


fds.in_forked_child(_forget)


def _count(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: a number, not {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: at least 1, not {value}")
    return value


class Server:
    """Handlers for the requests of trees, by the type of the message::

        server = Server()

        @server.handler
        def get_variable(request: GetVariable, caller: Caller) -> Variable:
            return Variable(request.key, store[request.key])

        WatchedSubprocess.start(argv, channel=server)

    One server may serve any number of trees; none can hold up another. A handler gets the message
    and the `Caller`. What it returns is the answer, sent as soon as it is there, in whatever order;
    what it raises is an error answer, and an event unless it is a `RemoteError`.

    Args:
        max_in_flight: how many requests of one tree may be under way at a time; then it is not read
            from until one is done. Default 64.
        max_connections: how many connections one tree may have. Default 32.
        max_frame: the longest message in bytes, both ways. Default 64 MiB.
        loop: the event loop of asyncio that async handlers run in. Default: one on a thread of its
            own, which all servers share.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        max_connections: int = MAX_CONNECTIONS,
        max_frame: int = MAX_FRAME,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if loop is not None and not isinstance(loop, asyncio.AbstractEventLoop):
            raise TypeError(f"loop: an event loop of asyncio, not {loop!r}")
        self._rules = Rules(
            handlers=Handlers(),
            tasks=Tasks(loop),
            max_in_flight=_count(max_in_flight, "max_in_flight"),
            max_connections=_count(max_connections, "max_connections"),
            max_frame=to_max_frame(max_frame),
        )

    def handler(self, function: Function) -> Function:
        """A decorator: `handle` for the type that the first parameter is annotated with.

        Raises:
            TypeError, ValueError: as `handle`; or there is no annotation.
        """
        self.handle(message_type(function), function)
        return function

    def handle(self, kind: Any, function: Callable[..., Any], *, inline: bool = False) -> None:
        """Says what is done about one type of message.

        Args:
            kind: a tagged `msgspec.Struct` type, which the body is decoded to; or a string, for
                bodies that are a mapping with this `type`; or None, for everything that has no
                handler of its own, decoded to built-in types.
            function: called with the message and the `Caller`: an async one in an event loop, any
                other on a thread that is nobody else's meanwhile.
            inline: call it on the thread that reads for all trees: for what never blocks, and takes
                no longer than finding a thread for it would.

        Raises:
            TypeError: not a message type, or not a function.
            ValueError: the type has a handler already, or no tag; or `inline` for an async one.
        """
        self._rules.handlers.add(kind, function, inline)

    def serve(self, tree_id: str, name: str) -> Served:
        """For one tree that is about to start."""
        return Served(self._rules, _channel_loop(), tree_id, name)
