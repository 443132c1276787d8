"""Any bytes as a stream of frames, cut anywhere: what comes of it is the same, and nothing but the
documented exceptions is raised. The first byte says where it is cut."""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["proctree.channel"]):
    from proctree.channel.frames import (
        DECODING_ERRORS,
        HEAD,
        NOTHING,
        Chunk,
        Frame,
        decode_request,
        decode_response,
        encode_request,
        encode_response,
        needed,
        read_id,
        split,
    )
    from proctree.channel.handlers import Handlers

import msgspec

from proctree.channel import Message, RemoteError

LIMIT = 512


class Ask(Message):
    key: str
    more: dict[str, int] | None = None


handlers = Handlers()
handlers.add(Ask, print, False)
handlers.add("any", print, False)


def plain(frames: list[Frame]) -> list[tuple[bytes, int, bool]]:
    return [(bytes(frame.data), frame.length, frame.refused) for frame in frames]


def cut(step: int, data: bytes) -> tuple[list[Frame], object]:
    rest, frames = NOTHING, []
    at = 0
    while at < len(data):
        piece = [Chunk(data[at : at + step])]
        count = needed(rest, LIMIT)
        assert count >= 1
        more, new = split(rest, piece, LIMIT)
        assert not more or len(piece[0].data) >= count or rest.skip, "needed claims too much"
        again, new_again = split(rest, piece, LIMIT)
        assert (plain(more), new) == (plain(again), new_again), "it has a memory"
        assert len(new.data) <= LIMIT + 3, "more is kept than one frame"
        rest = new
        frames += more
        at += step
    return frames, rest


def decode(frame: Frame) -> None:
    number = read_id(frame.data)
    if frame.refused:
        assert len(frame.data) == HEAD
        assert frame.length > LIMIT
        return
    try:
        request = decode_request(frame.data)
    except DECODING_ERRORS:
        pass
    else:
        assert request.id == number
        with contextlib.suppress(RemoteError):
            handlers.find(request.body)
        again = decode_request(encode_request(request.id, request.body)[4:])
        assert (again.id, bytes(again.body)) == (request.id, bytes(request.body))
    try:
        response = decode_response(frame.data)
    except DECODING_ERRORS:
        return
    assert response.id == number
    with contextlib.suppress(*DECODING_ERRORS):
        # What could be read can be written.
        encode_response(response.id, msgspec.msgpack.decode(response.body), response.error)


def one(data: bytes) -> None:
    step, stream = 1 + (data[0] if data else 0), data[1:]
    frames, rest = cut(step, stream)
    if stream:
        at_once, rest_at_once = split(NOTHING, [Chunk(stream)], LIMIT)
        assert (plain(frames), rest) == (plain(at_once), rest_at_once)
    for frame in frames:
        decode(frame)
    # And as one frame, whatever its length.
    decode(Frame(stream, len(stream)))


atheris.Setup(sys.argv, one)
atheris.Fuzz()
