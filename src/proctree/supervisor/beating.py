"""What keeps a heartbeat going: timers on the loop, calls on a thread, and the end of the tree."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from functools import partial

import attrs

from proctree.loop import Loop, Timer
from proctree.supervisor.aside import Aside, Raised, TimedOut, describe, result_of, shorten
from proctree.supervisor.connecting import Trouble
from proctree.supervisor.exchange import exchange
from proctree.supervisor.heartbeat import Beat, BeatFunction, Heartbeat, HttpBeat, Rejected
from proctree.supervisor.pulse import Failures, Schedule, spread


@attrs.frozen
class BeatAccepted:
    """A success.

    Attributes:
        beat: whose.
        seconds: what it took.
    """

    beat: Beat
    seconds: float


@attrs.frozen
class BeatFailed:
    """A failure.

    Attributes:
        beat: whose.
        error: what went wrong.
        in_a_row: how many failures there were since the last success, with this one.
        allowed: how many end the tree.
    """

    beat: Beat
    error: str
    in_a_row: int
    allowed: int


@attrs.frozen
class BeatRejected:
    """The tree is not wanted any more.

    Attributes:
        beat: whose.
        detail: what was said.
    """

    beat: Beat
    detail: str


BeatEvent = BeatAccepted | BeatFailed | BeatRejected


class _Kind(enum.Enum):
    ACCEPTED = enum.auto()
    FAILED = enum.auto()
    REJECTED = enum.auto()


@attrs.frozen
class _Verdict:
    kind: _Kind
    text: str = ""


# -- on a thread


def _by_function(function: BeatFunction, beat: Beat) -> _Verdict:
    try:
        result_of(function, beat)
    except Rejected as rejected:
        # One that has no text, or none that can be had, is one all the same.
        return _Verdict(_Kind.REJECTED, describe(rejected))
    return _Verdict(_Kind.ACCEPTED)


def _body(http: HttpBeat, beat: Beat) -> bytes | None:
    if not callable(http.body):
        return http.body
    body = result_of(http.body, beat)
    if not isinstance(body, bytes):
        raise TypeError(f"body: it returned {type(body).__name__}, not bytes")
    return body


def _by_http(http: HttpBeat, beat: Beat, deadline: float) -> _Verdict:
    try:
        body = _body(http, beat)
        answer = exchange(http.endpoint, http.method, http.headers, body, http.context, deadline)
    except Trouble as trouble:
        return _Verdict(_Kind.FAILED, str(trouble))
    except Rejected as rejected:
        return _Verdict(_Kind.REJECTED, describe(rejected))
    if answer.status in http.rejected:
        return _Verdict(_Kind.REJECTED, answer.text)
    if answer.status in http.accepted:
        return _Verdict(_Kind.ACCEPTED)
    if 300 <= answer.status <= 399 and answer.location is not None:
        where = shorten(answer.location)
        return _Verdict(_Kind.FAILED, f"{answer.text} (redirects are not followed: {where})")
    return _Verdict(_Kind.FAILED, answer.text)


# -- on the loop


class Beating:
    """The heartbeat of one child, from incarnation to incarnation: a call that hangs outlives the
    tree that it was made for, and the next tree's must not be made beside it.

    The first beat of a tree comes at once, so that a child which is not wanted any more ends before
    it has done anything; the second somewhere within an interval, by the tree's id, so that
    children which were started together do not beat together; and then one at every interval.

    Everything here belongs on the loop's thread.

    Args:
        rejected: called when the tree is not wanted any more, with what was said.
        failed: called when too many beats in a row have failed, with the last error.
        report: called for each beat. Neither of the three comes after `stop`, and of the first two
            one comes at most, once for each `start`.
    """

    def __init__(
        self,
        loop: Loop,
        heartbeat: Heartbeat,
        rejected: Callable[[str], None],
        failed: Callable[[str], None],
        report: Callable[[BeatEvent], None] | None = None,
    ) -> None:
        self._loop = loop
        self._heartbeat = heartbeat
        self._rejected = rejected
        self._failed = failed
        self._report = report
        self._aside = Aside(loop)
        self._beat: Beat | None = None
        self._schedule: Schedule
        self._failures: Failures
        self._timer: Timer | None = None
        self._owed = False

    def start(self, beat: Beat) -> None:
        """A tree runs. The first call is made in here, on a thread.

        Raises:
            RuntimeError: it was started, and not stopped since.
        """
        if self._beat is not None:
            raise RuntimeError(f"the heartbeat of {self._beat.name!r} is going already")
        self._beat = beat
        self._failures = Failures(self._heartbeat.failures)
        interval = self._heartbeat.interval
        origin = time.monotonic() + spread(beat.tree_id) * interval
        self._schedule = Schedule(origin, interval)
        self._due()

    def stop(self) -> None:
        """The tree is ending. A call under way is left to itself."""
        self._beat = None
        self._owed = False
        if self._timer is not None:
            self._timer.cancel()
        self._aside.cancel()

    def _due(self) -> None:
        now = time.monotonic()
        self._timer = self._loop.call_later(self._schedule.next(now) - now, self._due)
        if self._aside.awaited:
            self._owed = True
        else:
            self._begin()

    def _begin(self) -> None:
        self._owed = False
        beat, target, timeout = self._beat, self._heartbeat.beat, self._heartbeat.timeout
        assert beat is not None
        now = time.monotonic()
        call: Callable[[], _Verdict]
        if isinstance(target, HttpBeat):
            call = partial(_by_http, target, beat, now + timeout)
        else:
            call = partial(_by_function, target, beat)
        self._aside.call(call, timeout, partial(self._settled, beat, now))

    def _settled(self, beat: Beat, began: float, result: _Verdict | Raised | TimedOut) -> None:
        if not isinstance(result, _Verdict):
            result = _Verdict(_Kind.FAILED, result.text)
        if result.kind is _Kind.ACCEPTED:
            self._failures.succeeded()
            self._go_on(BeatAccepted(beat, time.monotonic() - began))
        elif result.kind is _Kind.REJECTED:
            self._go_on(BeatRejected(beat, result.text), self._rejected, result.text)
        else:
            last = self._failures.failed(result.text)
            count = self._failures.in_a_row
            event = BeatFailed(beat, result.text, count, self._heartbeat.failures)
            self._go_on(event, None if last is None else self._failed, last or "")

    def _go_on(
        self, event: BeatEvent, end: Callable[[str], None] | None = None, detail: str = ""
    ) -> None:
        """Tells what happened, and then ends the tree, or goes on with a beat that is owed."""
        owed = self._owed
        if end is not None:
            self.stop()
        try:
            if self._report is not None:
                self._report(event)
        finally:
            # Whoever was told may have stopped it, or begun another tree's.
            if end is not None:
                end(detail)
            elif owed and self._beat is event.beat and not self._aside.awaited:
                self._begin()
