"""proctree: process trees that end.

    import proctree

    outcome = proctree.run(["make", "test"], timeout=600)

    with proctree.WatchedSubprocess.start(["./server"], stdout=proctree.Log()) as server:
        ...

A tree never outlives the reason it was started, no signal reaches a process outside it, and nothing
that it does crashes, blocks or bloats its supervisor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from proctree.errors import ContainmentUnavailable, ProctreeError, TemplateFailed, TreeFailed
from proctree.lifecycle import State
from proctree.policy import KillPolicy, Leftovers, Scope, Stage
from proctree.records import Cut, Member, Reason, StageSent, Usage
from proctree.stdio import Stdio
from proctree.subscriptions import Subscription, subscribe
from proctree.transitions import (
    EventsMissed,
    MainExited,
    TreeDraining,
    TreeEnded,
    TreeSignalled,
    TreeStarted,
    TreeStarting,
    TreeStopping,
    TreeSurvivor,
    TreeSwept,
)
from proctree.watched import WatchedSubprocess, run

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes
    from proctree.functions import Function
    from proctree.limits import Limits
    from proctree.outcome import Outcome
    from proctree.registry import RegistryUnusable, Swept, sweep
    from proctree.sinks import Capture, Chunks, Lines, Log
    from proctree.template import Template

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
    "EventsMissed",
    "Function",
    "KillPolicy",
    "Leftovers",
    "Limits",
    "Lines",
    "Log",
    "MainExited",
    "Member",
    "Outcome",
    "ProctreeError",
    "Reason",
    "RegistryUnusable",
    "Scope",
    "SpawnAttributes",
    "Stage",
    "StageSent",
    "State",
    "Stdio",
    "Subscription",
    "Swept",
    "Template",
    "TemplateFailed",
    "TreeDraining",
    "TreeEnded",
    "TreeFailed",
    "TreeSignalled",
    "TreeStarted",
    "TreeStarting",
    "TreeStopping",
    "TreeSurvivor",
    "TreeSwept",
    "Usage",
    "WatchedSubprocess",
    "run",
    "subscribe",
    "sweep",
]

# What is rarely needed, or made with attrs, whose import takes longer than `proctree run` does
# without.
_LAZY = {
    "Capture": "proctree.sinks",
    "Chunks": "proctree.sinks",
    "Lines": "proctree.sinks",
    "Log": "proctree.sinks",
    "Function": "proctree.functions",
    "Limits": "proctree.limits",
    "Outcome": "proctree.outcome",
    "RegistryUnusable": "proctree.registry",
    "SpawnAttributes": "proctree.attributes",
    "Swept": "proctree.registry",
    "Template": "proctree.template",
    "sweep": "proctree.registry",
}


def __getattr__(name: str) -> Any:
    """PEP 562."""
    try:
        module = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'proctree' has no attribute {name!r}") from None
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value
