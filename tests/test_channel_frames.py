"""The bytes on the wire, and how a stream of them is cut into frames."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proctree.channel.frames import (
    DECODING_ERRORS,
    HEAD,
    LENGTH,
    NOTHING,
    Chunk,
    Frame,
    Rest,
    TooLong,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    needed,
    read_id,
    split,
)
from proctree.channel.wire import RECEIVE, Wire

# -- the same bytes as others send

SAME_REQUESTS = [
    (0, None, "000000039200c0"),
    (1, None, "000000039201c0"),
    (127, None, "00000003927fc0"),
    (128, None, "0000000492cc80c0"),
    (255, None, "0000000492ccffc0"),
    (256, None, "0000000592cd0100c0"),
    (65535, None, "0000000592cdffffc0"),
    (65536, None, "0000000792ce00010000c0"),
    (2**31, None, "0000000792ce80000000c0"),
    (2**32 - 1, None, "0000000792ceffffffffc0"),
    (2**32, None, "0000000b92cf0000000100000000c0"),
    (2**63 - 1, None, "0000000b92cf7fffffffffffffffc0"),
    (1, {}, "00000003920180"),
    (
        0,
        {"key": "k", "type": "GetVariable"},
        "0000001a920082a36b6579a16ba474797065ab4765745661726961626c65",
    ),
    (
        65536,
        {"a": {"b": [1, -1, None, True, False, 1.5, "x" * 40, b"\x00\xff"], "c": {}}, "d": []},
        "0000004f92ce0001000082a16182a1629801ffc0c3c2cb3ff8000000000000d928" + "78" * 40 + "c402"
        "00ffa16380a16490",
    ),
    # A text of 300 bytes has a header of three.
    (1, {"k": "x" * 300}, "00000134920181a16bda012c" + "78" * 300),
]
"""Recorded from the task SDK of Airflow 3.2."""

SAME_ANSWERS = [
    (0, None, None, "000000049300c0c0"),
    (127, None, None, "00000004937fc0c0"),
    (128, None, None, "0000000593cc80c0c0"),
    (65536, None, None, "0000000893ce00010000c0c0"),
    (2**63 - 1, None, None, "0000000c93cf7fffffffffffffffc0c0"),
    (1, {}, None, "00000004930180c0"),
    (
        128,
        {"key": "k", "value": "v", "type": "VariableResult"},
        None,
        "0000002793cc8083a36b6579a16ba576616c7565a176a474797065ae5661726961626c65526573756c74c0",
    ),
    (
        2,
        None,
        {"error": "VARIABLE_NOT_FOUND", "detail": {"key": "k"}, "type": "ErrorResponse"},
        "0000003e9302c083a56572726f72b25641524941424c455f4e4f545f464f554e44a664657461696c81a36b6579"
        "a16ba474797065ad4572726f72526573706f6e7365",
    ),
    (3, {"a": 1}, {"b": 2}, "0000000a930381a1610181a16202"),
]
"""Recorded from the task SDKs of Airflow 3.2 and 3.3: answers are the same in both."""


@pytest.mark.parametrize(("number", "body", "expected"), SAME_REQUESTS)
def test_requests_are_the_same_bytes(number: int, body: Any, expected: str) -> None:
    frame = encode_request(number, body)
    assert frame.hex() == expected
    request = decode_request(frame[LENGTH.size :])
    assert request.id == number
    assert msgspec.msgpack.decode(request.body) == body


@pytest.mark.parametrize(("number", "body", "error", "expected"), SAME_ANSWERS)
def test_answers_are_the_same_bytes(number: int, body: Any, error: Any, expected: str) -> None:
    frame = encode_response(number, body, error)
    assert frame.hex() == expected
    response = decode_response(frame[LENGTH.size :])
    assert (response.id, response.error) == (number, error)
    assert msgspec.msgpack.decode(response.body) == body


@pytest.mark.parametrize("more", ["c0", "81ab7472616365706172656e74a178", "c007"])
def test_requests_with_more_elements(more: str) -> None:
    """Airflow 3.3 sends a third one: null, or a mapping."""
    count = 3 + (more == "c007")
    request = decode_request(bytes([0x90 + count]) + bytes.fromhex("0581a16b01" + more))
    assert request.id == 5
    assert msgspec.msgpack.decode(request.body) == {"k": 1}


def test_elements_that_are_missing_are_null() -> None:
    assert msgspec.msgpack.decode(decode_request(b"\x91\x05").body) is None
    response = decode_response(b"\x91\x05")
    assert (msgspec.msgpack.decode(response.body), response.error) == (None, None)


@pytest.mark.parametrize("size", [1024, 1025])
def test_the_limit_is_of_what_follows_the_length(size: int) -> None:
    body = "x" * (size - 5)
    if size == 1024:
        assert len(encode_request(1, body, 1024)) == 4 + 1024
    else:
        with pytest.raises(TooLong) as caught:
            encode_request(1, body, 1024)
        assert caught.value.length == 1025


def test_what_cannot_be_encoded() -> None:
    for body, error in ((object(), TypeError), (2**70, OverflowError), ("\udc80", UnicodeError)):
        with pytest.raises(error):
            encode_request(1, body)


# -- cutting the stream

LIMIT = 100


def reference(stream: bytes) -> tuple[list[Frame], bytes, int]:
    """The frames of a whole stream, what is left of it, and what is to be skipped: simple, slow."""
    frames = []
    while len(stream) >= 4:
        (length,) = struct.unpack(">I", stream[:4])
        body = stream[4 : 4 + length]
        if length <= LIMIT and len(body) == length:
            frames.append(Frame(body, length))
        elif length > LIMIT and len(body) >= HEAD:
            frames.append(Frame(body[:HEAD], length, True))
            if len(body) < length:
                return frames, b"", length - len(body)
        else:
            break
        stream = stream[4 + length :]
    return frames, stream, 0


def plain(frames: list[Frame]) -> list[tuple[bytes, int, bool, tuple[int, ...]]]:
    return [(bytes(frame.data), frame.length, frame.refused, frame.fds) for frame in frames]


def body(length: int, number: int) -> bytes:
    """So long, and told from others."""
    return (bytes([0x92, 0xCD]) + struct.pack(">H", number) + bytes([0xC0] * length))[:length]


LENGTHS = st.lists(
    st.one_of(
        st.integers(0, 3),
        st.integers(4, 60),
        st.sampled_from([HEAD - 1, HEAD, HEAD + 1, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 2]),
        st.integers(LIMIT + 1, 3 * LIMIT),
    ),
    max_size=12,
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int], list[int]]:
    """A stream, where it is cut, and which of the chunks are given to one call."""
    lengths = draw(LENGTHS)
    whole = b"".join(struct.pack(">I", n) + body(n, i) for i, n in enumerate(lengths))
    whole = whole[: len(whole) - draw(st.integers(0, min(len(whole), 50)))]
    cuts = sorted(set(draw(st.lists(st.integers(0, len(whole)), max_size=20))))
    calls = draw(st.lists(st.integers(1, 4), min_size=1, max_size=30))
    return whole, cuts, calls


def pieces(whole: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *cuts, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(edges) if b > a]


@given(streams())
@example((struct.pack(">I", 0) * 3, [1, 2, 3], [1]))
@example((struct.pack(">I", LIMIT + 1) + body(LIMIT + 1, 7) + b"\0\0\0\1\5", [4 + HEAD], [1]))
def test_however_it_is_cut_the_frames_are_the_same(
    case: tuple[bytes, list[int], list[int]],
) -> None:
    whole, cuts, calls = case
    expected, left, skip = reference(whole)
    chunks = [Chunk(piece) for piece in pieces(whole, cuts)]
    rest, frames = NOTHING, []
    at = turn = 0
    while at < len(chunks):
        count = calls[turn % len(calls)]
        turn += 1
        given_now = chunks[at : at + count]
        at += count
        more, new_rest = split(rest, given_now, LIMIT)
        again, rest_again = split(rest, given_now, LIMIT)
        assert (plain(more), new_rest) == (plain(again), rest_again)  # it has no memory
        frames += more
        rest = new_rest
    assert plain(frames) == plain(expected)
    assert (rest.data, rest.skip) == (left, skip)
    # As many chunks as there are may be given at once, too.
    frames_at_once, rest_at_once = split(NOTHING, chunks, LIMIT) if chunks else ([], NOTHING)
    assert plain(frames_at_once) == plain(expected)
    assert (rest_at_once.data, rest_at_once.skip) == (left, skip)


@given(LENGTHS)
def test_byte_by_byte(lengths: list[int]) -> None:
    """And `needed` is exact: with one byte less there is nothing new, with so many there is."""
    whole = b"".join(struct.pack(">I", n) + body(n, i) for i, n in enumerate(lengths))
    expected, _, _ = reference(whole)
    rest, frames = NOTHING, []
    for at in range(len(whole)):
        count = needed(rest, LIMIT)
        assert count >= 1
        if not rest.skip and len(rest.data) >= LENGTH.size:
            if at + count <= len(whole):
                assert split(rest, [Chunk(whole[at : at + count])], LIMIT)[0]
            assert not split(rest, [Chunk(whole[at : at + count - 1])], LIMIT)[0]
        more, rest = split(rest, [Chunk(whole[at : at + 1])], LIMIT)
        assert len(more) <= 1 or not all(lengths)
        frames += more
    assert plain(frames) == plain(expected)
    assert rest == NOTHING


@given(st.integers(0, 2**16 - 1), st.integers(LIMIT + 1, 2**32 - 1), st.integers(0, 200))
def test_a_refused_frame_keeps_its_id_and_the_stream_in_step(
    number: int, length: int, more: int
) -> None:
    head = (b"\x92\xcd" + struct.pack(">H", number)).ljust(HEAD, b"\xc0")
    start = struct.pack(">I", length) + head
    frames, rest = split(NOTHING, [Chunk(b"\0\0\0\1\7" + start)], LIMIT)
    assert plain(frames) == [(b"\7", 1, False, ()), (head, length, True, ())]
    assert read_id(frames[1].data) == number
    assert rest == Rest(b"", length - HEAD)
    # Nothing is kept of what comes of it, and the frame behind it is whole.
    more = min(more, length - HEAD)
    frames, rest = split(rest, [Chunk(b"x" * more)], LIMIT)
    assert (frames, rest.data, rest.skip) == ([], b"", length - HEAD - more)
    frames, rest = split(Rest(b"", 5), [Chunk(b"xxxxx\0\0\0\1\7")], LIMIT)
    assert plain(frames) == [(b"\7", 1, False, ())]
    assert rest == NOTHING


@st.composite
def messages(draw: st.DrawFn) -> list[tuple[list[int], tuple[int, ...]]]:
    """What was sent: several frames at once without descriptors, or one frame with some."""
    sent = []
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.booleans()):
            fds = tuple(draw(st.lists(st.integers(3, 500), min_size=1, max_size=3)))
            sent.append(([draw(st.integers(1, 2 * LIMIT))], fds))
        else:
            sent.append((draw(st.lists(st.integers(1, 2 * LIMIT), min_size=1, max_size=4)), ()))
    return sent


@given(messages(), st.integers(1, 80), st.booleans())
def test_descriptors_go_to_the_frame_they_came_with(
    sent: list[tuple[list[int], tuple[int, ...]]], most: int, at_once: bool
) -> None:
    """As the kernel hands them out (unix(7)): with the first byte of their message, and what is
    received ends with that message at the latest; what came before it may be in front."""
    number = 0
    expected = []
    chunks: list[Chunk] = []
    joined = b""
    for lengths, fds in sent:
        data = b""
        for length in lengths:
            data += struct.pack(">I", length) + body(length, number)
            expected.append((length, fds))
            number += 1
        if not fds:
            joined += data
            continue
        # Its first byte may come with the end of what was before.
        before = len(joined) - most // 2 if len(joined) > most // 2 else 0
        chunks += [Chunk(joined[a : min(a + most, before)]) for a in range(0, before, most)]
        first = data[: max(1, most - most // 2)]
        chunks.append(Chunk(joined[before:] + first, fds))
        joined = data[len(first) :]
        # What follows is another message, and a receive may have both.
    chunks += [Chunk(joined[a : a + most]) for a in range(0, len(joined), most)]
    chunks = [chunk for chunk in chunks if chunk.data]
    frames: list[Frame] = []
    rest = NOTHING
    for step in [chunks] if at_once else [[chunk] for chunk in chunks]:
        more, rest = split(rest, step, LIMIT)
        frames += more
    assert rest == NOTHING
    assert [(frame.length, frame.fds) for frame in frames] == expected


# -- ids of what cannot be decoded

ARRAYS = [b"\x91", b"\x92", b"\x9f", b"\xdc\x00\x02", b"\xdd\x00\x00\x00\x02"]


@given(st.sampled_from(ARRAYS), st.integers(-(2**63), 2**64 - 1))
def test_read_id_of_any_integer(array: bytes, number: int) -> None:
    assert read_id(array + msgspec.msgpack.encode(number) + b"\xc1\xc1") == number


INTEGERS = [
    (b"\x00", 0),
    (b"\x7f", 127),
    (b"\xe0", -32),
    (b"\xff", -1),
    (b"\xcc\x05", 5),
    (b"\xcd\x00\x05", 5),
    (b"\xce\x00\x00\x00\x05", 5),
    (b"\xcf" + bytes(7) + b"\x05", 5),
    (b"\xcf" + b"\xff" * 8, 2**64 - 1),
    (b"\xd0\xfb", -5),
    (b"\xd1\xff\xfb", -5),
    (b"\xd2\xff\xff\xff\xfb", -5),
    (b"\xd3" + b"\xff" * 7 + b"\xfb", -5),
    (b"\xd3\x80" + bytes(7), -(2**63)),
    (b"\xd0\x05", 5),
]
"""Any encoding will do, not only the shortest."""


@pytest.mark.parametrize(("data", "number"), INTEGERS)
@pytest.mark.parametrize("array", ARRAYS)
def test_read_id_of_any_encoding(data: bytes, number: int, array: bytes) -> None:
    assert read_id(array + data) == number
    assert read_id(memoryview(array + data)) == number
    assert decode_request(b"\x92" + data + b"\xc0").id == number
    for cut in range(len(data)):
        assert read_id(array + data[:cut]) is None


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x90", b"\x92", b"\xdc", b"\xdc\x00", b"\xdd\x00\x00\x00"),
        *(b"\x05", b"\x82\x01\x02", b"\xa1\x05", b"\x92\xc0", b"\x92\xc2", b"\x92\xa1\x31"),
        *(b"\x92\xcb" + bytes(8), b"\x92\x91\x05", b"\x92\xc1", b"\xc1\x05"),
    ],
)
def test_no_id(data: bytes) -> None:
    assert read_id(data) is None


@given(st.binary(max_size=60))
def test_an_id_is_read_wherever_it_is_decoded(data: bytes) -> None:
    for decode in (decode_request, decode_response):
        try:
            number = decode(data).id
        except DECODING_ERRORS:
            continue
        assert read_id(data) == number


# -- the shortcut for an answer that comes alone


@given(
    st.lists(st.sampled_from([0, 1, 2, 50, 1000, 1024, 1025, 3000]), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_the_wire_cuts_as_split_does(lengths: list[int], first: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        wire = Wire(ours, 1024, with_fds=False)
        whole = b"".join(struct.pack(">I", n) + body(n, i) for i, n in enumerate(lengths))
        frames: list[Frame] = []
        for part in (whole[:first], whole[first:]):
            if part:
                theirs.sendall(part)
                while wire.pump(frames.append, lambda *_: []):
                    pass
        expected, rest = split(NOTHING, [Chunk(whole)], 1024)
        assert plain(frames) == plain(expected)
        assert len(whole) < RECEIVE
        assert wire.awaited == (0 if rest == NOTHING else needed(rest, 1024))
        wire.close()
