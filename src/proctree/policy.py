"""How a tree is ended: which signal, to whom, and how long to wait for it to work."""

from __future__ import annotations

import enum
import math
import signal as _signal
from typing import Any, NamedTuple


class Scope(enum.StrEnum):
    """Who gets a signal.

    `MAIN` is systemd's KillMode=process, `GROUP` is killpg(2) on the main process's group, `TREE`
    is systemd's KillMode=control-group. Two stages, `MAIN` then `TREE`, are its KillMode=mixed.
    """

    MAIN = "main"
    GROUP = "group"
    TREE = "tree"


class Leftovers(enum.StrEnum):
    """What happens to the processes that the main process leaves behind when it exits.

    `KILL` ends them by the kill policy, `WAIT` waits for them to end by themselves, `LEAVE` lets
    them go: they are no longer part of any tree.
    """

    KILL = "kill"
    WAIT = "wait"
    LEAVE = "leave"


MAX_STAGES = 8


def to_signal(value: int, argument: str) -> _signal.Signals:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: a signal number or signal.Signals, not {value!r}")
    try:
        return _signal.Signals(value)
    except ValueError:
        raise ValueError(f"{argument}: no signal has the number {value}") from None


def to_scope(value: str, argument: str) -> Scope:
    try:
        return Scope(value)
    except ValueError:
        names = ", ".join(Scope)
        raise ValueError(f"{argument}: {value!r} is none of {names}") from None


def to_leftovers(value: str) -> Leftovers:
    try:
        return Leftovers(value)
    except ValueError:
        names = ", ".join(Leftovers)
        raise ValueError(f"leftovers: {value!r} is none of {names}") from None


def to_seconds(value: float, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: a number of seconds, not {value!r}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{argument}: {value!r} is not a duration: it must be 0 or more seconds")
    return float(value)


def _grace(value: float) -> float:
    grace = to_seconds(value, "grace")
    if math.isinf(grace):
        raise ValueError("grace: must be finite, or SIGKILL would never be reached")
    return grace


class _StageFields(NamedTuple):
    signal: _signal.Signals
    grace: float
    scope: Scope


class Stage(_StageFields):
    """One stage of an escalation: a signal, and how long the tree has to end after it.

    Args:
        signal: what to send; a number or `signal.Signals`.
        grace: seconds until the next stage begins, 0 or more. Default 5.0.
        scope: `"main"`, `"group"` or `"tree"`. Default `"tree"`.

    Raises:
        ValueError: an unknown signal or scope, or a grace that is negative or not finite.
        TypeError: something of another type.
    """

    __slots__ = ()

    def __new__(cls, signal: int, grace: float = 5.0, scope: str = Scope.TREE) -> Stage:
        return super().__new__(
            cls, to_signal(signal, "signal"), _grace(grace), to_scope(scope, "scope")
        )

    @property
    def ends_everything(self) -> bool:
        return self.signal == _signal.SIGKILL and self.scope is Scope.TREE


_FIRST = Stage(_signal.SIGTERM)
_LAST = Stage(_signal.SIGKILL)
_DEFAULT = (_FIRST, _LAST)


def _stages(value: object) -> tuple[Stage, ...]:
    if isinstance(value, Stage) or not isinstance(value, (tuple, list)):
        raise TypeError(f"stages: a tuple of Stage, not {value!r}")
    for index, stage in enumerate(value):
        if not isinstance(stage, Stage):
            raise TypeError(f"stages[{index}]: a Stage, not {stage!r}")
    stages = tuple(value)
    if not stages or not stages[-1].ends_everything:
        stages = (*stages, _LAST)
    if len(stages) > MAX_STAGES:
        raise ValueError(f"stages: at most {MAX_STAGES} with the final SIGKILL, not {len(stages)}")
    return stages


class _PolicyFields(NamedTuple):
    stages: tuple[Stage, ...]


class KillPolicy(_PolicyFields):
    """The stages by which a tree is ended, in order.

    A stage that is SIGTERM, SIGINT, SIGHUP or another signal that a process may handle is followed
    by SIGCONT for the members that are stopped, which would otherwise never see it.

    Args:
        stages: default is SIGTERM to the tree, 5 s grace, SIGKILL to the tree, 5 s grace. A policy
            that does not end with SIGKILL to the tree gets that as its last stage, so that a tree
            that ignores everything else still ends. At most 8.

    Raises:
        TypeError, ValueError: naming the stage.
    """

    __slots__ = ()

    def __new__(cls, stages: Any = _DEFAULT) -> KillPolicy:
        return super().__new__(cls, _stages(stages))

    @classmethod
    def after(cls, grace: float) -> KillPolicy:
        """SIGTERM to the tree, `grace` seconds, SIGKILL to the tree."""
        return cls(stages=(Stage(_signal.SIGTERM, grace), _LAST))

    @classmethod
    def now(cls) -> KillPolicy:
        """SIGKILL to the tree at once."""
        return cls(stages=(_LAST,))

    @property
    def duration(self) -> float:
        """Seconds until the last stage's grace has passed."""
        return sum(stage.grace for stage in self.stages)


def to_policy(value: object, argument: str) -> KillPolicy:
    if not isinstance(value, KillPolicy):
        raise TypeError(f"{argument}: a KillPolicy, not {value!r}")
    return value
