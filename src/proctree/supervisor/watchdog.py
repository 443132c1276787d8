"""A tree that must say WATCHDOG=1 in time: sd_watchdog_enabled(3).

Feeding moves a deadline and makes no timer: the one that is there looks at the deadline when it is
due, and sleeps for what is left.

The time is CLOCK_MONOTONIC, which stands still while the machine is suspended: nobody is late for
that. A tree that is stopped by us (`freeze`) cannot feed anything: pause() meanwhile. What stops
the supervisor itself (SIGSTOP, a virtual machine that is paused) does not stop that clock, and what
the tree has sent meanwhile is waiting to be read when the timer is due. So there is one last look:
a watchdog that is due gets LAST_LOOK more, in which the loop reads what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from proctree.loop import Loop, Timer

LAST_LOOK = 0.25
"""Seconds: more than `notify_socket.PAUSE`, in which a tree that floods us is not read."""


class Watchdog:
    """Runs from its making on. On the loop's thread.

    Args:
        loop: whose timer it uses.
        seconds: the interval; 0: none until `set_interval`.
        expired: called once, with why, for people; the watchdog has stopped then.
    """

    def __init__(self, loop: Loop, seconds: float, expired: Callable[[str], None]) -> None:
        self._loop = loop
        self._expired: Callable[[str], None] | None = expired
        self._seconds = seconds
        self._fed_at = monotonic()
        self._timer: Timer | None = None
        self._paused = False
        self._looked = False
        self._arm()

    @property
    def seconds(self) -> float:
        """The interval; 0: none."""
        return self._seconds

    def fed(self) -> None:
        """It is alive."""
        self._fed_at = monotonic()
        self._looked = False

    def set_interval(self, seconds: float) -> None:
        """From now on; 0: none."""
        self._seconds = seconds
        self.fed()
        self._arm()

    def trigger(self) -> None:
        """As if it had expired."""
        self._expire("WATCHDOG=trigger")

    def pause(self) -> None:
        """It cannot feed: it is stopped."""
        self._paused = True
        self._disarm()

    def resume(self) -> None:
        """With a whole interval."""
        if self._paused:
            self._paused = False
            self.fed()
            self._arm()

    def stop(self) -> None:
        """Nothing is called any more."""
        self._expired = None
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._disarm()
        if self._seconds > 0 and not self._paused and self._expired is not None:
            self._timer = self._loop.call_later(self._left(), self._due)

    def _left(self) -> float:
        return self._fed_at + self._seconds - monotonic()

    def _due(self) -> None:
        if self._left() > 0:
            self._looked = False
            self._arm()
        elif not self._looked:
            self._looked = True
            self._timer = self._loop.call_later(LAST_LOOK, self._due)
        else:
            self._expire(f"no WATCHDOG=1 for {self._seconds:g} s")

    def _expire(self, why: str) -> None:
        expired = self._expired
        self.stop()
        if expired is not None:
            expired(why)
