"""What becomes of a stream's bytes: against references that are too simple to be wrong."""

from __future__ import annotations

import encodings.aliases
import io
import itertools
import logging
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proctree import Cut, Lines
from proctree.output import (
    LINES_AT_ONCE,
    PENDING_MAX,
    CallbackErrors,
    CallbackSink,
    CaptureSink,
    LineCutter,
    chunk_delivery,
    line_delivery,
)
from proctree.worker import Worker

LONG = 60.0

# Bytes in which newlines, torn characters and what is never valid are frequent.
texts = st.lists(
    st.sampled_from([b"\n", b"a", b"bc", b"\xc3\xa4", b"\xc3", b"\xff", b"\0", b"\r", b"\xe2\x82"])
).map(b"".join)
anything = st.one_of(texts, st.binary(max_size=60))


def chunks_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# -- lines


def lines_of(data: bytes, max_length: int, encoding: str = "utf-8") -> list[str]:
    """The reference: all at once, line by line."""
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    pieces = []
    for line in lines:
        starts = range(0, len(line), max_length) if line else [0]
        pieces += [line[at : at + max_length] for at in starts]
    return [piece.decode(encoding, "replace") for piece in pieces]


def cut(chunks: list[bytes], max_length: int, encoding: str = "utf-8") -> list[str]:
    cutter = LineCutter(max_length, encoding)
    lines: list[str] = []
    for chunk in chunks:
        lines += cutter.feed(chunk)
        # What is kept is never more than a line, or than what just came.
        assert len(cutter._rest) <= max(max_length, len(chunk))
    return lines + cutter.finish()


@given(anything, st.lists(st.integers(0, 1000), max_size=10), st.integers(1, 9))
@example(b"abcd\n", [4], 4)
@example(b"abcdabcd\nx", [4, 8], 4)
@example(b"\n\n\n", [], 1)
@example(b"abcd", [], 4)
def test_any_chunking_gives_the_same_lines(data, cuts, max_length):
    assert cut(chunks_of(data, cuts), max_length) == lines_of(data, max_length)


@given(anything, st.lists(st.integers(0, 1000), max_size=10))
def test_short_lines_are_those_of_the_text(data, cuts):
    """Apart from the reference: decoding first and splitting then is the same, for UTF-8."""
    lines = data.decode("utf-8", "replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    assert cut(chunks_of(data, cuts), 1000) == lines


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "gbk", "shift_jis", "euc_jp"])
@given(st.binary(max_size=40), st.lists(st.integers(0, 1000), max_size=5))
@example(b"\x81\n\x81\n", [])
def test_other_encodings(encoding, data, cuts):
    assert cut(chunks_of(data, cuts), 1000, encoding) == lines_of(data, 1000, encoding)


def test_only_newlines_end_a_line():
    assert cut(["a\rb\x0bc\x0cd\x1ce\x85f\u2028g\r\nh".encode()], 1000) == [
        "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\r",
        "h",
    ]


def test_a_long_line_comes_in_pieces_as_soon_as_they_are_there():
    cutter = LineCutter(4)
    assert cutter.feed(b"abcdef") == ["abcd"]
    assert cutter.feed(b"ghijk") == ["efgh"]
    assert cutter.feed(b"lm\nno") == ["ijkl", "m"]
    assert cutter.finish() == ["no"]
    assert cutter.finish() == []


def test_a_character_is_torn_only_where_a_line_is_cut():
    assert cut(["ä".encode()[:1], "ä".encode()[1:] + b"\n"], 100) == ["ä"]
    assert cut(["aä\n".encode()], 2) == ["a\ufffd", "\ufffd"]


@pytest.mark.parametrize("encoding", sorted({*encodings.aliases.aliases.values(), "idna"}))
def test_no_encoding_that_is_accepted_ever_raises(encoding):
    try:
        Lines(print, encoding=encoding)
    except (LookupError, ValueError):
        return
    cutter = LineCutter(encoding=encoding)
    for data in (bytes(range(256)), b"\xff\n", b"\\x\n", b"+\n"):
        assert all(isinstance(line, str) for line in cutter.feed(data))
    cutter.finish()


# -- capture


def captured(chunks: list[bytes], limit: int) -> tuple[bytes, Cut | None]:
    sink = CaptureSink(limit)
    for chunk in chunks:
        # The loop's one buffer is written over by the next read.
        buffer = bytearray(chunk)
        assert sink.feed(memoryview(buffer))
        buffer[:] = b"#" * len(buffer)
    return sink.result()


@given(st.binary(max_size=60), st.lists(st.integers(0, 1000), max_size=10), st.integers(1, 50))
@example(b"abc", [], 1)
@example(b"abcdef", [1, 2, 3, 4, 5], 3)
def test_head_and_tail(data, cuts, limit):
    kept, missing = captured(chunks_of(data, cuts), limit)
    if len(data) <= limit:
        assert (kept, missing) == (data, None)
        return
    head = limit // 2
    assert missing == Cut(head, len(data) - limit)
    assert kept == data[:head] + data[len(data) - (limit - head) :]


def held(sink: CaptureSink) -> int:
    """Bytes of memory, all told."""
    seen: list[object] = [getattr(sink, name) for name in CaptureSink.__slots__]
    size = 0
    while seen:
        value = seen.pop()
        size += sys.getsizeof(value)
        if isinstance(value, memoryview):
            size += value.nbytes
        elif not isinstance(value, (bytes, bytearray, str, int, io.BytesIO)):
            seen.extend(value)  # type: ignore[call-overload]
    return size


@pytest.mark.parametrize("piece", [2, 100, 64 * 1024])
def test_memory_of_a_capture_is_bounded_whatever_the_pieces(piece):
    """A program that flushes after every word makes small pieces, and many."""
    limit = 64 * 1024
    sink = CaptureSink(limit)
    data = memoryview(bytes(piece))
    most = 0
    for fed in range(0, 8 * limit, piece):
        sink.feed(data)
        if fed % limit < piece:
            most = max(most, held(sink))
    assert most <= 4 * limit + 2 * piece


# -- callbacks


class Reader:
    """What a stream does: it feeds, and stops until it is told to go on."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        self.worker = Worker()
        self.resumed = threading.Event()
        self.ended = threading.Event()
        self.pauses = 0
        self.sink = CallbackSink(self.worker, deliver, lambda: None, self.resumed.set)

    def feed(self, data: bytes) -> None:
        self.resumed.clear()
        if not self.sink.feed(data):
            self.pauses += 1
            assert self.resumed.wait(LONG), "reading stopped for ever"

    def finish(self) -> None:
        self.sink.end(self.ended.set)
        assert self.ended.wait(LONG)


@pytest.mark.parametrize("size", [PENDING_MAX // 100, PENDING_MAX // 2, PENDING_MAX + 1])
def test_a_callback_that_is_slower_than_the_reader_loses_nothing(size):
    got: list[bytes] = []
    reader = Reader(got.append)
    sent = [bytes([number % 256]) * size for number in range(300)]
    for data in sent:
        reader.feed(data)
    reader.finish()
    assert got == sent


def test_a_callback_that_is_blocked_stops_the_reading_and_then_lets_it_go_on():
    gate, got = threading.Event(), []

    def deliver(data: bytes) -> None:
        gate.wait(LONG)
        got.append(data)

    reader = Reader(deliver)
    piece = bytes(64 * 1024)
    fed = 1
    while reader.sink.feed(piece):
        fed += 1
        assert fed * len(piece) <= PENDING_MAX
    assert not reader.resumed.is_set()
    gate.set()
    assert reader.resumed.wait(LONG)
    reader.finish()
    assert len(got) == fed


def test_many_small_pieces_stop_the_reading_too():
    """Each costs some hundred bytes to keep, however small it is."""
    gate = threading.Event()
    reader = Reader(lambda _data: gate.wait(LONG) and None)
    pieces = 1
    try:
        while pieces < 50_000 and reader.sink.feed(b"x"):
            pieces += 1
    finally:
        gate.set()
        reader.finish()
    assert pieces < 50_000


def test_it_is_at_the_end_when_all_was_delivered_and_nothing_is_to_be_finished():
    gate, done = threading.Event(), threading.Event()
    worker = Worker()
    sink = CallbackSink(worker, lambda _data: gate.wait(LONG) and None, None, lambda: None)
    assert sink.at_end
    sink.feed(b"x")
    assert not sink.at_end
    gate.set()
    worker.post(done.set)
    assert done.wait(LONG)
    assert sink.at_end
    assert not CallbackSink(worker, lambda _data: None, lambda: None, lambda: None).at_end


def test_what_waits_is_not_delivered_after_a_drop():
    gate, begun, got = threading.Event(), threading.Event(), []

    def deliver(data: bytes) -> None:
        got.append(data)
        begun.set()
        gate.wait(LONG)

    finished: list[bool] = []
    worker, ended = Worker(), threading.Event()
    sink = CallbackSink(worker, deliver, lambda: finished.append(True), lambda: None)
    sink.feed(b"one")
    sink.feed(b"two")
    assert begun.wait(LONG)
    sink.drop()
    sink.end(ended.set)
    gate.set()
    assert ended.wait(LONG)
    assert (got, finished) == ([b"one"], [])


def refuse(_value: object) -> None:
    raise ValueError("no")


def test_a_chunk_callback_that_raises_is_counted(caplog):
    caplog.set_level(logging.ERROR, "proctree")
    errors = CallbackErrors("id")
    deliver, finish = chunk_delivery(refuse, "stdout", errors)
    for _ in range(3):
        deliver(b"x")
    assert (errors.count, finish) == (3, None)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["callback.failed"]


def test_a_line_callback_that_raises_misses_no_line():
    got: list[str] = []

    def callback(line: str) -> None:
        got.append(line)
        if line in ("b", "d"):
            raise ValueError(line)

    errors = CallbackErrors("id")
    deliver, finish = line_delivery(callback, LineCutter(), "stdout", errors, lambda: None)
    deliver(b"a\nb\nc\nd")
    finish()
    assert (got, errors.count) == (["a", "b", "c", "d"], 2)


@pytest.mark.parametrize("line", [b"\n", b"some words\n"])
def test_others_get_their_turn_in_a_flood_of_lines(line):
    got: list[str] = []
    breaths: list[int] = []
    deliver, _ = line_delivery(
        got.append, LineCutter(), "stdout", CallbackErrors("id"), lambda: breaths.append(len(got))
    )
    deliver(line * 10_000)
    assert len(got) == 10_000
    assert max(b - a for a, b in itertools.pairwise([0, *breaths, len(got)])) <= LINES_AT_ONCE


def test_each_stream_is_reported_once(caplog):
    caplog.set_level(logging.ERROR, "proctree")
    errors = CallbackErrors("id")
    for stream in ("stdout", "stderr", "stdout"):
        errors.caught(stream, ValueError("no"))
    assert len(caplog.records) == 2
