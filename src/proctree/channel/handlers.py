"""What the supervisor does about each type of message: found, decoded, and called; no I/O."""

from __future__ import annotations

import asyncio
import enum
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from proctree.channel.errors import INVALID_BODY, UNKNOWN_TYPE, RemoteError
from proctree.channel.frames import DECODING_ERRORS
from proctree.channel.types import tag_of


class HasFileno(Protocol):
    def fileno(self) -> int:
        """Its descriptor."""
        ...


class Answer(NamedTuple):
    """An answer with descriptors, for a handler to return.

    Attributes:
        body: the answer itself.
        fds: up to 32 descriptors that the caller gets too. Numbers are closed when they are sent;
            objects with a `fileno` are kept until then, and stay their owner's.
    """

    body: Any
    fds: Sequence[int | HasFileno] = ()


class Where(enum.Enum):
    """Where a handler runs."""

    THREAD = "thread"
    TASK = "task"
    INLINE = "inline"


class Handler(NamedTuple):
    function: Callable[..., Any]
    decode: Callable[[Any], Any]
    where: Where


class _Typed(msgspec.Struct):
    type: str


MOST_SHOWN = 100
"""Characters of a type that nobody handles: it is the tree's text, and as long as it likes."""

_read_type = msgspec.msgpack.Decoder(_Typed).decode


def _is_async(function: Any) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004
    return asyncio.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class Handlers:
    """Handlers by type."""

    def __init__(self) -> None:
        self._by_tag: dict[str, Handler] = {}
        self._other: Handler | None = None

    def add(self, kind: Any, function: Any, inline: bool) -> None:
        """See `Server.handle`."""
        if not callable(function):
            raise TypeError(f"handler: a function, not {function!r}")
        if inline and _is_async(function):
            raise ValueError("inline: a coroutine cannot run inline")
        where = Where.INLINE if inline else Where.TASK if _is_async(function) else Where.THREAD
        if kind is None:
            if self._other is not None:
                raise ValueError("kind: None has a handler already")
            self._other = Handler(function, msgspec.msgpack.Decoder().decode, where)
            return
        if isinstance(kind, str):
            tag, decoder = kind, msgspec.msgpack.Decoder()
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            tag, decoder = tag_of(kind), msgspec.msgpack.Decoder(kind)
        else:
            raise TypeError(f"kind: a msgspec.Struct type, a name, or None; not {kind!r}")
        if tag in self._by_tag:
            raise ValueError(f"kind: {tag!r} has a handler already")
        self._by_tag[tag] = Handler(function, decoder.decode, where)

    def find(self, body: Any) -> tuple[Handler, Any]:
        """The handler for an encoded body, and the body for the handler.

        Raises:
            RemoteError: there is none, or it is not what that one takes: the error to answer with.
        """
        try:
            tag = _read_type(body).type
        except DECODING_ERRORS:
            tag = ""
        handler = self._by_tag.get(tag, self._other)
        if handler is None:
            shown = tag[:MOST_SHOWN]
            raise RemoteError(UNKNOWN_TYPE, f"no handler for messages of type {shown!r}")
        try:
            return handler, handler.decode(body)
        except Exception as error:  # __post_init__ of a message is the host's code
            raise RemoteError(INVALID_BODY, f"{tag[:MOST_SHOWN]}: {error}") from None


def message_type(function: Any) -> Any:
    """The type that a handler takes, by the annotation of its first parameter.

    Raises:
        TypeError: it has none.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].annotation is inspect.Parameter.empty:
        raise TypeError(
            f"{getattr(function, '__qualname__', function)}: its first parameter has to be "
            "annotated with the type of its message"
        )
    return parameters[0].annotation


def to_error(error: BaseException) -> dict[str, Any]:
    """What the caller gets for what a handler raised."""
    if isinstance(error, RemoteError):
        return error.to_wire()
    return RemoteError(type(error).__name__, text_of(error)).to_wire()


def text_of(error: BaseException, show: Callable[[BaseException], str] = str) -> str:
    """Of an exception of the host's, whose `__str__` may be broken too."""
    try:
        return show(error)
    except Exception:
        return f"<{type(error).__name__}>"
