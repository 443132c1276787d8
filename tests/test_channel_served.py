"""The supervisor's side of a channel, and clients that say what they like: see channel_ends.py."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from channel_ends import DEADLINE, Client, Ends, Stuck, Told, eventually, frame, framed, told, warm
from forks import is_open
from proctree.channel import (
    Answer,
    Caller,
    ChannelClosed,
    ChannelFull,
    FrameTooLarge,
    Message,
    RemoteError,
    Server,
    served,
)
from proctree.channel.lane import BATCH
from proctree.channel.passed import MOST_FDS, SO_PASSRIGHTS
from proctree.channel.served import LONG, MOST_NOTIFICATIONS

__all__ = ["told", "warm"]

pytestmark = pytest.mark.usefixtures("told")


class Ask(Message):
    key: str


class Reply(Message):
    key: str
    where: str = ""


class Picky(Message):
    key: str

    def __post_init__(self) -> None:
        raise KeyError(self.key)


def ask(key: str, kind: str = "Ask") -> dict[str, str]:
    return {"type": kind, "key": key}


class Gate:
    """Handlers that wait until they are let through, and who counts them."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._lock = threading.Lock()
        self.inside = 0
        self.most = 0
        self.begun: list[str] = []

    def __call__(self, request: Any, _caller: Caller) -> Reply:
        key = request.key if isinstance(request, Ask) else request["key"]
        with self._lock:
            self.begun.append(key)
            self.inside += 1
            self.most = max(self.most, self.inside)
        if not self._open.wait(DEADLINE):
            raise Stuck("the gate opens")
        with self._lock:
            self.inside -= 1
        return Reply(key)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def echo(server: Server | None = None) -> Server:
    """A server that says at once whose request it was."""
    server = server or Server()
    server.handle(Ask, lambda request, _: Reply(request.key), inline=True)
    return server


# -- where handlers run, and what comes of them


def test_on_a_thread_in_a_task_or_on_the_spot() -> None:
    server = Server()

    @server.handler
    def on_a_thread(request: Ask, caller: Caller) -> Reply:
        assert (caller.tree_id, caller.name) == ("0123456789abcdef", "test")
        return Reply(request.key, threading.current_thread().name)

    async def in_a_task(request: Any, _caller: Caller) -> Reply:
        await asyncio.sleep(0)
        return Reply(request["key"], threading.current_thread().name)

    def on_the_spot(request: Any, _caller: Caller) -> Reply:
        return Reply(request["key"], threading.current_thread().name)

    server.handle("task", in_a_task)
    server.handle("spot", on_the_spot, inline=True)
    with Ends(server) as ends, ends.connect() as client:
        for number, (kind, where) in enumerate(
            [
                ("Ask", "proctree-callbacks"),
                ("task", "proctree-handlers"),
                ("spot", "proctree-channel"),
            ],
            7,
        ):
            _, body, error = client.ask(number, ask(f"k{number}", kind))
            assert (body, error) == ({"type": "Reply", "key": f"k{number}", "where": where}, None)


class BrokenError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def raises(error: BaseException) -> Callable[[Any, Caller], None]:
    def handler(_request: Any, _caller: Caller) -> None:
        raise error

    return handler


def araises(error: BaseException) -> Callable[[Any, Caller], Any]:
    async def handler(_request: Any, _caller: Caller) -> None:
        raise error

    return handler


RAISED: list[tuple[BaseException, dict[str, Any]]] = [
    (RemoteError("Mine", "m", [1]), {"type": "Mine", "message": "m", "detail": [1]}),
    (ValueError("bad"), {"type": "ValueError", "message": "bad", "detail": None}),
    (SystemExit(3), {"type": "SystemExit", "message": "3", "detail": None}),
    (KeyboardInterrupt(), {"type": "KeyboardInterrupt", "message": "", "detail": None}),
    (BrokenError(), {"type": "BrokenError", "message": "<BrokenError>", "detail": None}),
]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("error", "wire"), RAISED, ids=lambda value: type(value).__name__)
def test_what_a_handler_raises(
    error: BaseException, wire: dict[str, Any], inline: bool, told: Told
) -> None:
    server = echo()
    server.handle("raise", raises(error), inline=inline)
    with Ends(server) as ends, ends.connect() as client:
        assert client.ask(3, ask("x", "raise")) == [3, None, wire]
        assert client.ask(4, ask("after"))[1]["key"] == "after"
        eventually(lambda: not ends.served._under_way, "all is done")
    assert bool(told.named("channel.handler_failed")) is not isinstance(error, RemoteError)


@pytest.mark.parametrize("error", [RemoteError("Mine", "m"), ValueError("bad"), BrokenError()])
def test_what_an_async_handler_raises(error: Exception) -> None:
    server = echo()
    server.handle("raise", araises(error))
    with Ends(server) as ends, ends.connect() as client:
        assert client.ask(3, ask("x", "raise"))[2]["type"] in ("Mine", "ValueError", "BrokenError")
        assert client.ask(4, ask("after"))[1]["key"] == "after"
        eventually(lambda: not ends.served._under_way, "all is done")


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (object(), "UnencodableAnswer"),
        ("\udc80", "UnencodableAnswer"),
        (2**70, "UnencodableAnswer"),
        (b"x" * 2049, "AnswerTooLarge"),
        (Answer("x", [object()]), "UnencodableAnswer"),
        (Answer("x", 5), "UnencodableAnswer"),  # type: ignore[arg-type]
        (Answer("x", [-1]), "UnencodableAnswer"),
        (Answer("x", [True]), "UnencodableAnswer"),
    ],
    ids=["object", "surrogate", "integer", "long", "no fileno", "no fds", "no fd", "bool"],
)
def test_an_answer_that_cannot_be_sent(answer: Any, kind: str, inline: bool) -> None:
    server = echo(Server(max_frame=2048))
    server.handle("bad", lambda *_: answer, inline=inline)
    with Ends(server) as ends, ends.connect() as client:
        _, body, error = client.ask(5, ask("x", "bad"))
        assert (body, error["type"]) == (None, kind)
        assert client.ask(6, ask("after"))[1]["key"] == "after"
        eventually(lambda: not ends.served._under_way, "all is done")


def test_an_error_whose_detail_cannot_be_encoded() -> None:
    server = echo()
    server.handle("raise", raises(RemoteError("Mine", "m", object())))
    with Ends(server) as ends, ends.connect() as client:
        assert client.ask(3, ask("x", "raise"))[2]["type"] == "UnencodableAnswer"


# -- what a tree may send


DEEP = b"\x91" * 100_000
BODIES = {
    "unknown": (msgspec.msgpack.encode({"type": "nobody"}), "UnknownType"),
    "no type": (msgspec.msgpack.encode({"key": "x"}), "UnknownType"),
    "no mapping": (msgspec.msgpack.encode([1]), "UnknownType"),
    "nil": (b"\xc0", "UnknownType"),
    "invalid field": (msgspec.msgpack.encode({"type": "Ask", "key": 5}), "InvalidBody"),
    "missing field": (msgspec.msgpack.encode({"type": "Ask"}), "InvalidBody"),
    "text that is none": (b"\x82\xa4type\xa3Ask\xa3key\xa2\xff\xff", "InvalidBody"),
    "type that is no text": (b"\x81\xa4type\xa2\xff\xff", "UnknownType"),
    "its own check": (msgspec.msgpack.encode(ask("x", "Picky")), "InvalidBody"),
    "deep value": (b"\x82\xa4type\xa3any\xa1x" + DEEP + b"\xc0", "Undecodable"),
    "mapping as key": (b"\x82\xa4type\xa3any\x80\x01", "UnknownType"),
    "time": (b"\x82\xa4type\xa3any\xa1x\xc7\x0c\xff" + b"\xff" * 12, "InvalidBody"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_none(name: str, told: Told) -> None:
    body, kind = BODIES[name]
    server = echo()
    server.handle(Picky, raises(AssertionError("never called")))
    server.handle("any", raises(AssertionError("never called")))
    with Ends(server) as ends, ends.connect() as client:
        client.send(framed(b"\x92\x07" + body))
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[1], answer[2]["type"]) == (7, None, kind)
        assert client.ask(8, ask("after"))[1]["key"] == "after"
        eventually(lambda: not ends.served._under_way, "all is done")
    assert [event["type"] for event in told.named("channel.request_refused")] == [kind]


FRAMES = {
    "nothing": (b"", 0),
    "no array": (b"\x05", 0),
    "no id": (b"\x90", 0),
    "text as id": (b"\x92\xa1x\xc0", 0),
    "number that is no integer": (b"\x92\xcb" + struct.pack(">d", 1.0) + b"\xc0", 0),
    "truncated": (b"\x92\x09", 9),
    "trailing": (b"\x92\x09\xc0\xc0", 9),
    "unused byte": (b"\x92\x09\xc1", 9),
    "array of 4 G": (b"\x92\x09\xdd\xff\xff\xff\xff", 9),
    "map of 4 G": (b"\x92\x09\xdf\xff\xff\xff\xff", 9),
    "text of 4 G": (b"\x92\x09\xdb\xff\xff\xff\xff", 9),
    "extension of 4 G": (b"\x92\x09\xc9\xff\xff\xff\xff\x05", 9),
    "array of 4 G around it": (b"\xdd\xff\xff\xff\xff\x09", 9),
    "deep": (DEEP, 0),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_none(name: str) -> None:
    """It is answered too: whoever sent it may be waiting. Without an id it is for nobody."""
    data, number = FRAMES[name]
    with Ends(echo()) as ends, ends.connect() as client:
        client.send(framed(data))
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[1], answer[2]["type"]) == (number, None, "Undecodable")
        assert client.ask(8, ask("after"))[1]["key"] == "after"
        eventually(lambda: not ends.served._under_way, "all is done")


@pytest.mark.parametrize("number", [-1, -33, -(2**63), 0, 2**32, 2**63, 2**64 - 1])
def test_any_integer_is_an_id(number: int) -> None:
    with Ends(echo()) as ends, ends.connect() as client:
        assert client.ask(number, ask("x"))[1]["key"] == "x"


def test_more_elements_and_fewer() -> None:
    """Others send a third one (null or a mapping); a request without a body has none."""
    with Ends(echo()) as ends, ends.connect() as client:
        client.send(frame([1, ask("x"), None]) + frame([2, ask("y"), {"a": "b"}, 7]) + frame([3]))
        answers = [client.receive() for _ in range(3)]
        assert [answer[1] and answer[1]["key"] for answer in answers if answer] == ["x", "y", None]
        assert answers[2] is not None
        assert (answers[2][0], answers[2][2]["type"]) == (3, "UnknownType")


def test_the_limit_of_a_frame() -> None:
    server = echo(Server(max_frame=4096))
    with Ends(server) as ends, ends.connect() as client:
        room = 4096 - len(frame([1, ask("")])) + 4 - 2  # the text's header grows by two
        exact = frame([1, ask("x" * room)])
        assert len(exact) == 4 + 4096
        client.send(exact)
        answer = client.receive()  # it would be longer than its question
        assert answer is not None
        assert (answer[0], answer[2]["type"]) == (1, "AnswerTooLarge")
        client.send(frame([2, ask("x" * (room + 1))]) + frame([3, ask("after")]))
        refused, after = client.receive(), client.receive()
        assert refused is not None
        assert (refused[0], refused[2]["type"]) == (2, "FrameTooLarge")
        assert after is not None
        assert after[:2] == [3, {"type": "Reply", "key": "after", "where": ""}]


def test_what_it_quotes_is_short(told: Told) -> None:
    """A tree must not fill the log, or have us send it more than it sent."""
    long = "\0" * (2 << 20)
    kind = {"type": "Ask", "key": {long: 1}}
    with Ends(echo()) as ends, ends.connect() as client:
        for body in (ask("x", long), kind, {"type": long, "key": long}):
            error = client.ask(3, body)[2]
            assert len(error["message"]) < 2000
    assert told.named("channel.request_refused")
    assert all(len(repr(event)) < 4000 for event in told.named("channel.request_refused"))


def test_a_fallback_gets_what_nobody_else_wants() -> None:
    server = echo()
    server.handle(None, lambda body, _: {"other": body})
    with Ends(server) as ends, ends.connect() as client:
        for number, body in enumerate([None, 5, [1], {"a": 1}, {"type": "nobody"}, {"type": 5}]):
            assert client.ask(number, body)[1] == {"other": body}
        assert client.ask(9, ask("x"))[1]["type"] == "Reply"


def test_a_flood_of_rubbish_is_logged_now_and_then(told: Told) -> None:
    count = 20_000
    with Ends(echo()) as ends, ends.connect() as client:
        sender = threading.Thread(target=client.send, args=(framed(b"\x91") * count,))
        sender.start()
        for _ in range(count):
            answer = client.receive()
            assert answer is not None
            assert answer[2]["type"] == "Undecodable"
        sender.join(DEADLINE)
    refused = told.named("channel.request_refused")
    assert 1 <= len(refused) < 60  # one a second
    assert sum(event.get("left_out", 0) + 1 for event in refused) <= count


# -- bad arguments


def annotated_with(kind: Any) -> Callable[..., None]:
    def handler(request: Any, caller: Any) -> None: ...

    handler.__annotations__["request"] = kind
    return handler


class Untagged(msgspec.Struct):
    key: str


class OddTag(msgspec.Struct, tag_field="kind", tag=True):
    key: str


async def coroutine(_request: Any, _caller: Caller) -> None: ...


BAD: dict[str, tuple[Callable[[Server], object], type[Exception], str]] = {
    "max_in_flight 0": (lambda _: Server(max_in_flight=0), ValueError, "max_in_flight: at least 1"),
    "max_in_flight text": (
        lambda _: Server(max_in_flight="3"),  # type: ignore[arg-type]
        TypeError,
        "max_in_flight: a number",
    ),
    "max_in_flight bool": (lambda _: Server(max_in_flight=True), TypeError, "max_in_flight: a"),
    "max_connections": (lambda _: Server(max_connections=-1), ValueError, "max_connections: at"),
    "max_frame small": (lambda _: Server(max_frame=1023), ValueError, "max_frame: 1024 to"),
    "max_frame large": (lambda _: Server(max_frame=1 << 32), ValueError, "max_frame: 1024 to"),
    "max_frame float": (
        lambda _: Server(max_frame=1e6),  # type: ignore[arg-type]
        TypeError,
        "max_frame: a number",
    ),
    "loop": (lambda _: Server(loop=object()), TypeError, "loop: an event loop"),  # type: ignore[arg-type]
    "no function": (lambda s: s.handle("x", 5), TypeError, "handler: a function"),  # type: ignore[arg-type]
    "no type": (lambda s: s.handle(int, print), TypeError, "kind: a msgspec.Struct"),
    "no tag": (lambda s: s.handle(Untagged, print), ValueError, "Untagged has no field 'type'"),
    "odd tag": (lambda s: s.handle(OddTag, print), ValueError, "OddTag has no field 'type'"),
    "inline coroutine": (
        lambda s: s.handle("x", coroutine, inline=True),
        ValueError,
        "inline: a coroutine",
    ),
    "twice": (lambda s: s.handle(Ask, print), ValueError, "kind: 'Ask' has a handler"),
    "twice by name": (lambda s: s.handle("Ask", print), ValueError, "kind: 'Ask' has a handler"),
    "two for the rest": (lambda s: s.handle(None, print), ValueError, "kind: None has a handler"),
    "no annotation": (lambda s: s.handler(lambda request, caller: None), TypeError, "annotated"),
    "no parameter": (lambda s: s.handler(lambda: None), TypeError, "annotated"),
    "annotation": (lambda s: s.handler(annotated_with(int)), TypeError, "kind: a msgspec.Struct"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name: str) -> None:
    server = echo()
    server.handle(None, print)
    act, kind, message = BAD[name]
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        act(server)
    # Nothing has changed.
    with Ends(server) as ends, ends.connect() as client:
        assert client.ask(1, ask("x"))[1]["key"] == "x"


# -- who waits for whom


def test_a_slow_handler_delays_nobody(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    with Ends(server) as ends, ends.connect() as client, ends.connect() as second:
        client.send(frame([1, ask("slow", "slow")]))
        eventually(lambda: gate.inside == 1, "it is inside")
        for number in range(2, 20):
            assert client.ask(number, ask(f"k{number}"))[1]["key"] == f"k{number}"
            assert second.ask(number, ask(f"s{number}"))[1]["key"] == f"s{number}"
        with Ends(server) as others, others.connect() as stranger:
            assert stranger.ask(1, ask("other tree"))[1]["key"] == "other tree"
        assert gate.inside == 1
        gate.open()
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[1]["key"]) == (1, "slow")


def test_as_many_at_a_time_as_it_may_have_and_then_it_waits(gate: Gate) -> None:
    server = echo(Server(max_in_flight=3))
    server.handle("slow", gate)
    request = frame([9, ask("x" * 1000, "slow")])
    with Ends(server) as ends, ends.connect() as client, ends.connect() as second:
        # The socket takes some, and the server what one receive brings: more it does not read.
        sent = client.offer(request * 10_000)
        assert sent < len(request) * 10_000
        eventually(lambda: gate.inside == 3, "three are inside")
        second.send(frame([1, ask("waits too")]))
        with Ends(server) as others, others.connect() as stranger:
            assert stranger.ask(1, ask("other tree"))[1]["key"] == "other tree"
        assert gate.most == 3
        gate.open()
        answer = second.receive()
        assert answer is not None
        assert answer[1]["key"] == "waits too"
        rest = feed(client, request[sent % len(request) or len(request) :])
        whole = -(-sent // len(request))
        for _ in range(whole):
            answer = client.receive()
            assert answer is not None
            assert answer[1]["key"] == "x" * 1000
        rest.join(DEADLINE)
        assert len(gate.begun) == whole
        assert gate.most == 3
        eventually(lambda: not ends.served._under_way, "all is done")


def test_answers_that_nobody_reads_stop_the_reading() -> None:
    """Handlers that are done at once are not bounded by how many are under way."""
    answered: list[str] = []

    def large(request: Any, _caller: Caller) -> str:
        answered.append(request["key"])
        return str(request["key"]) + "x" * (1 << 20)

    server = echo()
    server.handle("large", large, inline=True)
    keys = [f"k{number}" for number in range(1000)]
    with Ends(server) as ends, ends.connect() as client:
        client.send(b"".join(frame([9, ask(key, "large")]) for key in keys[:500]))
        with ends.connect() as second:
            assert second.ask(1, ask("meanwhile"))[1]["key"] == "meanwhile"
        assert 1 <= len(answered) < 8
        for number, key in enumerate(keys[:500]):
            answer = client.receive()
            assert answer is not None
            assert answer[1] == key + "x" * (1 << 20)
            assert len(answered) < number + 9


def test_thousands_of_requests_in_one_write_let_others_have_their_turn() -> None:
    """How many of one connection are begun before the loop looks at others: the first request of
    thousands makes another tree ask, whose handler sees how many were begun by then."""
    begun: list[int] = []
    begun_by_then: list[int] = []
    server, other = Server(), Server()
    other.handle("look", lambda *_: begun_by_then.append(len(begun)), inline=True)
    with Ends(server) as ends, ends.connect() as many:
        with Ends(other) as others, others.connect() as stranger:

            def begin(_request: Any, _caller: Caller) -> None:
                if not begun:
                    stranger.send(frame([1, {"type": "look"}]))
                begun.append(0)

            server.handle(None, begin, inline=True)
            count = 6000
            many.send(frame([1, 5]) * count)
            for _ in range(count):
                assert many.receive() is not None
            assert stranger.receive() == [1, None, None]
    # One turn may have brought 8 receives of the first one's, each with its batch.
    assert begun_by_then[0] <= 10 * BATCH


def test_the_last_answer_is_sent_by_a_thread_while_requests_wait() -> None:
    """Requests are put off while answers wait to be sent. A thread may send the last of these just
    after the loop has decided so, and before it looks for what to wait for."""
    server = echo()
    server.handle("thread", lambda request, _: Reply(request["key"]))
    with Ends(server) as ends, ends.connect() as client:
        eventually(lambda: ends.lanes, "it is connected")
        (lane,) = ends.lanes
        put, watch, flush = lane.wire.put, lane.watch, lane.flush
        queued, looked, flushed = threading.Event(), threading.Event(), threading.Event()
        thread = []

        def put_and_wait(*args: Any, **kwargs: Any) -> None:
            put(*args, **kwargs)
            if not queued.is_set():
                thread.append(threading.get_ident())
                queued.set()
                if not looked.wait(DEADLINE):
                    raise Stuck("the loop has read the second request")

        def flush_and_say() -> None:
            flush()
            if thread and thread[0] == threading.get_ident():
                flushed.set()

        def watch_late() -> None:
            if queued.is_set() and not looked.is_set():
                if not lane.waiting:
                    return  # still because of the first one
                looked.set()
                if not flushed.wait(DEADLINE):
                    raise Stuck("the thread sends its answer")
            watch()

        lane.wire.put, lane.watch, lane.flush = put_and_wait, watch_late, flush_and_say  # type: ignore[method-assign]
        client.send(frame([1, ask("first", "thread")]))
        assert queued.wait(DEADLINE)
        client.send(frame([2, ask("second")]))
        keys = []
        for _ in range(2):
            answer = client.receive()
            assert answer is not None
            keys.append(answer[1]["key"])
        assert keys == ["first", "second"]


# -- long frames


def long_frame(number: int, key: str, size: int = 3 << 20) -> bytes:
    return frame([number, {"type": "slow", "key": key, "more": b"x" * size}])


def feed(client: Client, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=client.send, args=(data,))
    thread.start()
    return thread


def test_one_long_frame_at_a_time(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    gate.open()
    with Ends(server) as ends, ends.connect() as one, ends.connect() as two:
        first, second = long_frame(1, "one"), long_frame(2, "two")
        one.send(first[: 2 << 20])  # nothing but the server's reading makes room for so much
        sent = two.offer(second)
        assert sent < LONG
        with ends.connect() as third:
            assert third.ask(1, ask("short"))[1]["key"] == "short"
        assert gate.begun == []
        one.send(first[2 << 20 :])
        answer = one.receive()
        assert answer is not None
        assert (answer[0], answer[1]["key"]) == (1, "one")
        two.send(second[sent:])
        answer = two.receive()
        assert answer is not None
        assert (answer[0], answer[1]["key"]) == (2, "two")


def test_two_long_frames_at_the_same_time_are_both_answered(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    with Ends(server) as ends, ends.connect() as one, ends.connect() as two:
        threads = [feed(one, long_frame(1, "one")), feed(two, long_frame(2, "two"))]
        eventually(lambda: gate.inside == 1, "one of them is inside")
        with ends.connect() as third:
            assert third.ask(1, ask("short"))[1]["key"] == "short"
        assert gate.most == 1
        gate.open()
        for client, number, key in ((one, 1, "one"), (two, 2, "two")):
            answer = client.receive()
            assert answer is not None
            assert (answer[0], answer[1]["key"]) == (number, key)
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        assert gate.most == 1


def test_two_long_frames_on_one_connection(gate: Gate) -> None:
    """The second is not read while the first is worked on: it is memory, too."""
    server = echo()
    server.handle("slow", gate)
    with Ends(server) as ends, ends.connect() as one:
        thread = feed(one, long_frame(1, "one") + long_frame(2, "two"))
        eventually(lambda: gate.inside == 1, "the first is inside")
        with ends.connect() as third:
            assert third.ask(1, ask("short"))[1]["key"] == "short"
        assert gate.begun == ["one"]
        gate.open()
        for number, key in ((1, "one"), (2, "two")):
            answer = one.receive()
            assert answer is not None
            assert (answer[0], answer[1]["key"]) == (number, key)
        thread.join(DEADLINE)
        assert gate.most == 1


def test_who_goes_in_the_middle_of_a_long_frame_makes_room(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    gate.open()
    with Ends(server) as ends, ends.connect() as two:
        with ends.connect() as one:
            eventually(lambda: len(ends.lanes) == 2, "both are connected")
            lane = ends.lanes[1]
            one.send(long_frame(1, "one")[: 2 << 20])
        eventually(lambda: lane.closed, "it has gone")
        # What another thread had posted about it comes late.
        ends.served.loop.post(lane.watch)
        thread = feed(two, long_frame(2, "two"))
        answer = two.receive()
        assert answer is not None
        assert (answer[0], answer[1]["key"]) == (2, "two")
        thread.join(DEADLINE)


# -- notifications


def receive_notification(client: Client) -> Any:
    received = client.receive()
    assert received is not None
    assert (received[0], received[2]) == (0, None)
    return received[1]


def test_what_is_said_before_anybody_is_there_is_kept_for_the_first() -> None:
    with Ends(echo()) as ends:
        for number in range(5):
            ends.served.notify({"n": number})
        with ends.connect() as first, ends.connect() as second:
            assert [receive_notification(first)["n"] for _ in range(5)] == list(range(5))
            eventually(lambda: len(ends.lanes) == 2, "both are connected")
            ends.served.notify("both")
            assert receive_notification(first) == receive_notification(second) == "both"


def test_from_many_threads_all_of_them_arrive_in_the_order_of_each() -> None:
    with Ends(echo()) as ends, ends.connect() as client:
        eventually(lambda: ends.lanes, "it is connected")

        def say(who: int) -> None:
            for number in range(200):
                while True:
                    try:
                        ends.served.notify([who, number])
                    except ChannelFull:
                        continue
                    break

        threads = [threading.Thread(target=say, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        seen: dict[int, list[int]] = {}
        for _ in range(800):
            who, number = receive_notification(client)
            seen.setdefault(who, []).append(number)
        for thread in threads:
            thread.join(DEADLINE)
        assert seen == {who: list(range(200)) for who in range(4)}
        assert not ends.served._unsent


def test_a_handler_tells_its_caller_something() -> None:
    server = Server()
    server.handle(Ask, lambda request, caller: caller.notify(request.key), inline=True)
    with Ends(server) as ends, ends.connect() as client:
        client.send(frame([4, ask("psst")]))
        received = [client.receive(), client.receive()]
        assert sorted(received, key=str) == [[0, "psst", None], [4, None, None]]


@pytest.mark.parametrize("connected", [False, True])
def test_it_is_full_when_nobody_reads(connected: bool) -> None:
    with Ends(echo()) as ends:
        client = ends.connect() if connected else None
        eventually(lambda: len(ends.lanes) == connected, "it is connected")
        text = "x" * 4000
        sent = 0
        with pytest.raises(ChannelFull, match="does not read"):
            while True:
                ends.served.notify([sent, text])
                sent += 1
        assert MOST_NOTIFICATIONS <= sent < MOST_NOTIFICATIONS + 1000
        with client or ends.connect() as client:
            assert [receive_notification(client)[0] for _ in range(sent)] == list(range(sent))
            ends.served.notify("again")
            assert receive_notification(client) == "again"


def test_what_cannot_be_said() -> None:
    with Ends(echo(Server(max_frame=2048))) as ends:
        with pytest.raises(TypeError):
            ends.served.notify(object())
        with pytest.raises(FrameTooLarge, match="max_frame is 2048"):
            ends.served.notify("x" * 2048)
    with pytest.raises(ChannelClosed, match="has ended"):
        ends.served.notify("x")


# -- a loop of the user's


class UserLoop:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()

    def run_again(self) -> None:
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()


def test_async_handlers_run_in_the_loop_that_was_given() -> None:
    user = UserLoop()
    server = echo(Server(loop=user.loop))
    threads = []

    async def handler(request: Any, _caller: Caller) -> Reply:
        threads.append(threading.get_ident())
        return Reply(request["key"])

    server.handle("task", handler)
    with Ends(server) as ends, ends.connect() as client:
        assert client.ask(1, ask("a", "task"))[1]["key"] == "a"
        assert threads == [user.thread.ident]
        user.stop()
        client.send(frame([2, ask("stopped", "task")]))
        assert client.ask(3, ask("meanwhile"))[1]["key"] == "meanwhile"
        user.run_again()
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[1]["key"]) == (2, "stopped")
        user.stop()
        client.send(frame([4, ask("lost", "task")]))
        assert client.ask(5, ask("meanwhile"))[1]["key"] == "meanwhile"
        user.loop.close()
        # What it was to begin with is remembered at the next request: nothing tells us before.
        client.send(frame([6, ask("late", "task")]))
        for number in (4, 6):
            answer = client.receive()
            assert answer is not None
            assert (answer[0], answer[1], answer[2]["type"]) == (number, None, "RuntimeError")
            assert "event loop has ended" in answer[2]["message"]
        eventually(lambda: not ends.served._under_way, "all is done")


def test_a_task_that_is_cancelled_is_answered() -> None:
    user = UserLoop()
    server = echo(Server(loop=user.loop))
    tasks: list[asyncio.Task[Any]] = []

    async def handler(_request: Any, _caller: Caller) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await asyncio.Event().wait()

    server.handle("task", handler)
    with Ends(server) as ends, ends.connect() as client:
        client.send(frame([1, ask("a", "task")]))
        eventually(lambda: tasks, "it runs")
        user.loop.call_soon_threadsafe(tasks[0].cancel)
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[2]["type"]) == (1, "CancelledError")
        # And the end of the tree cancels what is still running for it.
        client.send(frame([2, ask("b", "task")]))
        eventually(lambda: len(tasks) == 2, "the second runs")
    eventually(tasks[1].done, "it is cancelled")
    assert tasks[1].cancelled()
    user.stop()
    user.loop.close()


def test_handlers_that_are_still_running_at_the_end(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    with Ends(server) as ends:
        with ends.connect() as client:
            client.send(frame([1, ask("slow", "slow")]))
            eventually(lambda: gate.inside == 1, "it is inside")
            ends.close()
            assert client.receive() is None
        gate.open()
        eventually(lambda: not ends.served._under_way, "its answer is dropped")


# -- descriptors


def receive_fds(client: Client) -> tuple[list[Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(client.sock, 1 << 16, MOST_FDS + 8)
    return msgspec.msgpack.decode(data[4:]), fds


def high_fd() -> int:
    """Of /dev/null, at a number that nobody else gets soon."""
    with open("/dev/null") as file:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 700)


@pytest.mark.parametrize("inline", [False, True])
def test_numbers_are_closed_when_they_are_sent_and_objects_stay(inline: bool) -> None:
    reader, writer = os.pipe()
    number = high_fd()
    server = echo()
    with os.fdopen(writer, "wb", 0) as file:
        server.handle("fds", lambda *_: Answer("two", [number, file]), inline=inline)
        with Ends(server) as ends, ends.connect() as client:
            client.send(frame([1, ask("x", "fds")]))
            answer, fds = receive_fds(client)
            assert answer == [1, "two", None]
            assert len(fds) == 2
            eventually(lambda: not is_open(number), "the number is closed")
            assert os.fstat(fds[0]).st_rdev == os.stat("/dev/null").st_rdev
            os.write(fds[1], b"from the client")
            assert os.read(reader, 100) == b"from the client"
            assert not file.closed
            assert is_open(file.fileno())
            for fd in fds:
                os.close(fd)
    os.close(reader)


def test_as_many_as_may_go_and_one_more() -> None:
    server = echo()
    given: list[int] = []

    def handler(request: Any, _caller: Caller) -> Answer:
        given[:] = [os.open("/dev/null", os.O_RDONLY) for _ in range(request["n"])]
        return Answer(request["key"], tuple(given))

    server.handle("fds", handler)
    with Ends(server) as ends, ends.connect() as client:
        for count in (1, MOST_FDS):
            client.send(frame([1, {**ask("x", "fds"), "n": count}]))
            answer, fds = receive_fds(client)
            assert answer == [1, "x", None]
            assert len(fds) == count
            for fd in fds:
                os.close(fd)
        client.send(frame([2, {**ask("x", "fds"), "n": MOST_FDS + 1}]))
        answer, fds = receive_fds(client)
        assert not fds
        assert (answer[0], answer[1], answer[2]["type"]) == (2, None, "UnencodableAnswer")
        eventually(lambda: not any(map(is_open, given)), "none is left open")
        assert client.ask(3, ask("after"))[1]["key"] == "after"


def test_descriptors_stay_open_until_they_are_sent() -> None:
    """Another thread has sent everything, and only then finds that nothing needs to be kept open
    any more; meanwhile they are put, and there is no room for them in the socket."""
    number = high_fd()
    server = echo()
    server.handle("fds", lambda *_: Answer("here", [number]))
    server.handle("thread", lambda request, _: Reply(request["key"]))
    with Ends(server) as ends, ends.connect() as client:
        eventually(lambda: ends.lanes, "it is connected")
        (lane,) = ends.lanes
        put, flush = lane.wire.put, lane.wire.flush
        asked, sent_all, is_put = threading.Event(), threading.Event(), threading.Event()
        putting: list[int] = []

        def put_in_between(data: Any, passed: tuple[int, ...] = (), *args: Any) -> None:
            if passed:
                putting.append(threading.get_ident())
                asked.set()
                if not sent_all.wait(DEADLINE):
                    raise Stuck("the other answer is sent")
            put(data, passed, *args)
            if passed:
                is_put.set()

        def flush_slowly() -> bool:
            if putting == [threading.get_ident()]:
                putting.clear()
                return False  # as if there were no room
            whole = flush()
            if asked.is_set() and not sent_all.is_set():
                sent_all.set()
                if not is_put.wait(DEADLINE):
                    raise Stuck("the descriptors are put")
            return whole

        lane.wire.put, lane.wire.flush = put_in_between, flush_slowly  # type: ignore[method-assign]
        client.send(frame([1, ask("x", "fds")]))
        assert asked.wait(DEADLINE)
        client.send(frame([2, ask("y", "thread")]))
        seen: dict[int, int] = {}
        while len(seen) < 2:
            data, fds, _, _ = socket.recv_fds(client.sock, 1 << 16, 4)
            assert data, "the connection has ended"
            while data:
                (length,) = struct.unpack(">I", data[:4])
                answer = msgspec.msgpack.decode(data[4 : 4 + length])
                data = data[4 + length :]
                seen[answer[0]] = len(fds) if answer[0] == 1 else 0
            for fd in fds:
                assert os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev
                os.close(fd)
        assert seen == {1: 1, 2: 0}
        eventually(lambda: not is_open(number), "it is closed then")


def refuses_descriptors() -> bool:
    """Whether the kernel does that for us: SO_PASSRIGHTS."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


@pytest.mark.skipif(not refuses_descriptors(), reason="the kernel has no SO_PASSRIGHTS")
def test_descriptors_from_a_tree_are_refused() -> None:
    with Ends(echo()) as ends, ends.connect() as client, open(os.devnull) as file:
        for sock in (client.sock, ends.door):
            with pytest.raises(PermissionError):
                socket.send_fds(sock, [b"n" * 16], [file.fileno()])
        assert client.ask(1, ask("k"))[1]["key"] == "k"


def test_descriptors_from_a_tree_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not refuse them."""
    monkeypatch.setattr(served, "take_none", lambda _sock: None)
    reader, writer = os.pipe()
    with Ends(echo()) as ends, ends.connect() as client:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            socket.send_fds(client.sock, [frame([number, ask(f"k{number}")])], [writer] * 8)
            answer = client.receive()
            assert answer is not None
            assert (answer[0], answer[1]["key"]) == (number, f"k{number}")
        socket.send_fds(ends.door, [b"n" * 16], [writer] * 8)
        _, fds, _, _ = socket.recv_fds(ends.door, 4096, 4)
        eventually(lambda: len(ends.lanes) == 2, "it is connected")
        for fd in fds:
            os.close(fd)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, "nothing came with it")
        os.close(writer)
        assert os.read(reader, 1) == b""  # nobody else has it
    os.close(reader)


# -- the door


def test_as_many_connections_as_it_may_have(told: Told) -> None:
    server = echo(Server(max_connections=3))
    with Ends(server) as ends:
        clients = [ends.connect() for _ in range(3)]
        for _ in range(50):
            (_, error), fds = ends.knock()
            assert (error, fds) == ("the tree has 3 connections already", [])
        clients.pop().sock.close()
        eventually(lambda: len(ends.lanes) == 2, "one has gone")
        clients.append(ends.connect())
        for number, client in enumerate(clients):
            assert client.ask(number, ask(f"k{number}"))[1]["key"] == f"k{number}"
            client.sock.close()
    assert 1 <= len(told.named("channel.connection_refused")) < 10


@pytest.mark.parametrize("nonce", [b"n", b"n" * 15, b"n" * 17, b"n" * 5000])
def test_what_is_no_nonce(nonce: bytes) -> None:
    with Ends(echo()) as ends:
        (_, error), fds = ends.knock(nonce)
        assert (error, fds) == ("that was no nonce", [])
        with ends.connect() as client:
            assert client.ask(1, ask("x"))[1]["key"] == "x"


@pytest.mark.parametrize("nonce", [b"flood", b"n" * 16])
def test_a_flood_at_the_door_that_nobody_reads_the_answers_of(nonce: bytes) -> None:
    with Ends(echo(Server(max_connections=10_000))) as ends, ends.connect() as client:
        ends.door.setblocking(False)
        for _ in range(3000):
            try:
                ends.door.send(nonce)
            except BlockingIOError:
                assert client.ask(1, ask("x"))[1]["key"] == "x"
        assert client.ask(2, ask("y"))[1]["key"] == "y"
        # The answers that had no room took their connections with them.
        assert len(ends.lanes) < 1500


def test_no_descriptors_are_left_for_a_connection() -> None:
    """It is told so at once."""
    with Ends(echo()) as ends, ends.connect() as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            ends.door.send(b"n" * 16)
            data = ends.door.recv(4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "EMFILE" in msgspec.msgpack.decode(data)[1]
        assert client.ask(1, ask("x"))[1]["key"] == "x"
        with ends.connect() as second:
            assert second.ask(1, ask("y"))[1]["key"] == "y"


def test_the_last_who_could_connect_has_gone() -> None:
    with Ends(echo()) as ends, ends.connect() as client:
        ends.door.close()
        eventually(lambda: ends.served._door is None, "the door is closed")
        assert client.ask(1, ask("x"))[1]["key"] == "x"


# -- how connections end


def test_who_goes_in_the_middle_leaves_nothing(gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    whole = frame([1, ask("x", "slow")])
    with Ends(server) as ends:
        for cut in range(0, len(whole) + 1, 3):
            with ends.connect() as client:
                client.send(whole[:cut])
        gate.open()
        eventually(lambda: not ends.lanes and not ends.served._under_way, "all have gone")
        with ends.connect() as client:
            assert client.ask(1, ask("x"))[1]["key"] == "x"


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_one_direction_is_shut_down(how: int, gate: Gate) -> None:
    server = echo()
    server.handle("slow", gate)
    with Ends(server) as ends:
        with ends.connect() as client:
            assert client.ask(1, ask("x"))[1]["key"] == "x"
            client.send(frame([2, ask("slow", "slow")]))
            eventually(lambda: gate.inside == 1, "it is inside")
            client.sock.shutdown(how)
            gate.open()
            eventually(lambda: not ends.lanes, "the connection ends")
        eventually(lambda: not ends.served._under_way, "all is done")


def test_a_connection_that_does_nothing_costs_nobody_anything() -> None:
    with Ends(echo()) as ends, ends.connect() as stalled, ends.connect() as client:
        stalled.send(b"\xff\xff\xff\xff\x92\x01")  # 4 GiB are to come
        with ends.connect() as half:
            half.send(frame([1, ask("x")])[:-1])
            for number in range(100):
                assert client.ask(number, ask(f"k{number}"))[1]["key"] == f"k{number}"


def test_a_frame_of_4_gib_is_refused_when_its_head_is_there() -> None:
    with Ends(echo()) as ends, ends.connect() as client:
        client.send(b"\xff\xff\xff\xff\x92\xcd\x12\x34" + b"\0" * 40)
        answer = client.receive()
        assert answer is not None
        assert (answer[0], answer[2]["type"]) == (0x1234, "FrameTooLarge")


# -- forks of the supervisor


def test_a_fork_has_none_of_the_sockets_and_closes_nobody_elses() -> None:
    with Ends(echo()) as ends, ends.connect() as client:
        eventually(lambda: ends.lanes, "it is connected")
        numbers = [ends.served._door_fd, ends.lanes[0]._fd]
        child = os.fork()
        if not child:
            status = 1
            try:
                assert not any(map(is_open, numbers))
                while not all(map(is_open, numbers)):
                    os.open("/dev/null", os.O_RDONLY)
                # The host has no use for its handle in there and lets go of it.
                ends.served._lanes.clear()
                ends.served._door = None
                gc.collect()
                assert all(map(is_open, numbers))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.ask(1, ask("x"))[1]["key"] == "x"
