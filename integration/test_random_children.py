"""Random commands to a supervisor of real children, held against what must always be true.

Hypothesis chooses the supervisor's rules, its children and what becomes of them: they exit, are
killed and stopped from outside, ignore SIGTERM, flood, become ready late or never; their heartbeats
are rejected or fail, and their wardens are killed; and they are added, removed and restarted in
between. What must be true:

* every call returns, and raises only what its docstring says;
* no two incarnations of a child live at the same time: each holds a lock (flock(2)) as long as any
  process of it lives, and the next one says so when it does not get it;
* the children that there are, are those that were added and not removed;
* events tell one story: a start has one end, nothing is ready while it is stopped, and what is not
  wanted any more is not started;
* a shutdown that is not hurried has an order;
* afterwards nothing lives.

The commands are drawn before the first of them is carried out, as in test_random_commands.py, and
`HYPOTHESIS_PROFILE=commands-long` runs some thousand longer examples.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proctree
from integration.conftest import DEADLINE, QUICK, in_thread
from integration.puppets import signal_warden
from integration.test_random_commands import LONG, SETTINGS, descendants, new_since
from integration.test_supervisor import Heard
from integration.test_supervisor_promises import check_events
from integration.wards import until_none
from proctree import Reason, WatchedSubprocess
from proctree.supervisor import (
    Backoff,
    ChildEnded,
    ChildFailed,
    ChildSpec,
    ChildStarting,
    ChildStopping,
    Heartbeat,
    OutputLine,
    Rejected,
    Strategy,
    Supervisor,
    SupervisorGaveUp,
    SupervisorStopping,
)

NAMES = ("a", "b", "c", "d", "e")

LOCKED = "exec 9>>{0}; flock -n 9 || {{ echo {1} >> {2}; exit 99; }}; "
"""Every process of the tree inherits the descriptor, and so the lock."""

SCRIPTS = {
    "sleeps": "exec sleep 1000",
    "succeeds": "exit 0",
    "fails": "exit 1",
    "lives briefly": "sleep 0.03; exit 1",
    "is a family": "sleep 1000 & setsid sleep 1000 & wait",
    "leaves one that ignores SIGTERM": "(trap '' TERM; exec sleep 1000) & sleep 0.03; exit 1",
    "ignores SIGTERM": "trap '' TERM; while :; do sleep 0.1; done",
    "floods": "exec yes",
    "is ready late": "sleep 0.03; echo up; exec sleep 1000",
    "is never ready": "echo down; exec sleep 1000",
    "fails before it is ready": "exit 1",
}
LEAVES = "leaves one that ignores SIGTERM"
WITH_LINE = ("is ready late", "is never ready", "fails before it is ready")


class Child(NamedTuple):
    """What a child does, and what is done about it."""

    script: str
    restart: str
    beats: bool
    containment: str


class Command(NamedTuple):
    """A method of `World`, and its arguments."""

    name: str
    arguments: dict[str, Any]


def returned(function: Callable[[], Any], what: str) -> Any:
    """What it returns, or the exception; and it does."""
    try:
        return in_thread(function, what).get(timeout=DEADLINE)
    except queue.Empty:
        raise AssertionError(f"{what} does not return") from None


class World:
    """One supervisor, and the model: which children there are."""

    def __init__(self, folder: Path, strategy: str, restarts: int | None) -> None:
        self.folder = folder
        self.violations = folder / "violations"
        self.before = descendants()
        self.heard = Heard()
        self.present: set[str] = set()
        self.hurried = False
        self.by_hand: set[str] = set()
        self.inserted: dict[str, int] = {}
        self.beats: dict[str, str] = {}
        self.pending: list[tuple[str, queue.Queue[Any]]] = []
        self.supervisor = Supervisor(
            strategy=strategy, restarts=restarts, period=1000, auto_shutdown="never"
        )

    def _spec(self, name: str, child: Child) -> ChildSpec:
        locked = LOCKED.format(self.folder / f"lock.{name}", name, self.violations)

        def beat(_beat: object) -> None:
            wanted = self.beats.get(name)
            if wanted == "reject":
                raise Rejected("not wanted")
            if wanted == "fail":
                raise OSError("nobody there")

        self.beats.pop(name, None)
        return ChildSpec(
            name,
            ["sh", "-c", locked + SCRIPTS[child.script]],
            restart=child.restart,
            backoff=Backoff(base=0.01, cap=0.02),
            ready=OutputLine("up", timeout=0.2) if child.script in WITH_LINE else None,
            heartbeat=Heartbeat(beat, interval=0.02, failures=2) if child.beats else None,
            stdout=proctree.Lines(len),
            kill=QUICK,
            containment=child.containment,
        )

    @property
    def _over(self) -> bool:
        return not self.supervisor._running.plan.accepts

    def start(self, children: dict[str, Child]) -> None:
        for name, child in children.items():
            self.add(name, child, wait=True)
        self._wait_a_while("start", in_thread(self.supervisor.start, "start"))

    def _wait_a_while(self, what: str, result: queue.Queue[Any]) -> None:
        """A group in which one child fails again and again does not come up before somebody ends
        that: whoever waits for it waits until then."""
        try:
            error = result.get(timeout=0.5)
        except queue.Empty:
            self.pending.append((what, result))
        else:
            assert error is None or isinstance(error, proctree.ProctreeError), (what, error)

    # -- the commands

    def add(self, name: str, child: Child, wait: bool) -> None:
        spec = self._spec(name, child)
        result = in_thread(lambda: self.supervisor.add(spec, wait=wait), f"add {name}")
        if name in self.present:
            assert isinstance(result.get(timeout=DEADLINE), ValueError)
            return
        deadline = time.monotonic() + DEADLINE
        while result.empty() and name not in self._names():
            assert time.monotonic() < deadline, f"add {name} does nothing"
        if name in self._names():
            self.present.add(name)
            self.inserted[name] = self.inserted.get(name, 0) + 1
        else:
            assert self._over
        self._wait_a_while(f"add {name}", result)

    def _names(self) -> set[str]:
        return {child.name for child in returned(self.supervisor.children, "children")}

    def remove(self, name: str, wait: bool) -> None:
        error = returned(lambda: self.supervisor.remove(name, wait=wait), f"remove {name}")
        if not wait:
            # Once more, and until it is gone.
            again = returned(lambda: self.supervisor.remove(name), f"remove {name} again")
            assert again is None or isinstance(again, KeyError), again
        assert error is None or isinstance(error, KeyError), error
        assert isinstance(error, KeyError) == (name not in self.present)
        self.present.discard(name)

    def restart(self, name: str) -> None:
        self.by_hand.add(name)
        error = returned(lambda: self.supervisor.restart(name), f"restart {name}")
        if isinstance(error, KeyError):
            assert name not in self.present
        elif error is not None:
            assert isinstance(error, proctree.ProctreeError), error
            assert self._over

    def _handle(self, name: str) -> WatchedSubprocess | None:
        child = self.supervisor._running.children.get(name)
        attempt = None if child is None else child.attempt
        return None if attempt is None else attempt.handle

    def shoot(self, name: str, signo: signal.Signals) -> None:
        handle = self._handle(name)
        if handle is not None and handle._tree.asked:
            with contextlib.suppress(RuntimeError):
                handle.signal(signo, "main")

    def shoot_warden(self, name: str) -> None:
        handle = self._handle(name)
        if handle is not None:
            signal_warden(handle, signal.SIGKILL)

    def heart(self, name: str, answer: str) -> None:
        self.beats[name] = answer

    def look(self, name: str) -> None:
        assert self._names() == self.present
        one = returned(lambda: self.supervisor.child(name), f"child {name}")
        assert isinstance(one, KeyError) == (name not in self.present)

    def many_at_once(self, names: list[str]) -> None:
        """From threads of their own, in whatever order."""
        self.by_hand.update(names)
        threads = [
            threading.Thread(target=self._shake, args=(name,), daemon=True) for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a call does not return"

    def _shake(self, name: str) -> None:
        with contextlib.suppress(KeyError, proctree.ProctreeError):
            self.supervisor.restart(name)
            self.shoot(name, signal.SIGKILL)
            self.supervisor.child(name)

    # -- the end

    def finish(self, how: str) -> None:
        self.hurried = how == "now"
        order = [child.name for child in self.supervisor.children()]
        {"now": self.supervisor.stop_now, "in order": self.supervisor.stop}[how]()
        error = returned(self.supervisor.wait, "wait")
        assert error is True or isinstance(error, ChildFailed), error
        for what, result in self.pending:
            late = result.get(timeout=DEADLINE)
            assert late is None or isinstance(late, proctree.ProctreeError), (what, late)
        events = self.heard.until_stopped()
        gave_up = [event for event in events if isinstance(event, SupervisorGaveUp)]
        assert len(gave_up) == isinstance(error, ChildFailed), (gave_up, error)
        assert not self.violations.exists(), self.violations.read_text()
        check_events(events)
        self._check_policies(events)
        if not self.hurried:
            self._check_order(events, order)
        until_none(lambda: new_since(self.before, dead=False), "processes that live")

    def _check_policies(self, events: list[Any]) -> None:
        untouched = [
            name for name, times in self.inserted.items() if times == 1 and name not in self.by_hand
        ]
        for name in untouched:
            mine = [event for event in events if getattr(event, "child", None) == name]
            for first, then in itertools.pairwise(
                event for event in mine if isinstance(event, (ChildStarting, ChildEnded))
            ):
                if isinstance(first, ChildEnded):
                    assert first.reason is not Reason.HEARTBEAT_REJECTED, mine
                    assert isinstance(then, ChildStarting)

    def _check_order(self, events: list[Any], order: list[str]) -> None:
        kinds = [type(event) for event in events]
        at = kinds.index(SupervisorStopping)
        alive = {event.child for event in events[:at] if isinstance(event, ChildStarting)}
        alive = {name for name in alive if self._runs(name, events[:at])}
        for event in events[at:]:
            if isinstance(event, ChildEnded):
                alive.discard(event.child)
            elif isinstance(event, ChildStopping) and event.child in order:
                behind = set(order[order.index(event.child) + 1 :]) & alive
                assert not behind, f"{event.child} was stopped before {behind}: {events}"

    def _runs(self, name: str, events: list[Any]) -> bool:
        last = [
            type(event)
            for event in events
            if isinstance(event, (ChildStarting, ChildEnded)) and event.child == name
        ]
        return last[-1] is ChildStarting

    def close(self) -> None:
        self.supervisor.stop_now()
        with contextlib.suppress(proctree.ProctreeError):
            self.supervisor.wait(DEADLINE)
        self.heard.subscription.close()
        proctree.sweep()


# -- and how they are chosen

CHILDREN = st.builds(
    Child,
    script=st.sampled_from(["sleeps"] * 3 + [LEAVES] * 2 + list(SCRIPTS)),
    restart=st.sampled_from(["always", "always", "on-failure", "never"]),
    beats=st.booleans(),
    containment=st.sampled_from(["warden", "warden", "group"]),
)
GOOD = st.builds(
    Child,
    script=st.sampled_from(["sleeps", "is a family", "is ready late", "ignores SIGTERM", LEAVES]),
    restart=st.just("always"),
    beats=st.booleans(),
    containment=st.sampled_from(["warden", "auto"]),
)


def _command(method: str, /, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Command]:
    return st.builds(Command, st.just(method), st.fixed_dictionaries(arguments))


_NAME = st.sampled_from(NAMES)
_SIGNALS = st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT])
COMMANDS = st.one_of(
    _command("add", name=_NAME, child=CHILDREN, wait=st.booleans()),
    _command("add", name=_NAME, child=CHILDREN, wait=st.booleans()),
    _command("remove", name=_NAME, wait=st.booleans()),
    _command("restart", name=_NAME),
    _command("restart", name=_NAME),
    _command("shoot", name=_NAME, signo=_SIGNALS),
    _command("shoot", name=_NAME, signo=st.just(signal.SIGKILL)),
    _command("shoot_warden", name=_NAME),
    _command("heart", name=_NAME, answer=st.sampled_from(["accept", "reject", "fail"])),
    _command("look", name=_NAME),
    _command("many_at_once", names=st.lists(_NAME, min_size=2, max_size=5)),
)
FIRST = st.dictionaries(st.sampled_from(NAMES), st.one_of(GOOD, GOOD, CHILDREN), max_size=4)
LENGTH = 40 if LONG else 15


@pytest.mark.timeout(0 if LONG else 300)
def test_random_commands_to_a_supervisor(tmp_path: Path) -> None:
    numbers = itertools.count()

    @settings(SETTINGS, max_examples=3000 if LONG else 12)
    @given(
        first=FIRST,
        strategy=st.sampled_from(Strategy),
        restarts=st.sampled_from([None, None, 5]),
        commands=st.lists(COMMANDS, min_size=8, max_size=LENGTH),
        how=st.sampled_from(["now", "in order", "in order"]),
    )
    def examples(
        first: dict[str, Child],
        strategy: Strategy,
        restarts: int | None,
        commands: list[Command],
        how: str,
    ) -> None:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        world = World(folder, strategy, restarts)
        done: list[Command] = []
        try:
            world.start(first)
            for command in commands:
                done.append(command)
                getattr(world, command.name)(**command.arguments)
            world.finish(how)
        except BaseException as error:
            lines = [f"  {strategy} {restarts} {first} {how}", *(f"  {one!r}" for one in done)]
            error.add_note("\n".join(lines))
            raise
        finally:
            world.close()

    examples()
