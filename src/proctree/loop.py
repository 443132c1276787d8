"""The one owner of the selector.

One daemon thread, one epoll, any number of trees. Everything that concerns trees happens on that
thread; everybody else only posts. There is no second driver, and that is on purpose: a loop that is
driven by whoever waits can be torn in the middle of one tree's transition by another caller's
KeyboardInterrupt, which Python raises between any two bytecodes of the main thread.

Nothing here polls: epoll_wait(2) sleeps until a descriptor or a timer is due. The one exception is
a descriptor that the kernel has no room for: it is looked at now and then until there is.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from proctree import events, worker
from proctree.errors import errno_name, step
from proctree.process import fds

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

BUFFER_SIZE = 256 * 1024
"""Bytes read at once. One buffer serves all trees, since only the loop reads."""

TIMERS_KEPT = 64
"""How many timers there may be before those that were cancelled are looked for."""

LOOK_SECONDS = 0.02
"""How often a descriptor is looked at that epoll has no room for."""

_NO_ROOM = (errno.ENOMEM, errno.ENOSPC)
"""epoll_ctl(2); ENOSPC is /proc/sys/fs/epoll/max_user_watches."""

LONGEST_SLEEP = 24 * 3600.0
"""Seconds."""

Handler = Callable[[int], None]


class Timer:
    """Something to call at a time. Cancelling it is final."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """See the module. `post` may be called from anywhere, even from a signal handler, and
    `register` from any thread; everything else only on the loop's thread."""

    def __init__(self, name: str = "proctree-loop") -> None:
        with fds.making():
            self._epoll = select.epoll()
            fds.own(self._epoll.fileno())
            self._wake = -1
            try:
                wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._wake = fds.own(fds.above_stdio(wake))
                self._epoll.register(self._wake, READ)
            except BaseException:
                self._close()
                raise
        self._handlers: dict[int, Handler] = {}
        self._unwatched: dict[int, int] = {}
        self._gone: set[int] = set()
        """What was unregistered since epoll was asked last."""
        self._looking = False
        # A deque and not a queue.Queue: its append takes no lock, so that a signal handler may post
        # while the thread that it interrupted is posting.
        self._inbox: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_room = TIMERS_KEPT
        self._order = itertools.count()
        self.buffer = memoryview(bytearray(BUFFER_SIZE))
        _loops.add(self)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException as error:
            self._close()
            if isinstance(error, RuntimeError):
                # How `threading` says EAGAIN and ENOMEM of pthread_create(3).
                raise OSError(errno.EAGAIN, str(error)) from None
            raise

    def _close(self) -> None:
        """For a loop that did not come to be."""
        fds.disown(self._epoll.fileno())
        self._epoll.close()
        if self._wake >= 0:
            fds.close(self._wake)

    def forget(self) -> None:
        """In a forked child, where its descriptors are closed already: some handle may keep it, and
        when that goes the number of the epoll may be somebody else's."""
        with contextlib.suppress(OSError):
            self._epoll.close()

    # -- from any thread

    def post(self, job: Callable[[], None]) -> None:
        """Runs `job` on the loop soon. Never blocks, takes no lock."""
        self._inbox.append(job)
        # BlockingIOError: the counter is full, so the loop is about to wake up anyway.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def is_current_thread(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def register(self, fd: int, mask: int, handler: Handler) -> None:
        """The handler runs on the loop, possibly before this returns. Registering is safe from any
        thread (epoll_ctl(2) is, and so is one assignment); unregistering is not."""
        self._handlers[fd] = handler
        try:
            self._epoll.register(fd, mask)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                del self._handlers[fd]
                raise
            self._unwatched[fd] = mask
            if not self._looking:
                self._looking = True
                events.warning("loop.polling", errno=errno_name(error.errno or 0))
                self.post(self._look)

    # -- on the loop's thread

    def modify(self, fd: int, mask: int) -> None:
        """Another mask for a descriptor that is registered."""
        if fd in self._unwatched:
            self._unwatched[fd] = mask
        else:
            self._epoll.modify(fd, mask)

    def unregister(self, fd: int) -> None:
        """Before `fd` is closed: afterwards its number may be another tree's."""
        self._gone.add(fd)
        if self._handlers.pop(fd, None) is not None and self._unwatched.pop(fd, None) is None:
            # Should it fail, somebody closed `fd` behind our back, and epoll forgot it then. What
            # else is to be given back must not suffer.
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def _look(self) -> None:
        """At what epoll had no room for: nothing else tells when it is ready, or when there is
        room again."""
        for fd, mask in tuple(self._unwatched.items()):
            if fd not in self._unwatched:
                continue  # the handler of another one closed it
            try:
                self._epoll.register(fd, mask)
            except OSError:
                poller = select.poll()
                poller.register(fd, mask)
                for _, ready in poller.poll(0):
                    self._guard(self._handlers[fd], ready)
            else:
                del self._unwatched[fd]
        self._looking = bool(self._unwatched)
        if self._looking:
            self.call_later(LOOK_SECONDS, self._look)

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        if len(self._timers) >= self._timers_room:
            self._drop_cancelled()
        timer = Timer(time.monotonic() + delay, callback)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def _drop_cancelled(self) -> None:
        """The time limit of a tree that has ended would stay here until it is due, for days if it
        is of days. Half of the timers at least are new when this is done again."""
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapq.heapify(self._timers)
        self._timers_room = max(TIMERS_KEPT, 2 * len(self._timers))

    # -- the loop itself

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        # epoll_wait counts milliseconds in a C int and rounds down: half of one more and no turn is
        # idle, and what is far away is looked at again in between.
        left = self._timers[0][0] - time.monotonic() + 0.0005
        return min(max(0.0, left), LONGEST_SLEEP)

    def _run(self) -> None:
        while True:
            try:
                self._turn_for_ever()
            except Exception as exception:
                # Short of memory, say: without this thread nobody would ever hear of a tree again.
                events.error("loop.defect", error=repr(exception), exc_info=True)
                time.sleep(LOOK_SECONDS)

    def _turn_for_ever(self) -> None:
        poll = self._epoll.poll
        handlers, gone = self._handlers, self._gone
        while True:
            gone.clear()
            worker.end_turn(self)
            ready = poll(self._timeout())
            worker.begin_turn(self)
            for fd, mask in ready:
                if fd == self._wake:
                    self._drain_wake()
                    continue
                if fd in gone:
                    # An earlier event of this very batch closed it, and may have given its number
                    # to another file, which is not what this tells of. Should that be ready as
                    # well, it is told again: nothing here is edge-triggered.
                    continue
                handler = handlers.get(fd)
                if handler is not None:
                    self._guard(handler, mask)
            self._run_inbox()
            self._run_timers()

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _run_inbox(self) -> None:
        # Only what is there now: a job that posts itself again, having done its share, lets the
        # others have a turn. `post` has made sure that there is another one.
        for _ in range(len(self._inbox)):
            self._guard(self._inbox.popleft())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._guard(callback)

    def _guard(self, function: Callable[..., None], *args: Any) -> None:
        # A defect in the handling of one tree must not stop the others: it is reported, and that
        # tree's own timers still lead it to its end.
        try:
            function(*args)
        except Exception as exception:
            events.error("loop.defect", error=repr(exception), exc_info=True)


def _later(job: Callable[[], None]) -> None:
    loop = get()

    def call_later() -> None:
        loop.call_later(LOOK_SECONDS, job)

    loop.post(call_later)


worker.try_later = _later

_loops: weakref.WeakSet[Loop] = weakref.WeakSet()

_loop: Loop | None = None
_starting = threading.Lock()


def get() -> Loop:
    """The process's loop; its thread is started by the first call.

    Raises:
        OSError: there are no descriptors for it, or no thread.
    """
    global _loop
    if _loop is None:
        with _starting, step("loop"):
            if _loop is None:
                _loop = Loop()
    return _loop


def exists() -> bool:
    """Whether anything was ever started here."""
    return _loop is not None


def _forget() -> None:
    """A forked child has no thread of ours and none of our descriptors."""
    global _loop, _starting
    for loop in tuple(_loops):
        loop.forget()
    _loops.clear()
    _loop = None
    _starting = threading.Lock()
    worker.reset()


fds.in_forked_child(_forget)
