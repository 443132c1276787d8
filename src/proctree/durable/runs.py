"""Trees by their keys: start, reconnect, list, cancel, forget.

The order of things, and why no crash between two of them makes two trees of one key, or loses one:

1. The key's lock is taken. From then on nobody else decides anything about it.
2. The request is recorded (the intent), with everything that is needed to find what it may start.
3. The warden inherits the lock, and gets START: now the tree runs. Who is killed before that has
   started nothing: a warden without START ends. Who is killed behind it leaves a tree that holds
   the lock: whoever comes next cannot take it, and reconnects.
4. We give our copy of the lock away. Only the warden holds it, until the tree is proved empty and
   its exit is recorded.

So a free lock means that nothing runs (or that the warden was killed, and then what it left behind
is swept first), and a lock that is held means that something runs, is about to, or is ending.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Any

from proctree import containment as _containment
from proctree import events, registry
from proctree import loop as _loop
from proctree import tree as _tree
from proctree.command import Command
from proctree.containment.attached import AttachedContained
from proctree.containment.base import Keep, Wanted
from proctree.containment.reaching import Link, reach
from proctree.containment.warden import WardenContained
from proctree.durable import table
from proctree.durable.directory import FileClaim, FileStore
from proctree.durable.errors import DifferentTarget, NotRunning, StillRunning, UnknownKey
from proctree.durable.following import Followed, deliver
from proctree.durable.keys import check_key
from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.results import outcome_of
from proctree.durable.running import Live, Run, watcher_policy
from proctree.durable.store import Attempt
from proctree.durable.table import Decision, Found
from proctree.durable.wish import Wish
from proctree.errors import ProctreeError, errno_name
from proctree.outcome import Outcome
from proctree.policy import KillPolicy, Leftovers
from proctree.records import Reason

PATIENCE = 60.0
"""Seconds that a tree which is just starting or ending may take to do so."""

ANSWER_SECONDS = 10.0
"""How long a warden that listens may take to answer."""

_FIRST_PAUSE = 0.001
_LAST_PAUSE = 0.05
"""Seconds between two looks at a lock that is held by somebody who does not listen: nothing tells
when that changes, and it changes within milliseconds."""

_NOBODY_THERE = (
    ConnectionRefusedError,
    ConnectionResetError,
    FileNotFoundError,
    BrokenPipeError,
)


class _Patience:
    def __init__(self, key: str, store: FileStore) -> None:
        self._key = key
        self._store = store
        self._pause = _FIRST_PAUSE
        self._deadline = time.monotonic() + PATIENCE

    @property
    def left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def wait(self) -> None:
        """Raises StillRunning when it is at an end."""
        if time.monotonic() >= self._deadline:
            raise StillRunning(
                f"key {self._key!r}: somebody holds its lock (flock(2) on "
                f"{self._store.at(self._key).lock}; lslocks(8) may say who), and nobody has "
                f"answered for {PATIENCE:g} s: nothing was started"
            )
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, _LAST_PAUSE)


# -- the front door


def begin(wish: Wish, store: FileStore) -> Run:
    """Starts, reconnects, or answers what is recorded, as the table says."""
    patience = _Patience(wish.key, store)
    while True:
        claim = store.claim(wish.key)
        if claim is not None:
            try:
                return _decide(claim, wish, store)
            finally:
                claim.release()
        run = _reconnect(wish, store, patience)
        if run is not None:
            return run
        patience.wait()


def _found(last: Attempt | None, wish: Wish) -> Found:
    """With the key's lock: so nothing runs."""
    if last is None:
        return Found.NOTHING
    if last.request is None or last.trouble:
        return Found.UNREADABLE
    if last.exit is None:
        return Found.GONE
    return table.judge(last.exit.returncode, last.exit.by_itself, wish.allowed)


def _same_target(last: Attempt | None, wish: Wish) -> bool:
    return (
        last is not None
        and last.request is not None
        and last.request.fingerprint == wish.fingerprint
    )


def _refuse(last: Attempt, wish: Wish) -> DifferentTarget:
    was = "" if last.request is None else last.request.target
    return DifferentTarget(
        f"key {wish.key!r} was started with another target: {was}, and not {wish.target}. "
        "Forget the key, take another one, or pass same_target=False if the key alone counts"
    )


def _decide(claim: FileClaim, wish: Wish, store: FileStore) -> Run:
    attempts = claim.attempts()
    last = attempts[-1] if attempts else None
    found = _found(last, wish)
    decision = table.decide(
        found, same_target=_same_target(last, wish), key_alone=not wish.same_target
    )
    if decision is Decision.REFUSE:
        assert last is not None
        raise _refuse(last, wish)
    if decision is Decision.RESULT:
        assert last is not None
        return _recorded(last, wish.key, wish.logs, store)
    if last is not None:
        events.debug("durable.again", key=wish.key, attempt=last.number, found=str(found.value))
    if found in (Found.GONE, Found.UNREADABLE):
        assert last is not None
        _clear_away(last, wish.key)
    return _start(claim, wish, store)


def _clear_away(last: Attempt, key: str) -> None:
    """Its warden is dead, and did not say that its tree has ended: it was killed, and may have left
    something behind."""
    if last.request is None:
        survivors = [member for swept in registry.sweep() for member in swept.survivors]
    else:
        request = last.request
        survivors = list(
            registry.end_unheld(
                boot=request.boot,
                tree_id=request.tree_id,
                name=key,
                containment=request.containment,
                cgroup=request.cgroup or None,
            )
        )
    if survivors:
        who = "; ".join(f"pid {m.pid} ({m.name}): {m.why}" for m in survivors)
        raise StillRunning(
            f"key {key!r}: attempt {last.number} has lost its warden and cannot be ended: {who}; "
            "nothing was started beside it"
        )


# -- starting


def _start(claim: FileClaim, wish: Wish, store: FileStore) -> Run:
    strict = Keep(-1, -1, -1, 0)
    wanted = Wanted(limits=wish.limits, keep=strict)
    backend = _containment.choose(wish.containment, wanted)
    contained = backend(wish.tree_id, wanted)
    assert isinstance(contained, WardenContained)
    request = _request(wish, contained)
    with contextlib.closing(claim.prepare(request)) as prepared:
        attempt = prepared.attempt
        followed = Followed(wish.stdin, wish.logs, attempt.place, writes=True, merged=wish.merged)
        contained.place = attempt.place
        contained.wanted = wanted._replace(
            keep=Keep(
                claim.lock,
                prepared.run,
                prepared.listen,
                round(wish.lease * 1000),
                end_leftovers=wish.leftovers is Leftovers.KILL,
            )
        )
        tree = _make_tree(wish.command, contained, followed, wish, wish.leftovers)
        run = Run(wish.key, attempt, request, reconnected=False, store=store)
        live = run._live = Live(tree, contained, followed, wish.timeout, wish.leftovers)
        try:
            _launch(tree, keep=wish.keep)
        except BaseException:
            _record_failure(claim, attempt, tree)
            raise
    live.arm()
    return run


def _request(wish: Wish, contained: WardenContained) -> Request:
    return Request(
        key=wish.key,
        target=wish.target,
        fingerprint=wish.fingerprint,
        tree_id=wish.tree_id,
        kind="tree",
        boot=registry.boot_id(),
        pid_namespace=registry.pid_namespace(),
        host=socket.gethostname(),
        supervisor=os.getpid(),
        requested=time.time_ns(),
        containment=contained.name,
        cgroup=contained.cgroup or "",
    )


def _make_tree(
    command: Command,
    contained: WardenContained,
    followed: Followed,
    wish: Wish | None,
    leftovers: Leftovers,
) -> _tree.Tree:
    return _tree.Tree(
        contained.tree_id,
        command,
        contained,
        followed,
        KillPolicy() if wish is None else wish.kill,
        leftovers,
        None,
        0.5 if wish is None else wish.drain_timeout,
    )


def _launch(tree: _tree.Tree, *, keep: bool) -> None:
    """As `WatchedSubprocess.launch`; but with `keep` an interrupt lets go of what was started."""
    loop = _loop.get()
    try:
        tree.launch(loop)
        tree.started.wait()
    except BaseException:
        if keep:
            tree.started.wait()
            tree.detach()
        else:
            tree.kill(loop, Reason.KILLED, "interrupted", None)
        tree.closed.wait()
        raise
    if tree.start_error is not None:
        tree.closed.wait()
        raise tree.start_error
    if tree.contained.pid is None:
        raise ProctreeError(f"tree {tree.tree_id} was ended before it had started")


def _record_failure(claim: FileClaim, attempt: Attempt, tree: _tree.Tree) -> None:
    """If not even a warden could be made, who records what a warden would have."""
    error = tree.start_error
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    if error is not None and tree.contained.pid is None and claim.attempts()[-1].exit is None:
        claim.finish(attempt, Exit(None, Cause.NOT_STARTED, error=number))


# -- reconnecting


def _reconnect(wish: Wish, store: FileStore, patience: _Patience) -> Run | None:
    """None when nobody is there to reconnect to: it is just starting, or ending."""
    attempts = store.attempts(wish.key)
    last = attempts[-1] if attempts else None
    if last is None or last.request is None or last.exit is not None:
        return None
    decision = table.decide(
        Found.RUNNING, same_target=_same_target(last, wish), key_alone=not wish.same_target
    )
    if decision is Decision.REFUSE:
        raise _refuse(last, wish)
    link = _link(wish.key, last, own=True)
    if link is None:
        return None
    if link.ending:
        # It is being ended since nobody was there, or since somebody has cancelled it: it does not
        # run any more, and what comes next is decided when it has gone.
        _wait_for_end(link, patience.left)
        return None
    return _attached(last, link, wish, wish.key, wish.logs, store)


def _link(key: str, attempt: Attempt, *, own: bool) -> Link | None:
    try:
        return reach(attempt.place, own=own, timeout=ANSWER_SECONDS)
    except _NOBODY_THERE:
        return None
    except OSError as error:
        raise StillRunning(
            f"key {key!r}: attempt {attempt.number} runs and cannot be reached: {error.strerror} "
            f"({errno_name(error.errno or 0)}); nothing was started beside it"
        ) from error


def _wait_for_end(link: Link, timeout: float) -> None:
    try:
        poller = select.poll()
        poller.register(link.pidfd, select.POLLIN)
        poller.poll(timeout * 1000)
    finally:
        link.close()


def _attached(
    attempt: Attempt, link: Link, wish: Wish | None, key: str, logs: Any, store: FileStore
) -> Run:
    request = attempt.request
    assert request is not None
    contained = AttachedContained(
        request.tree_id, link, request.containment, request.cgroup or None
    )
    contained.place = attempt.place
    leftovers = Leftovers.KILL if wish is None else wish.leftovers
    followed = Followed(None, logs, attempt.place, writes=False, cursor=link.owned)
    name = request.target if wish is None else wish.command.name
    command = Command(argv=(), function=None, name=name, cwd=None, env={})
    tree = _make_tree(command, contained, followed, wish, watcher_policy(link.owned, leftovers))
    run = Run(key, attempt, request, reconnected=True, store=store)
    timeout = None if wish is None else wish.timeout
    live = run._live = Live(tree, contained, followed, timeout, leftovers)
    loop = _loop.get()
    tree.launch(loop)
    tree.started.wait()
    live.arm()
    events.debug(
        "durable.reconnected",
        key=key,
        attempt=attempt.number,
        tree_id=request.tree_id,
        owned=link.owned,
    )
    return run


def _recorded(attempt: Attempt, key: str, logs: Any, store: FileStore) -> Run:
    """What has ended: the rest of its output is delivered, and its result is what is recorded."""
    assert attempt.request is not None
    assert attempt.exit is not None
    request, how = attempt.request, attempt.exit
    captured = deliver(attempt.place, logs, tree_id=request.tree_id, pid=how.pid or None)
    outcome = outcome_of(how, request, captured=captured)
    return Run(key, attempt, request, reconnected=True, store=store, outcome=outcome)


def attach(key: str, logs: Any, store: FileStore) -> Run:
    """See `proctree.durable.attach`."""
    check_key(key)
    patience = _Patience(key, store)
    while True:
        held = store.claimed(key)
        attempts = store.attempts(key)
        if not attempts:
            if not held:
                raise UnknownKey(f"key {key!r}: nothing is recorded in {store.path}")
        else:
            last = attempts[-1]
            if last.request is not None and last.exit is not None and not last.trouble:
                return _recorded(last, key, logs, store)
            if not held:
                why = last.trouble or "it has neither ended nor does it run: it was lost"
                raise NotRunning(f"key {key!r}: attempt {last.number}: {why}")
            link = None if last.request is None else _link(key, last, own=True)
            if link is not None:
                return _attached(last, link, None, key, logs, store)
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
    patience = _Patience(key, store)
    while store.claimed(key):
        attempts = store.attempts(key)
        last = attempts[-1] if attempts else None
        link = None
        if last is not None and last.request is not None and last.exit is None:
            link = _link(key, last, own=False)
        if last is not None and link is not None:
            run = _attached(last, link, None, key, None, store)
            live = run._live
            assert live is not None
            live.contained.cancel()
            outcome = run.wait(timeout)
            if outcome is None:
                run.detach()
                raise TimeoutError(
                    f"key {key!r}: it has not ended {timeout:g} s after it was asked to"
                )
            return outcome
        patience.wait()
    if not store.attempts(key):
        raise UnknownKey(f"key {key!r}: nothing is recorded in {store.path}")
    return None
