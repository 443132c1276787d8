"""What finds out whether a child is ready: attempts on a thread, one at a time, until one succeeds
or the time is over.

Something that answers before the child has been started is not the child. So what is there is noted
before the start (`prepare`): a port that accepts or a URL that is answered is a stranger's, and a
reason not to start; a file is remembered, and does not count before it has changed. An earlier
incarnation of the child cannot be what answers: its end was proved, and a connection that it has
left in TIME_WAIT accepts nothing.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from functools import partial

import attrs

from proctree.loop import Loop, Timer
from proctree.supervisor.aside import Aside, Raised, TimedOut, result_of
from proctree.supervisor.connecting import Trouble, connect, connect_to, doing
from proctree.supervisor.exchange import exchange
from proctree.supervisor.readiness import (
    Check,
    Completed,
    File,
    Http,
    Matcher,
    Notified,
    OutputLine,
    Polled,
    Readiness,
    Tcp,
    UnixSocket,
    pause,
)

_MARKERS = (OutputLine, Notified, Completed)
"""What comes by itself, and is not looked for."""

ATTEMPT_SECONDS = 5.0
"""How long one attempt may take."""

Identity = tuple[int, int, int, int]
"""Device, inode, time of the last change in nanoseconds, size: of the contents, and not of what
chmod(1) and backups change."""


@attrs.frozen
class _Found:
    """What an attempt has found: trouble, or None when the child is ready."""

    trouble: str | None
    identity: Identity | None = None


# -- on a thread


def _answers(probe: Tcp | UnixSocket | Http, deadline: float) -> None:
    """Returns when somebody answers.

    Raises:
        Trouble: nobody does.
    """
    match probe:
        case Tcp():
            connect(probe.host, probe.port, deadline).end()
        case UnixSocket():
            kind = socket.SOCK_STREAM
            connect_to(socket.AF_UNIX, kind, 0, probe.path, deadline).end()
        case Http():
            answer = exchange(probe.endpoint, "GET", probe.headers, None, probe.context, deadline)
            if answer.status not in probe.status:
                raise Trouble(answer.text)


def _identity(path: str) -> Identity:
    with doing("stat"):
        found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _attempt(probe: Polled, before: Identity | None, deadline: float) -> _Found:
    try:
        if isinstance(probe, Check):
            return _Found(None if result_of(probe.function) else "it returned nothing true")
        if isinstance(probe, File):
            unchanged = _identity(probe.path) == before
            return _Found("it has not changed since before the start" if unchanged else None)
        _answers(probe, deadline)
    except Trouble as trouble:
        return _Found(str(trouble))
    return _Found(None)


_FIELDS: dict[type, str] = {Tcp: "port", UnixSocket: "path", Http: "url"}


def _look_before(probe: Polled, deadline: float) -> _Found:
    """Here the trouble is why the child should not be started."""
    if isinstance(probe, Check):
        return _Found(None)
    if isinstance(probe, File):
        try:
            return _Found(None, _identity(probe.path))
        except Trouble:
            return _Found(None)
    try:
        _answers(probe, deadline)
    except Trouble:
        return _Found(None)
    field, what = _FIELDS[type(probe)], probe.describe()
    return _Found(f"{field}: {what} answers before the child was started: it is somebody else's")


# -- on the loop


class Probing:
    """The readiness of one child, from incarnation to incarnation: an attempt that hangs outlives
    the tree that it was made for. For each one call `prepare`, start the child, call `start`.

    Everything here belongs on the loop's thread.

    Args:
        ready: called once for each `start`, unless the other one is, or `stop`.
        not_ready: called when the time is over, with what there is to say about it.

    Attributes:
        matcher: gets the lines of the present incarnation, where the probe is an `OutputLine`.
        last_trouble: why the last attempt did not succeed; empty before the first.
    """

    def __init__(
        self,
        loop: Loop,
        probe: Readiness,
        ready: Callable[[], None],
        not_ready: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._probe = probe
        self._ready = ready
        self._not_ready = not_ready
        self._aside = Aside(loop)
        self._before: Identity | None = None
        self._arrived = False
        self._waiting = False
        self._began = 0.0
        self._attempt_timer: Timer | None = None
        self._limit_timer: Timer | None = None
        self._trouble = ""
        self.matcher: Matcher | None = None

    @property
    def last_trouble(self) -> str:
        if self.matcher is not None:
            return self.matcher.trouble
        return self._trouble

    def prepare(self, done: Callable[[str | None], None]) -> None:
        """Before the child is started: looks at what is there already.

        Args:
            done: called once, unless `stop` is called: with None when the child may be started, or
                with why not, by the name of the field. It may come before this returns.
        """
        self.stop()
        probe = self._probe
        self._before, self._arrived, self._trouble = None, False, ""
        if isinstance(probe, _MARKERS):
            self.matcher = Matcher(probe) if isinstance(probe, OutputLine) else None
            done(None)
            return
        limit = min(ATTEMPT_SECONDS, probe.timeout)
        look = partial(_look_before, probe, time.monotonic() + limit)
        self._aside.call(look, limit, partial(self._prepared, done))

    def _prepared(
        self, done: Callable[[str | None], None], result: _Found | Raised | TimedOut
    ) -> None:
        if isinstance(result, _Found):
            self._before = result.identity
            done(result.trouble)
        elif isinstance(self._probe, File):
            # Without it a file of an earlier run would count.
            done(f"path: {self._probe.describe()} could not be looked at: {result.text}")
        else:
            done(None)  # whoever it is, it does not answer

    def start(self) -> None:
        """The child runs, and `prepare` is done: its time begins now."""
        self._waiting = True
        self._began = time.monotonic()
        if self._arrived:
            self._succeed()
            return
        if not math.isinf(self._probe.timeout):
            self._limit_timer = self._loop.call_later(self._probe.timeout, self._fail)
        self._try()

    def extend(self, seconds: float) -> float:
        """The time is not over before so many seconds from now. Returns how much that is more."""
        timer = self._limit_timer
        if not self._waiting or timer is None:
            return 0.0
        left = max(0.0, timer.due - time.monotonic())
        if left >= seconds:
            return 0.0
        timer.cancel()
        self._limit_timer = self._loop.call_later(seconds, self._fail)
        return seconds - left

    def stop(self) -> None:
        """Nothing is called any more. An attempt under way is left to itself."""
        self._waiting = False
        for timer in (self._attempt_timer, self._limit_timer):
            if timer is not None:
                timer.cancel()
        self._aside.cancel()

    def arrived(self, matcher: Matcher | None = None) -> None:
        """What is waited for has come: a line, or READY=1. It may come before `start`.

        Args:
            matcher: whose line it was. One of an earlier incarnation changes nothing.
        """
        if matcher is not self.matcher:
            return
        self._arrived = True
        if self._waiting:
            self._succeed()

    def _try(self) -> None:
        probe = self._probe
        if isinstance(probe, _MARKERS):
            return
        deadline = time.monotonic() + ATTEMPT_SECONDS
        attempt = partial(_attempt, probe, self._before, deadline)
        self._aside.call(attempt, ATTEMPT_SECONDS, self._tried)

    def _tried(self, result: _Found | Raised | TimedOut) -> None:
        trouble = result.trouble if isinstance(result, _Found) else result.text
        if trouble is None:
            self._succeed()
            return
        self._trouble = trouble
        delay = pause(self._probe_interval(), time.monotonic() - self._began)
        self._attempt_timer = self._loop.call_later(delay, self._try)

    def _probe_interval(self) -> float | None:
        probe = self._probe
        return None if isinstance(probe, _MARKERS) else probe.interval

    def _succeed(self) -> None:
        self.stop()
        self._ready()

    def _fail(self) -> None:
        self.stop()
        trouble = self.last_trouble or (
            "the first attempt is still under way" if self._attempts() else "it never came"
        )
        limit, what = self._probe.timeout, self._probe.describe()
        self._not_ready(f"not ready within {limit:g} s: {what}: {trouble}")

    def _attempts(self) -> bool:
        return not isinstance(self._probe, _MARKERS)
