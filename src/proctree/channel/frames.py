"""The bytes on the wire: pure functions on values, no I/O.

A frame is its length, 4 bytes big-endian, and a msgpack array: `[id, body]` asks, `[id, body,
error]` answers, and an answer with the id 0 answers nobody: it is a notification. These are the
bytes that the task SDK of Airflow 3 speaks.

`split` is a function of what has come so far and has no memory of its own: whoever calls it twice
with the same chunks gets the same frames twice. The reading of the wire rests on that (wire.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

LENGTH = struct.Struct(">I")
HEAD = 32
"""Bytes kept of a frame that is refused: enough for its id."""

MAX_FRAME = 64 << 20
"""The default limit of a frame without its length, in bytes."""
LARGEST_FRAME = (1 << 32) - 1
"""What the length has room for."""

NOTIFICATION = 0
"""The id of an answer that nobody asked for."""


class Request(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`[id, body]`; the body is still to be decoded."""

    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


class Response(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`[id, body, error]`; the body is still to be decoded."""

    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: Any = None


_encoder = msgspec.msgpack.Encoder()
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_response = msgspec.msgpack.Decoder(Response).decode


DECODING_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises: msgspec hands the second on as it is; the third is for what is nested too
deeply."""


class TooLong(Exception):
    """A frame would be longer than the limit. `length` is in bytes, without the length itself."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length


def _encode(values: tuple[Any, ...], max_frame: int) -> bytearray:
    frame = bytearray(128)
    _encoder.encode_into(values, frame, LENGTH.size)
    length = len(frame) - LENGTH.size
    if length > max_frame:
        raise TooLong(length)
    LENGTH.pack_into(frame, 0, length)
    return frame


def encode_request(request_id: int, body: Any, max_frame: int = MAX_FRAME) -> bytearray:
    """The frame of a request.

    Raises:
        TooLong: it is over `max_frame` bytes.
        TypeError, OverflowError: the body has a value that msgpack cannot hold.
    """
    return _encode((request_id, body), max_frame)


def encode_response(
    request_id: int, body: Any, error: Any = None, max_frame: int = MAX_FRAME
) -> bytearray:
    """The frame of an answer. Raises as `encode_request`."""
    return _encode((request_id, body, error), max_frame)


class Frame(NamedTuple):
    """One frame from the stream.

    Attributes:
        data: what follows the length; of a frame over the limit only its first `HEAD` bytes.
        length: its whole length in bytes, without the length itself.
        refused: it is over the limit.
        fds: the descriptors that came with it.
    """

    data: bytes | memoryview
    length: int
    refused: bool = False
    fds: tuple[int, ...] = ()


class Rest(NamedTuple):
    """What is left of a stream after its whole frames were taken.

    Attributes:
        data: the beginning of a frame, or nothing.
        skip: bytes still to come of a frame that is refused.
        fds: the descriptors that came with the frame which `data` begins.
    """

    data: bytes = b""
    skip: int = 0
    fds: tuple[int, ...] = ()


NOTHING = Rest()


class Chunk(NamedTuple):
    """What one receive returned.

    Attributes:
        data: bytes of the stream.
        fds: descriptors. They belong to the frame that begins last in `data`: the kernel ends a
            receive behind the message that had them (unix(7), SCM_RIGHTS), and whoever sends
            descriptors sends one frame, from its first byte, in one message.
    """

    data: bytes
    fds: tuple[int, ...] = ()


def split(rest: Rest, chunks: Sequence[Chunk], max_frame: int) -> tuple[list[Frame], Rest]:
    """Cuts a stream into frames.

    Args:
        rest: what was left last time; `Rest()` at first.
        chunks: what came since.
        max_frame: in bytes, without the length. Of a longer frame its head alone is kept, and what
            else comes of it is passed over: the stream stays in step.

    Returns:
        The frames that are whole, or refused, and the new rest.
    """
    if not any(chunk.fds for chunk in chunks):
        data = rest.data + chunks[0].data if len(chunks) == 1 else _join(rest, chunks)
        return _cut(data, rest.skip, rest.fds, max_frame)
    frames: list[Frame] = []
    for chunk in chunks:
        more, rest = _cut(rest.data + chunk.data, rest.skip, rest.fds, max_frame, chunk.fds)
        frames += more
    return frames, rest


def _join(rest: Rest, chunks: Sequence[Chunk]) -> bytes:
    return b"".join((rest.data, *(chunk.data for chunk in chunks)))


def _cut(
    data: bytes, skip: int, fds: tuple[int, ...], max_frame: int, last_fds: tuple[int, ...] = ()
) -> tuple[list[Frame], Rest]:
    """`fds` belong to the frame that `data` begins with, `last_fds` to the one that begins last."""
    frames: list[Frame] = []
    size = len(data)
    if skip and skip >= size:
        return frames, Rest(b"", skip - size, fds + last_fds)
    view = memoryview(data)
    at = skip
    while size - at >= LENGTH.size:
        (length,) = LENGTH.unpack_from(data, at)
        end = at + LENGTH.size + length
        if length > max_frame:
            # Its head is needed for the id, so it is waited for; the rest is never kept.
            kept = at + LENGTH.size + HEAD
            if size < min(kept, end):
                break
            frames.append(Frame(data[at + LENGTH.size : min(kept, end)], length, True, fds))
        elif end <= size:
            frames.append(Frame(view[at + LENGTH.size : end], length, False, fds))
        else:
            break
        fds = ()
        at = end
    if at >= size:
        if last_fds and frames:
            frames[-1] = frames[-1]._replace(fds=frames[-1].fds + last_fds)
        return frames, Rest(b"", at - size) if at > size else NOTHING
    return frames, Rest(data[at:] if at else data, 0, fds + last_fds)


def needed(rest: Rest, max_frame: int) -> int:
    """How many bytes at least have to come before `split` has anything new to say: for a caller
    that collects the chunks of a long frame and would not have them joined again for each."""
    if rest.skip or len(rest.data) < LENGTH.size:
        return 1
    (length,) = LENGTH.unpack_from(rest.data)
    kept = min(length, HEAD) if length > max_frame else length
    return int(LENGTH.size + kept - len(rest.data))


def read_id(head: bytes | memoryview) -> int | None:
    """The id of a frame that cannot be decoded, or was not kept, from its first bytes: a msgpack
    array whose first element is an integer. None: it is neither."""
    head = bytes(head[:HEAD])
    at = {0xDC: 3, 0xDD: 5}.get(head[0], 1 if head[0] & 0xF0 == 0x90 else 0) if head else 0
    if not at or at >= len(head):
        return None
    tag = head[at]
    if tag < 0x80:
        return tag
    if tag >= 0xE0:
        return tag - 0x100
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}.get(tag, 0)
    number = head[at + 1 : at + 1 + size]
    if not size or len(number) < size:
        return None
    return int.from_bytes(number, "big", signed=tag >= 0xD0)
