"""Rows of the result, and how they are printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_WIDTHS = (42, 10, 44, 13, 14, 3)
_HEADINGS = ("what", "ours", "beside", "ratio", "target", "met")


class Row(NamedTuple):
    """One comparison, or one limit.

    Attributes:
        what: what is measured.
        ours: proctree's value.
        beside: the peer with its value; empty for a limit that has nothing to do with a peer.
        ratio: ours and the peer's in relation.
        target: what was promised; empty when the row is only there to be seen.
        met: whether the target was met; None when there is none, or it could not be measured.
    """

    what: str
    ours: str
    beside: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def times_as_long(what: str, ours: float, peer: str, theirs: float, limit: float | None) -> Row:
    """Ours may take at most `limit` times as long as the peer; None: just shown."""
    ratio = ours / theirs
    return Row(
        what,
        milliseconds(ours),
        f"{peer}: {milliseconds(theirs)}",
        f"{ratio:.2f} x",
        "" if limit is None else f"<= {limit:g} x",
        None if limit is None else ratio <= limit,
    )


def as_much(
    what: str,
    ours: float,
    peer: str,
    theirs: float,
    least: float | None,
    show: Callable[[float], str],
) -> Row:
    """Of a rate ours has to be at least `least` times the peer's; None: just shown."""
    ratio = ours / theirs
    return Row(
        what,
        show(ours),
        f"{peer}: {show(theirs)}",
        f"{ratio:.2f} x",
        "" if least is None else f">= {least:g} x",
        None if least is None else ratio >= least,
    )


def times_faster(what: str, ours: float, peer: str, theirs: float, least: float) -> Row:
    """The peer has to take at least `least` times as long as ours."""
    ratio = theirs / ours
    return Row(
        what,
        milliseconds(ours),
        f"{peer}: {milliseconds(theirs)}",
        f"{ratio:.1f} x faster",
        f">= {least:g} x faster",
        ratio >= least,
    )


def below(what: str, seconds: float, limit: float) -> Row:
    """Ours may take at most so long, whatever others take."""
    return Row(what, milliseconds(seconds), target=f"< {limit:g} s", met=seconds < limit)


def skipped(what: str, reason: str) -> Row:
    return Row(what, "", f"skipped: {reason}")


def heading() -> str:
    return _line(_HEADINGS) + "\n" + _line(tuple("-" * width for width in _WIDTHS))


def line(row: Row) -> str:
    met = "" if row.met is None else "yes" if row.met else "NO"
    return _line((*row[:-1], met))


def _line(cells: tuple[str, ...]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
    return "  ".join(padded).rstrip()
