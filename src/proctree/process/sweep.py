"""Ending what is left of a tree when nothing holds it any more, and finding members without a
warden.

A process is known as a member by any of three marks: it descends from a process that we keep from
being reused; it is in the session of the main process, while that session is certainly the same
one; it carries the tree's id in the environment that it was started with. Best effort by nature: a
process that left its session, lost its parent and cleared its environment has none of them. That is
what the warden is for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from proctree.command import TREE_VARIABLE
from proctree.process import proof
from proctree.process.proof import Stat
from proctree.records import Member

SWEEP_SECONDS = 5.0
_VARIABLE = TREE_VARIABLE.encode()


class Search(NamedTuple):
    """Whom to look for.

    Attributes:
        root: a process below which everything is a member; `root_pidfd` says whether its number is
            still its own.
        main: the main process, if it had not been reaped when last heard of: only then does its
            number name the session that it led.
        main_start: its start time, in clock ticks.
        tree_id: the mark in the environment.
    """

    root: int | None
    root_pidfd: int
    main: int | None
    main_start: int
    tree_id: str


def all_pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def belongs(search: Search, stat: Stat, *, root_held: bool) -> bool:
    """Whether the process that `stat` describes bears one of the marks."""
    if stat.pid in (search.root, os.getpid(), 1):
        return False
    main = search.main
    if main is not None and stat.start_time >= search.main_start:
        if stat.pid == main:
            return stat.start_time == search.main_start
        if stat.session == main:
            leader = proof.read_stat(main)
            if leader is None or leader.start_time == search.main_start:
                return True
    if proof.in_environ(proof.read_environ(stat.pid), _VARIABLE, search.tree_id.encode()):
        return True
    return root_held and search.root is not None and proof.is_below(stat.pid, search.root)


def find(search: Search) -> list[tuple[int, Stat]]:
    """The living members: a pidfd each, which the caller closes, and what they were seen as."""
    root_held = search.root_pidfd >= 0 and proof.holds_number(search.root_pidfd)
    found = []
    for pid in all_pids():
        stat = proof.read_stat(pid)
        if stat is None or stat.dead:
            continue
        pidfd = proof.open_pidfd(pid)
        if pidfd is None:
            continue
        # Read again behind the pidfd: only what is true now is about the process that it names.
        now = proof.read_stat(pid)
        if now and now.start_time == stat.start_time and belongs(search, now, root_held=root_held):
            found.append((pidfd, now))
        else:
            os.close(pidfd)
    return found


def sweep(search: Search) -> tuple[Member, ...]:
    """SIGKILL to every member until a search finds none; returns what is left after 5 s."""
    deadline = time.monotonic() + SWEEP_SECONDS
    errors: dict[int, int] = {}
    while True:
        found = find(search)
        try:
            if not found or time.monotonic() >= deadline:
                return tuple(_survivor(stat, errors.get(stat.pid, 0)) for _, stat in found)
            for pidfd, stat in found:
                _kill(pidfd, stat, errors)
            _wait_any(found, min(1.0, max(deadline - time.monotonic(), 0.0)))
        finally:
            for pidfd, _ in found:
                with contextlib.suppress(OSError):
                    os.close(pidfd)


def _kill(pidfd: int, stat: Stat, errors: dict[int, int]) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except OSError as error:
        errors[stat.pid] = error.errno or 0


def _wait_any(found: list[tuple[int, Stat]], seconds: float) -> None:
    """Until all that was found has ended, or the time is over: a pidfd is readable then."""
    poller = select.poll()
    waiting = set()
    for pidfd, _ in found:
        poller.register(pidfd, select.POLLIN)
        waiting.add(pidfd)
    end = time.monotonic() + seconds
    while waiting and (left := end - time.monotonic()) > 0:
        for pidfd, _ in poller.poll(left * 1000):
            poller.unregister(pidfd)
            waiting.discard(pidfd)


def _survivor(stat: Stat, error: int) -> Member:
    return Member(stat.pid, stat.ppid, stat.start_time, stat.state, stat.name, error)
