"""What runs between fork and the command, or the callable, in a child forked by Python.

The code here runs in a copy of a program that may have had many threads: it takes no locks that
another thread might have held, logs nothing, and imports nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from proctree.command import Command
from proctree.process.prctl import Prctl
from proctree.process.setting import set_ionice, set_rlimit
from proctree.protocol import STEPS

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes

Descriptors = tuple[int | None, int | None, int | None]
"""What 0, 1 and 2 are to be; None keeps what is there."""


class StepFailed(Exception):
    """A step before the command or callable could run. `step` is a name from `protocol.STEPS`."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(step, error)
        self.step = step
        self.error = error


@contextlib.contextmanager
def _step(name: str):  # type: ignore[no-untyped-def]
    try:
        yield
    except OSError as error:
        raise StepFailed(name, error.errno or 0) from None


def lead_group(command: Command) -> None:
    """Own session, or for a foreground job an own group."""
    if command.new_session:
        with _step("setsid"):
            os.setsid()
    else:
        with _step("setpgid"):
            os.setpgid(0, 0)


def die_with_parent(prctl: Prctl, parent: int | None) -> None:
    """SIGKILL when the parent ends. The last of what concerns credentials: the kernel forgets the
    signal when they change (prctl(2), PR_SET_PDEATHSIG).

    Args:
        hold: a callable does not begin before the end of this pipe.
        parent: None when its end cannot be missed (in a PID namespace that ends with it).
    """
    with _step("pdeathsig"):
        prctl.set_pdeathsig(signal.SIGKILL)
    # The parent may have died before the line above: then that signal never comes.
    if parent is not None and os.getppid() != parent:
        os._exit(127)


def join_cgroup(path: bytes) -> None:
    """Moves this process into the cgroup: cgroups(7)."""
    with _step("cgroup"):
        fd = os.open(path + b"/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def apply_attributes(attributes: SpawnAttributes) -> None:
    """What asks for privileges, before `apply_credentials` gives them up. As attributes.c."""
    if attributes.oom_score_adj is not None:
        with _step("oom_score_adj"), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"%d" % attributes.oom_score_adj)
    if attributes.nice is not None:
        with _step("nice"):
            os.setpriority(os.PRIO_PROCESS, 0, attributes.nice)
    if attributes.ionice_value is not None:
        with _step("ionice"):
            set_ionice(attributes.ionice_value)
    if attributes.affinity is not None:
        with _step("affinity"):
            os.sched_setaffinity(0, attributes.affinity)
    for number, *limits in attributes.rlimits:
        with _step("rlimits"):
            set_rlimit(number, *limits)
    if attributes.umask is not None:
        os.umask(attributes.umask)


def apply_credentials(attributes: SpawnAttributes, prctl: Prctl) -> None:
    """In the order that setresuid(2) leaves possible: the groups first, the user last."""
    if attributes.groups is not None:
        with _step("groups"):
            os.setgroups(attributes.groups)
    if (gid := attributes.gid) is not None:
        with _step("gid"):
            os.setresgid(gid, gid, gid)
    if (uid := attributes.uid) is not None:
        with _step("uid"):
            os.setresuid(uid, uid, uid)
    if attributes.no_new_privs:
        with _step("no_new_privs"):
            prctl.set_no_new_privs()


def take_terminal() -> None:
    """Standard input becomes the controlling terminal of our new session: ioctl_tty(2)."""
    with _step("terminal"):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def reset_signals() -> None:
    """As execve(2) leaves them: what was caught is default again, what was ignored stays ignored,
    but for the two that every Python ignores, and SIGCHLD, whose being ignored would make the
    program's own waits fail. Everything is unblocked: the supervisor's mask is its own business."""
    for signo in signal.valid_signals():
        if callable(signal.getsignal(signo)):
            signal.signal(signo, signal.SIG_DFL)
    for signo in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(signo, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def place_stdio(stdio: Descriptors) -> None:
    with _step("stdio"):
        for target, fd in enumerate(stdio):
            if fd == target:
                os.set_inheritable(target, True)
            elif fd is not None:
                os.dup2(fd, target)


def enter(command: Command) -> None:
    if command.cwd is not None:
        with _step("chdir"):
            os.chdir(command.cwd)


def close_others(keep: tuple[int, ...]) -> None:
    """Closes everything above 2 that is not in `keep`. Before the attributes: a limit of open files
    would hide from us what is open above it."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def execute(command: Command) -> NoReturn:
    """execvpe, with the search path of the environment that the command gets."""
    for fd in command.pass_fds:
        os.set_inheritable(fd, True)
    with _step("exec"):
        os.execvpe(command.argv[0], command.argv, command.env)


def _new_standard_streams() -> None:
    """The old objects may hold text that the supervisor has not written yet, or may not write to
    our descriptors at all (a test runner's capture). They stay referenced: deleting one flushes."""
    _old_streams.extend((sys.stdin, sys.stdout, sys.stderr))
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


_old_streams: list[object] = []


def call(command: Command, function: Callable[[], object], hold: int | None) -> NoReturn:
    """Runs a callable as the whole program of this process: its exit status is 0 when it returns,
    1 with a traceback when it raises, and as sys.exit(3) has it for `SystemExit`.

    Args:
        hold: it does not begin before a byte comes through this pipe, or None.
    """
    status = 1
    try:
        os.environ.clear()
        for name, value in command.env.items():
            os.environb[name] = value
        _new_standard_streams()
        try:
            if hold is not None:
                if not os.read(hold, 1):
                    os._exit(127)  # there is no warden
                os.close(hold)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            function()
            status = 0
        except SystemExit as exit_:
            status = _exit_status(exit_.code)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
    finally:
        os._exit(status)


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


REPORT = struct.Struct("=ii")
"""What a child that could not begin writes before it exits: errno, and the number of the step."""


def step_number(name: str) -> int:
    return next(number for number, step in STEPS.items() if step == name)


def run_forked(
    command: Command,
    stdio: Descriptors,
    prctl: Prctl,
    parent: int | None,
    report: int,
    unwanted: tuple[int, ...],
    gate: int | None = None,
    hold: int | None = None,
    cgroup: bytes | None = None,
) -> NoReturn:
    """The forked child that is to be the main process, for a command or a callable.

    Args:
        parent: our parent's number, or None when it cannot be seen from here.
        cgroup: the directory of the cgroup to move to, or None.

    With a `gate` it begins when a byte comes through: until then the parent can be certain that the
    number which fork gave it is this process, whoever else waits for its children. With `hold` a
    callable is called when a byte comes through that.

    `report` is closed when it has become what it is to be (for a command: by exec), after a failure
    it is written to first.
    """
    try:
        try:
            for fd in unwanted:
                os.close(fd)
            if gate is not None and not os.read(gate, 1):
                os._exit(127)  # the parent is gone
            if cgroup is not None:
                join_cgroup(cgroup)
            lead_group(command)
            place_stdio(stdio)
            if command.terminal:
                take_terminal()
            if command.function is None:
                close_others((report, *command.pass_fds))
            if command.attributes is not None:
                apply_attributes(command.attributes)
            enter(command)
            if command.attributes is not None:
                apply_credentials(command.attributes, prctl)
            die_with_parent(prctl, parent)
            reset_signals()
            if command.function is None:
                execute(command)
            os.close(report)
        except StepFailed as failed:
            os.write(report, REPORT.pack(failed.error, step_number(failed.step)))
            os._exit(127)
        call(command, command.function, hold)
    finally:
        os._exit(127)
