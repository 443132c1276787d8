"""Trees by their keys on several machines: the records are in a database, and the tree is held here
by a lease.

The lock of a directory says what runs on this machine, and knows nothing of another. There the
database says who has the key, by a lease (sql.py), and the warden here sees to it that the tree is
dead when the lease is over: whoever takes over by then starts nothing beside it. Nobody compares
clocks: who takes over has seen the lease unchanged for its whole length by its own clock, and the
warden counts from before the last renewal was sent.

The order of a start, and why no crash between two steps makes two trees, or loses one for good:

1. The lock of the key in the local directory is taken: nothing of it runs here.
2. The key is claimed in the database: nothing of it runs anywhere.
3. The attempt is recorded here, and then there.
4. The tree is started with the time that is left of the lease. Who was stopped so long that nothing
   is left starts nothing: the warden looks at the clock.

What has ended here and could not be recorded there any more (its supervisor was dead) is recorded
by whoever comes next on this machine. On another machine such a run counts as lost, once its lease
is over.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
import time
from typing import Any

from proctree import events, registry
from proctree.durable import runs
from proctree.durable.deciding import decide, found_of
from proctree.durable.directory import FileClaim, FileStore
from proctree.durable.errors import (
    DurableError,
    LeaseLost,
    NotOwner,
    NotRunning,
    StillRunning,
    StoreUnusable,
    UnknownKey,
)
from proctree.durable.keys import check_key
from proctree.durable.reconnecting import Patience, reconnect, recorded
from proctree.durable.recording import Request
from proctree.durable.results import outcome_of
from proctree.durable.running import Run
from proctree.durable.sql import SqlClaim, SqlStore, boottime
from proctree.durable.starting import clear_away, start
from proctree.durable.store import Attempt, attempt_of
from proctree.durable.table import Decision, Found
from proctree.durable.wish import Wish
from proctree.errors import ContainmentUnavailable, WardenLost, step
from proctree.latch import Latch
from proctree.outcome import Outcome
from proctree.policy import KillPolicy
from proctree.process.proof import time_namespace
from proctree.records import Reason

LOOK_SECONDS = 5.0
"""How often a run on another machine is looked at, at most; it is a tenth of the lease if that is
less."""

_AGAIN_SECONDS = 0.2
"""After which what failed at the database is tried again."""


def _pause(sql: SqlStore) -> float:
    return min(LOOK_SECONDS, sql.lease / 10)


def _local(sql: SqlStore) -> FileStore:
    if sql.local is None:
        sql.local = FileStore()
    return sql.local


def check(wish: Wish, sql: SqlStore) -> None:
    """Raises ValueError: it cannot be had with this store's lease; ContainmentUnavailable: our
    children have another clock than we have."""
    with step("time namespace"):
        ours, theirs = time_namespace(), time_namespace("self/ns/time_for_children")
    if ours != theirs:
        raise ContainmentUnavailable(
            "this process has left its time namespace for its children (unshare(CLONE_NEWTIME)): "
            "by their clock nobody here can say until when a tree may run; start it from a child"
        )
    if wish.lease is not None:
        raise ValueError(f"lease: with {sql!r} the lease is that of the store")
    if wish.kill.duration > sql.lease / 4:
        # What is left of the lease when it is next renewed has to be more than that.
        raise ValueError(
            f"kill: ending the run may take {wish.kill.duration:g} s, which is more than a quarter "
            f"of the store's lease, {sql.lease:g} s: it could not be dead when its lease is over"
        )


# -- handles


class LeasedRun(Run):
    """A run on this machine. Its end is known when it is recorded in the database as well."""

    _tender: Tender | None = None

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """As `Run.wait`. It comes back when the end is recorded, or can no longer be."""
        due = None if timeout is None else time.monotonic() + timeout
        outcome = super().wait(timeout)
        if outcome is not None and self._tender is not None:
            left = None if due is None else max(0.0, due - time.monotonic())
            if not self._tender.wait(left):
                return None
        return outcome

    def _leave(self) -> None:
        super()._leave()
        # Who leaves the block may leave the program next, and with it the thread that records it.
        if self._tender is not None:
            self._tender.wait(None)


class RunElsewhere(Run):
    """A run on another machine: known by what is recorded of it. It can be waited for, and
    `cancel` asks for its end.

    Attributes:
        host: the name of that machine.
        lost: after `wait`: its machine was not heard of for the length of its lease, so that it is
            dead, and how it ended will not be known.
    """

    def __init__(self, key: str, attempt: Attempt, request: Request, sql: SqlStore) -> None:
        super().__init__(key, attempt, request, reconnected=True, store=_local(sql))
        self.host = request.host
        self.lost = False
        self._sql = sql
        self._let_go = threading.Event()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """As `Run.wait`. Raises as well: StoreUnusable; UnknownKey: the key was forgotten before it
        was seen how the run ended."""
        due = None if timeout is None else time.monotonic() + timeout
        while self._outcome is None:
            self._look()
            left = None if due is None else due - time.monotonic()
            if self._outcome is not None or (left is not None and left <= 0):
                break
            pause = _pause(self._sql)
            self._let_go.wait(pause if left is None else min(pause, left))
        return self._outcome

    def _look(self) -> None:
        if self._is_over(self._sql.attempts(self.key)):
            return
        if self._let_go.is_set():
            self._outcome = self._ended(Reason.DETACHED, "it runs on")
            return
        claim = self._sql.claim(self.key)
        if claim is None:
            return
        try:
            if not self._is_over(claim.attempts()):
                self._lose(f"{self.host} was not heard of for the length of the lease")
        except LeaseLost:
            pass  # we were stopped for that long: it is looked at again
        finally:
            claim.release()

    def _is_over(self, attempts: list[Attempt]) -> bool:
        attempt = attempt_of(attempts, self.tree_id)
        if attempt is None:
            raise UnknownKey(
                f"key {self.key!r}: attempt {self.number} is not recorded any more, and how it "
                "ended is not known: the key was forgotten"
            )
        if attempt.exit is not None:
            self._outcome = outcome_of(attempt.exit, self._request)
        elif attempt is not attempts[-1]:
            self._lose("another attempt has been made since")
        return self._outcome is not None

    def _lose(self, detail: str) -> None:
        self.lost = True
        self._outcome = self._ended(Reason.SUPERVISOR_LOST, detail)

    def _ended(self, reason: Reason, detail: str) -> Outcome:
        return Outcome(
            None,
            reason,
            detail,
            containment=self._request.containment,
            tree_id=self.tree_id,
        )

    def kill(self, policy: KillPolicy | None = None, reason: str = "") -> None:
        """Raises NotOwner, unless it has ended."""
        self._refuse("kill")

    def signal(self, sig: int, scope: str = "group") -> None:
        """Raises NotOwner, unless it has ended."""
        self._refuse("signal")

    def _refuse(self, what: str) -> None:
        if self._outcome is None:
            raise NotOwner(
                f"{what}: run {self.key!r} (attempt {self.number}) is on {self.host}; "
                "durable.cancel asks for its end"
            )

    def detach(self) -> None:
        """Has `wait` come back."""
        self._let_go.set()

    def _leave(self) -> None:
        self.detach()


# -- holding the key while a tree runs


class Tender:
    """Renews the lease of a tree that we own, and records its end. Everything here runs on threads
    of its own."""

    def __init__(self, run: LeasedRun, sql: SqlStore) -> None:
        self._settled = Latch()
        """The end is recorded, or cannot be, or is somebody else's to record."""
        self._due = math.inf
        self._run = run
        self._sql = sql
        live = run._live
        assert live is not None
        self._live = live
        self._claim: SqlClaim | None = None
        self._ended = live.tree.closed
        self._keeping = threading.Lock()

    def _until(self) -> float:
        """For who has seen the end: seconds of CLOCK_BOOTTIME at which whatever lease there was is
        over."""
        self._due = min(self._due, boottime() + self._sql.lease)
        return self._due

    def wait(self, timeout: float | None) -> bool:
        """For who has seen the end: whether it is recorded now, or can no longer be. A database
        that does not even say no is not waited for any longer."""
        left = max(0.0, self._until() - boottime())
        self._settled.wait(left if timeout is None else min(left, timeout))
        return self._settled.is_set() or boottime() >= self._until()

    def begin(self, claim: SqlClaim | None = None) -> None:
        """Of a tree that we have started, with the claim for that. The key of one that somebody
        else has started is ours as soon as the tree is.

        Raises:
            OSError: there can be no thread for it.
        """
        if claim is not None:
            self._take(claim)
        thread = threading.Thread(target=self._work, name="proctree-tender", daemon=True)
        with step("tender"):
            try:
                thread.start()
            except RuntimeError as error:
                # How `threading` says EAGAIN and ENOMEM of pthread_create(3).
                raise OSError(errno.EAGAIN, str(error)) from None

    def _work(self) -> None:
        try:
            self._tend()
        except DurableError as error:
            self._unrecorded(error)
        finally:
            self._let_go_of_claim()  # it is not renewed by nobody's order
            self._settled.set()

    def _let_go_of_claim(self) -> None:
        if self._claim is not None:
            self._claim.abandon()

    def _take(self, claim: SqlClaim) -> None:
        self._let_go_of_claim()
        self._claim = claim
        claim.when_renewed.append(lambda _left: self._renewed(claim))
        # It may have been renewed meanwhile.
        self._keep(claim)

    def _keep(self, claim: SqlClaim) -> None:
        if self._live.contained.owns:  # from anybody else the warden takes nothing
            with self._keeping:  # what is said last is the latest
                self._live.contained.keep(claim.expires)

    def _renewed(self, claim: SqlClaim) -> None:
        self._keep(claim)
        last = (self._attempts() or ())[-1:]
        if last and last[0].cancelled and not self._ended.is_set():
            self._live.contained.cancel()

    def _tend(self) -> None:
        # Who owns the tree claims its key, again as well: its owner may be another one meanwhile,
        # who claims it then, and may go before we do.
        owned = True
        while not self._ended.is_set():
            again, owned = not owned, self._live.contained.owns
            if owned and not self._holds():
                self._try_to_claim()
            elif owned and again and self._claim is not None:
                self._keep(self._claim)
            self._ended.wait(_pause(self._sql))
        if self._detached():
            return  # it runs on, for as long as its lease
        if self._holds():
            self._record()
        else:
            self._see_it_recorded()

    def _holds(self) -> bool:
        return self._claim is not None and not self._claim.lost

    def _see_it_recorded(self) -> None:
        """By its owner, or by us when that is not there any more."""
        while boottime() < self._until():
            attempts = self._attempts()
            if self._is_recorded(attempts):
                return
            if attempts is not None and not self._is_last_of(attempts):
                break  # whoever took it for lost has made another one
            if self._try_to_claim():
                self._record()
                return
            time.sleep(_pause(self._sql))
        if self._live.contained.owns:
            self._unrecorded(LeaseLost("the lease was over before the end could be recorded"))

    def _attempts(self) -> list[Attempt] | None:
        """None when the database cannot be asked."""
        try:
            return self._sql.attempts(self._run.key)
        except StoreUnusable as error:
            self._failed(error)
            return None

    def _is_recorded(self, attempts: list[Attempt] | None) -> bool:
        attempt = attempt_of(attempts or (), self._run.tree_id)
        return attempt is not None and attempt.exit is not None

    def _failed(self, error: StoreUnusable) -> None:
        events.warning("durable.not_renewed", key=self._run.key, error=str(error))

    def _try_to_claim(self) -> bool:
        """If the tree is ours: whoever held the key does not own it any more."""
        claim = None
        try:
            claim = self._sql.claim(self._run.key, dead=lambda: self._is_last() and self._is_ours())
            if claim is None:
                return False
            if not self._is_last():
                claim.release()
                return False
        except StoreUnusable as error:
            self._failed(error)
            if claim is not None:
                claim.abandon()  # and not given back: the tree may run
            return False
        self._take(claim)
        return True

    def _is_ours(self) -> bool:
        """It has an owner for as long as it lives; behind its end, whoever held the key."""
        if not self._ended.is_set():
            return self._live.contained.owns
        return self._live.contained.owns or self._sql.holder_is_dead(self._run.key)

    def _is_last(self) -> bool:
        """Nobody has made another attempt."""
        return self._is_last_of(self._sql.attempts(self._run.key))

    def _is_last_of(self, attempts: list[Attempt]) -> bool:
        return attempt_of(attempts[-1:], self._run.tree_id) is not None

    # -- its end

    def _detached(self) -> bool:
        ending = self._live.tree.ending
        return ending is not None and ending.reason is Reason.DETACHED

    def _record(self) -> None:
        claim = self._claim
        assert claim is not None
        while not claim.lost and boottime() < self._until():
            try:
                # What a disk could not give back once is looked at twice.
                if any(record_end(claim, _local(self._sql), self._run.key) for _ in range(2)):
                    claim.release()
                else:  # if it is not known how it ended, that shows when the lease is over
                    self._say_what_is_unreadable()
                return
            except StoreUnusable as error:
                self._failed(error)
                time.sleep(min(_AGAIN_SECONDS, self._sql.lease / 10))
        self._unrecorded(LeaseLost("the lease was over before the end could be recorded"))

    def _say_what_is_unreadable(self) -> None:
        for attempt in _local(self._sql).attempts(self._run.key):
            if attempt.place == self._run.place and attempt.trouble:
                self._unrecorded(StoreUnusable(f"{attempt.place}: {attempt.trouble}"))

    def _unrecorded(self, error: DurableError) -> None:
        if self._is_recorded(self._attempts()):
            return  # by whoever has taken over
        events.error(
            "durable.unrecorded", key=self._run.key, tree_id=self._run.tree_id, error=str(error)
        )


def record_end(claim: SqlClaim, local: FileStore, key: str) -> bool:
    """Records there what is recorded here of the last attempt; False when that is nothing.

    Raises:
        LeaseLost, StoreUnusable.
    """
    attempts = claim.attempts()
    if not attempts:
        return False  # removed by hand
    last = attempts[-1]
    if last.exit is not None:
        return True
    here = _here(local, key, last)
    if here is None or here.exit is None:
        return False
    claim.finish(last, here.exit)
    return True


def _here(local: FileStore, key: str, attempt: Attempt) -> Attempt | None:
    """What the local directory says of an attempt."""
    request = attempt.request
    return None if request is None else attempt_of(local.attempts(key), request.tree_id)


# -- the front door


def begin(wish: Wish, sql: SqlStore) -> Run:
    """As `runs.begin`, for a key that other machines may have."""
    check(wish, sql)
    local = _local(sql)
    patience, losses = Patience(wish.key, local), runs.Losses()
    while True:
        mine = local.claim(wish.key)
        if mine is None:
            run = reconnect(wish, local, patience, LeasedRun)
            if run is not None:
                return _tended(run, sql)
            patience.wait()
            continue
        try:
            here = _begin_here(mine, wish, sql, local)
        except WardenLost as error:
            wish = losses.again(wish, error)
            continue
        finally:
            mine.release()
        run = here or _elsewhere(wish, sql)
        if run is not None:
            return run
        # Who has it has not said yet what for. That it has died shows when its lease is over.
        time.sleep(_pause(sql))
        # That may take longer than anybody here keeps the lock without a word.
        patience = Patience(wish.key, local)
        # What we have begun and not started is recorded as this tree, which is found by its id.
        wish = wish.again()


def _tended(run: Run, sql: SqlStore) -> Run:
    """One that was there before us."""
    assert isinstance(run, LeasedRun)
    try:
        _require_same_clock(run)
        there = attempt_of(sql.attempts(run.key), run.tree_id)
        tender = Tender(run, sql)
        tender.begin()
    except BaseException:
        # Who stays attached may come to own it, and nobody would renew its lease.
        run.detach()
        run.wait()
        raise
    run._tender = tender
    if there is not None:
        run.number = there.number
    return run


def _require_same_clock(run: LeasedRun) -> None:
    """Until when it may run is said to the warden by its clock. Raises StillRunning."""
    live = run._live
    warden = None if live is None else live.contained.root()
    with step("time namespace"):
        ours = time_namespace()
        its = ours if warden is None else time_namespace(f"{warden}/ns/time")
    if its not in (0, ours):
        raise StillRunning(
            f"key {run.key!r}: it runs in another time namespace (its warden is process {warden}): "
            "only from there its lease can be renewed; nothing was started beside it"
        )


def _begin_here(mine: FileClaim, wish: Wish, sql: SqlStore, local: FileStore) -> Run | None:
    """With the local lock. None when another machine has the key."""
    claim = sql.claim(wish.key, dead=lambda: _ran_here(sql, local, wish.key))
    if claim is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(claim.release)
        try:
            last, found = _last(claim, wish, local)
            decision = decide(last, found, wish)
            for left in mine.attempts()[-1:]:
                clear_away(left, wish.key)
            if decision is Decision.RESULT:
                assert last is not None
                return recorded(
                    _with_place(last, wish.key, local),
                    wish.key,
                    wish.logs,
                    local,
                    merged=wish.merged,
                )
            if last is not None:
                events.debug("durable.again", key=wish.key, attempt=last.number, found=found.value)
            return _start(mine, claim, stack, wish, sql)
        except LeaseLost:
            return None


def _last(claim: SqlClaim, wish: Wish, local: FileStore) -> tuple[Attempt | None, Found]:
    attempts = claim.attempts()
    if attempts and attempts[-1].exit is None and record_end(claim, local, wish.key):
        attempts = claim.attempts()
    last = attempts[-1] if attempts else None
    return last, found_of(last, wish)


def _with_place(attempt: Attempt, key: str, local: FileStore) -> Attempt:
    """With the directory of its output, if that is on this machine."""
    attempts, request = local.attempts(key), attempt.request
    here = None if request is None else attempt_of(attempts, request.tree_id)
    if here is not None:
        return attempt._replace(place=here.place)
    for last in attempts[-1:]:
        if last.request is None:  # it may be that one
            events.warning("durable.unreadable_output", path=last.place, errno=last.trouble)
    return attempt._replace(place="")


def _ran_here(sql: SqlStore, local: FileStore, key: str) -> bool:
    """Whether what the holder held was a tree of this machine's: we have its lock, so it has
    ended. A directory may have been copied from another machine, with what is recorded there and
    without its locks; and from before the last boot it cannot be told from such a one."""
    for last in sql.attempts(key)[-1:]:
        request = last.request
        ran = request is not None and request.boot == registry.this_machine()[0]
        return ran and _here(local, key, last) is not None
    return False


def _start(
    mine: FileClaim, claim: SqlClaim, stack: contextlib.ExitStack, wish: Wish, sql: SqlStore
) -> Run | None:
    number, expires = 0, math.inf

    def until(request: Request) -> float:
        nonlocal number, expires
        number = claim.begin(request).number
        expires = claim.expires
        return expires

    try:
        run = start(mine, wish, _local(sql), until, LeasedRun)
        _have_tended(run, claim, sql)
    except BaseException as error:
        if number and not _proved_ended(claim, sql, wish.key):
            stack.pop_all()
            claim.abandon()  # something of it may run, until the lease is over
        # By what the warden was told: it may have been renewed since.
        late = boottime() >= expires - wish.kill.duration
        if late and isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
            return None  # we were stopped for so long that nothing of that was left
        raise
    stack.pop_all()
    run.number = number
    return run


def _have_tended(run: Run, claim: SqlClaim, sql: SqlStore) -> None:
    assert isinstance(run, LeasedRun)
    tender = Tender(run, sql)
    try:
        tender.begin(claim)
    except BaseException:
        # Nobody would renew its lease, or record its end.
        run.kill(KillPolicy.now())
        run.wait()
        raise
    run._tender = tender


def _proved_ended(claim: SqlClaim, sql: SqlStore, key: str) -> bool:
    with contextlib.suppress(DurableError):
        return record_end(claim, _local(sql), key)
    return False


def _elsewhere(wish: Wish, sql: SqlStore) -> Run | None:
    """None when nothing is known yet of what runs there."""
    last = sql.attempts(wish.key)[-1:]
    if not last or last[0].request is None:
        return None
    if last[0].exit is None:
        decide(last[0], Found.RUNNING, wish)
        return RunElsewhere(wish.key, last[0], last[0].request, sql)
    if decide(last[0], found_of(last[0], wish), wish) is not Decision.RESULT:
        return None
    # Whoever has the key has only not given it back yet.
    local = _local(sql)
    return recorded(
        _with_place(last[0], wish.key, local), wish.key, wish.logs, local, merged=wish.merged
    )


def attach(key: str, logs: Any, sql: SqlStore) -> Run:
    """See `proctree.durable.attach`."""
    check_key(key)
    local = _local(sql)
    if local.claimed(key):
        run = runs.attach(key, logs, local, LeasedRun)
        return _tended(run, sql) if run._live is not None else run
    attempts = sql.attempts(key)
    if not attempts:
        raise UnknownKey(f"key {key!r}: nothing is recorded in {sql.name}")
    last = attempts[-1]
    runs.require_tree(key, last)
    here = _here(local, key, last)
    if last.exit is None and here is not None:
        last = last._replace(exit=here.exit)  # its supervisor was dead, and recorded nothing there
    if last.request is not None and last.exit is not None:
        return recorded(_with_place(last, key, local), key, logs, local)
    if last.request is not None and sql.claimed(key) and here is None:
        return RunElsewhere(key, last, last.request, sql)
    why = last.trouble or "it has neither ended nor does it run: it was lost"
    raise NotRunning(f"key {key!r}: attempt {last.number}: {why}")


def cancel(key: str, timeout: float | None, sql: SqlStore) -> Outcome | None:
    """See `proctree.durable.cancel`."""
    check_key(key)
    local = _local(sql)
    if local.claimed(key):
        outcome = runs.cancel(key, timeout, local)
        _record_here(key, sql, local)
        return outcome
    attempts = sql.attempts(key)
    if not attempts:
        raise UnknownKey(f"key {key!r}: nothing is recorded in {sql.name}")
    last = attempts[-1]
    runs.require_tree(key, last)
    if last.exit is not None or last.request is None or not sql.claimed(key):
        return None
    here = _here(local, key, last)
    if here is not None and here.exit is not None:
        _record_here(key, sql, local)  # if its holder, who may be busy with that, is dead
        return None
    sql.ask_cancel(key, last.number)
    outcome = RunElsewhere(key, last, last.request, sql).wait(timeout)
    if outcome is None:
        raise TimeoutError(f"key {key!r}: it has not ended {timeout:g} s after it was asked to")
    return outcome


def _record_here(key: str, sql: SqlStore, local: FileStore) -> None:
    """What has ended here without an owner who would record it."""
    claim = sql.claim(key, dead=lambda: _ran_here(sql, local, key) and sql.holder_is_dead(key))
    if claim is not None:
        try:
            record_end(claim, local, key)
        except LeaseLost:
            pass
        finally:
            claim.release()


def forget(key: str, sql: SqlStore) -> None:
    """See `proctree.durable.forget`."""
    local = _local(sql)
    if local.claimed(key):
        raise StillRunning(f"key {key!r}: it runs on this machine: cancel it first")
    unknown: UnknownKey | None = None
    try:
        sql.forget(key)
    except UnknownKey as error:
        unknown = error
    try:
        local.forget(key)  # it may have been forgotten from another machine
    except UnknownKey:
        if unknown is not None:
            raise unknown from None
