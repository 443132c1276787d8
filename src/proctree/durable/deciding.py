"""What the table says of an attempt that is recorded, for what is wanted now. Pure."""

from __future__ import annotations

from proctree.durable import table
from proctree.durable.errors import DifferentTarget
from proctree.durable.store import Attempt
from proctree.durable.table import Decision, Found
from proctree.durable.wish import Wish


def found_of(last: Attempt | None, wish: Wish) -> Found:
    """What is known of the last attempt, where nothing of the key runs."""
    if last is None:
        return Found.NOTHING
    if last.request is None or last.trouble:
        return Found.UNREADABLE
    if last.exit is None:
        return Found.GONE
    return table.judge(last.exit.returncode, last.exit.by_itself, wish.allowed)


def decide(last: Attempt | None, found: Found, wish: Wish) -> Decision:
    """What is done about it.

    Raises:
        DifferentTarget: it had another target.
    """
    request = None if last is None else last.request
    same = request is not None and request.fingerprint == wish.fingerprint
    alone = not wish.same_target
    if last is not None and request is not None and request.kind != "tree" and last.exit is None:
        alone = False  # a job may run, and only a Job can ask whether it does
    decision = table.decide(found, same_target=same, key_alone=alone)
    if decision is Decision.REFUSE:
        was = "something else" if request is None else request.target
        raise DifferentTarget(
            f"key {wish.key!r} was started with another target: {was}, and not {wish.target}. "
            "Forget the key, take another one, or pass same_target=False if the key alone counts"
        )
    return decision
