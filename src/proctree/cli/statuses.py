"""The exit statuses of `proctree run` and `proctree attach`, as timeout(1) and shells have them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from proctree.records import Ending, Reason

if TYPE_CHECKING:
    from proctree.outcome import Outcome

EXIT_TIMEOUT = 124
EXIT_OURS = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that ask us to end."""


def exit_status(ending: Ending | Outcome) -> int:
    """As timeout(1) has it."""
    if ending.reason is Reason.TIMEOUT:
        return EXIT_TIMEOUT
    if ending.reason is Reason.WARDEN_LOST or ending.returncode is None:
        return EXIT_OURS
    if ending.returncode < 0:
        return 128 - ending.returncode
    return ending.returncode
