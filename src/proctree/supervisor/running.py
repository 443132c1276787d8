"""A supervisor at work: the plan, bound to the loop and to the children."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from proctree import events, subscriptions, transitions
from proctree import loop as _loop
from proctree.errors import ProctreeError
from proctree.latch import Latch
from proctree.loop import Timer
from proctree.policy import KillPolicy
from proctree.supervisor import happenings
from proctree.supervisor.child import Child
from proctree.supervisor.errors import ChildFailed, ChildSurvived, IntensityExceeded, StartFailed
from proctree.supervisor.manager import Manager
from proctree.supervisor.plan import Action, Cause, Plan, Rules, Stage
from proctree.supervisor.plan import Child as Planned

EXITING = "the interpreter is exiting"
EXIT_SECONDS = 5.0
"""That the loop may take to hear of it."""

Decision = list[tuple[Action, Any]]

_FAILURES: dict[Cause, type[ChildFailed]] = {
    Cause.START: StartFailed,
    Cause.INTENSITY: IntensityExceeded,
    Cause.SURVIVOR: ChildSurvived,
}


class Running:
    """The plan, bound to the loop and to the children. Everything on the loop's thread."""

    def __init__(self, name: str, rules: Rules, stop_timeout: float) -> None:
        self.name = name
        self.owner_pid = os.getpid()
        self.loop = _loop.get()
        self.plan = Plan(rules)
        self.children: dict[str, Child] = {}
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

    def forbid_loop(self) -> None:
        """Who waits on the loop's thread waits for himself: a log processor of the host, say.

        Raises:
            RuntimeError: this is that thread.
        """
        if self.loop.is_current_thread():
            raise RuntimeError(f"supervisor {self.name!r}: this would wait for its own loop")

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

    def ready(self, child: Child) -> None:
        self.act(self.plan.ready, child.spec.name, self.now())
        self._release(child, None)

    def ended(self, child: Child) -> None:
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
            survived=attempt.outcome is not None and bool(attempt.outcome.survivors),
        )

    def _start_failed(self, child: Child, why: str) -> StartFailed:
        return StartFailed(self.name, child.spec.name, why, child.outcome, child.tail.lines())

    def _release(self, child: Child, error: Exception | None) -> None:
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

    def _give_up(self, payload: tuple[Planned, str, Cause]) -> None:
        planned, why, cause = payload
        child = self.children[planned.name]
        if cause is Cause.INTENSITY:
            rules = self.plan.rules
            why = f"more than {rules.restarts} restarts within {rules.period:g} s; last, {why}"
        kind = _FAILURES[cause]
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

    _DO: ClassVar[dict[Action, Callable[[Running, Any], None]]] = {
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


_all: weakref.WeakSet[Running] = weakref.WeakSet()


def _at_exit() -> None:
    """What holds the children ends them when the interpreter is gone, or before (watched.py, which
    is asked after us): to be started again is not what they are ended for."""
    for running in tuple(_all):
        if running.owner_pid == os.getpid() and not running.closed.is_set():
            done = Latch()
            running.post(lambda running=running, done=done: running.let_go(done.set))  # type: ignore[misc]
            done.wait(EXIT_SECONDS)


atexit.register(_at_exit)
