"""When a child is started again, and after how long: pure values and arithmetic.

The words are those of Erlang/OTP's supervisor and of systemd.service(5).
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from proctree.policy import to_seconds
from proctree.supervisor.fields import to_limit, to_period


class Restart(enum.StrEnum):
    """Which ends of a child are followed by a new start.

    `ALWAYS` (OTP: permanent): every one. `ON_FAILURE` (transient): every one but an exit with a
    status that the spec calls a success. `NEVER` (temporary): none.
    """

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Strategy(enum.StrEnum):
    """Who is restarted with a child.

    `ONE_FOR_ONE`: nobody. `ONE_FOR_ALL`: all others. `REST_FOR_ONE`: those that were started after
    it.
    """

    ONE_FOR_ONE = "one-for-one"
    ONE_FOR_ALL = "one-for-all"
    REST_FOR_ONE = "rest-for-one"


class AutoShutdown(enum.StrEnum):
    """Whether a supervisor ends by itself when children have ended for good: after the last of them
    (`ALL`), after the first (`ANY`), or not at all (`NEVER`)."""

    ALL = "all"
    ANY = "any"
    NEVER = "never"


def one_of(kind: type[enum.StrEnum], value: Any, argument: str) -> Any:
    """The member of that value.

    Raises:
        ValueError: there is none; naming the argument and the choices.
    """
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(repr(str(member)) for member in kind)
        raise ValueError(f"{argument}: {value!r} is none of {names}") from None


def _to_base(value: Any) -> float:
    """0 is allowed: a start at once."""
    base = to_seconds(value, "base")
    if math.isinf(base):
        raise ValueError("base: must be finite")
    return base


def _to_cap(value: Any) -> float:
    return to_period(value, "cap")


def _to_reset(value: Any) -> float:
    return to_limit(value, "reset")


def _to_factor(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"factor: a number, not {value!r}")
    if not 1 <= value < math.inf:
        raise ValueError(f"factor: at least 1, not {value}")
    return float(value)


@attrs.frozen
class Backoff:
    """How long a child waits before it is started again: exponential, with full jitter. Before the
    n-th start in a row the wait is a random time between 0 and `base * factor ** (n - 1)`, but not
    more than `cap`: children that failed together do not come back together.

    Args:
        base: seconds; 0 starts it again at once. Default 0.1, systemd's RestartSec.
        cap: seconds. Default 60.
        factor: default 2.
        reset: a child that was up for so many seconds begins again with `base`. Default 60.

    Raises:
        TypeError, ValueError: naming the field.
    """

    base: float = attrs.field(default=0.1, converter=_to_base)
    cap: float = attrs.field(default=60.0, converter=_to_cap)
    factor: float = attrs.field(default=2.0, converter=_to_factor)
    reset: float = attrs.field(default=60.0, converter=_to_reset)

    def delay(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds before the start that follows the `failures`-th end in a row."""
        try:
            longest = self.base * self.factor ** (failures - 1)
        except OverflowError:
            longest = self.cap
        return random() * min(self.cap, longest)


class Intensity:
    """OTP's restart intensity: whether there were more than `restarts` within `period` seconds.
    `restarts` None is no limit."""

    def __init__(self, restarts: int | None, period: float) -> None:
        self.restarts = restarts
        self.period = period
        self._times: deque[float] = deque()

    def note(self, now: float) -> bool:
        """Of one more restart, at `now` (seconds, monotonic). Returns False if that is too many."""
        if self.restarts is None:
            return True
        self._times.append(now)
        while now - self._times[0] > self.period:
            self._times.popleft()
        return len(self._times) <= self.restarts
