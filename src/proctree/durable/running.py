"""One attempt of a key, as its supervisors have it: started by us, reconnected to, or ended."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING

from proctree import events
from proctree import loop as _loop
from proctree import tree as _tree
from proctree.durable.errors import NotOwner
from proctree.durable.recording import Request
from proctree.durable.results import outcome_of
from proctree.durable.store import attempt_of
from proctree.lifecycle import Event
from proctree.outcome import Outcome
from proctree.policy import (
    KillPolicy,
    Leftovers,
    Stage,
    to_policy,
    to_scope,
    to_seconds,
    to_signal,
)
from proctree.process import proof
from proctree.records import Ending, Reason

if TYPE_CHECKING:
    from proctree.containment.warden import WardenContained
    from proctree.durable.directory import FileStore
    from proctree.durable.following import Followed
    from proctree.durable.store import Attempt
    from proctree.process.snapshot import ProcessInfo
    from proctree.tree import Tree

_TICKS = os.sysconf("SC_CLK_TCK")


class Run:
    """What `start` and `attach` answer. Every method may be called from any thread.

    As a context manager it ends the run when the block is left, unless `detach` was called in it.

    Attributes:
        key: its key.
        number: of the attempt, counted from 1.
        reconnected: whether it was there before: nothing was started for it.
        place: the directory with its out.log and err.log.
        tree_id: 16 hexadecimal digits.
    """

    def __init__(
        self,
        key: str,
        attempt: Attempt,
        request: Request,
        *,
        reconnected: bool,
        store: FileStore,
        outcome: Outcome | None = None,
    ) -> None:
        self.key = key
        self.number = attempt.number
        self.place = attempt.place
        self.tree_id = request.tree_id
        self.reconnected = reconnected
        self._request = request
        self._store = store
        self._outcome = outcome
        self._live: Live | None = None

    @property
    def pid(self) -> int | None:
        """The main process; None when the run had ended before we came."""
        return None if self._live is None else self._live.tree.contained.pid

    @property
    def containment(self) -> str:
        """The backend that holds it."""
        return self._request.containment

    @property
    def owned(self) -> bool:
        """Whether we are the supervisor that may end it."""
        return self._live is not None and self._live.contained.owns

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None as long as it has not. With reason `detached` after `detach`."""
        live = self._live
        if self._outcome is None and live is not None and live.tree.ending is not None:
            self._outcome = self._conclude(live.tree.ending)
        return self._outcome

    def _conclude(self, ending: Ending) -> Outcome:
        """What the warden has recorded is what counts: every supervisor reads the same there."""
        if ending.reason is not Reason.DETACHED:
            attempts = self._store.attempts(self.key)
            ours = attempt_of(attempts, self.tree_id)
            if ours is not None and ours.exit is not None:
                return outcome_of(ours.exit, self._request, ending)
            for attempt in attempts:
                if attempt.number == self.number and attempt.trouble:
                    self._warn(attempt)
        return Outcome.of(ending)

    def _warn(self, attempt: Attempt) -> None:
        """Then all that is known of the end is what we have seen of it."""
        events.warning(
            "durable.unreadable",
            key=self.key,
            attempt=attempt.number,
            kept=attempt.place,
            error=attempt.trouble,
        )

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Waits for the end of the run, or for `detach`.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            The outcome; None when the time ran out first, and then nothing was done to the run.

        Raises:
            RuntimeError: called without a timeout in an output callback of this very run.
            StoreUnusable: it has ended, and what is recorded of that cannot be read.
            ProctreeError: called in a forked child.
        """
        live = self._live
        if live is None:
            return self._outcome
        _tree.require_owner(live.tree)
        if timeout is not None:
            timeout = to_seconds(timeout, "timeout")
        elif live.tree.worker.is_current_thread():
            raise RuntimeError("wait() in an output callback of the same run would wait for itself")
        live.tree.closed.wait(timeout)
        return self.outcome

    def kill(self, policy: KillPolicy | None = None, reason: str = "") -> None:
        """Asks for the end of the run and returns at once; as `WatchedSubprocess.kill`.

        Raises:
            NotOwner: another supervisor owns it: `cancel` asks for its end.
        """
        if policy is not None:
            to_policy(policy, "policy")
        live = self._owned("kill")
        if live is not None:
            live.tree.kill(_loop.get(), Reason.KILLED, reason, policy)

    def signal(self, sig: int, scope: str = "group") -> None:
        """Sends one signal, once; as `WatchedSubprocess.signal`.

        Raises:
            NotOwner: another supervisor owns it.
        """
        stage = Stage(to_signal(sig, "sig"), 0.0, to_scope(scope, "scope"))
        live = self._owned("signal")
        if live is not None:
            live.tree.signal(stage)

    def detach(self) -> None:
        """Lets go of the run, which lives on: for its lease, if nobody else is attached. `wait`
        comes back. While it is being ended, and after its end, this does nothing."""
        if self._live is not None:
            _tree.require_owner(self._live.tree)
            self._live.tree.detach(_loop.get())

    def processes(self) -> list[ProcessInfo]:
        """A snapshot of its living processes, main process first."""
        return [] if self._live is None else self._live.tree.processes()

    def _owned(self, what: str) -> Live | None:
        """None when it has ended."""
        live = self._live
        if live is None or live.tree.closed.is_set():
            return None
        _tree.require_owner(live.tree)
        if not live.contained.owns:
            raise NotOwner(
                f"{what}: another supervisor owns run {self.key!r} (attempt {self.number}); "
                "durable.cancel asks it to end the run"
            )
        return live

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Ends it if it is ours to end, else lets go of it; and waits for that."""
        live = self._live
        if live is None:
            return
        try:
            self.kill(reason="left the with block")
        except NotOwner:
            self.detach()
        try:
            live.tree.closed.wait()
        except BaseException:
            live.tree.kill(_loop.get(), Reason.KILLED, "", KillPolicy.now())
            live.tree.closed.wait()
            raise

    def __repr__(self) -> str:
        state = self._outcome.reason if self._outcome is not None else f"pid {self.pid}"
        return f"<Run {self.key!r} attempt {self.number} tree {self.tree_id} {state}>"


class Live:
    """What belongs to a run that has not ended: its tree, and what depends on who owns it.

    Args:
        timeout: seconds that the run may take in all, whoever supervises it; None: no limit.
        leftovers: what the owner does about what the main process leaves behind.
    """

    def __init__(
        self,
        tree: Tree,
        contained: WardenContained,
        followed: Followed,
        timeout: float | None,
        leftovers: Leftovers,
    ) -> None:
        self.tree = tree
        self.contained = contained
        self._followed = followed
        self._timeout = timeout
        self._leftovers = leftovers
        self._overdue = False
        contained.when_owner = self._owns

    def arm(self) -> None:
        """When its main process is known to run."""
        if self._timeout is None:
            return
        left = max(0.0, self._timeout - self._age())
        loop = _loop.get()
        loop.post(lambda: self._call_later(left))

    def _call_later(self, seconds: float) -> None:
        timer = _loop.get().call_later(seconds, self._timed_out)
        self.tree.when_closed.append(timer.cancel)

    def _age(self) -> float:
        """Seconds since the start of the run, which may be before ours: of its warden, since the
        main process may have been reaped, and its number be that of another one."""
        warden = self.contained.root()
        stat = None if warden is None else proof.read_stat(warden)
        if stat is None:
            return 0.0
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_time / _TICKS)

    def _timed_out(self) -> None:
        self._overdue = True
        if self.contained.owns:
            detail = f"not done after {self._timeout:g} s"
            self.tree.happened(Event.KILL, reason=Reason.TIMEOUT, detail=detail, policy=None)

    def _owns(self, owned: bool) -> None:
        self.tree.life.leftover_policy = watcher_policy(owned, self._leftovers)
        if owned:
            self._became_owner()
        else:
            self._followed.leave_cursor()

    def _became_owner(self) -> None:
        """The one before us has gone: what it would have done is ours to do."""
        self._followed.take_cursor()
        life = self.tree.life
        if self._overdue:
            self._timed_out()
        elif life.main_exited and self._leftovers is Leftovers.KILL:
            detail = "its main process has exited"
            self.tree.happened(Event.KILL, reason=Reason.KILLED, detail=detail, policy=None)


def watcher_policy(owned: bool, wanted: Leftovers) -> Leftovers:
    """Who does not own the tree leaves what its main process leaves behind to the owner."""
    return wanted if owned else Leftovers.WAIT
