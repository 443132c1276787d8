"""Every interleaving of the lifecycle, walked breadth first, and its invariants on every edge.

The walk is adversarial: an event may come in any state and any number of times, late or early, as
long as something could send it at all. Only timers have to be armed to fire, a survey has to be
asked for to be answered, and a stream ends only once and not before it was made.
"""

from __future__ import annotations

import copy
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from proctree import lifecycle
from proctree.lifecycle import TABLE, Action, Event, Lifecycle, Phase, State
from proctree.policy import KillPolicy, Leftovers, Scope, Stage
from proctree.records import Member, Reason

POLICY = KillPolicy([Stage(signal.SIGINT, 1.0, Scope.MAIN), Stage(signal.SIGTERM, 5.0)])
FASTER = KillPolicy.now()
SLOWER = KillPolicy.after(60.0)
SOMEBODY = (Member(4711, 1, 1, "S", "somebody"),)

CONFIGURATIONS = [(leftovers, streams) for leftovers in Leftovers for streams in range(3)]

INPUTS: list[tuple[Event, dict[str, Any]]] = [
    (Event.SPAWNED, {}),
    (Event.STARTED, {}),
    (Event.START_FAILED, {"detail": "exec: ENOENT"}),
    (Event.KILL, {"reason": Reason.KILLED, "detail": "", "policy": None}),
    (Event.KILL, {"reason": Reason.TIMEOUT, "detail": "", "policy": FASTER}),
    (Event.KILL, {"reason": Reason.KILLED, "detail": "", "policy": SLOWER}),
    (Event.MAIN_EXITED, {"status": 0, "leftovers": (), "empty": True}),
    (Event.MAIN_EXITED, {"status": 0, "leftovers": (), "empty": False}),
    (Event.MAIN_EXITED, {"status": None, "leftovers": SOMEBODY, "empty": False}),
    (Event.SUCCEEDED, {}),
    (Event.SUCCESSOR_EXITED, {"status": 256}),
    (Event.DETACHED, {}),
    (Event.EMPTY, {}),
    (Event.LOST, {"detail": "end of file"}),
]


class World(NamedTuple):
    """What is outside the machine, as far as the invariants speak of it."""

    stage_armed: bool = False
    drain_armed: bool = False
    streams_left: int = 0
    started: bool = False
    killed: bool = False
    asked: bool = False  # for a survey or a sweep
    settled: bool = False  # empty, seen to survive, swept, released or never started
    last_signal: Stage | None = None
    closed: int = 0
    published: int = 0


class Edge(NamedTuple):
    life: Lifecycle  # before
    world: World
    event: Event
    payload: dict[str, Any]
    actions: list[tuple[Action, Any]]
    next_life: Lifecycle
    next_world: World

    def asked(self, action: Action) -> list[Any]:
        return [payload for asked, payload in self.actions if asked is action]


Key = tuple[Any, ...]


def key_of(life: Lifecycle, world: World) -> Key:
    # What no rule looks at would only multiply the situations.
    seen = ("_actions", "detail", "status", "successor_status", "leftovers")
    fields = [name for name in Lifecycle.__slots__ if name not in seen]
    return (*(getattr(life, name) for name in fields), world)


def next_inputs(life: Lifecycle, world: World) -> Iterator[tuple[Event, dict[str, Any]]]:
    yield from INPUTS
    if world.asked:
        yield Event.SURVEYED, {"survivors": ()}
        yield Event.SURVEYED, {"survivors": SOMEBODY}
    if world.streams_left > 0 and life.state is not State.NEW:
        yield Event.STREAM_ENDED, {}
    yield from timers(world)


def timers(world: World) -> Iterator[tuple[Event, dict[str, Any]]]:
    if world.stage_armed:
        yield Event.STAGE_DUE, {}
    if world.drain_armed:
        yield Event.DRAIN_DUE, {}


def settles(state: State, event: Event, payload: dict[str, Any]) -> bool:
    """A survey that sees nobody proves nothing: what is there may hide."""
    if event in (Event.KILL, Event.DETACHED):
        return state is State.NEW
    if event is Event.SURVEYED:
        return bool(payload["survivors"])
    return event in (Event.EMPTY, Event.START_FAILED)


def change(
    world: World,
    state: State,
    event: Event,
    payload: dict[str, Any],
    actions: list[tuple[Action, Any]],
) -> World:
    taken = (state, event) in TABLE
    if event is Event.STAGE_DUE:
        world = world._replace(stage_armed=False)
    elif event is Event.DRAIN_DUE:
        world = world._replace(drain_armed=False)
    elif event is Event.STREAM_ENDED:
        world = world._replace(streams_left=world.streams_left - 1)
    elif event is Event.KILL:
        world = world._replace(killed=True)
    if taken and event is Event.STARTED:
        world = world._replace(started=True)
    if taken and settles(state, event, payload):
        world = world._replace(settled=True)
    for action, argument in actions:
        if action is Action.SIGNAL:
            world = world._replace(last_signal=argument)
        elif action is Action.ARM_STAGE:
            world = world._replace(stage_armed=True)
        elif action is Action.DISARM_STAGE:
            world = world._replace(stage_armed=False)
        elif action is Action.ARM_DRAIN:
            world = world._replace(drain_armed=True)
        elif action is Action.SURVEY:
            world = world._replace(asked=True)
        elif action is Action.SWEEP:
            world = world._replace(asked=True, settled=True)
        elif action is Action.RELEASE:
            world = world._replace(settled=True)
        elif action is Action.CLOSE:
            world = world._replace(closed=world.closed + 1, stage_armed=False, drain_armed=False)
        elif action is Action.PUBLISH:
            world = world._replace(published=world.published + 1)
    return world


def step(life: Lifecycle, world: World, event: Event, payload: dict[str, Any]) -> Edge:
    after = copy.copy(life)
    actions = after.handle(event, **payload)
    next_world = change(world, life.state, event, payload, actions)
    return Edge(life, world, event, payload, actions, after, next_world)


def walk(leftovers: Leftovers, streams: int) -> Iterator[Edge]:
    """Every edge between states that can be reached."""
    first = (Lifecycle(POLICY, leftovers, streams, 0.5), World(streams_left=streams))
    seen = {key_of(*first)}
    queue = deque([first])
    while queue:
        life, world = queue.popleft()
        for event, payload in next_inputs(life, world):
            edge = step(life, world, event, payload)
            yield edge
            key = key_of(edge.next_life, edge.next_world)
            if key not in seen:
                seen.add(key)
                queue.append((edge.next_life, edge.next_world))


def end_by_timers(life: Lifecycle, world: World, proved: set[Key]) -> None:
    """Whichever timer fires first, and although nothing else ever happens: CLOSED."""
    path: list[Key] = []

    def follow(life: Lifecycle, world: World) -> None:
        key = key_of(life, world)
        if life.state is State.CLOSED or key in proved:
            return
        assert key not in path, f"the timers run in a circle in {life.state}"
        due = list(timers(world))
        assert due, f"killed, and no timer is armed in {life.state}"
        path.append(key)
        for event, payload in due:
            edge = step(life, world, event, payload)
            follow(edge.next_life, edge.next_world)
        path.pop()
        proved.add(key)

    follow(life, world)


def check_close(edge: Edge) -> None:
    """Invariants 1 and 5: once, on the way into CLOSED, and nothing afterwards."""
    kinds = [action for action, _ in edge.actions]
    if edge.life.state is State.CLOSED:
        assert edge.next_life.state is State.CLOSED
        assert kinds == []
    elif edge.next_life.state is State.CLOSED:
        assert kinds[-2:] == [Action.CLOSE, Action.PUBLISH]
        assert kinds.count(Action.CLOSE) == kinds.count(Action.PUBLISH) == 1
    else:
        assert Action.CLOSE not in kinds
        assert Action.PUBLISH not in kinds
    assert edge.next_world.closed == edge.next_world.published <= 1


def check_kill(edge: Edge) -> None:
    """Invariant 3, and that asking again and again never puts the end off."""
    if edge.event is not Event.KILL or edge.life.state is not State.STOPPING:
        return
    assert edge.next_life.state is State.STOPPING
    if edge.life.stopping_kill and edge.actions:
        assert edge.next_life.policy.duration < edge.life._remaining()


def check_escalation(edge: Edge) -> None:
    """Invariant 4."""
    if edge.asked(Action.SURVEY):
        last = edge.world.last_signal
        assert last is not None
        assert (last.signal, last.scope) == (signal.SIGKILL, Scope.TREE)
    if edge.event is Event.SURVEYED and edge.life.state is State.STOPPING:
        assert edge.next_life.survivors == edge.payload["survivors"]
    elif edge.event is not Event.EMPTY:
        assert edge.next_life.survivors == edge.life.survivors


def check_publish(edge: Edge) -> None:
    """Invariant 5: after the streams, and never before the tree's end is known."""
    if not edge.asked(Action.PUBLISH):
        return
    assert edge.next_world.settled
    never_started = edge.life.state in (State.NEW, State.STARTING)
    given_up = edge.event is Event.DRAIN_DUE
    assert edge.next_world.streams_left == 0 or given_up or never_started


def check_signal(edge: Edge) -> None:
    """Invariant 6."""
    if edge.asked(Action.SIGNAL):
        assert edge.next_world.started


class Coverage:
    """What a walk has seen."""

    def __init__(self) -> None:
        self.situations: set[Key] = set()
        self.transitions = 0
        self.rows: set[tuple[State, Event]] = set()
        self.late = 0  # events that come too late to matter

    def note(self, configuration: Key, edge: Edge) -> None:
        self.situations.add((configuration, key_of(edge.next_life, edge.next_world)))
        self.transitions += 1
        row = (edge.life.state, edge.event)
        if row in TABLE:
            self.rows.add(row)
        else:
            self.late += 1

    def __str__(self) -> str:
        return (
            f"lifecycle: {len(self.situations)} situations, {self.transitions} transitions "
            f"({self.late} of them by events without a row), "
            f"{len(self.rows)} of {len(TABLE)} rows of the table"
        )


def check_all(leftovers: Leftovers, streams: int, coverage: Coverage) -> None:
    proved: set[Key] = set()
    for edge in walk(leftovers, streams):
        coverage.note((leftovers, streams), edge)
        check_close(edge)
        check_kill(edge)
        check_escalation(edge)
        check_publish(edge)
        check_signal(edge)
        if edge.next_world.killed:
            end_by_timers(edge.next_life, edge.next_world, proved)


def test_every_interleaving_keeps_the_invariants_and_uses_every_row(capsys):
    coverage = Coverage()
    for leftovers, streams in CONFIGURATIONS:
        check_all(leftovers, streams, coverage)
    with capsys.disabled():
        print(f"\n{coverage}")
    assert coverage.rows == set(TABLE)


def test_kill_has_a_row_in_every_state_but_the_last():
    assert {state for state in State if (state, Event.KILL) not in TABLE} == {State.CLOSED}


def test_a_sweep_that_takes_too_long_says_that_nothing_is_proved():
    life = life_in(State.RUNNING)
    life.handle(Event.LOST, detail="end of file")
    actions = life.handle(Event.STAGE_DUE)
    assert kinds(actions)[-2:] == [Action.CLOSE, Action.PUBLISH]
    assert life.survivors == ()
    assert life.detail == "end of file; not swept in 10 s, so something may be left"


def test_who_lets_go_of_a_tree_gets_what_it_has_written_so_far_and_signals_nobody():
    life = life_in(State.RUNNING, streams=1)
    actions = life.handle(Event.DETACHED)
    assert kinds(actions) == [Action.RELEASE, Action.DRAIN, Action.ARM_DRAIN]
    assert actions[1] == (Action.DRAIN, True)
    actions = life.handle(Event.STREAM_ENDED)
    assert kinds(actions) == [Action.CLOSE, Action.PUBLISH]
    assert life.reason is Reason.DETACHED


def test_what_was_not_made_when_it_was_let_go_of_is_not_made():
    life = life_in(State.NEW, streams=1)
    assert kinds(life.handle(Event.DETACHED)) == [Action.CLOSE, Action.PUBLISH]
    assert life.reason is Reason.DETACHED


def test_an_ending_that_is_under_way_cannot_be_left_by_letting_go():
    life = life_in(State.RUNNING)
    kill(life)
    assert life.handle(Event.DETACHED) == []
    assert life.state is State.STOPPING


# -- the walk itself: with a defect in the table it has to fail


def _kill_starting_at_once(life: Lifecycle, **_payload: Any) -> State:
    return life._stop()


def _kill_stopping_again(life: Lifecycle, policy: KillPolicy | None, **_payload: Any) -> State:
    life.stopping_kill = True
    if policy is not None and life.phase is Phase.STAGES:
        life.policy = policy
        return life._stop()
    return State.STOPPING


def _kill_draining_without_timer(life: Lifecycle, **_payload: Any) -> State:
    life.stopping_kill = True
    return State.DRAINING


def _due_closes_at_once(life: Lifecycle) -> State:
    return life._close()


def _due_surveys_at_once(life: Lifecycle) -> State:
    life._ask(Action.SURVEY)
    return life._finish()


def _stream_ended_closes(life: Lifecycle) -> State:
    life.streams -= 1
    return life._close()


def _closed_again(life: Lifecycle, **_payload: Any) -> State:
    return life._close()


def _stage_repeats(life: Lifecycle) -> State:
    life._ask(Action.ARM_STAGE, 1.0)
    return State.STOPPING


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ((State.STARTING, Event.KILL), _kill_starting_at_once),
        ((State.STOPPING, Event.KILL), _kill_stopping_again),
        ((State.DRAINING, Event.KILL), _kill_draining_without_timer),
        ((State.STOPPING, Event.STAGE_DUE), _due_closes_at_once),
        ((State.STOPPING, Event.STAGE_DUE), _due_surveys_at_once),
        ((State.STOPPING, Event.STAGE_DUE), _stage_repeats),
        ((State.DRAINING, Event.STREAM_ENDED), _stream_ended_closes),
        ((State.CLOSED, Event.KILL), _closed_again),
        ((State.CLOSED, Event.STREAM_ENDED), _closed_again),
    ],
    ids=lambda value: value.__name__ if callable(value) else f"{value[0].name}-{value[1].name}",
)
def test_the_walk_notices_a_defect(row, rule, monkeypatch):
    monkeypatch.setitem(TABLE, row, rule)
    with pytest.raises(AssertionError):
        check_all(Leftovers.KILL, 2, Coverage())


# -- the main paths, and the races by name


def kinds(actions: list[tuple[Action, Any]]) -> list[Action]:
    return [action for action, _ in actions]


def life_in(
    state: State,
    *,
    policy: KillPolicy = POLICY,
    leftovers: Leftovers = Leftovers.KILL,
    streams: int = 0,
) -> Lifecycle:
    """A tree that came to `state` on the shortest way."""
    life = Lifecycle(policy, leftovers, streams, 0.5)
    way = [Event.SPAWNED, Event.STARTED]
    for event in way[: [State.NEW, State.STARTING, State.RUNNING].index(state)]:
        life.handle(event)
    assert life.state is state
    return life


def kill(life: Lifecycle, policy: KillPolicy | None = None, reason: Reason = Reason.KILLED):
    return life.handle(Event.KILL, reason=reason, detail="", policy=policy)


def main_exited(life: Lifecycle, leftovers: tuple[Member, ...] = (), status: int = 0):
    empty = not leftovers
    return life.handle(Event.MAIN_EXITED, status=status, leftovers=leftovers, empty=empty)


def test_a_command_that_ends_by_itself():
    life = life_in(State.RUNNING)
    assert main_exited(life, status=0x300) == []
    assert kinds(life.handle(Event.EMPTY)) == [Action.DISARM_STAGE, Action.CLOSE, Action.PUBLISH]
    assert (life.state, life.reason, life.status) == (State.CLOSED, None, 0x300)


def test_a_tree_that_ignores_everything_gets_every_stage_and_then_a_survey():
    life = life_in(State.RUNNING)
    sent = [kill(life)]
    while life.phase is Phase.STAGES:
        sent.append(life.handle(Event.STAGE_DUE))
    signals = [payload for step in sent for action, payload in step if action is Action.SIGNAL]
    assert signals == list(POLICY.stages)
    assert sent[-1] == [
        (Action.SURVEY, None),
        (Action.ARM_STAGE, lifecycle.SURVEY_TIMEOUT),
    ]
    life.handle(Event.SURVEYED, survivors=SOMEBODY)
    assert (life.state, life.survivors) == (State.CLOSED, SOMEBODY)


def test_each_stage_is_given_its_own_grace():
    life = life_in(State.RUNNING)
    graces = []
    actions = kill(life)
    while life.phase is Phase.STAGES:
        graces += [payload for action, payload in actions if action is Action.ARM_STAGE]
        actions = life.handle(Event.STAGE_DUE)
    assert graces == [stage.grace for stage in POLICY.stages]


def test_race_a_kill_before_the_launch_closes_without_a_process():
    life = life_in(State.NEW)
    assert kinds(kill(life)) == [Action.CLOSE, Action.PUBLISH]
    assert life.handle(Event.SPAWNED) == []
    assert (life.state, life.reason) == (State.CLOSED, Reason.KILLED)


def test_race_a_kill_between_fork_and_exec_waits_for_the_group():
    life = life_in(State.STARTING)
    assert kill(life) == [(Action.ARM_STAGE, POLICY.duration)]
    assert kinds(life.handle(Event.STARTED)) == [Action.SIGNAL, Action.ARM_STAGE]
    assert life.state is State.STOPPING


def test_race_a_kill_between_fork_and_a_failing_exec_says_that_nothing_ran():
    life = life_in(State.STARTING)
    kill(life)
    actions = life.handle(Event.START_FAILED, detail="exec: ENOENT")
    assert kinds(actions) == [Action.DISARM_STAGE, Action.CLOSE, Action.PUBLISH]
    assert (life.reason, life.detail) == (Reason.EXEC_FAILED, "exec: ENOENT")


def test_race_a_start_that_hangs_does_not_outlast_its_kill():
    life = life_in(State.STARTING)
    kill(life)
    assert kinds(life.handle(Event.STAGE_DUE)) == [Action.SWEEP, Action.ARM_STAGE]
    assert life.handle(Event.STARTED) == []
    assert kinds(life.handle(Event.STAGE_DUE))[-1] is Action.PUBLISH


def test_race_a_second_kill_with_the_same_policy_does_not_begin_again():
    life = life_in(State.RUNNING)
    kill(life)
    assert kill(life) == kill(life, POLICY) == kill(life, SLOWER) == []


def test_race_a_second_kill_that_is_faster_takes_over():
    life = life_in(State.RUNNING)
    kill(life)
    assert kill(life, FASTER)[0] == (Action.SIGNAL, FASTER.stages[0])


def test_race_a_faster_kill_does_not_restart_what_is_nearly_over():
    policy = KillPolicy([Stage(signal.SIGTERM, 60.0), Stage(signal.SIGKILL, 0.1)])
    life = life_in(State.RUNNING, policy=policy)
    kill(life)
    life.handle(Event.STAGE_DUE)
    assert kill(life, FASTER) == []


def test_race_a_kill_while_leftovers_are_ended_keeps_the_main_process_its_reason():
    life = life_in(State.RUNNING)
    assert kinds(main_exited(life, SOMEBODY)) == [Action.SIGNAL, Action.ARM_STAGE]
    kill(life)
    life.handle(Event.EMPTY)
    assert (life.state, life.reason, life.leftovers) == (State.CLOSED, None, SOMEBODY)


def test_race_a_kill_after_the_tree_has_ended_changes_nothing():
    life = life_in(State.RUNNING)
    main_exited(life)
    life.handle(Event.EMPTY)
    assert kill(life) == []
    assert life.reason is None


def test_race_empty_comes_before_the_stage_timer():
    life = life_in(State.RUNNING)
    kill(life)
    assert Action.DISARM_STAGE in kinds(life.handle(Event.EMPTY))
    assert life.handle(Event.STAGE_DUE) == []


def test_race_the_survey_answers_after_it_was_given_up():
    life = life_in(State.RUNNING, policy=FASTER)
    kill(life)
    life.handle(Event.STAGE_DUE)
    assert kinds(life.handle(Event.STAGE_DUE)) == [Action.SWEEP, Action.ARM_STAGE]
    life.handle(Event.SURVEYED, survivors=())
    assert life.state is State.CLOSED
    assert life.handle(Event.SURVEYED, survivors=SOMEBODY) == []
    assert life.survivors == ()


def test_a_survey_that_sees_nobody_is_no_proof():
    """Either EMPTY is on its way, or something hides and is swept."""
    life = life_in(State.RUNNING, policy=FASTER)
    kill(life)
    life.handle(Event.STAGE_DUE)
    assert life.handle(Event.SURVEYED, survivors=()) == []
    assert life.state is State.STOPPING
    hidden = copy.copy(life)
    assert kinds(life.handle(Event.EMPTY))[-1] is Action.PUBLISH
    assert kinds(hidden.handle(Event.STAGE_DUE)) == [Action.SWEEP, Action.ARM_STAGE]


def test_leftovers_that_cannot_be_seen_are_ended_too():
    life = life_in(State.RUNNING)
    actions = life.handle(Event.MAIN_EXITED, status=0, leftovers=(), empty=False)
    assert kinds(actions) == [Action.SIGNAL, Action.ARM_STAGE]


def test_a_lost_warden_is_the_reason_only_while_the_main_process_runs():
    running, exited = life_in(State.RUNNING), life_in(State.RUNNING, leftovers=Leftovers.WAIT)
    main_exited(exited, SOMEBODY)
    for life in (running, exited):
        actions = life.handle(Event.LOST, detail="end of file")
        assert actions == [(Action.SWEEP, None), (Action.ARM_STAGE, lifecycle.SWEEP_TIMEOUT)]
    assert (running.reason, exited.reason) == (Reason.WARDEN_LOST, None)


def test_a_warden_that_is_lost_twice_is_swept_after_once():
    life = life_in(State.RUNNING)
    life.handle(Event.LOST, detail="garbage")
    assert life.handle(Event.LOST, detail="end of file") == []
    assert life.detail == "garbage"


def test_leftovers_kill_wait_and_leave():
    actions = {
        leftovers: kinds(main_exited(life_in(State.RUNNING, leftovers=leftovers), SOMEBODY))
        for leftovers in Leftovers
    }
    assert actions[Leftovers.KILL] == [Action.SIGNAL, Action.ARM_STAGE]
    assert actions[Leftovers.WAIT] == []
    assert actions[Leftovers.LEAVE][0] is Action.RELEASE
    assert actions[Leftovers.LEAVE][-1] is Action.PUBLISH


def test_streams_are_awaited_without_limit_when_nobody_asked_for_the_end():
    life = life_in(State.RUNNING, streams=2)
    main_exited(life)
    actions = life.handle(Event.EMPTY)
    assert actions == [(Action.DISARM_STAGE, None), (Action.DRAIN, True)]
    assert life.handle(Event.STREAM_ENDED) == []
    assert kinds(life.handle(Event.STREAM_ENDED)) == [Action.CLOSE, Action.PUBLISH]


def test_a_kill_bounds_the_wait_for_a_stream_whose_callback_hangs():
    life = life_in(State.RUNNING, streams=1)
    main_exited(life)
    life.handle(Event.EMPTY)
    assert kill(life) == [(Action.ARM_DRAIN, 0.5)]
    assert kill(life) == []
    assert kinds(life.handle(Event.DRAIN_DUE)) == [Action.CLOSE, Action.PUBLISH]


def test_a_stream_that_ends_before_its_tree_is_not_waited_for_again():
    life = life_in(State.STARTING, streams=1)
    life.handle(Event.STREAM_ENDED)
    life.handle(Event.STARTED)
    main_exited(life)
    assert kinds(life.handle(Event.EMPTY))[-1] is Action.PUBLISH


def test_the_first_reason_stays():
    life = life_in(State.RUNNING)
    kill(life, reason=Reason.TIMEOUT)
    kill(life, FASTER, reason=Reason.KILLED)
    assert life.reason is Reason.TIMEOUT


def test_a_second_kill_never_puts_the_end_off():
    """Four seconds are less than five, but not less than what is left of them."""
    life = Lifecycle(KillPolicy.after(5.0), Leftovers.KILL, 0, 0.5)
    life.handle(Event.SPAWNED)
    life.handle(Event.STARTED)
    life.handle(Event.KILL, reason=Reason.KILLED, detail="", policy=None, left=None)
    again = {"reason": Reason.KILLED, "detail": "", "policy": KillPolicy.after(4.0)}
    assert life.handle(Event.KILL, **again, left=0.1) == []
    assert [action for action, _ in life.handle(Event.KILL, **again, left=4.9)] == [
        Action.SIGNAL,
        Action.ARM_STAGE,
    ]


def test_the_end_of_the_main_process_is_not_the_end_when_another_has_taken_its_place():
    life = life_in(State.RUNNING)
    life.handle(Event.SUCCEEDED)
    assert main_exited(life, SOMEBODY) == []
    assert life.state is State.RUNNING
    actions = life.handle(Event.SUCCESSOR_EXITED, status=0x300)
    assert kinds(actions) == [Action.SIGNAL, Action.ARM_STAGE]
    life.handle(Event.EMPTY)
    assert (life.state, life.reason, life.main_status) == (State.CLOSED, None, 0x300)


def test_without_its_exit_status_that_of_the_main_process_stays():
    life = life_in(State.RUNNING)
    life.handle(Event.SUCCEEDED)
    main_exited(life, SOMEBODY, status=0x100)
    life.handle(Event.SUCCESSOR_EXITED, status=None)
    assert life.main_status == 0x100


def test_only_a_stage_that_another_one_follows_may_be_given_more_time():
    life = life_in(State.RUNNING)
    assert not life.may_extend
    kill(life)
    assert life.may_extend
    for _ in range(len(life.policy.stages) - 1):
        life.handle(Event.STAGE_DUE)
    assert not life.may_extend
    life.handle(Event.STAGE_DUE)
    assert not life.may_extend
