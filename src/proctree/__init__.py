"""proctree: process trees that end.

    import proctree

    outcome = proctree.run(["make", "test"], timeout=600)

    with proctree.WatchedSubprocess.start(["./server"], stdout=proctree.Log()) as server:
        ...

A tree never outlives the reason it was started, no signal reaches a process outside it, and nothing
that it does crashes, blocks or bloats its supervisor.
"""

from __future__ import annotations

from proctree.errors import ContainmentUnavailable, ProctreeError, TreeFailed
from proctree.lifecycle import State
from proctree.outcome import Cut, Member, Outcome, Reason, StageSent, Usage
from proctree.output import Capture, Chunks, Lines, Log, Stdio
from proctree.policy import KillPolicy, Leftovers, Scope, Stage
from proctree.watched import WatchedSubprocess, run

__version__ = "0.1.0"

INHERIT = Stdio.INHERIT
DEVNULL = Stdio.DEVNULL
CAPTURE = Stdio.CAPTURE
STDOUT = Stdio.STDOUT

__all__ = [
    "CAPTURE",
    "DEVNULL",
    "INHERIT",
    "STDOUT",
    "Capture",
    "Chunks",
    "ContainmentUnavailable",
    "Cut",
    "KillPolicy",
    "Leftovers",
    "Lines",
    "Log",
    "Member",
    "Outcome",
    "ProctreeError",
    "Reason",
    "Scope",
    "Stage",
    "StageSent",
    "State",
    "Stdio",
    "TreeFailed",
    "Usage",
    "WatchedSubprocess",
    "run",
]
