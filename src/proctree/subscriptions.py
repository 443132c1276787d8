"""Who hears of events: the log, and those who have subscribed.

A subscriber is the host's code, so it is called on a thread of its own and not on the loop's: one
that blocks holds up nobody else, and one that raises is reported. What waits for it is bounded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from proctree import events, transitions
from proctree.process import fds
from proctree.transitions import LOGGED, EventsMissed
from proctree.worker import Worker

PENDING_MAX = 10_000
"""Events that may wait for one subscriber."""


class _Subscriber:
    """What waits for somebody who wants to hear of events, and how much of it."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        for kind in kinds:
            if kind not in LOGGED:
                raise TypeError(f"kinds: a class of events as TreeEnded, not {kind!r}")
        self._kinds = kinds
        self._pending: deque[Any] = deque()
        self._missed = 0
        self._open = False

    def open(self) -> None:
        """Everything from now on."""
        global _subscriptions
        self._open = True
        with _lock:
            _subscriptions = (*_subscriptions, self)

    def close(self) -> None:
        """No event is delivered any more once a callback that runs now has returned."""
        global _subscriptions
        with _lock:
            _subscriptions = tuple(other for other in _subscriptions if other is not self)
        self._open = False
        self._pending.clear()

    def offer(self, event: Any) -> None:
        """Never blocks."""
        if not self._open or (self._kinds and not isinstance(event, self._kinds)):
            return
        if len(self._pending) >= PENDING_MAX:
            self._missed += 1
            return
        if self._missed:
            missed, self._missed = self._missed, 0
            self._pending.append(EventsMissed(missed, transitions.now()))
            self._arrived()
        self._pending.append(event)
        self._arrived()

    def _arrived(self) -> None:
        """One more is pending."""
        raise NotImplementedError


class Subscription(_Subscriber):
    """What `subscribe` returns."""

    def __init__(self, callback: Callable[[Any], object], kinds: tuple[type, ...]) -> None:
        super().__init__(kinds)
        self._callback = callback
        self._worker = Worker()
        self._failed = False

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything that has happened so far has been delivered.

        Args:
            timeout: seconds; None (default) waits as long as the callback takes.

        Returns:
            Whether it has been; False: the time ran out first.

        Raises:
            RuntimeError: called in the callback of this very subscription.
        """
        if self._worker.is_current_thread():
            raise RuntimeError("flush() in a callback of the same subscription waits for itself")
        delivered = threading.Event()
        self.behind(delivered.set)
        return delivered.wait(timeout)

    def behind(self, job: Callable[[], None]) -> None:
        """Calls `job()`, which must not raise, on the callback's thread when everything that has
        happened so far has been delivered. Never blocks."""
        self._worker.post(job)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _arrived(self) -> None:
        self._worker.post(self._deliver)

    def _deliver(self) -> None:
        try:
            event = self._pending.popleft()
        except IndexError:
            return  # closed
        if not self._open:
            return
        try:
            self._callback(event)
        except Exception as exception:
            # Once: one that fails for every event of a storm must not become a storm in the log.
            if not self._failed:
                self._failed = True
                events.error(
                    "subscriber.failed",
                    kind=type(event).__name__,
                    error=repr(exception),
                    exc_info=True,
                )


class EventQueue(_Subscriber):
    """Keeps events until somebody takes them, on whatever thread; as many as wait for a callback.

    Args:
        kinds: as of `subscribe`.
        arrived: called when there is one more, on the thread that it happens on. Must not block.
    """

    def __init__(self, kinds: tuple[type, ...], arrived: Callable[[], None]) -> None:
        super().__init__(kinds)
        self._tell = arrived

    def _arrived(self) -> None:
        self._tell()

    @property
    def ready(self) -> bool:
        """Whether there is one to take."""
        return bool(self._pending)

    def take(self) -> Any:
        """The next one.

        Raises:
            IndexError: there is none.
        """
        return self._pending.popleft()


_subscriptions: tuple[_Subscriber, ...] = ()
# The collector may close a forgotten one in the middle of opening another.
_lock = threading.RLock()


def subscribe(callback: Callable[[Any], object], *kinds: type) -> Subscription:
    """Calls `callback(event)` for everything that happens to trees from now on, in order, one at a
    time, on a thread that is nobody else's meanwhile.

    A callback may block and may raise (which is reported once); it may use every method of every
    handle. When more than 10,000 events wait for it, those that come then are thrown away, and it
    is told how many by `EventsMissed`.

    Args:
        callback: called with the event.
        kinds: the classes of events that are wanted, as `TreeEnded`. Default: all.

    Returns:
        The subscription, to `close`; also a context manager.

    Raises:
        TypeError: the callback cannot be called, or a kind is no class of events.
    """
    if not callable(callback):
        raise TypeError(f"callback: must be callable, not {callback!r}")
    subscription = Subscription(callback, kinds)
    subscription.open()
    return subscription


def publish(event: Any) -> None:
    """Tells the log and all subscribers. Never blocks but for the host's log processors."""
    level, name = LOGGED[type(event)]
    if level != "debug":
        getattr(events, level)(name, **transitions.fields(event))
    elif events.wanted():
        events.debug(name, **transitions.fields(event))
    for subscription in _subscriptions:
        subscription.offer(event)


def _forget() -> None:
    """A forked child has none of our trees, nor our threads."""
    global _subscriptions, _lock
    _subscriptions = ()
    # The collector may close a forgotten one in the middle of opening another.


_lock = threading.RLock()


fds.in_forked_child(_forget)
