"""The default backend: one small C process per tree, which outlives us for as long as that takes.

See src/warden/warden.c. The warden does mechanism: it signals exactly, reaps, and proves by ECHILD
that the tree is empty. Which signal when is decided here, by the lifecycle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from proctree import events, protocol, registry
from proctree.command import Command
from proctree.containment.base import (
    MEMBERS_REPORTED,
    NOBODY,
    WANT_NOTHING,
    Contained,
    Descriptors,
    Owner,
    Request,
    Source,
    Wanted,
    proc_trouble,
)
from proctree.errors import ContainmentUnavailable, errno_name, start_error, step
from proctree.lifecycle import Event
from proctree.loop import READ, Loop
from proctree.policy import KillPolicy, Scope, Stage
from proctree.process import fds, proof
from proctree.protocol import Message, ProtocolError, RawMember, Type
from proctree.records import Member, Reason, Usage

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes
    from proctree.containment.forking import Birth
    from proctree.containment.reaching import Link

WARDEN_VARIABLE = "PROCTREE_WARDEN"
"""Environment variable: another warden binary, for packagers and for sanitizer builds."""


TRACER_PAUSE = 1.0
"""Seconds until a warden that has ended and is held by a tracer is looked at again."""

REAPER_PAUSE = 0.01
REAPER_PATIENCE = 1.0
"""Seconds until a warden is looked at again that another process reaps, and after which it is left
to that."""

COME_BACK_SECONDS = 10.0
"""How long a warden that lives may take to answer before it counts as lost."""

COME_BACK_PAUSE = 0.02
"""Seconds between two tries to reach one that lives."""

SAY_AGAIN_SECONDS = 0.02
UNSAID_MAX = 256
"""How often a message that could not be sent is sent again, and how many wait at most."""

_DEFAULT_PATH = os.path.join(os.path.dirname(os.path.dirname(__file__)), "proctree-warden")
_found: set[tuple[int, str]] = set()
"""(our pid, path) for which a warden was found usable: looked up once, and anew after a fork."""


def warden_path() -> str:
    """Where the helper is: beside the package."""
    return os.environ.get(WARDEN_VARIABLE, _DEFAULT_PATH)


def _usage(user_us: int, system_us: int, *others: int) -> Usage:
    return Usage(user_us / 1e6, system_us / 1e6, *others)


def _send_start(control: socket.socket, start: bytes) -> None:
    # One that is gone already has said why, which is read when it is listened to.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), step("control"):
        control.send(start)


def _note(text: str) -> bytes:
    """As much as there is room for, in whole characters; what is none is written out."""
    data = text[: protocol.NOTE_MAX].encode("utf-8", "backslashreplace")[: protocol.NOTE_MAX]
    return data.decode("utf-8", "ignore").encode()


def _member(raw: RawMember) -> Member:
    return Member(raw.pid, raw.ppid, raw.start_time, raw.state, raw.name, raw.error, raw.tracer)


def _attribute_arguments(attributes: SpawnAttributes) -> list[bytes]:
    """As options.c reads them."""
    numbers = {
        "umask": attributes.umask,
        "nice": attributes.nice,
        "ionice": attributes.ionice_value,
        "oom": attributes.oom_score_adj,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "nonewprivs": 1 if attributes.no_new_privs else None,
    }
    lists = {"groups": attributes.groups, "affinity": attributes.affinity}
    texts = [f"{name}={value}" for name, value in numbers.items() if value is not None]
    texts += [f"{k}={','.join(map(str, v))}" for k, v in lists.items() if v is not None]
    texts += [f"rlimit={','.join(map(str, limit))}" for limit in attributes.rlimits]
    return [text.encode() for text in texts]


class WardenContained(Contained):
    name = "warden"
    cgroup: str | None = None

    def __init__(self, tree_id: str, wanted: Wanted = WANT_NOTHING) -> None:
        super().__init__(tree_id, wanted)
        self._entry: str | None = None
        self._then: Callable[[], None] | None = None
        self._warden = -1
        self._pidfd = -1
        self._control: socket.socket | None = None
        self._unsaid: deque[bytes] = deque(maxlen=UNSAID_MAX)
        self._unreachable = False
        self._loop: Loop
        self._owner: Owner
        self._command: Command
        self._serial = 0
        self._survey_serial = 0
        self._members: list[Member] = []
        self._main_start = 0
        self._main_exited = False
        self._started = False
        self._leftovers: tuple[Member, ...] = ()
        self._said_empty = False
        self._released = False
        self._obeyed = False
        self.owns = True
        """Whether we may signal it: of a tree that is kept, one supervisor at a time."""
        self.place = ""
        """The directory of a tree that is kept: there its warden is reached again."""
        self.when_owner: Callable[[bool], None] | None = None
        """Called on the loop's thread with `owns`, when that has changed."""
        self._frozen = False
        self._thaw_serial = 0
        self._reaped = False
        self._lost = False
        self._template = wanted.template
        self._start = b""
        self._reaper_lost = False
        self._disconnected = ""
        self._reaper_due: float | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        path = warden_path()
        key = (os.getpid(), path)
        if key in _found:
            return None
        if not os.access(path, os.X_OK):
            return f"the helper {path} is missing or not executable"
        trouble = proc_trouble()
        if trouble is None:
            _found.add(key)
        return trouble

    # -- making it

    def spawn(self, command: Command, stdio: Descriptors, policy: KillPolicy) -> None:
        self._command = command.without_environment()
        with step("control"):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control = fds.above_stdio(theirs.detach())
        try:
            ours.setblocking(False)
            fds.own(ours.fileno())
            start = protocol.encode_start(policy.stages)
            if self._template is not None:
                self._ask_template(self._template, command, stdio, control)
                self._start = start
            else:
                self._make_warden(command, stdio, control)
                # The warden waits for this message, so it was alive when its pidfd was opened, and
                # the pidfd cannot be that of a process which was given its number.
                _send_start(ours, start)
            self._control = ours
        except BaseException:
            fds.close(ours.detach())
            if self._warden >= 0:
                # It had no START, so it ends at this end of file, and nobody else will reap it.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self._warden, 0)
            if self._pidfd >= 0:
                fds.close(self._pidfd)
                self._pidfd = -1
            raise
        finally:
            os.close(control)

    def _make_warden(self, command: Command, stdio: Descriptors, control: int) -> None:
        if command.function is None:
            self._warden = self._spawn_command(command, stdio, control)
        else:
            self._warden = self._fork_callable(command, stdio, control)
        with step("pidfd"):
            self._pidfd = fds.own(os.pidfd_open(self._warden))

    def _arguments(self, command: Command, control: int) -> list[bytes]:
        arguments = [
            b"proctree-warden: " + command.name.encode("utf-8", "surrogateescape"),
            b"control=%d" % control,
            b"supervisor=%d" % os.getpid(),
        ]
        if command.pass_fds:
            arguments.append(b"pass=" + b",".join(b"%d" % fd for fd in command.pass_fds))
        if command.terminal:
            arguments.append(b"terminal=1")
        if not command.new_session:
            arguments.append(b"keepsession=1")
        if command.attributes is not None and not command.is_forked:
            arguments += _attribute_arguments(command.attributes)
        if self.wanted.keep is not None:
            arguments += self.wanted.keep.arguments()
        return arguments + self._registry_arguments(command)

    @property
    def _keeps(self) -> bool:
        """Whether the tree lives on when we are gone."""
        return self.wanted.keep is not None

    @property
    def _kept(self) -> tuple[int, ...]:
        """Descriptors that are the warden's and not the tree's."""
        return () if self.wanted.keep is None else self.wanted.keep.descriptors

    def _registry_arguments(self, command: Command) -> list[bytes]:
        folder = registry.directory()
        if folder is None:
            return []
        self._entry = registry.path_of(folder, self.tree_id)
        text = registry.record(self.tree_id, command.name, self.name, self.cgroup)
        return [b"entry=" + os.fsencode(self._entry), b"record=" + text.encode()]

    def _spawn_command(self, command: Command, stdio: Descriptors, control: int) -> int:
        arguments = self._arguments(command, control)
        if command.cwd is not None:
            arguments.append(b"cwd=" + command.cwd)
        actions = [
            (os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio) if fd is not None
        ]
        inherited = (control, *self._kept, *command.pass_fds)
        actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
        # A foreground job's warden is in our session: in our group, the terminal's Ctrl-C would
        # reach it before it can ignore it.
        group = {} if command.new_session else {"setpgroup": 0}
        # posix_spawn(3) uses CLONE_VFORK: its cost does not grow with our memory, and no Python
        # runs between fork and exec.
        with step("warden"):
            return os.posix_spawn(
                warden_path(),
                [*arguments, b"--", *command.argv],
                command.env,
                file_actions=actions,
                **group,  # type: ignore[arg-type]
            )

    def _fork_callable(self, command: Command, stdio: Descriptors, control: int) -> int:
        """We fork once; that child forks the callable and becomes its warden by exec."""
        from proctree.containment.forking import become_warden
        from proctree.process import prctl

        calls = prctl.load()
        arguments = self._arguments(command, control)
        birth = self._birth()
        birth.prepare()
        path = warden_path()
        # Nothing may interrupt the children before they have put their signals in order.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with step("fork"), fds.sparing(self._kept):
                pid = os.fork()
            if pid == 0:
                kept = self._kept
                become_warden(birth, path, arguments, command, stdio, control, calls, kept)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def _birth(self) -> Birth:
        """What a function is born into."""
        from proctree.containment.forking import Birth

        return Birth()

    # -- having a template make it

    def _ask_template(
        self, template: Source, command: Command, stdio: Descriptors, control: int
    ) -> None:
        arguments = self._arguments(command, control)
        request = Request(command, self._birth(), warden_path(), arguments, stdio, control)
        template.ask(request, self)

    def born(self, pid: int, pidfd: int) -> None:
        """The template has forked our warden, which waits for START."""
        self._warden, self._pidfd = pid, fds.own(pidfd)
        self._listen()
        assert self._control is not None
        _send_start(self._control, self._start)

    def stillborn(self, error: Exception) -> None:
        """It never will."""
        if self._control is not None:
            self._said_empty = True
            self._drop_control()
            self._owner.could_not_start(error, str(error))

    def reaped(self) -> None:
        """Our warden has been reaped by the template."""
        if self._then is not None:
            self._look_for_end()
        elif self._owner is NOBODY:
            self._reap()

    def reaper_lost(self) -> None:
        """The template has ended: our warden is its warden's child, which reaps it and tells
        nobody."""
        self._reaper_lost = True
        if self._then is not None:
            self._wait_for_reaper()

    def _wait_for_reaper(self) -> None:
        self._reaper_due = time.monotonic() + REAPER_PATIENCE
        self._look_for_end()

    def _reaped_elsewhere(self) -> bool:
        """It is not our child. When the template and its warden are both gone, it is that of an
        init which takes its time, and of which it is not our business to wait for."""
        if not proof.holds_number(self._pidfd):
            return True
        if self._reaper_due is None or time.monotonic() < self._reaper_due:
            return False
        return self._has_ended()

    def _has_ended(self) -> bool:
        try:
            return proof.has_ended(self._pidfd)
        except OSError as error:
            # Not as far as we know, then: the loop, which watches the same pidfd, will tell.
            if error.errno != errno.ENOMEM:
                raise
            return False

    def _look_for_end(self) -> None:
        if self._reap():
            then, self._then = self._then, None
            if then is not None:
                then()
        elif self._reaper_lost:
            self._loop.call_later(REAPER_PAUSE, self._look_for_end)

    # -- what the warden says

    def attach(self, loop: Loop, owner: Owner) -> None:
        self._loop = loop
        self._owner = owner
        if self._pidfd >= 0:
            self._listen()

    def _listen(self) -> None:
        assert self._control is not None
        self._loop.register(self._control.fileno(), READ, self._readable)
        # Its end of file alone is no proof: a copy of its end may live on in a process that was
        # forked at the wrong moment by something other than this interpreter.
        self._loop.register(self._pidfd, READ, self._warden_ended)

    def _readable(self, _mask: int) -> None:
        # Bounded, so that a warden that floods us does not keep the loop from other trees.
        for _ in range(64):
            if not self._read_once():
                return

    def _read_once(self) -> bool:
        """False when there is nothing more to read now."""
        if self._control is None or self._lost or self._said_empty:
            return False
        try:
            data = self._control.recv(protocol.MAX_MESSAGE)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # It ended and had not read all that we said. The kernel tells that before what the
            # other end had said, and tells it once.
            return True
        except OSError as error:
            self._lose(f"the warden's socket failed ({errno_name(error.errno or 0)})")
            return False
        if not data:
            self._lose("the warden ended before its tree did")
            return False
        if self._released:
            return True  # read only so that it can go on, and comes to what we have said
        try:
            self._take(protocol.decode(data))
        except ProtocolError as error:
            self._lose(f"the warden sent garbage: {error}")
            return False
        return True

    def _warden_ended(self, _mask: int) -> None:
        while self._read_once():
            pass  # what it said last comes before its end, however much it is: it says no more
        if self._released:
            self._released_warden_ended()
            return
        if not self._said_empty and not self._lost:
            self._lose("the warden ended before its tree did")
        if self._then is None:
            self._loop.unregister(self._pidfd)
        else:
            then, self._then = self._then, None
            self._reap_late()
            then()

    def _take(self, message: Message) -> None:
        self._TAKE[message.type](self, message)

    def _take_started(self, message: Message) -> None:
        if self._started:
            return  # we have come back, and were told before
        self.pid, self._main_start = self._main(message)
        self._started = True
        self._owner.happened(Event.STARTED)

    def _main(self, message: Message) -> tuple[int | None, int]:
        """The main process with our number, if it has one, and its start time by our clock."""
        pid, _, start_time = message.values
        return pid, start_time

    def _take_exec_failed(self, message: Message) -> None:
        number, step = message.values
        name = protocol.STEPS.get(step, f"step {step}")
        cwd = None if self._command.cwd is None else os.fsdecode(self._command.cwd)
        error = start_error(number, name, self._command.program, cwd)
        self._fail(error, f"{name}: {errno_name(number)}")

    def _fail(self, error: Exception, detail: str) -> None:
        self._said_empty = True
        self._when_reaped(lambda: self._owner.could_not_start(error, detail))

    def _take_attached(self, message: Message) -> None:
        self._own(bool(message.flags & protocol.ATTACHED_OWNER))

    def _own(self, owned: bool) -> None:
        changed, self.owns = owned != self.owns, owned
        if changed and self.when_owner is not None:
            self.when_owner(owned)

    def _take_exited(self, message: Message) -> None:
        if self._main_exited:
            return  # we have come back, and were told before
        status, some_left, *usage = message.values
        self.exit_usage = _usage(*usage)
        self._main_exited = True
        leftovers, self._members = tuple(self._members), []
        self._leftovers = leftovers
        self._owner.happened(
            Event.MAIN_EXITED, status=status, leftovers=leftovers, empty=not some_left
        )

    def _take_members(self, message: Message) -> None:
        room = MEMBERS_REPORTED - len(self._members)
        self._members += [_member(raw) for raw in message.members[:room]]
        if message.serial == 0 or message.flags & protocol.MEMBERS_MORE:
            return
        members, self._members = tuple(self._members), []
        if message.serial == self._survey_serial:
            self._owner.happened(Event.SURVEYED, survivors=members)

    def _take_signalled(self, message: Message) -> None:
        count, denied = message.values
        if message.serial == self._thaw_serial:
            self._frozen = False
        self._owner.sent(message.serial, count, denied)

    def _take_denied(self, message: Message) -> None:
        pid, number = message.values
        events.warning("signal.denied", tree_id=self.tree_id, pid=pid, errno=errno_name(number))

    def _take_asked(self, message: Message) -> None:
        signo, pid, uid = message.values
        detail = f"the warden got signal {signo} from pid {pid} (uid {uid})"
        self._owner.happened(Event.KILL, reason=Reason.KILLED, detail=detail, policy=None)

    def _take_empty(self, message: Message) -> None:
        _reaped, *usage = message.values
        self.usage = _usage(*usage)
        self._said_empty = True
        self._when_reaped(lambda: self._owner.happened(Event.EMPTY))

    def _take_stopped(self, message: Message) -> None:
        (signo,) = message.values
        self._owner.stopped(signo)

    def _take_fault(self, message: Message) -> None:
        number, step = message.values
        name = protocol.STEPS.get(step, f"step {step}")
        text = f"the warden failed at step {name!r}: {errno_name(number)}"
        if name == "registry":
            events.warning("registry.failed", file=self._entry, errno=errno_name(number))
        elif self._started or name == "record":
            events.error("warden.fault", tree_id=self.tree_id, step=name, errno=errno_name(number))
        else:
            self._fail(ContainmentUnavailable(text), text)

    _TAKE: ClassVar[dict[Type, Callable[[Any, Message], None]]] = {
        Type.STARTED: _take_started,
        Type.EXEC_FAILED: _take_exec_failed,
        Type.ATTACHED: _take_attached,
        Type.EXITED: _take_exited,
        Type.MEMBERS: _take_members,
        Type.SIGNALLED: _take_signalled,
        Type.DENIED: _take_denied,
        Type.ASKED: _take_asked,
        Type.EMPTY: _take_empty,
        Type.FAULT: _take_fault,
        Type.STOPPED: _take_stopped,
    }

    def _lose(self, detail: str) -> None:
        self._drop_control()
        if self._released:
            return  # its end is awaited
        # It may end while we try to come back: why we had to is what counts.
        self._disconnected = self._disconnected or detail
        if self._keeps and not self._has_ended():
            self._come_back(time.monotonic() + COME_BACK_SECONDS)
            return
        self._lost = True
        self._owner.happened(Event.LOST, detail=self._disconnected)

    def _come_back(self, due: float) -> None:
        """A warden that keeps its tree lets go of those who do not read for a while, as a process
        does that is stopped or very busy.

        Args:
            due: of `time.monotonic`; by then it has taken us back, or cannot be reached.
        """
        if self._given_up:
            return
        from proctree.containment.reaching import reach
        from proctree.worker import Worker

        def work() -> None:
            found: Link | OSError
            try:
                found = reach(self.place, own=True, timeout=max(0.0, due - time.monotonic()))
            except OSError as error:
                found = error
            self._loop.post(lambda: self._back(found, due))

        Worker().post(work)

    def _back(self, found: Link | OSError, due: float) -> None:
        if self._given_up:
            if not isinstance(found, OSError):
                found.close()
        elif not isinstance(found, OSError):
            self._take_back(found)
        elif time.monotonic() < due:
            # Descriptors or memory may be short; or it does not listen yet, or not any more: behind
            # the record of its tree's end it lives on for a moment, and its pidfd, which is
            # watched, tells when it has gone.
            self._loop.call_later(COME_BACK_PAUSE, lambda: self._come_back(due))
        else:
            self._unreached(found)

    @property
    def _given_up(self) -> bool:
        """Nobody wants it back any more, or there is nothing to come back to."""
        return self._owner is NOBODY or self._lost or self._reaped

    def _take_back(self, link: Link) -> None:
        fds.close(link.pidfd)
        self._disconnected = ""
        self._control = link.control
        self._loop.register(link.control.fileno(), READ, self._readable)
        self._own(link.owned)
        self._say_all()

    def _unreached(self, error: OSError) -> None:
        if not self._has_ended():
            # It keeps its tree, and its lease decides: nothing is swept.
            number = errno_name(error.errno or 0)
            events.warning("durable.disconnected", tree_id=self.tree_id, errno=number)
            self.owns = False
            self._owner.happened(Event.DETACHED, detail="its warden cannot be reached")
        self._lost = True
        self._owner.happened(Event.LOST, detail=self._disconnected)

    # -- the warden's own end

    def _drop_control(self) -> None:
        if self._control is not None:
            self._loop.unregister(self._control.fileno())
            fds.close(self._control.detach())
            self._control = None

    def _when_reaped(self, then: Callable[[], None]) -> None:
        """`then` comes after the warden itself has been reaped, so that a tree which is reported as
        gone has left nothing at all behind."""
        self._drop_control()
        if self._reap():
            then()
            return
        self._then = then
        self._loop.unregister(self._pidfd)
        if self._template is None:
            self._loop.register(self._pidfd, READ, self._warden_ended)
        elif self._reaper_lost:
            self._wait_for_reaper()

    def _reap(self) -> bool:
        if not self._reaped:
            if self._template is not None and not self._reaped_elsewhere():
                return False
            try:
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                pass  # SIGCHLD is ignored here, or another waitpid(-1) took it: it is gone.
            else:
                if result is None:
                    return False
                self._obeyed = (result.si_code, result.si_status) == (os.CLD_EXITED, 0)
            self._let_go_of_warden()
        return True

    def _let_go_of_warden(self) -> None:
        """It has been reaped, or that is no business of ours."""
        self._reaped = True
        self._loop.unregister(self._pidfd)
        fds.close(self._pidfd)
        self._pidfd = -1

    def _reap_late(self) -> None:
        """It has ended. If it cannot be reaped, then somebody traces it, and nothing will tell when
        he lets go of it (ptrace(2))."""
        if not self._reap():
            self._loop.unregister(self._pidfd)
            self._loop.call_later(TRACER_PAUSE, self._reap_late)

    def _kill_warden(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # -- what we say

    def _say(self, data: bytes) -> None:
        self._unsaid.append(data)
        if len(self._unsaid) == 1:
            self._say_all()

    def _say_all(self) -> None:
        while self._unsaid and self._control is not None:
            try:
                self._control.send(self._unsaid[0])
            except (BrokenPipeError, ConnectionResetError):
                return  # it has just ended: what it said last, or its end of file, is on its way
            except OSError as error:
                # Full, for a warden that does not read, or there is no memory for the message. A
                # SIGKILL that was not sent would make survivors of those that it was for.
                if not self._unreachable:
                    self._unreachable = True
                    number = errno_name(error.errno or 0)
                    events.warning("warden.unreachable", tree_id=self.tree_id, errno=number)
                self._loop.call_later(SAY_AGAIN_SECONDS, self._say_all)
                return
            self._unsaid.popleft()
        if self._released and not self._unsaid:
            self._drop_control()  # there is nothing more to say to it, or to hear

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def send(self, stage: Stage, *, resume: bool) -> int:
        serial = self._next_serial()
        self._say(protocol.encode_signal(serial, stage, resume=resume, ending=resume))
        return serial

    def explain(self, reason: Reason, detail: str) -> None:
        if self._keeps:
            self._say(protocol.encode_note(_note(f"{reason}\0{detail}")))

    def keep(self, until: float) -> None:
        """From any thread: of a strict lease, by when the tree is dead now: seconds of
        CLOCK_BOOTTIME."""
        self._loop.post(lambda: self._say(protocol.encode_keep(until)))

    def cancel(self) -> None:
        """From any thread: asks the owner of a tree that is kept to end it."""
        self._loop.post(lambda: self._say(protocol.encode_plain(Type.CANCEL, self._next_serial())))

    def survey(self) -> None:
        self._survey_serial = self._next_serial()
        self._members = []
        self._say(protocol.encode_plain(Type.LIST, self._survey_serial))

    def set_frozen(self, frozen: bool) -> None:
        kind = Type.FREEZE if frozen else Type.THAW
        serial = self._next_serial()
        # It stays frozen until a thaw is known to have come about.
        self._frozen |= frozen
        self._thaw_serial = 0 if frozen else serial
        self._say(protocol.encode_plain(kind, serial))

    def release(self) -> None:
        self._released = True
        if self._keeps:
            self._say(protocol.encode_plain(Type.DETACH, self._next_serial()))
            return
        if self._entry is not None:
            # Before anybody can be told that they were let go: a sweep would end them if the warden
            # were killed now.
            registry.forget(self._entry)
        self._say(protocol.encode_plain(Type.RELEASE, self._next_serial()))

    def _released_warden_ended(self) -> None:
        """If it was killed before it could let go, then we do."""
        self._drop_control()
        self._reap_late()
        if not self._obeyed and not self._keeps:
            from proctree.worker import Worker

            Worker().post(self._let_go)

    def _let_go(self) -> None:
        """On a worker's thread."""
        from proctree.process.sweep import Search, patiently, resume

        try:
            if patiently(self._evacuate) or not self._frozen:
                return
            search = Search(None, -1, None, self._main_start, self.tree_id)
            known = {(member.pid, member.start_time) for member in self._leftovers}
            patiently(lambda: resume(search, known))
        except OSError as error:
            number = errno_name(error.errno or 0)
            events.warning("tree.not_let_go", tree_id=self.tree_id, errno=number)

    def _evacuate(self) -> bool:
        """On a worker's thread, and without a warden: lets go of what more than a warden holds.
        Returns whether that has undone a freeze.

        Raises:
            OSError: something could not be let go.
        """
        return False

    def sweep(self) -> None:
        from proctree.process.sweep import Search, patiently, sweep
        from proctree.worker import Worker

        self._lost = True
        self._drop_control()
        unborn = self._template is not None and self._warden < 0
        if unborn or not self.owns:
            if unborn and self._template is not None:
                # Should it come to be after all, it finds nobody at its socket and ends.
                self._template.forget(self)
            nobody: tuple[Member, ...] = ()
            self._loop.post(lambda: self._owner.happened(Event.SURVEYED, survivors=nobody))
            return
        search = Search(
            root=self._root_of_sweep(),
            root_pidfd=self._pidfd,
            main=None if self._main_exited else self.pid,
            main_start=self._main_start,
            tree_id=self.tree_id,
        )

        def work() -> None:
            try:
                inside = patiently(self._end_at_once)
                _ended, marked = sweep(search)
            except OSError as error:
                # Who is there cannot be said, and the lifecycle's timer reports that. A warden that
                # still lives has its orphan plan.
                number = errno_name(error.errno or 0)
                events.warning("tree.unsearchable", tree_id=self.tree_id, errno=number)
                return
            found = {(member.pid, member.start_time): member for member in (*inside, *marked)}
            survivors = tuple(found.values())
            if self._entry is not None and not survivors:
                registry.forget(self._entry)
            self._loop.post(lambda: swept(survivors))

        def swept(survivors: tuple[Member, ...]) -> None:
            self._kill_warden()
            if self._owner is not NOBODY:  # given up meanwhile: close() reaps it
                self._when_reaped(lambda: say(survivors))

        def say(survivors: tuple[Member, ...]) -> None:
            self._owner.happened(Event.SURVEYED, survivors=survivors)

        Worker().post(work)

    def _root_of_sweep(self) -> int | None:
        """Everything below it is ours."""
        return self._warden

    def _end_at_once(self) -> tuple[Member, ...]:
        """On a worker's thread, and without a warden: ends what the kernel can end as a whole, and
        answers what is still there."""
        return ()

    def foreground(self) -> None:
        stage = Stage(signal.SIGCONT, 0.0, Scope.GROUP)
        serial = self._next_serial()
        self._say(protocol.encode_signal(serial, stage, resume=False, foreground=True))

    def root(self) -> int | None:
        return None if self._warden < 0 or self._reaped else self._warden

    def has_member(self, pid: int) -> bool:
        root = self.root()
        # Behind the look: a warden that was not reaped then had its number all the time.
        return root is not None and proof.is_below(pid, root) and proof.holds_number(self._pidfd)

    def close(self) -> None:
        self._owner = NOBODY
        if self._released:
            # Its end is awaited; and if it has not been told yet, then an end of file would have it
            # end what is to live on.
            return
        self._drop_control()
        if self._template is not None and self._warden < 0:
            self._template.forget(self)
        if self._pidfd < 0:
            return
        # The warden may still be busy: with survivors, or with exiting. It is reaped when it ends.
        if not self._reap():
            self._loop.unregister(self._pidfd)
            self._loop.register(self._pidfd, READ, lambda _mask: self._reap_late())
