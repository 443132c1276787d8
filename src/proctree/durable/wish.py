"""What is wanted of a durable run: checked as a whole before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from proctree import command as _command
from proctree.command import Command, StrPath, Target
from proctree.durable.following import to_logs, to_stdin
from proctree.durable.identity import fingerprint
from proctree.durable.keys import check_key
from proctree.policy import KillPolicy, Leftovers, to_leftovers, to_policy, to_seconds
from proctree.protocol import LEASE_MAX
from proctree.watched import DEFAULT_POLICY, DRAIN_TIMEOUT

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes
    from proctree.durable.running import Run
    from proctree.limits import Limits

DEFAULT_LEASE = 60.0


def _nobody(_run: Run) -> None:
    """Waits for what `start` returns."""


class Wish(NamedTuple):
    """What is wanted: see `proctree.durable.start`."""

    key: str
    command: Command
    target: str
    fingerprint: str
    tree_id: str
    allowed: frozenset[int]
    lease: float | None
    logs: Any
    stdin: Any
    merged: bool
    kill: KillPolicy
    leftovers: Leftovers
    timeout: float | None
    drain_timeout: float
    containment: str
    limits: Limits | None
    same_target: bool
    keep: bool = False
    """Whether an exception that comes before there is a handle lets go of what was started, and
    does not end it."""
    made: Callable[[Run], object] = _nobody
    """Gets the handle of what runs before anything that comes later can lose it: an exception that
    a signal handler raises may come between any two bytecodes on its way to the caller."""

    def again(self) -> Wish:
        """The same for another attempt, which is another tree."""
        tree_id = os.urandom(8).hex()
        return self._replace(tree_id=tree_id, command=self.command.with_tree(tree_id))


def to_allowed(value: Any) -> frozenset[int]:
    """Raises TypeError, ValueError."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"allowed: exit statuses, as (0, 3), not {value!r}")
    allowed = frozenset(value)
    for status in allowed:
        if isinstance(status, bool) or not isinstance(status, int):
            raise TypeError(f"allowed: an exit status is a number, not {status!r}")
        if not 0 <= status <= 255:
            raise ValueError(f"allowed: an exit status is between 0 and 255, not {status}")
    if not allowed:
        raise ValueError("allowed: no exit status would ever be a success")
    return allowed


def to_lease(value: Any) -> float:
    """Raises TypeError, ValueError."""
    lease = to_seconds(value, "lease")
    if lease > LEASE_MAX:
        raise ValueError(f"lease: {lease:g} s is more than {LEASE_MAX:.0f} s (49 days)")
    return lease


def to_wish(
    key: str,
    target: Target,
    *,
    allowed: Iterable[int] = (0,),
    lease: float | None = None,
    logs: Any = None,
    same_target: bool = True,
    timeout: float | None = None,
    kill: KillPolicy = DEFAULT_POLICY,
    cwd: StrPath | None = None,
    env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
    stdin: Any = None,
    stderr: Any = None,
    containment: str = "auto",
    name: str | None = None,
    leftovers: str = "kill",
    drain_timeout: float = DRAIN_TIMEOUT,
    attributes: SpawnAttributes | None = None,
    limits: Limits | None = None,
) -> Wish:
    """See `proctree.durable.start` for the arguments.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    from proctree.stdio import Stdio

    tree_id = os.urandom(8).hex()
    command = _command.check(
        target,
        cwd=cwd,
        env=env,
        name=name,
        pass_fds=(),
        tree_id=tree_id,
        attributes=attributes,
    )
    if command.template is not None:
        raise ValueError(
            "target: a template ends with its supervisor, and a durable run does not; use the "
            "function without a template"
        )
    leave = to_leftovers(leftovers)
    if leave is Leftovers.LEAVE:
        raise ValueError(
            "leftovers: 'leave' is impossible: there would be something of this key that runs "
            "and that nobody knows of"
        )
    if stderr not in (None, Stdio.STDOUT, "stdout", -2):
        raise ValueError("stderr: None (a file of its own) or STDOUT (the file of stdout)")
    merged = stderr is not None
    to_logs(logs, merged)
    target_is = fingerprint(target, command.cwd)
    return Wish(
        key=check_key(key),
        command=command,
        target=target_is.text,
        fingerprint=target_is.digest,
        tree_id=tree_id,
        allowed=to_allowed(allowed),
        lease=None if lease is None else to_lease(lease),
        logs=logs,
        stdin=to_stdin(Stdio.DEVNULL if stdin is None else stdin),
        merged=merged,
        kill=to_policy(kill, "kill"),
        leftovers=leave,
        timeout=None if timeout is None else to_seconds(timeout, "timeout"),
        drain_timeout=to_seconds(drain_timeout, "drain_timeout"),
        containment=containment,
        limits=_limits(limits),
        same_target=_command.to_flag(same_target, "same_target"),
    )


def _limits(value: object) -> Limits | None:
    if value is None:
        return None
    from proctree.limits import to_limits

    return to_limits(value)
