"""One tree's side in the supervisor: its door, its connections, and what is under way for it.

All of it runs on the thread of the channels' own loop, which no handler can hold up, except what
says otherwise. What a tree can make us keep is bounded: requests under way, connections, frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec

from proctree import events, worker
from proctree.channel import rendezvous
from proctree.channel.errors import (
    ANSWER_TOO_LARGE,
    FRAME_TOO_LARGE,
    UNDECODABLE,
    UNENCODABLE_ANSWER,
    ChannelClosed,
    ChannelFull,
    FrameTooLarge,
    RemoteError,
)
from proctree.channel.frames import (
    DECODING_ERRORS,
    NOTIFICATION,
    Frame,
    TooLong,
    decode_request,
    encode_response,
    read_id,
)
from proctree.channel.handlers import Answer, Handler, Handlers, Where, text_of, to_error
from proctree.channel.lane import Lane
from proctree.channel.passed import Kept, take_none, to_ancillary
from proctree.channel.tasks import Tasks
from proctree.errors import errno_name
from proctree.loop import READ, Loop
from proctree.process import fds

LONG = 1 << 20
"""Bytes of a frame of which a tree may have but one at a time."""

MOST_NOTIFICATIONS = 1024
"""Notifications that may wait for a tree that does not read them."""

MOST_SHOWN = 1000
"""Characters of a message about what a tree has sent: it may quote it, and that may be long."""


class Caller:
    """Who asks: the second argument of a handler.

    Attributes:
        tree_id: of the tree.
        name: of the tree.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.tree_id = served.tree_id
        self.name = served.name

    def notify(self, body: Any) -> None:
        """As `WatchedSubprocess.notify`."""
        self._served.notify(body)

    def __repr__(self) -> str:
        return f"<Caller {self.name!r} tree {self.tree_id}>"


class Rules(NamedTuple):
    """What a server does for each of its trees.

    Attributes:
        handlers: of requests.
        tasks: where those run that are async.
        max_in_flight: requests of a tree under way at a time.
        max_connections: of a tree.
        max_frame: in bytes.
    """

    handlers: Handlers
    tasks: Tasks
    max_in_flight: int
    max_connections: int
    max_frame: int


class Served:
    """One tree."""

    def __init__(self, rules: Rules, loop: Loop, tree_id: str, name: str) -> None:
        self.rules = rules
        self.loop = loop
        self.tree_id = tree_id
        self.name = name
        self._caller = Caller(self)
        self._door: socket.socket | None = None
        self._door_fd = -1
        # A number: a forked child, to which it belongs, must not close it with an object of ours.
        self._theirs: int | None = None
        self._lanes: list[Lane] = []
        self._long: Lane | None = None
        self._long_begun = False
        self._under_way: dict[object, None] = {}
        self._put_off = False
        self._early: deque[bytearray] = deque()
        self._unsent: deque[bytearray] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sparing = events.Sparing(tree_id=tree_id, name=name)
        self._closed = False
        _all.add(self)

    # -- in the starting thread, with the descriptor lock held

    def open(self) -> tuple[int, bytes]:
        """Makes the door; returns the tree's descriptor and the value of its variable."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door = fds.lifted(ours)
        take_none(self._door)
        self._door_fd = fds.own(self._door.fileno())
        self._theirs = fds.above_stdio(theirs.detach())
        return self._theirs, rendezvous.describe(self._theirs).encode()

    def close_child_end(self) -> None:
        if self._theirs is not None:
            os.close(self._theirs)
            self._theirs = None

    def forget(self) -> None:
        """In a forked child: none of the sockets is its own."""
        for sock in (self._door, *(lane.sock for lane in self._lanes)):
            if sock is not None:
                sock.detach()

    # -- from any thread

    def start(self) -> None:
        """The tree runs, or is about to."""
        self.loop.post(self._start)

    def close(self) -> None:
        """The tree has ended."""
        self._closed = True
        self.loop.post(self._close)

    def notify(self, body: Any) -> None:
        """See `WatchedSubprocess.notify`."""
        if self._closed:
            raise ChannelClosed(f"tree {self.tree_id} has ended: nobody is there to be notified")
        try:
            frame = encode_response(NOTIFICATION, body, None, self.rules.max_frame)
        except TooLong as error:
            raise FrameTooLarge(
                f"the notification has {error.length} bytes, and max_frame is "
                f"{self.rules.max_frame}"
            ) from None
        waiting = max((len(lane.wire.out) for lane in tuple(self._lanes)), default=len(self._early))
        if waiting + len(self._unsent) >= MOST_NOTIFICATIONS:
            raise ChannelFull(
                f"tree {self.tree_id} does not read: {MOST_NOTIFICATIONS} notifications wait for it"
            )
        self._unsent.append(frame)
        self.loop.post(self._push)

    # -- on the loop

    def _push(self) -> None:
        frame = self._unsent.popleft()
        if not self._lanes:
            self._early.append(frame)
        for lane in tuple(self._lanes):
            lane.send(frame)

    def _start(self) -> None:
        if self._door is not None and not self._closed:
            self.loop.register(self._door_fd, READ, self._on_door)

    def _on_door(self, mask: int) -> None:
        """Somebody connects, or the last who could has gone."""
        assert self._door is not None
        try:
            nonce = self._door.recv(rendezvous.NONCE + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            nonce = b""
        if not nonce:
            self._close_door()
            return
        error = ""
        if len(nonce) != rendezvous.NONCE:
            error = "that was no nonce"
        elif len(self._lanes) >= self.rules.max_connections:
            error = f"the tree has {self.rules.max_connections} connections already"
        # EAGAIN: it does not read what we answer; others: it has gone.
        with contextlib.suppress(OSError):
            if error:
                self._refuse(nonce, error)
            else:
                self._welcome(nonce)

    def _refuse(self, nonce: bytes, error: str) -> None:
        assert self._door is not None
        self.log("channel.connection_refused", why=error)
        data = msgspec.msgpack.encode(rendezvous.Welcome(nonce, error))
        self._door.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _welcome(self, nonce: bytes) -> None:
        assert self._door is not None
        try:
            with fds.making():
                ours, theirs = socket.socketpair()
                ours = fds.lifted(ours)
                take_none(ours)
                fds.own(ours.fileno())
        except OSError as problem:
            # It would wait for its answer otherwise.
            name = errno_name(problem.errno or 0)
            self._refuse(nonce, f"the supervisor cannot make a socket ({name})")
            return
        data = msgspec.msgpack.encode(rendezvous.Welcome(nonce))
        with theirs:
            try:
                ancillary = to_ancillary((theirs.fileno(),))
                self._door.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BaseException:
                fds.disown(ours.fileno())
                ours.close()
                raise
        lane = Lane(self, ours, self.rules.max_frame)
        self._lanes.append(lane)
        while self._early:
            lane.send(self._early.popleft())
        lane.watch()

    def _close_door(self) -> None:
        if self._door is not None:
            self.loop.unregister(self._door_fd)
            fds.disown(self._door_fd)
            self._door.close()
            self._door = None

    def gone(self, lane: Lane) -> None:
        if lane in self._lanes:
            self._lanes.remove(lane)
        if self._long is lane and not self._long_begun:
            self._long = None
        self._go_on()

    def _close(self) -> None:
        self._closed = True
        self._close_door()
        for lane in tuple(self._lanes):
            lane.close()
        self._early.clear()
        for task in tuple(self._tasks):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _go_on(self) -> None:
        self._put_off = False
        for lane in tuple(self._lanes):
            lane.advance()

    # -- what there is room for

    def may_have_long(self, lane: Lane) -> bool:
        """One at a time: a long frame takes memory while it comes, and its request may keep it."""
        if lane.wire.awaited <= LONG:
            return True
        if self._long is None:
            self._long = lane
        return self._long is lane and not self._long_begun

    def has_room(self) -> bool:
        if len(self._under_way) < self.rules.max_in_flight:
            return True
        self._put_off = True
        # Looked at again: what ended before that line did not see it.
        return len(self._under_way) < self.rules.max_in_flight

    # -- requests

    def begin(self, lane: Lane, frame: Frame) -> None:
        """One request: whatever it is, it gets one answer."""
        number: int | None = None
        token = object()
        self._under_way[token] = None
        long = self._long is lane and not self._long_begun and frame.length > LONG
        if long:
            self._long_begun = True
        done = partial(self._done, lane, token, long)
        try:
            if frame.refused:
                limit = self.rules.max_frame
                problem = f"the request has {frame.length} bytes, and max_frame is {limit}"
                raise RemoteError(FRAME_TOO_LARGE, problem)
            try:
                request = decode_request(frame.data)
            except DECODING_ERRORS as error:
                raise RemoteError(UNDECODABLE, str(error)) from None
            number = request.id
            handler, body = self.rules.handlers.find(request.body)
        except RemoteError as error:
            if number is None:
                number = read_id(frame.data)
            error.message = error.message[:MOST_SHOWN]
            self.log("channel.request_refused", type=error.type, error=error.message)
            answer = encode_response(number or NOTIFICATION, None, error.to_wire())
            done(answer)
            return
        self._run(handler, body, partial(self._answer, number, done))

    def _run(self, handler: Handler, body: Any, finish: Callable[..., None]) -> None:
        if handler.where is Where.INLINE:
            self._call(handler, body, finish)
        elif handler.where is Where.THREAD:
            worker.run(partial(self._call, handler, body, finish))
        else:
            start = partial(self._start_task, handler, body, finish)
            self.rules.tasks.submit(start, partial(self._no_loop, finish))

    def _no_loop(self, finish: Callable[..., None], error: Exception) -> None:
        finish(None, RuntimeError(f"the handlers' event loop has ended: {error}"))

    def _call(self, handler: Handler, body: Any, finish: Callable[..., None]) -> None:
        try:
            answer = handler.function(body, self._caller)
        except BaseException as error:
            finish(None, error)
        else:
            finish(answer, None)

    def _start_task(self, handler: Handler, body: Any, finish: Callable[..., None]) -> None:
        task = asyncio.get_running_loop().create_task(self._await(handler, body, finish))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._closed:
            task.cancel()

    async def _await(self, handler: Handler, body: Any, finish: Callable[..., None]) -> None:
        try:
            answer = await handler.function(body, self._caller)
        except BaseException as error:
            finish(None, error)
            # Not SystemExit, nor KeyboardInterrupt: they would end the event loop.
            if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
                raise
        else:
            finish(answer, None)

    # -- from any thread: how a request ends

    def _answer(
        self, number: int, done: Callable[..., None], answer: Any, error: BaseException | None
    ) -> None:
        passed: tuple[int, ...] = ()
        keep: Any = None
        if error is not None:
            if not isinstance(error, RemoteError) and not self._closed:
                self.log("channel.handler_failed", error=text_of(error, repr), exc_info=error)
            answer, wire_error = None, to_error(error)
        else:
            wire_error = None
        try:
            if type(answer) is Answer:
                keep = Kept(answer.fds)
                answer, passed = answer.body, keep.numbers
            frame = encode_response(number, answer, wire_error, self.rules.max_frame)
        except Exception as problem:
            self.log("channel.answer_failed", error=text_of(problem, repr))
            frame = encode_response(number, None, self._encoding_failed(problem).to_wire())
            passed = ()
        done(frame, passed, keep)

    def _encoding_failed(self, problem: Exception) -> RemoteError:
        if isinstance(problem, TooLong):
            limit = self.rules.max_frame
            text = f"the answer has {problem.length} bytes, and max_frame is {limit}"
            return RemoteError(ANSWER_TOO_LARGE, text)
        return RemoteError(UNENCODABLE_ANSWER, f"the answer cannot be encoded: {text_of(problem)}")

    def _done(
        self,
        lane: Lane,
        token: object,
        long: bool,
        frame: bytearray,
        passed: tuple[int, ...] = (),
        keep: Any = None,
    ) -> None:
        if not lane.closed:
            self._send(lane, frame, passed, keep)
        self._under_way.pop(token, None)
        if long:
            self.loop.post(self._long_done)
        elif self._put_off:
            self.loop.post(self._go_on)

    def _send(self, lane: Lane, frame: bytearray, passed: tuple[int, ...], keep: Any) -> None:
        """Answers that are there at the same time go together."""
        if keep is not None:
            lane.send(frame, passed, keep)
        elif self.loop.is_current_thread():
            lane.gather(frame, self.loop)  # Lane.begin, which called the handler, sends it
        elif self.rules.tasks.is_running():
            if lane.gather(frame, self.rules):
                asyncio.get_running_loop().call_soon(lane.send_gathered, self.rules)
        else:
            lane.send(frame)

    def _long_done(self) -> None:
        self._long = None
        self._long_begun = False
        self._go_on()

    # -- events

    def log(self, event: str, **fields: Any) -> None:
        """At most one of a kind a second; how many were left out is in the next."""
        self._sparing.warning(event, **fields)


_all: weakref.WeakSet[Served] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child: our descriptors are closed there already, and their numbers may be
    somebody else's by the time that our sockets are collected."""
    for served in tuple(_all):
        served.forget()


fds.in_forked_child(_forget)
