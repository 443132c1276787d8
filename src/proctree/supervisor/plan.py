"""What a supervisor does about its children: a pure machine.

Theory of operation. Each child has a `Phase`, where it is, and a `Goal`, where it is to be. What
happens to a child or is asked of the supervisor is a method here; each answers what is to be done
now, as a list of `Action`s. Nothing here does I/O or knows a clock: a time comes in as a number.

                   ┌───────────── backoff due ─────────────┐
                   ▼                                       │
    DOWN ──▶ STARTING ──ready──▶ UP ──ended, to restart──▶ BACKOFF
     ▲           │                │
     │           └──── to stop ───┤──ended for good──▶ DONE
     └── ended ── STOPPING ◀──────┘

A child that is restarted alone goes its way alone. Where order counts (the first start, a restart
of a group, the shutdown) the children stand in two queues: `stops`, of which the last in order is
stopped and its end awaited before the next; and, when nobody is left in it, `starts`, of which the
first is started and awaited until it is ready.

The invariants (held by tests/test_plan.py):

1. A child is launched only when nothing runs of it, and stopped only when something does.
2. In a queue there is one child under way at a time; starts wait for stops.
3. After a shutdown nothing is launched, and when the last child has ended FINISHED is asked for,
   once.
4. Restarts beyond the intensity lead to the shutdown.
"""

from __future__ import annotations

import bisect
import enum
import random as _random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from proctree.supervisor.restarts import AutoShutdown, Backoff, Intensity, Restart, Strategy


class Phase(enum.StrEnum):
    """Where a child is."""

    DOWN = "down"
    """Nothing runs of it, and its turn to be started comes."""
    STARTING = "starting"
    """It was launched and is not ready."""
    UP = "up"
    """It is ready."""
    STOPPING = "stopping"
    """It is being ended."""
    BACKOFF = "backoff"
    """It waits to be started again."""
    DONE = "done"
    """It has ended for good."""


RUNNING = (Phase.STARTING, Phase.UP)


class Goal(enum.Enum):
    """Where a child is to be."""

    UP = "up"
    DOWN = "down"
    GONE = "gone"
    """Forgotten when it has ended."""


class Stage(enum.StrEnum):
    """Where the supervisor is."""

    NEW = "new"
    STARTING = "starting"
    """The first start, in order."""
    RUNNING = "running"
    STOPPING = "stopping"
    CLOSED = "closed"


class Action(enum.Enum):
    """What is to be done. The child, or what is named behind."""

    LAUNCH = "launch"
    STOP = "stop"
    """By its own kill policy."""
    STOP_NOW = "stop now"
    """By SIGKILL."""
    ARM_BACKOFF = "arm backoff timer"
    """(child, seconds)"""
    DISARM_BACKOFF = "disarm backoff timer"
    FORGET = "forget"
    """It was removed."""
    DONE = "done"
    """It has ended for good."""
    STARTED = "started"
    """All children are up for the first time. None."""
    GIVE_UP = "give up"
    """(child, why, `Cause`): the shutdown follows."""
    STOPPING = "stopping"
    """The shutdown begins: why."""
    FINISHED = "finished"
    """Nothing runs any more. None."""


class Cause(enum.Enum):
    """Why it is given up."""

    START = "start"
    """A child could not be started, or ended before it was ready, during the first start."""
    INTENSITY = "intensity"
    """One had to be restarted too often."""
    SURVIVOR = "survivor"
    """One is to be started again, and something of it could not be ended."""


class Rules(NamedTuple):
    """What holds for all children."""

    strategy: Strategy = Strategy.ONE_FOR_ONE
    restarts: int | None = 5
    period: float = 10.0
    auto_shutdown: AutoShutdown = AutoShutdown.ALL


class Child:
    """One child, as the plan sees it."""

    __slots__ = (
        "again",
        "backoff",
        "failures",
        "goal",
        "name",
        "order",
        "phase",
        "restart",
        "restarts",
        "up_since",
    )

    def __init__(self, name: str, restart: Restart, backoff: Backoff, order: int) -> None:
        self.name = name
        self.restart = restart
        self.backoff = backoff
        self.order = order
        self.phase = Phase.DOWN
        self.goal = Goal.UP
        self.again = False
        """To be launched as soon as it has been stopped, whatever the others do."""
        self.failures = 0
        """Ends in a row that were followed by a start."""
        self.restarts = 0
        self.up_since: float | None = None


class _Queue:
    """Children in the order of their start."""

    def __init__(self) -> None:
        self._children: list[tuple[int, Child]] = []

    def add(self, child: Child) -> None:
        entry = (child.order, child)
        at = bisect.bisect_left(self._children, child.order, key=lambda other: other[0])
        if at == len(self._children) or self._children[at][0] != child.order:
            self._children.insert(at, entry)

    def discard(self, child: Child) -> None:
        at = bisect.bisect_left(self._children, child.order, key=lambda other: other[0])
        if at < len(self._children) and self._children[at][0] == child.order:
            del self._children[at]

    def first(self) -> Child:
        return self._children.pop(0)[1]

    def last(self) -> Child:
        return self._children.pop()[1]

    def clear(self) -> None:
        self._children.clear()

    def __contains__(self, child: Child) -> bool:
        at = bisect.bisect_left(self._children, child.order, key=lambda other: other[0])
        return at < len(self._children) and self._children[at][0] == child.order

    def __bool__(self) -> bool:
        return bool(self._children)


class Plan:
    """See the module."""

    def __init__(self, rules: Rules, random: Callable[[], float] = _random.random) -> None:
        self.rules = rules
        self.stage = Stage.NEW
        self.children: dict[str, Child] = {}
        self._random = random
        self._intensity = Intensity(rules.restarts, rules.period)
        self._orders = 0
        self._alive = 0
        self._starts = _Queue()
        self._stops = _Queue()
        self._starting: Child | None = None
        self._stopping: Child | None = None
        self._held: set[Child] = set()
        """Children in BACKOFF that a whole group waits for."""
        self._actions: list[tuple[Action, Any]] = []

    def _ask(self, action: Action, payload: Any = None) -> None:
        self._actions.append((action, payload))

    def _answer(self) -> list[tuple[Action, Any]]:
        self._pump()
        actions, self._actions = self._actions, []
        return actions

    @property
    def accepts(self) -> bool:
        """Whether children may be added."""
        return self.stage in (Stage.NEW, Stage.STARTING, Stage.RUNNING)

    # -- what is asked of the supervisor

    def begin(self) -> list[tuple[Action, Any]]:
        """Start all children, in order. After a shutdown nothing is started any more."""
        if self.stage is not Stage.NEW:
            return self._answer()
        self.stage = Stage.STARTING
        for child in self.children.values():
            self._starts.add(child)
        return self._answer()

    def add(self, name: str, restart: Restart, backoff: Backoff) -> list[tuple[Action, Any]]:
        """One more child, the last in order."""
        self._orders += 1
        child = self.children[name] = Child(name, restart, backoff, self._orders)
        if self.stage is Stage.STARTING or (self.stage is Stage.RUNNING and self._in_turns):
            self._starts.add(child)
        elif self.stage is Stage.RUNNING:
            self._launch(child)
        return self._answer()

    @property
    def _in_turns(self) -> bool:
        """Whether a group is being restarted, in order."""
        under_way = self._starting is not None or self._stopping is not None
        return under_way or bool(self._starts or self._stops or self._held)

    def remove(self, name: str) -> list[tuple[Action, Any]]:
        """Stop it if it runs, and forget it."""
        child = self.children[name]
        child.goal = Goal.GONE
        if child.phase in RUNNING:
            # A shutdown has an order, and comes to it.
            if self.stage is not Stage.STOPPING:
                self._stops.discard(child)
                self._stop(child)
        elif child.phase is not Phase.STOPPING:
            self._rest(child)
            self._forget(child)
        return self._answer()

    def restart(self, name: str) -> list[tuple[Action, Any]]:
        """Stop it if it runs, and start it at once; or, where its turn comes anyway, in its turn.
        Not a restart that the intensity counts."""
        child = self.children[name]
        if self.stage not in (Stage.STARTING, Stage.RUNNING) or child.goal is Goal.GONE:
            return self._answer()
        if child in self._held or (child.phase is Phase.DONE and self._in_turns):
            self._rest(child)
            self._starts.add(child)
        elif child in self._starts:
            pass
        elif child.phase in RUNNING:
            child.again = True
            self._stop(child)
        elif child.phase is Phase.STOPPING:
            child.again = True
        else:
            self._rest(child)
            self._launch(child)
        return self._answer()

    def shutdown(self, why: str) -> list[tuple[Action, Any]]:
        """Stop all children, in reverse order."""
        self._shut_down(why)
        return self._answer()

    def hurry(self) -> list[tuple[Action, Any]]:
        """End all children now, at the same time."""
        self._shut_down("")
        for child in self.children.values():
            if child.phase in (*RUNNING, Phase.STOPPING):
                child.phase = Phase.STOPPING
                self._ask(Action.STOP_NOW, child)
        return self._answer()

    # -- what happens to a child

    def ready(self, name: str, now: float) -> list[tuple[Action, Any]]:
        """It can do its work."""
        child = self.children[name]
        if child.phase is Phase.STARTING:
            child.phase = Phase.UP
            child.up_since = now
            if child is self._starting:
                self._starting = None
        return self._answer()

    def ended(
        self,
        name: str,
        now: float,
        *,
        failed: bool,
        why: str,
        unwanted: bool = False,
        survived: bool = False,
    ) -> list[tuple[Action, Any]]:
        """Nothing of it runs any more, or nothing that could be ended.

        Args:
            failed: whether that was a failure.
            why: for people.
            unwanted: it is not to be started again, whatever its policy says.
            survived: something of it could not be ended. It is not started beside that.
        """
        child = self.children[name]
        before, child.phase = child.phase, Phase.DOWN
        self._alive -= 1
        in_group = child in self._stops
        self._stops.discard(child)
        if child is self._stopping:
            self._stopping = None
        its_turn = child is self._starting
        if its_turn:
            self._starting = None
        if child.goal is Goal.GONE:
            self._forget(child)
        elif self.stage is Stage.STOPPING:
            self._finish(child)
        elif survived and self._comes_back(child, before is Phase.STOPPING or in_group, failed):
            self._give_up(child, why, Cause.SURVIVOR)
        elif child.again:
            child.again = False
            if its_turn:
                self._starting = child
            self._launch(child)
        elif before is Phase.STOPPING or in_group:
            # OTP does not restart a temporary child with its group either.
            if unwanted or child.restart is Restart.NEVER:
                self._starts.discard(child)
                self._finish(child)
                self._consider_shutdown(child, unwanted)
        elif self.stage is Stage.STARTING and before is Phase.STARTING:
            self._give_up(child, why, Cause.START)
        else:
            self._decide(child, now, failed, why, unwanted)
        child.up_since = None
        return self._answer()

    def backoff_due(self, name: str) -> list[tuple[Action, Any]]:
        """Its time to wait is over."""
        child = self.children.get(name)
        if child is not None and child.phase is Phase.BACKOFF:
            child.phase = Phase.DOWN
            if child in self._held:
                self._held.discard(child)
                self._starts.add(child)
            else:
                self._launch(child)
        return self._answer()

    # -- shared by several of them

    def _launch(self, child: Child) -> None:
        child.phase = Phase.STARTING
        self._alive += 1
        self._ask(Action.LAUNCH, child)

    def _stop(self, child: Child) -> None:
        child.phase = Phase.STOPPING
        self._ask(Action.STOP, child)

    def _rest(self, child: Child) -> None:
        """It does not wait for its time any more."""
        if child.phase is Phase.BACKOFF:
            self._ask(Action.DISARM_BACKOFF, child)
            self._held.discard(child)
        child.phase = Phase.DOWN

    def _forget(self, child: Child) -> None:
        self._starts.discard(child)
        del self.children[child.name]
        self._ask(Action.FORGET, child)
        if self.stage is Stage.RUNNING and self.children:
            self._consider_shutdown(child, False)

    def _finish(self, child: Child) -> None:
        child.phase = Phase.DONE
        self._ask(Action.DONE, child)

    def _is_restarted(self, child: Child, failed: bool) -> bool:
        """By its policy."""
        return child.restart is Restart.ALWAYS or (failed and child.restart is Restart.ON_FAILURE)

    def _comes_back(self, child: Child, stopped: bool, failed: bool) -> bool:
        """Whether a child that has ended would be started again, in whatever way."""
        if child.again:
            return True
        if stopped:
            return child in self._starts and child.restart is not Restart.NEVER
        return self._is_restarted(child, failed)

    def _decide(self, child: Child, now: float, failed: bool, why: str, unwanted: bool) -> None:
        """It has ended by itself."""
        if unwanted or not self._is_restarted(child, failed):
            self._finish(child)
            self._consider_shutdown(child, True)
        elif not self._intensity.note(now):
            self._give_up(child, why, Cause.INTENSITY)
        else:
            if child.up_since is not None and now - child.up_since >= child.backoff.reset:
                child.failures = 0
            child.failures += 1
            child.restarts += 1
            child.phase = Phase.BACKOFF
            delay = child.backoff.delay(child.failures, self._random)
            self._ask(Action.ARM_BACKOFF, (child, delay))
            self._take_along(child)

    def _take_along(self, child: Child) -> None:
        """Those that are restarted with it: stopped now, and started in order when all of them are
        down and it has waited its time."""
        if self.rules.strategy is Strategy.ONE_FOR_ONE:
            return
        self._held.add(child)
        for other in self._group(child):
            if other.phase in (Phase.DONE, Phase.BACKOFF):
                continue  # one that waits for its own time is held already
            if other.phase in (*RUNNING, Phase.STOPPING):
                self._stops.add(other)
            other.again = False
            self._starts.add(other)

    def _group(self, child: Child) -> Iterable[Child]:
        everybody = self.rules.strategy is Strategy.ONE_FOR_ALL
        return [
            other
            for other in self.children.values()
            if other is not child and (everybody or other.order > child.order)
        ]

    def _consider_shutdown(self, child: Child, by_itself: bool) -> None:
        auto = self.rules.auto_shutdown
        if auto is AutoShutdown.ANY and by_itself:
            self._shut_down(f"child {child.name!r} has ended")
        elif auto is AutoShutdown.ALL and self._all_done:
            self._shut_down("all children have ended")

    @property
    def _all_done(self) -> bool:
        # Nearly always answered by the number: looking at everybody at each end would make the end
        # of thousands quadratic.
        return self._alive == 0 and all(
            child.phase is Phase.DONE for child in self.children.values()
        )

    def _give_up(self, child: Child, why: str, cause: Cause) -> None:
        child.phase = Phase.DONE
        self._ask(Action.GIVE_UP, (child, why, cause))
        self._shut_down(f"gave up on child {child.name!r}")

    def _shut_down(self, why: str) -> None:
        if self.stage in (Stage.STOPPING, Stage.CLOSED):
            return
        self.stage = Stage.STOPPING
        self._ask(Action.STOPPING, why)
        self._starts.clear()
        self._starting = None
        for child in self.children.values():
            if child.goal is Goal.UP:
                child.goal = Goal.DOWN
            child.again = False
            if child.phase in (*RUNNING, Phase.STOPPING):
                self._stops.add(child)
            elif child.phase in (Phase.DOWN, Phase.BACKOFF):
                self._rest(child)
                self._finish(child)

    def _pump(self) -> None:
        """Lets the queues go on."""
        while self._stops and self._stopping is None:
            child = self._stops.last()
            if child.phase in RUNNING:
                self._stopping = child
                self._stop(child)
            elif child.phase is Phase.STOPPING:
                self._stopping = child  # for another reason; but its turn it is
        if self._stops or self._stopping is not None:
            return
        if self.stage is Stage.STOPPING:
            if self._alive == 0:
                self.stage = Stage.CLOSED
                self._ask(Action.FINISHED)
            return
        while self._starts and self._starting is None and not self._held:
            child = self._starts.first()
            if child.phase is Phase.DOWN:
                self._starting = child
                self._launch(child)
        if self.stage is Stage.STARTING and not self._in_turns:
            self.stage = Stage.RUNNING
            self._ask(Action.STARTED)
