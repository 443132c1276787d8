"""What is known about a tree after its end."""

from __future__ import annotations

import enum
import signal as _signal

import attrs

from proctree.errors import errno_name
from proctree.policy import Scope


class Reason(enum.StrEnum):
    """Why a tree ended.

    `EXITED` and `SIGNALED`: the main process ended by itself, or by a signal that was not ours.
    `TIMEOUT` and `KILLED`: it was ended by the kill policy. `EXEC_FAILED`: it never started.
    `SUPERVISOR_LOST`: the supervising interpreter was exiting. `WARDEN_LOST`: the warden was killed
    or answered with garbage, and what was left of the tree was swept.
    """

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMEOUT = "timeout"
    KILLED = "killed"
    EXEC_FAILED = "exec-failed"
    SUPERVISOR_LOST = "supervisor-lost"
    WARDEN_LOST = "warden-lost"


@attrs.frozen
class Usage:
    """What the tree used: everything that was waited for by its parents or reaped by the warden.

    Attributes:
        user, system: CPU seconds of all its processes together.
        max_rss: bytes; the largest resident set of any single process.
    """

    user: float = 0.0
    system: float = 0.0
    max_rss: int = 0


@attrs.frozen
class Member:
    """One process of a tree at one moment.

    Attributes:
        pid, ppid: its number and its parent's.
        start_time: clock ticks since boot, field 22 of /proc/PID/stat. With the pid it names the
            process: a reused pid has another start time.
        state: one letter, field 3 of /proc/PID/stat.
        name: the command name, at most 15 bytes.
        error: errno when it may not be signalled, else 0.
    """

    pid: int
    ppid: int
    start_time: int
    state: str
    name: str
    error: int = 0

    @property
    def why(self) -> str:
        """Why it could not be ended, for a survivor."""
        if self.error:
            return f"may not be signalled ({errno_name(self.error)})"
        if self.state == "D":
            return "in uninterruptible sleep (D)"
        return f"did not end after SIGKILL (state {self.state})"


@attrs.frozen
class StageSent:
    """One stage of the escalation that was carried out.

    Attributes:
        signal, scope: what was sent, and to whom.
        at: seconds after the start of the tree.
        count: how many processes got it; None when the backend did not say.
        denied: how many could not be signalled.
    """

    signal: _signal.Signals
    scope: Scope
    at: float
    count: int | None = None
    denied: int = 0


@attrs.frozen
class Cut:
    """What a bounded capture left out: `length` bytes that would stand at `offset`."""

    offset: int
    length: int


@attrs.frozen
class Outcome:
    """How a tree ended. Published once, after the last byte of its output.

    Attributes:
        returncode: as `subprocess`: the exit status, or minus the signal that ended the main
            process. None when it never ran, or when somebody else took its exit status.
        reason: why the tree ended.
        detail: what `kill(reason=...)` said, or what failed; may be empty.
        stages: the stages of the kill policy that were carried out, with their times.
        leftovers: what was still there when the main process exited (the first 1024).
        survivors: what could not be ended, with state and why.
        usage: CPU and memory of the whole tree.
        duration: seconds from start to the end of the tree.
        containment: the name of the backend that held it.
        tree_id, pid: which tree this was.
        stdout, stderr: what was captured, or None.
        stdout_cut, stderr_cut: what the capture's limit left out, or None.
        callback_errors: how many times an output callback raised.
    """

    returncode: int | None
    reason: Reason
    detail: str = ""
    stages: tuple[StageSent, ...] = ()
    leftovers: tuple[Member, ...] = ()
    survivors: tuple[Member, ...] = ()
    usage: Usage = Usage()
    duration: float = 0.0
    containment: str = ""
    tree_id: str = ""
    pid: int | None = None
    stdout: bytes | None = attrs.field(default=None, repr=False)
    stderr: bytes | None = attrs.field(default=None, repr=False)
    stdout_cut: Cut | None = None
    stderr_cut: Cut | None = None
    callback_errors: int = 0

    @property
    def ok(self) -> bool:
        """The main process exited with status 0, by itself, and nothing survived."""
        return self.reason is Reason.EXITED and self.returncode == 0 and not self.survivors

    def describe(self) -> str:
        """One sentence for people."""
        text = f"tree {self.tree_id} (pid {self.pid}): {self.reason}"
        if self.returncode is not None:
            text += f", {_status(self.returncode)}"
        if self.detail:
            text += f" ({self.detail})"
        if self.stages:
            text += ", sent " + ", ".join(stage.signal.name for stage in self.stages)
        if self.survivors:
            alive = "; ".join(f"pid {m.pid} {m.name}: {m.why}" for m in self.survivors)
            text += f"; still there: {alive}"
        return text

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON: bytes are decoded as UTF-8 with replacement."""
        return attrs.asdict(self, value_serializer=_plain)


def _status(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {_signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


def _plain(_instance: object, _field: object, value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, _signal.Signals):
        return value.name
    return value
