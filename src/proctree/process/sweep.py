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
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeVar

from proctree.command import TREE_VARIABLE
from proctree.process import cgroups, proof
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


class _Undecided(Exception):
    """The process is between two programs and has no environment yet."""


def _bears_mark(search: Search, stat: Stat) -> bool:
    """By its environment. During execve(2) there is a moment without one (the new memory exists and
    its environment does not yet), and then only a later look can tell."""
    environ = proof.read_environ(stat.pid)
    if environ is None:
        return False
    if not environ:
        raise _Undecided
    return proof.in_environ(environ, _VARIABLE, search.tree_id.encode())


def _in_session(search: Search, stat: Stat) -> bool:
    """By the main process, or the session that it leads, while its number is certainly its own."""
    main = search.main
    if main is None:
        return False
    if stat.pid == main:
        return stat.start_time == search.main_start
    if stat.session != main:
        return False
    leader = proof.read_stat(main)
    return leader is None or leader.start_time == search.main_start


def belongs(search: Search, stat: Stat, *, root_held: bool) -> bool:
    """Whether the process that `stat` describes bears one of the marks.

    Raises:
        _Undecided: it cannot be said right now.
    """
    # Nothing in the tree is older than its main process.
    if stat.start_time < search.main_start or stat.pid in (search.root, os.getpid(), 1):
        return False
    if _in_session(search, stat):
        return True
    if root_held and search.root is not None and proof.is_below(stat.pid, search.root):
        return True
    return _bears_mark(search, stat)


def surely_belongs(search: Search, stat: Stat, *, root_held: bool) -> bool:
    """As `belongs`, for those who cannot wait: what cannot be said right now is False."""
    try:
        return belongs(search, stat, root_held=root_held)
    except _Undecided:
        return False


EXEC_LOOKS = 5
EXEC_PAUSE = 0.002
"""How often, and after how many seconds, a process that has no environment is looked at again:
execve takes well below a millisecond, and nothing reports its end to a stranger."""

LISTINGS_MAX = 20
"""How often all processes are listed in one search: a tree that forks without end must not hold it
up for ever."""


def find(search: Search) -> list[tuple[int, Stat]]:
    """The living members: a pidfd each, which the caller closes, and what they were seen as.

    Raises:
        OSError: descriptors or memory are short, or /proc is not about our numbers (ENXIO), so that
            it cannot be said who is there.
    """
    proof.check_proc()
    found: list[tuple[int, Stat]] = []
    try:
        _find(search, found)
    except BaseException:
        _close_all(found)
        raise
    return found


def _close_all(found: list[tuple[int, Stat]]) -> None:
    for pidfd, _ in found:
        with contextlib.suppress(OSError):
            os.close(pidfd)


def _find(search: Search, found: list[tuple[int, Stat]]) -> None:
    """Who forks and ends after /proc was listed and before its turn has come leaves a child that is
    not in the list. So it is listed until nobody is new: everybody who lives then has been looked
    at, and whoever could still fork has been found."""
    root_held = search.root_pidfd >= 0 and proof.holds_number(search.root_pidfd)
    undecided: list[int] = []
    seen: set[int] = set()
    looks = 0
    for _ in range(LISTINGS_MAX):
        new = [pid for pid in all_pids() if pid not in seen]
        if not new:
            looks += 1
            if not undecided or looks == EXEC_LOOKS:
                break
            time.sleep(EXEC_PAUSE)
        seen.update(new)
        undecided = _look(search, [*undecided, *new], found, root_held=root_held)
    if found:
        _find_children(search, found)


def unreadable() -> list[int]:
    """The processes of our user whose environment may not be read: those of a user namespace above
    or beside ours.

    Raises:
        OSError: as `find`.
    """
    found = []
    for pid in all_pids():
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.geteuid():
                with open(f"/proc/{pid}/environ", "rb"):
                    pass
        except PermissionError:
            found.append(pid)
        except OSError as error:
            proof.pass_shortage(error)
    return found


WARDEN_NAME = "proctree-warden"
"""As the warden has it in /proc/PID/stat."""


def _is_another_trees_warden(search: Search, stat: Stat) -> bool:
    """Below a template, which may not have ended yet. A nested tree has our mark as well."""
    environ = (proof.read_environ(stat.pid) or b"") if stat.name == WARDEN_NAME else b""
    return environ != b"" and not proof.in_environ(environ, _VARIABLE, search.tree_id.encode())


def _find_children(search: Search, found: list[tuple[int, Stat]]) -> None:
    """What is below a member is a member, even without any mark of its own."""
    known = {stat.pid for _, stat in found}
    new = True
    while new:
        new = False
        for pid in all_pids():
            stat = None if pid in known else proof.read_stat(pid)
            if stat is None or stat.dead or stat.ppid not in known or pid == os.getpid():
                continue
            parent = next(fd for fd, member in found if member.pid == stat.ppid)
            with _Candidate(pid) as candidate:
                again = candidate.look()
                # The parent's number is its own while its pidfd says that it was not reaped.
                if again is None or _is_another_trees_warden(search, again):
                    continue
                if again.ppid == stat.ppid and proof.holds_number(parent):
                    found.append((candidate.keep(), again))
                    known.add(pid)
                    new = True


class _Candidate:
    """A pidfd that is closed unless it is kept."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = proof.open_pidfd(pid)

    def look(self) -> Stat | None:
        """Behind the pidfd: only what is true now is about the process that it names."""
        return None if self._pidfd is None else proof.read_stat(self._pid)

    def keep(self) -> int:
        pidfd, self._pidfd = self._pidfd, None
        assert pidfd is not None
        return pidfd

    def __enter__(self) -> _Candidate:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)


def _look(
    search: Search, pids: list[int], found: list[tuple[int, Stat]], *, root_held: bool
) -> list[int]:
    """One look at each; returns those that could not be decided."""
    undecided: list[int] = []
    for pid in pids:
        stat = proof.read_stat(pid)
        if stat is None or stat.dead or stat.start_time < search.main_start:
            continue
        with _Candidate(pid) as candidate:
            now = candidate.look()
            if now is None or now.start_time != stat.start_time:
                continue
            try:
                if belongs(search, now, root_held=root_held):
                    found.append((candidate.keep(), now))
            except _Undecided:
                undecided.append(pid)
    return undecided


AGAIN_SECONDS = 0.02
"""After which what failed for want of descriptors or memory is tried again."""


T = TypeVar("T")


def patiently(function: Callable[[], T]) -> T:
    """Calls it again as long as descriptors or memory are short.

    Raises:
        OSError: they are after 5 s, or it is something that does not pass.
    """
    deadline = time.monotonic() + SWEEP_SECONDS
    while True:
        try:
            return function()
        except OSError as error:
            if error.errno == errno.ENXIO or time.monotonic() >= deadline:
                raise
            time.sleep(AGAIN_SECONDS)


def sweep(search: Search) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """SIGKILL to every member until a search finds none. Returns what was ended, and what is still
    there after 5 s.

    Raises:
        OSError: as `find`, for all of the 5 s.
    """
    deadline = time.monotonic() + SWEEP_SECONDS
    errors: dict[int, int] = {}
    ended: dict[tuple[int, int], Member] = {}
    while True:
        found = patiently(lambda: find(search))
        try:
            if not found or time.monotonic() >= deadline:
                left = [to_member(stat, errors.get(stat.pid, 0)) for _, stat in found]
                left += filter(None, map(held_by_tracer, ended.values()))
                for member in left:
                    ended.pop((member.pid, member.start_time), None)
                return tuple(ended.values()), tuple(left)
            for pidfd, stat in found:
                _kill(pidfd, stat, errors)
                ended[stat.pid, stat.start_time] = to_member(stat, 0)
            _wait_any(found, min(1.0, max(deadline - time.monotonic(), 0.0)))
        finally:
            _close_all(found)


def resume(search: Search, known: Collection[tuple[int, int]]) -> None:
    """SIGCONT to every member that is stopped, and to the stopped among those that are known by pid
    and start time, and what is below them.

    Raises:
        OSError: as `find`.
    """
    found = find(search)
    try:
        seen = {stat.pid for _, stat in found}
        for pid, start_time in known:
            if pid in seen:
                continue
            with _Candidate(pid) as candidate:
                stat = candidate.look()
                if stat is not None and stat.start_time == start_time and not stat.dead:
                    found.append((candidate.keep(), stat))
        _find_children(search, found)
        for pidfd, stat in found:
            if stat.state in "Tt":
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    finally:
        _close_all(found)


def held_by_tracer(seen: Stat | Member) -> Member | None:
    """What has ended and can be reaped by nobody but its tracer (ptrace(2)), as it is now."""
    stat = proof.read_stat(seen.pid)
    if stat is None or stat.start_time != seen.start_time or not stat.dead:
        return None
    now = to_member(stat, 0)
    return now if now.tracer else None


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
        try:
            ready = poller.poll(left * 1000)
        except OSError:  # ENOMEM: the caller looks again
            time.sleep(AGAIN_SECONDS)
            return
        for pidfd, _ in ready:
            poller.unregister(pidfd)
            waiting.discard(pidfd)


def to_member(stat: Stat, error: int) -> Member:
    """`error`: errno when it could not be signalled, else 0."""
    tracer = proof.read_tracer(stat.pid) if stat.state in "tZX" else 0
    return Member(stat.pid, stat.ppid, stat.start_time, stat.state, stat.name, error, tracer)


def _members(pids: list[int]) -> tuple[Member, ...]:
    stats = [proof.read_stat(pid) for pid in pids]
    return tuple(to_member(stat, 0) for stat in stats if stat is not None and not stat.dead)


def end_cgroup(path: str, seconds: float) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """Ends all that is in a cgroup, and the cgroup. Returns what was ended, and what is still there
    after so many seconds.

    Raises:
        OSError: descriptors or memory are short, so that it cannot be said who is there.
    """
    inside: tuple[Member, ...] = ()
    with contextlib.suppress(OSError):  # what cannot be named can be ended
        inside = _members(cgroups.pids_in(path))
    gone = cgroups.end(path, seconds)
    left = [] if gone else list(_members(cgroups.pids_in(path)))
    left += filter(None, map(held_by_tracer, inside))
    still = {(member.pid, member.start_time) for member in left}
    return tuple(m for m in inside if (m.pid, m.start_time) not in still), tuple(left)
