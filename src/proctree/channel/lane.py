"""One connection, on the supervisor's side.

All of it runs on the thread of the channels' own loop, except what says otherwise.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from typing import Any, Protocol

from proctree.channel.frames import Frame
from proctree.channel.wire import Gone, Wire
from proctree.loop import READ, WRITE, Loop
from proctree.process import fds

TURN = 8
"""Receives from one connection before others have their turn."""

BATCH = 64
"""Requests of one connection that are begun before others have their turn."""

GATHERED = 64 << 10
"""Bytes of answers that may wait for others to be sent with."""


class Home(Protocol):
    """The tree whose connection it is."""

    loop: Loop

    def has_room(self) -> bool:
        """For one more request. If not, `Lane.advance` is called when there is."""
        ...

    def may_have_long(self, lane: Lane) -> bool:
        """Whether it may go on reading, with the frame that has begun. If not, as above."""
        ...

    def begin(self, lane: Lane, frame: Frame) -> None:
        """A request has come."""

    def gone(self, lane: Lane) -> None:
        """It is closed."""


class Lane:
    """One connection."""

    def __init__(self, home: Home, sock: socket.socket, max_frame: int) -> None:
        self._home = home
        self.sock = sock
        self._fd = sock.fileno()
        self.wire = Wire(sock, max_frame, with_fds=False)
        self.waiting: deque[Frame] = deque()
        """Requests that have come, for which there is no room yet."""
        self._mask = 0
        self._kept: deque[object] = deque()
        """What must not be closed before it is sent."""
        self._keeping = threading.Lock()
        """Held while something is kept and put: what is kept may go when nothing is left of it."""
        self._gathered: dict[object, list[bytearray]] = {}
        self._gathered_bytes = 0
        self._put_off = False
        """Requests wait for answers to be sent: whoever sends the last one has to say so."""
        self._called_later = False
        self.closed = False

    def watch(self) -> None:
        """For what there is to wait for now. While there is no room, nothing is read, and then the
        end of the other side must not wake us either: epoll reports it whatever the mask."""
        if self.closed:
            return
        mask = (WRITE if self.wire.out else 0) | (READ if self._may_read() else 0)
        if mask == self._mask:
            return
        if not self._mask:
            self._home.loop.register(self._fd, mask, self._on_ready)
        elif mask:
            self._home.loop.modify(self._fd, mask)
        else:
            self._home.loop.unregister(self._fd)
        self._mask = mask

    def _may_read(self) -> bool:
        return not self.waiting and self._home.may_have_long(self)

    def _on_ready(self, mask: int) -> None:
        if mask & WRITE:
            self.flush()
        if mask & ~WRITE and not self.closed:
            self.read()
        self.advance()

    def read(self) -> None:
        """What is there, for `advance` to go on with."""
        for _ in range(TURN):
            if not self._may_read() or not self.wire.pump(self._arrived, _nothing):
                break
            self.begin()

    def _arrived(self, frame: Frame) -> None:
        self.waiting.append(frame)

    def begin(self) -> None:
        """As many requests as there is room for, but not so many at once that others wait for it:
        one receive may bring thousands."""
        loop = self._home.loop
        for _ in range(BATCH):
            if not (self.waiting and self._may_answer() and self._home.has_room()):
                break
            self._home.begin(self, self.waiting.popleft())
            if self._gathered_bytes >= GATHERED:
                self.send_gathered(loop)
        else:
            if self.waiting and not self._called_later:
                self._called_later = True
                loop.call_later(0.0, self._begin_more)
        self.send_gathered(loop)

    def _begin_more(self) -> None:
        self._called_later = False
        self.advance()

    def _may_answer(self) -> bool:
        """While the other side does not read its answers it gets no new ones."""
        if not self.wire.out:
            return True
        self._put_off = True
        # Looked at again: a thread that sent the last of them before that line did not see it.
        return not self.wire.out

    def advance(self) -> None:
        """Goes on with what was put off."""
        if not self.closed:
            self.begin()
            if self.wire.ended and not self.waiting:
                self.close()
            self.watch()

    # -- from any thread

    def send(
        self, frame: bytes | bytearray, passed: tuple[int, ...] = (), keep: Any = None
    ) -> None:
        if keep is None:
            self.wire.put(frame, passed)
        else:
            with self._keeping:
                self._kept.append(keep)
                self.wire.put(frame, passed)
        self.flush()
        if self.wire.out:
            self._home.loop.post(self.watch)

    def gather(self, frame: bytearray, by: object) -> bool:
        """Keeps an answer until `send_gathered`, by one who will have more of them at once; returns
        whether it is the first."""
        frames = self._gathered.setdefault(by, [])
        frames.append(frame)
        if by is self._home.loop:
            self._gathered_bytes += len(frame)
        return len(frames) == 1

    def send_gathered(self, by: object) -> None:
        """In one system call."""
        frames = self._gathered.pop(by, None)
        if by is self._home.loop:
            self._gathered_bytes = 0
        if frames and not self.closed:
            self.send(b"".join(frames))

    def flush(self) -> None:
        try:
            if not self.wire.flush():
                return
        except Gone:
            # It has gone without waiting for its answers.
            self._home.loop.post(self.close)
            return
        if self._kept:
            with self._keeping:
                if not self.wire.out:  # else another thread's are among them by now
                    self._kept.clear()
        if self._put_off:
            self._put_off = False
            self._home.loop.post(self.advance)

    # -- on the loop

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self._mask:
            self._home.loop.unregister(self._fd)
        fds.disown(self._fd)
        self.wire.close()
        self.waiting.clear()
        self._kept.clear()
        self._home.gone(self)


def _nothing(_notes: list[Any], _passed: list[Any]) -> list[tuple[Any, ...]]:
    return []
