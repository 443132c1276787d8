"""Coming to a run that is there already: it runs, or its end is recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from proctree import events
from proctree.command import Command
from proctree.containment.attached import AttachedContained
from proctree.containment.reaching import NOBODY_THERE, Link, reach
from proctree.durable.deciding import decide
from proctree.durable.directory import FileStore
from proctree.durable.errors import StillRunning
from proctree.durable.following import Followed, deliver
from proctree.durable.results import Captured, outcome_of
from proctree.durable.running import Live, Run, watcher_policy
from proctree.durable.starting import launch, make_tree
from proctree.durable.store import Attempt
from proctree.durable.table import Found
from proctree.durable.wish import Wish
from proctree.errors import errno_name
from proctree.policy import Leftovers
from proctree.process import proof
from proctree.tree import Tree

PATIENCE = 60.0
"""Seconds that a tree which is just starting or ending may take to do so."""

ANSWER_SECONDS = 10.0
"""How long a warden that listens may take to answer."""

_FIRST_PAUSE = 0.001
_LAST_PAUSE = 0.05
"""Seconds between two looks at a lock that is held by somebody who does not listen: nothing tells
when that changes, and it changes within milliseconds."""


class Patience:
    """With a key whose lock is held by somebody who does not answer.

    Args:
        limit: seconds, if less than `PATIENCE`; None: no less.
    """

    def __init__(self, key: str, store: FileStore, limit: float | None = None) -> None:
        self._key = key
        self._store = store
        self._pause = _FIRST_PAUSE
        self._limit = PATIENCE if limit is None else min(limit, PATIENCE)
        self._deadline = time.monotonic() + self._limit

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline - time.monotonic())

    def wait(self) -> None:
        """Raises StillRunning when it is at an end."""
        if time.monotonic() >= self._deadline:
            raise StillRunning(
                f"key {self._key!r}: somebody holds its lock (flock(2) on "
                f"{self._store.at(self._key).lock}; lslocks(8) may say who), and nobody has "
                f"answered for {self._limit:g} s: nothing was started"
            )
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, _LAST_PAUSE)


def reconnect(
    wish: Wish, store: FileStore, patience: Patience, make: type[Run] = Run
) -> Run | None:
    """None when nobody is there to reconnect to: it is just starting, or ending.

    Raises:
        DifferentTarget: it runs, and has another target.
        StillRunning: it runs, and cannot be reached.
    """
    attempts = store.attempts(wish.key)
    last = attempts[-1] if attempts else None
    if last is None or last.request is None or last.exit is not None:
        return None
    decide(last, Found.RUNNING, wish)
    link = link_to(wish.key, last, own=True)
    if link is None:
        return None
    if link.ending:
        # It is being ended since nobody was there, or since somebody has cancelled it: it does not
        # run any more, and what comes next is decided when it has gone.
        with contextlib.closing(link):
            gone = proof.has_ended(link.pidfd, patience.left)
        if not gone:
            raise StillRunning(
                f"key {wish.key!r}: attempt {last.number} is being ended by its warden, process "
                f"{link.warden}, and has not ended for {PATIENCE:g} s; nothing was started beside "
                "it: wait for it, or see what it is that cannot be ended"
            )
        return None
    return attached(last, link, wish, wish.key, wish.logs, store, make)


def link_to(key: str, attempt: Attempt, *, own: bool, timeout: float | None = None) -> Link | None:
    """None when nobody listens.

    Args:
        timeout: seconds for the warden to answer. Default: `ANSWER_SECONDS`.

    Raises:
        StillRunning: it cannot be reached.
    """
    try:
        seconds = ANSWER_SECONDS if timeout is None else min(timeout, ANSWER_SECONDS)
        return reach(attempt.place, own=own, timeout=seconds)
    except NOBODY_THERE:
        return None
    except OSError as error:
        raise StillRunning(
            f"key {key!r}: attempt {attempt.number} runs and cannot be reached: {error.strerror} "
            f"({errno_name(error.errno or 0)}); nothing was started beside it"
        ) from error


def attached(
    attempt: Attempt,
    link: Link,
    wish: Wish | None,
    key: str,
    logs: Any,
    store: FileStore,
    make: type[Run] = Run,
) -> Run:
    """The handle of a run whose warden we have reached."""
    request = attempt.request
    assert request is not None
    contained = AttachedContained(
        request.tree_id, link, request.containment, request.cgroup or None
    )
    contained.place = attempt.place
    try:
        if wish is not None:
            leftovers = wish.leftovers
        else:
            leftovers = Leftovers.KILL if link.ends else Leftovers.WAIT
        merged = wish is not None and wish.merged
        followed = Followed(
            None, logs, attempt.place, writes=False, merged=merged, cursor=link.owned
        )
        name = request.target if wish is None else wish.command.name
        command = Command(argv=(), function=None, name=name, cwd=None, env={})
        tree = make_tree(command, contained, followed, wish, watcher_policy(link.owned, leftovers))
        run = make(key, attempt, request, reconnected=True, store=store)
        timeout = None if wish is None else wish.timeout
        live = run._live = Live(tree, contained, followed, timeout, leftovers)
        _launch(tree, contained, (lambda: None) if wish is None else lambda: wish.made(run))
        live.arm()
        events.debug(
            "durable.reconnected",
            key=key,
            attempt=attempt.number,
            tree_id=request.tree_id,
            owned=link.owned,
        )
        return run
    except BaseException:
        # Without a handle nobody would let go of it, and who is attached keeps the run alive.
        contained.give_back()
        raise


def _launch(tree: Tree, contained: AttachedContained, made: Callable[[], object]) -> None:
    launch(tree, made, keep=True)
    if tree.start_error is not None:
        tree.closed.wait()
        if contained.give_back():
            raise tree.start_error


def recorded(
    attempt: Attempt, key: str, logs: Any, store: FileStore, *, merged: bool = False
) -> Run:
    """What has ended: the rest of its output is delivered, if it is on this machine, and its result
    is what is recorded."""
    assert attempt.request is not None
    assert attempt.exit is not None
    request, how = attempt.request, attempt.exit
    nothing: Captured = (None, None)
    captured = nothing, nothing
    if attempt.place:
        pid = how.pid or None
        captured = deliver(attempt.place, logs, tree_id=request.tree_id, pid=pid, merged=merged)
    outcome = outcome_of(how, request, captured=captured)
    return Run(key, attempt, request, reconnected=True, store=store, outcome=outcome)
