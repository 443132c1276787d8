"""The tree's end: requests from any thread, any event loop, and signal handlers, all at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

from proctree.channel import rendezvous
from proctree.channel.bell import Bell
from proctree.channel.errors import (
    ChannelClosed,
    ForkedChannel,
    FrameTooLarge,
    RemoteError,
    UndecodableAnswer,
)
from proctree.channel.frames import (
    DECODING_ERRORS,
    MAX_FRAME,
    NOTIFICATION,
    Frame,
    Response,
    TooLong,
    decode_response,
    encode_request,
    read_id,
)
from proctree.channel.loops import Parties, TaskWaiter
from proctree.channel.notifications import Notifications
from proctree.channel.passed import PassedFds
from proctree.channel.threads import Threads, ThreadWaiter
from proctree.channel.types import decoder, to_max_frame
from proctree.channel.wire import Gone, Wire, is_stream, listed, unless_handled
from proctree.policy import to_seconds
from proctree.process import fds

MOST_QUEUED = 64
"""Pieces that may wait for room in the socket before callers wait to add theirs."""

AnyWaiter = ThreadWaiter | TaskWaiter


class Channel:
    """A connection to the supervisor.

    Its methods may be called from any thread, from tasks of any event loop of asyncio or trio, from
    signal handlers and from callbacks, all at the same time. An answer goes to the request with its
    id and to no other: there is no order that anything depends on.

    In a fork of this process every use raises `ForkedChannel`; `Channel.connect` gives the fork a
    connection of its own.

    Args:
        sock: a connected AF_UNIX stream socket, which the channel takes over. In a tree,
            `Channel.connect` gets it.
        types: the message types that answers and notifications may have; see `connect`.
        max_frame: the longest message in bytes, both ways. Default 64 MiB.

    Raises:
        ValueError, TypeError: a bad argument.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        types: Sequence[Any] | None = None,
        max_frame: int = MAX_FRAME,
    ) -> None:
        if not is_stream(sock):
            raise ValueError(f"sock: an AF_UNIX stream socket, not {sock!r}")
        self._decode = decoder(types)
        self._max_frame = to_max_frame(max_frame)
        self._pid = os.getpid()
        self._sock = sock
        self.wire = Wire(sock, max_frame, with_fds=True)
        self._ids = itertools.count(NOTIFICATION + 1)
        self._pending: dict[int, AnyWaiter] = {}
        self._want_room: OrderedDict[AnyWaiter, None] = OrderedDict()
        self._passed: dict[tuple[int | None, tuple[int, ...]], PassedFds] = {}
        self._why_closed: str | None = None
        self._threads = Threads(self.wire, self.advance)
        self._parties = Parties(self)
        self._notifications = Notifications(self, self._decode)
        fds.own(sock.fileno())
        self._open: dict[int, None] = {sock.fileno(): None}
        _channels.add(self)
        weakref.finalize(self, _give_back, os.getpid(), self._open, self.wire, self._threads.bell)

    @classmethod
    def connect(
        cls,
        *,
        types: Sequence[Any] | None = None,
        max_frame: int = MAX_FRAME,
        timeout: float | None = 30.0,
    ) -> Channel:
        """A new connection to the supervisor that started the tree with `channel=`.

        The descriptor that the environment names is marked close-on-exec at once: what this process
        starts does not hold it, unless it is handed on by `pass_fds=[proctree.channel.handle()]`;
        who has it can connect too. Each connection is a socket of its own.

        Args:
            types: `msgspec.Struct` types with a tag (`Message` is a base for them): answers and
                notifications are decoded to that one whose tag is their `type`. Default: they are
                decoded to built-in types.
            max_frame: the longest message in bytes, both ways. Default 64 MiB.
            timeout: seconds to wait for the supervisor. Default 30; None waits as long as it takes.

        Raises:
            ChannelUnavailable: this process was not handed a channel; the message says why.
            ChannelClosed: the supervisor is gone, or the tree has as many connections as it may.
            TimeoutError: it took too long.
        """
        decoder(types)
        to_max_frame(max_frame)
        due = None if timeout is None else time.monotonic() + to_seconds(timeout, "timeout")
        return cls(rendezvous.connect(due), types=types, max_frame=max_frame)

    # -- requests

    def request(self, body: Any, timeout: float | None = None) -> Any:
        """Asks, and waits for the answer.

        Args:
            body: a message, or anything that msgpack can hold.
            timeout: seconds. Default None: as long as it takes.

        Returns:
            The body of the answer.

        Raises:
            RemoteError: the answer is an error.
            TimeoutError: it took too long. The request may still be carried out; its answer is
                dropped.
            ChannelClosed: one of the sides is gone.
            ForkedChannel: this process is a fork of the one that connected.
            FrameTooLarge: the request, or its answer, is over `max_frame`.
            UndecodableAnswer: the answer is none of `types`.
            TypeError, OverflowError: the body cannot be encoded. Nothing was sent.
        """
        return self._result(self._ask(body, timeout))

    def request_fds(self, body: Any, timeout: float | None = None) -> tuple[Any, list[int]]:
        """As `request`; also returns the descriptors that came with the answer, close-on-exec.
        They are the caller's to close. Those of answers that nobody took are closed."""
        waiter = self._ask(body, timeout)
        return self._result(waiter), _take(waiter)

    async def arequest(self, body: Any, timeout: float | None = None) -> Any:
        """As `request`, in a task of asyncio or trio.

        Raises:
            asyncio.CancelledError, trio.Cancelled: the task was cancelled; the answer is dropped.
        """
        return self._result(await self._aask(body, timeout))

    async def arequest_fds(self, body: Any, timeout: float | None = None) -> tuple[Any, list[int]]:
        """As `request_fds`, in a task of asyncio or trio."""
        waiter = await self._aask(body, timeout)
        return self._result(waiter), _take(waiter)

    def _ask(self, body: Any, timeout: float | None) -> ThreadWaiter:
        due = None if timeout is None else time.monotonic() + to_seconds(timeout, "timeout")
        self._require_open()
        waiter = ThreadWaiter(self._threads)
        number = next(self._ids)
        try:
            if len(self.wire.out) >= MOST_QUEUED:
                self._wait_for_room(due)
            frame = self._encode(number, body)
            self._pending[number] = waiter
            # After it is known: whoever closes has either seen it or been seen.
            if self._why_closed is None:
                self.send(frame)
                del frame  # not kept until the answer comes
                self._threads.wait(waiter, self._is_done, due)
        finally:
            self._pending.pop(number, None)
            if self._why_closed is not None:
                self.retire()
        return waiter

    def _wait_for_room(self, due: float | None) -> None:
        waiter = ThreadWaiter(self._threads)
        try:
            self._want_room[waiter] = None
            # Not looked at again: who was here as soon as we may have taken it.
            if not self._threads.wait(waiter, self._has_room, due):
                raise TimeoutError("the supervisor does not read: the request was not sent")
        finally:
            self._want_room.pop(waiter, None)
            self._give_room()

    async def _aask(self, body: Any, timeout: float | None) -> TaskWaiter:
        due = None if timeout is None else time.monotonic() + to_seconds(timeout, "timeout")
        self._require_open()
        party = self._parties.current()
        self._threads.alone = False
        waiter = party.waiter()
        number = next(self._ids)
        try:
            party.enter()
        except (ValueError, OSError):
            self._require_open()  # it was closed just now, and the number is gone
            raise
        try:
            while len(self.wire.out) >= MOST_QUEUED and not self.closed:
                room = party.waiter()
                try:
                    self._want_room[room] = None
                    party.flush()
                    await room.wait(due)
                finally:
                    self._want_room.pop(room, None)
                    self._give_room()
                if due is not None and due <= time.monotonic():
                    raise TimeoutError("the supervisor does not read: the request was not sent")
            frame = self._encode(number, body)
            self._pending[number] = waiter
            if self._why_closed is None:
                party.send(frame)
                del frame  # not kept until the answer comes
                if party.under_way == 1 and party.look_closely(waiter):
                    await party.turn()
                else:
                    await waiter.wait(due)
        finally:
            self._pending.pop(number, None)
            party.leave()
        return waiter

    def _encode(self, number: int, body: Any) -> bytearray:
        try:
            return encode_request(number, body, self._max_frame)
        except TooLong as error:
            raise FrameTooLarge(
                f"the request has {error.length} bytes, and max_frame is {self._max_frame}"
            ) from None

    def _is_done(self, waiter: AnyWaiter) -> bool:
        return waiter.answer is not None or self._why_closed is not None

    def _has_room(self, _waiter: AnyWaiter | None = None) -> bool:
        return len(self.wire.out) < MOST_QUEUED or self._why_closed is not None

    def _result(self, waiter: AnyWaiter) -> Any:
        answer = waiter.answer
        if answer is None:
            if self._why_closed is not None:
                raise ChannelClosed(self._why_closed)
            raise TimeoutError("the supervisor did not answer in time")
        if isinstance(answer, Exception):
            raise answer
        if answer.error is not None:
            raise RemoteError.from_wire(answer.error)
        try:
            return self._decode(answer.body)
        except DECODING_ERRORS as error:
            raise UndecodableAnswer(f"the answer is not what was expected: {error}") from None

    # -- notifications

    def listen(self, callback: Callable[[Any], object]) -> None:
        """Calls back for each notification of the supervisor, one after the other, on a thread of
        the channel's own. What comes before anybody listens is kept for the first who does.

        What the callback raises is logged. It may ask, but should not take long: of the
        notifications that wait for it the last 1024 are kept.
        """
        self._require_open()
        self._threads.alone = False
        self._notifications.listen(callback)

    def notifications(self) -> AsyncIterator[Any]:
        """The notifications of the supervisor, in a task: `async for message in ...`. It ends when
        the channel does. What comes before anybody listens is kept for the first who does."""
        self._require_open()
        self._threads.alone = False
        return self._notifications.subscribe(self._parties.current())

    # -- the end

    @property
    def closed(self) -> bool:
        """Whether either side has closed it."""
        return self._why_closed is not None

    def close(self) -> None:
        """Ends the connection: whoever waits gets `ChannelClosed`, on every thread and loop. A
        second time it does nothing."""
        if os.getpid() == self._pid:
            self._end("the channel was closed")
            self._parties.stop()
            self.retire()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Of its socket."""
        return self.wire.fileno()

    def __repr__(self) -> str:
        state = self._why_closed or f"{len(self._pending)} requests under way"
        return f"<Channel fd {self.wire.fileno()}, {state}>"

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedChannel(
                f"this channel belongs to process {self._pid}; this is process {os.getpid()}, a "
                "fork of it, and has to call Channel.connect() for one of its own"
            )
        if self._why_closed is not None:
            raise ChannelClosed(self._why_closed)

    def _end(self, why: str) -> None:
        if self._why_closed is None:
            self._why_closed = why
        # Wakes whoever polls.
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            unless_handled(error)
        for waiter in (*listed(self._pending.values), *listed(self._want_room.keys)):
            waiter.wake()
        self._notifications.wake()

    def retire(self) -> None:
        """Gives the descriptors back if it is closed and nobody uses them: a number that is closed
        under one who polls may be another file's by then."""
        if self._why_closed is None or not self._open:
            return
        if self._threads.busy or self._parties.busy or self._notifications.busy:
            return  # the last of them comes here again
        _give_back(self._pid, self._open, self.wire, self._threads.bell)

    # -- what the waiting call

    def send(self, frame: bytearray) -> bool:
        """Sends a frame, or queues what of it cannot be sent; returns whether all was sent."""
        self.wire.put(frame)
        return self.flush()

    def flush(self) -> bool:
        """Sends what can be sent without waiting; returns whether that was everything."""
        try:
            done = self.wire.flush()
        except Gone:
            return self._lost()
        if self._want_room:
            self._give_room()
        return done

    def _lost(self) -> bool:
        self.advance()  # what it had said before it went
        self._end("the supervisor has closed the channel, or is gone")
        return False

    def advance(self, wait: bool = False) -> None:
        """Sends and receives what can be without waiting, and delivers.

        Args:
            wait: for something to receive, a moment.
        """
        if self.wire.out and not self.closed:
            with contextlib.suppress(Gone):  # the end of the stream says it, below
                self.wire.flush()
        try:
            while self.wire.pump(self._deliver, self._commit, wait):
                wait = False
        except BaseException:
            # A signal handler raised. What was received and not delivered is not in the socket any
            # more: nothing has anybody look for it, unless they are told.
            self._threads.bell.ring()
            self._parties.look()
            self._notifications.wake()
            raise
        # Also when it is closed: whoever closed may not have got as far as to wake everybody.
        if self.wire.ended and (not self.closed or self._pending):
            self._end("the supervisor has closed the channel, or is gone")
        if self._want_room:
            self._give_room()
        if self._notifications.busy and self._notifications.waiting:
            self._notifications.wake()  # who wants them may not be who reads

    def _give_room(self) -> None:
        for _ in range(MOST_QUEUED - len(self.wire.out)):
            try:
                waiter, _ = self._want_room.popitem(last=False)
            except KeyError as error:
                unless_handled(error)
                return
            waiter.wake()

    def _deliver(self, frame: Frame) -> Any:
        """Returns a notification; the rest is for those who asked."""
        number: int | None
        answer: Response | Exception
        if frame.refused:
            number, answer = self._refused(frame)
        else:
            try:
                answer = decode_response(frame.data)
                number = answer.id
            except DECODING_ERRORS as error:
                number = read_id(frame.data)
                answer = UndecodableAnswer(f"the answer cannot be decoded: {error}")
        waiter = None if number is None else self._pending.get(number)
        passed = None
        if frame.fds:
            # The same ones again, should the frame come again: see wire.py. The numbers alone are
            # not enough: they may have been taken, closed, and come with another frame.
            passed = self._passed.setdefault(_mark(frame), PassedFds())
            passed.hold(frame.fds)
        if waiter is not None:
            waiter.fds = passed
            waiter.answer = answer
            waiter.wake()
            return None
        return answer if number == NOTIFICATION else None

    def _commit(self, notes: list[Any], passed: list[Frame]) -> list[tuple[Any, ...]]:
        steps: list[tuple[Any, ...]] = [(self._passed.pop, _mark(frame), None) for frame in passed]
        return steps + self._notifications.steps(notes) if notes else steps

    def _refused(self, frame: Frame) -> tuple[int | None, FrameTooLarge]:
        problem = f"the answer has {frame.length} bytes, and max_frame is {self._max_frame}"
        return read_id(frame.data), FrameTooLarge(problem)


def _mark(frame: Frame) -> tuple[int | None, tuple[int, ...]]:
    """Of a frame with descriptors."""
    return read_id(frame.data), frame.fds


def _take(waiter: AnyWaiter) -> list[int]:
    return [] if waiter.fds is None else waiter.fds.take()


def _give_back(pid: int, owned: dict[int, None], wire: Wire, bell: Bell) -> None:
    """Once; in a forked child never."""
    if os.getpid() == pid:
        try:
            fd, _ = owned.popitem()
        except KeyError as error:
            unless_handled(error)
            return
        fds.disown(fd)
        wire.close()
        bell.close()


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child: our descriptors are closed there already, so that it holds nobody's
    connection, and their numbers may be somebody else's."""
    for channel in tuple(_channels):
        channel._sock.detach()


fds.in_forked_child(_forget)
