"""What is done about a key: the decision table, and nothing else. Pure.

| what is found                                   | what is done                                   |
|-------------------------------------------------|------------------------------------------------|
| nothing                                         | start                                          |
| it runs                                         | reconnect                                      |
| finished, with an exit status that is allowed   | its result; nothing is started                 |
| failed: another exit status, or it was ended    | start; the earlier attempt is kept             |
| gone: no exit was recorded (the host restarted) | start; the earlier attempt is kept             |
| unreadable                                      | start; what is unreadable is kept aside        |
| submitted, perhaps: an intent without a handle  | find it; only what is not found is submitted   |
| any of these, with another target               | refused, unless the key alone counts           |
"""

from __future__ import annotations

import enum
from collections.abc import Collection


class Found(enum.Enum):
    """What is known of the last attempt of a key."""

    NOTHING = "nothing"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    GONE = "gone"
    UNREADABLE = "unreadable"
    UNSURE = "unsure"
    """Of a job: whether it was submitted is not known."""


class Decision(enum.Enum):
    """What is done about it."""

    START = "start"
    RECONNECT = "reconnect"
    RESULT = "result"
    FIND = "find"
    REFUSE = "refuse"


TABLE: dict[Found, Decision] = {
    Found.NOTHING: Decision.START,
    Found.RUNNING: Decision.RECONNECT,
    Found.FINISHED: Decision.RESULT,
    Found.FAILED: Decision.START,
    Found.GONE: Decision.START,
    Found.UNREADABLE: Decision.START,
    Found.UNSURE: Decision.FIND,
}

_WITHOUT_TARGET = frozenset({Found.NOTHING, Found.UNREADABLE})
"""Where no target is known that could be another one."""


def decide(found: Found, *, same_target: bool, key_alone: bool = False) -> Decision:
    """One row of the table.

    Args:
        found: what is known of the last attempt.
        same_target: whether it had the target that is wanted now.
        key_alone: whether it is to be taken for the same whatever its target.
    """
    if not same_target and not key_alone and found not in _WITHOUT_TARGET:
        return Decision.REFUSE
    return TABLE[found]


def judge(returncode: int | None, by_itself: bool, allowed: Collection[int]) -> Found:
    """Whether an attempt that has ended has finished or failed.

    Args:
        returncode: as `Outcome.returncode`.
        by_itself: whether it ended by itself: what was ended has not finished, even if it exited
            with status 0 then.
        allowed: the exit statuses that count as success.
    """
    return Found.FINISHED if by_itself and returncode in allowed else Found.FAILED
