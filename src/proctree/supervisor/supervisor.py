"""`Supervisor`: any number of trees, started in order, kept alive, and ended in reverse order."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn, TypeVar

import attrs

from proctree import events, subscriptions, transitions
from proctree import loop as _loop
from proctree.errors import ProctreeError
from proctree.latch import Latch
from proctree.loop import Timer
from proctree.outcome import Outcome
from proctree.policy import KillPolicy, to_seconds
from proctree.records import Reason
from proctree.supervisor import happenings
from proctree.supervisor.attempt import Attempt
from proctree.supervisor.beating import BeatEvent, BeatFailed, Beating
from proctree.supervisor.errors import ChildFailed, IntensityExceeded, StartFailed
from proctree.supervisor.fields import to_period
from proctree.supervisor.heartbeat import Beat
from proctree.supervisor.manager import Manager
from proctree.supervisor.notification import Notification
from proctree.supervisor.plan import Action, Phase, Plan, Rules, Stage
from proctree.supervisor.plan import Child as Planned
from proctree.supervisor.probing import Probing
from proctree.supervisor.readiness import Completed
from proctree.supervisor.restarts import (
    AutoShutdown,
    Strategy,
    one_of,
)
from proctree.supervisor.spec import ChildSpec
from proctree.supervisor.tail import Tail

STOP_TIMEOUT = 90.0
"""Seconds; systemd's DefaultTimeoutStopSec."""

EXIT_FAILED = 1

EXITING = "the interpreter is exiting"
EXIT_SECONDS = 5.0
"""That the loop may take to hear of it."""

T = TypeVar("T")


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


class _Child:
    """A child and its present start. Everything on the loop's thread."""

    def __init__(self, supervisor: _Running, spec: ChildSpec) -> None:
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
        if spec.ready is not None and not isinstance(spec.ready, Completed):
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
            pid=None if handle is None else handle.pid,
            tree_id=None if handle is None else handle.tree_id,
            status="" if attempt is None else attempt.status,
            starts=self.starts,
            restarts=planned.restarts,
            outcome=self.outcome,
            lines=self.tail.lines(),
        )


def _reason_without_outcome(attempt: Attempt) -> Reason:
    return Reason.KILLED if attempt.error is None else Reason.EXEC_FAILED


Decision = list[tuple[Action, Any]]


class _Running:
    """The plan, bound to the loop and to the children. Everything on the loop's thread."""

    def __init__(self, name: str, rules: Rules, stop_timeout: float) -> None:
        self.name = name
        self.owner_pid = os.getpid()
        self.loop = _loop.get()
        self.plan = Plan(rules)
        self.children: dict[str, _Child] = {}
        self.failure: ProctreeError | None = None
        self.asked = False
        """To start, or to stop: then there will be an end."""
        self.started = False
        self.stopped_for = ""
        self.up = Latch()
        self.closed = Latch()
        self.observers: list[Callable[[], None]] = []
        """Called when `up` or `closed` has been set. Must not block, nor raise."""
        self.manager: Manager | None = None
        self._stop_timeout = stop_timeout
        self._stop_why = ""
        self._backoffs: dict[str, Timer] = {}
        self._deadline: Timer | None = None
        self._acting = False
        self._actions: Decision = []
        self._defective = False
        _all.add(self)

    def now(self) -> float:
        return time.monotonic()

    def require_owner(self) -> None:
        """A forked child holds a copy of us, but none of our trees, and no loop.

        Raises:
            ProctreeError: this is one.
        """
        if self.owner_pid != os.getpid():
            raise ProctreeError(
                f"supervisor {self.name!r} belongs to process {self.owner_pid}; this is process "
                f"{os.getpid()}, a fork of it"
            )

    def post(self, function: Callable[[], None]) -> None:
        """From any thread.

        Raises:
            ProctreeError: in a forked child.
        """
        self.require_owner()
        self.loop.post(function)

    def tell(self, kind: Callable[..., Any], *values: Any) -> None:
        subscriptions.publish(kind(self.name, *values, transitions.now()))

    def act(self, decide: Callable[..., Decision], *args: Any, **facts: Any) -> None:
        """Asks the plan and does what it wants, in order: what comes of one action waits for the
        others."""
        if self._defective:
            self._look_for_end()
            return
        with self._guarded(decide.__name__):
            self._actions += decide(*args, **facts)
        if self._acting:
            return
        self._acting = True
        while self._actions:
            action, payload = self._actions.pop(0)
            with self._guarded(action.value):
                self._DO[action](self, payload)
        self._acting = False

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            events.error(
                "supervisor.defect", supervisor=self.name, at=what, error=repr(error), exc_info=True
            )
            if not self._defective:
                self._abandon(what, error)

    def _abandon(self, what: str, error: Exception) -> None:
        """Ours to mend, but until then it must not leave a tree that nobody ends, nor anybody
        waiting: the plan is not to be believed any more, so all is ended without it."""
        self._defective = True
        self.plan.stage = Stage.CLOSED
        self.failure = ProctreeError(
            f"supervisor {self.name!r} has a defect (at {what}: {error!r}) and ended its children"
        )
        self._actions.clear()
        for timer in self._backoffs.values():
            timer.cancel()
        for child in self.children.values():
            if child.attempt is not None and child.runs:
                child.attempt.stop("its supervisor has a defect", KillPolicy.now())
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self.closed.is_set() or any(child.runs for child in self.children.values()):
            return
        for child in self.children.values():
            self._release(child, self._start_failed(child, "its supervisor has a defect"))
            for resolve in child.gone:
                resolve()
        self._finished(None)

    def begin(self) -> None:
        """From any thread."""
        self.post(lambda: self.act(self.plan.begin))

    # -- what happens to children

    def ready(self, child: _Child) -> None:
        self.act(self.plan.ready, child.spec.name, self.now())
        self._release(child, None)

    def ended(self, child: _Child) -> None:
        attempt = child.attempt
        assert attempt is not None
        if not attempt.ready:
            self._release(child, self._start_failed(child, attempt.why))
        self.act(
            self.plan.ended,
            child.spec.name,
            self.now(),
            failed=attempt.failed,
            why=attempt.why,
            unwanted=child.unwanted,
        )

    def _start_failed(self, child: _Child, why: str) -> StartFailed:
        return StartFailed(self.name, child.spec.name, why, child.outcome, child.tail.lines())

    def _release(self, child: _Child, error: Exception | None) -> None:
        waiting, child.up = child.up, []
        for resolve in waiting:
            resolve(error)

    # -- what is to be done

    def _launch(self, planned: Planned) -> None:
        self.children[planned.name].launch()

    def _stop(self, planned: Planned) -> None:
        self._end(planned, None)

    def _stop_now(self, planned: Planned) -> None:
        self._end(planned, KillPolicy.now())

    def _end(self, planned: Planned, policy: KillPolicy | None) -> None:
        child = self.children[planned.name]
        assert child.attempt is not None
        if not child.attempt.stopping:
            child._tell(happenings.ChildStopping)
        child.attempt.stop(self._stop_why or "stopped by its supervisor", policy)

    def _arm_backoff(self, payload: tuple[Planned, float]) -> None:
        planned, delay = payload
        child = self.children[planned.name]
        assert child.attempt is not None
        why = child.attempt.why
        self.tell(happenings.ChildRestarting, planned.name, planned.restarts, delay, why)

        def due() -> None:
            del self._backoffs[planned.name]
            self.act(self.plan.backoff_due, planned.name)

        self._backoffs[planned.name] = self.loop.call_later(delay, due)

    def _disarm_backoff(self, planned: Planned) -> None:
        self._backoffs.pop(planned.name).cancel()

    def _forget(self, planned: Planned) -> None:
        child = self.children.pop(planned.name)
        self._release(child, self._start_failed(child, "it was removed"))
        for resolve in child.gone:
            resolve()

    def _done(self, planned: Planned) -> None:
        child = self.children[planned.name]
        self._release(child, self._start_failed(child, "its supervisor stops"))
        self.tell(happenings.ChildDone, planned.name)

    def _started(self, _nothing: None) -> None:
        self.started = True
        self.tell(happenings.SupervisorStarted, len(self.children))
        if self.manager is not None:
            self.manager.started(len(self.children))
        self.up.set()
        self._turn()

    def _give_up(self, payload: tuple[Planned, str]) -> None:
        planned, why = payload
        child = self.children[planned.name]
        starting = not self.up.is_set()
        if not starting:
            rules = self.plan.rules
            why = f"more than {rules.restarts} restarts within {rules.period:g} s; last, {why}"
        kind = StartFailed if starting else IntensityExceeded
        lines = child.tail.lines()
        self.failure = kind(self.name, planned.name, why, child.outcome, lines)
        self.tell(happenings.SupervisorGaveUp, planned.name, why, lines)
        self.tell(happenings.ChildDone, planned.name)

    def _stopping(self, why: str) -> None:
        self.stopped_for = why
        self._stop_why = f"its supervisor stops: {why}" if why else ""
        self.tell(happenings.SupervisorStopping, why)
        if self.manager is not None:
            self.manager.stopping()
        self._deadline = self.loop.call_later(self._stop_timeout, self._hurry)

    def let_go(self, done: Callable[[], None]) -> None:
        """Nothing is launched any more; `done` when all that was launched is known to be."""
        self.act(self.plan.shutdown, EXITING)
        self.loop.post(done)

    def _hurry(self) -> None:
        self.act(self.plan.hurry)

    def _finished(self, _nothing: None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self.manager is not None:
            self.manager.close()
        self.tell(happenings.SupervisorStopped)
        self.closed.set()
        self.up.set()
        self._turn()

    def _turn(self) -> None:
        for observer in tuple(self.observers):
            observer()

    _DO: ClassVar[dict[Action, Callable[[_Running, Any], None]]] = {
        Action.LAUNCH: _launch,
        Action.STOP: _stop,
        Action.STOP_NOW: _stop_now,
        Action.ARM_BACKOFF: _arm_backoff,
        Action.DISARM_BACKOFF: _disarm_backoff,
        Action.FORGET: _forget,
        Action.DONE: _done,
        Action.STARTED: _started,
        Action.GIVE_UP: _give_up,
        Action.STOPPING: _stopping,
        Action.FINISHED: _finished,
    }


_all: weakref.WeakSet[_Running] = weakref.WeakSet()


def _at_exit() -> None:
    """What holds the children ends them when the interpreter is gone, or before (watched.py, which
    is asked after us): to be started again is not what they are ended for."""
    for running in tuple(_all):
        if running.owner_pid == os.getpid() and not running.closed.is_set():
            done = Latch()
            running.post(lambda running=running, done=done: running.let_go(done.set))  # type: ignore[misc]
            done.wait(EXIT_SECONDS)


atexit.register(_at_exit)


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
        self._running = _Running(name, rules, to_seconds(stop_timeout, "stop_timeout"))
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
        child = running.children[spec.name] = _Child(running, spec)
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
            IntensityExceeded: it gave up.
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
