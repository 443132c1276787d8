"""What the user may ask for an output stream: plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from proctree.output import DEFAULT_CAPTURE, DEFAULT_LINE


def _positive(_instance: object, attribute: Any, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name}: a number of bytes, not {value!r}")
    if value <= 0:
        raise ValueError(f"{attribute.name}: must be above 0, not {value}")


def _callable(_instance: object, attribute: Any, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{attribute.name}: must be callable, not {value!r}")


@attrs.frozen
class Capture:
    """Keep the stream in the outcome.

    Args:
        limit: bytes to keep, default 64 MiB. Of a longer stream the first and the last half of
            that are kept, and `Outcome.stdout_cut` says what is missing between them.
    """

    limit: int = attrs.field(default=DEFAULT_CAPTURE, validator=_positive)


@attrs.frozen
class Chunks:
    """Call `callback(data: bytes)` with the stream in pieces, as they come."""

    callback: Callable[[bytes], object] = attrs.field(validator=_callable)


@attrs.frozen
class Lines:
    """Call `callback(line: str)` with each line, without its newline.

    Args:
        callback: called on a thread of the tree's own, never on two at once.
        encoding: default UTF-8. What is not valid becomes U+FFFD; it never raises.
        max_length: bytes; a longer line comes in pieces of this size. Default 1 MiB.
    """

    callback: Callable[[str], object] = attrs.field(validator=_callable)
    encoding: str = "utf-8"
    max_length: int = attrs.field(default=DEFAULT_LINE, validator=_positive)

    def __attrs_post_init__(self) -> None:
        # LookupError for an unknown one, now and not in the middle.
        if "\n".encode(self.encoding) != b"\n":
            raise ValueError(f"encoding: {self.encoding!r} does not write a newline as one byte")
        try:
            b"\xff".decode(self.encoding, "replace")
        except UnicodeError:
            raise ValueError(
                f"encoding: {self.encoding!r} cannot replace what is invalid"
            ) from None


@attrs.frozen
class Log:
    """Log one structlog event a line, with `line`, `stream`, `pid` and `tree_id`.

    Args:
        logger: a structlog logger; default `structlog.get_logger("proctree")`.
        level: the name of its method. Default `"info"`.
        event: the event's name. Default `"process.output"`.
        max_length: as for `Lines`.
    """

    logger: Any = None
    level: str = "info"
    event: str = "process.output"
    max_length: int = attrs.field(default=DEFAULT_LINE, validator=_positive)


def log_callback(log: Log, stream: str, tree_id: str, pid: Callable[[], int | None]) -> Any:
    """The line callback for `Log`."""
    logger = log.logger
    if logger is None:
        import structlog

        logger = structlog.get_logger("proctree")
    emit = getattr(logger, log.level)

    def callback(line: str) -> None:
        emit(log.event, line=line, stream=stream, pid=pid(), tree_id=tree_id)

    return callback
