"""A real client, and a supervisor's end that does whatever it likes, against a model that knows
what each request may come to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from channel_ends import DEADLINE, Stuck, eventually, frame, framed
from proctree.channel import Channel, RemoteError

MAX_FRAME = 2048


class Loops:
    """An event loop on a thread, for all examples."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def submit(self, coroutine: Any) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


loops: list[Loops] = []


@pytest.fixture(autouse=True)
def some_loops() -> Any:
    loops[:] = [Loops(), Loops()]
    for one in loops:
        one.thread.start()
    yield
    for one in loops:
        one.loop.call_soon_threadsafe(one.loop.stop)
        one.thread.join(DEADLINE)
        one.loop.close()
    gc.collect()  # a channel gives its descriptors back when nobody can be polling them any more


Outcome = tuple[str, Any]


class Asked:
    """A request, what it may come to, and what it came to.

    Attributes:
        key: that only this request has: in what it asks, and in what it is answered.
        due: what it has to end as, once something has been done about it.
        maybe: what it may end as besides, because two things were done at about the same time.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.number: int | None = None
        self.due: Outcome | None = None
        self.maybe: list[Outcome] = []
        self.came: Outcome | None = None
        self.ended = threading.Event()
        self.cancel: Callable[[], object] | None = None

    def end(self, outcome: Outcome) -> None:
        assert self.came is None
        self.came = outcome
        self.ended.set()

    def catch(self, error: BaseException) -> Outcome:
        if isinstance(error, RemoteError):
            return "error", (error.type, error.message, error.detail)
        return type(error).__name__, None


class ChannelModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours, max_frame=MAX_FRAME)
        self.theirs.settimeout(DEADLINE)
        self.asked: list[Asked] = []
        self.received = b""
        self.partial = b""
        """What is left to send of a frame that was begun."""
        self.after_partial: Callable[[], None] | None = None
        self.closed = False
        self.said: list[int] = []
        self.heard: list[int] = []
        self.threads: list[threading.Thread] = []
        self.count = 0

    @initialize(listening=st.booleans())
    def begin(self, listening: bool) -> None:
        self.listening = listening
        if listening:
            self.channel.listen(self.heard.append)

    # -- the client

    def _start(self) -> Asked:
        self.count += 1
        asked = Asked(f"k{self.count}")
        self.asked.append(asked)
        if self.closed:
            asked.due = ("ChannelClosed", None)
        return asked

    @precondition(lambda self: len(self.threads) < 12)
    @rule(seconds=st.sampled_from([None, None, None, 0.0, 0.01]))
    def ask_on_a_thread(self, seconds: float | None) -> None:
        asked = self._start()

        def run() -> None:
            try:
                asked.end(("answer", self.channel.request({"key": asked.key}, timeout=seconds)))
            except BaseException as error:
                asked.end(asked.catch(error))

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()
        self._follow_up(asked, seconds)

    @rule(seconds=st.sampled_from([None, None, None, 0.0, 0.01]), which=st.integers(0, 1))
    def ask_in_a_task(self, seconds: float | None, which: int) -> None:
        asked = self._start()

        async def run() -> None:
            try:
                answer = await self.channel.arequest({"key": asked.key}, timeout=seconds)
                asked.end(("answer", answer))
            except BaseException as error:
                asked.end(asked.catch(error))

        future = loops[which].submit(run())
        asked.cancel = future.cancel
        self._follow_up(asked, seconds)

    def _follow_up(self, asked: Asked, seconds: float | None) -> None:
        if self.closed:
            self._must_end(asked)
            return
        if seconds is not None:
            asked.due = ("TimeoutError", None)
        # It is there, or it was never sent: the model has to know its number to answer it.
        eventually(lambda: self._collect(asked) or asked.ended.is_set(), "the request comes")
        if seconds is not None:
            self._must_end(asked)

    def _collect(self, asked: Asked) -> bool:
        if select.select([self.theirs], [], [], 0)[0]:
            self.received += self.theirs.recv(1 << 16)
        while len(self.received) >= 4:
            (length,) = struct.unpack(">I", self.received[:4])
            if len(self.received) < 4 + length:
                break
            number, body = msgspec.msgpack.decode(self.received[4 : 4 + length])
            self.received = self.received[4 + length :]
            (owner,) = [one for one in self.asked if one.key == body["key"]]
            assert owner.number is None
            owner.number = number
        return asked.number is not None

    def _pending(self) -> list[Asked]:
        return [one for one in self.asked if one.due is None and one.number is not None]

    @precondition(lambda self: any(one.cancel for one in self._pending()))
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        tasks = [one for one in self._pending() if one.cancel is not None]
        asked = tasks[pick % len(tasks)]
        asked.due = ("CancelledError", None)
        assert asked.cancel is not None
        asked.cancel()
        self._must_end(asked)

    # -- the supervisor

    def _can_send(self) -> bool:
        return not self.closed and not self.partial

    def _put(self, data: bytes) -> None:
        """Nobody may be reading: then what was sent before waits, and there may be no room."""
        deadline = time.monotonic() + DEADLINE
        self.theirs.setblocking(False)
        while data:
            try:
                data = data[self.theirs.send(data) :]
            except BlockingIOError:
                self.channel.advance()
            if time.monotonic() > deadline:
                raise Stuck("what was sent is read")
        self.theirs.settimeout(DEADLINE)

    def _send(self, data: bytes, cuts: list[int]) -> None:
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        for start, end in itertools.pairwise(edges):
            self._put(data[start:end])

    CUTS = st.lists(st.integers(0, 5000), max_size=3)

    @precondition(lambda self: self._can_send() and self._pending())
    @rule(pick=st.integers(0, 99), cuts=CUTS, size=st.sampled_from([0, 0, 100, 1900]))
    def answer(self, pick: int, cuts: list[int], size: int) -> None:
        asked = self._pending()[pick % len(self._pending())]
        body = {"of": asked.key, "more": "x" * size}
        asked.due = ("answer", body)
        self._send(frame([asked.number, body, None]), cuts)
        self._must_end(asked)

    @precondition(lambda self: self._can_send() and len(self._pending()) > 1)
    @rule(shuffled=st.randoms(use_true_random=False), cuts=CUTS, twice=st.booleans())
    def answer_all_at_once(self, shuffled: Any, cuts: list[int], twice: bool) -> None:
        pending = self._pending()
        shuffled.shuffle(pending)
        data = b""
        for asked in pending:
            body = {"of": asked.key}
            asked.due = ("answer", body)
            data += frame([asked.number, body, None]) * (1 + twice)
        self._send(data, cuts)
        for asked in pending:
            self._must_end(asked)

    @precondition(lambda self: self._can_send() and self._pending())
    @rule(pick=st.integers(0, 99), cut=st.integers(1, 5000))
    def begin_an_answer(self, pick: int, cut: int) -> None:
        asked = self._pending()[pick % len(self._pending())]
        body = {"of": asked.key, "late": True}
        data = frame([asked.number, body, None])
        cut = 1 + cut % (len(data) - 1)
        self._put(data[:cut])
        self.partial = data[cut:]

        def finished() -> None:
            if asked.due is None:  # else it was cancelled meanwhile
                asked.due = ("answer", body)
                self._must_end(asked)

        self.after_partial = finished

    @precondition(lambda self: self.partial and not self.closed)
    @rule()
    def finish_the_answer(self) -> None:
        data, self.partial = self.partial, b""
        self._put(data)
        assert self.after_partial is not None
        self.after_partial()

    @precondition(lambda self: self._can_send() and self._pending())
    @rule(pick=st.integers(0, 99), cuts=CUTS)
    def answer_with_an_error(self, pick: int, cuts: list[int]) -> None:
        asked = self._pending()[pick % len(self._pending())]
        asked.due = ("error", ("No", asked.key, [1]))
        wire = {"type": "No", "message": asked.key, "detail": [1]}
        self._send(frame([asked.number, None, wire]), cuts)
        self._must_end(asked)

    @precondition(lambda self: self._can_send() and self._pending())
    @rule(pick=st.integers(0, 99), cuts=CUTS, more=st.sampled_from([1, 40_000, 300_000]))
    def answer_too_long(self, pick: int, cuts: list[int], more: int) -> None:
        asked = self._pending()[pick % len(self._pending())]
        asked.due = ("FrameTooLarge", None)
        data = frame([asked.number, b"x" * (MAX_FRAME + more), None])
        self._send(data, cuts)
        self._must_end(asked)

    @precondition(lambda self: self._can_send() and self._pending())
    @rule(
        pick=st.integers(0, 99),
        bad=st.sampled_from([b"\xc1", b"\xc0\xa1\xff", b"\xc0" * 4 + b"\xc1"]),
    )
    def answer_with_rubbish(self, pick: int, bad: bytes) -> None:
        asked = self._pending()[pick % len(self._pending())]
        asked.due = ("UndecodableAnswer", None)
        assert asked.number is not None
        number = msgspec.msgpack.encode(asked.number)
        self._put(framed(b"\x93" + number + bad))
        self._must_end(asked)

    @precondition(lambda self: self._can_send())
    @rule(number=st.one_of(st.integers(1, 200), st.sampled_from([-1, 2**40, 2**64 - 1])))
    def answer_somebody_who_does_not_wait(self, number: int) -> None:
        """Late, again, or for nobody."""
        if number not in [one.number for one in self._pending()] and (
            number < 1 or number > 2**30 or number <= self.count
        ):
            self._put(frame([number, {"of": "nobody"}, None]))

    @precondition(lambda self: self._can_send())
    @rule(cuts=CUTS)
    def say_something(self, cuts: list[int]) -> None:
        number = len(self.said)
        self.said.append(number)
        self._send(frame([0, number, None]), cuts)

    @precondition(lambda self: self._can_send())
    @rule(
        data=st.sampled_from([b"", b"\xc1", b"\x93\x00\xa1\xff\xc0", b"\x05", b"\x93\xa1x\xc0\xc0"])
    )
    def send_what_is_no_answer(self, data: bytes) -> None:
        self._put(framed(data))

    # -- the end

    def _end_all(self) -> None:
        self.closed = True
        pending = [one for one in self.asked if one.due is None]
        for asked in pending:
            asked.due = ("ChannelClosed", None)
        for asked in pending:
            self._must_end(asked)

    @precondition(lambda self: not self.closed and self.count > 3)
    @rule(often=st.integers(0, 4))
    def close_here(self, often: int) -> None:
        if often == 0:
            self.channel.close()
            self._end_all()

    @precondition(lambda self: not self.closed and self.count > 3)
    @rule(often=st.integers(0, 4), how=st.sampled_from(["close", "write", "both"]))
    def close_there(self, often: int, how: str) -> None:
        if often == 0:
            if how == "close":
                self.theirs.close()
            else:
                self.theirs.shutdown(socket.SHUT_WR if how == "write" else socket.SHUT_RDWR)
            self._end_all()
            # Without anybody who waits nobody reads, and it takes who asks next to notice.
            eventually(lambda: self.channel.advance() or self.channel.closed, "it is closed")

    # -- what always holds

    def _must_end(self, asked: Asked) -> None:
        if not asked.ended.wait(DEADLINE):
            raise Stuck(f"request {asked.key} ends as {asked.due}")
        assert asked.came == asked.due

    @invariant()
    def each_has_what_was_due(self) -> None:
        for asked in self.asked:
            if asked.due is None:
                assert asked.came is None, f"{asked.key} ended as {asked.came} by itself"
            else:
                assert asked.came == asked.due

    @invariant()
    def nobody_waits_who_has_ended(self) -> None:
        waiting = sum(asked.due is None for asked in self.asked)
        eventually(lambda: len(self.channel._pending) == waiting, "the others are forgotten")

    def teardown(self) -> None:
        if self.listening and not self.closed:
            eventually(lambda: self.heard == self.said, "all that was said is heard")
        self.channel.close()
        self._end_all()
        for thread in self.threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        assert not self.channel._pending
        self.theirs.close()
        assert len(self.heard) <= len(self.said)
        assert self.heard == self.said[: len(self.heard)]
        if self.listening:
            eventually(
                lambda: not self.channel._notifications._subscriptions, "its thread has ended"
            )
        eventually(lambda: self.channel.fileno() == -1, "nobody uses its descriptor any more")


TestChannelModel = ChannelModel.TestCase
TestChannelModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_wants_notifications_is_woken_whoever_reads_them() -> None:
    """Here a thread reads while the event loop of the one who wants them is busy."""
    ours, theirs = socket.socketpair()
    heard: list[Any] = []
    with theirs, Channel(ours) as channel:

        async def listen() -> None:
            async for message in channel.notifications():
                heard.append(message)

        future = loops[0].submit(listen())
        eventually(lambda: channel._notifications._subscriptions, "it listens")
        loops[0].submit(asyncio.sleep(0)).result(DEADLINE)  # and waits
        busy, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            busy.set()
            go_on.wait(DEADLINE)

        loops[0].loop.call_soon_threadsafe(hold)
        assert busy.wait(DEADLINE)
        theirs.sendall(frame([0, "news", None]))
        channel.advance()
        go_on.set()
        eventually(lambda: heard == ["news"], "it is heard")
        channel.close()
        future.result(DEADLINE)
        eventually(lambda: channel.fileno() == -1, "nobody uses its descriptor any more")
