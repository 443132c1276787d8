"""Events for the log, by structlog where the host program uses it.

An unconfigured structlog writes to standard output, into the middle of what `proctree run` passes
through. So events go to structlog once the program has configured it; otherwise warnings go to the
standard library's logger `proctree` (which, unconfigured, writes them to standard error), and what
is not a warning is dropped. Neither module is imported before it is needed.

Event names and their fields are part of the interface; docs/events.md lists them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

SPARING_SECONDS = 1.0


def _configured() -> bool:
    structlog = sys.modules.get("structlog")
    return structlog is not None and bool(structlog.is_configured())


def _emit(level: str, event: str, fields: dict[str, Any]) -> None:
    if _configured():
        import structlog

        getattr(structlog.get_logger("proctree"), level)(event, **fields)
    elif level != "debug":
        import logging

        exc_info = fields.pop("exc_info", False)
        text = " ".join(f"{name}={value!r}" for name, value in fields.items())
        log = getattr(logging.getLogger("proctree"), level)
        log("%s %s", event, text, exc_info=exc_info)


def wanted() -> bool:
    """Whether anybody sees what `debug` says."""
    return _configured()


def debug(event: str, **fields: Any) -> None:
    """An event that only somebody who asked for events wants to see."""
    if _configured():
        _safely("debug", event, fields)


def warning(event: str, **fields: Any) -> None:
    """Something that a person should know about."""
    _safely("warning", event, fields)


def error(event: str, **fields: Any) -> None:
    """Something that should not have happened."""
    _safely("error", event, fields)


def _safely(level: str, event: str, fields: dict[str, Any]) -> None:
    # The host's log processors are the host's code: what they raise must not reach the loop, and
    # there is nowhere left to report it to.
    try:
        _emit(level, event, fields)
    except Exception as exception:
        with contextlib.suppress(Exception):  # there may be no standard error, or a closed one
            print(f"proctree: logging {event} failed: {exception!r}", file=sys.stderr)


class Sparing:
    """Warnings about one tree, at most one of a kind a second: a tree must not fill the log.

    Args:
        fields: of every event.
    """

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._logged: dict[str, tuple[float, int]] = {}

    def warning(self, event: str, **fields: Any) -> None:
        """How many were left out is in the next. From any thread."""
        now = time.monotonic()
        due, left_out = self._logged.get(event, (0.0, 0))
        if now < due:
            self._logged[event] = (due, left_out + 1)
            return
        self._logged[event] = (now + SPARING_SECONDS, 0)
        if left_out:
            fields["left_out"] = left_out
        warning(event, **self._fields, **fields)
