"""What the supervisor says unasked, and those who want to hear it."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from proctree import events
from proctree.channel.bell import Bell
from proctree.channel.errors import ChannelError, RemoteError
from proctree.channel.frames import DECODING_ERRORS
from proctree.channel.loops import Owner, Party

KEPT = 1024
"""Notifications kept for each who wants them; then the oldest is dropped."""


class Subscription:
    """One who wants them: whoever reads appends to `waiting`, and then calls `wake`."""

    def __init__(self, waiting: deque[Any]) -> None:
        self.waiting = waiting
        self.wake: Callable[[], None] = _nobody

    def ring(self) -> None:
        """Calls the `wake` of now."""
        self.wake()


def _nobody() -> None:
    """The subscriber is not waiting."""


class Notifications:
    """The notifications of one channel."""

    def __init__(self, owner: Owner, decode: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._decode = decode
        self._lock = threading.Lock()
        self._early: deque[Any] = deque(maxlen=KEPT)
        self._subscriptions: tuple[Subscription, ...] = ()
        self.busy = False
        """Whether somebody wants them."""

    def steps(self, notes: list[Any]) -> list[tuple[Any, ...]]:
        """What has to be done in one step with taking `notes` from the stream."""
        subscriptions = self._subscriptions
        if not subscriptions:
            return [(self._early.extend, notes)]
        steps: list[tuple[Any, ...]] = [
            (subscription.waiting.extend, notes) for subscription in subscriptions
        ]
        # Behind them, since these are no calls into C: whoever reads may not be who wants them.
        return steps + [(subscription.ring,) for subscription in subscriptions]

    @property
    def waiting(self) -> bool:
        """Whether somebody wants them who has not taken them yet."""
        return any(subscription.waiting for subscription in self._subscriptions)

    def wake(self) -> None:
        """There are some, or there will be no more."""
        for subscription in self._subscriptions:
            subscription.wake()

    def _add(self) -> Subscription:
        with self._lock:
            # What came early is the first one's.
            subscription = Subscription(self._early)
            self._subscriptions += (subscription,)
            self.busy = True
            self._early = deque(maxlen=KEPT)
        return subscription

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(
                other for other in self._subscriptions if other is not subscription
            )
            self.busy = bool(self._subscriptions)

    def _take(self, subscription: Subscription) -> Iterator[Any]:
        """What has come, decoded; what is not a message is dropped with an event."""
        while True:
            try:
                answer = subscription.waiting.popleft()
            except IndexError:
                return
            try:
                if isinstance(answer, Exception):
                    raise answer
                if answer.error is not None:
                    raise RemoteError.from_wire(answer.error)
                body = self._decode(answer.body)
            except (ChannelError, *DECODING_ERRORS) as error:
                events.warning("channel.notification_dropped", pid=os.getpid(), error=str(error))
            else:
                yield body

    # -- on a thread

    def listen(self, callback: Callable[[Any], object]) -> None:
        subscription = self._add()
        bell = Bell()
        subscription.wake = bell.ring
        thread = threading.Thread(
            target=self._listen,
            args=(subscription, bell, callback),
            name="proctree-notifications",
            daemon=True,
        )
        try:
            thread.start()
        except BaseException:
            self._remove(subscription)
            bell.close()
            raise

    def _listen(
        self, subscription: Subscription, bell: Bell, callback: Callable[[Any], object]
    ) -> None:
        poller = select.poll()
        poller.register(self._owner.wire.fileno(), select.POLLIN)
        poller.register(bell.fd, select.POLLIN)
        try:
            while not self._owner.closed:
                # It reads like everybody else, and is nobody's leader: while threads ask, they
                # read for themselves.
                poller.poll()
                bell.silence()
                self._owner.advance()
                for body in self._take(subscription):
                    self._call(callback, body)
        finally:
            self._remove(subscription)
            bell.close()
            self._owner.retire()

    def _call(self, callback: Callable[[Any], object], body: Any) -> None:
        try:
            callback(body)
        except Exception as error:
            events.error(
                "channel.callback_failed", pid=os.getpid(), error=repr(error), exc_info=True
            )

    # -- in a task

    async def subscribe(self, party: Party) -> AsyncIterator[Any]:
        subscription = self._add()
        party.stay()
        try:
            while True:
                waiter = party.waiter()
                subscription.wake = waiter.wake
                for body in self._take(subscription):
                    yield body
                if self._owner.closed:
                    return
                if not subscription.waiting:
                    await waiter.wait(None)
        finally:
            party.go()
            self._remove(subscription)
            self._owner.retire()
