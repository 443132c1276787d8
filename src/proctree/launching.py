"""Who is asked before a tree is launched: on the thread that launches it, and in its context; on a
callback thread where that is the loop's.

Events come on another thread, where nothing is left of what the caller was about when it launched
the tree (its context variables, contextvars of PEP 567). Without a hook a launch pays for one look
at an empty tuple.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from proctree import events
from proctree.process import fds

if TYPE_CHECKING:
    from proctree.tree import Tree

Environment = Mapping[bytes, bytes | None]
"""Variables that the tree gets; None: one that it does not get, whatever it would inherit."""

Hook = Callable[["Tree"], Environment]

hooks: tuple[Hook, ...] = ()
_lock = threading.Lock()


def add(hook: Hook) -> None:
    """From now on `hook(tree)` is called before each launch. It must not block, and takes no lock
    that is not reentrant: a launch may happen in a signal handler."""
    global hooks
    with _lock:
        hooks = (*hooks, hook)


def remove(hook: Hook) -> None:
    """It is not called any more, but for launches that are under way."""
    global hooks
    with _lock:
        hooks = tuple(other for other in hooks if other != hook)


def ask(tree: Tree) -> Environment:
    """What all of them want in the tree's environment. One that raises is reported, and the tree
    starts without it."""
    wanted: dict[bytes, bytes | None] = {}
    for hook in hooks:
        try:
            wanted.update(hook(tree))
        except Exception as exception:
            events.error(
                "launch_hook.failed", tree_id=tree.tree_id, error=repr(exception), exc_info=True
            )
    return wanted


def _forget() -> None:
    """Whom a forked child launches is not its parent's business."""
    global hooks, _lock
    hooks = ()
    _lock = threading.Lock()


fds.in_forked_child(_forget)
