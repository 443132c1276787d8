"""What can go wrong before a tree runs, and what `check=True` raises when it did not end well."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proctree.outcome import Outcome


class ProctreeError(Exception):
    """The root of proctree's own exceptions.

    A command that cannot be started raises what `subprocess` raises for it (`FileNotFoundError`,
    `PermissionError`, `NotADirectoryError`, another `OSError`), and a bad argument raises
    `ValueError` or `TypeError`: those are not `ProctreeError`.
    """


class ContainmentUnavailable(ProctreeError):
    """The containment that was asked for cannot be had here; the message says why."""


class WardenLost(ContainmentUnavailable):
    """The warden was killed, or answered with garbage, before the main process had started."""


class TemplateFailed(ProctreeError):
    """A template cannot start what it was asked for: it could not preload, or has died, or was
    closed. The message names it and says why."""


class TreeFailed(ProctreeError):
    """With `check=True`: the tree did not end by its main process exiting with status 0.

    Attributes:
        outcome: the whole `Outcome`.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return self.outcome.describe()


def errno_name(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}")


_CONTAINMENT_STEPS = {
    "cgroup": "the tree's cgroup cannot be made or entered",
    "limits": "a limit cannot be written into the tree's cgroup",
    "namespace": "the PID namespace cannot be made (it takes CAP_SYS_ADMIN or user namespaces)",
    "mount": "the namespace cannot get a /proc of its own (containers that hide parts of /proc "
    "forbid it)",
    "init": "the init of the PID namespace did not start",
}

_ATTRIBUTE_STEPS = (
    *("oom_score_adj", "nice", "ionice", "affinity", "rlimits"),
    *("groups", "gid", "uid", "no_new_privs"),
)


def start_error(number: int, step: str, argv0: str, cwd: str | None) -> Exception:
    """The exception for a command that could not be started, as `subprocess` would raise it.

    The file that it names is the working directory when that was the trouble, else the program;
    a note says at which step, so that `EACCES` from `chdir` is not taken for one from `exec`. A
    spawn attribute that the kernel refused is named, and containment is `ContainmentUnavailable`.
    """
    if step in _CONTAINMENT_STEPS:
        return ContainmentUnavailable(
            f"{_CONTAINMENT_STEPS[step]}: {errno_name(number)} at step {step!r}"
        )
    if step in _ATTRIBUTE_STEPS:
        refused = OSError(number, f"{os.strerror(number)} (attributes: {step})")
        refused.add_note(f"proctree: attributes.{step}: {errno_name(number)} at step {step!r}")
        return refused
    culprit = cwd if step == "chdir" and cwd is not None else argv0
    exception = OSError(number, os.strerror(number), culprit)
    argument = "cwd" if step == "chdir" else "argv[0]"
    exception.add_note(f"proctree: {argument}: {errno_name(number)} at step {step!r}")
    return exception


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Says in a note at which step of a start a system call failed: errno alone does not tell
    whether it was the pipe for the output or the process itself. The innermost step is noted."""
    try:
        yield
    except OSError as error:
        notes = getattr(error, "__notes__", ())
        if not any(note.startswith("proctree: ") for note in notes):
            error.add_note(f"proctree: {errno_name(error.errno or 0)} at step {name!r}")
        raise
