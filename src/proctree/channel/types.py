"""Messages with a type, and how they are told apart: by the field `type` of a tagged Struct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import msgspec

from proctree.channel.frames import HEAD, LARGEST_FRAME

TAG = "type"
SMALLEST_LIMIT = 1024
"""Bytes that a limit of frames must leave for error answers."""


class Message(msgspec.Struct, tag=True, frozen=True):
    """A base for messages; the name of the class goes along as `type`.

    Any `msgspec.Struct` with `tag=` and the tag field `type` (which is msgspec's default) will do.
    """


def tag_of(kind: type[msgspec.Struct]) -> str:
    """The value of a Struct's field `type`.

    Raises:
        ValueError: it has none.
    """
    config = kind.__struct_config__
    if config.tag is None or config.tag_field != TAG:
        raise ValueError(
            f"{kind.__name__} has no field {TAG!r} to be told by: give it tag=True, or derive it "
            "from proctree.channel.Message"
        )
    return str(config.tag)


def decoder(types: Sequence[Any] | None) -> Callable[[Any], Any]:
    """Decodes a message that is one of `types`, or None; without `types`, anything, to built-in
    types.

    Raises:
        ValueError, TypeError: they cannot be told apart.
    """
    if types is None:
        return msgspec.msgpack.Decoder().decode
    if isinstance(types, (str, bytes)) or not isinstance(types, Sequence):
        raise TypeError(f"types: a sequence of message types, not {types!r}")
    for kind in types:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            tag_of(kind)
    return msgspec.msgpack.Decoder(Union[(None, *types)]).decode


def to_max_frame(value: Any) -> int:
    """Checks a limit of frames, in bytes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_frame: a number of bytes, not {value!r}")
    if not max(HEAD, SMALLEST_LIMIT) <= value <= LARGEST_FRAME:
        raise ValueError(f"max_frame: {SMALLEST_LIMIT} to {LARGEST_FRAME} bytes, not {value}")
    return value
