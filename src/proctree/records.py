"""What is observed of a tree: plain records, made by the machine and never by the user.

Named tuples and not attrs classes: importing attrs takes longer than everything else that
`proctree run` does, and nothing here needs converting or checking.
"""

from __future__ import annotations

import enum
import signal as _signal
from typing import NamedTuple

from proctree.errors import errno_name
from proctree.policy import Scope


class Reason(enum.StrEnum):
    """Why a tree ended.

    `EXITED` and `SIGNALED`: the main process ended by itself, or by a signal that was not ours.
    `TIMEOUT` and `KILLED`: it was ended by the kill policy. `EXEC_FAILED`: it never started.
    `SUPERVISOR_LOST`: the supervising interpreter was exiting. `WARDEN_LOST`: the warden was killed
    or answered with garbage, and what was left of the tree was swept.

    Those of a supervised child: `HEARTBEAT_REJECTED`: whom its heartbeat goes to does not want it
    any more. `HEARTBEAT_FAILED`: the heartbeat failed too often in a row. `WATCHDOG`: it did not
    say in time that it lives. `NOT_READY`: it was not ready in time.

    Of a durable run: `DETACHED`: it was let go of, and lives on.
    """

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMEOUT = "timeout"
    KILLED = "killed"
    EXEC_FAILED = "exec-failed"
    SUPERVISOR_LOST = "supervisor-lost"
    WARDEN_LOST = "warden-lost"
    HEARTBEAT_REJECTED = "heartbeat-rejected"
    HEARTBEAT_FAILED = "heartbeat-failed"
    WATCHDOG = "watchdog"
    NOT_READY = "not-ready"
    DETACHED = "detached"


class Usage(NamedTuple):
    """What the tree used: everything that was waited for by its parents or reaped by the warden.

    Attributes:
        user, system: CPU seconds of all its processes together.
        max_rss: bytes; the largest resident set of any single process.
        memory_peak: bytes; the most that the tree used at once. This and the next two are known
            only with containment `cgroup` and where its controllers are enabled, else 0.
        pids_peak: the most tasks (processes and threads) that it had at once.
        oom_kills: how many of its processes the kernel killed for memory.
    """

    user: float = 0.0
    system: float = 0.0
    max_rss: int = 0
    memory_peak: int = 0
    pids_peak: int = 0
    oom_kills: int = 0


class Member(NamedTuple):
    """One process of a tree at one moment.

    Attributes:
        pid, ppid: its number and its parent's.
        start_time: clock ticks since boot, field 22 of /proc/PID/stat. With the pid it names the
            process: a reused pid has another start time.
        state: one letter, field 3 of /proc/PID/stat.
        name: the command name, at most 15 bytes.
        error: errno when it may not be signalled, else 0.
        tracer: the process that traces it (ptrace(2)), when it is stopped by it or was not let go
            of after its death; else 0.
    """

    pid: int
    ppid: int
    start_time: int
    state: str
    name: str
    error: int = 0
    tracer: int = 0

    @property
    def why(self) -> str:
        """Why it could not be ended, for a survivor."""
        if self.tracer and self.state in "ZX":
            return f"dead, but held by process {self.tracer}, which traces it"
        if self.tracer:
            return f"stopped by process {self.tracer}, which traces it"
        if self.error:
            return f"may not be signalled ({errno_name(self.error)})"
        if self.state == "D":
            return "in uninterruptible sleep (D)"
        return f"did not end after SIGKILL (state {self.state})"


class StageSent(NamedTuple):
    """One stage of the escalation that was carried out.

    Attributes:
        signal, scope: what was sent, and to whom.
        at: seconds after the start of the tree.
        reached: how many processes got it; None when the backend did not say.
        denied: how many could not be signalled.
    """

    signal: _signal.Signals
    scope: Scope
    at: float
    reached: int | None = None
    denied: int = 0


class Cut(NamedTuple):
    """What a bounded capture left out: `length` bytes that would stand at `offset`."""

    offset: int
    length: int


class Ending(NamedTuple):
    """How a tree ended, as its machine noted it. `Outcome` is the same for the user."""

    returncode: int | None
    reason: Reason
    detail: str
    stages: tuple[StageSent, ...]
    leftovers: tuple[Member, ...]
    survivors: tuple[Member, ...]
    usage: Usage
    duration: float
    containment: str
    tree_id: str
    pid: int | None
    stdout: bytes | None
    stderr: bytes | None
    stdout_cut: Cut | None
    stderr_cut: Cut | None
    callback_errors: int
