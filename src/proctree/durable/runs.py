"""Trees by their keys, with their records in a directory: start, reconnect, attach, cancel."""

from __future__ import annotations

import time
from typing import Any

from proctree import events
from proctree.durable import table
from proctree.durable.deciding import decide, found_of
from proctree.durable.directory import FileClaim, FileStore
from proctree.durable.errors import NotRunning, StillRunning, UnknownKey
from proctree.durable.keys import check_key
from proctree.durable.reconnecting import Patience, attached, link_to, reconnect, recorded
from proctree.durable.running import Run
from proctree.durable.starting import clear_away, start
from proctree.durable.store import Attempt
from proctree.durable.table import Decision, Found
from proctree.durable.wish import Wish
from proctree.errors import WardenLost
from proctree.outcome import Outcome
from proctree.records import Reason

LOST_MAX = 3
"""How many attempts in a row may lose their warden before their main process has started."""


class Losses:
    """The attempts of one call whose warden somebody has killed before they had begun: each is lost
    like any other that is, and followed by another one."""

    def __init__(self) -> None:
        self._count = 0

    def again(self, wish: Wish, error: WardenLost) -> Wish:
        """What the next attempt is to be. Raises `error` when it has come to that too often."""
        self._count += 1
        if self._count == LOST_MAX:
            raise error
        return wish.again()


def begin(wish: Wish, store: FileStore) -> Run:
    """Starts, reconnects, or answers what is recorded, as the table says."""
    patience, losses = Patience(wish.key, store), Losses()
    while True:
        claim = store.claim(wish.key)
        if claim is not None:
            try:
                return _decide(claim, wish, store)
            except WardenLost as error:
                wish = losses.again(wish, error)
                continue
            finally:
                claim.release()
        run = reconnect(wish, store, patience)
        if run is not None:
            return run
        patience.wait()


def _decide(claim: FileClaim, wish: Wish, store: FileStore) -> Run:
    attempts = claim.attempts()
    last = attempts[-1] if attempts else None
    found = found_of(last, wish)
    decision = decide(last, found, wish)
    clear_away(last, wish.key)
    if decision is Decision.RESULT:
        assert last is not None
        return recorded(last, wish.key, wish.logs, store, merged=wish.merged)
    if last is not None:
        events.debug("durable.again", key=wish.key, attempt=last.number, found=str(found.value))
    return start(claim, wish, store)


def require_tree(key: str, attempt: Attempt) -> None:
    """Raises NotRunning: it is of a job."""
    if attempt.request is not None and attempt.request.kind != "tree":
        raise NotRunning(
            f"key {key!r}: attempt {attempt.number} is of job {attempt.request.target!r}, which is "
            "no process here: `run` it again to reconnect, and `cancel` it with job="
        )


def attach(key: str, logs: Any, store: FileStore, make: type[Run] = Run) -> Run:
    """See `proctree.durable.attach`."""
    check_key(key)
    patience = Patience(key, store)
    seen: Attempt | None = None
    while True:
        held = store.claimed(key)
        attempts = store.attempts(key)
        if not attempts:
            if not held:
                raise UnknownKey(f"key {key!r}: nothing is recorded in {store.path}")
        else:
            last = attempts[-1]
            if last.request is not None and last.exit is not None and not last.trouble:
                return recorded(last, key, logs, store)
            if not held:
                if last != seen:
                    # It may have begun between the two looks. What had begun before the first one,
                    # and does not run, has ended: if not even now that is on record, it is lost.
                    seen = last
                    continue
                why = last.trouble or "it has neither ended nor does it run: it was lost"
                raise NotRunning(f"key {key!r}: attempt {last.number}: {why}")
            require_tree(key, last)
            link = None if last.request is None else link_to(key, last, own=True)
            if link is not None:
                return attached(last, link, None, key, logs, store, make)
        patience.wait()


def again(outcome: Outcome, allowed: frozenset[int]) -> bool:
    """Whether an attempt that has ended like this may be followed by another one: what was ended on
    purpose is not."""
    by_itself = outcome.reason in (Reason.EXITED, Reason.SIGNALED)
    found = table.judge(outcome.returncode, by_itself, allowed)
    return found is Found.FAILED and outcome.reason not in (Reason.KILLED, Reason.DETACHED)


def cancel(key: str, timeout: float | None, store: FileStore) -> Outcome | None:
    """See `proctree.durable.cancel`."""
    check_key(key)
    due = None if timeout is None else time.monotonic() + timeout
    try:
        return _cancel(key, due, Patience(key, store, timeout), store)
    except StillRunning:
        if due is not None and time.monotonic() >= due:
            raise TimeoutError(f"key {key!r}: it has not answered in {timeout:g} s") from None
        raise


def _left(due: float | None) -> float | None:
    return None if due is None else max(0.0, due - time.monotonic())


def _cancel(key: str, due: float | None, patience: Patience, store: FileStore) -> Outcome | None:
    while store.claimed(key):
        attempts = store.attempts(key)
        last = attempts[-1] if attempts else None
        link = None
        if last is not None and last.request is not None and last.exit is None:
            require_tree(key, last)
            link = link_to(key, last, own=False, timeout=_left(due))
        if last is not None and link is not None:
            run = attached(last, link, None, key, None, store)
            live = run._live
            assert live is not None
            live.contained.cancel()
            try:
                outcome = run.wait(_left(due))
            except BaseException:
                run.detach()
                raise
            if outcome is None:
                run.detach()
                raise TimeoutError(f"key {key!r}: it was asked to end, and has not in time")
            return outcome
        patience.wait()
    if not store.attempts(key):
        raise UnknownKey(f"key {key!r}: nothing is recorded in {store.path}")
    return None
