"""Event loops that wait for answers: a party for each loop that asks.

Every loop with requests under way watches the socket, each for itself: one that is held up by what
runs in it holds up nobody else's answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from proctree import eventloops
from proctree.channel.bell import Bell
from proctree.channel.closely import Closely
from proctree.channel.passed import PassedFds
from proctree.channel.wire import Wire, listed, unless_handled

if TYPE_CHECKING:
    import trio


BATCH = 16
"""Requests of one loop that go out together at most. With more the other side would have nothing to
do while we prepare them, and we nothing while it answers."""

SHORT = 4 << 10
"""Bytes of a request that may wait for others."""


class Owner(Protocol):
    """The channel, as a party sees it."""

    wire: Wire

    @property
    def closed(self) -> bool:
        """Nothing will come any more."""
        ...

    def send(self, frame: bytearray) -> bool:
        """Sends a frame, or queues what of it cannot be sent; returns whether all was sent."""
        ...

    def flush(self) -> bool:
        """Sends what can be sent without waiting; returns whether that was everything."""
        ...

    def advance(self) -> None:
        """Sends and receives what can be without waiting, and delivers."""

    def retire(self) -> None:
        """One does not use the socket any more; if it is closed and that was the last one, its
        descriptor goes."""


class TaskWaiter:
    """A task's request. `answer` and `wake` as of a `ThreadWaiter`."""

    __slots__ = ("answer", "fds", "party")

    def __init__(self, party: Party) -> None:
        self.answer: Any = None
        self.fds: PassedFds | None = None
        self.party = party

    def wake(self) -> None:
        self.party.wake(self)

    def settle(self) -> None:
        """On the loop's thread: the task goes on."""
        raise NotImplementedError

    def wait(self, due: float | None) -> Awaitable[object]:
        """Until settled, or until it is due (time.monotonic); it does not say which."""
        raise NotImplementedError


class Party:
    """The tasks of one loop."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.under_way = 0
        """Requests."""
        self._staying = 0
        self._watching = False
        self._watching_for_room = False
        self._thread = threading.get_ident()
        self._reading = False

    def waiter(self) -> TaskWaiter:
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether its loop watches the socket. From any thread."""
        return self._watching or self._watching_for_room

    # -- on the loop's thread

    def enter(self) -> None:
        """A request begins."""
        self.under_way += 1
        if not self._watching:
            self._watching = True
            try:
                self._watch()
            except BaseException:
                self._watching = False
                raise

    def leave(self) -> None:
        """A request has ended. The loop goes on watching until something comes that is not for it:
        the next request is likely to be its own again."""
        self.under_way -= 1

    def stay(self) -> None:
        """Watch even with no request under way: for notifications."""
        self._staying += 1
        self.enter()
        self.leave()

    def stop(self) -> None:
        """The channel is closed: nothing is watched any more."""
        raise NotImplementedError

    def go(self) -> None:
        """The end of one `stay`."""
        self._staying -= 1

    def send(self, frame: bytearray) -> None:
        if not self._owner.send(frame):
            self._watch_for_room()

    def look_closely(self, waiter: TaskWaiter) -> bool:
        """For the only request under way: whether its answer is there already. If it is, `turn` is
        due."""
        return False

    async def turn(self) -> None:
        """Lets others have theirs: a task that is answered at once, over and over, would be alone
        in its loop."""
        raise NotImplementedError

    def flush(self) -> None:
        if not self._owner.flush():
            self._watch_for_room()

    def on_readable(self) -> bool:
        """Returns whether to go on watching."""
        self._thread = threading.get_ident()
        self._reading = True
        try:
            self._owner.advance()
        finally:
            self._reading = False
        return not self._owner.closed and bool(self.under_way or self._staying)

    def _watch(self) -> None:
        raise NotImplementedError

    def _watch_for_room(self) -> None:
        raise NotImplementedError

    # -- from any thread

    def wake(self, waiter: TaskWaiter) -> None:
        if self._reading and self._thread == threading.get_ident():
            waiter.settle()
        else:
            # On the loop's own thread, too: a signal handler may have found the loop asleep.
            self.call_soon(waiter.settle)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Has the loop call it; nothing, when the loop has ended."""
        raise NotImplementedError


# -- asyncio


class AsyncioWaiter(TaskWaiter):
    __slots__ = ("future",)

    def __init__(self, party: AsyncioParty, future: asyncio.Future[None]) -> None:
        self.answer = self.fds = None
        self.party = party
        self.future = future

    def settle(self) -> None:
        try:
            if not self.future.done():
                self.future.set_result(None)
        except asyncio.InvalidStateError as error:
            unless_handled(error)  # else a signal handler has settled it just now
        except BaseException:
            # A signal handler raised, in a callback of the loop's, which forgets it then.
            if not self.future.done():
                self.party.call_soon(self.settle)
            raise

    def wait(self, due: float | None) -> Awaitable[object]:
        return self.future if due is None else self._wait(due)

    async def _wait(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, due - time.monotonic()), self.settle)
        try:
            await self.future
        finally:
            timer.cancel()


class AsyncioParty(Party):
    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(owner)
        self.loop = weakref.ref(loop)
        self._batch: list[bytearray] = []
        self._together = 1
        self._closely = Closely(owner.advance)

    def waiter(self) -> AsyncioWaiter:
        return AsyncioWaiter(self, asyncio.get_running_loop().create_future())

    def send(self, frame: bytearray) -> None:
        """At once if it is the loop's only request. Of those of the tasks whose turn comes now the
        first goes at once, too, so that the other side has something to do; then two go together,
        then four, and so on."""
        if self.under_way == 1:
            super().send(frame)
            return
        if not self._batch:
            # Before it is there, and twice: a signal handler that raises in the first takes the
            # turn of all that wait for it.
            loop = asyncio.get_running_loop()
            loop.call_soon(self._send_rest)
            loop.call_soon(self._send_rest)
        self._batch.append(frame)
        if len(self._batch) >= self._together or len(frame) >= SHORT:
            self._together = min(2 * self._together, BATCH)
            self._send_batch()

    def look_closely(self, waiter: TaskWaiter) -> bool:
        # What is to run next in the loop. Not every kind of loop says.
        ready = getattr(asyncio.get_running_loop(), "_ready", None)
        if ready is None or ready:
            return False
        self._thread = threading.get_ident()
        self._reading = True
        try:
            return self._closely.look(waiter)
        finally:
            self._reading = False

    async def turn(self) -> None:
        await asyncio.sleep(0)

    def _send_rest(self) -> None:
        self._together = 1
        if self._batch or self._owner.wire.out:
            self._send_batch()

    def _send_batch(self) -> None:
        try:
            if self._batch:
                # Both in one step: whatever a signal handler raises, none is lost or sent twice.
                self._owner.wire.put(b"".join(self._batch), then=self._batch.clear)
            self.flush()
        except BaseException:
            asyncio.get_running_loop().call_soon(self._send_rest)
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        loop = self.loop()
        if loop is not None:
            eventloops.call_soon(loop, function)

    def _watch(self) -> None:
        asyncio.get_running_loop().add_reader(self._owner.wire.fileno(), self._readable)

    @property
    def busy(self) -> bool:
        loop = self.loop()
        return super().busy and loop is not None and not loop.is_closed()

    def _readable(self) -> None:
        if not self.on_readable() and self._watching:
            asyncio.get_running_loop().remove_reader(self._owner.wire.fileno())
            self._watching = False  # not before: then the descriptor may go
            self._owner.retire()

    def _watch_for_room(self) -> None:
        self._watching_for_room = True
        asyncio.get_running_loop().add_writer(self._owner.wire.fileno(), self._writable)

    def _writable(self) -> None:
        if self._owner.flush() or self._owner.closed:
            asyncio.get_running_loop().remove_writer(self._owner.wire.fileno())
            self._watching_for_room = False
            self._owner.retire()

    def stop(self) -> None:
        fd = self._owner.wire.fileno()
        if fd >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(fd)
            loop.remove_writer(fd)
        self._watching = self._watching_for_room = False


# -- trio


class TrioWaiter(TaskWaiter):
    __slots__ = ("_event",)

    def __init__(self, party: TrioParty) -> None:
        import trio

        super().__init__(party)
        self._event = trio.Event()

    def settle(self) -> None:
        self._event.set()

    async def wait(self, due: float | None) -> None:
        import trio

        seconds = float("inf") if due is None else max(0.0, due - time.monotonic())
        with trio.move_on_after(seconds):
            await self._event.wait()


class TrioParty(Party):
    """While its loop watches the socket it is woken by a bell, and not by its token. That has a
    lock, and who delivers may wait for none: see bell.py."""

    def __init__(self, owner: Owner, token: trio.lowlevel.TrioToken) -> None:
        super().__init__(owner)
        self._token = weakref.ref(token)
        self._watched = False
        self._bell: Bell | None = None
        self._soon: deque[Callable[[], object]] = deque()

    def waiter(self) -> TrioWaiter:
        return TrioWaiter(self)

    def call_soon(self, function: Callable[[], object]) -> None:
        self._soon.append(function)
        # Behind that: whoever takes the bell away looks again at what is to be called.
        bell, token = self._bell, self._token()
        if bell is not None:
            bell.ring()
        elif token is not None:
            eventloops.call_soon(token, self._call)

    def _call(self) -> None:
        while self._soon:
            self._soon.popleft()()

    def _watch(self) -> None:
        import trio

        if self._bell is None:
            self._bell = Bell()
        trio.lowlevel.spawn_system_task(self._watch_until_idle, self._bell)

    async def _watch_until_idle(self, bell: Bell) -> None:
        import trio

        if self._watched:
            return  # a signal handler raised when the first had been spawned
        self._watched = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, bell)
                watched = True
                while watched:
                    await trio.lowlevel.wait_readable(self._owner.wire.fileno())
                    watched = self.on_readable()
                nursery.cancel_scope.cancel()
        finally:
            self._watched = self._watching = False
            self._bell = None
            bell.close()
            self._call()
            self._owner.retire()

    async def _listen(self, bell: Bell) -> None:
        import trio

        while True:
            await trio.lowlevel.wait_readable(bell.fd)
            bell.silence()
            self._call()

    def stop(self) -> None:
        """Its tasks end by themselves: the socket is readable now, and writable."""

    def _watch_for_room(self) -> None:
        import trio

        if not self._watching_for_room:
            self._watching_for_room = True
            trio.lowlevel.spawn_system_task(self._flush_until_done)

    async def _flush_until_done(self) -> None:
        import trio

        try:
            while not self._owner.flush() and not self._owner.closed:
                await trio.lowlevel.wait_writable(self._owner.wire.fileno())
        finally:
            self._watching_for_room = False
            self._owner.retire()


class Parties:
    """The parties of one channel. They go with their loops: neither keeps the other alive."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._parties: weakref.WeakKeyDictionary[Any, Party] = weakref.WeakKeyDictionary()
        self._last: AsyncioParty | None = None

    @property
    def busy(self) -> bool:
        """Whether a loop watches the socket. From any thread."""
        return any(party.busy for party in listed(self._parties.values))

    def look(self) -> None:
        """Has each loop look for what has come already. From any thread."""
        for party in listed(self._parties.values):
            party.call_soon(self._owner.advance)

    def stop(self) -> None:
        """The channel is closed. From any thread; in a loop, for that loop at once."""
        with contextlib.suppress(RuntimeError):  # in none
            self.current().stop()

    def current(self) -> Party:
        """Of the loop that runs the caller.

        Raises:
            RuntimeError: none does.
        """
        loop = eventloops.running()
        last = self._last
        if last is not None and last.loop() is loop:
            return last
        party = self._parties.get(loop)
        if party is None:
            party = self._parties.setdefault(loop, self._made(loop))
        if isinstance(party, AsyncioParty):
            self._last = party
        return party

    def _made(self, loop: eventloops.EventLoop) -> Party:
        if isinstance(loop, asyncio.AbstractEventLoop):
            return AsyncioParty(self._owner, loop)
        return TrioParty(self._owner, loop)
