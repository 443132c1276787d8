"""What a child is: plain values, checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from proctree.command import Target, to_flag
from proctree.stdio import Stdio
from proctree.supervisor.fields import to_limit, to_period
from proctree.supervisor.heartbeat import Heartbeat
from proctree.supervisor.readiness import Notified, OutputLine, Readiness
from proctree.supervisor.restarts import Backoff, Restart, one_of
from proctree.watched import WatchedSubprocess

if TYPE_CHECKING:
    from proctree.supervisor.tail import Tail

TAIL = 4096
"""Bytes of output that are kept of a child."""

EXTENSION = 300.0


def _to_name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"name: a string, not {value!r}")
    if not value or "\0" in value:
        raise ValueError(f"name: {value!r} is empty or has a null byte")
    return value


def _to_statuses(value: Any) -> frozenset[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"success: exit statuses, not {value!r}")
    statuses = frozenset(value)
    for status in statuses:
        if isinstance(status, bool) or not isinstance(status, int):
            raise TypeError(f"success: an exit status, not {status!r}")
        if not 0 <= status <= 255:
            raise ValueError(f"success: {status} is no exit status (0 to 255)")
    return statuses


def _to_kind(kind: Any, value: Any, argument: str, what: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{argument}: {what}, not {value!r}")
    return value


def _to_tail(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"tail: a number of bytes, not {value!r}")
    if value < 0:
        raise ValueError(f"tail: {value} is below 0")
    return value


@attrs.frozen(init=False)
class ChildSpec:
    """One child of a `Supervisor`.

    Args:
        name: unique among the children; also for `ps` and logs.
        target: as `WatchedSubprocess`: a command, a callable, or `"module:function"`.
        restart: which ends are followed by a new start: `"always"` (default), `"on-failure"` or
            `"never"`. A child whose heartbeat was rejected is never started again.
        success: the exit statuses that are no failure. Default: 0.
        backoff: how long it waits before it is started again. Default `Backoff()`.
        ready: how it is known that it can do its work: `Tcp`, `UnixSocket`, `Http`, `File`,
            `Check`, `OutputLine`, `Notified` or `Completed`. Default None: as soon as it runs.
        heartbeat: a `Heartbeat`, or None.
        watchdog: seconds in which it has to say WATCHDOG=1 again and again, from when it is ready
            on; sd_watchdog_enabled(3). Default None: it has not.
        notify: whether it gets a NOTIFY_SOCKET (sd_notify(3)). Default: when `ready` is
            `Notified`, or there is a watchdog.
        extension: seconds by which it may put off its deadlines, that for being ready and that of
            a stage of its kill policy, by EXTEND_TIMEOUT_USEC: in all, at each start. Default 300.
        tail: bytes of its output that are kept, to be shown when it makes its supervisor give up.
            Default 4096. With 0, output that goes nowhere else does not go through the supervisor.
        options: all others of `WatchedSubprocess`. What differs: `stdin` is DEVNULL by default,
            except with `pty`; `name` is the child's; files for output are appended to, at each
            start; and the variables NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID of our own
            environment are not handed on.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    name: str
    target: Any
    restart: Restart
    success: frozenset[int]
    backoff: Backoff
    ready: Readiness | None
    heartbeat: Heartbeat | None
    watchdog: float | None
    notify: bool
    extension: float
    tail: int
    options: Mapping[str, Any]

    def __init__(
        self,
        name: str,
        target: Target | str | None = None,
        *,
        restart: str = Restart.ALWAYS,
        success: Iterable[int] = (0,),
        backoff: Backoff | None = None,
        ready: Readiness | None = None,
        heartbeat: Heartbeat | None = None,
        watchdog: float | None = None,
        notify: bool | None = None,
        extension: float = EXTENSION,
        tail: int = TAIL,
        **options: Any,
    ) -> None:
        if target is None:
            raise TypeError("target: neither a command nor a callable was given")
        if "name" in options:
            raise TypeError("name: given twice")
        _to_kind(Readiness, ready, "ready", "a readiness check as Tcp or Notified")
        wanted = isinstance(ready, Notified) or watchdog is not None
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            name=_to_name(name),
            target=target,
            restart=one_of(Restart, restart, "restart"),
            success=_to_statuses(success),
            backoff=_to_kind(Backoff, backoff, "backoff", "a Backoff") or Backoff(),
            ready=ready,
            heartbeat=_to_kind(Heartbeat, heartbeat, "heartbeat", "a Heartbeat"),
            watchdog=None if watchdog is None else to_period(watchdog, "watchdog"),
            notify=wanted if notify is None else to_flag(notify, "notify"),
            extension=to_limit(extension, "extension"),
            tail=_to_tail(tail),
            options=options if options.get("pty") else {"stdin": Stdio.DEVNULL, **options},
        )
        if wanted and not self.notify:
            raise ValueError("notify: False, but `ready` or `watchdog` needs a NOTIFY_SOCKET")
        if isinstance(ready, OutputLine):
            self._check_line(ready)
        self.make(None)

    def replace(self, **changes: Any) -> ChildSpec:
        """The same child but for these arguments: a pool is `spec.replace(name=f"worker-{n}")`.

        Raises:
            TypeError, ValueError: as the class.
        """
        fields = attrs.asdict(self, recurse=False)
        options = fields.pop("options")
        return ChildSpec(**{**fields, **options, **changes})

    def _check_line(self, line: OutputLine) -> None:
        wanted = ("stdout", "stderr") if line.stream is None else (line.stream,)
        if not any(self._goes_through(stream) for stream in wanted):
            raise ValueError(
                f"ready: {line.describe()} needs output that goes through the supervisor, but "
                f"{' and '.join(wanted)} does not: use Lines, Chunks, Log or nothing for it"
            )

    def _goes_through(self, stream: str) -> bool:
        from proctree.sinks import Chunks, Lines, Log

        return isinstance(self._output(stream), (Chunks, Lines, Log))

    def _output(self, stream: str) -> Any:
        """Where a stream goes. What would go to ours goes there through us, so that we see it."""
        from proctree.sinks import Chunks
        from proctree.supervisor.passing import to_stderr, to_stdout

        given = self.options.get(stream)
        needed = self.tail or isinstance(self.ready, OutputLine)
        if given not in (None, Stdio.INHERIT, "inherit") or not needed or self.options.get("pty"):
            return given
        return Chunks(to_stdout if stream == "stdout" else to_stderr)

    def make(self, tail: Tail | None) -> WatchedSubprocess:
        """A new tree of this kind, to be launched.

        Raises:
            TypeError, ValueError, ContainmentUnavailable: as `WatchedSubprocess`.
        """
        options = dict(self.options, name=self.name)
        for stream in ("stdout", "stderr"):
            options[stream] = self._output(stream)
        handle = WatchedSubprocess(self.target, **options)
        if tail is not None:
            handle._tree.tap(lambda _stream, data: tail.feed(data))
        return handle
