"""Events for the log, by structlog where the host program uses it.

A library that nobody configured prints nothing: an unconfigured structlog would write to standard
output, into the middle of what `proctree run` passes through. So events go to structlog once the
program has configured it; otherwise warnings go to the standard library's logger `proctree`, and
what is not a warning is dropped. Neither module is imported before it is needed.

Event names and their fields are part of the interface; docs/events.md lists them.
"""

from __future__ import annotations

import sys
from typing import Any


def _configured() -> bool:
    structlog = sys.modules.get("structlog")
    return structlog is not None and bool(structlog.is_configured())


def _emit(level: str, event: str, fields: dict[str, Any]) -> None:
    if _configured():
        import structlog

        getattr(structlog.get_logger("proctree"), level)(event, **fields)
    elif level != "debug":
        import logging

        text = " ".join(f"{name}={value!r}" for name, value in fields.items())
        getattr(logging.getLogger("proctree"), level)("%s %s", event, text)


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
        sys.stderr.write(f"proctree: logging {event} failed: {exception!r}\n")
