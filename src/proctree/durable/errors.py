"""What can go wrong with a key."""

from __future__ import annotations

from proctree.errors import ProctreeError


class DurableError(ProctreeError):
    """The root of what this package raises by itself; the message names the key."""


class StoreUnusable(DurableError):
    """The place for the records is not ours alone, cannot be made or written, or cannot be reached;
    the message names it, the step and the errno, and says what to do."""


class UnknownKey(DurableError):
    """Nothing is recorded under this key."""


class DifferentTarget(DurableError):
    """What is recorded under this key had another target. `forget` the key, take another one, or
    pass `same_target=False` if the key alone shall count."""


class StillRunning(DurableError):
    """Something of this key runs and cannot be reached, or cannot be ended, or it cannot be seen
    from here whether it does: nothing is started beside it. The message names the processes, or
    where they are, and says what to do."""


class NotRunning(DurableError):
    """There is nothing that could be reconnected to."""


class NotOwner(DurableError):
    """Another supervisor owns the run: only the owner may end it or signal it. `cancel` asks the
    owner, and ends the run where there is none."""


class LeaseLost(DurableError):
    """The lease ran out, or another supervisor has taken over: nothing that this one finds out
    afterwards is recorded (fencing)."""
