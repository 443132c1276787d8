"""Many trees, kept alive: see docs/supervising.md.

Layers, from the top: `supervisor` is the front door; `running` binds the pure `plan` to the loop
and to each `child`; `attempt` is one start of it and what watches over that; `heartbeat` with
`beating`, `readiness` with `probing`, and `notify_socket` with `watchdog` do the watching.
"""

from proctree.supervisor.child import ChildInfo
from proctree.supervisor.errors import ChildFailed, ChildSurvived, IntensityExceeded, StartFailed
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
from proctree.supervisor.supervisor import Supervisor

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
    "ChildSurvived",
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
