"""The supervisor's plan: cases one by one, and its invariants under anything that can happen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proctree.supervisor.plan import Action, Cause, Phase, Plan, Rules, Stage
from proctree.supervisor.restarts import AutoShutdown, Backoff, Restart, Strategy

NO_JITTER = Backoff(base=1.0, cap=60.0)

Actions = list[tuple[Action, Any]]


class World:
    """What is outside the plan: which children run, and which timers are armed. It holds the plan
    to the invariants of its module at every step."""

    def __init__(self, rules: Rules) -> None:
        self.plan = Plan(rules, random=lambda: 1.0)
        self.now = 0.0
        self.alive: set[str] = set()
        self.waiting: dict[str, float] = {}
        self.log: list[tuple[str, Any]] = []
        self.finished = 0
        self.shut = False
        self.hurried = False
        self.were_ready: set[str] = set()
        self.not_wanted: set[str] = set()
        self.restarts: list[float] = []
        self.gave_up = False

    def do(self, actions: Actions) -> None:
        for action, payload in actions:
            self._check(action, payload)
            name = getattr(payload, "name", None)
            self.log.append((action.name, name if name is not None else payload))
        assert len(self.alive) == self.plan._alive

    def _check(self, action: Action, payload: Any) -> None:
        if action is Action.LAUNCH:
            assert payload.name not in self.alive, "launched while it runs"
            assert payload.name not in self.waiting, "launched while its timer is armed"
            assert not self.shut, "launched after the shutdown began"
            assert payload.name not in self.not_wanted
            if self.plan.stage is Stage.STARTING:
                self._check_turn(payload)
            self.alive.add(payload.name)
        elif action in (Action.STOP, Action.STOP_NOW):
            assert payload.name in self.alive, "stopped while nothing runs of it"
            if self.shut and not self.hurried:
                behind = [name for name in self.alive if self._order(name) > payload.order]
                assert behind == [], "stopped before those that were started after it"
        elif action is Action.ARM_BACKOFF:
            child, delay = payload
            assert not self.shut
            self.waiting[child.name] = delay
            self.restarts.append(self.now)
            assert not self._is_too_often(len(self.restarts))
        elif action is Action.GIVE_UP:
            assert not self.gave_up
            self.gave_up = True
            assert payload[0].name not in self.alive
        elif action is Action.FORGET:
            assert payload.name not in self.alive
            assert payload.name not in self.waiting
        elif action is Action.DISARM_BACKOFF:
            del self.waiting[payload.name]
        elif action is Action.STOPPING:
            assert not self.shut, "shut down twice"
            self.shut = True
        elif action is Action.FINISHED:
            assert not self.alive, "finished while something runs"
            assert not self.waiting
            self.finished += 1
            assert self.finished == 1

    def _order(self, name: str) -> int:
        return self.plan.children[name].order

    def _check_turn(self, child: Any) -> None:
        for other in self.plan.children.values():
            if other.order < child.order and other.phase is not Phase.DONE:
                assert other.name in self.were_ready, "launched before the one before was ready"

    def _is_too_often(self, count: int) -> bool:
        rules = self.plan.rules
        recent = sum(self.now - at <= rules.period for at in self.restarts)
        return rules.restarts is not None and recent + count - len(self.restarts) > rules.restarts

    # -- what a test does

    def add(self, name: str, restart: Restart = Restart.ALWAYS) -> None:
        self.were_ready.discard(name)
        self.not_wanted.discard(name)
        self.do(self.plan.add(name, restart, NO_JITTER))

    def begin(self, *names: str, up: bool = True) -> None:
        for name in names:
            self.add(name)
        self.do(self.plan.begin())
        if up:
            for name in names:
                self.ready(name)
            self.log.clear()

    def ready(self, name: str) -> None:
        self.were_ready.add(name)
        self.do(self.plan.ready(name, self.now))

    def ended(
        self, name: str, *, failed: bool = True, unwanted: bool = False, survived: bool = False
    ) -> None:
        self.alive.discard(name)
        if unwanted and not self.plan.children[name].again:
            self.not_wanted.add(name)
        starting, gave_up = self.plan.stage is Stage.STARTING, self.gave_up
        facts = {"failed": failed, "unwanted": unwanted, "survived": survived}
        self.do(self.plan.ended(name, self.now, why="why", **facts))
        if self.gave_up and not gave_up and not starting and not survived:
            assert self._is_too_often(len(self.restarts) + 1)

    def restart(self, name: str) -> None:
        if self.plan.children[name].phase is Phase.DONE:
            self.not_wanted.discard(name)
        self.do(self.plan.restart(name))

    def remove(self, name: str) -> None:
        self.do(self.plan.remove(name))

    def hurry(self) -> None:
        self.hurried = True
        self.do(self.plan.hurry())

    def due(self, name: str) -> None:
        del self.waiting[name]
        self.do(self.plan.backoff_due(name))

    def took(self) -> list[tuple[str, Any]]:
        log, self.log = self.log, []
        return [entry for entry in log if entry[0] not in ("DONE",)]

    def phases(self) -> dict[str, str]:
        return {name: str(child.phase) for name, child in self.plan.children.items()}


def world(strategy: Strategy = Strategy.ONE_FOR_ONE, **rules: Any) -> World:
    return World(Rules(strategy=strategy, **rules))


def test_children_start_in_order_each_when_the_one_before_is_ready():
    w = world()
    w.begin("a", "b", up=False)
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    assert w.took() == [("STARTED", None)]


def test_a_supervisor_without_children_has_started():
    w = world()
    w.begin()
    assert w.plan.stage is Stage.RUNNING


def test_they_stop_in_reverse_order_each_when_the_one_behind_has_ended():
    w = world()
    w.begin("a", "b", "c")
    w.do(w.plan.shutdown("enough"))
    assert w.took() == [("STOPPING", "enough"), ("STOP", "c")]
    w.ended("c")
    assert w.took() == [("STOP", "b")]
    w.ended("b")
    assert w.took() == [("STOP", "a")]
    w.ended("a")
    assert w.took() == [("FINISHED", None)]


def test_one_that_cannot_start_ends_those_before_it():
    w = world()
    w.begin("a", "b", "c", up=False)
    w.ready("a")
    w.ended("b")
    assert w.took() == [
        ("LAUNCH", "a"),
        ("LAUNCH", "b"),
        ("GIVE_UP", (w.plan.children["b"], "why", Cause.START)),
        ("STOPPING", "gave up on child 'b'"),
        ("STOP", "a"),
    ]
    w.ended("a")
    assert w.took() == [("FINISHED", None)]


def test_hurry_ends_all_at_the_same_time():
    w = world()
    w.begin("a", "b", "c")
    w.do(w.plan.shutdown(""))
    w.took()
    w.hurry()
    assert w.took() == [("STOP_NOW", "a"), ("STOP_NOW", "b"), ("STOP_NOW", "c")]
    for name in ("b", "a", "c"):
        w.ended(name)
    assert w.took() == [("FINISHED", None)]


def test_one_for_one_restarts_one_after_its_backoff():
    w = world()
    w.begin("a", "b")
    w.ended("a")
    assert w.took() == [("ARM_BACKOFF", (w.plan.children["a"], 1.0))]
    w.due("a")
    assert w.took() == [("LAUNCH", "a")]


def test_one_for_all_stops_the_others_and_starts_all_in_order():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b", "c")
    w.ended("b")
    assert w.took() == [("ARM_BACKOFF", (w.plan.children["b"], 1.0)), ("STOP", "c")]
    w.ended("c")
    assert w.took() == [("STOP", "a")]
    w.due("b")
    assert w.took() == []
    w.ended("a")
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    assert w.took() == [("LAUNCH", "c")]


def test_rest_for_one_takes_along_those_behind():
    w = world(Strategy.REST_FOR_ONE)
    w.begin("a", "b", "c")
    w.ended("b")
    assert w.took() == [("ARM_BACKOFF", (w.plan.children["b"], 1.0)), ("STOP", "c")]
    w.ended("c")
    assert w.took() == []
    w.due("b")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    assert w.took() == [("LAUNCH", "c")]


def test_a_group_waits_for_every_backoff_in_it():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b")
    w.ended("a")
    w.ended("b", failed=True)  # while it was about to be stopped
    w.took()
    w.due("a")
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]


def test_a_temporary_child_is_not_restarted_with_its_group():
    w = world(Strategy.ONE_FOR_ALL)
    w.add("a", Restart.NEVER)
    w.begin("b", up=False)
    w.ready("a")
    w.ready("b")
    w.ended("b")
    w.ended("a")
    w.took()
    w.due("b")
    assert w.took() == [("LAUNCH", "b")]
    assert w.phases() == {"a": "done", "b": "starting"}


@pytest.mark.parametrize(
    ("restart", "failed", "again"),
    [
        (Restart.ALWAYS, False, True),
        (Restart.ALWAYS, True, True),
        (Restart.ON_FAILURE, False, False),
        (Restart.ON_FAILURE, True, True),
        (Restart.NEVER, False, False),
        (Restart.NEVER, True, False),
    ],
)
def test_the_restart_policies(restart, failed, again):
    w = world(auto_shutdown=AutoShutdown.NEVER)
    w.add("a", restart)
    w.do(w.plan.begin())
    w.ready("a")
    w.ended("a", failed=failed)
    assert w.phases()["a"] == ("backoff" if again else "done")


def test_one_that_is_not_wanted_any_more_is_never_started_again():
    w = world(auto_shutdown=AutoShutdown.NEVER)
    w.begin("a")
    w.ended("a", unwanted=True)
    assert w.phases() == {"a": "done"}


def test_too_many_restarts_within_the_period_are_given_up():
    w = world(restarts=2, period=10.0)
    w.begin("a", "b")
    for _ in range(2):
        w.ended("a")
        w.due("a")
        w.ready("a")
    w.took()
    w.ended("a")
    assert [action for action, _ in w.took()] == ["GIVE_UP", "STOPPING", "STOP"]


def test_the_same_number_over_a_longer_time_is_not():
    w = world(restarts=2, period=10.0)
    w.begin("a")
    for _ in range(9):
        w.now += 5.1
        w.ended("a")
        w.due("a")
        w.ready("a")
    assert w.plan.stage is Stage.RUNNING


def test_without_a_limit_nothing_is_given_up():
    w = world(restarts=None)
    w.begin("a")
    for _ in range(100):
        w.ended("a")
        w.due("a")
        w.ready("a")
    assert w.plan.stage is Stage.RUNNING


def test_the_backoff_grows_up_to_its_cap_and_begins_anew_after_a_good_time():
    w = world(restarts=None)
    w.begin("a")

    def delays(count: int) -> list[float]:
        found = []
        for _ in range(count):
            w.ended("a")
            found.append(w.waiting["a"])
            w.due("a")
            w.ready("a")
        return found

    assert delays(8) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    w.now += NO_JITTER.reset
    assert delays(2) == [1.0, 2.0]


def test_the_backoff_is_fully_jittered_and_never_overflows():
    assert Backoff(base=1.0).delay(3, lambda: 0.0) == 0.0
    assert Backoff(base=1.0).delay(3, lambda: 0.5) == 2.0
    assert Backoff(base=1.0, cap=7.0).delay(100_000, lambda: 1.0) == 7.0


def test_the_last_child_that_has_ended_for_good_ends_the_supervisor():
    w = world()
    w.add("a", Restart.NEVER)
    w.add("b", Restart.ON_FAILURE)
    w.do(w.plan.begin())
    w.ready("a")
    w.ready("b")
    w.ended("a")
    assert w.plan.stage is Stage.RUNNING
    w.ended("b", failed=False)
    assert w.finished == 1


@pytest.mark.parametrize(
    ("auto", "stage"), [(AutoShutdown.ANY, Stage.STOPPING), (AutoShutdown.NEVER, Stage.RUNNING)]
)
def test_or_the_first_or_none(auto, stage):
    w = world(auto_shutdown=auto)
    w.add("a", Restart.NEVER)
    w.begin("b", up=False)
    w.ready("a")
    w.ready("b")
    w.ended("a")
    assert w.plan.stage is stage


def test_what_is_added_later_starts_at_once_and_stops_first():
    w = world()
    w.begin("a")
    w.add("b")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    w.do(w.plan.shutdown(""))
    assert w.took()[-1] == ("STOP", "b")


def test_what_is_added_during_the_first_start_waits_for_its_turn():
    w = world()
    w.begin("a", up=False)
    w.add("b")
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]


def test_what_is_removed_is_stopped_and_forgotten():
    w = world()
    w.begin("a", "b")
    w.remove("a")
    assert w.took() == [("STOP", "a")]
    w.ended("a")
    assert w.took() == [("FORGET", "a")]
    assert list(w.plan.children) == ["b"]


def test_what_is_removed_while_it_waits_is_forgotten_at_once():
    w = world()
    w.begin("a", "b")
    w.ended("a")
    w.took()
    w.remove("a")
    assert [action for action, _ in w.took()] == ["DISARM_BACKOFF", "FORGET"]
    assert w.waiting == {}


def test_a_restart_that_was_asked_for_does_not_count():
    w = world(restarts=0)
    w.begin("a")
    w.restart("a")
    assert w.took() == [("STOP", "a")]
    w.ended("a")
    assert w.took() == [("LAUNCH", "a")]


def test_one_that_has_ended_for_good_can_be_restarted():
    w = world(auto_shutdown=AutoShutdown.NEVER)
    w.begin("a")
    w.ended("a", unwanted=True)
    w.took()
    w.restart("a")
    assert w.took() == [("LAUNCH", "a")]


def test_race_a_child_ends_by_itself_while_it_waits_to_be_stopped():
    w = world()
    w.begin("a", "b")
    w.do(w.plan.shutdown(""))
    w.took()
    w.ended("a")
    w.ended("b")
    assert w.took() == [("FINISHED", None)]


def test_race_a_child_is_removed_while_its_group_restarts():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b", "c")
    w.ended("a")
    w.remove("b")
    w.ended("c")
    w.ended("b")
    w.took()
    w.due("a")
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "c")]


def test_race_the_child_that_a_group_waits_for_is_removed():
    w = world(Strategy.REST_FOR_ONE)
    w.begin("a", "b")
    w.ended("a")
    w.ended("b")
    w.took()
    w.remove("a")
    assert ("LAUNCH", "b") in w.took()


def test_race_ready_comes_after_the_stop():
    w = world()
    w.begin("a", up=False)
    w.do(w.plan.shutdown(""))
    w.ready("a")
    assert w.phases() == {"a": "stopping"}


def test_after_a_shutdown_nothing_begins():
    w = world()
    w.add("a")
    w.do(w.plan.shutdown(""))
    w.do(w.plan.begin())
    assert w.plan.stage is Stage.CLOSED
    assert w.phases() == {"a": "done"}
    assert not w.plan.accepts


def test_race_a_child_is_being_restarted_when_its_group_is():
    """Its end is awaited, and then its turn: it is not lost, and not launched beside the others."""
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b", "c")
    w.restart("b")
    w.ended("a")
    assert [entry for entry in w.took() if entry[0] == "STOP"] == [("STOP", "b"), ("STOP", "c")]
    w.due("a")
    w.ended("c")
    assert w.took() == []
    w.ended("b")
    assert w.took() == [("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    assert w.took() == [("LAUNCH", "c")]


def test_race_a_restart_is_asked_for_where_its_turn_comes_anyway():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b", "c")
    w.ended("b")
    w.took()
    w.restart("a")
    w.restart("c")
    assert w.took() == []
    w.restart("b")
    assert w.took() == [("DISARM_BACKOFF", "b")]
    w.ended("c")
    w.ended("a")
    assert w.took() == [("STOP", "a"), ("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "b")]


def test_a_restart_during_the_first_start():
    w = world()
    w.begin("a", "b", "c", up=False)
    w.ready("a")
    w.restart("c")
    w.restart("b")
    assert w.took() == [("LAUNCH", "a"), ("LAUNCH", "b"), ("STOP", "b")]
    w.ended("b")
    assert w.took() == [("LAUNCH", "b")]
    w.ready("b")
    assert w.took() == [("LAUNCH", "c")]


def test_one_that_has_ended_for_good_and_is_restarted_meanwhile_waits_for_its_turn():
    w = world()
    w.begin("a", "b", "c", up=False)
    w.ready("a")
    w.ended("a", unwanted=True)
    w.restart("a")
    w.ready("b")
    assert w.took() == [("LAUNCH", "a"), ("LAUNCH", "b"), ("LAUNCH", "a")]
    w.ready("a")
    assert w.took() == [("LAUNCH", "c")]


def test_what_is_added_while_a_group_restarts_is_the_last_in_order():
    w = world(Strategy.REST_FOR_ONE)
    w.begin("a", "b")
    w.ended("a")
    w.took()
    w.add("c")
    assert w.took() == []
    w.ended("b")
    w.due("a")
    w.ready("a")
    w.ready("b")
    assert w.took() == [("LAUNCH", "a"), ("LAUNCH", "b"), ("LAUNCH", "c")]


def test_what_is_removed_during_the_shutdown_waits_for_its_turn():
    w = world()
    w.begin("a", "b")
    w.do(w.plan.shutdown(""))
    w.remove("a")
    assert w.took() == [("STOPPING", ""), ("STOP", "b")]
    w.ended("b")
    w.ended("a")
    assert w.took() == [("STOP", "a"), ("FORGET", "a"), ("FINISHED", None)]


def test_the_shutdown_waits_for_one_that_is_being_stopped_already():
    w = world()
    w.begin("a", "b")
    w.remove("b")
    w.do(w.plan.shutdown(""))
    assert w.took() == [("STOP", "b"), ("STOPPING", "")]
    w.ended("b")
    assert w.took() == [("FORGET", "b"), ("STOP", "a")]


def test_race_one_is_not_wanted_any_more_while_its_group_restarts():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b", "c")
    w.ended("a")
    w.ended("c", unwanted=True)  # it was being stopped
    w.ended("b", unwanted=True)  # it ended in that moment
    w.due("a")
    w.ready("a")
    assert w.phases() == {"a": "up", "b": "done", "c": "done"}
    assert w.plan.stage is Stage.RUNNING


def test_a_group_waits_for_the_end_of_one_that_is_being_removed():
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b")
    w.remove("b")
    w.ended("a")
    w.due("a")
    assert ("LAUNCH", "a") not in w.took()
    w.ended("b")
    assert w.took() == [("FORGET", "b"), ("LAUNCH", "a")]


def test_one_that_is_stopped_with_its_group_has_not_ended_by_itself():
    w = world(Strategy.ONE_FOR_ALL, auto_shutdown=AutoShutdown.ANY)
    w.add("a", Restart.NEVER)
    w.begin("b", up=False)
    w.ready("a")
    w.ready("b")
    w.ended("b")
    w.ended("a")
    assert w.phases() == {"a": "done", "b": "backoff"}
    assert w.plan.stage is Stage.RUNNING


def test_one_that_was_restarted_by_hand_waits_its_time_when_it_fails():
    w = world()
    w.begin("a")
    w.restart("a")
    w.ended("a")
    w.ready("a")
    w.ended("a")
    assert w.phases() == {"a": "backoff"}


def test_the_backoff_grows_when_it_did_not_come_up_after_a_good_time():
    w = world(restarts=None)
    w.begin("a")
    w.now += NO_JITTER.reset
    w.ended("a")
    w.due("a")
    w.now += NO_JITTER.reset
    w.ended("a")
    assert w.waiting == {"a": 2.0}


def test_a_restart_counts_until_the_period_is_over():
    w = world(restarts=1, period=10.0)
    w.begin("a")
    w.ended("a")
    w.due("a")
    w.now += 10.0
    w.ended("a")
    assert w.gave_up


def test_it_has_not_started_while_one_waits_to_be_started_again_with_its_group():
    w = world(Strategy.ONE_FOR_ALL)
    w.add("a")
    w.add("b", Restart.NEVER)
    w.do(w.plan.begin())
    w.ready("a")
    w.ended("a")
    w.ended("b")
    assert ("STARTED", None) not in w.took()
    w.due("a")
    w.ready("a")
    assert w.took() == [("LAUNCH", "a"), ("STARTED", None)]


# -- anything that can happen

NAMES = ("a", "b", "c", "d")


def happen(w: World, data: st.DataObject) -> None:
    """One thing of those that can happen now."""
    choices: list[Any] = [("pass", None)]
    for name, child in w.plan.children.items():
        if child.phase is Phase.STARTING:
            choices.append(("ready", name))
        if name in w.alive:
            choices += [(how, name) for how in ("failed", "succeeded", "unwanted", "survived")]
        if name in w.waiting:
            choices.append(("due", name))
        choices += [("remove", name), ("restart", name)]
    if w.plan.accepts:
        choices += [("add", name) for name in NAMES if name not in w.plan.children]
    choices += [("shutdown", None), ("hurry", None)] if w.plan.stage is not Stage.NEW else []
    what, name = data.draw(st.sampled_from(choices))
    w.now += data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    match what:
        case "ready":
            w.ready(name)
        case "failed" | "succeeded":
            w.ended(name, failed=what == "failed")
        case "unwanted" | "survived":
            w.ended(name, **{what: True})
        case "due":
            w.due(name)
        case "remove":
            w.remove(name)
        case "restart":
            w.restart(name)
        case "add":
            w.add(name, data.draw(st.sampled_from(Restart)))
        case "shutdown":
            w.do(w.plan.shutdown("asked"))
        case "hurry":
            w.hurry()


def settle(w: World) -> None:
    """Everybody obeys: what is stopped ends, what starts becomes ready, what is due comes."""
    for _ in range(100):
        before = w.phases()
        for name, phase in before.items():
            child = w.plan.children.get(name)
            if child is None:
                continue
            if phase == "stopping" and name in w.alive:
                w.ended(name, failed=False)
            elif phase == "starting" and child.phase is Phase.STARTING:
                w.ready(name)
            elif name in w.waiting:
                w.due(name)
        if w.phases() == before:
            return
    raise AssertionError(f"it does not settle: {w.phases()}")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_happens_everything_wanted_comes_up_and_everything_ends(data):
    rules = Rules(
        strategy=data.draw(st.sampled_from(Strategy)),
        restarts=data.draw(st.sampled_from([None, 0, 3])),
        auto_shutdown=data.draw(st.sampled_from(AutoShutdown)),
    )
    w = World(rules)
    for name in NAMES[:3]:
        w.add(name, data.draw(st.sampled_from(Restart)))
    w.do(w.plan.begin())
    for _ in range(data.draw(st.integers(0, 30))):
        happen(w, data)
    settle(w)
    if w.plan.stage is Stage.RUNNING:
        assert set(w.phases().values()) <= {"up", "done"}
    else:
        assert w.plan.stage is Stage.CLOSED
    w.do(w.plan.shutdown("the test is over"))
    settle(w)
    assert w.finished == 1
    assert w.alive == set()


# -- what could not be ended


def test_a_child_is_not_started_beside_what_is_left_of_it():
    w = world()
    w.begin("a", "b")
    w.ended("a", survived=True)
    assert w.took()[:2] == [
        ("GIVE_UP", (w.plan.children["a"], "why", Cause.SURVIVOR)),
        ("STOPPING", "gave up on child 'a'"),
    ]


@pytest.mark.parametrize("how", ["asked", "group"])
def test_nor_when_it_was_stopped_to_be_started_again(how):
    w = world(Strategy.ONE_FOR_ALL)
    w.begin("a", "b")
    if how == "asked":
        w.do(w.plan.restart("b"))
    else:
        w.ended("a")
    w.ended("b", survived=True)
    assert "GIVE_UP" in [action for action, _ in w.took()]


def test_one_that_does_not_come_back_may_leave_something():
    w = world()
    w.add("a", Restart.NEVER)
    w.begin("b", up=False)
    w.ready("a")
    w.ready("b")
    w.ended("a", survived=True)
    assert w.plan.stage is Stage.RUNNING
    w.do(w.plan.remove("b"))
    w.ended("b", survived=True)
    assert "GIVE_UP" not in [action for action, _ in w.took()]


def test_when_the_last_one_that_runs_is_removed_only_those_that_are_done_are_left():
    w = world()
    w.add("a", Restart.NEVER)
    w.begin("b", up=False)
    w.ready("a")
    w.ready("b")
    w.ended("a")
    w.do(w.plan.remove("b"))
    w.ended("b")
    assert w.finished == 1


def test_when_all_are_removed_others_may_be_added():
    w = world()
    w.begin("a")
    w.do(w.plan.remove("a"))
    w.ended("a")
    assert w.plan.stage is Stage.RUNNING
