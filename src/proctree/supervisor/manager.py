"""What a supervisor says to its own manager, systemd for one, by sd_notify(3).

Its watchdog is fed by the loop that all children hang on: a supervisor that is alive but useless is
one that its manager restarts.
"""

from __future__ import annotations

from proctree import notify
from proctree.loop import Loop, Timer
from proctree.worker import Worker


class Manager:
    """Without NOTIFY_SOCKET in the environment it does nothing. On the loop's thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._interval = notify.watchdog_interval()
        self._timer: Timer | None = None
        # Sending may block, when the manager does not read.
        self._worker = Worker()

    def _say(self, *assignments: str) -> None:
        def job() -> None:
            notify.notify(*assignments)

        self._worker.post(job)

    def started(self, children: int) -> None:
        """All children are ready."""
        status = f"STATUS=children: {children}"
        self._say("READY=1", status)
        if self._interval is not None:
            self._feed()

    def _feed(self) -> None:
        assert self._interval is not None
        self._say("WATCHDOG=1")
        # sd_watchdog_enabled(3): half of the time is recommended.
        self._timer = self._loop.call_later(self._interval / 2, self._feed)

    def stopping(self) -> None:
        """The children are being stopped."""
        self._say("STOPPING=1")

    def close(self) -> None:
        """Nothing is said any more."""
        if self._timer is not None:
            self._timer.cancel()
