"""Threads that wait for answers: one of them, the leader, reads for all; the others, its followers,
sleep until it has something for them, or leaves.

Nothing is held while anybody waits, so a signal handler may ask, and lead, in the middle of
whatever its thread was doing. Which thread leads is no more than a matter of who polls: reading is
safe from all of them at once (wire.py), and a follower now and then looks for itself, since the
leader may be in a signal handler that takes its time.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import Any

from proctree.channel.bell import Bell
from proctree.channel.closely import Closely
from proctree.channel.passed import PassedFds
from proctree.channel.wire import Wire, unless_handled
from proctree.latch import ENTRIES

LOOK_SECONDS = 1.0
"""How often everybody looks for himself in the end."""


class ThreadWaiter:
    """A thread's request.

    Whoever reads delivers: on any thread, perhaps twice, perhaps when nobody waits any more. So
    that is one assignment, and being woken once too often does no harm.

    Attributes:
        answer: what came for it, or None.
        fds: the descriptors that came with it, or None; set before the answer.
    """

    __slots__ = ("_gate", "_threads", "answer", "fds", "thread")

    def __init__(self, threads: Threads) -> None:
        self.answer: Any = None
        self.fds: PassedFds | None = None
        self.thread = threading.get_ident()
        self._threads = threads
        self._gate: threading.Lock | None = None

    def wake(self) -> None:
        """It has its answer, or is to lead. From any thread."""
        gate = self._gate
        if gate is not None:
            try:
                gate.release()
            except RuntimeError as error:  # it was open already
                unless_handled(error)
        elif self.thread != threading.get_ident() and self._threads.leader is self:
            # Somebody else took its answer from the socket: its poll has nothing to wake for.
            self._threads.bell.ring()

    def shut_gate(self) -> None:
        if self._gate is None:
            gate = threading.Lock()
            gate.acquire()
            self._gate = gate

    @property
    def is_follower(self) -> bool:
        return self._gate is not None

    def remove_gate(self) -> None:
        self._gate = None

    def sleep(self, seconds: float) -> bool:
        """Returns whether it was woken."""
        assert self._gate is not None
        return self._gate.acquire(timeout=seconds)


Done = Callable[[ThreadWaiter], bool]


class Threads:
    """The threads that wait on one wire.

    Args:
        wire: what they read from.
        advance: sends and receives what can be sent and received, and delivers; it waits a moment
            for something to receive if it is told to.
    """

    def __init__(self, wire: Wire, advance: Callable[[bool], None]) -> None:
        self._wire = wire
        self._advance = advance
        self.alone = True
        """Nobody but these threads reads from the wire."""
        self._leaders: dict[str, ThreadWaiter] = {}
        self._waiting: dict[ThreadWaiter, None] = {}
        """Followers have a gate. A leader that is not in here does not wait any more: a signal
        handler raised before it could leave."""
        self.bell = Bell()
        self._closely = Closely(partial(advance, False))

    @property
    def leader(self) -> ThreadWaiter | None:
        leader = self._leaders.get("")
        return leader if leader in self._waiting else None

    @property
    def busy(self) -> bool:
        """Whether a thread waits."""
        return bool(self._waiting)

    def wait(self, waiter: ThreadWaiter, done: Done, due: float | None) -> bool:
        """Waits until `done`, or until it is `due` (time.monotonic); returns whether it is done."""
        below = self._leaders.get("")
        if below is not None and (below.thread != waiter.thread or below not in self._waiting):
            below = None
        # Else our own thread leads already, below the signal handler that we are in: it cannot read
        # before we have returned.
        try:
            self._waiting[waiter] = None
            while not done(waiter):
                if due is not None and due <= time.monotonic():
                    return False
                leader = self._leaders.setdefault("", waiter)
                if leader is below or leader not in self._waiting:
                    leader = self._leaders[""] = waiter
                if leader is waiter:
                    self._lead(waiter, done, due)
                else:
                    self._follow(waiter, done, due)
            return True
        finally:
            # First, and one call into C: no signal handler that raises can come before it.
            self._waiting.pop(waiter, None)
            self._leave(waiter, below)

    def _leave(self, waiter: ThreadWaiter, below: ThreadWaiter | None) -> None:
        if self._leaders.get("") is not waiter:
            return
        if below is not None and below in self._waiting:
            self._leaders[""] = below
            self.bell.ring()  # its answer may be there
            return
        self._leaders.pop("", None)
        if self._waiting:
            self._promote()

    def _promote(self) -> None:
        while True:
            try:
                for waiter in self._waiting:
                    if waiter.is_follower:
                        waiter.wake()
                        return
                return
            except RuntimeError as error:  # one came or went just now
                unless_handled(error)

    def _lead(self, waiter: ThreadWaiter, done: Done, due: float | None) -> None:
        """Until something happens, or it is due."""
        if waiter.is_follower:
            # From here on it is woken by a poke. Whoever still saw a gate had delivered before.
            waiter.remove_gate()
            if done(waiter):
                return
        if self.alone and due is None and len(self._waiting) == 1 and not self._wire.out:
            # Nobody but the socket has anything to say.
            if self._closely.look(waiter):
                return
            # A receive that waits takes half the time of a poll and a receive. Whoever comes now
            # waits that moment for us.
            self._advance(True)
            if waiter.answer is not None:
                return
        elif self._wire.undelivered:
            # By one who did not come back: nobody polls for that.
            self._advance(False)
            if done(waiter):
                return
        poller = select.poll()
        mask = select.POLLIN | select.POLLOUT if self._wire.out else select.POLLIN
        poller.register(self._wire.fileno(), mask)
        poller.register(self.bell.fd, select.POLLIN)
        for seconds in chain(ENTRIES[:2], repeat(LOOK_SECONDS)):
            ready = poller.poll(_milliseconds(seconds, due))
            if any(fd == self.bell.fd for fd, _ in ready):
                self.bell.silence()
            self._advance(False)
            if ready or done(waiter) or (due is not None and due <= time.monotonic()):
                return

    def _follow(self, waiter: ThreadWaiter, done: Done, due: float | None) -> None:
        """Until it is woken, or due."""
        waiter.shut_gate()
        if self.leader is None or done(waiter):
            return  # it left, or delivered, before it could see us
        if self._wire.out:
            self.bell.ring()  # it has room in the socket to wait for, too
        for seconds in chain(ENTRIES[:2], repeat(LOOK_SECONDS)):
            left = seconds if due is None else min(seconds, due - time.monotonic())
            if waiter.sleep(max(left, 0.0)):
                return
            self._advance(False)
            if self.leader is None or done(waiter) or (due is not None and due <= time.monotonic()):
                return


def _milliseconds(seconds: float, due: float | None) -> float | None:
    """For poll(2), whose milliseconds are a C int: rounded up, so that no turn is idle."""
    if due is not None:
        seconds = min(seconds, due - time.monotonic())
    return None if seconds > 1e6 else max(0.0, seconds) * 1000 + 0.5
