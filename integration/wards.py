"""A simple model of a tree: what the commands so far can explain.

It knows no schedule and no time. Whatever is observed of the tree, at any moment, has to be
explained by what has been asked for before: its state, and when it has ended its reason, its exit
status, the stages that were sent, what was left, and its output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog

import proctree
from integration.conftest import DEADLINE, eventually
from integration.puppets import CHILDREN, EXIT_TOLD, MUCH, Puppets, output_of
from proctree import KillPolicy, Reason, Stage, State, WatchedSubprocess, loop
from proctree.containment.warden import WardenContained

CAPTURED = 64 * 1024
"""Bytes that the reader "head and tail" keeps."""

BOUND = 90.0
"""Seconds until a tree that has to end has ended: generous."""

ORDER = list(State)
ENDS_ALL = Stage(signal.SIGKILL, 20.0)
"""Long: with less, a busy machine could make survivors of those that are about to die."""

SHORT = KillPolicy((Stage(signal.SIGTERM, 0.0), Stage(signal.SIGKILL, 0.2)))
"""For a warden that is stopped, which does not carry out what the graces are for."""


class Told:
    """What proctree itself tells: its events, counted for each tree."""

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.defects: list[str] = []
        structlog.configure(processors=[self])

    def __call__(self, _logger: object, _level: str, event: MutableMapping[str, Any]) -> Any:
        name = event["event"]
        if name == "tree.started":
            self.started[event["tree_id"]] += 1
        elif name == "tree.ended":
            self.ended[event["tree_id"]] += 1
        elif name in ("tree.defect", "loop.defect"):
            told = "".join(traceback.format_exception(sys.exception()))
            self.defects.append(f"{dict(event)}\n{told}")
        raise structlog.DropEvent

    def forget(self, ward: Ward | None) -> None:
        if ward is not None:
            self.started.pop(ward.handle.tree_id, None)
            self.ended.pop(ward.handle.tree_id, None)

    def check_once(self, tree_id: str) -> None:
        """It has ended once, and is forgotten here."""
        started, ended = self.started.pop(tree_id, 0), self.ended.pop(tree_id, 0)
        assert ended == 1, f"tree {tree_id} has ended {ended} times"
        assert started <= 1, f"tree {tree_id} has started {started} times"


def together(*functions: Callable[[], object]) -> None:
    """Runs each in a thread of its own, all at once. None of them may wait for anything."""
    barrier = threading.Barrier(len(functions))
    raised: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            barrier.wait(DEADLINE)
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a call that is to return at once does not return"
    for error in raised:
        raise error


@contextlib.contextmanager
def standing_loop() -> Iterator[None]:
    """While this lasts, the loop's thread does nothing: whoever waits for it waits in vain."""
    standing, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        standing.set()
        go_on.wait(3 * DEADLINE)

    loop.get().post(stand)
    assert standing.wait(DEADLINE)
    try:
        yield
    finally:
        go_on.set()


def until_none(left: Callable[[], object], what: str) -> None:
    """For what nothing reports: waits until there is none of it."""
    try:
        eventually(lambda: not left(), what)
    except AssertionError:
        still = left()
        raise AssertionError(f"still there: {what}: {still}") from None


class Options(NamedTuple):
    """How a tree is made. `reader` is what reads its output: see `Ward._sink`."""

    target: str
    script: str
    leftovers: str
    policy: KillPolicy
    timeout: float | None
    reader: str


class Ward:
    """One tree, and all that the commands so far can explain about it."""

    def __init__(self, options: Options, containment: str, program: str, folder: Path) -> None:
        if containment == "pidns" and options.leftovers == "leave":
            # The kernel ends them with the namespace, so that is refused.
            options = options._replace(leftovers="wait")
        self.options = options
        self.puppets = Puppets(program, folder)
        self.output = b""
        self.calls = 0
        self.go_on = threading.Event()
        self.handle = WatchedSubprocess(
            self._target(),
            stdout=self._sink(),
            stderr=proctree.DEVNULL,
            leftovers=options.leftovers,
            kill=options.policy,
            timeout=options.timeout,
            containment=containment,
            drain_timeout=0.1 if options.reader == "block" else 0.5,
        )
        self.outcome: proctree.Outcome | None = None
        self.seen = State.NEW
        self.launched = False
        self.holds: list[int] = []
        # What can explain an end.
        self.kills: dict[str, KillPolicy] = {}
        self.lethal = {int(signal.SIGKILL)} if "k" in options.script else set[int]()
        self.told_to_exit = "q" in options.script
        self.warden_killed = False
        self.warden_stopped = False
        # What can explain that something does not happen.
        self.stopped = False
        self.uncertain = False
        # What it was told, and the part of it that it has certainly performed.
        self.script = ""
        self.performed = ""
        self.acks = 0

    def _target(self) -> list[str] | Callable[[], object]:
        if self.options.target == "missing":
            return ["/nonexistent/program"]
        argv = self.puppets.argv(self.options.script + "a")
        if self.options.target == "callable":
            return lambda: os.execv(argv[0], argv)
        return argv

    def _sink(self) -> Any:
        reader = self.options.reader
        if reader == "nobody":
            return proctree.DEVNULL
        if reader == "capture":
            return proctree.CAPTURE
        if reader == "head and tail":
            return proctree.Capture(CAPTURED)
        return proctree.Chunks(getattr(self, f"_{reader}"))

    # The callbacks. They run on the tree's own worker.

    def _collect(self, data: bytes) -> None:
        self.output += data
        self.calls += 1

    def _raise(self, data: bytes) -> None:
        self._collect(data)
        raise RuntimeError("a callback that raises")

    def _kill(self, data: bytes) -> None:
        self._collect(data)
        self.handle.kill(reason="from the callback")

    def _block(self, data: bytes) -> None:
        self.go_on.wait()
        self._collect(data)

    # What is known.

    def __repr__(self) -> str:
        return f"{self.handle!r} {self.options}"

    @property
    def started_pid(self) -> int | None:
        """The process that the supervisor itself has started: the warden, or the main process."""
        contained = self.handle._tree.contained
        return contained._warden if isinstance(contained, WardenContained) else contained.pid

    @property
    def may_kill_itself(self) -> bool:
        return self.options.reader == "kill" and bool(output_of(self.script))

    @property
    def times_out(self) -> bool:
        return self.launched and self.options.timeout is not None and self.options.timeout < 1

    @property
    def must_end(self) -> bool:
        """Whatever else is the matter with it."""
        missing = self.launched and self.options.target == "missing"
        return bool(self.kills) or self.times_out or self.warden_killed or missing

    @property
    def ends_by_itself(self) -> bool:
        """Nothing has come between what it was told and its end."""
        waits = self.options.leftovers == "wait" and (set(CHILDREN) & set(self.script))
        blocked = self.options.reader == "block" and not self.go_on.is_set()
        return self.launched and self._only_told_to_exit() and not waits and not blocked

    @property
    def may_end(self) -> bool:
        return self.must_end or bool(self.lethal) or self.told_to_exit or self.may_kill_itself

    @property
    def responds(self) -> bool:
        """Whether the main process certainly does what it is told."""
        blocked = self.options.reader == "block" and not self.go_on.is_set()
        return (
            self.launched
            and not self.may_end
            and not self.stopped
            and not self.uncertain
            and not (blocked and "W" in self.script)
        )

    @property
    def children(self) -> int | None:
        """How many processes the main process has forked that live by themselves, if that is
        certain."""
        if self.performed != self.script:
            return None
        return sum(letter in CHILDREN for letter in self.performed)

    # What is done.

    def launch(self) -> None:
        self.launched = True
        if self.options.target != "missing":
            self.script = self.options.script + self.script
        expected: list[type[Exception]] = []
        if self.options.target == "missing":
            expected.append(FileNotFoundError)
        if self.kills or self.times_out or self.warden_killed:
            expected.append(proctree.ProctreeError)
        with contextlib.suppress(*expected):
            self.handle.launch()
            assert self.options.target != "missing"
            assert self.handle.pid is not None
            if self.responds:
                self.wait_until_performed()

    def wait_until_performed(self) -> None:
        self.acks += 1
        assert self.puppets.wait_until_said(self.acks, DEADLINE), f"no answer from {self}"
        self.performed = self.script

    def tell(self, script: str) -> None:
        if not self.told_to_exit:  # it never comes to what is behind that
            self.script += script
        self.puppets.tell(script + "a")
        if self.responds:
            self.wait_until_performed()
        else:
            self.uncertain = True

    def tell_to_exit(self, script: str) -> None:
        """Behind the last of `script`, without a pause."""
        if not self.told_to_exit:
            self.script += script
            self.told_to_exit = True
        self.puppets.tell(script + "q")

    def killers(self, policies: Sequence[KillPolicy | None]) -> list[Callable[[], None]]:
        """A call for each, that is yet to be made."""
        calls = []
        for policy in policies:
            detail = f"kill {len(self.kills)}"
            self.kills[detail] = policy or self.options.policy
            calls.append(lambda p=policy, d=detail: self.handle.kill(p, reason=d))
        return calls

    def kill(self, policies: Sequence[KillPolicy | None], *, standing: bool = False) -> None:
        calls = self.killers(policies)
        with standing_loop() if standing else contextlib.nullcontext():
            together(*calls)

    # What is observed.

    def look(self) -> None:
        """State and outcome, as they are right now."""
        outcome = self.handle.outcome
        state = self.handle.state
        assert ORDER.index(state) >= ORDER.index(self.seen), f"{self.seen} to {state}: {self}"
        self.seen = state
        if not self.launched:
            assert state is State.NEW or (state is State.CLOSED and self.kills), self
        elif not self.may_end:
            assert state is State.RUNNING, f"nobody has ended {self}"
        if outcome is not None:
            assert state is State.CLOSED
        if self.outcome is not None:
            assert outcome is self.outcome, "a second outcome"
        elif outcome is not None:
            self.ended(outcome)

    def settle(self) -> None:
        """It has to end, and so it does."""
        if self.warden_stopped and not self.warden_killed:
            self.kill([SHORT])
        outcome = self.handle.wait(BOUND)
        assert outcome is not None, f"did not end: {self}"
        self.look()

    def ended(self, outcome: proctree.Outcome) -> None:
        """Everything that the outcome says is explained, and what it promises is so."""
        lives = self.puppets.live()
        self.outcome = outcome
        if outcome.returncode == EXIT_TOLD:
            self.performed = self.script
        assert not outcome.survivors, outcome
        assert outcome.containment == self.handle.containment
        assert outcome.tree_id == self.handle.tree_id
        assert not lives or self._may_be_left(outcome), f"something lives: {outcome} {self.options}"
        if self._certainly_left(outcome):
            assert lives, f"what was to be left is gone: {outcome} {self.options}"
        self._check_reason(outcome)
        self._check_status(outcome)
        self._check_stages(outcome)
        self._check_leftovers(outcome)
        self._check_output(outcome)

    @property
    def was_let_go(self) -> bool:
        return self.outcome is not None and self._may_be_left(self.outcome)

    def _may_be_left(self, outcome: proctree.Outcome) -> bool:
        by_itself = outcome.reason in (Reason.EXITED, Reason.SIGNALED)
        return self.options.leftovers == "leave" and by_itself and not outcome.stages

    def _only_told_to_exit(self) -> bool:
        return self.told_to_exit and not (
            self.must_end or self.lethal or self.may_kill_itself or self.stopped or self.uncertain
        )

    def _certainly_left(self, outcome: proctree.Outcome) -> bool:
        leave = self.options.leftovers == "leave"
        return leave and self._only_told_to_exit() and bool(self.children)

    def _check_reason(self, outcome: proctree.Outcome) -> None:
        killed = bool(self.kills) or self.may_kill_itself
        explained = {
            Reason.EXITED: self.told_to_exit,
            Reason.SIGNALED: bool(self.lethal),
            Reason.KILLED: killed,
            Reason.TIMEOUT: self.times_out,
            Reason.EXEC_FAILED: self.options.target == "missing" and self.launched,
            Reason.WARDEN_LOST: self.warden_killed,
            Reason.SUPERVISOR_LOST: False,
        }
        assert explained[outcome.reason], f"{outcome.reason} is not explained: {self.options}"
        if outcome.reason is Reason.KILLED:
            assert outcome.detail in self.kills or self.may_kill_itself, outcome
        if outcome.reason is Reason.TIMEOUT:
            assert self.options.timeout is not None
            assert outcome.duration >= self.options.timeout

    def _check_status(self, outcome: proctree.Outcome) -> None:
        status = outcome.returncode
        if status is None:
            # It never ran, or whoever was to tell its status could not.
            never = outcome.pid is None or outcome.reason is Reason.EXEC_FAILED
            assert never or self.warden_killed or self.warden_stopped, outcome
        elif status >= 0:
            assert status == EXIT_TOLD, outcome
            assert self.told_to_exit, outcome
        else:
            sent = {int(stage.signal) for stage in outcome.stages}
            assert -status in sent | self.lethal, outcome
        assert (outcome.reason is Reason.EXITED) <= (status == EXIT_TOLD), outcome

    def _check_stages(self, outcome: proctree.Outcome) -> None:
        """The stages are those of one policy, from the first, until another takes over."""
        known = [self.options.policy, *self.kills.values()]
        sent = [(stage.signal, stage.scope) for stage in outcome.stages]

        def explained(rest: list[Any]) -> bool:
            if not rest:
                return True
            for policy in known:
                theirs = [(stage.signal, stage.scope) for stage in policy.stages]
                for length in range(1, min(len(theirs), len(rest)) + 1):
                    if theirs[:length] == rest[:length] and explained(rest[length:]):
                        return True
            return False

        assert explained(sent), f"{outcome.stages} come of none of {known}"

    def _check_leftovers(self, outcome: proctree.Outcome) -> None:
        if self._only_told_to_exit() and self.children is not None:
            assert len(outcome.leftovers) == self.children, (outcome, self.performed)

    def _check_output(self, outcome: proctree.Outcome) -> None:
        assert outcome.callback_errors == (self.calls if self.options.reader == "raise" else 0)
        captured = self.options.reader in ("capture", "head and tail")
        got = outcome.stdout if captured else self.output
        if got is None:
            assert outcome.pid is None, outcome  # it never ran
            return
        cut = outcome.stdout_cut
        head, length = (
            (got, len(got)) if cut is None else (got[: cut.offset], len(got) + cut.length)
        )
        whole = output_of(self.script)
        if "f" in self.script:
            whole += MUCH * (len(head) // len(MUCH) + 1)
        assert whole.startswith(head), (len(whole), len(head))
        if self.options.leftovers != "leave" and (captured or self._only_told_to_exit()):
            # Otherwise it does not wait for callbacks that take longer than the drain.
            least = 0 if self.options.reader == "nobody" else len(output_of(self.performed))
            assert length >= least, (self.performed, length)

    def close(self) -> None:
        self.go_on.set()
        for fd in self.holds:
            os.close(fd)
        self.puppets.close()
