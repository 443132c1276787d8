"""A child of a supervisor: what it has from start to start, and its present start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs

from proctree.loop import Loop
from proctree.outcome import Outcome
from proctree.records import Reason
from proctree.supervisor import happenings
from proctree.supervisor.attempt import Attempt
from proctree.supervisor.beating import BeatEvent, BeatFailed, Beating
from proctree.supervisor.heartbeat import Beat
from proctree.supervisor.notification import Notification
from proctree.supervisor.plan import Child as Planned
from proctree.supervisor.plan import Phase
from proctree.supervisor.probing import Probing
from proctree.supervisor.spec import ChildSpec
from proctree.supervisor.tail import Tail


@attrs.frozen
class ChildInfo:
    """A child at one moment.

    Attributes:
        name: of the child.
        phase: where it is: `"down"`, `"starting"`, `"up"`, `"stopping"`, `"backoff"` or `"done"`.
        pid, tree_id: of its present start, or the last one; None before the first.
        status: what it said last by STATUS of sd_notify(3).
        starts: how many times it was started.
        restarts: how many of them because it had ended.
        outcome: of its last start that has ended, or None.
        lines: its last lines of output.
    """

    name: str
    phase: Phase
    pid: int | None
    tree_id: str | None
    status: str
    starts: int
    restarts: int
    outcome: Outcome | None
    lines: tuple[str, ...] = attrs.field(repr=False)


class Keeper(Protocol):
    """The supervisor, as a child sees it."""

    loop: Loop

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def tell(self, kind: Callable[..., Any], *values: Any) -> None:
        """Publishes an event of this supervisor."""

    def ready(self, child: Child) -> None:
        """It can do its work."""

    def ended(self, child: Child) -> None:
        """Nothing of it runs any more."""


class Child:
    """A child and its present start. Everything on the loop's thread."""

    def __init__(self, supervisor: Keeper, spec: ChildSpec) -> None:
        self.spec = spec
        self.tail = Tail(spec.tail)
        self.attempt: Attempt | None = None
        self.outcome: Outcome | None = None
        self.starts = 0
        self.unwanted = False
        self.up: list[Callable[[Exception | None], None]] = []
        """Who waits until it is ready, or will not be."""
        self.gone: list[Callable[[], None]] = []
        self._supervisor = supervisor
        self._probing: Probing | None = None
        if spec.ready is not None:
            self._probing = Probing(
                supervisor.loop, spec.ready, self._probed_ready, self._probed_not_ready
            )
        self._beating: Beating | None = None
        if spec.heartbeat is not None:
            self._beating = Beating(
                supervisor.loop, spec.heartbeat, self._rejected, self._heart_failed, self._beat
            )

    def launch(self) -> None:
        self.starts += 1
        self.unwanted = False
        loop = self._supervisor.loop
        self.attempt = Attempt(loop, self.spec, self.tail, self._probing, self)
        self.attempt.launch()

    @property
    def _tree_id(self) -> str:
        attempt = self.attempt
        return "" if attempt is None or attempt.handle is None else attempt.handle.tree_id

    def _tell(self, kind: Callable[..., Any], *values: Any) -> None:
        self._supervisor.tell(kind, self.spec.name, self._tree_id, *values)

    # -- what its start says

    def launched(self, attempt: Attempt) -> None:
        self._tell(happenings.ChildStarting, self.starts)

    def began(self, attempt: Attempt) -> None:
        if self._beating is not None and attempt.handle is not None:
            handle = attempt.handle
            self._beating.start(Beat(self.spec.name, handle.tree_id, handle.pid))

    def became_ready(self, attempt: Attempt) -> None:
        assert attempt.handle is not None
        seconds = self._supervisor.now() - attempt.launched_at
        self._tell(happenings.ChildReady, attempt.handle.pid, seconds)
        self._supervisor.ready(self)

    def said(self, attempt: Attempt, notification: Notification) -> None:
        if notification.status is not None:
            self._tell(happenings.ChildStatus, attempt.status)
        if notification.reloading:
            self._tell(happenings.ChildReloading)

    def ended(self, attempt: Attempt) -> None:
        if self._beating is not None:
            self._beating.stop()
        self.outcome = attempt.outcome
        outcome = attempt.outcome
        self._tell(
            happenings.ChildEnded,
            _reason_without_outcome(attempt) if outcome is None else outcome.reason,
            attempt.why if outcome is None else outcome.detail,
            None if outcome is None else outcome.returncode,
            attempt.failed,
        )
        self._supervisor.ended(self)

    @property
    def runs(self) -> bool:
        return self.attempt is not None and not self.attempt.over

    def _probed_ready(self) -> None:
        assert self.attempt is not None
        self.attempt.become_ready()

    def _probed_not_ready(self, why: str) -> None:
        assert self.attempt is not None
        self.attempt.not_ready(why)

    def _beat(self, event: BeatEvent) -> None:
        if isinstance(event, BeatFailed):
            self._tell(happenings.HeartbeatMissed, event.in_a_row, event.allowed, event.error)

    def _rejected(self, detail: str) -> None:
        self.unwanted = True
        self._end(Reason.HEARTBEAT_REJECTED, detail)

    def _heart_failed(self, detail: str) -> None:
        self._end(Reason.HEARTBEAT_FAILED, detail)

    def _end(self, reason: Reason, detail: str) -> None:
        assert self.attempt is not None
        self.attempt.end(reason, detail)

    def info(self, planned: Planned) -> ChildInfo:
        attempt = self.attempt
        handle = None if attempt is None else attempt.handle
        return ChildInfo(
            name=self.spec.name,
            phase=planned.phase,
            pid=None if attempt is None else attempt.pid,
            tree_id=None if handle is None else handle.tree_id,
            status="" if attempt is None else attempt.status,
            starts=self.starts,
            restarts=planned.restarts,
            outcome=self.outcome,
            lines=self.tail.lines(),
        )


def _reason_without_outcome(attempt: Attempt) -> Reason:
    return Reason.KILLED if attempt.error is None else Reason.EXEC_FAILED
