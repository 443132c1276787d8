"""One tree: its lifecycle, bound to the loop, to what holds it, and to its streams.

`lifecycle.py` decides; this module turns the world into events and actions into the world. All of
it runs on the loop's thread, except what says otherwise, and what says otherwise only posts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from proctree import events, launching, subscriptions, transitions
from proctree.command import Command
from proctree.containment.base import Contained, handing_over
from proctree.errors import ProctreeError, WardenLost, step
from proctree.latch import Latch
from proctree.lifecycle import Action, Event, Lifecycle, State
from proctree.loop import Loop, Timer
from proctree.output import CallbackErrors
from proctree.policy import KillPolicy, Leftovers, Stage
from proctree.process import fds
from proctree.records import Ending, Reason, StageSent, Usage
from proctree.worker import Worker

if TYPE_CHECKING:
    from proctree.outcome import Outcome
    from proctree.process.snapshot import ProcessInfo
    from proctree.stdio import Captured, StreamOwner
    from proctree.terminal import Terminal


class Attached(Protocol):
    """The supervisor's side of a tree's channel."""

    def open(self) -> tuple[int, bytes]:
        """With the descriptor lock held; returns the tree's descriptor and its description."""
        ...

    def close_child_end(self) -> None:
        """The tree has its descriptor, or there is no tree."""

    def start(self) -> None:
        """There is a tree."""

    def close(self) -> None:
        """There is none, or no longer. From any thread."""


class StandardStreams(Protocol):
    """The standard streams of a tree: `stdio.Streams`, or what takes its place."""

    taps: list[Callable[[str, bytes], None]]
    append: bool

    @property
    def terminal(self) -> Terminal | None: ...

    @property
    def outputs(self) -> int:
        """How many output streams will report their end."""
        ...

    def open_fifos(self, then: Callable[[], None]) -> int:
        """Before `open`: what has to be waited for. `then` is called so often as is answered, on
        any thread."""
        ...

    def open(self) -> tuple[int | None, int | None, int | None]:
        """With the descriptor lock held; returns what the child's 0, 1 and 2 are to be."""
        ...

    def close_child_ends(self) -> None:
        """The child has them, or there is no child."""

    def attach(self, loop: Loop, tree: StreamOwner) -> None:
        """With the descriptor lock held. Nothing is delivered before `start`."""

    def start(self) -> None:
        """There is a main process."""

    def drain(self) -> None:
        """The tree is empty: each stream reports its end when what there is was delivered."""

    def close_input(self) -> None:
        """The main process has exited."""

    def close(self) -> None:
        """Gives back everything, whatever was not delivered."""

    def captured(self) -> tuple[Captured, Captured]:
        """Of stdout and stderr."""
        ...


_alive: set[Tree] = set()
"""Trees that have not been closed, for the end of the interpreter."""


def alive() -> tuple[Tree, ...]:
    """Those that are being made, run, or are being ended at this moment. From any thread."""
    return tuple(_alive)


class Tree:
    """See the module."""

    def __init__(
        self,
        tree_id: str,
        command: Command,
        contained: Contained,
        streams: StandardStreams,
        policy: KillPolicy,
        leftovers: Leftovers,
        timeout: float | None,
        drain_timeout: float,
        channel: Attached | None = None,
    ) -> None:
        self.tree_id = tree_id
        self.command = command
        self.contained = contained
        self.policy = policy
        self.owner_pid = os.getpid()
        self.worker = Worker()
        self.callback_errors = CallbackErrors(tree_id)
        self.started = Latch()
        self.closed = Latch()
        self.ending: Ending | None = None
        self._outcome: Outcome | None = None
        self.when_stopped: list[Callable[[int], None]] = []
        """Called on the loop's thread when the main process of a foreground job was stopped."""
        self.when_closed: list[Callable[[], None]] = []
        """Called on the loop's thread when everything of it has been given back."""
        self.observers: list[Callable[[Any], None]] = []
        """Called on the loop's thread with every event of this tree, after it was published: what
        comes of it is told after it."""
        self.start_error: Exception | None = None
        self._streams = streams
        self._channel = channel
        self._timeout = timeout
        self._loop: Loop
        self.life = Lifecycle(policy, leftovers, streams.outputs, drain_timeout)
        # Taking the token is one atomic step, so that only one launch wins.
        self._token = [object()]
        self._fifos = 0
        """How many are waited for before there is a process."""
        self._made = False
        self._defective = False
        self._deferred: list[Stage] = []
        self._queue: list[tuple[Event, dict[str, Any]]] = []
        self._handling = False
        self._told_stopping = False
        self._stage_timer: Timer | None = None
        self._drain_timer: Timer | None = None
        self._timeout_timer: Timer | None = None
        self._began = 0.0
        self._ended: float | None = None
        self._sent: dict[int, StageSent] = {}
        self._results: dict[int, tuple[int | None, int]] = {}

    # -- from any thread

    @property
    def asked(self) -> bool:
        """Whether a launch or a kill was asked for: then there will be an outcome."""
        return not self._token

    @property
    def pid(self) -> int | None:
        return self.contained.pid

    @property
    def age(self) -> float:
        """Seconds since its processes were first made; 0.0 before."""
        return time.monotonic() - self._began if self._began else 0.0

    @property
    def terminal(self) -> Terminal | None:
        return self._streams.terminal

    def _take_token(self) -> bool:
        try:
            self._token.pop()
        except IndexError:
            return False
        return True

    @property
    def outcome(self) -> Outcome | None:
        """Made when it is first asked for: see records.py."""
        if self._outcome is None and self.ending is not None:
            from proctree.outcome import Outcome

            self._outcome = Outcome.of(self.ending)
        return self._outcome

    def launch(self, loop: Loop) -> None:
        """Has the loop make the processes: on its thread, where no KeyboardInterrupt and nothing
        else that a signal handler raises can come between a process and its being known.

        Raises:
            ProctreeError: it was launched or killed before.
        """
        if not self._take_token():
            raise ProctreeError(f"tree {self.tree_id} was launched or killed before")
        self._loop = loop
        if not launching.hooks:
            loop.post(self._launch)
        elif loop.is_current_thread():
            # A supervised child: what is asked is the host's code, which must not hold up the loop.
            self.worker.post(self._ask)
        else:
            self._ask()

    def _ask(self) -> None:
        self.command = self.command.with_environment(launching.ask(self))
        self._loop.post(self._launch)

    def kill(self, loop: Loop, reason: Reason, detail: str, policy: KillPolicy | None) -> None:
        self._take_token()
        self._loop = loop
        payload = {"reason": reason, "detail": detail, "policy": policy}
        loop.post(lambda: self.happened(Event.KILL, **payload, left=self._stage_left()))

    def detach(self, loop: Loop) -> None:
        """Lets go of a tree that is kept; what is under way of its end goes on. One that is not
        made yet is not made; while it is being made this does nothing."""
        self._loop = loop  # an interrupted `launch` may not have come to that
        loop.post(lambda: self.happened(Event.DETACHED))

    def let_go(self, loop: Loop) -> None:
        """For who is interrupted while it is launched, however far that has come: as `detach`, and
        waits for it."""
        self.detach(loop)
        self.started.wait()
        self.detach(loop)
        self.closed.wait()

    def signal(self, stage: Stage) -> None:
        self._loop.post(lambda: self._signal(stage))

    def processes(self) -> list[ProcessInfo]:
        """Of those that live, the main process first."""
        from proctree.process.snapshot import snapshot

        root = self.contained.root()
        return [] if root is None else snapshot(root, self.contained.pid, self.tree_id)

    def tap(self, function: Callable[[str, bytes], None]) -> None:
        """Before the launch: `function` gets the name of the stream and a piece of it, before it is
        delivered, on the tree's worker; of the streams that are delivered to callbacks."""
        self._streams.taps.append(function)

    def append_files(self) -> None:
        """Before the launch: output files are written on and not anew."""
        self._streams.append = True

    def extend(self, seconds: float) -> float:
        """On the loop: the stage under way, if it is not the last one, is not over sooner than so
        many seconds from now. Returns how much that is more."""
        left = self._stage_left()
        if not self.life.may_extend or left is None or left >= seconds:
            return 0.0
        self._arm_stage(seconds)
        return seconds - left

    def set_frozen(self, frozen: bool) -> None:
        self._loop.post(lambda: self._freeze(frozen))

    # -- on the loop: beginning

    def _launch(self) -> None:
        if self.life.state is not State.NEW:
            return  # killed first
        self._began = time.monotonic()
        _alive.add(self)
        try:
            self._fifos = self._streams.open_fifos(lambda: self._loop.post(self._fifo_opened))
        except RuntimeError as error:
            self.could_not_start(error, str(error))
            return
        if self._timeout is not None:
            self._timeout_timer = self._loop.call_later(self._timeout, self._timed_out)
        if self._fifos == 0:
            self._make()

    def _fifo_opened(self) -> None:
        self._fifos -= 1
        if self._fifos == 0 and self.life.state is State.NEW:
            self._make()

    def _make(self) -> None:
        self.happened(Event.SPAWNED)
        try:
            with fds.making():
                try:
                    with step("stdio"):
                        stdio = self._streams.open()
                    # Before there is a process: a logger of the host's may raise here.
                    self._streams.attach(self._loop, self)
                    if self._channel is not None:
                        with step("channel"):
                            self.command = self.command.with_channel(*self._channel.open())
                    with step("containment"), handing_over(self.command) as command:
                        self.contained.spawn(command, stdio, self.policy)
                    self.command = self.command.without_environment()
                finally:
                    self._streams.close_child_ends()
                    if self._channel is not None:
                        self._channel.close_child_end()
        except Exception as error:
            self.could_not_start(error, str(error))
            return
        self._made = True
        self._guard(self._watch, "launch")

    def _watch(self) -> None:
        if self._channel is not None:
            self._channel.start()
        self.contained.attach(self._loop, self)

    def _timed_out(self) -> None:
        detail = f"not done after {self._timeout:g} s"
        self.happened(Event.KILL, reason=Reason.TIMEOUT, detail=detail, policy=None)

    def _stage_left(self) -> float | None:
        """Seconds until the stage under way is over."""
        if self._stage_timer is None:
            return None
        return max(0.0, self._stage_timer.due - time.monotonic())

    # -- on the loop: what happens

    def could_not_start(self, error: Exception, detail: str) -> None:
        self.start_error = error
        self.happened(Event.START_FAILED, detail=detail)

    def happened(self, event: Event, **payload: Any) -> None:
        """Handles one event, and then what came of it, in order: never one inside another."""
        self._queue.append((event, payload))
        if self._handling:
            return
        self._handling = True
        try:
            while self._queue:
                event, payload = self._queue.pop(0)
                self._note(event, payload)
                before = self.life.state
                actions = self.life.handle(event, **payload)
                self._tell(before, event)
                for action, argument in actions:
                    self._guard(partial(self._PERFORM[action], self, argument), action.value)
        finally:
            self._handling = False
        if not self.started.is_set() and self.life.state not in (State.NEW, State.STARTING):
            self.started.set()

    def _guard(self, function: Callable[[], None], what: str) -> None:
        try:
            function()
        except Exception as error:
            # Ours to mend, but until then it must not leave a tree that nobody ends: as if what
            # holds it were lost, it is swept and closed.
            events.error(
                "tree.defect", tree_id=self.tree_id, at=what, error=repr(error), exc_info=True
            )
            if not self._defective:
                self._defective = True
                self.happened(Event.LOST, detail=f"defect: {error!r}")

    def _note(self, event: Event, payload: dict[str, Any]) -> None:
        if event is Event.LOST and self.life.state is State.STARTING:
            self.start_error = WardenLost(payload["detail"])
        elif event is Event.STARTED:
            # Not before: what is logged of its output names its pid.
            self._streams.start()
            for stage in self._deferred:
                self.contained.send(stage, resume=False)
            self._deferred.clear()
        elif event in (Event.EMPTY, Event.SURVEYED) and self._ended is None:
            self._ended = time.monotonic()
        elif event is Event.MAIN_EXITED:
            self._streams.close_input()

    def _tell(self, before: State, event: Event) -> None:
        """Of what has just become of the tree, in the order in which it did."""
        life, name, pid = self.life, self.command.name, self.contained.pid
        if event is Event.SPAWNED and before is State.NEW:
            self._emit(transitions.TreeStarting, name, self.contained.name)
        elif event is Event.STARTED and before is State.STARTING:
            self._emit(transitions.TreeStarted, name, pid, self.contained.name)
        elif event is Event.MAIN_EXITED and before in (State.RUNNING, State.STOPPING):
            returncode = None if life.status is None else os.waitstatus_to_exitcode(life.status)
            self._emit(transitions.MainExited, name, pid, returncode, len(life.leftovers))
        stopping = life.state is State.STOPPING or life.kill_pending
        if stopping and not self._told_stopping:
            self._told_stopping = True
            if life.reason is not None and not life.main_exited:
                self.contained.explain(life.reason, life.detail)
            self._emit(transitions.TreeStopping, name, pid, life.reason, life.detail)
        if life.state is State.DRAINING and before is not State.DRAINING:
            self._emit(transitions.TreeDraining, name)

    def _emit(self, kind: Callable[..., Any], *values: Any) -> None:
        event = kind(self.tree_id, *values, transitions.now())
        subscriptions.publish(event)
        for observer in tuple(self.observers):
            self._guard(partial(observer, event), "observer")

    def stream_ended(self) -> None:
        self.happened(Event.STREAM_ENDED)

    def sent(self, serial: int, count: int | None, denied: int) -> None:
        self._results[serial] = (count, denied)

    def stopped(self, signo: int) -> None:
        for callback in tuple(self.when_stopped):
            callback(signo)

    def foreground(self) -> None:
        """From any thread."""
        self._loop.post(self.contained.foreground)

    def _signal(self, stage: Stage) -> None:
        if self.life.state in (State.NEW, State.STARTING):
            self._deferred.append(stage)
        elif self.life.state in (State.RUNNING, State.STOPPING):
            self.contained.send(stage, resume=False)

    def _freeze(self, frozen: bool) -> None:
        if self.life.state in (State.RUNNING, State.STOPPING):
            self.contained.set_frozen(frozen)

    # -- on the loop: what is to be done

    def _perform_signal(self, stage: Stage) -> None:
        at = time.monotonic() - self._began
        serial = self.contained.send(stage, resume=True)
        self._sent[serial] = StageSent(stage.signal, stage.scope, at)
        self._emit(transitions.TreeSignalled, self.command.name, stage.signal, stage.scope)

    def _arm_stage(self, seconds: float) -> None:
        self._disarm_stage()
        due = lambda: self.happened(Event.STAGE_DUE)  # noqa: E731
        self._stage_timer = self._loop.call_later(seconds, due)

    def _disarm_stage(self, _nothing: None = None) -> None:
        if self._stage_timer is not None:
            self._stage_timer.cancel()

    def _survey(self, _nothing: None) -> None:
        self.contained.survey()

    def _sweep(self, _nothing: None) -> None:
        self._emit(transitions.TreeSwept, self.command.name, self.life.detail)
        self.contained.sweep()

    def _release(self, _nothing: None) -> None:
        self._ended = time.monotonic()
        self.contained.release()

    def _drain(self, empty: bool) -> None:
        if empty:
            self._streams.drain()

    def _arm_drain(self, seconds: float) -> None:
        due = lambda: self.happened(Event.DRAIN_DUE)  # noqa: E731
        self._drain_timer = self._loop.call_later(seconds, due)

    def _close(self, _nothing: None) -> None:
        for timer in (self._stage_timer, self._drain_timer, self._timeout_timer):
            if timer is not None:
                timer.cancel()
        self._streams.close()
        if self._channel is not None:
            self._channel.close()
        if self._made:
            self.contained.close()
        for callback in self.when_closed:
            callback()

    def _publish(self, _nothing: None) -> None:
        ending = self.ending = self._make_ending()
        _alive.discard(self)
        for member in ending.survivors:
            self._emit(transitions.TreeSurvivor, member.pid, member.name, member.why)
        self._emit(
            transitions.TreeEnded,
            self.command.name,
            ending.pid,
            ending.reason,
            ending.detail,
            ending.returncode,
            ending.duration,
            len(ending.survivors),
        )
        self.started.set()
        self.closed.set()

    _PERFORM: ClassVar[dict[Action, Callable[[Tree, Any], None]]] = {
        Action.SIGNAL: _perform_signal,
        Action.ARM_STAGE: _arm_stage,
        Action.DISARM_STAGE: _disarm_stage,
        Action.SURVEY: _survey,
        Action.SWEEP: _sweep,
        Action.RELEASE: _release,
        Action.DRAIN: _drain,
        Action.ARM_DRAIN: _arm_drain,
        Action.CLOSE: _close,
        Action.PUBLISH: _publish,
    }

    def _stage_sent(self, serial: int) -> StageSent:
        reached, denied = self._results.get(serial, (None, 0))
        return self._sent[serial]._replace(reached=reached, denied=denied)

    def _make_ending(self) -> Ending:
        life = self.life
        ended = self._ended if self._ended is not None else time.monotonic()
        status = life.main_status
        returncode = None if status is None else os.waitstatus_to_exitcode(status)
        reason = life.reason
        if reason is None:
            signaled = returncode is not None and returncode < 0
            reason = Reason.SIGNALED if signaled else Reason.EXITED
        stdout, stderr = self._streams.captured()
        usage = self.contained.usage
        return Ending(
            returncode=returncode,
            reason=reason,
            detail=life.detail,
            stages=tuple(self._stage_sent(serial) for serial in self._sent),
            leftovers=life.leftovers,
            survivors=life.survivors,
            usage=usage if usage != Usage() else self.contained.exit_usage,
            duration=max(0.0, ended - self._began) if self._began else 0.0,
            containment=self.contained.name,
            tree_id=self.tree_id,
            pid=self.contained.pid,
            stdout=stdout[0],
            stderr=stderr[0],
            stdout_cut=stdout[1],
            stderr_cut=stderr[1],
            callback_errors=self.callback_errors.count,
        )


def forget_all() -> None:
    """In a forked child no tree is ours."""
    _alive.clear()


fds.in_forked_child(forget_all)


def end_all(loop: Loop) -> None:
    """The interpreter is exiting. A warden ends its tree by itself, and sooner or later in better
    order than we could now; what nothing else holds is ended here."""
    trees = [tree for tree in alive() if tree.contained.name == "group"]
    for tree in trees:
        tree.kill(loop, Reason.SUPERVISOR_LOST, "the interpreter is exiting", None)
    for tree in trees:
        tree.closed.wait(tree.policy.duration + 15.0)


def require_owner(tree: Tree) -> None:
    """A forked child holds a copy of the handle, but not the tree."""
    if tree.owner_pid != os.getpid():
        raise ProctreeError(
            f"tree {tree.tree_id} belongs to process {tree.owner_pid}; this is process "
            f"{os.getpid()}, a fork of it, and cannot wait for it or end it"
        )
