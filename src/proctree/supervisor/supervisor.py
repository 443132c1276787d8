"""`Supervisor`: any number of trees, started in order, kept alive, and ended in reverse order."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

from proctree.errors import ProctreeError
from proctree.latch import Latch
from proctree.policy import to_seconds
from proctree.supervisor.child import Child, ChildInfo
from proctree.supervisor.errors import ChildFailed
from proctree.supervisor.fields import to_period
from proctree.supervisor.manager import Manager
from proctree.supervisor.plan import Rules, Stage
from proctree.supervisor.restarts import (
    AutoShutdown,
    Strategy,
    one_of,
)
from proctree.supervisor.running import Running
from proctree.supervisor.spec import ChildSpec

STOP_TIMEOUT = 90.0
"""Seconds; systemd's DefaultTimeoutStopSec."""

EXIT_FAILED = 1

T = TypeVar("T")


class Supervisor:
    """Keeps any number of trees alive.

    Children are started in the order given, each when the one before it is ready, and stopped in
    reverse order. One that ends is started again by its restart policy, after a while, and with the
    others that the strategy names. When that happens too often the supervisor gives up: it stops
    all children, in order, and says which one it was, why, and what that one said last.

    It is the whole of a program by `main`, or a part of one by `with`. Every method may be called
    from any thread, from subscribers and from callbacks.

    Args:
        children: each a `ChildSpec`, in the order of their start.
        name: for events and messages. Default "supervisor".
        strategy: `"one-for-one"` (default), `"one-for-all"` or `"rest-for-one"`.
        restarts, period: the restart intensity: more than `restarts` restarts of its children
            within `period` seconds are too many. Default 5 in 10 s, systemd's start limit; None:
            no limit.
        auto_shutdown: whether it ends by itself: when all children have ended for good (`"all"`,
            default), when one has (`"any"`), or `"never"`.
        stop_timeout: seconds that the whole shutdown may take; what is still there then is ended
            by SIGKILL at once. Default 90.

    Raises:
        TypeError, ValueError: a bad argument, by name; two children of the same name.
    """

    def __init__(
        self,
        children: Iterable[ChildSpec] = (),
        *,
        name: str = "supervisor",
        strategy: str = Strategy.ONE_FOR_ONE,
        restarts: int | None = 5,
        period: float = 10.0,
        auto_shutdown: str = AutoShutdown.ALL,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: a string, not {name!r}")
        if isinstance(restarts, bool) or not isinstance(restarts, (int, type(None))):
            raise TypeError(f"restarts: a number or None, not {restarts!r}")
        if restarts is not None and restarts < 0:
            raise ValueError(f"restarts: {restarts} is below 0")
        rules = Rules(
            strategy=one_of(Strategy, strategy, "strategy"),
            restarts=restarts,
            period=to_period(period, "period"),
            auto_shutdown=one_of(AutoShutdown, auto_shutdown, "auto_shutdown"),
        )
        specs = [_to_spec(spec) for spec in children]
        for spec_name, count in Counter(spec.name for spec in specs).items():
            if count > 1:
                raise ValueError(f"name: there are two children called {spec_name!r}")
        self._running = Running(name, rules, to_seconds(stop_timeout, "stop_timeout"))
        for spec in specs:
            self._insert(spec)
        self._asked = False
        # Taking the token is one atomic step, so that only one start wins; and no lock, which a
        # signal handler would wait for in the thread that has it.
        self._token = [object()]

    def _insert(
        self, spec: ChildSpec, up: Callable[[Exception | None], None] | None = None
    ) -> None:
        """`up` is told before this returns when its start fails at once."""
        running = self._running
        child = running.children[spec.name] = Child(running, spec)
        if up is not None:
            child.up.append(up)
        running.act(running.plan.add, spec.name, spec.restart, spec.backoff)

    @property
    def name(self) -> str:
        return self._running.name

    # -- beginning

    def start(self) -> None:
        """Starts all children and returns when all are ready.

        Raises:
            StartFailed: one could not be started, or ended before it was ready. Those that had been
                started have been stopped.
            ProctreeError: it was started before; or it stopped before all were ready.
        """
        self._take_token()
        if not self._begin():
            self._raise_stopped()

    def _raise_stopped(self) -> NoReturn:
        why = self._running.stopped_for
        raise ProctreeError(
            f"supervisor {self.name!r} stopped before all of its children were ready"
            + (f": {why}" if why else "")
        )

    def _take_token(self) -> None:
        self._running.require_owner()
        try:
            self._token.pop()
        except IndexError:
            raise ProctreeError(f"supervisor {self.name!r} was started before") from None
        self._running.asked = True

    def _begin(self) -> bool:
        """Returns False when it was stopped before all were ready."""
        running = self._running
        try:
            running.begin()
            running.up.wait()
        except BaseException:
            self._end_quietly()
            raise
        if not running.started:
            self._wait_out()
            self._raise_failure()
        return running.started

    def _raise_failure(self) -> None:
        """A copy: one exception that is raised again and again grows by a traceback each time."""
        if self._running.failure is not None:
            raise copy.copy(self._running.failure)

    def run(self) -> None:
        """`start`, and `wait` until it ends: by itself, by `stop`, or by SIGTERM or SIGINT, of
        which the first stops the children in order and a second ends them at once. The signals are
        taken only when this is called on the main thread, and given back afterwards.

        Where our own environment has a NOTIFY_SOCKET, as under systemd with Type=notify, it is told
        READY=1 and STOPPING=1, and WATCHDOG=1 as often as WATCHDOG_USEC asks for.

        Raises:
            StartFailed: as `start`.
            IntensityExceeded, ChildSurvived: it gave up.
            ProctreeError: it was started before.
        """
        self._take_token()
        running = self._running
        running.manager = Manager(running.loop)
        with self._signals():
            try:
                if self._begin():
                    self.wait()
            except BaseException:
                # What a signal handler of somebody else's raises would leave children that nobody
                # waits for.
                self._end_quietly()
                raise

    def main(self) -> int:
        """`run` for a program that does nothing else.

        Returns:
            The exit status: 0 when it was stopped or has ended by itself; 1 when it gave up, and
            then standard error says why.
        """
        try:
            self.run()
        except ChildFailed as failure:
            # There may be no standard error, or nobody who reads it: the status says it too.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"proctree: {failure}\n")
                sys.stderr.flush()
            return EXIT_FAILED
        return 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(signo: int, _frame: FrameType | None) -> None:
            if os.getpid() != self._running.owner_pid:
                # A fork of us has our handlers and none of our children: it is meant itself.
                signal.signal(signo, before[signal.Signals(signo)])
                signal.raise_signal(signo)
            elif self._asked:
                self.stop_now()
            else:
                self._asked = True
                self._shut_down(f"got {signal.Signals(signo).name}")

        self._asked = False
        before: dict[signal.Signals, Any] = {}
        for signo in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(signo)
            # nohup(1) and shells have them ignored for jobs in the background: so it stays. None is
            # a handler that is not Python's, and could not be given back.
            if handler is not signal.SIG_IGN and handler is not None:
                before[signo] = handler
        try:
            for signo in before:
                signal.signal(signo, end)
            yield
        finally:
            for signo, handler in before.items():
                signal.signal(signo, handler)

    # -- while it runs

    def add(self, spec: ChildSpec, *, wait: bool = True) -> None:
        """One more child, the last in order.

        Args:
            spec: the child.
            wait: return when it is ready. Otherwise at once.

        Raises:
            ValueError: there is a child of that name.
            StartFailed: with `wait`: it ended before it was ready, or was removed; its restart
                policy goes on all the same.
            ProctreeError: the supervisor stops, or has stopped.
        """
        _to_spec(spec, "spec")
        done = Latch()
        errors: list[Exception] = []

        def resolve(error: Exception | None) -> None:
            if error is not None:
                errors.append(error)
            done.set()

        def insert() -> None:
            present = self._running.children.get(spec.name)
            if present is not None:
                still = ", which is being removed" if present.gone else ""
                raise ValueError(f"name: there is a child called {spec.name!r}{still}")
            if not self._running.plan.accepts:
                raise ProctreeError(f"supervisor {self.name!r} is stopping: nothing can be added")
            if wait and self._running.plan.stage is not Stage.NEW:
                self._insert(spec, resolve)
            else:
                self._insert(spec)
                done.set()

        self._ask(insert)
        done.wait()
        if errors:
            raise errors[0]

    def remove(self, name: str, *, wait: bool = True) -> None:
        """Stops a child and forgets it.

        Args:
            name: of the child.
            wait: return when nothing of it runs any more. Otherwise at once.

        Raises:
            KeyError: there is no such child.
        """
        done = Latch()

        def remove() -> None:
            running = self._running
            running.children[name].gone.append(done.set)
            running.act(running.plan.remove, name)

        self._ask(remove)
        if wait:
            done.wait()

    def restart(self, name: str) -> None:
        """Stops a child if it runs, and starts it at once, or in its turn if it has one; returns
        before that is done. The restart intensity does not count it.

        Raises:
            KeyError: there is no such child.
            ProctreeError: the supervisor was not started, stops, or has stopped.
        """

        def restart() -> None:
            running = self._running
            _known = running.children[name]
            if running.plan.stage is Stage.NEW:
                raise ProctreeError(f"supervisor {self.name!r} was not started")
            if not running.plan.accepts:
                raise ProctreeError(f"supervisor {self.name!r} is stopping: nothing is restarted")
            running.act(running.plan.restart, name)

        self._ask(restart)

    def children(self) -> tuple[ChildInfo, ...]:
        """All children as they are now, in the order of their start."""
        running = self._running
        return self._ask(
            lambda: tuple(
                child.info(running.plan.children[name]) for name, child in running.children.items()
            )
        )

    def child(self, name: str) -> ChildInfo:
        """One child as it is now.

        Raises:
            KeyError: there is no such child.
        """
        running = self._running
        return self._ask(lambda: running.children[name].info(running.plan.children[name]))

    def _ask(self, function: Callable[[], T]) -> T:
        """Calls it on the loop's thread, where nothing else changes meanwhile."""
        self._running.forbid_loop()
        done = Latch()
        results: list[T] = []
        errors: list[Exception] = []

        def call() -> None:
            try:
                results.append(function())
            except Exception as error:
                errors.append(error)
            finally:
                done.set()

        self._running.post(call)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    # -- ending

    def stop(self, reason: str = "asked to stop") -> None:
        """Asks for the shutdown, in reverse order, and returns at once; `wait` waits for it. May be
        called in a signal handler.

        Args:
            reason: for people.
        """
        self._shut_down(reason)

    def _shut_down(self, why: str) -> None:
        running = self._running
        running.asked = True
        running.post(lambda: running.act(running.plan.shutdown, why))

    def stop_now(self) -> None:
        """Asks for the end of all children at once, by SIGKILL, and returns. May be called in a
        signal handler, and while `stop` is under way."""
        self._running.asked = True
        self._running.post(self._running._hurry)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until no child runs any more and none will be started.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            Whether that has come; False when the time ran out first.

        Raises:
            IntensityExceeded, StartFailed: it gave up.
            RuntimeError: without a timeout, and it was neither started nor stopped.
        """
        seconds = None if timeout is None else to_seconds(timeout, "timeout")
        self._running.require_owner()
        self._running.forbid_loop()
        if timeout is None and not self._running.asked:
            raise RuntimeError(f"supervisor {self.name!r} was not started: nothing to wait for")
        ended = self._running.closed.wait(seconds)
        if ended:
            self._raise_failure()
        return ended

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Stops all children and waits for the end; raises `IntensityExceeded` if it had given up
        and nothing else is being raised."""
        self.stop("left the with block")
        self._wait_out()
        if kind is None:
            self._raise_failure()

    def _wait_out(self) -> None:
        """An impatient interrupt makes the end come at once, and then goes on."""
        try:
            self._running.closed.wait()
        except BaseException:
            self.stop_now()
            self._running.closed.wait()
            raise

    def _end_quietly(self) -> None:
        self.stop("interrupted")
        with contextlib.suppress(BaseException):
            self._wait_out()

    def __repr__(self) -> str:
        running = self._running
        return f"<Supervisor {self.name!r} {running.plan.stage}, {len(running.children)} children>"


def _to_spec(value: Any, argument: str = "children") -> ChildSpec:
    if not isinstance(value, ChildSpec):
        raise TypeError(f"{argument}: a ChildSpec, not {value!r}")
    return value
