"""What happens to trees, as typed events: plain values, and their names and levels in the log.

Named tuples for the reason that records.py gives. Every one has `time_ns`, the time of its making
in nanoseconds since the epoch, which the log leaves out: it has timestamps of its own.
"""

from __future__ import annotations

import signal as _signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from proctree.policy import Scope
from proctree.records import Reason


class TreeStarting(NamedTuple):
    """Its processes are being made."""

    tree_id: str
    name: str
    containment: str
    time_ns: int


class TreeStarted(NamedTuple):
    """Its main process runs."""

    tree_id: str
    name: str
    pid: int
    containment: str
    time_ns: int


class TreeStopping(NamedTuple):
    """It is being ended. `reason` is None when the main process has exited and what it left behind
    is ended."""

    tree_id: str
    name: str
    pid: int | None
    reason: Reason | None
    detail: str
    time_ns: int


class TreeSignalled(NamedTuple):
    """A stage of the kill policy is carried out."""

    tree_id: str
    name: str
    signal: _signal.Signals
    scope: Scope
    time_ns: int


class MainExited(NamedTuple):
    """Its main process has exited: the first that can be known of a tree's end. `returncode` is
    None when somebody else took the exit status; `leftovers` counts what is left and visible."""

    tree_id: str
    name: str
    pid: int | None
    returncode: int | None
    leftovers: int
    time_ns: int


class TreeSwept(NamedTuple):
    """What held it is gone; the rest of it is searched for and ended."""

    tree_id: str
    name: str
    reason: str
    time_ns: int


class TreeDraining(NamedTuple):
    """It has ended, or is known not to end: only the rest of its output is waited for."""

    tree_id: str
    name: str
    time_ns: int


class TreeSurvivor(NamedTuple):
    """A process of it could not be ended. `name` and `pid` are the process's."""

    tree_id: str
    pid: int
    name: str
    why: str
    time_ns: int


class TreeEnded(NamedTuple):
    """The outcome is final. A tree that could not start has `reason` EXEC_FAILED and no pid."""

    tree_id: str
    name: str
    pid: int | None
    reason: Reason
    detail: str
    returncode: int | None
    duration: float
    survivors: int
    time_ns: int


class EventsMissed(NamedTuple):
    """A subscriber was so slow that `missed` events were thrown away before this one."""

    missed: int
    time_ns: int


LOGGED: dict[type, tuple[str, str]] = {
    TreeStarting: ("debug", "tree.starting"),
    TreeStarted: ("debug", "tree.started"),
    TreeStopping: ("debug", "tree.stopping"),
    TreeSignalled: ("debug", "tree.signalled"),
    MainExited: ("debug", "tree.exited"),
    TreeSwept: ("warning", "tree.swept"),
    TreeDraining: ("debug", "tree.draining"),
    TreeSurvivor: ("warning", "tree.survivor"),
    TreeEnded: ("debug", "tree.ended"),
    EventsMissed: ("warning", "events.missed"),
}
"""Level and name of each kind in the log. The supervisor's kinds are added by their module."""


def now() -> int:
    """For `time_ns`."""
    return time.time_ns()


def fields(event: Any) -> dict[str, Any]:
    """What the log gets of an event: its fields, as plain values."""
    return {
        name: _PLAIN.get(type(value), _same)(value)
        for name, value in zip(event._fields, event, strict=True)
        if name != "time_ns"
    }


def _same(value: Any) -> Any:
    return value


_PLAIN: dict[type, Callable[[Any], Any]] = {
    Reason: str,
    Scope: str,
    _signal.Signals: lambda value: value.name,
}
