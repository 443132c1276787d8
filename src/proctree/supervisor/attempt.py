"""One start of one child: its tree, and what watches over it, from the launch to the end.

All of it on the loop's thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from proctree.errors import ProctreeError
from proctree.lifecycle import Event, State
from proctree.loop import Loop
from proctree.output import LineCutter
from proctree.policy import KillPolicy
from proctree.records import Reason
from proctree.supervisor.notify_socket import NotifySocket
from proctree.supervisor.probing import Probing
from proctree.supervisor.readiness import Completed, Matcher, Notified
from proctree.supervisor.tail import Tail
from proctree.supervisor.watchdog import Watchdog
from proctree.transitions import TreeEnded, TreeStarted
from proctree.watched import WatchedSubprocess

if TYPE_CHECKING:
    from proctree.outcome import Outcome
    from proctree.supervisor.notification import Notification
    from proctree.supervisor.spec import ChildSpec
    from proctree.tree import Tree

NOT_HANDED_ON = (b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"WATCHDOG_PID")
"""What our own manager has told us: their READY is not ours."""


class Owner(Protocol):
    """Who is told what becomes of a start."""

    def launched(self, attempt: Attempt) -> None:
        """It begins: there is a tree id, unless its tree cannot even be thought of."""

    def began(self, attempt: Attempt) -> None:
        """Its main process runs."""

    def became_ready(self, attempt: Attempt) -> None:
        """It can do its work; each time that it says so."""

    def said(self, attempt: Attempt, notification: Notification) -> None:
        """By its NOTIFY_SOCKET."""

    def ended(self, attempt: Attempt) -> None:
        """Nothing of it runs any more, or it could not be started. The last call."""


class Attempt:
    """See the module.

    Args:
        probing: the child's; None when it is ready as soon as it runs.

    Attributes:
        outcome: how it ended; None before that, and when it was not even launched.
        error: why it could not be started, or None.
        why: how it ended, for people.
        stopping: the supervisor does not want it any more.
        over: nothing of it runs any more, and nothing more is said.
    """

    def __init__(
        self, loop: Loop, spec: ChildSpec, tail: Tail, probing: Probing | None, owner: Owner
    ) -> None:
        self.spec = spec
        self.handle: WatchedSubprocess | None = None
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.why = ""
        self.ready = False
        self.status = ""
        self.launched_at = time.monotonic()
        self._loop = loop
        self._owner = owner
        self._tail = tail
        self._probing = probing
        self._matcher: Matcher | None = None
        self.over = False
        self._extended = 0.0
        self._socket: NotifySocket | None = None
        self._watchdog: Watchdog | None = None
        self._launched = False
        self._ending = False
        self.stopping = False
        self._main_pid: int | None = None

    # -- from the launch to being ready

    def launch(self) -> None:
        """Never raises: what fails is the end of the attempt."""
        try:
            self.handle = self.spec.make(self._tail)
        except Exception as error:
            self._owner.launched(self)
            self._fail(error)
            return
        self._owner.launched(self)
        if self._probing is None:
            self._start(None)
        else:
            self._probing.prepare(self._start)

    def _start(self, trouble: str | None) -> None:
        if self.over:
            return
        if trouble is not None:
            self._fail(ProctreeError(f"ready: {trouble}"))
            return
        try:
            self._make()
        except Exception as error:
            self._fail(error)

    def _make(self) -> None:
        handle = self.handle
        assert handle is not None
        tree = handle._tree
        self._watch_lines(handle)
        changes = self._variables(tree.command.env)
        tree.command = tree.command.with_environment(changes)
        tree.append_files()
        tree.observers.append(self._happened)
        tree.launch(self._loop)
        self._launched = True

    def _variables(self, env: Mapping[bytes, bytes]) -> dict[bytes, bytes | None]:
        """What is different in its environment. What our own manager has told us is not for our
        children, also when `env` is a copy of our environment."""
        changes: dict[bytes, bytes | None] = {
            name: None
            for name in NOT_HANDED_ON
            if name in env and env[name] == os.environb.get(name)
        }
        if self.spec.notify:
            self._socket = NotifySocket(
                self._loop,
                self._tree.tree_id,
                self.spec.name,
                self._tree.contained.has_member,
                self._received,
                main_gone=self._successor_exited,
                reachable=self._as_another_user,
            )
            for name, value in self._socket.environment(self.spec.watchdog).items():
                changes[name.encode()] = value.encode()
        return changes

    @property
    def _tree(self) -> Tree:
        assert self.handle is not None
        return self.handle._tree

    @property
    def pid(self) -> int | None:
        """Its main process: the one it has named by MAINPID, if it has."""
        if self._main_pid is not None or self.handle is None:
            return self._main_pid
        return self.handle.pid

    @property
    def _as_another_user(self) -> bool:
        attributes = self.spec.options.get("attributes")
        return attributes is not None and attributes.uid is not None

    def _fail(self, error: Exception | None) -> None:
        self.error = error
        self.why = "it was stopped before it had started" if error is None else str(error)
        self._end()

    def _watch_lines(self, handle: WatchedSubprocess) -> None:
        probing = self._probing
        matcher = None if probing is None else probing.matcher
        if probing is None or matcher is None:
            return
        self._matcher = matcher
        cutters = {stream: LineCutter() for stream in ("stdout", "stderr")}

        def look(stream: str, data: bytes) -> None:
            # On the tree's worker, and for nothing once it is ready.
            if not self.ready:
                for line in cutters[stream].feed(data):
                    if matcher.feed(stream, line):
                        self._loop.post(lambda: probing.arrived(matcher))

        handle._tree.tap(look)

    def _happened(self, event: Any) -> None:
        if type(event) is TreeStarted:
            self._began()
        elif type(event) is TreeEnded:
            self._tree_ended()

    def _began(self) -> None:
        self._owner.began(self)
        if self._probing is None:
            self.become_ready()
        else:
            self._probing.start()

    def become_ready(self) -> None:
        """What was waited for has come. One that is ending is not ready, whatever answers."""
        if not self.over and not self._ending and self._state is State.RUNNING:
            self._be_ready()

    def _be_ready(self) -> None:
        first, self.ready = not self.ready, True
        if first and self.spec.watchdog is not None:
            self._guard(self.spec.watchdog)
        self._owner.became_ready(self)

    @property
    def _state(self) -> State:
        return State.NEW if self.handle is None else self.handle.state

    def not_ready(self, why: str) -> None:
        """Its time is over."""
        self.end(Reason.NOT_READY, why)

    def _trouble(self) -> str:
        last = "" if self._probing is None else self._probing.last_trouble
        return f" ({last})" if last else ""

    # -- what it says

    def _received(self, said: Notification) -> None:
        if self.over or self.handle is None:
            return
        if said.status is not None:
            self.status = said.status
        if said.main_pid is not None and said.main_pid != self.handle.pid:
            # The one that is named is watched from now on, and its end is the child's.
            self._main_pid = said.main_pid
            self._tree.happened(Event.SUCCEEDED)
        if said.extend_seconds is not None:
            self._extend(said.extend_seconds)
        if said.watchdog_seconds is not None:
            self._guard(said.watchdog_seconds)
        self._owner.said(self, said)
        if said.ready:
            self._said_ready()
        if self._watchdog is not None:
            if said.watchdog:
                self._watchdog.fed()
            if said.watchdog_trigger:
                self._watchdog.trigger()

    def _said_ready(self) -> None:
        if self.ready:
            self.become_ready()  # it has read its configuration again
        elif self._probing is not None and isinstance(self.spec.ready, Notified):
            self._probing.arrived()

    def _guard(self, seconds: float) -> None:
        if self._watchdog is None:
            self._watchdog = Watchdog(self._loop, seconds, self._starved)
        else:
            self._watchdog.set_interval(seconds)

    def _starved(self, why: str) -> None:
        self.end(Reason.WATCHDOG, why)

    def _extend(self, seconds: float) -> None:
        """EXTEND_TIMEOUT_USEC: the deadline under way is not before that time from now. A tree that
        asks for it again and again would never be ended, so there is a bound on all of it."""
        seconds = min(seconds, self.spec.extension - self._extended)
        if seconds > 0 and self._state is State.STOPPING:
            self._extended += self._tree.extend(seconds)
        elif seconds > 0 and self._probing is not None:
            self._extended += self._probing.extend(seconds)

    def _successor_exited(self, status: int | None) -> None:
        self._tree.happened(Event.SUCCESSOR_EXITED, status=status)

    # -- the end

    def stop(self, detail: str, policy: KillPolicy | None) -> None:
        """The supervisor does not want it any more."""
        self.stopping = True
        if self._launched:
            self.end(Reason.KILLED, detail, policy)
        else:
            # What is looked at before the launch may take its time. Not at once, because who asks
            # is in the middle of what the plan wanted.
            if self._probing is not None:
                self._probing.stop()
            self._loop.post(lambda: self._fail(None))

    def end(self, reason: Reason, detail: str, policy: KillPolicy | None = None) -> None:
        """Ends the tree, and says why."""
        self._ending = True
        if self._watchdog is not None:
            self._watchdog.stop()
        self._tree.kill(self._loop, reason, detail, policy)

    def _tree_ended(self) -> None:
        outcome = self._tree.outcome
        assert outcome is not None
        self.error = self._tree.start_error
        ready = self.spec.ready
        for captured in (outcome.stdout, outcome.stderr):
            self._tail.feed(captured or b"")
        if not self._ending and not self.ready and self._was_ready(outcome):
            self._be_ready()
        by_itself = outcome.reason in (Reason.EXITED, Reason.SIGNALED)
        if ready is not None and not self.ready and by_itself:
            detail = f"it ended before it was ready: {ready.describe()}{self._trouble()}"
            outcome = attrs.evolve(outcome, detail=detail)
        self.outcome = outcome
        self.why = str(self.error) if self.error is not None else _say(outcome)
        self._end()

    def _was_ready(self, outcome: Outcome) -> bool:
        """What shows at the end only: it has completed; or it said so, and had exited before
        anybody came to read that."""
        if isinstance(self.spec.ready, Completed):
            return self.succeeded(outcome)
        return self._matcher is not None and self._matcher.matched

    def succeeded(self, outcome: Outcome) -> bool:
        """Whether the spec takes that for a success."""
        return (
            outcome.reason is Reason.EXITED
            and outcome.returncode in self.spec.success
            and not outcome.survivors
        )

    @property
    def failed(self) -> bool:
        """Whether it has ended as it should not have. To be stopped is no failure."""
        return not self.stopping and (self.outcome is None or not self.succeeded(self.outcome))

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        if self._probing is not None:
            self._probing.stop()
        if self._socket is not None:
            self._socket.close()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._owner.ended(self)


def _say(outcome: Outcome) -> str:
    """What has become of it, without what the supervisor says anyway."""
    return outcome.describe().split(": ", 1)[1]
