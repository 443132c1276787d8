"""Jobs that are no local process: a container, a remote run. Submitted once, whoever dies when.

What is done next is decided in jobplan.py; here it is done.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple, TypeVar

import attrs

from proctree import events
from proctree.durable import jobplan
from proctree.durable.errors import (
    DifferentTarget,
    DurableError,
    LeaseLost,
    NotRunning,
    StoreUnusable,
    UnknownKey,
)
from proctree.durable.here import new_request
from proctree.durable.jobplan import AfterFind, AfterPoll, Status, Step
from proctree.durable.keys import check_key
from proctree.durable.recording import Cause, Exit
from proctree.durable.store import Attempt, Claim, Store
from proctree.outcome import Outcome
from proctree.records import Reason

_T = TypeVar("_T")

RUNNING: Final = Status.RUNNING
GONE: Final = Status.GONE

PATIENCE = 60.0
"""Seconds for which `find`, `poll`, `cancel` and the store may fail in a row."""

FIRST_DELAY = 0.1
"""Seconds before something that failed is tried again; doubled each time, up to `Job.every`."""

WATCH_SECONDS = 5.0
"""How long it takes at most to notice what another supervisor of the same key has done."""


class Stopped(DurableError):
    """The wait for a job was given up because `stop` was set. The job runs on, and the next call
    with its key reconnects to it."""


class Ended(NamedTuple):
    """What `poll` may answer instead of a bare exit status.

    Attributes:
        returncode: 0 to 255, or minus the signal that ended it; None when it has none.
        detail: for people; up to 236 bytes of it are kept.
    """

    returncode: int | None
    detail: str = ""


Polled = Status | int | Ended


def _callable(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        raise TypeError(f"{attribute.name}: a function, not {value!r}")


def _name(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{attribute.name}: a text, not {value!r}")
    if not value:
        raise ValueError(f"{attribute.name}: must not be empty")


def _seconds(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: seconds, not {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{argument}: {value!r} is not a positive number of seconds")


def _period(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    _seconds(attribute.name, value)


@attrs.frozen
class Job:
    """How something is run elsewhere. The functions are called on the caller's thread.

    Args:
        submit: `submit(idempotency_key)` starts it and returns its handle: a text by which `poll`
            and `cancel` know it, from any process and machine. It is called once, and again under
            the same key only when `find` has not found it. Where the other side takes idempotency
            keys, give it this one: then not even a supervisor that was suspended in the middle of
            the call, and has lost its lease, submits a second time.
        find: `find(idempotency_key)` returns the handle of what was submitted under this key, or
            None. What `submit` has brought about must be found from the moment it is (a label of a
            container, a tag of a remote run).
        poll: `poll(handle)` returns `RUNNING`, `GONE`, an exit status, or `Ended`.
        cancel: `cancel(handle)` has it ended; it is polled until it has. May be called more than
            once, and for what has ended already.
        name: what it is, for people.
        every: seconds between two polls.
        fingerprint: more by which one job is known from another one than its name: the image of a
            container, its arguments.

    Raises:
        TypeError, ValueError: by the name of the argument.
    """

    submit: Callable[[str], str] = attrs.field(validator=_callable)
    find: Callable[[str], str | None] = attrs.field(validator=_callable)
    poll: Callable[[str], Polled] = attrs.field(validator=_callable)
    cancel: Callable[[str], object] | None = attrs.field(
        default=None, validator=attrs.validators.optional(_callable)
    )
    name: str = attrs.field(kw_only=True, validator=_name)
    every: float = attrs.field(kw_only=True, default=5.0, validator=_period)
    fingerprint: str = attrs.field(
        kw_only=True, default="", validator=attrs.validators.instance_of(str)
    )

    def identity(self) -> str:
        """Of name and fingerprint: SHA-256, hexadecimal."""
        text = f"job\0{len(self.name)}\0{self.name}\0{self.fingerprint}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def run_job(
    key: str,
    job: Job,
    *,
    store: Store,
    allowed: Collection[int] = (0,),
    retries: int = 0,
    same_target: bool = True,
    stop: threading.Event | None = None,
    patience: float = PATIENCE,
) -> Outcome:
    """The outcome of the job of this key: of the one that has finished, or that runs, or of a new
    one. At most one is submitted at a time, by whatever supervisors of this key there are.

    KeyboardInterrupt, like every end of this process, leaves the job running; the next call with
    the key reconnects to it, and `cancel_job` ends it.

    Args:
        key: names the run; 1 to 4096 characters, none of them null.
        job: how to run it.
        store: where it is recorded.
        allowed: the exit statuses that count as success: the result of such a run is taken, and
            none of the job's functions is called.
        retries: how many more attempts this call may begin when one fails. A cancelled one is not
            tried again.
        same_target: refuse a key under which a job with another name or fingerprint is recorded.
            False: the key alone counts.
        stop: set by another thread: the wait is given up.
        patience: seconds for which `find`, `poll`, `cancel` and the store, each by itself, may
            fail before the exception is raised. They are tried again with growing delays.

    Returns:
        An `Outcome` with containment "job", reason EXITED, SIGNALED or KILLED (somebody cancelled
        it), the idempotency key as `tree_id`, and what `poll` said as `detail`. The returncode is
        None when it is not known: the job was GONE, or was cancelled before it was submitted.

    Raises:
        DifferentTarget: see `same_target`.
        Stopped: see `stop`.
        StoreUnusable: for longer than `patience`.
        TypeError, ValueError: an argument, or what a function of the job returned, is wrong.
        Exception: whatever `submit` raises, at once, and what the others raise for longer than
            `patience`. The records say what is known, and the next call goes on from there.
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries: {retries!r} is not a number of attempts from 0 up")
    _seconds("patience", patience)
    supervision = _Supervision(key, job, store, frozenset(allowed), same_target, patience)
    supervision.retries = retries
    supervision.stop = stop if stop is not None else threading.Event()
    return supervision.run()


def cancel_job(
    key: str,
    job: Job,
    *,
    store: Store,
    timeout: float | None = None,
    patience: float = PATIENCE,
) -> Outcome:
    """Ends what runs under a key and waits until its end is recorded; whoever else waits for it
    gets the same outcome. What has ended by itself meanwhile keeps its outcome.

    Args:
        key, job, store, patience: as for `run_job`.
        timeout: seconds to wait for the end; None: for ever. The wish stays recorded, and whoever
            supervises the job next carries it out.

    Raises:
        UnknownKey: nothing is recorded under this key.
        NotRunning: the last attempt has ended already.
        DifferentTarget: it is not of this job.
        ValueError: the job has no `cancel`.
        TimeoutError: it has not ended in time.
        StoreUnusable, Exception: as `run_job`.
    """
    if job.cancel is None:
        raise ValueError(f"job: {job.name!r} has no `cancel`")
    _seconds("patience", patience)
    supervision = _Supervision(key, job, store, frozenset(), True, patience)
    if timeout is not None:
        supervision.deadline = time.monotonic() + timeout
    return supervision.cancel()


def _outcome(attempt: Attempt, how: Exit) -> Outcome:
    returncode = how.returncode
    if not how.by_itself:
        reason = Reason.KILLED
    else:
        reason = Reason.SIGNALED if returncode is not None and returncode < 0 else Reason.EXITED
    return Outcome(
        returncode=returncode,
        reason=reason,
        detail=how.note or ("cancelled" if how.cause is Cause.CANCELLED else ""),
        duration=how.duration,
        containment="job",
        tree_id=attempt.request.tree_id if attempt.request is not None else "",
    )


class _Supervision:
    """One call's care for a key. Each turn looks at the records, decides and does one thing, so
    that whatever fails is tried again from what is true by then."""

    def __init__(
        self,
        key: str,
        job: Job,
        store: Store,
        allowed: frozenset[int],
        same_target: bool,
        patience: float,
    ) -> None:
        self._key = check_key(key)
        self._job = job
        self._store = store
        self._allowed = allowed
        self._same_target = same_target
        self._patience = patience
        self._identity = job.identity()
        self.retries = 0
        self.stop = threading.Event()
        self.deadline: float | None = None
        self._claim: Claim | None = None
        self._over: int | None = None
        """The last attempt that was over before it was ours to answer for."""
        self._begun: set[str] = set()
        """The idempotency keys of the attempts that we have begun."""
        self._retried: set[str] = set()
        """Those of them for which a retry was spent."""
        self._fresh = ""
        """The idempotency key for which `submit` was certainly not called."""
        self._cancel_called: set[str] = set()
        self._seen: dict[int, float] = {}
        """When an attempt was first seen in progress, by number."""
        self._failing: dict[str, tuple[float, int]] = {}
        """Of a step that fails: since when, and how often."""

    def run(self) -> Outcome:
        try:
            while True:
                outcome = self._guarded(self._turn)
                if outcome is not None:
                    return outcome
        finally:
            self._give_back()

    def cancel(self) -> Outcome:
        try:
            number: int | None = None
            while number is None:
                number = self._guarded(self._ask)
            while True:
                outcome = self._guarded(functools.partial(self._turn_until, number))
                if outcome is not None:
                    return outcome
        finally:
            self._give_back()

    # -- one turn

    def _guarded(self, turn: Callable[[], _T | None]) -> _T | None:
        """None when it has to be tried again."""
        if self.stop.is_set():
            raise Stopped(f"key {self._key!r}: the wait was given up, the job was left as it is")
        try:
            result = turn()
        except LeaseLost as error:
            # Nothing was recorded since, and whoever has the key now reconnects to the same job.
            events.warning("durable.lease_lost", key=self._key, error=str(error))
            self._give_back()
            self._wait(min(self._job.every, WATCH_SECONDS))
            return None
        except StoreUnusable as error:
            self._failed("store", error)
            return None
        self._failing.pop("store", None)
        return result

    def _turn(self) -> Outcome | None:
        return self._act(self._look())

    def _turn_until(self, number: int) -> Outcome | None:
        """As `_turn`, and ends with this attempt, whatever is done about the key after it."""
        attempts = self._look()
        attempt = next((one for one in attempts if one.number == number), None)
        if attempt is None:
            raise NotRunning(f"key {self._key!r}: attempt {number} was forgotten meanwhile")
        if attempt.exit is not None:
            return _outcome(attempt, attempt.exit)
        if self._claim is None and attempt.handle is not None:
            self._call_cancel(attempt.handle)
        return self._act(attempts)

    def _look(self) -> list[Attempt]:
        """The records; and the key is taken if it can be had."""
        if self._claim is None:
            self._claim = self._store.claim(self._key)
        if self._claim is not None:
            attempts = self._claim.attempts()
        else:
            attempts = self._store.attempts(self._key)
        last = attempts[-1] if attempts else None
        if self._over is None:
            over = last is None or last.exit is not None or last.request is None
            number = 0 if last is None else last.number
            self._over = number if over else number - 1
        if last is not None and last.exit is None:
            self._seen.setdefault(last.number, time.monotonic())
        return attempts

    def _view(self, attempts: list[Attempt]) -> jobplan.View:
        last = attempts[-1] if attempts else Attempt(0, None)
        request = last.request
        known = [one.request.tree_id for one in attempts if one.request is not None]
        same = request is None or request.fingerprint == self._identity
        # A tree without an exit record may be running: only a job can be asked whether it does.
        foreign = request is not None and request.kind != "job" and last.exit is None
        return jobplan.View(
            found=jobplan.found_of(last if attempts else None, self._allowed),
            same_target=same and not foreign,
            key_alone=not self._same_target and not foreign,
            claimed=self._claim is not None,
            joined=self._over is not None and last.number > self._over,
            fresh=request is not None and request.tree_id == self._fresh,
            cancelled=last.cancelled,
            retries=self.retries - len(self._retried.intersection(known)),
        )

    def _act(self, attempts: list[Attempt]) -> Outcome | None:
        view = self._view(attempts)
        step = jobplan.next_step(view)
        if step is Step.BEGIN:
            self._begin(view)
            return None
        if step is Step.WATCH:
            self._wait(min(self._job.every, WATCH_SECONDS))
            return None
        last = attempts[-1]
        if step is Step.REFUSE:
            raise self._different(last)
        if step is Step.RESULT:
            assert last.exit is not None
            return _outcome(last, last.exit)
        {Step.SUBMIT: self._submit, Step.FIND: self._find, Step.POLL: self._poll}[step](last)
        return None

    # -- what is done

    def _begin(self, view: jobplan.View) -> None:
        job = self._job
        tree_id = os.urandom(8).hex()
        request = new_request(self._key, job.name, job.identity(), tree_id, "job")
        # Noted before: it may be recorded even if we are told that it could not be.
        self._begun.add(request.tree_id)
        if view.joined:
            self._retried.add(request.tree_id)
        assert self._claim is not None
        self._claim.begin(request)
        self._fresh = request.tree_id

    def _submit(self, attempt: Attempt) -> None:
        assert self._claim is not None
        assert attempt.request is not None
        self._fresh = ""
        handle = self._job.submit(attempt.request.tree_id)
        self._record_handle(attempt, handle, "submit")

    def _find(self, attempt: Attempt) -> None:
        assert self._claim is not None
        assert attempt.request is not None
        try:
            handle = self._job.find(attempt.request.tree_id)
        except Exception as error:
            return self._failed("find", error)
        self._failing.pop("find", None)
        after = jobplan.after_find(handle is not None, attempt.cancelled)
        if after is AfterFind.RECORD:
            return self._record_handle(attempt, handle, "find")
        if after is AfterFind.GIVE_UP:
            return self._finish(attempt, None, "cancelled before it was submitted")
        # `find` may have taken long: a supervisor whose lease is over must not submit.
        if self._claim.attempts()[-1].number == attempt.number:
            self._submit(attempt)
        return None

    def _record_handle(self, attempt: Attempt, handle: object, function: str) -> None:
        if not isinstance(handle, str):
            raise TypeError(f"{function} of job {self._job.name!r}: a text, not {handle!r}")
        assert self._claim is not None
        self._claim.submitted(attempt, handle)

    def _poll(self, attempt: Attempt) -> None:
        assert attempt.handle is not None
        try:
            polled = self._job.poll(attempt.handle)
        except Exception as error:
            return self._failed("poll", error)
        self._failing.pop("poll", None)
        called = attempt.handle in self._cancel_called or self._job.cancel is None
        after = jobplan.after_poll(polled is RUNNING, attempt.cancelled, called)
        if after is AfterPoll.CANCEL:
            return self._call_cancel(attempt.handle)
        if after is AfterPoll.WAIT:
            return self._wait(self._job.every)
        if polled is GONE:
            return self._gone(attempt)
        ended = polled if isinstance(polled, Ended) else Ended(self._number(polled))
        return self._finish(attempt, ended.returncode, ended.detail)

    def _number(self, polled: object) -> int:
        if isinstance(polled, bool) or not isinstance(polled, int):
            raise TypeError(
                f"poll of job {self._job.name!r}: RUNNING, GONE, an exit status or Ended, "
                f"not {polled!r}"
            )
        return polled

    def _gone(self, attempt: Attempt) -> None:
        self._finish(attempt, None, "gone: nothing is known of it any more")
        assert attempt.request is not None
        if attempt.request.tree_id not in self._begun and not attempt.cancelled:
            # It was lost before we came. What we begin ourselves and is lost costs a retry: else
            # one that is always lost would be begun for ever.
            self._over = attempt.number

    def _finish(self, attempt: Attempt, returncode: int | None, detail: str) -> None:
        assert self._claim is not None
        # Looked at again: who cancels writes that down first, so an end that `poll` saw because of
        # it cannot be taken for the job's own.
        cancelled = self._claim.attempts()[-1].cancelled
        duration = time.monotonic() - self._seen.get(attempt.number, time.monotonic())
        try:
            how = jobplan.exit_of(returncode, detail, cancelled, duration)
        except ValueError as error:
            raise ValueError(f"poll of job {self._job.name!r}: {error}") from None
        self._claim.finish(attempt, how)

    def _call_cancel(self, handle: str) -> None:
        if handle in self._cancel_called or self._job.cancel is None:
            return
        try:
            self._job.cancel(handle)
        except Exception as error:
            self._failed("cancel", error)
        else:
            self._failing.pop("cancel", None)
            self._cancel_called.add(handle)

    def _ask(self) -> int | None:
        """The number of the attempt that is to be cancelled, when that is written down."""
        attempts = self._store.attempts(self._key)
        if not attempts:
            raise UnknownKey(f"key {self._key!r}: nothing is recorded")
        last = attempts[-1]
        if last.exit is not None or last.request is None:
            raise NotRunning(f"key {self._key!r}: attempt {last.number} has ended")
        if last.request.fingerprint != self._identity:
            raise self._different(last)
        # What has ended by itself keeps its outcome, though nobody may have recorded it yet.
        if last.handle is None or self._runs(last.handle):
            self._store.ask_cancel(self._key, last.number)
        elif "poll" in self._failing:
            return None
        self._over = last.number - 1
        return last.number

    def _runs(self, handle: str) -> bool:
        try:
            running = self._job.poll(handle) is RUNNING
        except Exception as error:
            self._failed("poll", error)
            return False
        self._failing.pop("poll", None)
        return running

    # -- waiting and giving up

    def _different(self, attempt: Attempt) -> DifferentTarget:
        request = attempt.request
        what = "something else" if request is None else f"{request.kind} {request.target!r}"
        return DifferentTarget(
            f"key {self._key!r}: attempt {attempt.number} is of {what} with another fingerprint "
            f"than job {self._job.name!r}: forget the key, take another one, or pass "
            "same_target=False"
        )

    def _failed(self, step: str, error: Exception) -> None:
        """Waits before it is tried again.

        Raises:
            Exception: the same, when it has failed for too long.
        """
        now = time.monotonic()
        since, times = self._failing.get(step, (now, 0))
        if now - since >= self._patience:
            error.add_note(
                f"proctree: key {self._key!r}: {step} failed for {now - since:.1f} s, "
                f"{times + 1} times; what is recorded is unchanged"
            )
            raise error
        self._failing[step] = (since, times + 1)
        events.warning("durable.job_trouble", key=self._key, step=step, error=repr(error))
        delay = min(FIRST_DELAY * 2.0 ** min(times, 20), self._job.every)
        self._wait(min(delay, self._patience))

    def _wait(self, seconds: float) -> None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"key {self._key!r}: the job has not ended in time")
            seconds = min(seconds, left)
        self.stop.wait(seconds)

    def _give_back(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()
