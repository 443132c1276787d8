"""How a supervisor says that it could not do its work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proctree.errors import ProctreeError

if TYPE_CHECKING:
    from proctree.outcome import Outcome


class ChildFailed(ProctreeError):
    """A child made its supervisor give up.

    Attributes:
        supervisor, child: their names.
        why: how the child ended last.
        outcome: that of its last start; None when there was none.
        lines: its last lines of output, if they went through the supervisor.
    """

    what = "failed"

    def __init__(
        self,
        supervisor: str,
        child: str,
        why: str,
        outcome: Outcome | None = None,
        lines: tuple[str, ...] = (),
    ) -> None:
        super().__init__(supervisor, child, why, outcome, lines)
        self.supervisor = supervisor
        self.child = child
        self.why = why
        self.outcome = outcome
        self.lines = lines

    def __str__(self) -> str:
        text = f"supervisor {self.supervisor!r}: child {self.child!r} {self.what}: {self.why}"
        if self.lines:
            text += "\nits last lines:\n" + "\n".join(f"    {line}" for line in self.lines)
        return text


class StartFailed(ChildFailed):
    """It could not be started, or ended before it was ready, when its supervisor started or when it
    was added. What had been started has been stopped."""

    what = "could not be started"


class IntensityExceeded(ChildFailed):
    """It had to be restarted more often than the supervisor's restart intensity allows. The other
    children have been stopped."""

    what = "was restarted too often"


class ChildSurvived(ChildFailed):
    """It was to be started again, and something of it could not be ended: see the survivors of its
    outcome. A second one beside that is not started. The other children have been stopped."""

    what = "could not be ended"
