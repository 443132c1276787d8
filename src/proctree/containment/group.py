"""The backend without a helper: fork, setsid, PR_SET_PDEATHSIG, killpg, and psutil for the rest.

It works where the warden cannot run, and it promises less: what leaves the session, loses its
parent and clears its environment gets away, and when the supervisor is SIGKILLed only the main
process goes with it.

Two traps of Linux shape it. PR_SET_PDEATHSIG fires when the parent *thread* ends, so the fork is
made by the loop's thread, which lives as long as the interpreter. And the main process is not
reaped before its group has ended: until then its number, and so its group's, can be nobody else's.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable
from functools import partial

from proctree import events, registry
from proctree.command import Command
from proctree.containment.base import (
    MEMBERS_REPORTED,
    NOBODY,
    WANT_NOTHING,
    Contained,
    Descriptors,
    Owner,
    Wanted,
    proc_trouble,
)
from proctree.errors import errno_name, start_error, step
from proctree.lifecycle import Event
from proctree.loop import READ, Loop, Timer
from proctree.policy import KillPolicy, Scope, Stage
from proctree.process import child, fds, prctl, proof
from proctree.process.exit_status import status_from_pidfd
from proctree.process.proof import Stat
from proctree.process.sweep import (
    AGAIN_SECONDS,
    Search,
    find,
    held_by_tracer,
    surely_belongs,
    sweep,
    to_member,
)
from proctree.protocol import STEPS
from proctree.records import Member, Usage
from proctree.worker import Worker

TRACER_PAUSE_FIRST = 0.05
TRACER_PAUSE_LAST = 2.0
"""Seconds until a zombie that is held by its tracer (ptrace(2)) is looked at again, ever less
often: its pidfd says that it has ended, and nothing says that it can be reaped."""


class GroupContained(Contained):
    name = "group"

    def __init__(self, tree_id: str, wanted: Wanted = WANT_NOTHING) -> None:
        super().__init__(tree_id, wanted)
        self._entry: registry.Held | None = None
        self._loop: Loop
        self._owner: Owner
        self._command: Command
        self._report = -1
        self._main_pidfd = -1
        self._frozen = False
        self._main_start = 0
        self._main_exited = False
        self._reaped = False
        self._serial = 0
        self._empty = False
        self._closed = False
        self._killing = False
        self._watched: dict[int, tuple[int, Stat]] = {}
        self._unsent: deque[tuple[int, Stage, bool, bool, int]] = deque()
        self._unsearchable = False
        self._traced: list[Stat] = []
        self._tracer_pause = TRACER_PAUSE_FIRST
        self._tracer_timer: Timer | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        if not hasattr(os, "pidfd_open"):
            return "this Python was built without pidfd_open"
        return proc_trouble()

    @classmethod
    def unfit(cls, wanted: Wanted) -> str | None:
        if not wanted.new_session:
            return "a foreground job needs the warden, which takes the terminal back"
        if wanted.template is not None:
            return "a template forks wardens, and this is the backend without one"
        if wanted.keep is not None:
            return "a durable run lives on with its warden, and this is the backend without one"
        return super().unfit(wanted)

    # -- making it

    def spawn(self, command: Command, stdio: Descriptors, policy: KillPolicy) -> None:
        self._command = command.without_environment()
        calls = prctl.load()
        parent = os.getpid()
        pid = -1
        pipes: list[int] = []
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with step("descriptors"):
                reader, writer = pipes[:] = fds.pipe()
                gate, opener = pipes[2:] = fds.pipe()
            with step("fork"):
                pid = os.fork()
            if pid == 0:
                child.run_forked(
                    command,
                    stdio,
                    calls,
                    parent,
                    writer,
                    (reader, opener),
                    gate,
                )
            # Another thread of the host may be in waitpid(-1): the child must not end before
            # its pidfd is open.
            with step("pidfd"):
                self._main_pidfd = fds.own(os.pidfd_open(pid))
            with step("proc"):
                stat = proof.read_stat(pid)
            self._main_start = stat.start_time if stat else 0
            os.set_blocking(reader, False)
            self._register(command, pid)
            self._report = fds.own(reader)
            pipes.remove(reader)
            os.write(opener, b"g")
            self.pid = pid
        except BaseException:
            while pipes:
                os.close(pipes.pop())
            if pid > 0:
                # Its gate is closed, so it ends at once, and nobody else will reap it.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            self._forget_child()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for fd in pipes:
                os.close(fd)

    def _forget_child(self) -> None:
        """What there is of ours for a child that never was the main process."""
        self._unregister()
        for fd in (self._main_pidfd, self._report):
            if fd >= 0:
                fds.close(fd)
        self._main_pidfd = self._report = -1

    def _register(self, command: Command, pid: int) -> None:
        """Nobody but us can hold the entry, so it is of use when we die, and not before."""
        folder = registry.directory()
        if folder is not None:
            path = registry.path_of(folder, self.tree_id)
            text = registry.record(self.tree_id, command.name, self.name, None)
            self._entry = registry.Held.enter(path, text, (pid, self._main_start))

    def _unregister(self) -> None:
        if self._entry is not None:
            self._entry.leave()
            self._entry = None

    def attach(self, loop: Loop, owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        self._loop.register(self._report, READ, self._reported)

    def _reported(self, _mask: int) -> None:
        """The child has become the command (end of file), or says why not."""
        data = os.read(self._report, child.REPORT.size)
        self._loop.unregister(self._report)
        fds.close(self._report)
        self._report = -1
        if not data:
            self._owner.happened(Event.STARTED)
            self._loop.register(self._main_pidfd, READ, self._main_ended)
            return
        number, step = child.REPORT.unpack(data)
        name = STEPS.get(step, f"step {step}")
        cwd = None if self._command.cwd is None else os.fsdecode(self._command.cwd)
        error = start_error(number, name, self._command.program, cwd)

        def ended(_mask: int) -> None:
            self._reap_late()
            self._owner.could_not_start(error, f"{name}: {errno_name(number)}")

        self._loop.register(self._main_pidfd, READ, ended)

    # -- what happens

    def _peek(self) -> int | None:
        """The wait status of the main process, which stays a zombie and so keeps its number.

        Raises:
            BlockingIOError: its tracer has not let go of it yet.
        """
        try:
            info = os.waitid(os.P_PIDFD, self._main_pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            # SIGCHLD is ignored here, or another waitpid(-1) took it.
            self._reaped = True
            status = status_from_pidfd(self._main_pidfd)
            if status is None:
                events.warning("status.stolen", tree_id=self.tree_id, pid=self.pid)
            return status
        if info is None:
            raise BlockingIOError
        if info.si_code == os.CLD_EXITED:
            return info.si_status << 8
        return info.si_status | (0x80 if info.si_code == os.CLD_DUMPED else 0)

    def _main_ended(self, _mask: int = READ) -> None:
        self._loop.unregister(self._main_pidfd)
        try:
            status = self._peek()
        except BlockingIOError:
            self._look_again(self._main_ended)
            return
        self._main_exited = True
        members = self._find()
        leftovers = tuple(to_member(stat, 0) for _, stat in (members or ())[:MEMBERS_REPORTED])
        self._watch(members or [])
        # What cannot be looked up may be there.
        empty = members is not None and not members
        self._owner.happened(Event.MAIN_EXITED, status=status, leftovers=leftovers, empty=empty)
        self._look_for_empty()

    def _search(self) -> Search:
        main = None if self._reaped else self.pid
        return Search(self.pid, self._main_pidfd, main, self._main_start, self.tree_id)

    def _find(self) -> list[tuple[int, Stat]] | None:
        """Everything that bears a mark of the tree, the main process left out; None when we have
        not the descriptors or the memory to say."""
        try:
            return find(self._search())
        except OSError as error:
            if not self._unsearchable:
                self._unsearchable = True
                number = errno_name(error.errno or 0)
                events.warning("tree.unsearchable", tree_id=self.tree_id, errno=number)
            return None

    def _again(self, function: Callable[[], None]) -> None:
        """After a want of descriptors or memory, which is as a rule a short one."""

        def unless_closed() -> None:
            if not self._closed:
                function()

        self._loop.call_later(AGAIN_SECONDS, unless_closed)

    def _watch(self, members: list[tuple[int, Stat]]) -> None:
        """Their ends are events from now on. Once the tree gets SIGKILL, whoever is new was forked
        while that went round: it gets it too, and another search looks for what it has forked."""
        known = {(stat.pid, stat.start_time) for _, stat in self._watched.values()}
        fresh = False
        for pidfd, stat in members:
            if (stat.pid, stat.start_time) in known or self._closed:
                os.close(pidfd)
                continue
            fresh = True
            self._watched[fds.own(pidfd)] = (pidfd, stat)
            self._loop.register(pidfd, READ, partial(self._member_ended, pidfd))
            if self._killing:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if self._killing and fresh:
            self._loop.post(self._watch_new)

    def _watch_new(self) -> None:
        if self._empty or self._closed:
            return
        members = self._find()
        if members is None:
            self._again(self._watch_new)
        else:
            self._watch(members)

    def _member_ended(self, pidfd: int, _mask: int) -> None:
        _, stat = self._watched[pidfd]
        try:
            held = held_by_tracer(stat) is not None
        except OSError:
            held = True  # it is looked at again before the tree is called empty
        if held:
            self._traced.append(stat)
        self._forget(pidfd)
        self._look_for_empty()

    def _forget(self, pidfd: int) -> None:
        del self._watched[pidfd]
        self._loop.unregister(pidfd)
        fds.close(pidfd)

    def _look_for_empty(self) -> None:
        """Empty, as far as this backend can know: the main process has ended, so have all members
        that were found, and a fresh search finds none."""
        if not self._main_exited or self._watched or self._empty or self._closed:
            return
        members = self._find()
        if members is None:
            self._again(self._look_for_empty)
            return
        if members:
            self._watch(members)
            return
        try:
            self._traced = [stat for stat in self._traced if held_by_tracer(stat) is not None]
        except OSError:
            self._again(self._look_for_empty)
            return
        if self._traced or not self._reap():
            self._look_again(self._look_for_empty)
            return
        self._empty = True
        self._owner.happened(Event.EMPTY)

    def _look_again(self, look: Callable[[], None]) -> None:
        """After a while: for zombies that only their tracers can take away."""
        if self._tracer_timer is not None:
            self._tracer_timer.cancel()
        self._tracer_timer = self._loop.call_later(self._tracer_pause, look)
        self._tracer_pause = min(2 * self._tracer_pause, TRACER_PAUSE_LAST)

    def _reap(self) -> bool:
        """Reaps the main process, which has ended; False as long as a tracer holds it."""
        if self._main_pidfd < 0 or self.pid is None:
            return True
        if not self._reaped:
            try:
                reaped, _, usage = os.wait4(self.pid, os.WNOHANG)
            except ChildProcessError:
                pass  # SIGCHLD is ignored here, or another waitpid(-1) took it.
            else:
                if not reaped:
                    return False
                self.usage = Usage(usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024)
            self._reaped = True
        self._loop.unregister(self._main_pidfd)
        fds.close(self._main_pidfd)
        self._main_pidfd = -1
        return True

    def _reap_late(self) -> None:
        """Reaps it when that can be done, whatever has become of the tree meanwhile."""
        self._loop.unregister(self._main_pidfd)
        if not self._reap():
            self._look_again(self._reap_late)

    # -- what is done

    def _signal_group(self, signo: int) -> bool:
        """killpg, while the number is certainly ours: the main process has not been reaped. A host
        program that takes it away from us makes killpg inexact, so then nothing is sent."""
        if self.pid is None or self._reaped or not self._still_ours():
            return False
        try:
            os.killpg(self.pid, signo)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            self._denied(-self.pid, error)
        return True

    def _denied(self, pid: int, error: OSError) -> None:
        name = errno_name(error.errno or 0)
        events.warning("signal.denied", tree_id=self.tree_id, pid=pid, errno=name)

    def _still_ours(self) -> bool:
        return self._main_pidfd >= 0 and proof.holds_number(self._main_pidfd)

    def send(self, stage: Stage, *, resume: bool) -> int:
        self._serial += 1
        self._send(self._serial, stage, resume)
        self._loop.post(self._look_for_empty)
        return self._serial

    def _send(self, serial: int, stage: Stage, resume: bool) -> None:
        if stage.scope is Scope.MAIN:
            self._owner.sent(serial, *self._send_main(stage, resume=resume))
            return
        self._killing |= stage.ends_everything
        members = None if self._unsent else self._find()
        main = self._main_stat()
        group_done = self._signal_group(stage.signal)
        count = int(group_done and not self._main_exited)
        if group_done and resume:
            _resume(self._main_pidfd, main)
        if members is None:
            # In the order in which it was asked for: a SIGSTOP must not come after its SIGCONT.
            self._unsent.append((serial, stage, resume, group_done, count))
            self._owner.sent(serial, count, 0)
            if len(self._unsent) == 1:
                self._again(self._send_unsent)
            return
        self._send_members(members, serial, stage, resume, group_done, count)

    def _send_unsent(self) -> None:
        while self._unsent:
            members = self._find()
            if members is None:
                self._again(self._send_unsent)
                return
            self._send_members(members, *self._unsent.popleft())

    def _send_members(
        self,
        members: list[tuple[int, Stat]],
        serial: int,
        stage: Stage,
        resume: bool,
        group_done: bool,
        count: int,
    ) -> None:
        denied = 0
        for pidfd, stat in members:
            in_group = stat.pgrp == self.pid
            if stage.scope is Scope.GROUP and not in_group:
                continue
            try:
                signal.pidfd_send_signal(pidfd, 0 if in_group and group_done else stage.signal)
                count += 1
                if resume:
                    _resume(pidfd, stat)
            except ProcessLookupError:
                pass
            except OSError as error:
                denied += 1
                self._denied(stat.pid, error)
        self._watch(members)
        self._owner.sent(serial, count, denied)

    def _send_main(self, stage: Stage, *, resume: bool) -> tuple[int, int]:
        if self._main_exited or self._main_pidfd < 0:
            return 0, 0
        main = self._main_stat()
        try:
            signal.pidfd_send_signal(self._main_pidfd, stage.signal)
        except ProcessLookupError:
            return 0, 0
        except OSError:
            return 0, 1
        if resume:
            _resume(self._main_pidfd, main)
        return 1, 0

    def _main_stat(self) -> Stat | None:
        """As long as it has not ended, and we have what is needed to see it."""
        with contextlib.suppress(OSError):
            return None if self._main_exited or self.pid is None else proof.read_stat(self.pid)
        return None

    def set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        self.send(Stage(signal.SIGSTOP if frozen else signal.SIGCONT), resume=False)

    def survey(self) -> None:
        try:
            survivors = self._survivors()
        except OSError:
            self._again(self.survey)
            return
        self._loop.post(lambda: self._owner.happened(Event.SURVEYED, survivors=survivors))

    def _survivors(self) -> tuple[Member, ...]:
        members = find(self._search())
        try:
            survivors = [
                to_member(stat, _signal_error(pidfd)) for pidfd, stat in members[:MEMBERS_REPORTED]
            ]
            survivors += filter(None, map(held_by_tracer, self._traced))
            if not self._main_exited and self.pid is not None:
                main = proof.read_stat(self.pid)
                if main is not None:
                    survivors.insert(0, to_member(main, 0))
        finally:
            for pidfd, _ in members:
                os.close(pidfd)
        return tuple(survivors)

    def sweep(self) -> None:
        """SIGKILL to whatever can be found: to a main process also that has not executed its
        program yet, and for which every stage has waited."""
        search = self._search()._replace(root=None, root_pidfd=-1)

        def work() -> None:
            try:
                _ended, survivors = sweep(search)
            except OSError:
                return  # who is there cannot be said, and the lifecycle's timer reports that
            self._loop.post(lambda: self._owner.happened(Event.SURVEYED, survivors=survivors))

        Worker().post(work)

    def release(self) -> None:
        if self._frozen:
            # Nobody would be left who could let it go on.
            self._send(0, Stage(signal.SIGCONT), resume=False)
        self.close()

    def root(self) -> int | None:
        return None if self._reaped else self.pid

    def has_member(self, pid: int) -> bool:
        """By the marks (see sweep.py). One that is in the middle of an execve(2) and bears no other
        than its environment, which it has not yet, is taken for a stranger."""
        if self._main_pidfd < 0:
            return False
        if pid == self.root():
            return proof.holds_number(self._main_pidfd)
        stat = proof.read_stat(pid)
        search = self._search()
        root_held = proof.holds_number(self._main_pidfd)
        member = stat is not None and surely_belongs(search, stat, root_held=root_held)
        # Behind the look: what descends from a number that is somebody else's is no member.
        return member and (not root_held or proof.holds_number(self._main_pidfd))

    def close(self) -> None:
        self._closed = True
        self._unregister()
        self._owner = NOBODY
        if self._tracer_timer is not None:
            self._tracer_timer.cancel()
        for pidfd in list(self._watched):
            self._forget(pidfd)
        if self._report >= 0:
            self._loop.unregister(self._report)
            fds.close(self._report)
            self._report = -1
        if self._main_pidfd >= 0:
            self._loop.unregister(self._main_pidfd)
            if self._main_exited:
                self._reap_late()
            else:
                self._loop.register(self._main_pidfd, READ, lambda _mask: self._reap_late())


def _resume(pidfd: int, before: Stat | None) -> None:
    """One that was stopped before it was signalled; what it has done since is its answer."""
    if before is not None and before.state in "Tt":
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def _signal_error(pidfd: int) -> int:
    """errno when the process may not be signalled, else 0."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return 0
    except OSError as error:
        return error.errno or 0
    return 0
