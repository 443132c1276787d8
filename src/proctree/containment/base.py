"""What a backend is: something that starts a tree and can end all of it."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from proctree.command import Command
from proctree.errors import errno_name
from proctree.lifecycle import Event
from proctree.loop import Loop
from proctree.policy import KillPolicy, Stage
from proctree.process import fds, proof
from proctree.records import Reason, Usage

if TYPE_CHECKING:
    from proctree.containment.forking import Birth
    from proctree.limits import Limits

Descriptors = tuple[int | None, int | None, int | None]
"""What the child's 0, 1 and 2 are to be; None keeps what is there."""


class Request(NamedTuple):
    """What a template is to fork.

    Attributes:
        command: with the function as `payload`.
        birth: what the function is born into.
        warden: the path of the warden's program.
        arguments: for it.
        stdio: what 0, 1 and 2 are to be.
        control: the warden's end of the socket to us.
    """

    command: Command
    birth: Birth
    warden: str
    arguments: list[bytes]
    stdio: Descriptors
    control: int


class Child(Protocol):
    """Who gets what comes of a request. All of it on the loop's thread, and not before `ask` has
    returned."""

    def born(self, pid: int, pidfd: int) -> None:
        """There is the process that becomes the warden, which is not our child."""

    def stillborn(self, error: Exception) -> None:
        """There is none and never was."""

    def reaped(self) -> None:
        """It has ended, and its parent has reaped it."""

    def reaper_lost(self) -> None:
        """Its parent is gone, and nobody will tell when it is reaped."""


class Source(Protocol):
    """A template, for the trees that it starts. On the loop's thread."""

    def ask(self, request: Request, child: Child) -> None:
        """With the descriptor lock held. Does not block; the descriptors stay the caller's.

        Raises:
            OSError: it cannot be asked.
            ProctreeError: it is closed.
        """

    def forget(self, child: Child) -> None:
        """Nobody waits for the answer any more."""


class Keep(NamedTuple):
    """What lets a tree live on without its supervisor. See docs/durable.md.

    Attributes:
        lock: an open file description that holds the key's lock; the warden keeps a copy of the
            descriptor for as long as it lives.
        run: a descriptor of the attempt's directory.
        listen: a bound socket there, to which others connect.
        lease: seconds that the tree lives on when nobody is attached.
        until: a strict lease: seconds of CLOCK_BOOTTIME by which the tree is dead, whoever is
            attached, unless KEEP says another time. None: `lease` counts.
        end_leftovers: what the main process leaves behind is ended also when nobody owns the tree.
    """

    lock: int
    run: int
    listen: int
    lease: float
    until: float | None = None
    end_leftovers: bool = True

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """Those that the warden inherits, and nobody else."""
        return self.lock, self.run, self.listen

    def arguments(self) -> list[bytes]:
        """For the warden."""
        numbers = [b"lock=%d" % self.lock, b"run=%d" % self.run, b"listen=%d" % self.listen]
        flags = [b"endleftovers=1"] if self.end_leftovers else []
        if self.until is not None:
            return [*numbers, b"until=%d" % round(self.until * 1000), *flags]
        return [*numbers, b"lease=%d" % round(self.lease * 1000), *flags]


class Wanted(NamedTuple):
    """What a tree needs of its containment.

    Attributes:
        leave: what the main process leaves behind is to live on.
        new_session: the main process leads a session of its own.
        limits: for its cgroup, or None.
        template: the process to fork it from, or None.
        keep: what it needs to live on without us, or None.
    """

    leave: bool = False
    new_session: bool = True
    limits: Limits | None = None
    template: Source | None = None
    keep: Keep | None = None


MEMBERS_REPORTED = 1024
"""How many leftovers or survivors are kept: a tree must not bloat its supervisor."""


def proc_trouble() -> str | None:
    """Why /proc cannot be used, or None: see `proof.check_proc`."""
    try:
        proof.check_proc()
    except OSError as error:
        if error.errno == errno.ENXIO:
            return error.strerror
        return f"/proc is not readable ({errno_name(error.errno or 0)})"
    return None


class Owner(Protocol):
    """Who gets what a backend observes. All of it on the loop's thread."""

    def happened(self, event: Event, **payload: Any) -> None:
        """Something happened to the tree."""

    def could_not_start(self, error: Exception, detail: str) -> None:
        """There is no main process, because of `error`."""

    def sent(self, serial: int, count: int | None, denied: int) -> None:
        """What came of `send`."""

    def stopped(self, signo: int) -> None:
        """The main process of a foreground job was stopped, and its terminal taken from it."""


class Nobody:
    """The owner of a tree that is closed: nothing that comes late reaches anybody. It also undoes
    the reference cycle between a tree and its backend, which would leave every tree that ever ran
    to the garbage collector."""

    def happened(self, event: Event, **payload: Any) -> None:
        """Too late."""

    def could_not_start(self, error: Exception, detail: str) -> None:
        """Too late."""

    def sent(self, serial: int, count: int | None, denied: int) -> None:
        """Too late."""

    def stopped(self, signo: int) -> None:
        """Too late."""


NOBODY = Nobody()


@contextlib.contextmanager
def handing_over(command: Command) -> Iterator[Command]:
    """A command for a fresh interpreter gets what it shall call as a descriptor, named by its last
    argument: neither `ps` nor the limits for arguments see it. With the descriptor lock held."""
    if command.payload is None or command.is_forked:
        yield command
        return
    fd = fds.memory(command.payload)
    try:
        passed = tuple(sorted((*command.pass_fds, fd)))
        yield command._replace(argv=(*command.argv, b"%d" % fd), pass_fds=passed)
    finally:
        os.close(fd)


WANT_NOTHING = Wanted()


class Contained(abc.ABC):
    """One tree in one backend.

    Its methods are called on the loop's thread, except where they say otherwise.
    """

    name: str

    def __init__(self, tree_id: str, wanted: Wanted = WANT_NOTHING) -> None:
        self.tree_id = tree_id
        self.wanted = wanted
        self.pid: int | None = None
        self.usage = Usage()
        self.exit_usage = Usage()

    @classmethod
    @abc.abstractmethod
    def unavailable(cls) -> str | None:
        """Why this backend cannot be used here, or None. From any thread."""

    @classmethod
    def unfit(cls, wanted: Wanted) -> str | None:
        """Why this backend cannot give a tree what it needs, or None. From any thread."""
        return None if wanted.limits is None else "limits need containment 'cgroup'"

    @classmethod
    def unasked(cls) -> str | None:
        """Why "auto" does not take this backend although it could be had, or None."""
        return None

    @abc.abstractmethod
    def spawn(self, command: Command, stdio: Descriptors, policy: KillPolicy) -> None:
        """Makes the processes; with the descriptor lock held.

        Raises:
            OSError: nothing was made.
        """

    @abc.abstractmethod
    def attach(self, loop: Loop, owner: Owner) -> None:
        """From now on things happen."""

    @abc.abstractmethod
    def send(self, stage: Stage, *, resume: bool) -> int:
        """Signals the scope of a stage; `Owner.sent` reports under the number returned.

        Args:
            resume: it is a stage of an ending: SIGCONT follows, for members that are stopped.
        """

    def explain(self, reason: Reason, detail: str) -> None:  # noqa: B027 - most need not
        """Before the first stage of an ending: why, for those who ask when we are gone."""

    @abc.abstractmethod
    def survey(self) -> None:
        """SURVEYED with what is still there."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """Whatever held the tree is gone: end what can be found, then SURVEYED."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let go of what is left, unharmed."""

    def foreground(self) -> None:
        """SIGCONT to the main process's group, which gets the terminal again if it is ours to
        give. Only for those that are fit for a foreground job."""
        raise NotImplementedError(self.name)

    @abc.abstractmethod
    def set_frozen(self, frozen: bool) -> None:
        """Stops every member, or lets all go on."""

    @abc.abstractmethod
    def root(self) -> int | None:
        """The process below which (and for the group backend: at which) the members are. From any
        thread."""

    @abc.abstractmethod
    def has_member(self, pid: int) -> bool:
        """Whether it is a process of the tree. The caller has its pidfd, and looks afterwards
        whether the number was still its own.

        Raises:
            OSError: descriptors or memory are short, so that it cannot be said.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Gives back every descriptor. The processes are not touched any more."""
