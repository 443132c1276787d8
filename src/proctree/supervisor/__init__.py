"""Many trees, kept alive: see docs/supervising.md.

Layers, from the top: `supervisor` binds the pure `plan` to children; `attempt` is one start of one
child and what watches over it; `heartbeat` with `beating`, `readiness` with `probing`, and
`notify_socket` with `watchdog` do the watching.
"""

from proctree.supervisor.errors import ChildFailed, IntensityExceeded, StartFailed
from proctree.supervisor.happenings import (
    ChildDone,
    ChildEnded,
    ChildReady,
    ChildReloading,
    ChildRestarting,
    ChildStarting,
    ChildStatus,
    ChildStopping,
    HeartbeatMissed,
    SupervisorGaveUp,
    SupervisorStarted,
    SupervisorStopped,
    SupervisorStopping,
)
from proctree.supervisor.heartbeat import Beat, Heartbeat, HttpBeat, Rejected
from proctree.supervisor.plan import Phase
from proctree.supervisor.readiness import (
    Check,
    Completed,
    File,
    Http,
    Notified,
    OutputLine,
    Tcp,
    UnixSocket,
)
from proctree.supervisor.restarts import AutoShutdown, Backoff, Restart, Strategy
from proctree.supervisor.spec import ChildSpec
from proctree.supervisor.supervisor import ChildInfo, Supervisor

__all__ = [
    "AutoShutdown",
    "Backoff",
    "Beat",
    "Check",
    "ChildDone",
    "ChildEnded",
    "ChildFailed",
    "ChildInfo",
    "ChildReady",
    "ChildReloading",
    "ChildRestarting",
    "ChildSpec",
    "ChildStarting",
    "ChildStatus",
    "ChildStopping",
    "Completed",
    "File",
    "Heartbeat",
    "HeartbeatMissed",
    "Http",
    "HttpBeat",
    "IntensityExceeded",
    "Notified",
    "OutputLine",
    "Phase",
    "Rejected",
    "Restart",
    "StartFailed",
    "Strategy",
    "Supervisor",
    "SupervisorGaveUp",
    "SupervisorStarted",
    "SupervisorStopped",
    "SupervisorStopping",
    "Tcp",
    "UnixSocket",
]
