"""Backends: what a tree is held by, and which one is used."""

from __future__ import annotations

from proctree import events
from proctree.containment.base import Contained
from proctree.errors import ContainmentUnavailable

NAMES = ("warden", "group")
"""Strongest first: the order in which "auto" tries."""


def _backend(name: str) -> type[Contained]:
    if name == "warden":
        from proctree.containment.warden import WardenContained

        return WardenContained
    from proctree.containment.group import GroupContained

    return GroupContained


_told: set[str] = set()


def _tell_fallback(chosen: str, reasons: list[str]) -> None:
    """A weaker backend than there could be is never used silently; once for each cause."""
    why = "; ".join(reasons)
    if why and why not in _told:
        _told.add(why)
        events.warning("containment.fallback", containment=chosen, because=why)


def choose(name: str) -> type[Contained]:
    """The backend for a name, or for "auto" the strongest that can be had.

    Raises:
        ValueError: an unknown name.
        ContainmentUnavailable: it cannot be had here; says why.
    """
    if name != "auto" and name not in NAMES:
        known = ", ".join(("auto", *NAMES))
        raise ValueError(f"containment: {name!r} is none of {known}")
    reasons: list[str] = []
    for candidate in NAMES if name == "auto" else (name,):
        backend = _backend(candidate)
        reason = backend.unavailable()
        if reason is None:
            _tell_fallback(candidate, reasons)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ContainmentUnavailable("no containment: " + "; ".join(reasons))
