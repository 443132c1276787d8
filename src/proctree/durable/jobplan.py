"""What a supervisor of a job does next. Pure.

A job is started by `submit` somewhere else, so it may have been started by somebody who died before
they could write that down. The order of things makes that harmless:

1. the intent is recorded: an attempt with an idempotency key;
2. `submit` is called with that key;
3. its handle is recorded;
4. `poll` is asked until it says how the job ended, and that is recorded.

Whoever comes later finds how far it went. Between 1 and 3 only `find` can tell whether 2 happened;
what it does not find is submitted under the same idempotency key.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import NamedTuple

from proctree.durable.recording import Cause, Exit
from proctree.durable.store import Attempt
from proctree.durable.table import Decision, Found, decide, judge
from proctree.protocol import NOTE_MAX


class Status(enum.Enum):
    """What `poll` may say of a job that has no exit status."""

    RUNNING = "running"
    """It runs, or waits for its turn."""
    GONE = "gone"
    """Nothing is known of it any more: how it ended will never be known."""


class Step(enum.Enum):
    """What is done next about a key."""

    REFUSE = "refuse"
    """Another target is recorded."""
    RESULT = "result"
    """The last attempt's end is the result."""
    WATCH = "watch"
    """Somebody else has the key: look again later."""
    BEGIN = "begin"
    """Record the intent of a new attempt."""
    SUBMIT = "submit"
    """Submit the attempt that was just recorded."""
    FIND = "find"
    """Ask whether it was submitted."""
    POLL = "poll"
    """Ask how it is."""


class AfterFind(enum.Enum):
    RECORD = "record"
    """Record the handle that was found."""
    SUBMIT = "submit"
    GIVE_UP = "give up"
    """It was cancelled before it was submitted: that is its end."""


class AfterPoll(enum.Enum):
    WAIT = "wait"
    CANCEL = "cancel"
    """Call `cancel`, which this supervisor has not done yet."""
    END = "end"
    """Record the end."""


class View(NamedTuple):
    """What a supervisor knows when it decides.

    Attributes:
        found: of the last attempt.
        same_target: whether that had the target that is wanted now.
        key_alone: whether the key alone counts.
        claimed: whether this supervisor has the key.
        joined: whether the last attempt ran, or was begun, since this supervisor was called. How
            it ends is the result then, or costs a retry; one that was over before is not ours to
            answer for.
        fresh: whether this supervisor has just recorded its intent and not called `submit` since:
            there is nothing to be found.
        cancelled: whether somebody wants it to be cancelled.
        retries: how many more attempts this supervisor may begin because one failed.
    """

    found: Found
    same_target: bool = True
    key_alone: bool = False
    claimed: bool = True
    joined: bool = False
    fresh: bool = False
    cancelled: bool = False
    retries: int = 0


def found_of(attempt: Attempt | None, allowed: Collection[int]) -> Found:
    """What is known of the last attempt.

    An unreadable handle or exit leaves the question open, and `find` and `poll` answer it. Only
    without the request is there nothing that they could be asked by.
    """
    if attempt is None:
        return Found.NOTHING
    if attempt.request is None:
        return Found.UNREADABLE
    if attempt.exit is not None:
        return judge(attempt.exit.returncode, attempt.exit.by_itself, allowed)
    return Found.UNSURE if attempt.handle is None else Found.RUNNING


def next_step(view: View) -> Step:
    decision = decide(view.found, same_target=view.same_target, key_alone=view.key_alone)
    if decision is Decision.REFUSE:
        return Step.REFUSE
    if decision is Decision.RESULT:
        return Step.RESULT
    if not view.claimed:
        return Step.WATCH
    if decision is Decision.RECONNECT:
        return Step.POLL
    if decision is Decision.FIND:
        return Step.SUBMIT if view.fresh and not view.cancelled else Step.FIND
    answered = view.joined and view.found is Found.FAILED
    if answered and (view.cancelled or view.retries < 1):
        return Step.RESULT
    return Step.BEGIN


def after_find(found: bool, cancelled: bool) -> AfterFind:
    if found:
        return AfterFind.RECORD
    return AfterFind.GIVE_UP if cancelled else AfterFind.SUBMIT


def after_poll(running: bool, cancelled: bool, cancel_called: bool) -> AfterPoll:
    if not running:
        return AfterPoll.END
    return AfterPoll.CANCEL if cancelled and not cancel_called else AfterPoll.WAIT


def exit_of(returncode: int | None, detail: str, cancelled: bool, duration: float) -> Exit:
    """The record of an end. One that somebody wanted was brought about by them, whatever the job
    made of it: its exit status is no result.

    Args:
        returncode: as `Outcome.returncode`.
        detail: as `poll` gave it; what is longer than `NOTE_MAX` bytes is cut off.
        cancelled: whether somebody wanted it to be cancelled.
        duration: seconds.

    Raises:
        ValueError: no process of Linux has such a status.
    """
    return Exit(
        status=None if returncode is None else wait_status(returncode),
        cause=Cause.CANCELLED if cancelled else Cause.ITSELF,
        note=detail.encode("utf-8", "replace")[:NOTE_MAX].decode("utf-8", "ignore"),
        duration=duration,
    )


def wait_status(returncode: int) -> int:
    """The other way round than os.waitstatus_to_exitcode (wait(2)).

    Raises:
        ValueError: no process of Linux has such a status.
    """
    if 0 <= returncode <= 255:
        return returncode << 8
    if -64 <= returncode < 0:
        return -returncode
    raise ValueError(f"{returncode} is neither an exit status (0 to 255) nor minus a signal")
