"""The life of one tree: a pure state machine.

Theory of operation. Everything that can happen to a tree is an `Event`; what a tree is going
through is a `State`; `TABLE` says for each pair which rule applies, and a pair that is not in the
table is an event that comes too late to matter. A rule reads and writes the `Lifecycle`'s few
fields, answers the next state, and asks for `Action`s. It does no I/O, knows no clock and no file
descriptor, so that every interleaving can be tried without a process. Executing the actions, and
turning the world into events, is the work of `tree.py` and `loop.py`.

    NEW ──▶ STARTING ──▶ RUNNING ──▶ STOPPING ──▶ DRAINING ──▶ CLOSED
     │          │           │                        ▲            ▲
     │          │           └────── tree empty ──────┘            │
     └──────────┴───────────────── never started ─────────────────┘

What belongs here: a decision that depends on what happened before. What does not: anything that
can fail, block, or be measured.

The invariants (held by tests/test_lifecycle.py):

1. CLOSE is asked for exactly once, by the transition into CLOSED, and nothing is asked for after
   the PUBLISH that follows it.
2. From every state, once KILL came, the timers alone lead to CLOSED.
3. KILL is an event like any other: it is accepted in every state, any number of times.
4. Every escalation ends with SIGKILL to the tree (`KillPolicy` sees to it), and what survives that
   is surveyed and reported.
5. PUBLISH is asked for once, after every stream has ended or been given up, and never before the
   tree is proved empty, surveyed, or swept.
6. SIGNAL is never asked for before STARTED.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from proctree.policy import KillPolicy, Leftovers
from proctree.records import Member, Reason


class State(enum.Enum):
    """Where a tree is in its life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    DRAINING = "draining"
    CLOSED = "closed"


class Event(enum.Enum):
    """What can happen to a tree."""

    SPAWNED = "spawned"
    """Its processes are being made. Nothing is known of them yet."""
    STARTED = "started"
    """The main process runs, and leads its own group."""
    START_FAILED = "start failed"
    """There is no main process and never was."""
    KILL = "kill"
    """Somebody wants it to end: `reason`, `detail`, `policy` or None, and `left`: how many seconds
    are left of the stage under way."""
    STAGE_DUE = "stage due"
    """The stage timer ran out."""
    MAIN_EXITED = "main exited"
    """`status` (as waitpid(2), or None when it was stolen), `leftovers`, and `empty`: whether
    nothing is left. What is left need not be visible."""
    SUCCEEDED = "main succeeded"
    """Another process of the tree has taken the main process's place (MAINPID of sd_notify(3)): the
    exit of the main process is the end no longer."""
    SUCCESSOR_EXITED = "successor exited"
    """And that one has exited: `status`, as waitpid(2), or None where it cannot be known."""
    EMPTY = "tree empty"
    """Proved: no process of the tree is left."""
    SURVEYED = "surveyed"
    """The answer to SURVEY or SWEEP: `survivors`."""
    STREAM_ENDED = "stream ended"
    """One output stream reported its end and everything of it has been delivered."""
    DRAIN_DUE = "drain due"
    """The drain timer ran out."""
    DETACHED = "detached"
    """We let go of it: it lives on without us, as it was started to. `detail`, default ""."""
    LOST = "warden lost"
    """What held the tree is gone, or not to be believed: `detail`."""


class Phase(enum.Enum):
    """What STOPPING is busy with."""

    STAGES = "stages"
    SURVEY = "survey"
    SWEEP = "sweep"


class Action(enum.Enum):
    """What the machine asks its owner to do. The payload is named behind each."""

    SIGNAL = "signal"
    """Carry out a stage: `Stage`."""
    ARM_STAGE = "arm stage timer"
    """Seconds. An armed timer is replaced."""
    DISARM_STAGE = "disarm stage timer"
    SURVEY = "survey"
    """Ask what is still there; SURVEYED answers."""
    SWEEP = "sweep"
    """Containment is gone: end what can still be found; SURVEYED answers."""
    RELEASE = "release"
    """Let go of what is left, unharmed."""
    DRAIN = "drain"
    """What it has written by now is all that is wanted (True), or somebody may still write to its
    pipes (False)."""
    ARM_DRAIN = "arm drain timer"
    """Seconds."""
    CLOSE = "close"
    """Unregister and close everything that belongs to this tree."""
    PUBLISH = "publish"
    """The outcome is final."""


SURVEY_TIMEOUT = 2.0
"""Seconds that a warden has to say what survived before it counts as lost."""

SWEEP_TIMEOUT = 10.0
"""Seconds that sweeping may take before the tree is given up."""


class Lifecycle:
    """One tree's machine.

    Args:
        policy: how the tree is ended unless KILL says otherwise.
        leftovers: what becomes of what the main process leaves behind.
        streams: how many output streams will report their end.
        drain_timeout: seconds that a stream which never ends may cost.
    """

    __slots__ = (
        "_actions",
        "detail",
        "drain_timeout",
        "empty",
        "kill_pending",
        "leftover_policy",
        "leftovers",
        "main_exited",
        "phase",
        "policy",
        "reason",
        "stage_index",
        "state",
        "status",
        "stopping_kill",
        "streams",
        "successor_status",
        "survivors",
    )

    def __init__(
        self, policy: KillPolicy, leftovers: Leftovers, streams: int, drain_timeout: float
    ) -> None:
        self.state = State.NEW
        self.policy = policy
        self.leftover_policy = leftovers
        self.streams = streams
        self.drain_timeout = drain_timeout
        self.stage_index = 0
        self.phase = Phase.STAGES
        self.reason: Reason | None = None
        self.detail = ""
        self.kill_pending = False
        self.stopping_kill = False
        self.main_exited = False
        self.status: int | None = None
        self.successor_status: int | None = None
        self.leftovers: tuple[Member, ...] = ()
        self.survivors: tuple[Member, ...] = ()
        self.empty = False
        self._actions: list[tuple[Action, Any]] = []

    def handle(self, event: Event, **payload: Any) -> list[tuple[Action, Any]]:
        """Applies one event and answers what has to be done now, in this order."""
        actions: list[tuple[Action, Any]] = []
        self._actions = actions
        rule = TABLE.get((self.state, event))
        if rule is not None:
            self.state = rule(self, **payload)
        return actions

    @property
    def main_status(self) -> int | None:
        """Of the main process, or of what took its place."""
        return self.status if self.successor_status is None else self.successor_status

    @property
    def may_extend(self) -> bool:
        """Whether the stage under way may be given more time: not the last one, SIGKILL."""
        return (
            self.state is State.STOPPING
            and self.phase is Phase.STAGES
            and self.stage_index < len(self.policy.stages)
        )

    def _ask(self, action: Action, payload: Any = None) -> None:
        self._actions.append((action, payload))

    # -- shared by several rules

    def _remember_kill(self, reason: Reason, detail: str, policy: KillPolicy | None) -> None:
        self.stopping_kill = True
        if self.reason is None:
            self.reason = reason
            self.detail = detail
        if policy is not None:
            self.policy = policy

    def _send_stage(self) -> State:
        stage = self.policy.stages[self.stage_index]
        self.stage_index += 1
        self._ask(Action.SIGNAL, stage)
        self._ask(Action.ARM_STAGE, stage.grace)
        return State.STOPPING

    def _stop(self) -> State:
        self.stage_index = 0
        return self._send_stage()

    def _remaining(self, left: float | None = None) -> float:
        """Seconds that the escalation under way may still take, at most; `left` of them are left of
        the present stage (None: all of it)."""
        stages = self.policy.stages[self.stage_index - 1 :]
        present = stages[0].grace if left is None else left
        return present + sum(stage.grace for stage in stages[1:])

    def _finish(self) -> State:
        """The tree has ended, or is known not to end: now only its output is left."""
        self._ask(Action.DISARM_STAGE)
        if self.streams == 0:
            return self._close()
        self._ask(Action.DRAIN, self.empty)
        # A stream of an empty tree ends as soon as it has been read, and a callback that is still
        # busy with it may take its time - unless somebody wanted the tree to end.
        if self.stopping_kill or not self.empty:
            self._ask(Action.ARM_DRAIN, self.drain_timeout)
        return State.DRAINING

    def _close(self) -> State:
        self._ask(Action.CLOSE)
        self._ask(Action.PUBLISH)
        return State.CLOSED

    def _sweep(self, detail: str) -> State:
        if self.reason is None and not self.main_exited:
            self.reason = Reason.WARDEN_LOST
            self.detail = detail
        # A tree without its warden is a tree that has to end, in bounded time.
        self.stopping_kill = True
        self.phase = Phase.SWEEP
        self._ask(Action.SWEEP)
        self._ask(Action.ARM_STAGE, SWEEP_TIMEOUT)
        return State.STOPPING


# -- the rules: (lifecycle, payload) -> next state


def _spawned(_life: Lifecycle) -> State:
    return State.STARTING


def _kill_new(
    life: Lifecycle,
    reason: Reason,
    detail: str,
    policy: KillPolicy | None,
    left: float | None = None,
) -> State:
    life._remember_kill(reason, detail, policy)
    return life._close()


def _started(life: Lifecycle) -> State:
    if life.kill_pending:
        return life._stop()
    return State.RUNNING


def _start_failed(life: Lifecycle, detail: str) -> State:
    # A kill that came first still has to say that nothing ran.
    life.reason = Reason.EXEC_FAILED
    life.detail = detail
    life._ask(Action.DISARM_STAGE)
    return life._close()


def _kill_starting(
    life: Lifecycle,
    reason: Reason,
    detail: str,
    policy: KillPolicy | None,
    left: float | None = None,
) -> State:
    """Invariant 6: no signal before the main process leads its own group. The first stage waits for
    STARTED, but not longer than the escalation would have taken."""
    life._remember_kill(reason, detail, policy if not life.kill_pending else None)
    if not life.kill_pending:
        life.kill_pending = True
        life._ask(Action.ARM_STAGE, life.policy.duration)
    return State.STARTING


def _due_starting(life: Lifecycle) -> State:
    return life._sweep("the main process had not started when it was to end")


def _kill_running(
    life: Lifecycle,
    reason: Reason,
    detail: str,
    policy: KillPolicy | None,
    left: float | None = None,
) -> State:
    life._remember_kill(reason, detail, policy)
    return life._stop()


def _kill_stopping(
    life: Lifecycle,
    reason: Reason,
    detail: str,
    policy: KillPolicy | None,
    left: float | None = None,
) -> State:
    """A second kill may only make the end come sooner; otherwise asking again and again would put
    SIGKILL off for ever."""
    was_leftover = not life.stopping_kill
    life.stopping_kill = True
    if (
        policy is not None
        and life.phase is Phase.STAGES
        and (was_leftover or policy.duration < life._remaining(left))
    ):
        life.policy = policy
        return life._stop()
    return State.STOPPING


def _main_exited(
    life: Lifecycle, status: int | None, leftovers: tuple[Member, ...], empty: bool
) -> State:
    life.main_exited = True
    life.status = status
    life.leftovers = leftovers
    return life.state


def _main_exited_running(
    life: Lifecycle, status: int | None, leftovers: tuple[Member, ...], empty: bool
) -> State:
    _main_exited(life, status, leftovers, empty)
    if empty:
        return State.RUNNING
    if life.leftover_policy is Leftovers.KILL:
        return life._stop()
    if life.leftover_policy is Leftovers.LEAVE:
        life._ask(Action.RELEASE)
        return life._finish()
    return State.RUNNING


def _succeeded(life: Lifecycle) -> State:
    life.leftover_policy = Leftovers.WAIT
    return State.RUNNING


def _successor_exited(life: Lifecycle, status: int | None) -> State:
    life.successor_status = status
    return life.state


def _successor_exited_running(life: Lifecycle, status: int | None) -> State:
    _successor_exited(life, status)
    return life._stop()


def _detached(life: Lifecycle, detail: str = "") -> State:
    life.reason = Reason.DETACHED
    life.detail = detail
    life._ask(Action.RELEASE)
    if life.streams == 0:
        return life._close()
    # What it has written so far is delivered; what it writes from now on is for the next reader.
    life._ask(Action.DRAIN, True)
    life._ask(Action.ARM_DRAIN, life.drain_timeout)
    return State.DRAINING


def _detached_new(life: Lifecycle, detail: str = "") -> State:
    return _kill_new(life, Reason.DETACHED, detail, None)


def _empty(life: Lifecycle) -> State:
    life.empty = True
    life.survivors = ()
    return life._finish()


def _empty_draining(life: Lifecycle) -> State:
    life.empty = True
    life.survivors = ()
    life._ask(Action.DRAIN, True)
    return State.DRAINING


def _stage_due(life: Lifecycle) -> State:
    if life.phase is Phase.SWEEP:
        # Nobody has said what is left: an outcome without survivors must not look like a proof.
        unproved = f"not swept in {SWEEP_TIMEOUT:g} s, so something may be left"
        life.detail = f"{life.detail}; {unproved}" if life.detail else unproved
        return life._finish()
    if life.phase is Phase.SURVEY:
        # The warden did not even answer: stopped, or stuck. It is as good as gone.
        return life._sweep("the warden did not answer")
    if life.stage_index < len(life.policy.stages):
        return life._send_stage()
    life.phase = Phase.SURVEY
    life._ask(Action.SURVEY)
    life._ask(Action.ARM_STAGE, SURVEY_TIMEOUT)
    return State.STOPPING


def _surveyed(life: Lifecycle, survivors: tuple[Member, ...]) -> State:
    if life.phase is Phase.SURVEY and not survivors:
        # Nothing to be seen, and yet no proof: EMPTY is on its way, or something hides. The timer
        # decides.
        return State.STOPPING
    life.survivors = survivors
    return life._finish()


def _lost(life: Lifecycle, detail: str) -> State:
    return life._sweep(detail)


def _lost_stopping(life: Lifecycle, detail: str) -> State:
    return State.STOPPING if life.phase is Phase.SWEEP else life._sweep(detail)


def _stream_ended(life: Lifecycle) -> State:
    life.streams -= 1
    return life.state


def _stream_ended_draining(life: Lifecycle) -> State:
    life.streams -= 1
    return life._close() if life.streams == 0 else State.DRAINING


def _kill_draining(
    life: Lifecycle,
    reason: Reason,
    detail: str,
    policy: KillPolicy | None,
    left: float | None = None,
) -> State:
    if not life.stopping_kill and life.empty:
        life._ask(Action.ARM_DRAIN, life.drain_timeout)
    life.stopping_kill = True
    return State.DRAINING


def _drain_due(life: Lifecycle) -> State:
    return life._close()


Rule = Callable[..., State]

TABLE: dict[tuple[State, Event], Rule] = {
    (State.NEW, Event.SPAWNED): _spawned,
    (State.NEW, Event.KILL): _kill_new,
    (State.NEW, Event.START_FAILED): _start_failed,
    (State.NEW, Event.DETACHED): _detached_new,
    (State.STARTING, Event.STARTED): _started,
    (State.STARTING, Event.START_FAILED): _start_failed,
    (State.STARTING, Event.KILL): _kill_starting,
    (State.STARTING, Event.STAGE_DUE): _due_starting,
    (State.STARTING, Event.STREAM_ENDED): _stream_ended,
    (State.STARTING, Event.LOST): _lost,
    (State.RUNNING, Event.KILL): _kill_running,
    (State.RUNNING, Event.MAIN_EXITED): _main_exited_running,
    (State.RUNNING, Event.SUCCEEDED): _succeeded,
    (State.RUNNING, Event.SUCCESSOR_EXITED): _successor_exited_running,
    (State.RUNNING, Event.DETACHED): _detached,
    (State.RUNNING, Event.EMPTY): _empty,
    (State.RUNNING, Event.STREAM_ENDED): _stream_ended,
    (State.RUNNING, Event.LOST): _lost,
    (State.STOPPING, Event.KILL): _kill_stopping,
    (State.STOPPING, Event.MAIN_EXITED): _main_exited,
    (State.STOPPING, Event.SUCCESSOR_EXITED): _successor_exited,
    (State.STOPPING, Event.STAGE_DUE): _stage_due,
    (State.STOPPING, Event.EMPTY): _empty,
    (State.STOPPING, Event.SURVEYED): _surveyed,
    (State.STOPPING, Event.STREAM_ENDED): _stream_ended,
    (State.STOPPING, Event.LOST): _lost_stopping,
    (State.DRAINING, Event.KILL): _kill_draining,
    (State.DRAINING, Event.EMPTY): _empty_draining,
    (State.DRAINING, Event.STREAM_ENDED): _stream_ended_draining,
    (State.DRAINING, Event.DRAIN_DUE): _drain_due,
}
