"""Starting the tree of a key, with the key's lock; and clearing away what the last one left.

The order of things, and why no crash between two of them makes two trees of one key, or loses one:

1. The key's lock is taken. From then on nobody else decides anything about it.
2. The request is recorded (the intent), with everything that is needed to find what it may start.
3. The warden inherits the lock, and gets START: now the tree runs. Who is killed before that has
   started nothing: a warden without START ends. Who is killed behind it leaves a tree that holds
   the lock: whoever comes next cannot take it, and reconnects.
4. We give our copy of the lock away. Only the warden holds it, until the tree is proved empty and
   its exit is recorded.

So a free lock means that nothing runs (or that the warden was killed, and then what it left behind
is ended first), and a lock that is held means that something runs, is about to, or is ending.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from proctree import containment as _containment
from proctree import events, registry
from proctree import loop as _loop
from proctree import tree as _tree
from proctree.command import Command
from proctree.containment.base import Keep, Wanted
from proctree.containment.meeting import SOCKET_NAME
from proctree.containment.warden import WardenContained
from proctree.durable import files, folders
from proctree.durable.directory import FileClaim, FileStore
from proctree.durable.errors import StillRunning, StoreUnusable
from proctree.durable.following import Followed
from proctree.durable.here import new_request
from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.running import Live, Run
from proctree.durable.store import Attempt
from proctree.durable.wish import DEFAULT_LEASE, Wish
from proctree.errors import ProctreeError, errno_name
from proctree.policy import KillPolicy, Leftovers
from proctree.process import proof
from proctree.records import Member, Reason

SILENCE_SECONDS = 2.0
"""For how long what may be dying may keep its output open."""


def clear_away(last: Attempt | None, key: str) -> None:
    """With the key's lock: ends what the last attempt has left behind, if its warden was killed.
    That is its tree; or, where the warden had recorded the end already, its entry in the registry,
    the directory of its cgroup and its socket.

    Raises:
        StillRunning: it cannot be ended, or whether there is anything cannot be seen from here.
    """
    if last is None or (last.exit is not None and not _is_entered(last)):
        return
    try:
        survivors = _end(last, key)
    except registry.Unseen as error:
        if last.exit is not None:
            return  # it was proved empty before that was recorded
        raise StillRunning(
            f"key {key!r}: attempt {last.number} has lost its warden, and may not have ended: "
            f"{error}; nothing was started beside it. Run it again from where it ran, or from "
            "where that is seen (the host); if you know that it has ended, forget the key"
        ) from error
    if survivors:
        who = "; ".join(f"pid {m.pid} ({m.name}): {m.why}" for m in survivors)
        raise StillRunning(
            f"key {key!r}: attempt {last.number} has lost its warden and cannot be ended: {who}; "
            "nothing was started beside it"
        )
    if last.place:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(last.place, SOCKET_NAME))


def _is_entered(attempt: Attempt) -> bool:
    return attempt.request is not None and registry.is_entered(attempt.request.tree_id)


def _end(last: Attempt, key: str) -> list[Member]:
    """What survives it."""
    request = last.request
    if request is None:
        return [member for swept in registry.sweep() for member in swept.survivors]
    return list(
        registry.end_unheld(
            boot=request.boot,
            pid_namespace=request.pid_namespace,
            started_by=request.user_namespace,
            tree_id=request.tree_id,
            name=key,
            containment=request.containment,
            cgroup=request.cgroup or None,
            seems_empty=lambda: _is_silent(last),
        )
    )


def _is_silent(last: Attempt) -> bool:
    """Whether nobody can write to its output any more, which its members inherit: as when the
    container has gone that it ran in. They may just be dying with that.

    Raises:
        Unseen: it cannot be said.
    """
    due = time.monotonic() + SILENCE_SECONDS
    logs = [os.path.join(last.place, name) for name in (folders.OUT, folders.ERR)]
    while True:
        try:
            written = any(map(files.is_written, logs))
        except OSError as error:
            proof.pass_shortage(error)
            raise registry.Unseen(
                f"it ran in another PID namespace, and {errno_name(error.errno or 0)} keeps from "
                f"us whether anybody can still write to {last.place}"
            ) from error
        if not written:
            return True
        if time.monotonic() >= due:
            return False
        time.sleep(0.01)


# -- starting


def start(
    claim: FileClaim,
    wish: Wish,
    store: FileStore,
    until: Callable[[Request], float] | None = None,
    make: type[Run] = Run,
) -> Run:
    """Starts another attempt, and returns when its main process runs.

    Args:
        claim: the key's lock; it is not given back.
        until: called when the intent is recorded and nothing is started yet: by when the tree is to
            be dead unless it is kept (`Keep.until`). Default: the wish's lease counts.
        make: the handle.

    Raises:
        What `proctree.durable.start` raises for what cannot be started.
    """
    wanted = Wanted(limits=wish.limits, keep=Keep(-1, -1, -1, 0))
    backend = _containment.choose(wish.containment, wanted)
    contained = backend(wish.tree_id, wanted)
    assert isinstance(contained, WardenContained)
    request = new_request(
        wish.key,
        wish.target,
        wish.fingerprint,
        wish.tree_id,
        "tree",
        containment=contained.name,
        cgroup=contained.cgroup or "",
    )
    with contextlib.closing(claim.prepare(request)) as prepared:
        attempt = prepared.attempt
        end = None if until is None else until(request)
        followed = Followed(wish.stdin, wish.logs, attempt.place, writes=True, merged=wish.merged)
        contained.place = attempt.place
        contained.wanted = wanted._replace(
            keep=Keep(
                claim.lock,
                prepared.run,
                prepared.listen,
                DEFAULT_LEASE if wish.lease is None else wish.lease,
                until=end,
                end_leftovers=wish.leftovers is Leftovers.KILL,
            )
        )
        tree = make_tree(wish.command, contained, followed, wish, wish.leftovers)
        run = make(wish.key, attempt, request, reconnected=False, store=store)
        live = run._live = Live(tree, contained, followed, wish.timeout, wish.leftovers)
        try:
            launch(tree, lambda: wish.made(run), keep=wish.keep)
            _require_start(tree)
        except BaseException:
            _record_failure(claim, attempt, tree)
            raise
    live.arm()
    return run


def make_tree(
    command: Command,
    contained: WardenContained,
    followed: Followed,
    wish: Wish | None,
    leftovers: Leftovers,
) -> _tree.Tree:
    """The machine of one attempt; without a wish for one that we only watch."""
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


def launch(tree: _tree.Tree, made: Callable[[], object], *, keep: bool) -> None:
    """Returns when its main process runs, or cannot be started. An interrupt ends it, or lets go of
    it with `keep`. What comes behind `made` is the concern of whoever was told by that."""
    loop = _loop.get()
    try:
        tree.launch(loop)
        tree.started.wait()
        made()
    except BaseException:
        if keep:
            tree.let_go(loop)
        else:
            tree.kill(loop, Reason.KILLED, "interrupted", None)
            tree.closed.wait()
        raise


def _require_start(tree: _tree.Tree) -> None:
    if tree.start_error is not None:
        tree.closed.wait()
        raise tree.start_error
    if tree.contained.pid is None:
        raise ProctreeError(f"tree {tree.tree_id} was ended before it had started")


def _record_failure(claim: FileClaim, attempt: Attempt, tree: _tree.Tree) -> None:
    """If not even a warden could be made, who records what a warden would have."""
    error = tree.start_error
    if error is None or tree.contained.pid is not None:
        return
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    try:
        known = claim.attempts()
        if known and known[-1].exit is None:
            claim.finish(attempt, Exit(None, Cause.NOT_STARTED, error=number))
    except StoreUnusable as failed:
        # It must not hide why nothing was started. Who comes next finds an attempt that was lost.
        events.warning(
            "durable.unrecorded", key=claim.place.key, attempt=attempt.number, error=str(failed)
        )
