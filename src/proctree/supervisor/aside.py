"""A function of the user's, called off the loop within a time.

A thread cannot be ended from outside, so a function that hangs keeps its thread for as long as it
hangs. That is all it may cost: there is one place for a call, and the next call waits for the place
to be free, within its own time. So whoever calls again and again has one thread, however long a
function hangs, and the loop none.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import attrs

from proctree import worker
from proctree.loop import Loop, Timer

T = TypeVar("T")

TEXT_MAX = 300
"""Characters that are kept of what somebody else has written."""


@attrs.frozen
class Raised:
    """The function raised. The exception itself stays on the thread: its frames hold whatever the
    function had, and to make text of it is to run the user's code.

    Attributes:
        text: its type and what it says.
    """

    text: str


@attrs.frozen
class TimedOut:
    """The function had not returned in time, or not even begun; what comes of it is dropped."""

    text: str


def shorten(text: str, limit: int = TEXT_MAX) -> str:
    """One line that can be printed, of at most `limit` characters."""
    cut = text[:limit]
    line = "".join(char if char.isprintable() else " " for char in cut).strip()
    return line if len(text) <= limit else f"{line}..."


def describe(error: BaseException) -> str:
    """Type and text of an exception, whatever its `__str__` does."""
    kind = type(error).__name__
    try:
        text = shorten(str(error))
    except BaseException:
        text = ""
    return f"{kind}: {text}" if text else kind


def to_function(value: Any, argument: str = "function") -> Callable[..., Any]:
    """Something that can be called on a thread."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{argument}: a function, not {value!r}")
    called = getattr(type(value), "__call__", None)  # noqa: B004
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(called):
        raise TypeError(f"{argument}: an ordinary function, not the async one {value!r}")
    return value  # type: ignore[no-any-return]


def result_of(function: Callable[..., T], *args: object) -> T:
    """What the function returns, unless that is a coroutine: nobody would ever run it.

    Raises:
        TypeError: it is one.
    """
    result = function(*args)
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("it returned a coroutine, which nothing runs here")
    return result


class _Asked(Generic[T]):
    """A call that was asked for."""

    __slots__ = ("at", "began", "done", "function", "timeout", "timer")

    def __init__(
        self,
        function: Callable[[], T],
        timeout: float,
        done: Callable[[T | Raised | TimedOut], None],
    ) -> None:
        self.function: Callable[[], T] | None = function
        self.timeout = timeout
        self.done = done
        self.at = time.monotonic()
        self.began = False
        self.timer: Timer | None = None


class Aside:
    """The place for one call at a time; on the loop's thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._awaited: _Asked[Any] | None = None
        self._under_way: _Asked[Any] | None = None

    @property
    def awaited(self) -> bool:
        """Whether a `done` is still to come."""
        return self._awaited is not None

    @property
    def busy(self) -> bool:
        """Whether some call has not returned yet, though its time may be over."""
        return self._under_way is not None

    def call(
        self,
        function: Callable[[], T],
        timeout: float,
        done: Callable[[T | Raised | TimedOut], None],
    ) -> None:
        """Calls `function` on a thread, and `done` on the loop exactly once, never in here.

        Args:
            timeout: seconds, counted from now; infinite is possible.
            done: gets what the function returned, or why that is not to be had.

        Raises:
            RuntimeError: the `done` of another call has not come yet.
        """
        if self._awaited is not None:
            raise RuntimeError("another call is still awaited")
        asked = self._awaited = _Asked(function, timeout, done)
        if not math.isinf(timeout):
            asked.timer = self._loop.call_later(timeout, partial(self._late, asked))
        if self._under_way is None:
            self._begin(asked)

    def cancel(self) -> None:
        """The `done` that is awaited does not come. A function that has begun goes on."""
        if self._awaited is not None:
            self._drop(self._awaited)

    def _drop(self, asked: _Asked[Any]) -> None:
        self._awaited = None
        asked.function = None
        if asked.timer is not None:
            asked.timer.cancel()

    def _begin(self, asked: _Asked[Any]) -> None:
        # Under way from here on and not from when a thread is there: while none is to be had the
        # worker keeps the job, and must not be given one after the other.
        self._under_way = asked
        try:
            worker.run(partial(self._work, asked))
        except RuntimeError as error:
            failure = Raised(f"no thread to call it on: {error}")
            self._loop.post(partial(self._returned, asked, failure))

    def _work(self, asked: _Asked[Any]) -> None:
        """On a thread of the worker's, which nothing that the function raises may end."""
        asked.began = True
        # What the function holds goes on this thread, and not on the loop.
        function, asked.function = asked.function, None
        result = None
        if function is not None:
            try:
                result = function()
            except BaseException as error:
                result = Raised(describe(error))
        self._loop.post(partial(self._returned, asked, result))

    def _returned(self, asked: _Asked[Any], result: Any) -> None:
        self._under_way = None
        if self._awaited is asked:
            self._drop(asked)
            asked.done(result)
        elif self._awaited is not None:
            self._begin(self._awaited)

    def _late(self, asked: _Asked[Any]) -> None:
        text = f"not done within {asked.timeout:g} s"
        other = self._under_way
        if other is not None and other is not asked:
            hanging = time.monotonic() - other.at
            text = f"not begun: the call before it is still hanging after {hanging:.1f} s"
        elif not asked.began:
            text = f"not begun within {asked.timeout:g} s: there is no thread for it"
        self._drop(asked)
        asked.done(TimedOut(text))
