"""Backends: what a tree is held by, and which one is used."""

from __future__ import annotations

from proctree import events
from proctree.containment.base import WANT_NOTHING, Contained, Wanted
from proctree.errors import ContainmentUnavailable

NAMES = ("pidns", "cgroup", "warden", "group")
"""Strongest first."""

AUTOMATIC = ("cgroup", "warden", "group")
"""The order in which "auto" tries: what costs nothing in behaviour. A PID namespace does: the tree
sees other numbers, and other mounts."""


def _backend(name: str) -> type[Contained]:
    if name == "pidns":
        from proctree.containment.pidns import PidnsContained

        return PidnsContained
    if name == "cgroup":
        from proctree.containment.cgroup import CgroupContained

        return CgroupContained
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
        tell = events.warning if chosen == "group" else events.debug
        tell("containment.fallback", containment=chosen, because=why)


def choose(name: str, wanted: Wanted = WANT_NOTHING) -> type[Contained]:
    """The backend for a name, or for "auto" the strongest that can be had and gives what is wanted.

    Raises:
        ValueError: an unknown name.
        ContainmentUnavailable: it cannot be had here, or cannot give what is wanted; says why.
    """
    if name != "auto" and name not in NAMES:
        known = ", ".join(("auto", *NAMES))
        raise ValueError(f"containment: {name!r} is none of {known}")
    automatic = name == "auto"
    reasons: list[str] = []
    for candidate in AUTOMATIC if automatic else (name,):
        backend = _backend(candidate)
        reason = backend.unavailable() or backend.unfit(wanted)
        if reason is None and automatic and wanted.limits is None:
            reason = backend.unasked()
        if reason is None:
            if automatic:
                _tell_fallback(candidate, reasons)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ContainmentUnavailable("no containment: " + "; ".join(reasons))
