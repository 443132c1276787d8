"""Frames over a Unix stream socket, from any thread and from inside a signal handler.

Python runs a signal handler in the main thread between any two bytecodes, also in the middle of
what stands here, and the handler may come back here before what it interrupted goes on; or it may
raise, and what it interrupted never goes on. A lock against that would wait for itself, so:

* Other threads are kept out by an RLock, which lets the same thread in again, and is held by `with`
  alone, which no exception can come in between.
* What is received is put where everybody finds it, and what is sent is taken away, by the one call
  into C that does the system call: no handler runs inside, so none ever sees bytes that are neither
  in the kernel nor in `_inbox`, or that are in both the kernel and `out`.
* Cutting the stream into frames is a function of `_inbox` (frames.py). Only the outermost call
  takes what was cut away from it; a call inside another one sees the same frames again, and more.
  So a frame may be delivered twice, and whoever gets it must not mind.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat, starmap
from operator import call, itemgetter
from typing import Any, TypeVar, cast

from proctree.channel.frames import LENGTH, NOTHING, Chunk, Frame, Rest, needed, split
from proctree.channel.passed import MOST_FDS, Ancillary, from_ancillary, room_for, to_ancillary

PIECE = 32 << 10
"""Bytes sent at once. The kernel makes one message of at most so many, and takes all of it or
nothing (unix_stream_sendmsg): there is no half of a piece to be remembered."""

RECEIVE = 64 << 10
"""Bytes received at once."""

WAIT_SECONDS = 0.01
"""The longest time spent in a receive that waits: nothing but data ends it, nobody else can receive
meanwhile, and it may miss a signal that comes just before it."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_WAITING_FLAGS = socket.MSG_CMSG_CLOEXEC

Received = tuple[bytes, Ancillary, int, Any]
_NOTHING_LEFT = [NOTHING]
_unpack_length = LENGTH.unpack_from

_END: Received = (b"", [], 0, None)
"""What a receive returns at the end of the stream."""

T = TypeVar("T")

Deliver = Callable[[Frame], Any]
Commit = Callable[[list[Any], list[Frame]], Iterable[tuple[Any, ...]]]


def is_stream(sock: socket.socket) -> bool:
    """Whether it is what `Wire` needs."""
    return sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM


class Gone(Exception):
    """The other side is gone."""


def unless_handled(error: BaseException) -> None:
    """Raises it again if a signal handler raised it, while we were where we catch the same type. A
    call into C raises in our own frame; behind a handler's exception there is the handler's."""
    traceback = error.__traceback__
    if traceback is not None and traceback.tb_next is not None:
        raise error


def listed(view: Callable[[], Iterable[T]]) -> list[T]:
    """What is in a mapping that others change meanwhile; `view` is its `keys` or `values`."""
    while True:
        try:
            return list(view())
        except RuntimeError as error:  # something came or went just now
            unless_handled(error)


class Wire:
    """One end of a stream of frames.

    Args:
        sock: an AF_UNIX stream socket.
        max_frame: in bytes: longer frames are passed over, and delivered as refused.
        with_fds: take descriptors that come with frames. Without it the kernel drops them.
    """

    def __init__(self, sock: socket.socket, max_frame: int, *, with_fds: bool) -> None:
        self.max_frame = max_frame
        self.ended = False
        """The other side is gone: nothing more will come. What came before was delivered."""
        self._sock = sock
        self._sending = threading.RLock()
        self._receiving = threading.RLock()
        self._inbox: list[Any] = [NOTHING]
        room = room_for(MOST_FDS) if with_fds else 0
        arguments = repeat(RECEIVE), repeat(room)
        self._receive = map(sock.recvmsg, *arguments, repeat(_RECEIVE_FLAGS))
        self._receive_waiting = map(sock.recvmsg, *arguments, repeat(_WAITING_FLAGS))
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(WAIT_SECONDS))
        self.out: deque[tuple[Any, ...]] = deque()
        """Pieces that are waiting for room in the socket."""
        # Each step sends what is first in `out` and then takes it out. IndexError: there is
        # nothing; BlockingIOError: there is no room; and it can go on after either.
        send = starmap(call, map(itemgetter(0), repeat(self.out)))
        taken = map(call, repeat(self.out.popleft))
        self._send = cast("Iterator[tuple[int, tuple[Any, ...]]]", zip(send, taken, strict=False))

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Not while another thread is in a system call with the number."""
        with self._sending, self._receiving:
            self._sock.close()

    # -- sending

    def put(
        self,
        frame: bytes | bytearray,
        fds: tuple[int, ...] = (),
        then: Callable[[], object] | None = None,
    ) -> None:
        """Queues one frame, or several in one; `flush` sends.

        Args:
            fds: descriptors to go with it; they must stay open until it is sent.
            then: done in the same step, if it is one call into C.
        """
        pieces: list[tuple[Any, ...]]
        if len(frame) <= PIECE:
            pieces = [(self._sock.send, frame, _SEND_FLAGS)]
        else:
            view = memoryview(frame)
            cuts = range(0, len(frame), PIECE)
            pieces = [(self._sock.send, view[at : at + PIECE], _SEND_FLAGS) for at in cuts]
        if fds:
            pieces[0] = (self._sock.sendmsg, [pieces[0][1]], to_ancillary(fds), _SEND_FLAGS)
        if then is None:
            self.out.extend(pieces)  # at once: nothing of anybody else's comes in between
        else:
            deque(starmap(call, ((self.out.extend, pieces), (then,))), 0)

    def flush(self) -> bool:
        """Sends what the kernel has room for; returns whether that was everything.

        Raises:
            Gone: the other side is gone (EPIPE, ECONNRESET).
        """
        with self._sending:
            try:
                for count, piece in self._send:
                    if count < len(piece[1]):
                        raise RuntimeError(f"the kernel sent {count} bytes of {len(piece[1])}")
            except IndexError as error:
                unless_handled(error)
                return True
            except BlockingIOError as error:
                unless_handled(error)
                return False
            except OSError as error:
                unless_handled(error)
                raise Gone(error) from None
        return True

    # -- receiving

    @property
    def awaited(self) -> int:
        """Bytes of a frame that has begun and is not whole; 0: of none that we know to have
        begun."""
        rest = self._inbox[0]
        return 0 if rest is NOTHING else needed(rest, self.max_frame)

    @property
    def undelivered(self) -> bool:
        """Something was received, and perhaps not delivered: by one who never came back."""
        return len(self._inbox) > 1

    def pump(self, deliver: Deliver, commit: Commit, wait: bool = False) -> bool:
        """Receives once, if anything is there, and delivers the frames that are whole.

        Args:
            deliver: called for each frame, in order, and for some perhaps again, see the module;
                returns what is to be noted, or None.
            commit: asked what is to be done in the same step as frames are taken away, and so just
                once, about what was noted of them, and about those that descriptors came with:
                calls into C, each as (function, *args).
            wait: if nothing is there, for `WAIT_SECONDS`.

        Returns:
            Whether there may be more.
        """
        # Whether what we interrupted is in here. `with` releases what it acquires whatever comes,
        # and the lock knows its owner: a flag of our own could be left standing.
        inside = self._receiving._is_owned()  # type: ignore[attr-defined]
        with self._receiving:
            if self.ended:
                return False
            more = self._receive_once(self._receive_waiting if wait else self._receive)
            inbox = self._inbox
            if not inside and len(inbox) == 2 and inbox[0] is NOTHING:
                # What is usually there: one frame, whole, and nothing else.
                data, ancillary, _, _ = inbox[1]
                length = len(data) - LENGTH.size
                if (
                    0 < length <= self.max_frame
                    and not ancillary
                    and _unpack_length(data)[0] == length
                    and deliver(Frame(memoryview(data)[LENGTH.size :], length)) is None
                ):
                    inbox[:2] = _NOTHING_LEFT
                    return more
            if len(inbox) > 1:
                self._deliver(deliver, None if inside else commit)
        return more

    def _receive_once(self, receive: Iterator[Received]) -> bool:
        """Returns whether there may be more."""
        try:
            try:
                self._inbox.extend(islice(receive, 1))
            except ConnectionResetError as error:
                unless_handled(error)
                # It was closed with something of ours unread. The kernel says so once, before what
                # the other side had said until then.
                self._inbox.extend(islice(receive, 1))
        except BlockingIOError as error:
            unless_handled(error)
            return False
        except OSError as error:
            unless_handled(error)
            self._inbox.append(_END)
        data, ancillary = self._inbox[-1][:2]
        # A receive ends behind a message with descriptors, whatever there is after it.
        return len(data) == RECEIVE or bool(ancillary)

    def _deliver(self, deliver: Deliver, commit: Commit | None) -> None:
        snapshot = self._inbox[:]
        frames, rest = self._frames(snapshot)
        if rest is None:
            return
        notes = [note for frame in frames if (note := deliver(frame)) is not None]
        if not snapshot[-1][0]:
            self.ended = True
        if commit is None:
            return
        passed = [frame for frame in frames if frame.fds]
        taken = slice(0, len(snapshot))
        if notes or passed:
            steps = [(self._inbox.__setitem__, taken, [rest]), *commit(notes, passed)]
            deque(starmap(call, steps), 0)
        else:
            self._inbox[taken] = [rest]

    def _frames(self, snapshot: list[Any]) -> tuple[Sequence[Frame], Rest | None]:
        """Pure. No rest: there is nothing new."""
        rest, received = snapshot[0], snapshot[1:]
        size = sum(len(item[0]) for item in received)
        if size < needed(rest, self.max_frame) and received[-1][0]:
            return (), None
        chunks = [Chunk(item[0], from_ancillary(item[1]) if item[1] else ()) for item in received]
        return split(rest, chunks, self.max_frame)


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
