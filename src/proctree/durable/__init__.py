"""Durable runs: one tree per key, across crashes of its supervisor.

    from proctree import durable

    outcome = durable.run("nightly-2026-11-21", ["python", "train.py"], lease=600)

If this process dies while the tree runs, the tree lives on for its lease. Who calls `run` with the
same key then reconnects to it, goes on with its output where the last reader stopped, and gets its
result. If it has ended meanwhile, the result is there. Only if it has failed or was lost, another
attempt is made. At no time do two trees of one key run: that is held by a kernel lock, which the
warden of the tree has for as long as the tree lives, and by no record that could be wrong.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from proctree.command import StrPath, Target
from proctree.durable import runs as _runs
from proctree.durable.directory import FileStore
from proctree.durable.errors import (
    DifferentTarget,
    DurableError,
    LeaseLost,
    NotOwner,
    NotRunning,
    StillRunning,
    StoreUnusable,
    UnknownKey,
)
from proctree.durable.jobs import GONE, RUNNING, Ended, Job, Stopped, cancel_job, run_job
from proctree.durable.keys import check_key
from proctree.durable.listing import Listed, list_
from proctree.durable.running import Run
from proctree.durable.store import Attempt, Claim, Store
from proctree.durable.wish import to_allowed, to_wish
from proctree.outcome import Outcome
from proctree.policy import to_seconds

if TYPE_CHECKING:
    from proctree.durable.sql import SqlStore

list = list_  # noqa: A001 - it is `durable.list`

__all__ = [
    "GONE",
    "RUNNING",
    "Attempt",
    "Claim",
    "DifferentTarget",
    "DurableError",
    "Ended",
    "FileStore",
    "Job",
    "LeaseLost",
    "Listed",
    "NotOwner",
    "NotRunning",
    "Run",
    "SqlStore",
    "StillRunning",
    "Stopped",
    "Store",
    "StoreUnusable",
    "UnknownKey",
    "attach",
    "cancel",
    "forget",
    "list",
    "run",
    "start",
]


def _store(value: Any) -> Store:
    if value is None or isinstance(value, (str, os.PathLike)):
        return FileStore(value)
    if not isinstance(value, Store):
        raise TypeError(f"store: a path or a store, not {value!r}")
    return value


def _front(store: Store) -> Any:
    """Who starts trees whose records are there: `runs` for a directory, `leased` for a database."""
    if isinstance(store, FileStore):
        return _runs
    from proctree.durable import leased
    from proctree.durable.sql import SqlStore

    if not isinstance(store, SqlStore):
        raise TypeError(f"store: trees need a FileStore or a SqlStore, not {store!r}")
    return leased


def _retries(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"retries: a number, not {value!r}")
    if value < 0:
        raise ValueError(f"retries: must be 0 or more, not {value}")
    return value


def start(
    key: str,
    target: Target,
    *,
    allowed: Iterable[int] = (0,),
    lease: float | None = None,
    logs: Any = None,
    store: StrPath | Store | None = None,
    same_target: bool = True,
    **options: Any,
) -> Run:
    """Starts a run, reconnects to it, or answers its recorded end. Returns when its main process
    runs.

    What is done depends on the last attempt of the key (`proctree.durable.table`): it runs:
    reconnect; it has finished with an allowed exit status: its result; it has failed, was lost or
    is unreadable: another attempt, and the earlier one is kept.

    Args:
        key: what makes a retry a retry of the same. Up to 4096 characters.
        target: as for `WatchedSubprocess`: a command, a callable, or a `Function` without template.
        allowed: the exit statuses that count as finished. Default (0,).
        lease: seconds that the tree lives on when no supervisor is attached; then it is ended by
            its kill policy. Default 60.
        logs: what becomes of the output besides being kept in the files out.log and err.log: None
            (default), `INHERIT`, `CAPTURE`, `Capture(...)`, `Lines(...)`, `Chunks(...)`,
            `Log(...)` for both streams, or a pair of these. A supervisor that reconnects goes on
            where the last one stopped.
        store: where the records are: a directory or a `FileStore`. Default: that of this user,
            `$XDG_STATE_HOME/proctree/durable`.
        same_target: refuse a target other than that of the last attempt (another command or working
            directory; the environment does not count). Default True.
        options: of `WatchedSubprocess`: `timeout` (of the run, whoever supervises it), `kill`,
            `cwd`, `env`, `stdin` (default `DEVNULL`), `stderr` (None, or `STDOUT` for one file),
            `containment`, `name`, `leftovers` ("kill" or "wait"), `drain_timeout`, `attributes`,
            `limits`.

    Raises:
        TypeError, ValueError: a bad argument, by name. Nothing was touched.
        DifferentTarget: see `same_target`.
        StillRunning: something of this key runs and cannot be reached or ended.
        StoreUnusable: the records cannot be read or written.
        FileNotFoundError, PermissionError, OSError: the command could not be started.
        ContainmentUnavailable: the containment cannot be had here.
    """
    options |= {"allowed": allowed, "lease": lease, "logs": logs, "same_target": same_target}
    if isinstance(target, Job):
        raise TypeError("target: a Job has no handle: use durable.run")
    where = _store(store)
    made: builtins.list[Run] = []
    try:
        wish = to_wish(key, target, **options)._replace(made=made.append)
        run: Run = _front(where).begin(wish, where)
        return run
    except BaseException:
        for each in made:
            _end(each, keep=each.reconnected)
        raise


def _end(run: Run, *, keep: bool) -> None:
    """Of a caller who does not get the handle, or the outcome."""
    if keep:
        run.detach()
        run.wait()
    else:
        run._leave()


def run(
    key: str,
    target: Target | Job,
    *,
    retries: int = 0,
    interrupted: str = "kill",
    allowed: Iterable[int] = (0,),
    store: StrPath | Store | None = None,
    **options: Any,
) -> Outcome:
    """Has a run end, whoever started it, and answers how it did. Takes what `start` takes.

    Args:
        retries: how many more attempts this call makes when one fails. What was ended on purpose
            (cancelled, killed) is not tried again. Default 0.
        interrupted: what becomes of a run that we own when an exception comes while we wait for it
            (KeyboardInterrupt, or what a signal handler raises): `"kill"` (default) or `"detach"`.
            A run that another supervisor owns is never ended by that.

    Raises:
        What `start` raises.
    """
    if interrupted not in ("kill", "detach"):
        raise ValueError(f"interrupted: 'kill' or 'detach', not {interrupted!r}")
    left, statuses = _retries(retries), to_allowed(allowed)
    where = _store(store)
    if isinstance(target, Job):
        return run_job(key, target, store=where, allowed=statuses, retries=left, **options)
    while True:
        made: builtins.list[Run] = []
        wish = to_wish(key, target, allowed=statuses, **options)
        wish = wish._replace(keep=interrupted == "detach", made=made.append)
        try:
            handle: Run = _front(where).begin(wish, where)
            outcome = handle.wait()
        except BaseException:
            for each in made:
                _end(each, keep=interrupted == "detach")
            raise
        assert outcome is not None
        if getattr(handle, "lost", False):
            continue  # with its machine: that is no failure of its own
        if left == 0 or not _runs.again(outcome, statuses):
            return outcome
        left -= 1


def attach(key: str, *, logs: Any = None, store: StrPath | Store | None = None) -> Run:
    """Reconnects to what runs under a key, or answers the recorded end of its last attempt. Never
    starts anything. Who is attached keeps the run alive, and owns it if nobody else does.

    Raises:
        UnknownKey: nothing is recorded.
        NotRunning: the last attempt was lost.
        StillRunning: it runs and cannot be reached.
        StoreUnusable: the records cannot be read.
    """
    where = _store(store)
    run: Run = _front(where).attach(key, logs, where)
    return run


def cancel(
    key: str,
    *,
    job: Job | None = None,
    timeout: float | None = None,
    store: StrPath | Store | None = None,
) -> Outcome | None:
    """Asks the owner of what runs under a key to end it, or ends it where nobody owns it, and waits
    for that.

    Args:
        job: what runs under the key, if it is a `Job`; see `proctree.durable.jobs.cancel_job`.
        timeout: seconds to wait; None waits as long as it takes.

    Returns:
        How it ended; None when nothing ran.

    Raises:
        UnknownKey: nothing is recorded.
        TimeoutError: it has not ended in time; it is still being ended.
        StillRunning: it runs and cannot be reached.
        StoreUnusable: the records cannot be read.
    """
    seconds = None if timeout is None else to_seconds(timeout, "timeout")
    where = _store(store)
    if job is not None:
        return cancel_job(key, job, store=where, timeout=seconds)
    outcome: Outcome | None = _front(where).cancel(key, seconds, where)
    return outcome


def forget(key: str, *, store: StrPath | Store | None = None) -> None:
    """Removes everything that is recorded of a key: its attempts, and their output.

    Raises:
        UnknownKey: nothing is recorded.
        StillRunning: it runs: cancel it first.
        StoreUnusable: the records cannot be removed.
    """
    check_key(key)
    where = _store(store)
    if isinstance(where, FileStore):
        where.forget(key)
    else:
        _front(where).forget(key, where)


def __getattr__(name: str) -> Any:
    """PEP 562: what needs SQLAlchemy, the extra `sql`."""
    if name != "SqlStore":
        raise AttributeError(f"module 'proctree.durable' has no attribute {name!r}")
    from proctree.durable.sql import SqlStore

    return SqlStore
