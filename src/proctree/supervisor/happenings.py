"""What happens to supervised children and to their supervisor, as typed events. See transitions.py.

`supervisor` and `child` are names.
"""

from __future__ import annotations

from typing import NamedTuple

from proctree.records import Reason
from proctree.transitions import LOGGED


class ChildStarting(NamedTuple):
    """It is being started, for the `start`-th time."""

    supervisor: str
    child: str
    tree_id: str
    start: int
    time_ns: int


class ChildReady(NamedTuple):
    """It can do its work, `seconds` after it was started."""

    supervisor: str
    child: str
    tree_id: str
    pid: int | None
    seconds: float
    time_ns: int


class ChildStatus(NamedTuple):
    """It has said what it is doing: STATUS of sd_notify(3)."""

    supervisor: str
    child: str
    tree_id: str
    status: str
    time_ns: int


class ChildReloading(NamedTuple):
    """It reads its configuration again, and is ready once more after that: RELOADING."""

    supervisor: str
    child: str
    tree_id: str
    time_ns: int


class HeartbeatMissed(NamedTuple):
    """One heartbeat failed, the `failures`-th in a row of the `allowed` ones."""

    supervisor: str
    child: str
    tree_id: str
    failures: int
    allowed: int
    why: str
    time_ns: int


class ChildStopping(NamedTuple):
    """The supervisor ends it."""

    supervisor: str
    child: str
    tree_id: str
    time_ns: int


class ChildEnded(NamedTuple):
    """Nothing of it is left. `failed`: whether its restart policy takes that for a failure."""

    supervisor: str
    child: str
    tree_id: str
    reason: Reason
    detail: str
    returncode: int | None
    failed: bool
    time_ns: int


class ChildRestarting(NamedTuple):
    """It is started again, after `delay` seconds, for the `restarts`-th time."""

    supervisor: str
    child: str
    restarts: int
    delay: float
    why: str
    time_ns: int


class ChildDone(NamedTuple):
    """It has ended, or was never started, and will not be started again."""

    supervisor: str
    child: str
    time_ns: int


class SupervisorStarted(NamedTuple):
    """All children are ready for the first time."""

    supervisor: str
    children: int
    time_ns: int


class SupervisorGaveUp(NamedTuple):
    """A child could not be started, or was restarted too often; `lines` are its last ones."""

    supervisor: str
    child: str
    why: str
    lines: tuple[str, ...]
    time_ns: int


class SupervisorStopping(NamedTuple):
    """The children are stopped, in reverse order."""

    supervisor: str
    why: str
    time_ns: int


class SupervisorStopped(NamedTuple):
    """No child runs any more."""

    supervisor: str
    time_ns: int


LOGGED.update(
    {
        ChildStarting: ("debug", "child.starting"),
        ChildReady: ("debug", "child.ready"),
        ChildStatus: ("debug", "child.status"),
        ChildReloading: ("debug", "child.reloading"),
        HeartbeatMissed: ("warning", "heartbeat.missed"),
        ChildStopping: ("debug", "child.stopping"),
        ChildEnded: ("debug", "child.ended"),
        ChildRestarting: ("warning", "child.restarting"),
        ChildDone: ("debug", "child.done"),
        SupervisorStarted: ("debug", "supervisor.started"),
        SupervisorGaveUp: ("error", "supervisor.gave_up"),
        SupervisorStopping: ("debug", "supervisor.stopping"),
        SupervisorStopped: ("debug", "supervisor.stopped"),
    }
)
