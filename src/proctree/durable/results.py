"""From what is recorded of an attempt to what the user gets. Pure."""

from __future__ import annotations

from typing import Any

from proctree import protocol
from proctree.durable.recording import Cause, Exit, Request
from proctree.errors import errno_name
from proctree.outcome import Outcome
from proctree.records import Cut, Ending, Reason

_NOBODY_CAME = "no supervisor was attached for as long as its lease"
_DETAILS = {
    Cause.LEASE: (Reason.SUPERVISOR_LOST, _NOBODY_CAME),
    Cause.CANCELLED: (Reason.KILLED, "cancelled"),
    Cause.ASKED: (Reason.KILLED, "a signal asked its warden to end it"),
}


def _reason(how: Exit) -> tuple[Reason, str]:
    if how.cause in _DETAILS:
        return _DETAILS[how.cause]
    if how.cause is Cause.OWNER:
        text, _, detail = how.note.partition("\0")
        try:
            return Reason(text), detail
        except ValueError:  # the note never came, or is another version's
            return Reason.KILLED, detail
    if how.cause is Cause.NOT_STARTED:
        step = protocol.STEPS.get(how.step, f"step {how.step}")
        return Reason.EXEC_FAILED, f"{step}: {errno_name(how.error)}"
    if how.returncode is not None and how.returncode < 0:
        return Reason.SIGNALED, ""
    return Reason.EXITED, how.note


Captured = tuple[bytes | None, Cut | None]


def outcome_of(
    how: Exit,
    request: Request,
    ending: Ending | None = None,
    captured: tuple[Captured, Captured] = ((None, None), (None, None)),
) -> Outcome:
    """The outcome of an attempt that has ended.

    Args:
        how: as its warden has recorded it: that is what every supervisor gets to know alike.
        ending: what we have seen of it ourselves, which adds what is not recorded: the stages, the
            leftovers, the captured output.
        captured: where we have not seen it: the output as it was captured from the files.
    """
    reason, detail = _reason(how)
    (out, out_cut), (err, err_cut) = captured
    seen: dict[str, Any] = {
        "stdout": out,
        "stderr": err,
        "stdout_cut": out_cut,
        "stderr_cut": err_cut,
    }
    if ending is not None:
        taken = ("stages", "leftovers", "survivors", "callback_errors")
        streams = ("stdout", "stderr", "stdout_cut", "stderr_cut")
        seen = {name: getattr(ending, name) for name in taken + streams}
    return Outcome(
        returncode=how.returncode,
        reason=reason,
        detail=detail,
        usage=how.usage,
        duration=how.duration,
        containment=request.containment,
        tree_id=request.tree_id,
        pid=how.pid or None,
        **seen,
    )
